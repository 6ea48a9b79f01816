"""Every number of a reversion, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReversionSettings:
    """Settings of TERD's two stages (arXiv 2409.05294).

    Where the paper's programs for BadDiffusion and for TrojDiff differ, these hold one choice that serves both, since a
    defender does not know the attack: gamma is always reverted, and starts between 0 (where both noised inputs are equal and
    the loss has no gradient in mu) and 1 (where TrojDiff's trigger is no minimum).

    Attributes:
        estimation_iterations: steps of stage 1.
        refinement_iterations: steps of stage 2.
        batch: pairs of noised inputs per step; the denoiser sees 2 (stage 1) or 4 (stage 2) times as many.
        mirrored_start: revert twice, from -U[0, 1] as published and from +U[0, 1], and keep the trigger further from N(0, I):
            a trigger of bright pixels was found from the second start only.
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

    estimation_iterations: int = 3000
    refinement_iterations: int = 1000
    batch: int = 16
    mirrored_start: bool = False
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


PRESETS: dict[str, ReversionSettings] = {
    "published": ReversionSettings(),
    # a twelfth of the published evaluations: no refinement, and gamma twenty times as fast to arrive in an eighth of the steps.
    # On the zoo's 16-px models 250 iterations left benign shifts too large (M_r 0.028, against 0.051 of a backdoored one)
    "quick": ReversionSettings(
        estimation_iterations=400, refinement_iterations=0, mirrored_start=True, gamma_learning_rate=2e-2
    ),
}
DEFAULT_PRESET = "quick"
