"""A page of HTML as a browser sees it: its tags, addresses, tables and text."""

from html.parser import HTMLParser
from pathlib import Path

LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Reading(HTMLParser):
    """What a page holds.

    Attributes:
        tags: (tag, attributes) of every element
        text: all text but that of style and script
        tables: of each table its rows, and of each row the texts of its cells
        texts: the texts of all elements <p> in a <figure>
    """

    def __init__(self, page: Path):
        super().__init__()
        self.tags, self.text, self.tables, self.texts = [], "", [], []
        self._open = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "p" and "figure" in self._open:
            self.texts.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif "figure" in self._open and "p" in self._open:
            self.texts[-1] += data

    def addresses(self) -> list[str]:
        """Every address that the page loads or links to."""
        return [value for _, words in self.tags for key, value in words.items() if key in LOADS]
