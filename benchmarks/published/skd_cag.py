"""SKD-CAG (arXiv 2508.18235) as its authors released it: the baseline for speed, and "as released" in tables of accuracy.

Written from a description of the released programs, not from their text. The released programs differ from the paper. These of
their properties are kept on purpose:

- Waste. The batch is 1. Every attention layer, self-attention too, stores its softmax probabilities. The maps of all tokens of
  teacher and student are moved to the CPU, enlarged to 128 x 128 per layer and scaled by numpy one by one. The text encoder
  runs on the same prompts in every step. All weights and Adam's moments are float32, under gradient checkpointing.
- The attention loss has no gradient, because its maps are detached. The gradient is (1 - alpha) times that of the prediction
  loss.
- Both networks use one store for their maps. The student's maps overwrite the teacher's before these are read. Words are
  therefore compared with the words beside them, and with random words each map with itself. Recomputation in the backward pass
  leaves maps in the store, which the next step finds.
- The weighting divides by t/T. At t = 0 that makes the loss infinite, but not the gradient, which has no such term.
- The decay of the exponential moving average falls to 1/2 (.818, .75, ... .5). The average is copied into the student in every
  epoch.

Noise N(0, I) at every timestep is the published input. `SELF_KD` is the released method without maps, at batch 4. Argument
parsing, logging and sample images are left out, because they take no time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 128
"""Maps are enlarged to SIDE x SIDE."""

MAPS: dict[int, dict[str, Tensor]] = {}
"""Maps [N,h,w] on the CPU, by timestep and layer name, of the network that ran last."""


@dataclass(frozen=True)
class Settings:
    """One of the released programs.

    Attributes:
        target: target of the trigger tokens' maps: "gaussian" (which is uniform noise), "black" or "random words"; None for
            no maps.
        batch: prompts per step; 1 with maps.
        weighted: divide the attention loss by t/T.
        alpha: weight of the attention loss.
        learning_rate: AdamW's learning rate, 1e-6 as released.
    """

    target: str | None
    batch: int = 1
    weighted: bool = False
    alpha: float = 0.5
    learning_rate: float = 1e-6

    def __post_init__(self) -> None:
        if self.target not in ("gaussian", "black", "random words", None):
            raise ValueError(f"target must be gaussian, black, random words or None, not {self.target!r}")
        if self.target is not None and self.batch != 1:
            raise ValueError("the released programs with maps cannot take more than one prompt at a time")


GAUSSIAN = Settings("gaussian", weighted=True)
BLACK = Settings("black")
RANDOM_WORDS = Settings("random words")
SELF_KD = Settings(None, batch=4)


class StoringAttention:
    """Attention that stores its probabilities [B*H,M,N]; cross-attention layers also write their maps into `MAPS`."""

    timestep = 0
    """Timestep of the running pass, shared by all layers of all networks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        probabilities = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            side = math.isqrt(q.shape[1])
            image = probabilities.mean(0).T.reshape(-1, side, side)
            MAPS.setdefault(self.timestep, {})[self.name] = image.cpu()
        out = attn.batch_to_head_dim(torch.bmm(probabilities, v))
        return attn.to_out[1](attn.to_out[0](out))


def store_maps(unet: Any) -> None:
    """Give every attention layer of a UNet2DConditionModel a `StoringAttention`."""
    unet.set_attn_processor({name: StoringAttention(name) for name in unet.attn_processors})


def read_maps(tokens: int) -> list[np.ndarray]:
    """The maps [128,128] of tokens 1 .. `tokens` at the first timestep of the store, each scaled to [0, 1]."""
    layers = next(iter(MAPS.values())).values()
    enlarged = [F.interpolate(maps[None], size=(SIDE, SIDE), mode="bilinear")[0] for maps in layers]
    total = torch.stack(enlarged).sum(0)
    images = []
    for token in range(1, 1 + tokens):
        image = total[token].detach().numpy()
        low, high = image.min(), image.max()
        images.append((image - low) / (high - low))
    return images


class CollapsingAverage:
    """A moving average of weights whose decay d becomes 1 - min(d, (1 + n) / (10 + n)) at update n: .818, .75, ... .5."""

    def __init__(self, parameters: Sequence[Tensor], decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        self.updates += 1
        self.decay = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.average, parameters, strict=True):
            average.lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        for average, parameter in zip(self.average, parameters, strict=True):
            parameter.copy_(average)


