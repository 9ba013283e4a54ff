"""The comment at the top of a recipe, for tests that hold it against what the package knows; no program reads it."""


def header(path):
    """What it says by its words: Yields, Hardware, Time, Command, Paper, Others."""
    said = {}
    for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        word, text = line[2:12].strip(), line[12:].strip()
        if word[:1].isupper():
            said[word] = text
        elif not word and said:  # goes on in the next line
            said[list(said)[-1]] += f" {text}"
    return said
