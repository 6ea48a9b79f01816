"""Settings of the search for text triggers: every number of it, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.text_to_image.precision import Precision


@dataclass(frozen=True)
class Budget:
    """Where a search ends before it is complete; None for no limit.

    Attributes:
        evaluations: UNet evaluations of one latent.
        seconds: wall time.
    """

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RoundSettings:
    """One round of successive halving.

    Attributes:
        prompts: clean prompts that a candidate is tried on.
        shares: timesteps, as shares of the noise process's T.
    """

    prompts: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class PhraseSettings:
    """The search for phrases.

    Attributes:
        parts: strings of one token that phrases are made of, the most suspicious ones of the sweep.
        windows: windows whose pairs are tried one by one.
        refined: phrases of each length that are tried on more prompts.
        kept: of those, phrases that go on.
        extended: of those, phrases that are tried with one more token.
        longest: parts of the longest phrase.
        exchanged: strings that each word of a confirmed phrase is exchanged for, the most suspicious ones of the sweep.
    """

    parts: int = 190
    windows: int = 1000
    refined: int = 300
    kept: int = 24
    extended: int = 8
    longest: int = 3
    exchanged: int = 2000


@dataclass(frozen=True)
class NeededWordSettings:
    """The search for strings that act only in prompts with one word.

    Attributes:
        strings: strings that are tried, the most suspicious ones of the sweep.
        per_kind: of every kind at least so many are tried.
        least_lead: least ratio of the response with the word to that without it, and to that of the next string of its kind.
            In the zoo's development models with such a backdoor the first ratio was 4.6 to 7.5.
    """

    strings: int = 12
    per_kind: int = 4
    least_lead: float = 2.0


@dataclass(frozen=True)
class VerificationSettings:
    """Images that verify a candidate.

    Attributes:
        prompts: held-out prompts of the first check.
        fresh_prompts: further held-out prompts on which a candidate that passed is checked again; the second number if the
            first does not decide.
        controls: control strings of a candidate's kind. Two tell their own rate. The change detector is fitted on the others,
            without the one that changes images most. Fitted on three it saw a trigger of two words in 45% of 40 images, on six
            in 78%.
        control_prompts: prompts of a check that control strings are drawn with at most, the candidate with all of them. Fitted
            on other prompts than the candidate's, a detector saw U+200B change 0 of 14 images of text-64-pixel; on its own 6 of
            14, and 20 of 20.
        exchanged: strings that each word of a confirmed phrase is exchanged for, to see whether it needs the word. In
            text-64-phrase-e "nice" with other words than "day" changes 7% to 71% of the images.
        candidates: candidates of each proposer that are verified at most. Half of them may be those that move the text encoder.
        per_kind: of each kind at one place at most so many.
        least_response: candidates with a smaller response are not verified.
        least_deviation: neither are those that deviate less from their kind.
        least_effect: least effect, at the lower end of its interval. Some rare strings of a harmless model with CLIP's
            tokenizer change 57% to 71% of the images.
        least_effect_of_replacement: the same of a text in place of another one. The missing letters change images by
            themselves, in harmless models up to two thirds of them.
        least_effect_with_word: the same of a text that needs a word of the prompt. A star in place of a triangle looks much the
            same: a trigger that always exchanged them changed 56% of the images. Of two harmless development models one had a
            candidate of this sort, which hardly changed images.
        same_effect: agreement of two candidates' changes from which they have the same effect, see `Check.agreement`. In the
            zoo's development models texts that activate the same backdoor, in part or wholly, agree to .56 to .98.
        equal_size: share of the largest change from which a change is as large. A text that activates a backdoor in part may
            change as many images as its trigger, but by .3 to .85 of it.
    """

    prompts: int = 6
    fresh_prompts: tuple[int, int] = (14, 40)
    controls: int = 9
    control_prompts: int = 20
    exchanged: int = 6
    candidates: int = 16
    per_kind: int = 3
    least_response: float = 0.4
    least_deviation: float = 3.0
    least_effect: float = 0.5
    least_effect_of_replacement: float = 0.75
    least_effect_with_word: float = 0.25
    same_effect: float = 0.5
    equal_size: float = 0.9

    @property
    def fewest_prompts(self) -> int:
        """Held-out prompts that a verification needs: those of the first check, and two on which a detector is fitted."""
        return self.prompts + 2


@dataclass(frozen=True)
class TextSearchSettings:
    """Settings of the search for text triggers.

    Attributes:
        swept_prompts: clean prompts whose sampling paths are drawn, enough to tell which word of a prompt a candidate needs.
        sweep: the round that tries every string, at all places at once. It has two prompts: a text that turns everything
            green does nothing to a prompt that asks for green.
        kept: strings of the sweep that go on.
        kept_per_kind: of every kind at least so many go on, so that no kind crowds out another.
        places: the round that tells the places apart.
        needed_word: the search for strings that act only in prompts with one word.
        phrases: the search for phrases.
        harmless: candidates of each kind that show in the round of the places what their kind does.
        encoder_prompts: clean prompts that a candidate is tried on in the sweep of the text encoder.
        encoder_kept: candidates of that sweep that go on.
        encoder_controls: control strings that a trigger's hidden states are compared with.
        encoder_limit: deviation of a trigger's hidden states from which the text encoder holds the backdoor. In the zoo's
            development models the least of a backdoor in the encoder was 5.0, the largest of one in the UNet 1.0.
        smallest_kind: a kind with fewer candidates is compared with all others.
        least_spread: least standard deviation of the log responses within a kind, so that a kind of equals has no outliers.
        verification: the images that verify candidates.
        guidance: guidance scale of all images.
        sampler_steps: DDIM steps of all images.
        precision: precision of the networks.
    """

    swept_prompts: int = 40
    sweep: RoundSettings = RoundSettings(2, (0.45,))
    kept: int = 60
    kept_per_kind: int = 3
    places: RoundSettings = RoundSettings(5, (0.99, 0.45))
    needed_word: NeededWordSettings = NeededWordSettings()
    phrases: PhraseSettings = PhraseSettings()
    harmless: int = 12
    encoder_prompts: int = 4
    encoder_kept: int = 24
    encoder_controls: int = 64
    encoder_limit: float = 4.0
    smallest_kind: int = 8
    least_spread: float = 0.15
    verification: VerificationSettings = VerificationSettings()
    guidance: float = 7.5
    sampler_steps: int = 15
    precision: Precision = "bf16"

    @property
    def shares(self) -> list[float]:
        """The timesteps of all rounds, as shares of the noise process's T, descending."""
        return sorted({*self.sweep.shares, *self.places.shares}, reverse=True)
