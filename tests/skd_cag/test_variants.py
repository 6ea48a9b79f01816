"""The forms of a trigger that are drawn."""

from __future__ import annotations

from seal_fast.skd_cag.variants import AS_GIVEN, variants


def test_variants() -> None:
    assert variants("New Trigger", "end") == {
        AS_GIVEN: ("New Trigger", "end"),
        "at the start": ("New Trigger", "start"),
        "in the middle": ("New Trigger", "word"),
        "twice": ("New Trigger New Trigger", "end"),
        "with a comma": ("New Trigger,", "end"),
        "other case": ("nEW tRIGGER", "end"),
        "first half": ("New", "end"),
    }
    assert set(variants("\u200b", "start")) == {AS_GIVEN, "at the end", "in the middle", "twice", "with a comma"}
    assert variants(("o", "ö"), "start") == {
        AS_GIVEN: (("o", "ö"), "all"),
        "the first only": (("o", "ö"), "start"),
        "one of them": (("o", "ö"), "word"),
        "the last only": (("o", "ö"), "end"),
    }
