"""Text that cannot control the terminal or page that shows it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every character that cannot be printed as an escape, such as the six characters of `\\u200b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
