"""Tables that fit the console: one column is folded, the others stay whole, and a sentence may follow a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = "  "
NARROWEST = 16
"""Least width of folded text; in a narrower console, lines are longer than the console is wide."""


@dataclass(frozen=True)
class Line:
    """One line of a table: a cell per column, and sentences that are printed below them."""

    cells: tuple[str | Text, ...]
    sentences: tuple[str, ...] = ()


def print_table(
    console: Console, columns: Sequence[str], lines: Sequence[Line], *, folded: str, numbers: Collection[str] = ()
) -> None:
    """Print lines below the names of their columns.

    Args:
        console: where to; its width bounds every line.
        columns: names of the columns.
        lines: printed in this order. Sentences are wrapped, and indented below the folded column.
        folded: the column that takes what width the others leave; its cells may take several lines.
        numbers: columns that are aligned right.
    """
    place = columns.index(folded)
    widths = [
        max(cell_len(str(cell)) for cell in cells) for cells in zip(columns, *(line.cells for line in lines), strict=True)
    ]
    gaps = len(GAP) * (len(columns) - 1)
    others = sum(widths) - widths[place] + gaps
    widths[place] = min(widths[place], max(NARROWEST, console.width - others))
    indent = " " * (sum(widths[:place]) + len(GAP) * place)

    def aligned(cells: Sequence[str | Text]) -> Text:
        text = Text()
        for column, cell, width in zip(columns, cells, widths, strict=True):
            padding = " " * (width - cell_len(str(cell)))
            text.append(padding if column in numbers else "").append(cell).append("" if column in numbers else padding)
            text.append(GAP)
        text.rstrip()
        return text

    print_lines(console, [aligned(columns), "-" * (sum(widths) + gaps)])
    for line in lines:
        first, *rest = wrap(str(line.cells[place]), widths[place])
        print_lines(console, [aligned([*line.cells[:place], first, *line.cells[place + 1 :]])])
        print_lines(console, [indent + part for part in rest])
        margin = indent + GAP
        for sentence in line.sentences:
            parts = wrap(sentence, max(NARROWEST, console.width - len(margin)))
            print_lines(console, [margin + part for part in parts])


def print_lines(console: Console, lines: Sequence[str | Text]) -> None:
    """Print lines without folding them again."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_sentence(console: Console, sentence: str) -> None:
    """Print a sentence, wrapped at the console's width."""
    print_lines(console, wrap(sentence, max(NARROWEST, console.width)))


def wrap(text: str, width: int) -> list[str]:
    """Fold a text into lines of at most `width` cells, between words.

    A word that is longer than a line, such as a path, is folded behind "/", "-" and "_". A part of it that is still too long
    keeps its two ends, with dots between them.
    """
    lines: list[str] = []
    for word in text.split(" "):
        for number, part in enumerate(_parts(word, width)):
            glue = "" if number else " "
            if lines and cell_len(lines[-1] + glue + part) <= width:
                lines[-1] += glue + part
            else:
                lines.append(part)
    return lines


def _parts(word: str, width: int) -> list[str]:
    """Parts of a word that fit into a line. Only a word that is longer than a line is broken."""
    if cell_len(word) <= width:
        return [word]
    return [_ends(part, width) for part in re.findall(r"[^/_-]*[/_-]|[^/_-]+", word)]


def _ends(text: str, width: int) -> str:
    """The text, or its two ends around dots where it is longer than `width`."""
    if cell_len(text) <= width:
        return text
    kept = width - len("...")
    head = _start(text, kept - kept // 2)
    tail = _start(text[::-1], kept // 2)[::-1]
    return f"{head}...{tail}"


def _start(text: str, width: int) -> str:
    """The longest start of a text that takes at most `width` cells."""
    end = 0
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return text[:end]
