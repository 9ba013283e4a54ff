"""Markdown as a reader sees it, by a parser that is not ours."""

from html.parser import HTMLParser

import pytest


class Text(HTMLParser):
    """What a page shows, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shown, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.shown += data


def rendered(markdown: str) -> Text:
    """Markdown's text and tags, as CommonMark has it, with tables."""
    markdown_it = pytest.importorskip("markdown_it")
    return Text(markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))
