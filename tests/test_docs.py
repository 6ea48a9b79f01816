"""What the documentation says of the code, against the code."""

from __future__ import annotations

import re
from pathlib import Path

from seal_fast.noise_triggers.verdict import RULES

DOCS = Path(__file__).parents[1] / "docs"


def test_the_documented_rules_are_the_table() -> None:
    listed = re.findall(r"^\| ([A-Z]\d+) \|.*\| (\w+) \|$", (DOCS / "scan.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(rule.code, rule.verdict.value) for rule in RULES]


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
