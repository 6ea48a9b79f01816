"""Every number of an unlearning, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seal_fast.text_triggers.losses import TARGETS, Target
from seal_fast.text_triggers.trigger import POSITIONS, Position

Trained = Literal["all", "cross-attention", "lora"]
Precision = Literal["fp32", "bf16", "fp16"]
Latents = Literal["generated", "noise"]
Module = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class TextUnlearnSettings:
    """Settings of SKD-CAG (arXiv 2508.18235).

    Attributes:
        alpha: weight of the attention term, in [0, 1]; 0.5 as published. 0 is plain self-distillation and captures no maps:
            guidance was not what removed the triggers of zoo-text, see docs/results.md.
        target: of the trigger tokens' maps, see `seal_fast.text_triggers.losses.Target`.
        steps: updates of the weights.
        batch: prompt pairs per forward pass.
        accumulation: batches per update.
        learning_rate: Adam's; warmed up over a tenth of the steps, then a cosine to 0.
        preservation: weight of the term that holds clean and empty prompts; 0 leaves it out, as the paper does.
        trained: which weights: "all", those of "cross-attention", or "lora", low-rank changes of all attention layers.
        rank: of the low-rank changes.
        precision: "fp32", or autocast to "bf16" where the hardware multiplies it (else float32, with a warning: emulated it
            takes ten times as long and more), or to "fp16" with a scaled loss (GPUs only). The weights stay float32.
        gradient_checkpointing: recompute the UNet's activations in the backward pass: less memory, a third more time.
        ema_decay: of an average over updates, which is then returned instead of the last weights; it counts from update n on
            with min(ema_decay, (1 + n) / (10 + n)). 0 for none.
        latents: "generated": noised latents of images that the teacher draws from the prompts, which is what a sampler
            meets; or "noise": N(0, I) at every timestep, as published, which a sampler meets at the first one only.
        triggered_image_fraction: share of prompt pairs whose image the teacher draws from the triggered prompt instead: there
            the student
            learns to leave an effect that has begun. 0, as published, shows it only what clean prompts draw.
        sampler_steps: DDIM steps of those images.
        guidance: their guidance scale.
        max_loss_weight: largest weight of a noisy timestep in the prediction and preservation terms, see
            `seal_fast.text_to_image.latents.inverse_snr_weights`; their mean over timesteps is 1. 1 weighs all alike, as
            published.
        positions: where in the prompt triggers are trained.
        module: what is edited, "unet" or "text_encoder"; the one that holds the backdoor. For the text encoder alpha, target,
            latents, triggered_image_fraction, max_loss_weight and weighting do not count.
        weighting: multiply a row's attention term by t/T, so that noisy states count more (the paper's appendix).
    """

    alpha: float = 0.0
    target: Target = "noise"
    steps: int = 500
    batch: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-5
    preservation: float = 1.0
    trained: Trained = "all"
    rank: int = 8
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0
    latents: Latents = "generated"
    triggered_image_fraction: float = 0.25
    sampler_steps: int = 25
    guidance: float = 7.5
    max_loss_weight: float = 20.0
    positions: tuple[Position, ...] = POSITIONS
    module: Module = "unet"
    weighting: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulation, self.rank, self.sampler_steps) < 1:
            raise ValueError("steps, batch, accumulation, rank and sampler_steps must be at least 1")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        if not 0 <= self.triggered_image_fraction <= 1:
            raise ValueError(f"triggered_image_fraction must be in [0, 1], not {self.triggered_image_fraction}")
        if not self.max_loss_weight >= 1:
            raise ValueError(f"max_loss_weight must be at least 1, not {self.max_loss_weight}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}")
        if min(self.learning_rate, self.preservation, self.guidance) < 0:
            raise ValueError("learning_rate, preservation and guidance must not be negative")
        if not self.positions or not set(self.positions) <= set(POSITIONS):
            raise ValueError(f"positions must be some of {', '.join(POSITIONS)}, not {self.positions}")
        for name, allowed in (
            ("target", TARGETS),
            ("trained", ("all", "cross-attention", "lora")),
            ("precision", ("fp32", "bf16", "fp16")),
            ("latents", ("generated", "noise")),
            ("module", ("unet", "text_encoder")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.module == "text_encoder" and (self.trained == "cross-attention" or self.gradient_checkpointing):
            raise ValueError("a text encoder has no cross-attention to train and is too small for gradient_checkpointing")
