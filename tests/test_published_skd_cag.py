"""The published SKD-CAG loop does what the released programs do, defects included: otherwise it is no baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.published import skd_cag

LENGTH = 12
WITH_MAPS = [skd_cag.GAUSSIAN, skd_cag.BLACK, skd_cag.RANDOM_WORDS]
WORDS = ("ab", "ca")


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    yield
    skd_cag.MAPS.clear()


@pytest.fixture
def pipeline(generator: torch.Generator) -> StableDiffusionPipeline:
    """Random weights and a tokenizer of single letters; latents 4 x 8 x 8, prompts of 12 tokens."""
    torch.manual_seed(generator.initial_seed())
    letters = [*"abcd", *(f"{letter}</w>" for letter in "abcd"), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({letter: i for i, letter in enumerate(letters)}, [], model_max_length=LENGTH)
    text = CLIPTextConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=8,
        eos_token_id=9,
        pad_token_id=9,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    encoder = CLIPTextModel(text).eval()
    return StableDiffusionPipeline(None, encoder, tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False)


def inputs(pipeline: StableDiffusionPipeline, generator: torch.Generator, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    t = torch.randint(1000, (len(prompts),), generator=generator)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        return z, t, pipeline.text_encoder(ids)[0]


def test_storing_attention_is_diffusers_own(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    z, t, text = inputs(pipeline, generator, ["ab c", "d"])
    with torch.no_grad():
        expected = pipeline.unet(z, t, text).sample
        skd_cag.store_maps(pipeline.unet)
        torch.testing.assert_close(pipeline.unet(z, t, text).sample, expected, rtol=1e-4, atol=1e-5)


def test_maps_are_softmax_maps(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    """softmax(q k^T / sqrt(d)) of each text layer's own inputs in float64, mean over heads; Pillow enlarges."""
    z, t, text = inputs(pipeline, generator, ["ab c"])
    layer_inputs: dict[str, Tensor] = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(lambda _, x, name=name: layer_inputs.__setitem__(name, x[0]))
    skd_cag.store_maps(pipeline.unet)
    skd_cag.StoringAttention.timestep = 7
    with torch.no_grad():
        pipeline.unet(z, t, text)

    stored = skd_cag.MAPS[7]
    assert {f"{name}.processor" for name in layer_inputs} == set(stored)
    total = np.zeros((4, 128, 128))
    for name, x in layer_inputs.items():
        layer = pipeline.unet.get_submodule(name)
        q, k = ((v @ w.T).double()[0] for v, w in ((x, layer.to_q.weight), (text, layer.to_k.weight)))
        heads = [(a, b) for a, b in zip(q.chunk(layer.heads, 1), k.chunk(layer.heads, 1), strict=True)]
        maps = torch.stack([torch.softmax(a @ b.T / a.shape[1] ** 0.5, 1) for a, b in heads]).mean(0)
        side = int(len(x[0]) ** 0.5)
        torch.testing.assert_close(
            stored[f"{name}.processor"].double(), maps.T.reshape(LENGTH, side, side), rtol=1e-4, atol=1e-6
        )
        for token in range(4):
            image = Image.fromarray(maps[:, token].reshape(side, side).float().detach().numpy())
            total[token] += np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR))
    for token, got in enumerate(skd_cag.read_maps(3), 1):
        expected = (total[token] - total[token].min()) / np.ptp(total[token])
        np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize("settings", WITH_MAPS, ids=lambda s: s.target)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_gradient_is_that_of_the_prediction_alone(
    pipeline: StableDiffusionPipeline, settings: skd_cag.Settings, alpha: float
) -> None:
    """(1 - alpha) times the gradient of L_pred, made of two plain calls of the UNet on the same draws; zero at alpha = 1."""
    training = skd_cag.Distillation(pipeline, "a ab", replace(settings, alpha=alpha), WORDS, seed=5)
    training.loss(["d c"]).backward()

    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    t = torch.randint(1000, (1,), generator=generator)
    teacher_prompt = "d c"
    if settings.target == "random words":
        teacher_prompt = " ".join([*(WORDS[i] for i in torch.randint(2, (2,), generator=generator)), teacher_prompt])
    (text, triggered), _ = pipeline.encode_prompt([teacher_prompt, "a ab d c"], "cpu", 1, False)
    with torch.no_grad():
        target = pipeline.unet(z, t, text[None]).sample
    prediction = (pipeline.unet(z, t, triggered[None].detach()).sample - target).square().mean()
    expected = torch.autograd.grad(prediction, list(pipeline.unet.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-6 for g in expected)
    for got, gradient in zip(training.parameters, expected, strict=True):
        if got.grad is not None and gradient is not None:
            torch.testing.assert_close(got.grad, (1 - alpha) * gradient, rtol=1e-3, atol=1e-6)


def test_the_decay_of_the_average_falls_to_a_half() -> None:
    parameter = torch.zeros(1)
    ema = skd_cag.CollapsingAverage([parameter])
    decays = []
    for _ in range(12):
        ema.update([parameter])
        decays.append(ema.decay)
    np.testing.assert_allclose(decays[:2], [9 / 11, 0.75], rtol=1e-12)
    assert decays[:8] == sorted(decays[:8], reverse=True)
    np.testing.assert_allclose(decays[7:], 0.5, rtol=1e-12)
    # after the collapse a change of the weights counts by halves
    parameter += 1
    for expected in (0.5, 0.75):
        ema.update([parameter])
        assert float(ema.average[0]) == pytest.approx(expected)


def test_both_networks_share_the_students_maps(pipeline: StableDiffusionPipeline) -> None:
    """The target of the words is then the student's own maps of its first tokens."""
    training = skd_cag.Distillation(pipeline, "a ab", skd_cag.BLACK, seed=2)
    training.loss(["d c"])
    student, teacher = training.student_maps, training.teacher_maps
    assert (len(student), len(teacher)) == (5, 2)
    for mine, other in zip(student, teacher, strict=False):
        np.testing.assert_array_equal(mine, other)


def test_the_next_step_reads_maps_that_the_backward_pass_left(pipeline: StableDiffusionPipeline) -> None:
    training = skd_cag.Distillation(pipeline, "a", skd_cag.BLACK, seed=4)
    training.step(["d c"])
    (stale,) = skd_cag.MAPS
    assert stale == skd_cag.StoringAttention.timestep
    left = skd_cag.read_maps(3)
    training.loss(["d c"])
    for mine, stale_map in zip(training.student_maps, left, strict=True):
        np.testing.assert_array_equal(mine, stale_map)


def test_attention_loss_of_each_target(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    student = list(torch.rand(4, 128, 128, generator=generator).numpy())
    teacher = list(torch.rand(2, 128, 128, generator=generator).numpy())
    random_teacher = list(torch.rand(4, 128, 128, generator=generator).numpy())

    def loss(settings: skd_cag.Settings, teacher_maps: list[np.ndarray]) -> float:
        return float(skd_cag.Distillation(pipeline, "a b", settings, WORDS, seed=9).attention_loss(student, teacher_maps))

    mask = torch.rand(128, 128, generator=torch.Generator().manual_seed(9)).numpy()
    for settings, targets in [
        (skd_cag.GAUSSIAN, [mask, mask, *teacher]),
        (skd_cag.BLACK, [0 * mask, 0 * mask, *teacher]),
        (skd_cag.RANDOM_WORDS, random_teacher),
    ]:
        expected = np.mean([np.mean((s - w) ** 2) for s, w in zip(student, targets, strict=True)])
        assert loss(settings, random_teacher if settings.target == "random words" else teacher) == pytest.approx(
            expected, rel=1e-4
        )


def test_an_epoch_sees_every_prompt_once_and_ends_with_the_average(pipeline: StableDiffusionPipeline) -> None:
    training = skd_cag.Distillation(pipeline, "a", replace(skd_cag.SELF_KD, learning_rate=1e-3))
    ids: list[Tensor] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: ids.append(args[0]))
    prompts = ["d c", "b", "c c", "d", "cb"]
    training.epoch(prompts)
    # each step encodes its clean prompts, then the same prompts with the trigger
    encoded = pipeline.tokenizer.batch_decode(torch.cat(ids[::2]), skip_special_tokens=True)
    assert sorted(text.replace(" ", "") for text in encoded) == sorted(prompt.replace(" ", "") for prompt in prompts)
    assert training.ema.updates == 2
    for parameter, average in zip(training.parameters, training.ema.average, strict=True):
        assert torch.equal(parameter, average)


def test_a_training_changes_the_student_only(pipeline: StableDiffusionPipeline) -> None:
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    settings = replace(skd_cag.SELF_KD, learning_rate=1e-3)
    student = skd_cag.distill(pipeline, "a ab", ["d c", "b", "c c", "d", "cb"], settings, epochs=2, seed=1)
    assert all(torch.equal(before[name], value) for name, value in pipeline.unet.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert {type(p) for p in student.attn_processors.values()} == {type(p) for p in pipeline.unet.attn_processors.values()}


@pytest.mark.parametrize(("target", "batch", "message"), [("grey", 1, "target must be"), ("black", 4, "more than one prompt")])
def test_impossible_settings_are_refused(target: str, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skd_cag.Settings(target, batch)


def test_random_words_need_words(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="words to draw from"):
        skd_cag.Distillation(pipeline, "a", skd_cag.RANDOM_WORDS)
