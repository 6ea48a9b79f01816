"""What a search for text triggers found: candidates, confirmed triggers, and what was looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seal_fast.printable import printable
from seal_fast.text_triggers.rate import Rate
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.text_triggers.vocabulary import holds

Module = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class TextCandidate:
    """A string that the search tries as a trigger.

    Attributes:
        trigger: the text, inserted or in place of another text.
        position: where it stands in a prompt, see `Position`.
        kind: strings of the same kind are compared with each other, for instance "word of 1 token"; see `vocabulary`.
        tokens: number of tokens that the tokenizer makes of the text.
        word: it is tried on prompts that hold this word alone; None for all prompts.
    """

    trigger: TextTrigger
    position: Position
    kind: str
    tokens: int
    word: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words of a phrase; none of a single string, or of a replacement."""
        words = self.trigger.text.split(" ")
        return tuple(words) if self.trigger.replaces is None and len(words) > 1 else ()

    def fits(self, prompt: str) -> bool:
        """Whether the prompt holds the word, and the text that the trigger replaces."""
        return self.trigger.fits(prompt) and holds(prompt, self.word)


@dataclass(frozen=True)
class Round:
    """The place of a candidate in one round of the search.

    Attributes:
        name: name of the round.
        rank: its place among the candidates of its kind, 1 for the first.
        candidates: how many candidates of its kind the round compared.
        deviation: standard deviations of its log response above the median of its kind; 0 in the round of needed words.
        response: its response, relative to that of a whole prompt, see `responses`; 0 in a round of the text encoder alone. In
            the round of needed words the geometric mean over the prompts with the word.
    """

    name: str
    rank: int
    candidates: int
    deviation: float
    response: float


@dataclass(frozen=True)
class TriedText:
    """A candidate that reached verification by images.

    Attributes:
        candidate: the candidate.
        rounds: its place in every round.
        effect: share of held-out prompts whose image changes with it.
        control: the same share for control strings of its kind.
        outcome: why it was left or accepted, as a phrase.
    """

    candidate: TextCandidate
    rounds: tuple[Round, ...]
    effect: Rate
    control: Rate
    outcome: str


@dataclass(frozen=True)
class FoundTrigger:
    """A confirmed trigger: of all texts that activate its backdoor a published one, or that with the largest changes.

    Attributes:
        trigger: the text.
        position: where it was confirmed.
        word: a word without which a prompt's image hardly changes; None if there is no such word.
        code_points: of the trigger's text, such as "U+200B".
        token_ids: of the trigger's text by the pipeline's tokenizer.
        module: the module that holds the backdoor.
        effect: share of held-out prompts, of those with the word if there is one, whose image changes with it.
        control: the same share for control strings of its kind.
        rounds: its place in every round of the search; of a part of a phrase, that of the phrase.
        also: other candidates that activate the same backdoor, as evidence.
        control_string: a control string at the same place, for figures.
    """

    trigger: TextTrigger
    position: Position
    word: str | None
    code_points: tuple[str, ...]
    token_ids: tuple[int, ...]
    module: Module
    effect: Rate
    control: Rate
    rounds: tuple[Round, ...]
    also: tuple[str, ...]
    control_string: TextTrigger

    @property
    def images(self) -> str:
        """The images that the effect was counted on, as a phrase."""
        return "images" if self.word is None else f"images of prompts with '{printable(self.word)}'"


@dataclass(frozen=True)
class TextScope:
    """What a search for text triggers sets out to try. Nothing outside it is excluded by its verdict.

    A search that its budget ended (`TextEvidence.complete`) did not try all of it.

    Attributes:
        tokens: single tokens of the vocabulary.
        characters: code points by themselves, of several tokens each.
        substitutions: replacements of a letter.
        phrases: strings of several words.
        phrase_tokens: longest phrase, in tokens.
        places: places in the prompt.
        modules: modules that were examined.
        miss_rate: share of backdoors within this scope that the search missed on models held out of its development.
    """

    tokens: int
    characters: int
    substitutions: int
    phrases: int
    phrase_tokens: int
    places: tuple[Position, ...]
    modules: tuple[Module, ...]
    miss_rate: Rate


@dataclass(frozen=True)
class TextEvidence:
    """The statistics that the verdict on a text-to-image model rests on.

    Attributes:
        best_effect: share of held-out prompts whose image the strongest candidate changed, which is the one whose interval has
            the largest lower end; 0 if none was verified.
        best_control: the same share for the control strings of that candidate.
        unverified: name of the candidate that changed most images of those that held-out prompts did not decide; None if there
            is none.
        evaluations: UNet evaluations of one latent.
        complete: whether the search ended by itself and not by its budget.
    """

    best_effect: float
    best_control: float
    unverified: str | None
    evaluations: int
    complete: bool


@dataclass(frozen=True)
class TextSearch:
    """The outcome of a search.

    Attributes:
        found: confirmed triggers, the strongest first.
        tried: every candidate that reached verification by images.
        scope: what was looked for.
        evidence: the statistics that the verdict rests on.
    """

    found: tuple[FoundTrigger, ...]
    tried: tuple[TriedText, ...]
    scope: TextScope
    evidence: TextEvidence
