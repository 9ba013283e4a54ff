"""From a finished run to the Hub: its card, its files, one commit and a tag."""
