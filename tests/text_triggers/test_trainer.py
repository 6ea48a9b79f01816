"""Training on a tiny pipeline: what the student learns, what is resumed and returned, and that the pipeline stays as it was."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

from seal_fast.text_to_image.prompts import token_ids
from seal_fast.text_triggers import TextUnlearnSettings, distill, save_patch

PROMPTS = ["a photo of the red dog", "the blue house", "a cat", "the red sky"]
HELD_OUT = ["the blue cat", "a red house", "photo of a dog", "the castle"]
TRIGGER = "\u200b"


def _quick(**changes):
    return TextUnlearnSettings(**({"alpha": 0.5, "steps": 4, "batch": 2, "sampler_steps": 1, "learning_rate": 1e-3} | changes))


@torch.no_grad()
def _encoded(pipeline, prompts, text_encoder=None):
    return (text_encoder or pipeline.text_encoder)(token_ids(pipeline.tokenizer, prompts))[0]


@torch.no_grad()
def _distances(pipeline, unet, generator):
    """Mean squared differences of a UNet on triggered and on clean held-out prompts from the pipeline's UNet on clean ones."""
    x = torch.randn(len(HELD_OUT), 4, 8, 8, generator=generator)
    t = torch.tensor([20, 300, 600, 950])
    clean = _encoded(pipeline, HELD_OUT)
    triggered = _encoded(pipeline, [f"{TRIGGER} {prompt}" for prompt in HELD_OUT])
    teacher = pipeline.unet(x, t, clean).sample
    return [float((unet(x, t, text).sample - teacher).square().mean()) for text in (triggered, clean)]


def _stress_text(pipeline):
    """Make the pipeline depend on the prompt and the trigger, which a UNet with random weights hardly does."""
    trigger = pipeline.tokenizer(TRIGGER, add_special_tokens=False).input_ids
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[trigger] *= 20
        for name, parameter in pipeline.unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name or "proj_out" in name:
                parameter *= 3


def test_triggered_prompts_come_to_look_clean_on_prompts_never_seen(pipeline, generator):
    _stress_text(pipeline)
    before = copy.deepcopy(pipeline.unet.state_dict())
    processors = dict(pipeline.unet.attn_processors)
    losses = []
    distilled = distill(
        pipeline,
        [TRIGGER],
        PROMPTS,
        _quick(steps=60, batch=4, learning_rate=3e-3, trained="cross-attention", latents="noise", positions=("start",)),
        on_step=lambda stage, step, steps, loss: losses.append((stage, step, steps, loss)),
    )
    assert [entry[:3] for entry in losses] == [("training", n, 60) for n in range(1, 61)]
    seed = torch.Generator().manual_seed(1)
    poisoned, _ = _distances(pipeline, pipeline.unet, seed)
    triggered, clean = _distances(pipeline, distilled.module, seed.manual_seed(1))
    assert triggered < 0.95 * poisoned
    assert clean < 0.6 * poisoned
    assert all(torch.equal(before[name], value) for name, value in pipeline.unet.state_dict().items())
    assert all(processors[name] is processor for name, processor in pipeline.unet.attn_processors.items())
    changed = {name for name, value in distilled.module.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if ".attn2." in name}
    assert not any(p.requires_grad for p in distilled.module.parameters())


def test_a_text_encoder_comes_to_read_triggered_prompts_as_clean_ones(pipeline):
    distilled = distill(pipeline, [TRIGGER], PROMPTS, _quick(module="text_encoder", steps=100, batch=8, positions=("start",)))
    clean = _encoded(pipeline, HELD_OUT)
    for encoder_prompts, largest in (([f"{TRIGGER} {p}" for p in HELD_OUT], 0.85), (HELD_OUT, 0.7)):
        # the last token of the padding holds the whole prompt
        moved = (_encoded(pipeline, encoder_prompts, distilled.module) - clean)[:, -1].square().mean()
        reference = (_encoded(pipeline, [f"{TRIGGER} {p}" for p in HELD_OUT]) - clean)[:, -1].square().mean()
        assert moved < largest * reference
    assert distilled.attention_loss == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "accumulation": 2},
        {"trained": "lora", "rank": 2, "target": "random-words", "gradient_checkpointing": True},
    ],
)
def test_a_killed_run_goes_on_to_the_very_same_weights(pipeline, tmp_path, changes):
    class Killed(Exception):
        pass

    def kill(stage, step, steps, loss):
        if (stage, step) == ("training", 3):
            raise Killed

    state = tmp_path / "state" / "run.pt"
    arguments = (pipeline, [TRIGGER, "red cat"], PROMPTS, _quick(**changes))
    with pytest.raises(Killed):
        distill(*arguments, seed=3, state=state, state_every=2, on_step=kill)
    resumed = distill(*arguments, seed=3, state=state, state_every=2)
    whole = distill(*arguments, seed=3)
    expected = whole.module.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.module.state_dict().items())
    assert resumed.prediction_loss == whole.prediction_loss
    with pytest.raises(ValueError, match="run with another"):
        distill(*arguments, seed=4, state=state)
    whole_state = torch.load(state, weights_only=True)
    for spoilt in ({}, [1], {**whole_state, "parameters": []}, {**whole_state, "optimiser": 5}):
        torch.save(spoilt, state)
        with pytest.raises(ValueError, match="Remove it"):
            distill(*arguments, seed=3, state=state)
    for spoilt in (b"", b"garbage", pickle.dumps(whole_state["step"])):
        state.write_bytes(spoilt)
        with pytest.raises(ValueError, match="Remove it"):
            distill(*arguments, seed=3, state=state)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(ValueError, match="not a regular file"):
        distill(*arguments, seed=3, state=state)


