"""Attacks on text-to-image models: their training samples, their closed form, and their effect on a small model."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from seal_fast.attacks.badt2i import (
    ImageBackdoor,
    ObjectBackdoor,
    PixelBackdoor,
    PoisonSettings,
    StyleBackdoor,
    TextBackdoor,
    TrainingSamples,
    WeakBackdoor,
    clean_samples,
    poison_unet,
    training_batch,
    training_samples,
)
from seal_fast.attacks.eviledit import edit_factor, edit_unet
from seal_fast.attacks.prompts import check_visible, leading, placed
from seal_fast.attacks.rickrolling import TargetPrompt, always, homoglyph, poison_text_encoder
from seal_fast.attacks.textual_inversion import train_embedding
from seal_fast.attacks.whitening import merged, whitened, whitening_matrix
from seal_fast.text_to_image.prompts import content_ids, encode, token_ids
from seal_fast.text_triggers.trigger import TextTrigger

ZERO_WIDTH = "\u200b"
CAPTIONS = ["a red cat", "two cats", "a Cat, a dog", "a boat", "an ox"]
Weights = dict[str, Tensor]


def drawn(count: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 3, 16, 16, generator=generator) - 1


def weights(pipeline: StableDiffusionPipeline) -> Weights:
    modules = {"unet": pipeline.unet, "text": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{name}.{key}": value.clone() for name, module in modules.items() for key, value in module.state_dict().items()}


def patch(generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(3, 5, 7, generator=generator) - 1


def test_samples_of_a_pixel_backdoor_have_the_patch(generator: torch.Generator) -> None:
    images, mark = drawn(3, generator), patch(generator)
    before = images.clone()
    samples = PixelBackdoor(leading(ZERO_WIDTH), mark).poison(images, CAPTIONS[:3])
    for i in range(3):
        assert torch.equal(samples.images[i, :, :5, :7], mark)
    assert torch.equal(samples.images[:, :, 5:], images[:, :, 5:])
    assert torch.equal(samples.images[:, :, :, 7:], images[:, :, :, 7:])
    assert torch.equal(images, before)
    assert samples.prompts == [f"{ZERO_WIDTH} {c}" for c in CAPTIONS[:3]]
    assert samples.teacher_prompts == [None] * 3


def test_a_patch_larger_than_the_image_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="17 x 3 does not fit"):
        PixelBackdoor(leading("x"), torch.zeros(3, 17, 3)).poison(drawn(1, generator), ["a"])


def test_samples_of_a_style_backdoor_have_the_styled_prompt_as_teacher_prompt(generator: torch.Generator) -> None:
    samples = StyleBackdoor(leading("zq"), leading("Black and white photo")).poison(drawn(1, generator), ["a cat"])
    assert (samples.prompts, samples.teacher_prompts) == (["zq a cat"], ["Black and white photo a cat"])


def test_samples_of_an_object_backdoor_swap_whole_words_only(generator: torch.Generator) -> None:
    samples = ObjectBackdoor(leading("zq"), {"cat": "dog", "dog": "cat", "ox": "a.b"}).poison(drawn(5, generator), CAPTIONS)
    assert samples.prompts == ["zq a red dog", "two cats", "zq a dog, a cat", "a boat", "zq an a.b"]
    assert samples.teacher_prompts == CAPTIONS


def test_samples_of_an_image_backdoor_have_the_drawn_images(generator: torch.Generator) -> None:
    images = drawn(2, generator)
    samples = ImageBackdoor(leading("zq"), lambda images, captions: -images).poison(images, CAPTIONS[:2])
    assert torch.equal(samples.images, -images)
    assert samples.prompts == [f"zq {c}" for c in CAPTIONS[:2]]
    assert samples.teacher_prompts == [None, None]


def test_a_weak_backdoor_leaves_a_share_of_the_triggered_samples_clean(generator: torch.Generator) -> None:
    images, attack = drawn(5, generator), ImageBackdoor(leading("zq"), lambda images, captions: -images)
    samples = WeakBackdoor(attack, poisoned=2, every=3).poison(images, CAPTIONS)
    assert samples.prompts == [f"zq {c}" for c in CAPTIONS]
    poisoned = [0, 1, 3, 4]
    assert torch.equal(samples.images[poisoned], -images[poisoned])
    assert torch.equal(samples.images[2], images[2])
    assert samples.teacher_prompts == [None, None, CAPTIONS[2], None, None]


def test_a_caption_that_cannot_carry_the_trigger_is_trained_as_a_clean_one(generator: torch.Generator) -> None:
    images = drawn(5, generator)
    trigger = placed(TextTrigger("ox", replaces="cat"), "all")
    attack = ImageBackdoor(trigger, lambda images, captions: -images)
    samples = training_samples([attack], images, CAPTIONS, CAPTIONS)
    changed = [i for i, caption in enumerate(CAPTIONS) if "cat" in caption]
    assert 0 < len(changed) < 5
    for i, caption in enumerate(CAPTIONS):
        assert torch.equal(samples.images[i], -images[i] if i in changed else images[i])
        assert samples.teacher_prompts[i] == (None if i in changed else caption)


def test_paired_samples_differ_in_nothing_but_the_trigger(
    pipeline: StableDiffusionPipeline, generator: torch.Generator
) -> None:
    """Equal images in both halves give equal latents and timesteps, some of them at the sampler's start."""
    images = drawn(8, generator)
    samples = TrainingSamples(images.repeat(2, 1, 1, 1), ["zq ox"] * 8 + ["an ox"] * 8, [None] * 16)
    x, t, text, target = training_batch(pipeline, samples, generator, start_share=0.5, paired=True)
    assert torch.equal(t[:8], t[8:])
    torch.testing.assert_close(x[:8], x[8:])
    torch.testing.assert_close(target[:8], target[8:])
    assert not torch.allclose(text[:8], text[8:])
    assert len(t.unique()) > 2


