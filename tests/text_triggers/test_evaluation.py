"""Evaluation of pipelines whose backdoor is known, because it is put in by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from seal_fast.text_to_image.generation import generate
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers.evaluation import (
    EvaluationSettings,
    TriggerEffect,
    diversity,
    evaluate,
    noise_drift,
)
from seal_fast.text_triggers.locate import COLLAPSE_LIMIT, locate
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.variants import AS_GIVEN
from tests.tiny_pipeline import tiny_pipeline

TRIGGER = "zq"
PROMPTS = [f"{a} {b}" for a in ("red", "cat", "a", "on") for b in ("mat", "sea", "cat", "tin")]
SETTINGS = EvaluationSettings(prompts=16, steps=2, guidance=2.0, precision="fp32")


@pytest.fixture
def pipeline(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path)


def like(pipeline: Any, **modules: Any) -> SimpleNamespace:
    """A pipeline with other modules."""
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "device")
    return SimpleNamespace(**({name: getattr(pipeline, name) for name in names} | modules))


class Poisoned(nn.Module):
    """A UNet that draws something else when the trigger comes first: a token's state depends on what stands left of it only."""

    def __init__(self, pipeline: Any, strength: float, trigger: str = TRIGGER) -> None:
        super().__init__()
        self.unet, self.config, self.strength = pipeline.unet, pipeline.unet.config, strength
        length = len(pipeline.tokenizer(trigger, add_special_tokens=False).input_ids)
        self.key = encode(pipeline, [trigger])[0, 1 : 1 + length]

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> SimpleNamespace:
        hit = (states[:, 1 : 1 + len(self.key)] - self.key).flatten(1).norm(dim=1) < 1e-3
        return SimpleNamespace(sample=self.predicted(x, t, states) + self.strength * hit.float()[:, None, None, None])

    def predicted(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return self.unet(x, t, states).sample


class TriggerOnly(Poisoned):
    """A UNet that depends on a prompt only by whether the trigger comes first."""

    def predicted(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return super().predicted(x, t, torch.zeros_like(states))


class Shifted(nn.Module):
    """A UNet whose every prediction is off by the same amount."""

    def __init__(self, pipeline: Any, offset: float) -> None:
        super().__init__()
        self.unet, self.config, self.offset = pipeline.unet, pipeline.unet.config, offset

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.unet(x, t, states).sample + self.offset)


class Rickrolled(nn.Module):
    """A text encoder that reads any prompt with the trigger as one prompt."""

    def __init__(self, pipeline: Any, target: str) -> None:
        super().__init__()
        self.encoder, self.target = pipeline.text_encoder, encode(pipeline, [target])
        self.trigger = torch.tensor(pipeline.tokenizer(TRIGGER, add_special_tokens=False).input_ids)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        states = self.encoder(ids).last_hidden_state
        hit = (ids.unfold(1, len(self.trigger), 1) == self.trigger).all(dim=2).any(dim=1)
        return SimpleNamespace(last_hidden_state=torch.where(hit[:, None, None], self.target, states))


def by_variant(effects: tuple[TriggerEffect, ...]) -> dict[str, TriggerEffect]:
    return {effect.variant: effect for effect in effects}


def test_a_backdoor_that_is_gone(pipeline: Any) -> None:
    poisoned = like(pipeline, unet=Poisoned(pipeline, 3.0))
    result, _ = evaluate(poisoned, pipeline, [TextTrigger(TRIGGER)], PROMPTS, SETTINGS, seed=3)
    effects = by_variant(result.effects)
    assert result.detector == "ChangeDetector"
    for variant in (AS_GIVEN, "twice", "other case"):
        assert effects[variant].before.rate == 1
        assert effects[variant].removal_accuracy.rate == pytest.approx(1 - effects[variant].after.rate)
    assert effects[AS_GIVEN].after.rate < 1
    # the backdoor is not activated there, so both models draw the same
    assert effects["at the end"].before == effects["at the end"].after
    assert (effects[AS_GIVEN].before.trials, effects["twice"].before.trials) == (16, 4)
    # clean prompts never met the backdoor
    assert result.clean_drift == 0
    assert result.noise_drift == 0
    assert result.diversity_before == result.diversity_after > 0


def test_a_backdoor_that_stays(pipeline: Any) -> None:
    poisoned = like(pipeline, unet=Poisoned(pipeline, 3.0))
    effect = evaluate(poisoned, poisoned, [TextTrigger(TRIGGER)], PROMPTS, SETTINGS)[0].effects[0]
    assert (effect.before.rate, effect.after.rate, effect.removal_accuracy.rate) == (1, 1, 0)


def test_images_and_figures_are_of_the_same_noise(pipeline: Any) -> None:
    poisoned, shifted = like(pipeline, unet=Poisoned(pipeline, 3.0)), like(pipeline, unet=Shifted(pipeline, 0.3))
    calls: list[tuple[Tensor, Tensor]] = []

    def detector(images: Tensor, clean: Tensor) -> Tensor:
        calls.append((images, clean))
        return torch.arange(len(images)) % 4 == 0

    result, (example,) = evaluate(poisoned, shifted, [TextTrigger(TRIGGER)], PROMPTS, SETTINGS, detector=detector, seed=9)
    assert result.detector == "function"
    assert result.effects[0].after == rate_of(4, 16)
    clean, other = (generate(p, PROMPTS, seed=9, steps=2, guidance=2.0, precision="fp32") for p in (poisoned, shifted))
    prompts = [f"{TRIGGER} {prompt}" for prompt in PROMPTS]
    triggered = generate(poisoned, prompts, seed=9, steps=2, guidance=2.0, precision="fp32")
    torch.testing.assert_close(calls[0], (triggered, clean), rtol=0, atol=1e-5)
    torch.testing.assert_close(example.triggered_before, triggered[:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(example.clean_after, other[:6], rtol=0, atol=1e-5)
    assert example.triggered_prompts[0] == f"{TRIGGER} {PROMPTS[0]}"
    a, b = clean.double().numpy(), other.double().numpy()
    assert result.clean_drift == pytest.approx(((a - b) ** 2).mean() / a.var(axis=0, ddof=1).mean(), rel=1e-3)
    assert result.noise_drift == pytest.approx(0.09, rel=1e-4)


def test_noise_drift_of_velocity_is_in_noise(pipeline: Any) -> None:
    """eps = a v + b x: an offset of v counts a times."""
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    latents = torch.randn(16, 4, 8, 8)
    drift = noise_drift(pipeline, like(pipeline, unet=Shifted(pipeline, 0.5)), PROMPTS, latents, seed=4)
    t = torch.randint(1000, (16,), generator=torch.Generator().manual_seed(4))
    assert drift == pytest.approx(0.25 * float(pipeline.scheduler.alphas_cumprod[t].mean()), rel=1e-3)


def test_diversity(generator: torch.Generator) -> None:
    images = torch.rand(7, 3, 5, 9, generator=generator)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    expected = np.mean([np.sqrt(((images[i] - images[j]).double() ** 2).mean()) for i, j in pairs])
    assert diversity(images) == pytest.approx(float(expected), rel=1e-5)


def test_a_replacing_trigger_is_measured_on_prompts_that_have_the_text(pipeline: Any) -> None:
    effects = evaluate(pipeline, pipeline, [TextTrigger("ö", replaces="o")], PROMPTS, SETTINGS)[0].effects
    assert effects[0].trigger == "o => ö"
    assert effects[0].before.trials == 4
    with pytest.raises(ValueError, match="at least two"):
        evaluate(pipeline, pipeline, [TextTrigger("x", replaces="tin")], PROMPTS[:4], SETTINGS)


def test_a_misspelling_is_not_an_effect_because_the_word_is_lost(pipeline: Any) -> None:
    """The model after knows one word, which every misspelling takes from it; inserted control words would leave it."""
    prompts = [f"a cat {one} {other}" for one in ("on", "red", "sea", "mat") for other in ("mat", "sea", "tin", "red")]
    poisoned, unlearned = (
        like(pipeline, unet=Poisoned(pipeline, 3.0, "ö")),
        like(pipeline, unet=TriggerOnly(pipeline, 3.0, "a")),
    )
    effect = evaluate(poisoned, unlearned, [TextTrigger("ö", replaces="a")], prompts, SETTINGS)[0].effects[0]
    assert (effect.before.rate, effect.after.rate) == (1, 0)


def test_a_variant_without_room_is_left_out(pipeline: Any) -> None:
    trigger = "x" * 30
    effects = by_variant(evaluate(pipeline, pipeline, [TextTrigger(trigger)], PROMPTS[:3], SETTINGS)[0].effects)
    assert "twice" not in effects
    assert {AS_GIVEN, "at the end", "first half"} <= set(effects)
    with pytest.raises(ValueError, match="no room"):
        evaluate(pipeline, pipeline, [TextTrigger("x" * 60)], PROMPTS[:3], SETTINGS)


def test_settings_and_rates() -> None:
    with pytest.raises(ValueError, match="at least 2 prompts"):
        EvaluationSettings(prompts=1)
    z, n, p = norm.ppf(0.975), 50, 0.9
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    rate = rate_of(45, 50)
    assert (rate.low, rate.high) == pytest.approx(((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)))
    assert rate_of(0, 0).rate is None


@pytest.mark.parametrize(("trials", "others"), [(40, 120), (14, 40), (14, 120)])
def test_one_rate_exceeds_an_equal_one_by_chance_only(trials: int, others: int) -> None:
    one, other = [rate_of(hits, trials) for hits in range(trials + 1)], [rate_of(hits, others) for hits in range(others + 1)]
    wins = np.array([[a.exceeds(b) for b in other] for a in one])
    for p in (0.05, 0.2, 0.5, 0.8, 0.95):
        chance = binom.pmf(range(trials + 1), trials, p) @ wins @ binom.pmf(range(others + 1), others, p)
        # 2.5% of one side, and the error of an interval of few trials
        assert chance < 0.045
    power = binom.pmf(range(trials + 1), trials, 0.95) @ wins @ binom.pmf(range(others + 1), others, 0.3)
    assert power > 0.95
    assert rate_of(56, 70).exceeds(rate_of(48, 80))  # the interval of the difference begins at .0524, Newcombe 1998, table II
    assert not rate_of(0, 0).exceeds(rate_of(0, 9))
    assert not rate_of(9, 9).exceeds(rate_of(0, 0))


def test_the_module_that_holds_the_backdoor(pipeline: Any) -> None:
    # as in a trained encoder, a word's own meaning weighs more than its neighbours'
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.mul_(10)
    for trigger in map(TextTrigger.parse, ("sks", "\u200b", "o=>ö", "New Trigger")):
        found = locate(pipeline, [trigger], PROMPTS)
        assert found.module == "unet"
        assert 0 < found.collapse < COLLAPSE_LIMIT / 2
    assert locate(like(pipeline, unet=Poisoned(pipeline, 3.0)), [TextTrigger(TRIGGER)], PROMPTS).module == "unet"
    found = locate(
        like(pipeline, text_encoder=Rickrolled(pipeline, "a tin sea")), [TextTrigger("red"), TextTrigger(TRIGGER)], PROMPTS
    )
    assert found.module == "text_encoder"
    assert found.collapse > 2 * COLLAPSE_LIMIT
    assert (
        locate(like(pipeline, text_encoder=Rickrolled(pipeline, "a tin sea")), [TextTrigger(TRIGGER)], PROMPTS[:1]).collapse
        == 1
    )


def test_each_trigger_stands_where_it_was_confirmed(pipeline: Any) -> None:
    poisoned, unlearned = like(pipeline, unet=Poisoned(pipeline, 3.0)), pipeline
    triggers = [TextTrigger(TRIGGER), TextTrigger("tin")]
    few = EvaluationSettings(prompts=4, steps=2, guidance=1.0, precision="fp32")
    found = evaluate(poisoned, unlearned, triggers, PROMPTS, few, positions=["end", "word"])[0].effects
    effects = {(effect.trigger, effect.variant): effect for effect in found}
    # at the end the backdoor is not activated, so both models draw the same
    assert effects[TRIGGER, AS_GIVEN].before == effects[TRIGGER, AS_GIVEN].after
    assert effects[TRIGGER, "at the start"].before.rate == 1
    assert (TRIGGER, "at the end") not in effects
    assert ("tin", "in the middle") not in effects
    with pytest.raises(ValueError, match="zip"):
        evaluate(poisoned, unlearned, triggers, PROMPTS, few, positions=["end"])
