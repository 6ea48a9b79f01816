"""Settings of an unlearning of text triggers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from seal_fast.text_to_image.precision import Precision
from seal_fast.text_triggers.losses import TARGETS, Target
from seal_fast.text_triggers.trigger import POSITIONS, Position

Trained = Literal["all", "cross-attention", "lora"]
Latents = Literal["generated", "noise"]
Module = Literal["unet", "text_encoder"]


@dataclass(frozen=True)
class TextUnlearnSettings:
    """Settings of SKD-CAG (arXiv 2508.18235).

    Attributes:
        alpha: weight of the attention term, in [0, 1]; the paper uses 0.5. 0 is plain self-distillation, which captures no
            maps. Guidance by the maps is not what removed the triggers of the models in zoo-text, see docs/results.md.
        target: target of the trigger tokens' maps, see `seal_fast.text_triggers.losses.Target`.
        steps: updates of the weights.
        batch: prompt pairs per forward pass.
        accumulation: batches per update.
        learning_rate: Adam's learning rate; warmed up over a tenth of the steps, then decayed to 0 by a cosine.
        preservation: weight of the term that preserves the output on clean and empty prompts; the paper has no such term (0).
        trained: which weights are trained: "all", those of the "cross-attention" layers, or "lora", low-rank changes of all
            attention layers.
        rank: rank of the low-rank changes.
        precision: "fp32", "bf16" or "fp16", by autocast; the weights stay float32. "bf16" is float32, with a warning, where the
            hardware does not multiply bfloat16, since emulating it takes at least ten times as long. "fp16" scales the loss and
            needs a GPU.
        gradient_checkpointing: recompute the UNet's activations in the backward pass, for less memory and a third more time.
        ema_decay: decay of a moving average of the weights, which replaces the last weights in the end; 0 for none. The decay
            of update n is min(ema_decay, (1 + n) / (10 + n)).
        latents: training states: "generated", noised latents of images that the teacher draws, as a sampler meets them; or
            "noise", N(0, I) at every timestep as in the paper, which a sampler meets at the first timestep only.
        triggered_image_fraction: share of the prompt pairs whose image the teacher draws from the triggered prompt. On these
            images the student learns to leave an effect that has begun. The paper draws from clean prompts only (0).
        sampler_steps: DDIM steps of the teacher's images.
        guidance: guidance scale of the teacher's images.
        max_loss_weight: largest weight of a noisy timestep in the prediction and preservation terms, see
            `seal_fast.text_to_image.latents.inverse_snr_weights`. The weights are scaled to a mean of 1 over timesteps. 1 gives
            all timesteps the same weight, as in the paper.
        positions: where in the prompt triggers are trained.
        module: the module that is trained, "unet" or "text_encoder". For the text encoder alpha, target, latents,
            triggered_image_fraction, sampler_steps, guidance and max_loss_weight have no effect.
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
        if not all(0 <= value < math.inf for value in (self.learning_rate, self.preservation, self.guidance)):
            raise ValueError("learning_rate, preservation and guidance must be finite and not negative")
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
