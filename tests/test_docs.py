"""The documentation: every command on its pages, the messages that it quotes, its links, and the site that is built."""
