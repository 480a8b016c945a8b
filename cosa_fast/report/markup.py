"""HTML as strings that are escaped unless they are known to be markup."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

VOID = {"br", "img", "line", "polyline", "rect"}
"""Elements without content (the last three are SVG's)."""


class Html(str):
    """Markup: `element` puts it in as it is, and escapes every other string."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page."""

    id: str
    title: str
    body: Html


@dataclass(frozen=True, slots=True)
class Missing:
    """A part that the results folder has no files for."""

    what: str
    how: str
    """What to do so that it will be there; the words between backquotes are a command or a setting."""


def join(*parts: str) -> Html:
    """One piece of markup from several; plain strings are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def element(name: str, *content: str, **attributes: str | float | bool | None) -> Html:
    """`<name attribute="...">content</name>`.

    Args:
        content: plain strings are escaped.
        attributes: `class_` means class, `_` in a name `-`; True gives a bare attribute, None and False give none.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*content)}</{name}>")


def code(text: str) -> Html:
    """Escaped text whose parts between backquotes are `<code>`."""
    pieces = text.split("`")
    return join(*(element("code", piece) if number % 2 else piece for number, piece in enumerate(pieces)))


def scroller(label: str, *content: str, name: str = "div", class_: str = "scroll") -> Html:
    """A box that scrolls sideways by itself; it can be focused, so that a keyboard can scroll it too."""
    return element(name, *content, class_=class_, role="region", aria_label=label, tabindex="0")


def table_figure(caption: str, *content: str, class_: str | None = None) -> Html:
    """A table in a box that scrolls, under a caption that doesn't."""
    inner = scroller(caption, element("table", *content, class_=class_))
    return element("figure", element("figcaption", caption, class_="muted"), inner)