class Distillation:
    """A training in progress.

    Args:
        pipeline: a diffusers StableDiffusionPipeline with square latents, float32; not changed.
        trigger: text inserted before the prompt.
        settings: see `Settings`.
        words: for the target "random words"; one is drawn for each word of the trigger.
        seed: of the latents, timesteps, targets and words.

    Attributes:
        student: the trained copy of the UNet.
        student_maps: the maps that the latest attention loss took for the student's.
        teacher_maps: the maps that it took for the teacher's.
    """

    def __init__(self, pipeline: Any, trigger: str, settings: Settings, words: Sequence[str] = (), seed: int = 0) -> None:
        if settings.target == "random words" and not words:
            raise ValueError("the target random words needs words to draw from")
        self.pipeline, self.trigger, self.settings, self.words = pipeline, trigger, settings, words
        self.generator = torch.Generator().manual_seed(seed)
        self.teacher = copy.deepcopy(pipeline.unet).eval().requires_grad_(False)
        self.student = copy.deepcopy(pipeline.unet).train().requires_grad_(True)
        self.student.enable_gradient_checkpointing()
        if settings.target is not None:
            store_maps(self.teacher)
            store_maps(self.student)
            MAPS.clear()
        self.parameters = list(self.student.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.learning_rate)
        self.ema = CollapsingAverage(self.parameters)
        self.student_maps: list[np.ndarray] = []
        self.teacher_maps: list[np.ndarray] = []

    def _tokens(self, text: str) -> int:
        return len(self.pipeline.tokenizer(text).input_ids) - 2

    @torch.no_grad()
    def _embeddings(self, prompts: Sequence[str]) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        length = tokenizer.model_max_length
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        return encoder(ids.to(encoder.device))[0]

    def _teacher_prompt(self, prompt: str) -> str:
        """The teacher's prompt, with random words in the trigger's place if they are the target."""
        if self.settings.target != "random words":
            return prompt
        drawn = torch.randint(len(self.words), (len(self.trigger.split()),), generator=self.generator)
        return " ".join([*(self.words[i] for i in drawn), prompt])

    def attention_loss(self, student: list[np.ndarray], teacher: list[np.ndarray]) -> Tensor:
        """Mean over the student's tokens of the squared difference of each map to its target; scalar without a graph."""
        triggers = self._tokens(self.trigger)
        if self.settings.target == "random words":
            targets = teacher
        else:
            noise = torch.rand(SIDE, SIDE, generator=self.generator).numpy()
            mask = noise if self.settings.target == "gaussian" else np.zeros_like(noise)
            targets = [mask] * triggers + teacher
        pairs = zip(student, targets, strict=False)
        return torch.stack([F.mse_loss(torch.from_numpy(of), torch.from_numpy(to)) for of, to in pairs]).mean()

    def loss(self, prompts: Sequence[str]) -> Tensor:
        """The loss of one step, alpha L_attn + (1 - alpha) L_pred, or L_pred without maps; scalar.

        Args:
            prompts: `settings.batch` clean ones.
        """
        unet = self.student
        shape = (len(prompts), unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
        z = torch.randn(shape, generator=self.generator).to(unet.device)
        T = self.pipeline.scheduler.config["num_train_timesteps"]
        t = torch.randint(T, (len(prompts),), generator=self.generator).to(unet.device)
        teacher_prompts = [self._teacher_prompt(prompt) for prompt in prompts]
        triggered = [f"{self.trigger} {prompt}" for prompt in prompts]
        clean_text, triggered_text = self._embeddings(teacher_prompts), self._embeddings(triggered)
        StoringAttention.timestep = int(t[0])
        with torch.no_grad():
            target = self.teacher(z, t, clean_text).sample
        prediction = F.mse_loss(unet(z, t, triggered_text).sample, target)
        if self.settings.target is None:
            return prediction
        # both are read after the student's pass, from one store
        self.teacher_maps = read_maps(self._tokens(teacher_prompts[0]))
        self.student_maps = read_maps(self._tokens(triggered[0]))
        MAPS.clear()
        attention = self.attention_loss(self.student_maps, self.teacher_maps).to(unet.device)
        if self.settings.weighted:
            attention = attention / (t[0] / T)
        return self.settings.alpha * attention + (1 - self.settings.alpha) * prediction

    def step(self, prompts: Sequence[str]) -> float:
        """One update; returns its loss."""
        loss = self.loss(prompts)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.ema.update(self.parameters)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return loss.item()

    def epoch(self, prompts: Sequence[str]) -> None:
        """All prompts once, in random order; then the average becomes the student."""
        order = torch.randperm(len(prompts), generator=self.generator).split(self.settings.batch)
        for rows in order:
            self.step([prompts[row] for row in rows])
        self.ema.copy_to(self.parameters)


def distill(
    pipeline: Any,
    trigger: str,
    prompts: Sequence[str],
    settings: Settings,
    epochs: int,
    *,
    words: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """The whole training, as released 75 epochs of 100 prompts; returns the student UNet, frozen, with attention as it was."""
    training = Distillation(pipeline, trigger, settings, words, seed)
    for _ in range(epochs):
        training.epoch(prompts)
    student = training.student
    student.disable_gradient_checkpointing()
    student.set_attn_processor(pipeline.unet.attn_processors)
    return student.eval().requires_grad_(False)
