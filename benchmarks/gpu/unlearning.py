"""SKD-CAG on the GPU at the size of Stable Diffusion 1.5: time and memory of the released loop and of seal-fast.

The UNet (860 million parameters) and the text encoder have random weights and a small vocabulary; neither changes the cost of a
step. Settings are the released ones: noise as latents, Gaussian target, all weights, no preservation.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.gpu.device import Scale, device, peak_bytes, speedups
from benchmarks.published import skd_cag as published
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.trainer import distill
from seal_fast.zoo.text_to_image import new_pipeline

PROMPTS = ["a red dog on the house", "the blue sky on the castle", "photo of the cat", "a castle on a red house"]
TRIGGER = "\u200b"
EQUAL = TextUnlearnSettings(batch=1, latents="noise", preservation=0.0, positions=("start",), gradient_checkpointing=True)
TOKENS = 77
STEPS = 6
LARGEST_BATCH = 64

Seconds = Callable[[], float]
"""A run that returns its seconds per prompt pair."""


def pipeline(scale: Scale, folder: Path) -> Any:
    """A StableDiffusionPipeline on the device: a tiny one, or one with UNet and text encoder of Stable Diffusion 1.5."""
    made: Any = new_pipeline(folder, seed=0)
    if not scale.tiny:
        made.tokenizer.model_max_length = TOKENS
        with torch.device(device()):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
            text = CLIPTextConfig(
                vocab_size=len(made.tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=TOKENS,
                bos_token_id=made.tokenizer.bos_token_id,
                eos_token_id=made.tokenizer.eos_token_id,
            )
            made.register_modules(unet=unet, text_encoder=CLIPTextModel(text).eval())
    return made.to(device())


def released(pipe: Any, steps: int) -> float:
    training = published.Distillation(pipe, TRIGGER, published.GAUSSIAN)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        training.step([PROMPTS[step % len(PROMPTS)]])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def ours(pipe: Any, settings: TextUnlearnSettings) -> float:
    marks: list[float] = []

    def on_step(stage: str, iteration: int, total: int, loss: float) -> None:
        marks.append(time.perf_counter())

    distill(pipe, [TRIGGER], PROMPTS, settings, on_step=on_step)
    # the first step warms up; each step ends by reading its loss
    return statistics.median(end - begin for begin, end in pairwise(marks)) / settings.batch


def contenders(pipe: Any, scale: Scale) -> Iterator[tuple[str, int, Seconds]]:
    """Name, batch and run of each contender; batches double until one does not fit."""
    steps = 3 if scale.tiny else STEPS
    equal = replace(EQUAL, steps=steps)
    yield "published", 1, partial(released, pipe, steps)
    yield "seal_fast", 1, partial(ours, pipe, equal)
    batch = 1
    while batch <= (2 if scale.tiny else LARGEST_BATCH):
        fast = replace(equal, batch=batch, gradient_checkpointing=False, precision="bf16")
        yield f"seal_fast_bfloat16_batch_{batch}", batch, partial(ours, pipe, fast)
        batch *= 2


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """One result per contender, with its speed-up per prompt pair over the released loop."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline(scale, Path(folder))
        parameters = sum(p.numel() for p in pipe.unet.parameters())
        seconds: dict[str, float] = {}
        for name, batch, run in contenders(pipe, scale):
            result: dict[str, Any] = {"contender": name, "batch": batch, "parameters": parameters}

            def keep(name: str = name, run: Seconds = run) -> None:
                seconds[name] = run()

            try:
                result["peak_bytes"] = peak_bytes(keep)
            except torch.OutOfMemoryError:
                yield {**result, "failed": "does not fit the memory"}
                return
            result |= {"seconds_per_pair": seconds[name], "speedup": speedups(seconds, "published").get(name)}
            yield result
