"""Every number of a reversion, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Stage(NamedTuple):
    """One stage of a reversion: its name, its iterations, and the images each of them puts through the denoiser."""

    name: str
    iterations: int
    images: int


@dataclass(frozen=True)
class TerdSettings:
    """Settings of TERD's two stages (arXiv 2409.05294).

    Where the paper's programs for BadDiffusion and for TrojDiff differ, these hold one choice that serves both, since a
    defender does not know the attack: gamma is always reverted, and starts between 0 (where both noised inputs are equal and
    the loss has no gradient in mu) and 1 (where TrojDiff's trigger is no minimum).

    Attributes:
        estimation_iterations: steps of stage 1.
        refinement_iterations: steps of stage 2.
        batch: pairs of noised inputs per step; the denoiser sees 2 (stage 1) or 4 (stage 2) times as many.
        gamma_start: where gamma starts, everywhere.
        learning_rate: of mu; SGD with a cosine to 0, restarted for stage 2.
        gamma_learning_rate: of gamma, likewise.
        refinement_momentum: SGD momentum of stage 2 (stage 1 has none).
        refinement_clip: joint gradient norm of mu and gamma in stage 2.
        l1: lambda, weight of the subtracted ||mu||_1 that keeps mu from collapsing to zero.
        window: share of the timesteps in the first and in the last window.
        sampler_steps: DDIM steps that draw stage 2's clean images.
        half_precision: run the denoiser under bfloat16 autocast where the hardware has it (published: float16).
    """

    features: ClassVar[tuple[str, ...]] = ("M_r", "V_r")
    """Statistics of the evidence that the verdict rests on."""
    estimation_iterations: int = 3000
    refinement_iterations: int = 1000
    batch: int = 16
    gamma_start: float = 0.5
    learning_rate: float = 0.5
    gamma_learning_rate: float = 1e-3
    refinement_momentum: float = 0.9
    refinement_clip: float = 1.0
    l1: float = 5e-5
    window: float = 0.01
    sampler_steps: int = 10
    half_precision: bool = True

    def __post_init__(self) -> None:
        if self.estimation_iterations < 0 or self.refinement_iterations < 0:
            raise ValueError("iterations must not be negative")
        if self.batch < 1 or self.sampler_steps < 1:
            raise ValueError("batch and sampler_steps must be at least 1")
        if self.gamma_start <= 0:
            raise ValueError("gamma_start must be positive: at 0 the loss has no gradient in mu")
        if min(self.learning_rate, self.gamma_learning_rate, self.l1, self.refinement_clip) < 0:
            raise ValueError("learning rates, l1 and refinement_clip must not be negative")
        if not 0 <= self.refinement_momentum < 1:
            raise ValueError("refinement_momentum must be in [0, 1)")
        if not 0 < self.window <= 0.5:
            raise ValueError(f"window must be in (0, 0.5], not {self.window}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What a run goes through."""
        return (
            Stage("estimation", self.estimation_iterations, 2 * self.batch),
            Stage("refinement", self.refinement_iterations, (4 + self.sampler_steps) * self.batch),
        )


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the default reversion: fixed points, and where none fires the poisoned rows of deterministic samplers.

    See `seal_fast.noise_triggers.fixed_points` and `seal_fast.noise_triggers.joint_inversion`. The defaults were chosen on
    the zoo's development half.

    Attributes:
        brightness: uniform parts of the shifts searched from.
        contrast: root mean square of their other part; each is combined with each brightness.
        colour: size of the uniform part in every channel, with all mixtures of signs, and of the other part beside it.
        search_iterations: power iterations per combination.
        search_batch: noises averaged in each.
        patches: how many patches of narrowed noise are polished too.
        patch_batch: noises each patch is tried with.
        kappas: gains of the fixed point: 1 / (c - d) is 1 for TrojDiff and 2 for attacks on stochastic samplers.
        polish_iterations: fixed-point iterations from every direction, for each kappa.
        polish_batch: noises averaged in each.
        smallest: fixed points of a smaller root mean square have died out; what is left of a patch in noise reaches 0.022.
        largest: those of a greater one have run away; published triggers are images in [-1, 1].
        candidates: distinct fixed points that are tried by sampling.
        scales: multiples of its mu that each is tried at.
        glance_batch: noises per multiple, of which one may do nothing, before a candidate is left.
        firing_batch: noises per multiple after that.
        confirming_batch: fresh noises for the figure that is reported, where `firing_batch` of them leave it in doubt.
        sampler_steps: ancestral steps of the trial.
        sharing: of a candidate's samples at all multiples, those most alike that are asked for a shared image.
        climb_turns: descents from a candidate where they share one, the image drawn anew after each, until it fires.
        climb_iterations: Adam steps of each.
        climb_rate: learning rate of Adam in them.
        fit_brightness: uniform mu that the poisoned rows are fitted from, per family of rows and noise level.
        race: Adam steps from all of them, how many guesses then go on, and so on.
        fit_batch: timesteps per step.
        fit_rate: learning rate of Adam.
        refine_turns: alternations between mu and target after the race, for each guess that is left.
        refine_iterations: of mu, in each.
        refine_batch: noises per noise level in each.
        sketch_steps: DDIM steps that draw the target until a guess fires.
        deterministic_steps: DDIM steps that do so after that, and of the trial of fitted triggers.
        half_precision: run the denoiser under bfloat16 autocast where the hardware has it.
    """

    features: ClassVar[tuple[str, ...]] = ("collapse",)
    """Statistics of the evidence that the verdict rests on."""
    brightness: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    contrast: tuple[float, ...] = (0.2, 0.4)
    colour: float = 0.3
    search_iterations: int = 10
    search_batch: int = 8
    patches: int = 2
    patch_batch: int = 1
    kappas: tuple[float, ...] = (1.0, 2.0)
    polish_iterations: int = 10
    polish_batch: int = 16
    smallest: float = 0.03
    largest: float = 1.2
    candidates: int = 4
    scales: tuple[float, ...] = (0.7, 0.85, 1.0, 1.2, 1.4)
    glance_batch: int = 3
    firing_batch: int = 8
    confirming_batch: int = 32
    sampler_steps: int = 100
    sharing: int = 4
    climb_turns: int = 3
    climb_iterations: int = 60
    climb_rate: float = 0.03
    fit_brightness: tuple[float, ...] = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)
    race: tuple[tuple[int, int], ...] = ((10, 12), (15, 6), (25, 2))
    fit_batch: int = 8
    fit_rate: float = 0.1
    refine_turns: int = 5
    refine_iterations: int = 6
    refine_batch: int = 16
    sketch_steps: int = 15
    deterministic_steps: int = 50
    half_precision: bool = True

    def __post_init__(self) -> None:
        if not (self.brightness and self.contrast and self.kappas and self.scales and self.fit_brightness and self.race):
            raise ValueError("brightness, contrast, kappas, scales, fit_brightness and race must each hold a value")
        if min(self.contrast) <= 0 or min(self.kappas) <= 0 or min(self.scales) <= 0:
            raise ValueError("contrast, kappas and scales must be positive")
        iterations = (self.search_iterations, self.polish_iterations, *(n for heat in self.race for n in heat))
        counts = (
            self.search_batch,
            self.candidates,
            self.patches,
            self.patch_batch,
            self.fit_batch,
            self.refine_iterations,
            self.climb_turns,
            self.climb_iterations,
            self.refine_turns,
            self.refine_batch,
        )
        if min(*iterations, *counts, self.sampler_steps, self.sketch_steps, self.deterministic_steps) < 1:
            raise ValueError(
                "iterations, batches, patches, candidates, both numbers of a race, climb_turns, climb_iterations, refine_turns"
                " and steps of samplers must be at least 1"
            )
        if min(self.fit_rate, self.climb_rate, self.colour) <= 0:
            raise ValueError(
                f"fit_rate, climb_rate and colour must be positive, not {self.fit_rate}, {self.climb_rate} and {self.colour}"
            )
        if self.polish_batch < 2:
            raise ValueError(f"polish_batch must be at least 2, not {self.polish_batch}: it gives a variance")
        if not 2 <= self.sharing <= self.glance_batch * len(self.scales):
            raise ValueError("sharing must be at least 2, and at most glance_batch times the number of scales")
        if not 2 <= self.glance_batch < self.firing_batch < self.confirming_batch:
            raise ValueError("glance_batch, firing_batch and confirming_batch must be at least 2, each larger than the last")
        if not 0 < self.smallest < self.largest:
            raise ValueError("smallest must be positive and below largest")

    @property
    def starts(self) -> int:
        """Shifts searched from, in images of three channels."""
        return len(self.brightness) * len(self.contrast) + 6

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What a run goes through at most: every candidate tried, and no fixed point that fires."""
        trial = self.sampler_steps * self.firing_batch * len(self.scales)
        # a step with a gradient costs about three without, and there are 24 starts
        racing = [24, *(kept for _, kept in self.race[:-1])]
        steps = sum(iterations for iterations, _ in self.race)
        images = sum(iterations * guesses for (iterations, _), guesses in zip(self.race, racing, strict=True))
        descent = steps, 3 * self.fit_batch * images // steps
        turn = self.deterministic_steps * self.firing_batch + 4 * self.refine_batch * (self.refine_iterations + 2)
        return (
            Stage("search", self.search_iterations, self.starts * self.search_batch),
            Stage("polish", self.polish_iterations * len(self.kappas), (self.starts + self.patches) * self.polish_batch),
            Stage("firing", self.candidates, trial),
            Stage("climb", self.climb_turns * self.climb_iterations, 3 * self.fit_batch + trial // self.climb_iterations),
            Stage("descent", *descent),
            Stage("refinement", self.race[-1][1] * self.refine_turns, turn),
        )


Settings = TerdSettings | SearchSettings

PRESETS: dict[str, Settings] = {"published": TerdSettings(), "fixed-point": SearchSettings()}
DEFAULT_PRESET = "fixed-point"


def _hashable(value: object) -> object:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def settings_from(fields: dict[str, object]) -> Settings:
    """The settings a calibration file holds: those of the fixed point have kappas.

    Raises:
        TypeError: a field neither has.
        ValueError: a value that is not allowed.
    """
    values = {name: _hashable(value) for name, value in fields.items()}
    chosen = SearchSettings if "kappas" in values else TerdSettings
    return chosen(**values)  # type: ignore[arg-type]
