"""HTML that cannot be broken out of: every text is escaped unless it was made here."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"img", "input", "meta", "br", "hr"}


class Markup(str):
    """A piece of finished HTML. Only `tag`, `join` and `raw` make one."""

    __slots__ = ()


Child = object  # Markup as it is, None as nothing, a list or tuple item by item, anything else as escaped text


def raw(text: str) -> Markup:
    """HTML written in this package, never anything that was read."""
    return Markup(text)


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Children one after the other."""
    return Markup(between.join(_text(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. `class_` is class, `aria_label` is aria-label; an attribute of None or False is left out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value), quote=True)}"'


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return join(child)
    return escape(str(child), quote=True)
