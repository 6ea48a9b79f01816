from __future__ import annotations

import math

import pytest

from seal_fast.results.progress import Progress
from seal_fast.training import Stage
from seal_fast.workflows.stage_progress import share_of_work


def test_stages_count_by_the_images_that_they_put_through_the_network() -> None:
    seen: list[Progress] = []
    at = Progress("m", 3, 7, "loading")
    on_step = share_of_work([Stage("sweep", 10, 6), Stage("images", 2, 20)], at, seen.append)
    on_step("sweep", 5, 10, math.nan)
    # a search may report its iterations in other units than it announced
    on_step("sweep", 1, 1, math.nan)
    on_step("images", 1, 2, 0.5)
    on_step("images", 2, 2, 0.5)
    assert [one.fraction for one in seen] == pytest.approx([0.3, 0.6, 0.8, 1.0])
    assert (seen[2].model, seen[2].index, seen[2].total, seen[2].stage) == ("m", 3, 7, "images")
    assert (seen[2].iteration, seen[2].iterations) == (1, 2)
