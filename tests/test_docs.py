"""What the documentation says of the code, against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from seal_fast.noise_triggers import verdict as noise
from seal_fast.text_triggers import verdict as text
from seal_fast.verdict import Rule

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("section", "rules"), [("Noise triggers: the rules", noise.RULES), ("Text triggers", text.RULES)])
def test_the_documented_rules_are_the_table(section: str, rules: tuple[Rule[Any], ...]) -> None:
    page = (DOCS / "scan.md").read_text(encoding="utf-8")
    part = page.split(f"## {section}\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| ([A-Z]\d+) \|.*\| (\w+) \|$", part, re.MULTILINE)
    assert listed == [(rule.code, rule.verdict.value) for rule in rules]


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
