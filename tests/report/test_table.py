from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from seal_fast.report.table import Line, print_table, wrap

WIDTHS = st.integers(16, 120)
# letters, digits and what paths are made of, some of it two cells wide
WORDS = st.text("abcXYZ019.é模型/_-", min_size=1, max_size=60)
TEXTS = st.lists(WORDS, min_size=1, max_size=30).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(TEXTS, WIDTHS)
def test_lines_fit_and_words_that_fit_are_whole(text, width):
    lines = wrap(text, width)
    assert all(cell_len(line) <= width for line in lines)
    shown = [word for line in lines for word in line.split()]
    for word in text.split():
        if cell_len(word) <= width:
            assert word in shown
            shown = shown[shown.index(word) + 1 :]


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(60, 120))
def test_no_letter_is_lost_where_every_part_fits(text, width):
    parts = text.replace("/", "/ ").replace("_", "_ ").replace("-", "- ").split()
    if all(cell_len(part) <= width for part in parts):
        assert "".join(wrap(text, width)).replace(" ", "") == text.replace(" ", "")


def test_a_text_that_fits_stays_as_it_is():
    assert wrap("a  b -c_/d", 16) == ["a  b -c_/d"]
    assert wrap("", 16) == [""]


def test_a_long_path_is_folded_behind_its_separators():
    assert wrap("hub/a-long-name/of_a_model/last", 16) == ["hub/a-long-name/", "of_a_model/last"]


def test_a_part_without_separators_keeps_its_ends():
    assert wrap("abcdefghijklmnopqrstuvwxyz", 16) == ["abcdefg...uvwxyz"]


def test_only_the_folded_column_is_folded():
    stream = io.StringIO()
    sentence = "why it is so, in more words than one line holds"
    lines = [Line(("yes", "one-two-three-four-five", "1.00"), (sentence,)), Line(("", "x", ""))]
    console = Console(file=stream, width=30)
    print_table(console, ("verdict", "model", "score"), lines, folded="model", numbers=["score"])
    assert stream.getvalue().splitlines() == [
        "verdict  model             score",
        "--------------------------------",
        "yes      one-two-three-     1.00",
        "         four-five",
        "           why it is so, in",
        "           more words than one",
        "           line holds",
        "         x",
    ]
