"""What the student is trained on, and how its errors are weighted."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers import TextTrigger, TextUnlearnSettings, prompt_pair
from seal_fast.text_triggers.objectives import unet_objective
from seal_fast.training import quiet

PROMPTS = ["a photo of the red dog", "the blue house", "a cat", "the red sky", "the castle", "a dog on the sky"]


@pytest.fixture
def pairs(pipeline):
    return [prompt_pair(pipeline.tokenizer, prompt, TextTrigger("\u200b"), "start", torch.Generator()) for prompt in PROMPTS]


def _record_calls(unet, calls):
    def record(module, args, kwargs):
        calls.append((args[1], args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]))

    return unet.register_forward_pre_hook(record, with_kwargs=True)


@pytest.mark.parametrize("triggered_image_fraction", [0.0, 0.5, 1.0])
def test_a_fraction_of_the_images_is_drawn_from_triggered_prompts(
    pipeline: StableDiffusionPipeline, pairs, triggered_image_fraction, generator
):
    calls = []
    recording = _record_calls(pipeline.unet, calls)
    settings = TextUnlearnSettings(triggered_image_fraction=triggered_image_fraction, batch=1, sampler_steps=1, guidance=1.0)
    with unet_objective(pipeline, copy.deepcopy(pipeline.unet), pairs, settings, generator, quiet):
        recording.remove()
    drawn = torch.cat([text for _, text in calls])
    clean, triggered = (encode(pipeline, [getattr(pair, name) for pair in pairs]) for name in ("clean", "triggered"))
    from_clean, from_triggered = (((drawn[:, None] - texts).abs().amax((2, 3)) < 1e-5).any(0) for texts in (clean, triggered))
    assert len(drawn) == len(pairs)
    assert bool((from_clean ^ from_triggered).all())
    if triggered_image_fraction in (0.0, 1.0):
        assert bool(from_triggered.all()) == (triggered_image_fraction == 1.0)


def test_an_error_counts_as_much_as_in_the_image(pipeline: StableDiffusionPipeline, pairs, generator):
    student = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    ab = pipeline.scheduler.alphas_cumprod.double()
    expected = ((1 - ab) / ab).clamp(1, 7)
    expected /= expected.mean()
    weights = set()
    for seed in range(12):
        calls, losses = [], []
        for max_loss_weight in (1.0, 7.0):
            settings = TextUnlearnSettings(max_loss_weight=max_loss_weight, batch=1, sampler_steps=1, alpha=0.0)
            with unet_objective(pipeline, student, pairs, settings, torch.Generator().manual_seed(seed), quiet) as objective:
                recording = _record_calls(student, calls)
                losses.append(objective(torch.Generator().manual_seed(seed)).detach())
                recording.remove()
        t = int(calls[0][0][0])
        assert t == int(calls[1][0][0])
        plain, weighted = losses
        assert float(plain[0]) > 0
        torch.testing.assert_close(weighted, plain * float(expected[t]), rtol=1e-4, atol=0)
        weights.add(float(expected[t]))
    assert len(weights) > 2
