"""A page as its tests read it: elements, and what a reader would see."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"br", "img", "input", "meta"}


@dataclass
class Element:
    """An element of a page.

    Attributes:
        inside: the ``id`` of the section that it is in.
        text: all text in it.
    """

    tag: str
    attributes: dict[str, str | None]
    inside: str | None
    text: str = ""

    def __getitem__(self, name: str) -> str:
        value = self.attributes[name]
        assert value is not None
        return value

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


@dataclass
class Page(HTMLParser):
    """Parsed HTML; what is not well-formed is an assertion error."""

    source: str
    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        section = self.open[-1].inside if self.open else None
        element = Element(tag, dict(attrs), section)
        if tag == "section":
            element.inside = element["id"]
        self.elements.append(element)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} closed but not open"
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, inside: str | None = None) -> list[Element]:
        return [e for e in self.elements if e.tag == tag and inside in (None, e.inside)]

    def of_class(self, name: str, inside: str | None = None) -> list[Element]:
        return [e for e in self.elements if name in e.classes and inside in (None, e.inside)]

    def section(self, name: str) -> str:
        """What a section says."""
        return next(e.text for e in self.all("section") if e["id"] == name)

    @property
    def sections(self) -> list[str]:
        return [e["id"] for e in self.all("section")]

    def rows(self) -> list[str]:
        """The lines of the comparison."""
        return [re.sub(r"\s+", " ", e.text) for e in self.all("tr", "comparison")]