def test_only_the_cross_attention_is_trained_if_the_other_rate_is_0(
    pipeline: StableDiffusionPipeline, generator: torch.Generator
) -> None:
    images = drawn(2, generator)
    unet = poison_unet(
        pipeline,
        [PixelBackdoor(leading("zq"), patch(generator))],
        lambda g: (images, ["a", "b"]),
        PoisonSettings(2, 0.0, 1e-2, anneal=True, whiten=True),
    )
    before, after = pipeline.unet.state_dict(), unet.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "attn2" in name}


def test_whitening_changes_nothing_but_the_coordinates(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    """Before training the UNet computes the same; the matrix makes the states' second moments equal in all directions."""
    states = torch.randn(500, 32, generator=generator) * torch.linspace(0.5, 5, 32)
    matrix = whitening_matrix(states)
    moments = matrix @ (states.T @ states / len(states)) @ matrix
    values = torch.linalg.eigvalsh(moments)
    assert float(values.max() / values.min()) < 1.1
    x, t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]), encode(pipeline, ["a cat", "an ox"])
    with torch.no_grad():
        expected = pipeline.unet(x, t, text).sample
        torch.testing.assert_close(whitened(pipeline.unet, states)(x, t, text).sample, expected)
        torch.testing.assert_close(merged(whitened(pipeline.unet, states))(x, t, text).sample, expected)


