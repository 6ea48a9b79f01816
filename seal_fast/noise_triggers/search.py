"""The default search: propose candidates for a trigger and test each by sampling, until one is accepted.

1. *Fixed points.* A few shifts and patches are iterated through the denoiser; they need no gradients and find most attacks.
2. *Target-guided refinement.* Where a candidate's samples agree on a new image, mu is fitted to that image.
3. *Joint trigger-target inversion.* mu and the target are fitted together, for attacks on deterministic samplers.
4. *Test.* A candidate's score is how many times more similar it makes the samples; one that scores high ends the search.
5. The best candidate is the one of the largest score; `seal_fast.noise_triggers.calibration` decides what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from seal_fast.noise_triggers.activation_test import ActivationTest
from seal_fast.noise_triggers.candidates import Candidate, SearchResult, TestResult
from seal_fast.noise_triggers.fixed_points import propose_fixed_points
from seal_fast.noise_triggers.joint_inversion import invert_jointly
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.target_refinement import refine_with_target

Proposer = Callable[[Probe, SearchSettings, Sequence[TestResult]], Iterator[Candidate]]
"""Proposes candidates, given all results so far. When it is resumed after a `yield`, the last result is that candidate's."""

PROPOSERS: tuple[Proposer, ...] = (propose_fixed_points, refine_with_target, invert_jointly)


def search_trigger(probe: Probe, settings: SearchSettings, proposers: Sequence[Proposer] = PROPOSERS) -> SearchResult:
    """Search one model for a trigger.

    Args:
        probe: the suspect model.
        settings: every number of the search.
        proposers: in the order of their turns.

    Returns:
        Every candidate that was tested.
    """
    test, tried = ActivationTest(probe, settings.test), list[TestResult]()
    for propose in proposers:
        for candidate in propose(probe, settings, tried):
            tried.append(test(candidate))
            if tried[-1].accepted:
                return SearchResult(tuple(tried))
    return SearchResult(tuple(tried))
