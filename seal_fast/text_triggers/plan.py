"""How many UNet evaluations a search is expected to take, counted before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.phrases import WINDOW
from seal_fast.text_triggers.search_settings import RoundSettings, TextSearchSettings
from seal_fast.text_triggers.trigger import POSITIONS
from seal_fast.training import Stage


def planned_stages(pool: Sequence[TextCandidate], settings: TextSearchSettings, with_base: bool = False) -> list[Stage]:
    """The stages of a search of this pool, with the evaluations that each is expected to take.

    Single strings and phrases each have a round of places and a verification. How many candidates pass a first check, and how
    many kinds of control strings they need, is not known before: a model with many suspicious strings takes more.
    """
    models = 2 if with_base else 1
    counts = {
        "paths": models * _paths(settings),
        "sweep": models * len(pool) * _evaluations(settings.sweep),
        "places": models * _places(pool, settings),
        "words": _words(pool, settings) * len(POSITIONS) * settings.swept_prompts,
        "phrases": models * _phrases(pool, settings),
        "verification": 2 * _verification(settings),
    }
    return [Stage(name, 1, count) for name, count in counts.items()]


def _evaluations(round: RoundSettings) -> int:
    """Evaluations of one candidate in one round."""
    return round.prompts * len(round.shares)


def _paths(settings: TextSearchSettings) -> int:
    return settings.swept_prompts * 2 * (settings.sampler_steps + len(settings.shares))


def _places(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    kinds, lengths = len({one.kind for one in pool}), settings.phrases.longest - 1
    single = settings.kept + settings.kept_per_kind * kinds + settings.encoder_kept + settings.harmless * kinds
    of_words = (settings.phrases.kept + settings.harmless) * lengths
    return (single + of_words) * len(POSITIONS) * _evaluations(settings.places)


def _words(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    """Strings that are tried in prompts with one word."""
    kinds = {one.kind for one in pool if one.trigger.replaces is None}
    return settings.needed_word.strings + settings.needed_word.per_kind * len(kinds)


def phrase_count(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    """Phrases that a search tries: all pairs of its parts, then longer ones."""
    return _parts(pool, settings) * (_parts(pool, settings) - 1) + _longer_phrases(pool, settings)


def _phrases(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    """Evaluations of windows, of the pairs of the best ones, and of longer phrases; then of the best phrases of each length."""
    parts, pairs = _parts(pool, settings), WINDOW - 1
    swept = parts * (parts - 1) // pairs + settings.phrases.windows * 2 * pairs + _longer_phrases(pool, settings)
    refined = settings.phrases.refined * (settings.phrases.longest - 1)
    return swept * _evaluations(settings.sweep) + refined * _evaluations(settings.places)


def _longer_phrases(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    return (settings.phrases.longest - 2) * settings.phrases.extended * 2 * _parts(pool, settings)


def _parts(pool: Sequence[TextCandidate], settings: TextSearchSettings) -> int:
    return min(settings.phrases.parts, sum(one.tokens == 1 and one.trigger.replaces is None for one in pool))


def _verification(settings: TextSearchSettings) -> int:
    """Evaluations of the first check of as many candidates as may be verified, half of them with control strings of their own.

    The other half changes hardly any image, or shares control strings with one of the same kind.
    """
    verification = settings.verification
    strings = verification.candidates + verification.candidates // 2 * verification.controls
    return strings * verification.prompts * 2 * settings.sampler_steps
