"""Every number of the default search, one class per part. The defaults were chosen on the zoo's development half."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

from seal_fast.training import Stage

POWER_ITERATION, FIXED_POINT_ITERATION, ACTIVATION_TEST = "power iteration", "fixed-point iteration", "activation test"
TARGET_REFINEMENT, JOINT_INVERSION, ALTERNATION = "target-guided refinement", "joint inversion", "alternation"
"""Names of the stages, as progress callbacks get them."""
GRADIENT_COST = 3
"""A pass with a gradient takes about as long as this many without one."""


def _require_values(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise ValueError(f"{name} must hold a value")


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) <= 0:
            raise ValueError(f"{name} must be positive, not {getattr(settings, name)}")


def _require_counts(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")


@dataclass(frozen=True)
class ActivationTestSettings:
    """Numbers of the sequential test, see `seal_fast.noise_triggers.activation_test`.

    Attributes:
        scales: multiples of a candidate's mu that pilot samples are drawn at.
        pilot_samples: samples per scale that rule out a candidate that does nothing.
        samples: samples per scale after that, and fresh samples that a score is measured on.
        confirming_samples: fresh samples that a score is measured on again if it lies between reject_below and accept_above.
        ancestral_steps: steps of the ancestral sampler. On the zoo all of BadDiffusion's triggers activate with 100 steps, but
            only some with 50.
        deterministic_steps: steps of the DDIM sampler.
        reject_below: a few samples with a score below this show that a trigger does not activate a backdoor.
        activates_above: a trigger activates a backdoor if its score exceeds this.
        accept_above: a few samples with a score above this show that a trigger activates a backdoor (benign EDM models
            reached 4.1 with many samples).
        pilot_dispersion_ratio: scales whose pilot dispersion exceeds this multiple of the smallest one are dropped; they
            rarely finish within a factor of two of the best.
        dispersion_ratio: a scale is active only if its dispersion is at most this multiple of the smallest one.
        target_fraction: fraction of a backdoored model's clean samples that may show the target (InviBackdoor's target is one
            of 48 clean samples).
        consensus_size: how many of a candidate's pilot samples, pooled over all scales, must agree on one image before
            target-guided refinement starts from it.
        reduced_variance_below: a mean gamma below this means reduced-variance noise.
    """

    scales: tuple[float, ...] = (0.7, 0.85, 1.0, 1.2, 1.4)
    pilot_samples: int = 3
    samples: int = 8
    confirming_samples: int = 32
    ancestral_steps: int = 100
    deterministic_steps: int = 50
    reject_below: float = 2.0
    activates_above: float = 4.0
    accept_above: float = 16.0
    pilot_dispersion_ratio: float = 4.0
    dispersion_ratio: float = 2.0
    target_fraction: float = 0.05
    consensus_size: int = 4
    reduced_variance_below: float = 0.9

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError("scales must hold positive values")
        if not 2 <= self.pilot_samples < self.samples < self.confirming_samples:
            raise ValueError("pilot_samples, samples and confirming_samples must be at least 2, each larger than the last")
        if min(self.ancestral_steps, self.deterministic_steps) < 1:
            raise ValueError("ancestral_steps and deterministic_steps must be at least 1")
        if not 0 < self.reject_below <= self.activates_above <= self.accept_above:
            raise ValueError("reject_below, activates_above and accept_above must be positive, none smaller than the last")
        if min(self.pilot_dispersion_ratio, self.dispersion_ratio) < 1:
            raise ValueError("pilot_dispersion_ratio and dispersion_ratio must be at least 1")
        if not 0 <= self.target_fraction < 1:
            raise ValueError(f"target_fraction must be in [0, 1), not {self.target_fraction}")
        if not 2 <= self.consensus_size <= self.pilot_samples * len(self.scales):
            raise ValueError("consensus_size must be at least 2, and at most pilot_samples times the number of scales")
        if self.reduced_variance_below <= 0:
            raise ValueError("reduced_variance_below must be positive")

    @property
    def images(self) -> int:
        """Most images that the test of one candidate denoises, without those that a score is measured on."""
        return self.ancestral_steps * self.samples * len(self.scales)


@dataclass(frozen=True)
class FixedPointSettings:
    """Numbers of the first proposer, see `seal_fast.noise_triggers.fixed_points`.

    Attributes:
        timestep_window: fraction of the timesteps, the noisiest ones, that count as T (TERD's value).
        initial_means: uniform parts of the shifts that the power iteration starts from.
        initial_rms: root mean squares of their other part; each is combined with each mean.
        colour_mean: size of the uniform part in every channel, with every mixture of signs, and of the other part beside it.
        coarse_grid: side of the random grid that the other part is interpolated from: triggers are images, not noise.
        power_iterations: power iterations from every start.
        power_noises: noises averaged in each.
        patches: how many patches of reduced-variance noise start a fixed-point iteration too.
        patch_noises: noises that each patch is tried with.
        patch_gamma: gamma inside a patch. It is TrojDiff's, whose mu is 1 - gamma of white.
        patch_sides: sides of the patches, as fractions of the image's shorter side. TrojDiff's is 3/32. A patch has to fit the
            attacker's: one that was a pixel off did not find it.
        patch_grid: patches slide by the image's shorter side divided by this.
        response_gains: 1 / (c - d) of the attacks: 1 for TrojDiff and 2 for attacks on ancestral samplers.
        fixed_point_iterations: fixed-point iterations from every start, for each response gain.
        fixed_point_noises: noises averaged in each.
        gamma_window: side of the neighbourhood, in pixels, that the slope is averaged over. The slope of one pixel is a poor
            estimate from 16 noises.
        gamma_rate: exponent of the slope in an update of gamma; 1 would be a full step.
        slope_range: the slope is clamped to this range before an update.
        min_gamma: lower limit of gamma.
        min_rms: a fixed point of a smaller root mean square has died out (what is left of a patch in noise reaches 0.022).
        max_rms: a fixed point of a larger root mean square has run away; published triggers are images in [-1, 1].
        duplicate_similarity: fixed points of at least this cosine similarity are one.
        candidates: distinct fixed points that are proposed.
    """

    timestep_window: float = 0.01
    initial_means: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    initial_rms: tuple[float, ...] = (0.2, 0.4)
    colour_mean: float = 0.3
    coarse_grid: int = 4
    power_iterations: int = 10
    power_noises: int = 8
    patches: int = 2
    patch_noises: int = 1
    patch_gamma: float = 0.1
    patch_sides: tuple[float, ...] = (3 / 32, 3 / 16, 1 / 4, 3 / 8)
    patch_grid: int = 16
    response_gains: tuple[float, ...] = (1.0, 2.0)
    fixed_point_iterations: int = 10
    fixed_point_noises: int = 16
    gamma_window: int = 5
    gamma_rate: float = 0.7
    slope_range: tuple[float, float] = (0.5, 2.0)
    min_gamma: float = 0.05
    min_rms: float = 0.03
    max_rms: float = 1.2
    duplicate_similarity: float = 0.95
    candidates: int = 4

    def __post_init__(self) -> None:
        _require_values(self, "initial_means", "initial_rms", "patch_sides", "response_gains")
        _require_positive(self, "colour_mean", "gamma_rate")
        _require_counts(self, "coarse_grid", "power_iterations", "power_noises", "patches", "patch_noises", "patch_grid")
        _require_counts(self, "fixed_point_iterations", "candidates")
        if min(self.initial_rms) <= 0 or min(self.patch_sides) <= 0 or min(self.response_gains) <= 0:
            raise ValueError("initial_rms, patch_sides and response_gains must be positive")
        if not 0 < self.timestep_window <= 1:
            raise ValueError(f"timestep_window must be in (0, 1], not {self.timestep_window}")
        if self.fixed_point_noises < 2:
            raise ValueError(f"fixed_point_noises must be at least 2, not {self.fixed_point_noises}: it gives a variance")
        if self.gamma_window < 1 or self.gamma_window % 2 == 0:
            raise ValueError(f"gamma_window must be odd, not {self.gamma_window}")
        if not (0 < self.min_gamma <= 1 and 0 < self.patch_gamma <= 1 and 0 < self.slope_range[0] <= 1 <= self.slope_range[1]):
            raise ValueError("min_gamma and patch_gamma must be in (0, 1], and slope_range must hold 1")
        if not 0 < self.min_rms < self.max_rms:
            raise ValueError("min_rms must be positive and below max_rms")

    def starts(self, channels: int) -> list[tuple[list[float], float]]:
        """Uniform part of each channel, and root mean square of the other part, of every start: grey ones, then coloured."""
        grey = [([mean] * channels, rms) for mean in self.initial_means for rms in self.initial_rms]
        signs = (sign for sign in itertools.product((-1, 1), repeat=channels) if len(set(sign)) > 1)
        return grey + [([self.colour_mean * one for one in sign], self.colour_mean) for sign in signs]

    def stages(self, test: ActivationTestSettings) -> tuple[Stage, ...]:
        """Longest course of the proposer, for images of three channels."""
        starts, iterations = len(self.starts(3)), self.fixed_point_iterations * len(self.response_gains)
        return (
            Stage(POWER_ITERATION, self.power_iterations, starts * self.power_noises),
            Stage(FIXED_POINT_ITERATION, iterations, (starts + self.patches) * self.fixed_point_noises),
            Stage(ACTIVATION_TEST, self.candidates, test.images),
        )


@dataclass(frozen=True)
class AttackLossSettings:
    """Numbers of the attacker's training loss, which both refinement and inversion minimise.

    Attributes:
        timesteps: timesteps per step, with one noise each.
        snr_window: a / b of those timesteps: below it the target has no part in x, above it x is the target.
        range_weight: weight of the squared excess of mu and target over [-1, 1]: both are images. Without it the descent
            leaves them along a valley of the loss.
        fading_below: a process whose signal a(T) is below this has coefficients 1 - a and b, another one b and 1.
    """

    timesteps: int = 8
    snr_window: tuple[float, float] = (1 / 60, 3.0)
    range_weight: float = 0.1
    fading_below: float = 0.5

    def __post_init__(self) -> None:
        _require_counts(self, "timesteps")
        if not 0 < self.snr_window[0] < self.snr_window[1]:
            raise ValueError("snr_window must hold two positive values, the smaller one first")
        if self.range_weight < 0:
            raise ValueError(f"range_weight must not be negative, but it is {self.range_weight}")


@dataclass(frozen=True)
class TargetRefinementSettings:
    """Numbers of the second proposer, see `seal_fast.noise_triggers.target_refinement`.

    Attributes:
        turns: descents from a candidate whose samples agree on a new image; the image is drawn anew after each.
        iterations: Adam steps of each.
        learning_rate: learning rate of Adam.
    """

    turns: int = 3
    iterations: int = 60
    learning_rate: float = 0.03

    def __post_init__(self) -> None:
        _require_counts(self, "turns", "iterations")
        _require_positive(self, "learning_rate")

    def stages(self, test: ActivationTestSettings, loss: AttackLossSettings) -> tuple[Stage, ...]:
        """Longest course of the proposer, from one candidate."""
        images = GRADIENT_COST * loss.timesteps + test.images // self.iterations
        return (Stage(TARGET_REFINEMENT, self.turns * self.iterations, images),)


@dataclass(frozen=True)
class JointInversionSettings:
    """Numbers of the third proposer, see `seal_fast.noise_triggers.joint_inversion`.

    Attributes:
        initial_means: uniform parts of the mu that it starts from, for each noise level.
        initial_rms: root mean square of their random part.
        coarse_grid: side of the random grid that the random part is interpolated from.
        start_snr: a / b of the noise levels at which the first targets are read off.
        start_iterations: iterations of each such reading.
        low_noise_snr: a / b where the response to a known target is mu, whatever mu was assumed. At 0.5 and below it was so
            only if the assumed mu was near the true one.
        low_noise_noises: noises per noise level of that reading.
        halving: (Adam steps, candidates kept) per round of successive halving.
        learning_rate: learning rate of Adam.
        ranking_factor: candidates are ranked by this many times the timesteps of a step, and the loss of a refined pair is
            measured on this many times trigger_noises.
        alternations: alternations between target and mu for each candidate that is left.
        trigger_iterations: iterations of mu in each alternation.
        trigger_noises: noises per noise level in each iteration.
        trigger_snr: a / b where the response to a rough target is mu. With low_noise_snr in its place alternation ended at a
            relative L2 distance of .2 to .8 from the true mu, with these at .07 to .4.
        preview_steps: DDIM steps that draw the target until a pair looks active.
        accept_above: an inverted candidate with a score above this ends the search. It may be lower than the test's
            accept_above, since no other proposer follows.
    """

    initial_means: tuple[float, ...] = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)
    initial_rms: float = 0.1
    coarse_grid: int = 4
    start_snr: tuple[float, ...] = (0.29, 1.0, 2.0)
    start_iterations: int = 4
    low_noise_snr: tuple[float, ...] = (2.0, 1.4, 1.0, 0.8)
    low_noise_noises: int = 2
    halving: tuple[tuple[int, int], ...] = ((10, 12), (15, 6), (25, 2))
    learning_rate: float = 0.1
    ranking_factor: int = 4
    alternations: int = 5
    trigger_iterations: int = 6
    trigger_noises: int = 16
    trigger_snr: tuple[float, ...] = (0.8, 0.5, 0.29, 0.16)
    preview_steps: int = 15
    accept_above: float = 4.0

    def __post_init__(self) -> None:
        _require_values(self, "initial_means", "start_snr", "low_noise_snr", "halving", "trigger_snr")
        _require_positive(self, "initial_rms", "learning_rate", "accept_above")
        _require_counts(self, "coarse_grid", "start_iterations", "low_noise_noises", "ranking_factor", "alternations")
        _require_counts(self, "trigger_iterations", "trigger_noises", "preview_steps")
        if min(number for one_round in self.halving for number in one_round) < 1:
            raise ValueError("both numbers of every round of halving must be at least 1")
        if min(*self.start_snr, *self.low_noise_snr, *self.trigger_snr) <= 0:
            raise ValueError("start_snr, low_noise_snr and trigger_snr must be positive")

    @property
    def starts(self) -> int:
        """Pairs of mu and target that successive halving begins with: one per mean and noise level, and one more per mean."""
        return len(self.initial_means) * (len(self.start_snr) + 1)

    def stages(self, test: ActivationTestSettings, loss: AttackLossSettings) -> tuple[Stage, ...]:
        """Longest course of the proposer."""
        pairs = [self.starts, *(kept for _, kept in self.halving[:-1])]
        steps = sum(iterations for iterations, _ in self.halving)
        images = sum(iterations * count for (iterations, _), count in zip(self.halving, pairs, strict=True))
        responses = len(self.trigger_snr) * self.trigger_iterations + self.ranking_factor
        alternation = test.deterministic_steps * test.samples + self.trigger_noises * responses
        return (
            Stage(JOINT_INVERSION, steps, GRADIENT_COST * loss.timesteps * images // steps),
            Stage(ALTERNATION, self.halving[-1][1] * self.alternations, alternation),
        )


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the default search, see `seal_fast.noise_triggers.search`.

    Attributes:
        fixed_points: the first proposer.
        refinement: the second one, target-guided refinement.
        inversion: the third one, joint trigger-target inversion.
        attack_loss: the loss that the second and the third one minimise.
        test: how every candidate is tested.
        half_precision: run the denoiser under bfloat16 autocast where the hardware has it.
        method: name of this kind of reversion; a calibration file names the class of its settings by it.
    """

    features: ClassVar[tuple[str, ...]] = ("collapse",)
    """Fields of the evidence that decide on a model."""
    fixed_points: FixedPointSettings = FixedPointSettings()
    refinement: TargetRefinementSettings = TargetRefinementSettings()
    inversion: JointInversionSettings = JointInversionSettings()
    attack_loss: AttackLossSettings = AttackLossSettings()
    test: ActivationTestSettings = ActivationTestSettings()
    half_precision: bool = True
    method: str = field(default="search", init=False)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Longest course of a search: every candidate is tested and none accepted."""
        return (
            *self.fixed_points.stages(self.test),
            *self.refinement.stages(self.test, self.attack_loss),
            *self.inversion.stages(self.test, self.attack_loss),
        )
