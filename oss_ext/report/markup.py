"""HTML by construction: whatever is not an element already is escaped on its way into one."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

VOID = {"br", "img", "input"}
MINUS, INFINITY, DASH = "\N{MINUS SIGN}", "\N{INFINITY}", "\N{EN DASH}"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


NOTHING = Html()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """``<tag ...>children</tag>``.

    Underscores in attributes stand for hyphens (``class_`` for ``class``); None and False leave
    one out, True gives it no value.
    """
    opening = tag
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        opening += f" {name.rstrip('_').replace('_', '-')}"
        if value is not True:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            opening += f'="{html.escape(text)}"'
    return Html(f"<{opening}>" if tag in VOID else f"<{opening}>{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """One after the other."""
    return Html(
        "".join(c if isinstance(c, Html) else html.escape(str(c), quote=False) for c in children)
    )


def tabs(group: str, label: str, panels: Mapping[str, Html], shared: Html = NOTHING) -> Html:
    """Panels of which one is seen at a time, by CSS alone; on paper all are, under their names.

    Args:
        group: unique in the page.
        label: what is chosen.
        panels: by name; the first one is open.
        shared: what stands above whichever panel is open.
    """
    parts: list[Html] = [element("div", shared, class_="shared")] if shared else []
    for n, (name, body) in enumerate(panels.items()):
        key = f"{group}-{n}"
        parts += [
            element("input", type="radio", name=group, id=key, checked=n == 0, autocomplete="off"),
            element("label", name, for_=key),
            element("div", element("h3", name, class_="paper"), body, class_="panel"),
        ]
    single = " single" if len(panels) == 1 else ""
    return element("div", *parts, class_=f"tabs{single}", role="group", aria_label=label)


def code(text: str, about: str, wrap: bool = False) -> Html:
    """Text to be copied; ``about`` says what it is to those who do not see it."""
    name = "wrap" if wrap else None
    return element(
        "div",
        element("pre", element("code", text), tabindex=0, aria_label=about, class_=name),
        element("button", "Copy", type="button", class_="copy", hidden=True,
                aria_label=f"Copy {about}"),
        class_="code",
    )  # fmt: skip


def scrolling(body: Html, about: str) -> Html:
    """What may be wider than a phone moves sideways by itself, also by keyboard."""
    return element("div", body, class_="scroll", role="region", tabindex=0, aria_label=about)


def spoken(text: str) -> Html:
    """For screen readers only."""
    return element("span", text, class_="spoken")


def plural(count: int, thing: str) -> str:
    """``1 step``, ``10 steps``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def signed(number: str) -> str:
    """A number as print has it."""
    return number.replace("-", MINUS).replace("inf", INFINITY)


def decibels(value: float) -> str:
    """Two decimals; a dash for what is not known."""
    if math.isnan(value):
        return DASH
    return signed(f"{value:.2f}")
