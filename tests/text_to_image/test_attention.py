"""Captured maps and their gradients against eager attention in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from seal_fast.text_to_image.attention import aggregate, as_images, capture, cross_attention_layers
from seal_fast.text_to_image.maps import attention_maps

ARCHITECTURES = {
    "sd-1": {},
    "sd-2": {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
    "sd-xl": {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


class Eager:
    """Attention by diffusers' own probabilities, whose maps are stored."""

    def __init__(self, name, stored):
        self.name, self.stored = name, stored

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = (
            attn.head_to_batch_dim(x)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        p = attn.get_attention_scores(q, k)
        self.stored[self.name] = p.unflatten(0, (-1, attn.heads)).mean(1).transpose(1, 2)
        return attn.to_out[0](attn.batch_to_head_dim(p.to(v.dtype) @ v))


def _eager(unet):
    stored = {}
    for name, layer in cross_attention_layers(unet).items():
        layer.set_processor(Eager(name, stored))
    return stored


def _inputs(architecture, generator, dtype=torch.float32):
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    inputs = {"sample": draw(2, 4, 7, 5), "timestep": torch.tensor([3, 700]), "encoder_hidden_states": draw(2, 6, 32)}
    if architecture == "sd-xl":
        inputs["added_cond_kwargs"] = {"text_embeds": draw(2, 16), "time_ids": draw(2, 6)}
    return inputs


def _double(inputs):
    cast = lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
    return {k: {n: cast(x) for n, x in v.items()} if isinstance(v, dict) else cast(v) for k, v in inputs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maps_are_the_mean_over_heads_of_the_softmax(unet_of, architecture, generator):
    unet = unet_of(**ARCHITECTURES[architecture])
    reference = copy.deepcopy(unet).double()
    stored = _eager(reference)
    inputs = _inputs(architecture, generator)
    with torch.no_grad():
        expected = reference(**_double(inputs)).sample
        before = dict(unet.attn_processors)
        with capture(unet, torch.tensor([4, 1, 4])) as captured:
            out = unet(**inputs).sample
            maps = captured.take()
    assert len(maps) == sum("attn2" in name for name in unet.attn_processors)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    for layer, m in zip(captured.layers, maps, strict=True):
        assert m.dtype == torch.float32
        torch.testing.assert_close(m.double(), stored[layer][:, [4, 1, 4]], atol=1e-5, rtol=1e-4)
    assert all(before[name] is processor for name, processor in unet.attn_processors.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_output_and_maps_are_those_of_eager_attention(unet_of, checkpointing, generator):
    unet = unet_of(**ARCHITECTURES["sd-1"]).double()
    reference = copy.deepcopy(unet)
    stored = _eager(reference)
    inputs = _inputs("sd-1", generator, torch.float64)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def loss(out, maps):
        weights = torch.Generator().manual_seed(7)
        draw = lambda x: torch.randn(x.shape, generator=weights, dtype=x.dtype)  # noqa: E731
        return (out * draw(out)).sum() + sum((m.square() * draw(m)).sum() for m in maps)

    with capture(unet) as captured:
        out = unet(**inputs).sample
        loss(out, captured.take()).backward()
        # what ran again in the backward pass has left nothing behind
        with pytest.raises(RuntimeError, match="no maps of"):
            captured.take()
        again = unet(**inputs).sample
        assert len(captured.take()) == len(captured.layers)
    assert torch.equal(out, again)
    expected = reference(**inputs).sample
    loss(expected, [stored[name] for name in captured.layers]).backward()
    for (name, mine), theirs in zip(unet.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-8, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_checkpointing_changes_no_bit_of_float32_gradients(unet_of, generator):
    unet = unet_of(**ARCHITECTURES["sd-2"])
    inputs = _inputs("sd-2", generator)

    def gradients(model):
        with capture(model, torch.tensor([1, 2])) as captured:
            out = model(**inputs).sample
            maps = captured.take()
            # another forward pass, of other maps, before the backward pass of the first
            with torch.no_grad():
                model(**{**inputs, "sample": -inputs["sample"]})
            (out.square().sum() + sum(m.square().sum() for m in maps)).backward()
        return [p.grad for p in model.parameters()]

    checkpointed = copy.deepcopy(unet)
    checkpointed.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients(unet), gradients(checkpointed), strict=True))


def test_teacher_and_student_do_not_share_maps_and_processors_come_back_after_an_error(unet_of, generator):
    teacher, student = unet_of(**ARCHITECTURES["sd-1"]), unet_of(**ARCHITECTURES["sd-1"])
    inputs = _inputs("sd-1", generator)
    before = dict(student.attn_processors)
    with torch.no_grad(), capture(teacher) as alone:
        teacher(**inputs)
        expected = alone.take()
    with torch.no_grad(), capture(teacher) as theirs, capture(student) as own:
        teacher(**inputs)
        student(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(theirs.take(), expected, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(own.take(), expected, strict=True))
    with pytest.raises(TypeError), capture(student):
        student()
    assert all(before[name] is processor for name, processor in student.attn_processors.items())


def test_what_cannot_be_captured_is_refused(unet_of, generator):
    unet = unet_of(**ARCHITECTURES["sd-1"])
    with pytest.raises(ValueError, match="no cross-attention"), capture(torch.nn.Linear(2, 2)):
        pass
    with capture(unet), pytest.raises(ValueError, match="attention mask"):
        unet(**_inputs("sd-1", generator), encoder_attention_mask=torch.ones(2, 6))


def test_aggregated_maps_keep_attention_mass(generator):
    maps = [torch.softmax(torch.randn(2, 5, places, generator=generator), 1) for places in (7 * 5, 4 * 3, 2 * 2)]
    together = aggregate(maps, (7, 5))
    assert together.shape == (2, 5, 7, 5)
    torch.testing.assert_close(together.sum(1), torch.ones(2, 7, 5))
    with pytest.raises(ValueError, match="do not come from a latent"):
        as_images(torch.zeros(1, 1, 13), (7, 5))


def test_attention_maps_are_the_conditional_half_averaged_over_layers_and_steps(pipeline):
    result = attention_maps(pipeline, "a \u200b red dog", steps=3, seed=5)
    assert result.tokens[0] == "a"
    assert result.tokens[-2:] == ("red", "dog")
    assert all(token.isprintable() for token in result.tokens)
    stored = _eager(pipeline.unet)
    steps = []

    def after_step(pipeline, step, timestep, tensors):
        layers = [F.interpolate(as_images(m, (8, 8)), (8, 8), mode="bilinear") for m in stored.values()]
        steps.append(torch.stack(layers).mean(0)[1, 1:7])
        return {}

    image = pipeline(
        "a \u200b red dog",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        callback_on_step_end=after_step,
    ).images[0]
    torch.testing.assert_close(result.maps, torch.stack(steps).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.image, image, atol=1e-3, rtol=0)


def test_attention_maps_need_a_word(pipeline):
    with pytest.raises(ValueError, match="no token"):
        attention_maps(pipeline, " ")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_unet_hands_out_the_same_maps(unet_of, checkpointing, device, generator):
    # one level: tracing takes a minute for each under coverage
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = unet_of(block_out_channels=(16,), **level).to(device)
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    torch.compiler.reset()
    # torch.compile takes nothing out of a checkpoint but its results, so there it breaks the graph
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=not checkpointing)
    with capture(unet, torch.tensor([1, 4], device=device)) as maps:
        # twice: maps are those of the latest call, not of the traced one
        for _ in range(2):
            x, text = (torch.randn(size, generator=generator).to(device) for size in ((2, 4, 8, 8), (2, 16, 32)))
            results = []
            for network in (unet, compiled):
                out, taken = network(x, torch.tensor([3, 500], device=device), text).sample, maps.take()
                loss = out.sum() + sum(layer.square().sum() for layer in taken)
                results.append([out, *taken, *torch.autograd.grad(loss, [unet.conv_in.weight, unet.conv_out.weight])])
            for got, want in zip(*reversed(results), strict=True):
                torch.testing.assert_close(got, want)
