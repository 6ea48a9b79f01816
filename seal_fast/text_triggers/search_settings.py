"""Settings of the search for text triggers: every number of it, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        kept: candidates that go on to the next round.
        kept_per_kind: of every kind at least so many go on, so that no kind crowds out another.
    """

    prompts: int
    shares: tuple[float, ...]
    kept: int
    kept_per_kind: int


@dataclass(frozen=True)
class VerificationSettings:
    """Images that verify a candidate.

    Attributes:
        prompts: held-out prompts of the first check.
        fresh_prompts: further held-out prompts, on which a candidate that passed is checked again.
        controls: control strings of the candidate's kind.
        candidates: candidates that are verified at most.
        same_effect: cosine of the mean changes of two candidates from which they have the same effect.
        guidance: guidance scale.
        sampler_steps: DDIM steps.
        precision: precision of the networks.
    """

    prompts: int = 8
    fresh_prompts: int = 16
    controls: int = 6
    candidates: int = 40
    same_effect: float = 0.5
    guidance: float = 7.5
    sampler_steps: int = 25
    precision: Precision = "bf16"


@dataclass(frozen=True)
class TextSearchSettings:
    """Settings of the search for text triggers.

    Attributes:
        rounds: rounds of successive halving; the first one tries every candidate at all places at once.
        swept_prompts: clean prompts whose sampling paths are drawn.
        harmless: candidates of each kind that show in later rounds what their kind does.
        encoder_prompts: clean prompts that a candidate is tried on in the sweep of the text encoder.
        encoder_kept: candidates of that sweep that go on.
        encoder_limit: deviation of a trigger's hidden states from which the text encoder holds the backdoor.
        smallest_kind: a kind with fewer candidates is compared with all candidates of its token count.
        least_deviation: least standard deviation of the log energies within a kind, so that a kind of equals has no outliers.
        swapped_words: most frequent words of the prompts that other words are swapped for.
        swapping_words: words of the vocabulary that take their places.
        verification: the images that verify candidates.
    """

    rounds: tuple[RoundSettings, ...] = (
        RoundSettings(1, (0.99, 0.7, 0.45), 60, 3),
        RoundSettings(4, (0.99, 0.7, 0.45), 40, 1),
    )
    swept_prompts: int = 8
    harmless: int = 12
    encoder_prompts: int = 6
    encoder_kept: int = 24
    encoder_limit: float = 8.0
    smallest_kind: int = 8
    least_deviation: float = 0.15
    swapped_words: int = 10
    swapping_words: int = 200
    verification: VerificationSettings = field(default_factory=VerificationSettings)

    @property
    def shares(self) -> list[float]:
        """The timesteps of all rounds, as shares of the noise process's T, descending."""
        return sorted({share for round in self.rounds for share in round.shares}, reverse=True)
