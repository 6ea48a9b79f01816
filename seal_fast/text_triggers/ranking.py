"""Rank candidates within their kind: how unlike the other strings of its kind is each one?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from seal_fast.text_triggers.search_settings import TextSearchSettings

NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation."""


def deviations(responses: Tensor, kinds: Sequence[str], harmless: Sequence[int], settings: TextSearchSettings) -> Tensor:
    """How many standard deviations each candidate's log response lies above the median of its kind, at the timestep where most.

    Median and median absolute deviation are used, since the triggers themselves may be among the harmless candidates.

    Args:
        responses: positive, [C,T].
        kinds: the kind of each candidate.
        harmless: indices of the candidates that the kinds' medians are taken from.
        settings: settings of the search.

    Returns:
        float32 [C]. A kind with too few harmless candidates is compared with all of them.
    """
    logs = responses.clamp_min(1e-20).log()
    known = members_of([kinds[index] for index in harmless])
    found = torch.empty(len(kinds))
    for kind, members in members_of(kinds).items():
        own = [harmless[place] for place in known.get(kind, [])]
        some = logs[own if len(own) >= settings.smallest_kind else list(harmless)]
        middle = some.median(dim=0).values
        deviation = NORMAL_MAD * (some - middle).abs().median(dim=0).values
        found[members] = ((logs[members] - middle) / deviation.clamp_min(settings.least_spread)).max(dim=1).values
    return found


def members_of(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Kind -> indices of its candidates."""
    members = defaultdict(list)
    for index, kind in enumerate(kinds):
        members[kind].append(index)
    return dict(members)


def best(scores: Sequence[float], kinds: Sequence[str], count: int, per_kind: int) -> list[int]:
    """Indices of the `count` best candidates, and of the `per_kind` best of every kind; the best first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    left = set(order[:count])
    seen: Counter[str] = Counter()
    for index in order:
        seen[kinds[index]] += 1
        if seen[kinds[index]] <= per_kind:
            left.add(index)
    return [index for index in order if index in left]
