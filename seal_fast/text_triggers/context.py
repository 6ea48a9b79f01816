"""What all steps of one search share: the model, the strings to try, clean sampling paths, images, and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Self

import torch
import torch.nn.functional as F

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.candidates import inserted, joined, published, replaced_letters
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.meter import Meter
from seal_fast.text_triggers.responses import ResponseProbe
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.sweep import Probes
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.verification import HELD_BACK, ImageTest
from seal_fast.text_triggers.vocabulary import words_of


def swept_prompts(prompts: Sequence[str], settings: TextSearchSettings) -> Sequence[str]:
    """The prompts that candidates are swept on; the others are held out.

    Each one holds as many words as possible that those before it lack, so that the first few show a backdoor that acts only in
    prompts with a certain word.
    """
    left, found, seen = list(prompts[::2]), list[str](), set[str]()
    while left and len(found) < settings.swept_prompts:
        found.append(left.pop(max(range(len(left)), key=lambda place: len({*words_of([left[place]])} - seen))))
        seen |= {*words_of(found[-1:])}
    return found


def pool_of(tokenizer: Any, prompts: Sequence[str], settings: TextSearchSettings) -> list[TextCandidate]:
    """Every candidate of the first sweep."""
    return [
        *inserted(tokenizer, prompts),
        *published(tokenizer),
        *replaced_letters(tokenizer, swept_prompts(prompts, settings)),
    ]


@dataclass(frozen=True)
class SearchContext:
    """What all steps of one search share.

    Attributes:
        pipeline: the model.
        settings: settings of the search.
        pool: every candidate of the first sweep; most of them are harmless.
        probes: clean sampling paths of the swept prompts.
        images: draws images of the held-out prompts.
        base_images: draws them with the base; None without one.
        meter: counts evaluations.
        seed: seed of all random choices.
    """

    pipeline: Any
    settings: TextSearchSettings
    pool: tuple[TextCandidate, ...]
    probes: Probes
    images: ImageTest
    base_images: ImageTest | None
    meter: Meter
    seed: int

    @classmethod
    def prepared(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        pool: Sequence[TextCandidate],
        settings: TextSearchSettings,
        meter: Meter,
        seed: int,
        base: Any = None,
    ) -> Self:
        """Draw the clean paths of every other prompt; the others are held out for images."""
        meter.begin("paths")

        def drawn(model: Any) -> ResponseProbe:
            return ResponseProbe.drawn(
                model,
                swept_prompts(prompts, settings),
                settings.shares,
                steps=settings.sampler_steps,
                guidance=settings.guidance,
                precision=settings.precision,
                seed=seed,
                on_pass=meter,
            )

        def images(model: Any) -> ImageTest:
            return ImageTest(model, prompts[1::2], settings, seed + 1, meter)

        probes = Probes(drawn(pipeline), base and drawn(base))
        return cls(pipeline, settings, tuple(pool), probes, images(pipeline), base and images(base), meter, seed)

    def harmless(self, left_out: Sequence[TextCandidate]) -> list[TextCandidate]:
        """Random members of every kind in the pool, without those left out, as most strings of a kind are harmless."""
        generator, suspicious = torch.Generator().manual_seed(self.seed), {one.trigger for one in left_out}
        kinds: dict[str, list[TextCandidate]] = {}
        for index in torch.randperm(len(self.pool), generator=generator).tolist():
            one = self.pool[index]
            members = kinds.setdefault(one.kind, [])
            if one.trigger not in suspicious and len(members) < self.settings.harmless:
                members.append(one)
        return [one for members in kinds.values() for one in members]

    def controls(self, candidate: TextCandidate, count: int) -> list[TextCandidate]:
        """Control strings at the candidate's place: for a word those nearest in meaning first, then random ones of its kind.

        Phrases are compared with random phrases of as many words.
        """
        if candidate.words:
            return [in_place_of(candidate, one) for one in self.random_phrases(len(candidate.words), count)]
        own = self._comparable(candidate, count)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = [*self._nearest(candidate, own), *(own[index] for index in order)]
        return [in_place_of(candidate, one) for one in dict.fromkeys(chosen)][:count]

    def _comparable(self, candidate: TextCandidate, count: int) -> list[TextCandidate]:
        """The others of a single string's kind; if there are fewer than `count`, strings of as many tokens, or any.

        A letter with few lookalikes, such as m, takes any characters in its place.
        """
        others = [one for one in self.pool if one.trigger != candidate.trigger]
        own = [one for one in others if one.kind == candidate.kind]
        inserted_texts = [one for one in others if one.trigger.replaces is None]
        if len(own) < count and (letter := candidate.trigger.replaces) is not None:
            taken = {letter, candidate.trigger.text, *(one.trigger.text for one in own)}
            texts = (one.trigger.text for one in inserted_texts if len(one.trigger.text) == 1 and one.trigger.text not in taken)
            return [*own, *(replace(candidate, trigger=TextTrigger(text, replaces=letter)) for text in texts)]
        if len(own) < count:
            own = [one for one in inserted_texts if one.tokens == candidate.tokens]
        return own if len(own) >= count else inserted_texts

    def random_phrases(self, words: int, count: int) -> list[TextCandidate]:
        """Random phrases of so many single tokens of the pool, to be inserted at the start; most are harmless."""
        generator = torch.Generator().manual_seed(self.seed)
        parts = [one for one in self.pool if one.trigger.replaces is None and one.tokens == 1]
        drawn = torch.randint(len(parts), (count, words), generator=generator).tolist()
        return [reduce(joined, [parts[index] for index in row]) for row in drawn]

    def exchanged(self, candidate: TextCandidate, place: int, count: int) -> list[TextCandidate]:
        """The phrase with its word number `place` exchanged for each of `count` random single tokens of the pool."""
        words = candidate.words
        others = dict.fromkeys(one.trigger.text for one in self.random_phrases(1, 4 * count) if one.trigger.text not in words)
        texts = (" ".join([*words[:place], other, *words[place + 1 :]]) for other in others)
        return [replace(candidate, trigger=TextTrigger(text)) for text in texts][:count]

    def _nearest(self, candidate: TextCandidate, own: Sequence[TextCandidate]) -> list[TextCandidate]:
        """The HELD_BACK words whose embeddings are most similar to the candidate's; none if it is no single-token word."""
        if candidate.tokens != 1 or "word" not in candidate.kind:
            return []
        rows = self.pipeline.text_encoder.get_input_embeddings().weight.detach()
        ids = [content_ids(self.pipeline.tokenizer, one.trigger.text)[0] for one in (candidate, *own)]
        similarity = F.cosine_similarity(rows[ids[:1]], rows[ids[1:]])
        return [own[index] for index in similarity.topk(min(HELD_BACK, len(own))).indices.tolist()]


def in_place_of(candidate: TextCandidate, other: TextCandidate) -> TextCandidate:
    """The other candidate at the place of this one, and in the same prompts."""
    return replace(other, position=candidate.position, word=candidate.word)