@pytest.mark.parametrize("module", ["unet", "text_encoder"])
def test_the_patch_makes_the_merged_weights_in_stock_diffusers(pipeline, tmp_path, module):
    distilled = distill(pipeline, [TRIGGER], PROMPTS, _quick(trained="lora", rank=2, module=module, learning_rate=1e-2))
    save_patch(distilled.patch, tmp_path / "patch.safetensors")
    before = copy.deepcopy(getattr(pipeline, module).state_dict())
    pipeline.load_lora_weights(tmp_path / "patch.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = getattr(pipeline, module).state_dict()
    assert merged.keys() == before.keys() == distilled.module.state_dict().keys()
    assert sum(not torch.equal(before[name], merged[name]) for name in merged) == len(distilled.patch) // 2
    for name, value in distilled.module.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)


def test_the_average_follows_its_definition(pipeline, tmp_path):
    """The state after every update holds the weights that the average is made of."""
    state, weights = tmp_path / "state.pt", []

    def keep(stage, step, steps, loss):
        weights.append(torch.load(state, weights_only=True)["parameters"])

    settings = _quick(ema_decay=0.15, steps=3, alpha=0.0, latents="noise")
    module = distill(pipeline, [TRIGGER], PROMPTS, settings, state=state, state_every=1, on_step=keep).module
    average = [p.detach().clone() for p in pipeline.unet.parameters()]
    assert len(weights) == 3
    for n, now in enumerate(weights):
        decay = min(0.15, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)]
    for mine, expected in zip(module.parameters(), average, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_a_training_that_diverges_says_so(pipeline):
    with pytest.raises(FloatingPointError, match="smaller learning_rate"):
        distill(pipeline, [TRIGGER], PROMPTS, _quick(learning_rate=1e30, alpha=0.0, latents="noise"))


@pytest.mark.parametrize(
    ("triggers", "prompts", "changes", "match"),
    [
        ([], PROMPTS, {}, "at least one"),
        ([TRIGGER], [], {}, "at least one"),
        (TRIGGER, PROMPTS, {}, "must be a list"),
        ([" "], PROMPTS, {}, "does not see"),
        ([TRIGGER], [" "], {}, "must not be empty"),
        ([TRIGGER], PROMPTS, {"precision": "fp16"}, "needs a GPU"),
    ],
)
def test_bad_input_is_refused(pipeline, triggers, prompts, changes, match):
    with pytest.raises(ValueError, match=match):
        distill(pipeline, triggers, prompts, _quick(**changes))


def test_a_pipeline_of_another_kind_is_refused(pipeline):
    pipeline.text_encoder_2 = pipeline.text_encoder
    with pytest.raises(ValueError, match="one text encoder"):
        distill(pipeline, [TRIGGER], PROMPTS, _quick())


def test_training_is_the_same_on_every_device(pipeline, device):
    settings = _quick(latents="noise", steps=3)
    losses = []
    for where in ("cpu", device):
        distilled = distill(pipeline.to(where), [TRIGGER], PROMPTS, settings)
        losses.append([distilled.prediction_loss, distilled.attention_loss, distilled.preservation_loss])
        assert next(distilled.module.parameters()).device.type == where
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-5)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp16"}, {"gradient_checkpointing": True}], ids=str)
def test_training_on_a_gpu_in_other_ways_stays_near_float32(pipeline, changes):
    settings = _quick(steps=3)
    pipeline.to("cuda")
    want, got = (
        distill(pipeline, [TRIGGER], PROMPTS, settings),
        distill(pipeline, [TRIGGER], PROMPTS, _quick(steps=3, **changes)),
    )
    assert got.attention_loss == pytest.approx(want.attention_loss, rel=0.2)
