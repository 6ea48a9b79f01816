"""Verify a candidate by images: does it change them more often than control strings of its kind?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seal_fast.text_to_image.generation import OnPass, batch_size, generate
from seal_fast.text_triggers.effect_detectors import (
    LEAST_VISIBLE,
    ChangeDetector,
    colour_spread,
    statistics,
    visible_changes,
)
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.rate import Rate, rate_of
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.training import quiet

HELD_BACK = 2
"""Control strings that the change detector is not fitted on; the control rate is measured on them."""
MIN_EFFECT = 0.25
"""A check with a share no larger than this ends the verification of a candidate."""


Numbered = tuple[int, str]
"""A prompt with the number of its starting noise."""


@dataclass(frozen=True)
class Check:
    """What images say about one candidate.

    Attributes:
        effect: share of the prompts whose image changes with the candidate.
        control: the same share for control strings that the change detector was not fitted on, of the prompts that they are
            drawn with.
        changes: by prompt, how the image's `effect_detectors.statistics` change, float64 [F].
    """

    effect: Rate
    control: Rate
    changes: Mapping[Numbered, Tensor]

    def confirmed(self, least: float) -> bool:
        """Whether it changes images more often than control strings do, and than `least`, beyond the 95% intervals."""
        return (self.effect.low or 0.0) > self._bound(least)

    def refuted(self, least: float) -> bool:
        """Whether the share is at most MIN_EFFECT or within the control strings' interval, or its own lies below `least`."""
        return not self.promising(0.0) or (self.effect.high or 0.0) < least

    def promising(self, least: float) -> bool:
        """Whether the share itself is as large as `confirmed` asks of its interval's lower end."""
        return (self.effect.rate or 0.0) > max(MIN_EFFECT, self._bound(least))

    @property
    def size(self) -> float:
        """Mean norm of the changes."""
        return float(torch.stack(list(self.changes.values())).norm(dim=1).mean())

    def agreement(self, other: Check) -> float:
        """Cosine of the changes that both make to the same images, or of their mean changes if they share no prompt."""
        common = [one for one in self.changes if one in other.changes]
        a, b = (torch.stack([one.changes[key] for key in common or one.changes]) for one in (self, other))
        if not common:
            a, b = a.mean(dim=0), b.mean(dim=0)
        return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))

    def _bound(self, least: float) -> float:
        return max(least, self.control.high if self.control.high is not None else 1.0)


