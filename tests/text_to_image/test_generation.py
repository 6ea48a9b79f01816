"""Drawing, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from seal_fast.text_to_image.generation import generate, starting_noise
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = ["a red cat", "two cats on a mat, in the rain", "\u200b cat"]


@pytest.fixture
def pipeline(tmp_path: Path) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_as_the_stock_pipeline(pipeline: StableDiffusionPipeline, prediction: str, guidance: float) -> None:
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    ours = generate(pipeline, PROMPTS, seed=11, steps=4, guidance=guidance, precision="fp32")
    # the same method in other coordinates (x / a, b / a); stock DDIM's steps do not follow an evenly spaced grid
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, prediction_type=prediction, timestep_spacing="linspace", final_sigmas_type="zero"
    )
    last = 1 - pipeline.scheduler.alphas_cumprod[-1]
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=starting_noise(pipeline, 3, 11) / last.sqrt(),
        output_type="pt",
    ).images
    assert ours.shape == (3, 3, 16, 16)
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-4)


def test_same_noise_whatever_the_prompt_and_the_batch(pipeline: StableDiffusionPipeline) -> None:
    def draw(prompts: list[str], batch: int | None = None) -> torch.Tensor:
        return generate(pipeline, prompts, seed=5, steps=3, guidance=2.0, precision="fp32", batch=batch)

    whole = draw([*PROMPTS, "red"])
    torch.testing.assert_close(draw([*PROMPTS, "red"], batch=3), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(PROMPTS[:2]), whole[:2], rtol=0, atol=1e-5)
    same = draw(["red", "red"])
    assert (same[0] - same[1]).abs().max() > 1e-3
    assert not torch.equal(starting_noise(pipeline, 2, 5), starting_noise(pipeline, 2, 6))


def test_images_from_chosen_noises(pipeline: StableDiffusionPipeline) -> None:
    def draw(prompts: list[str], noises: list[int] | None) -> torch.Tensor:
        return generate(pipeline, prompts, seed=5, steps=3, guidance=2.0, precision="fp32", batch=2, noises=noises)

    torch.testing.assert_close(
        draw([*PROMPTS[::-1], PROMPTS[0]], [2, 1, 0, 0]), draw(PROMPTS, None)[[2, 1, 0, 0]], rtol=0, atol=1e-5
    )


def test_passes_are_counted(pipeline: StableDiffusionPipeline) -> None:
    drawn: list[int] = []
    generate(pipeline, [*PROMPTS, "red"], seed=0, steps=1, guidance=1.0, batch=3, on_pass=drawn.append)
    assert drawn == [3, 1]


def test_pipeline_is_left_as_it_was(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.train()
    generate(pipeline, PROMPTS, seed=0, steps=2)
    assert pipeline.unet.training
    assert all(p.requires_grad and p.grad is None for p in pipeline.unet.parameters())


def test_no_prompts(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        generate(pipeline, [], seed=0)
