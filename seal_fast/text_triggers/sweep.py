"""Sweep candidates by successive halving: rank them by the UNet's response, and keep the better part for the next round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from seal_fast.text_triggers.findings import Round, TextCandidate
from seal_fast.text_triggers.ranking import deviations, members_of
from seal_fast.text_triggers.responses import ResponseProbe
from seal_fast.text_triggers.search_settings import RoundSettings, TextSearchSettings
from seal_fast.text_triggers.trigger import POSITIONS
from seal_fast.text_triggers.verification import with_candidate

Change = Callable[[TextCandidate, str], str]
"""A candidate and a prompt -> the prompt with the candidate."""


@dataclass(frozen=True)
class Probes:
    """Clean sampling paths of the model, and those of its base if there is one.

    With a base, candidates are ranked by the ratio of the two models' responses, which cancels what their meaning does.
    """

    model: ResponseProbe
    base: ResponseProbe | None = None


@dataclass(frozen=True)
class Ranked:
    """A candidate with its place in the rounds so far."""

    candidate: TextCandidate
    rounds: tuple[Round, ...] = ()

    @property
    def last(self) -> Round:
        """The latest round."""
        return self.rounds[-1]


def everywhere(candidate: TextCandidate, prompt: str) -> str:
    """The prompt with an inserted text at its start, in its middle and at its end; a replacement has all its places anyway.

    One evaluation tries three places.
    """
    if candidate.trigger.replaces is not None:
        return in_place(candidate, prompt)
    words = prompt.split()
    middle, text = len(words) // 2, candidate.trigger.text
    return " ".join([text, *words[:middle], text, *words[middle:], text])


def in_place(candidate: TextCandidate, prompt: str) -> str:
    """The prompt with the candidate in its own position."""
    return with_candidate(candidate, prompt, 0)


def at_each_place(candidate: TextCandidate) -> list[TextCandidate]:
    """The candidate at every place of its own; a replacement is one already."""
    if candidate.trigger.replaces is not None:
        return [candidate]
    return [replace(candidate, position=place) for place in POSITIONS]


def kind_and_place(candidate: TextCandidate) -> str:
    """The class of candidates that a candidate is compared with."""
    return f"{candidate.kind} {candidate.position}"


def sweep_round(
    name: str,
    probes: Probes,
    entries: Sequence[Ranked],
    harmless: Sequence[TextCandidate],
    change: Change,
    round: RoundSettings,
    settings: TextSearchSettings,
) -> list[Ranked]:
    """The entries by their deviation on the round's prompts and timesteps, the largest first.

    Args:
        name: name of the round in the record.
        probes: clean sampling paths.
        entries: the candidates.
        harmless: candidates that show what their kinds do; empty if the entries themselves are mostly harmless.
        change: puts a candidate into a prompt.
        round: prompts and timesteps.
        settings: settings of the search.
    """
    candidates = [*(entry.candidate for entry in entries), *harmless]
    responses = _responses(probes.model, candidates, change, round)
    unusual = responses
    if probes.base is not None:
        unusual = responses / _responses(probes.base, candidates, change, round).clamp_min(1e-12)
    kinds = [kind_and_place(candidate) for candidate in candidates]
    known = range(len(entries), len(candidates)) if harmless else range(len(candidates))
    scores = deviations(unusual, kinds, known, settings)[: len(entries)]
    return ranked_by(name, entries, scores, responses.amax(dim=1))


def ranked_by(name: str, entries: Sequence[Ranked], scores: Tensor, responses: Tensor) -> list[Ranked]:
    """The entries by their score, the largest first, with their place in the round."""
    ranks = _ranks(scores, [kind_and_place(entry.candidate) for entry in entries])
    found = []
    for index in scores.argsort(descending=True).tolist():
        rank, candidates = ranks[index]
        round = Round(name, rank, candidates, float(scores[index]), float(responses[index]))
        found.append(replace(entries[index], rounds=(*entries[index].rounds, round)))
    return found


def _responses(probe: ResponseProbe, candidates: Sequence[TextCandidate], change: Change, round: RoundSettings) -> Tensor:
    """Response [C,T] of every candidate, the mean over the first prompts that it fits."""
    chosen = [fitting(candidate, probe.prompts, round.prompts) for candidate in candidates]
    texts = [[change(one, probe.prompts[index]) for index in places] for one, places in zip(candidates, chosen, strict=True)]
    times = [_nearest(probe.shares, share) for share in round.shares]
    return probe.respond(texts, chosen, times).mean(dim=1)


def fitting(candidate: TextCandidate, prompts: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts that the candidate fits; they repeat if there are fewer."""
    places = [index for index, prompt in enumerate(prompts) if candidate.fits(prompt)]
    return [places[number % len(places)] for number in range(count)]


def _nearest(shares: Sequence[float], share: float) -> int:
    return min(range(len(shares)), key=lambda index: abs(shares[index] - share))


def _ranks(scores: Tensor, kinds: Sequence[str]) -> list[tuple[int, int]]:
    """For every candidate its rank within its kind, from 1, and the size of its kind."""
    found = [(0, 0)] * len(kinds)
    for members in members_of(kinds).values():
        ordered = sorted(members, key=lambda index: -float(scores[index]))
        for rank, index in enumerate(ordered, 1):
            found[index] = rank, len(members)
    return found