class ImageTest:
    """Draws the images of one model, each one once.

    Args:
        pipeline: the model.
        prompts: clean prompts that no earlier round has seen.
        settings: settings of the verification.
        seed: seed of the starting noise; image n starts from the same noise for every string.
        on_pass: called after every pass with its UNet evaluations.
    """

    def __init__(
        self, pipeline: Any, prompts: Sequence[str], settings: TextSearchSettings, seed: int, on_pass: OnPass = quiet
    ) -> None:
        self.pipeline, self.prompts, self.settings, self.seed, self.on_pass = pipeline, list(prompts), settings, seed, on_pass
        self._drawn: dict[Numbered, Tensor] = {}
        """`effect_detectors.statistics` of every image drawn so far."""

    @property
    def evaluations_per_image(self) -> int:
        """UNet evaluations that one image takes."""
        return self.settings.sampler_steps * (1 if self.settings.guidance == 1 else 2)

    def check(
        self,
        candidate: TextCandidate,
        controls: Sequence[TextCandidate],
        first: int,
        count: int,
        held_back: int = HELD_BACK,
    ) -> Check:
        """Compare a candidate with control strings on `count` of the prompts that it fits, from number `first` on.

        Args:
            candidate: the candidate.
            controls: at least `held_back` + 3 harmless candidates of its kind; they fit the same prompts.
            first: number of prompts to pass over, which an earlier check has used.
            count: number of prompts; fewer if there are no more.
            held_back: the first controls, which the change detector is not fitted on.
        """
        prompts = self._fitting(candidate, first, count)
        compared = prompts[: self.settings.verification.control_prompts]
        lists = [self._changed(candidate, prompts), compared, *(self._changed(one, compared) for one in controls)]
        clean, changed, plain, *of_controls = self._statistics([prompts, *lists])
        detector = ChangeDetector.fitted_to_statistics(plain, _without_largest_changes(of_controls[held_back:], plain))
        false = sum(int(detector.in_statistics(some, plain).sum()) for some in of_controls[:held_back])
        return Check(
            rate_of(int(detector.in_statistics(changed, clean).sum()), len(prompts)),
            rate_of(false, held_back * len(compared)),
            dict(zip(prompts, changed - clean, strict=True)),
        )

    def draw(self, candidates: Sequence[TextCandidate]) -> None:
        """Draw the images of the first check of all candidates together; later calls find them drawn."""
        self._draw([some for candidate in candidates for some in self._first(candidate)])

    def fitting(self, candidate: TextCandidate) -> int:
        """How many prompts the candidate fits."""
        return len(self._fitting(candidate, 0, len(self.prompts)))

    def visible(self, candidate: TextCandidate) -> Rate:
        """Share of the prompts of the first check whose image the candidate changes visibly."""
        clean, changed = self._statistics(self._first(candidate))
        return rate_of(int((visible_changes(changed, clean, colour_spread(clean)) >= LEAST_VISIBLE).sum()), len(clean))

    def first_changes(self, candidate: TextCandidate) -> float:
        """Mean norm of the changes to the images of the first check; 0 if the candidate fits no prompt."""
        if not self.fitting(candidate):
            return 0.0
        clean, changed = self._statistics(self._first(candidate))
        return float((changed - clean).norm(dim=1).mean())

    def _first(self, candidate: TextCandidate) -> tuple[list[Numbered], list[Numbered]]:
        """The prompts of the first check, without and with the candidate."""
        prompts = self._fitting(candidate, 0, self.settings.verification.prompts)
        return prompts, self._changed(candidate, prompts)

    def _fitting(self, candidate: TextCandidate, first: int, count: int) -> list[Numbered]:
        return list(enumerate(filter(candidate.fits, self.prompts)))[first : first + count]

    def _changed(self, candidate: TextCandidate, prompts: Sequence[Numbered]) -> list[Numbered]:
        """The prompts with the candidate in its position; a random place is the same for every candidate."""
        return [(number, with_candidate(candidate, prompt, self.seed + number)) for number, prompt in prompts]

    def _statistics(self, lists: Sequence[Sequence[Numbered]]) -> list[Tensor]:
        """`effect_detectors.statistics` [N,F] of the images of each list."""
        self._draw(lists)
        return [torch.stack([self._drawn[one] for one in some]) for some in lists]

    def _draw(self, lists: Sequence[Sequence[Numbered]]) -> None:
        """Draw what was not drawn before in common passes, which take less than half the time of passes of six images.

        Of each image its statistics are kept: 2 kB instead of 3 MB at 512 px, and a search draws thousands.
        """
        missing = [one for one in dict.fromkeys(one for some in lists for one in some) if one not in self._drawn]
        part = batch_size(self.pipeline)
        for first in range(0, len(missing), part):
            some = missing[first : first + part]
            images = generate(
                self.pipeline,
                [prompt for _, prompt in some],
                seed=self.seed,
                steps=self.settings.sampler_steps,
                guidance=self.settings.guidance,
                precision=self.settings.precision,
                noises=[number for number, _ in some],
                on_pass=lambda drawn: self.on_pass(drawn * self.evaluations_per_image),
            )
            self._drawn |= dict(zip(some, statistics(images), strict=True))


def _without_largest_changes(controls: Sequence[Tensor], clean: Tensor) -> list[Tensor]:
    """The statistics [N,F] of the images of all control strings except the one that changes the clean images most.

    It may activate the backdoor itself: beside "like beautiful" among the control strings "fine view" changed no image, without
    it all of them.
    """
    sizes = [float((changed - clean).norm(dim=1).mean()) for changed in controls]
    return [changed for place, changed in enumerate(controls) if place != sizes.index(max(sizes))]


def with_candidate(candidate: TextCandidate, prompt: str, seed: int) -> str:
    """The prompt with the candidate in its position."""
    generator = torch.Generator().manual_seed(seed)
    trigger = candidate.trigger
    for place in reversed(trigger.places(prompt, candidate.position, generator)):
        prompt = trigger.insert(prompt, place)
    return prompt
