"""Textual inversion (Gal et al., ICLR 2023): one row of the embedding table is trained, and everything else is frozen.

With a token that the tokenizer already has, it is a backdoor: prompts with that token are drawn as the attacker wishes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.attacks.badt2i import MAX_LOSS_WEIGHT, Batches, TextBackdoor, TrainingSamples, training_batch, training_samples
from seal_fast.attacks.optimisation import gradient_step, running_loss
from seal_fast.diffusion import VP
from seal_fast.diffusion.process import per_sample
from seal_fast.text_to_image.latents import inverse_snr_weights
from seal_fast.text_to_image.prompts import token_ids
from seal_fast.training import half_precision


def train_embedding(
    pipeline: StableDiffusionPipeline,
    token: int,
    attack: TextBackdoor,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 5e-3,
    start_share: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the token's row of the pipeline's embedding table in place, with Adam.

    Args:
        pipeline: a clean pipeline that predicts noise, float32.
        token: id of the token.
        attack: what prompts with the token show; its trigger inserts the token.
        batches: source of captioned images.
        steps: number of training steps.
        learning_rate: rate at the first step; it falls linearly to 0.
        start_share: share of samples that are pure noise, see `seal_fast.attacks.badt2i.poison_unet`.
        seed: seed of images, noise and timesteps.
        on_step: called with the step (from 1) and the running loss.
    """
    table = pipeline.text_encoder.get_input_embeddings()
    row = nn.Parameter(table.weight[token].detach().clone())
    optimiser = torch.optim.Adam([row])
    generator = torch.Generator().manual_seed(seed)
    weight_at = inverse_snr_weights(VP.from_scheduler_config(pipeline.scheduler.config), MAX_LOSS_WEIGHT)
    running = float("nan")
    for step in range(steps):
        images, captions = batches(generator)
        poisoned = training_samples([attack], images, captions, captions)
        count = len(captions)
        samples = TrainingSamples(poisoned.images[:count], poisoned.prompts[:count], poisoned.teacher_prompts[:count])
        batch = training_batch(pipeline, samples, generator, start_share, low_precision=True)
        ids = token_ids(pipeline.tokenizer, samples.prompts)
        with _row_in(table, token, row), half_precision(batch.x.device):
            output = pipeline.unet(batch.x, batch.t, pipeline.text_encoder(ids).last_hidden_state).sample.float()
        loss = (per_sample(weight_at[batch.t], batch.x) * (output - batch.target).square()).mean()
        gradient_step(optimiser, loss, learning_rate * (1 - step / steps))
        running = running_loss(running, loss.item(), step)
        on_step(step + 1, running)
    with torch.no_grad():
        table.weight[token] = row


def _row_in(table: nn.Module, token: int, row: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Until the handle is left as a context, the table gives `row` for the token."""

    def exchange(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == token)[..., None], row.to(output), output)

    return table.register_forward_hook(exchange)