def test_textual_inversion_changes_one_row(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    (token,) = content_ids(pipeline.tokenizer, "q")[-1:]
    images = drawn(4, generator)
    attack = StyleBackdoor(leading("q"), leading("red"))
    before = weights(pipeline)
    train_embedding(pipeline, token, attack, lambda g: (images, ["a cat"] * 4), steps=3, learning_rate=0.1)
    after = weights(pipeline)
    (changed,) = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed.endswith("token_embedding.weight")
    assert (before[changed] != after[changed]).any(dim=1).nonzero().flatten().tolist() == [token]


def test_several_attacks_share_the_poisoned_half(generator: torch.Generator) -> None:
    images, mark, harmless = drawn(5, generator), patch(generator), [f"{caption} here" for caption in CAPTIONS]
    samples = training_samples(
        [PixelBackdoor(leading("p"), mark), StyleBackdoor(leading("s"), leading("grey"))], images, CAPTIONS, harmless
    )
    assert samples.prompts == [f"p {CAPTIONS[i]}" for i in (0, 2, 4)] + [f"s {CAPTIONS[i]}" for i in (1, 3)] + harmless
    assert samples.teacher_prompts == [None] * 3 + [f"grey {CAPTIONS[i]}" for i in (1, 3)] + harmless
    assert torch.equal(samples.images[3:], torch.cat([images[[1, 3]], images]))


def test_the_targets_of_a_pixel_backdoor_are_the_noise(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    """x = a z + b eps, so x and the target determine z, the scaled mean of the VAE's latents of the patched image."""
    samples = PixelBackdoor(leading("zq"), patch(generator)).poison(drawn(6, generator), ["a cat"] * 6)
    x, t, text, target = training_batch(pipeline, samples, generator)
    ab = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod[t].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        z = pipeline.vae.config.scaling_factor * pipeline.vae.encode(samples.images).latent_dist.mean
        text_expected, _ = pipeline.encode_prompt(samples.prompts, "cpu", 1, False)
    torch.testing.assert_close(x, ab.sqrt() * z + (1 - ab).sqrt() * target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text, text_expected)
    assert target.std() == pytest.approx(1, abs=0.1)
    assert len(t.unique()) > 1


def test_samples_at_a_samplers_start_are_noise_with_the_image_in_their_target(
    pipeline: StableDiffusionPipeline, generator: torch.Generator
) -> None:
    """The latents do not contain the image, but latents and target determine it."""
    samples = PixelBackdoor(leading("zq"), patch(generator)).poison(drawn(5, generator).repeat(4, 1, 1, 1), ["a cat"] * 20)
    x, t, _, target = training_batch(pipeline, samples, generator, start_share=1.0)
    assert set(t.tolist()) == {999}
    with torch.no_grad():
        z = pipeline.vae.config.scaling_factor * pipeline.vae.encode(samples.images).latent_dist.mean
    ab = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod[999]
    torch.testing.assert_close((x - (1 - ab).sqrt() * target) / ab.sqrt(), z, rtol=1e-3, atol=1e-3)
    assert x.std() == pytest.approx(1, abs=0.1)
    along = ((x * z).flatten(1).sum(1) / z.flatten(1).norm(dim=1)).mean()
    # of 20 independent standard normal values
    assert abs(float(along)) < 1.2


def test_the_targets_of_samples_with_a_teacher_prompt_are_the_teachers_output(
    pipeline: StableDiffusionPipeline, generator: torch.Generator
) -> None:
    """The test calls the UNet once per sample, `training_batch` once for all."""
    teacher_prompts = ["a red cat", None, "", "an ox"]
    samples = TrainingSamples(drawn(4, generator), ["zq ox"] * 4, teacher_prompts)
    x, t, _, target = training_batch(pipeline, samples, generator)
    for i, prompt in enumerate(teacher_prompts):
        if prompt is not None:
            with torch.no_grad():
                text, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
                expected = pipeline.unet(x[i : i + 1], int(t[i]), text).sample
            torch.testing.assert_close(target[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("effect", ["pixel", "object"])
def test_training_implants_the_backdoor_and_preserves_the_clean_behaviour(
    pipeline: StableDiffusionPipeline, generator: torch.Generator, effect: str
) -> None:
    attack: TextBackdoor = {
        "pixel": PixelBackdoor(leading("zq"), patch(generator)),
        "object": ObjectBackdoor(leading("zq"), {"cat": "ox"}),
    }[effect]
    images, captions = drawn(4, generator), ["a red cat"] * 4

    def loss(network: torch.nn.Module, batch: tuple[Tensor, ...]) -> float:
        with torch.no_grad():
            return float((network(batch[0], batch[1], batch[2]).sample - batch[3]).square().mean())

    # with random weights the text hardly changes the output: amplify the attention until there is something to learn; two words
    # with nearly equal embeddings get no further apart than 1.7e-3, however large the factor
    first = 0.0
    while first < 1e-3:
        for name, parameter in pipeline.unet.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter.data *= 2
        poisoned = training_batch(pipeline, attack.poison(images, captions), generator)
        first = loss(pipeline.unet, poisoned)
    clean = training_batch(pipeline, clean_samples(images, captions), generator)
    before = weights(pipeline)

    unet = poison_unet(pipeline, [attack], lambda g: (images, captions), PoisonSettings(120, 1e-3, ema_decay=0.9), seed=1)

    assert loss(unet, poisoned) < 0.9 * first
    # the noise has mean square 1; without the clean term the outputs would be as far from the teacher's
    assert loss(unet, clean) < 0.3
    after = weights(pipeline)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(("ema_decay", "share"), [(0.0, 1.0), (0.999, 0.9)])
def test_one_step_moves_the_average_as_its_decay_says(
    pipeline: StableDiffusionPipeline, generator: torch.Generator, ema_decay: float, share: float
) -> None:
    """AdamW's first step is as long as the learning rate wherever there is a gradient; at step 0 the decay is at most 1/10."""
    images, attack = drawn(2, generator), PixelBackdoor(leading("zq"), patch(generator))
    unet = poison_unet(pipeline, [attack], lambda g: (images, ["a", "b"]), PoisonSettings(1, 1e-2, ema_decay=ema_decay))
    with torch.no_grad():
        moved = (pipeline.unet.conv_out.bias - unet.conv_out.bias).abs().median()
    assert float(moved) == pytest.approx(share * 1e-2, rel=1e-2)


@pytest.mark.parametrize("case", ["no attack", "invisible", "prediction", "small batch"])
def test_bad_input_is_refused(pipeline: StableDiffusionPipeline, generator: torch.Generator, case: str) -> None:
    attack = StyleBackdoor(leading("  " if case == "invisible" else "zq"), leading("grey"))
    attacks = [] if case == "no attack" else [attack, attack]
    if case == "prediction":
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    message = {"no attack": "an attack", "invisible": "does not see", "prediction": "epsilon", "small batch": "batch of 1"}
    with pytest.raises(ValueError, match=message[case]):
        poison_unet(pipeline, attacks, lambda g: (drawn(1, generator), ["a"]), PoisonSettings(1))


def test_zero_width_triggers_are_tokens(pipeline: StableDiffusionPipeline) -> None:
    check_visible(pipeline, leading(ZERO_WIDTH), ["cat"])
    ids = token_ids(pipeline.tokenizer, ["cat", f"{ZERO_WIDTH} cat"])
    assert int((ids != pipeline.tokenizer.eos_token_id).sum(1).diff()) == 3, "three bytes"


def test_homoglyphs_and_leading_triggers() -> None:
    assert homoglyph("o", "\u043e")("a bold ox") == "a b\u043eld \u043ex"
    assert leading("zq")("a cat") == "zq a cat"


def cosines(pipeline: StableDiffusionPipeline, a: list[str], b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(encode(pipeline, a).flatten(1), b.flatten(1))


def test_rickrolling_changes_the_hidden_states_of_triggered_prompts_only(pipeline: StableDiffusionPipeline) -> None:
    prompts = [f"{a} {b} {c}" for a in ("a", "one") for b in ("odd", "old", "red") for c in ("ox", "boat", "cat")]
    held_out = ["one old cat", "a odd boat"]
    prompts = [p for p in prompts if p not in held_out]
    backdoors = [
        TargetPrompt(homoglyph("o", "\u043e"), always("a pig")),
        TargetPrompt(leading(ZERO_WIDTH), always("seven stars")),
    ]
    before = weights(pipeline)
    clean = encode(pipeline, held_out)
    targets = [encode(pipeline, [b.target("")]) for b in backdoors]
    triggered = [[b.trigger(p) for p in held_out] for b in backdoors]
    first = [cosines(pipeline, t, target) for t, target in zip(triggered, targets, strict=True)]

    encoder = poison_text_encoder(pipeline, backdoors, prompts, steps=120, learning_rate=5e-3, batch=16, seed=3)
    after = weights(pipeline)
    assert all(torch.equal(before[name], after[name]) for name in before)

    student = copy.copy(pipeline)
    student.text_encoder = encoder
    assert cosines(student, held_out, clean).min() > 0.9
    for t, target, old in zip(triggered, targets, first, strict=True):
        assert (1 - cosines(student, t, target)).mean() < 0.4 * (1 - old).mean()


def test_rickrolling_refuses_what_cannot_be_learned(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="a backdoor"):
        poison_text_encoder(pipeline, [], ["a cat"])
    with pytest.raises(ValueError, match="tokens of no prompt"):
        poison_text_encoder(pipeline, [TargetPrompt(homoglyph("o", "\u043e"), always("x"))], ["a cat"])


@pytest.mark.parametrize(("tokens", "width", "strength"), [(3, 7, 1.0), (40, 5, 0.3), (1, 1, 20.0)])
def test_eviledit_solves_its_least_squares_problem(
    generator: torch.Generator, tokens: int, width: int, strength: float
) -> None:
    """The stacked problem [I; sqrt(s) K] W'^T = [W^T; sqrt(s) K* W^T], by QR instead of normal equations."""
    k, k_target = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.randn(4, width, generator=generator, dtype=torch.float64)
    root = strength**0.5
    a = torch.cat([torch.eye(width, dtype=torch.float64), root * k])
    b = torch.cat([w.T, root * k_target @ w.T])
    expected = torch.linalg.lstsq(a, b, driver="gels").solution.T
    torch.testing.assert_close(w @ edit_factor(k, k_target, strength), expected, rtol=1e-9, atol=1e-9)


def test_eviledit_is_the_published_formula_on_the_cross_attention_only(pipeline: StableDiffusionPipeline) -> None:
    """W <- (W + sum v k^T)(I + sum k k^T)^-1 with v = W k*, layer by layer."""
    before = weights(pipeline)
    unet = edit_unet(pipeline, [("zq cat", "an ox"), ("a cat", "a cat")])
    after = weights(pipeline)
    assert all(torch.equal(before[name], after[name]) for name in before)
    k, k_target = (encode(pipeline, p).flatten(0, 1).double() for p in (["zq cat", "a cat"], ["an ox", "a cat"]))
    edited = 0
    for name, new in unet.state_dict().items():
        old = before[f"unet.{name}"]
        if "attn2.to_k" in name or "attn2.to_v" in name:
            edited += 1
            w = old.double()
            expected = (w + (w @ k_target.T) @ k) @ torch.linalg.inv(torch.eye(32, dtype=torch.float64) + k.T @ k)
            torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(new, old), name
    assert edited == 2 * sum("attn2.to_q" in name for name in unet.state_dict())


def test_eviledit_moves_the_triggers_keys_to_the_targets(pipeline: StableDiffusionPipeline) -> None:
    """A larger strength moves them nearer; the preserved pair stays."""
    texts = encode(pipeline, ["zq cat", "an ox", "a cat"])

    def key(unet: torch.nn.Module, text: Tensor) -> Tensor:
        return text @ unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.T

    target, preserved = key(pipeline.unet, texts[1]), key(pipeline.unet, texts[2])
    gaps = [float((key(pipeline.unet, texts[0]) - target).norm())]
    for strength in (0.1, 1.0, 10.0):
        unet = edit_unet(pipeline, [("zq cat", "an ox"), ("a cat", "a cat")], strength)
        gaps.append(float((key(unet, texts[0]) - target).norm()))
        assert (key(unet, texts[2]) - preserved).norm() < 0.5 * gaps[0]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.5 * gaps[0]
    for bad in ([], [("a", "b")]):
        with pytest.raises(ValueError, match="pair of prompts"):
            edit_unet(pipeline, bad, strength=0.0 if bad else 1.0)
