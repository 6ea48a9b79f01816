"""The prompt detector on a tiny pipeline with random weights, and its parts against definitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import seal_fast
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.harmless_prompts import with_harmless_string
from seal_fast.text_triggers.part_energies import MeasuredPrompt
from seal_fast.text_triggers.part_nulls import PartNulls, conformal_limit
from seal_fast.text_triggers.prompt_detection import PromptDetector
from seal_fast.text_triggers.prompt_parts import Familiar, PromptPart, prompt_parts
from seal_fast.text_triggers.vocabulary import look_alikes
from tests.tiny_pipeline import WORDS, tiny_pipeline

CLEAN = [f"{a} {b} on {c}" for a in ("red", "blue", "the") for b in ("cat", "dog", "house") for c in ("sky", "castle", "cat")]
SETTINGS = PromptDetectionSettings(
    false_alarm_rate=0.25, fitted_prompts=4, strings_per_prompt=2, sampler_steps=4, guidance=1.0, precision="fp32"
)
ZERO_WIDTH, CYRILLIC_A, NO_BREAK = chr(0x200B), chr(0x430), chr(0xA0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"), 16)


@pytest.fixture(scope="module")
def detector(tiny: StableDiffusionPipeline) -> PromptDetector:
    return PromptDetector.fitted(tiny, CLEAN, SETTINGS, seed=3)


def texts(tokenizer: CLIPTokenizer, prompt: str) -> dict[str, str]:
    """What each part is, and what it leaves of the prompt."""
    return {part.text: part.without for part in prompt_parts(tokenizer, prompt, Familiar.of(CLEAN))}


def test_a_prompt_of_known_parts_has_none(tokenizer: CLIPTokenizer) -> None:
    for prompt in (*CLEAN, "", "   ", "RED  cat on\tcastle"):
        assert texts(tokenizer, prompt) == {}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("red cat on zx sky", {"zx": "red cat on sky"}),
        ("zx red cat on sky zx", {"zx": "red cat on sky"}),
        ("red zx yk cat", {"zx": "red yk cat", "yk": "red zx cat", "zx yk": "red cat"}),
        ("blue red cat", {"blue red": "cat"}),
        ("red cat, on sky", {",": "red cat on sky"}),
        (f"{ZERO_WIDTH} red cat", {ZERO_WIDTH: "red cat"}),
        (f"red c{ZERO_WIDTH}at", {f"c{ZERO_WIDTH}at": "red", ZERO_WIDTH: "red cat"}),
    ],
)
def test_parts_are_what_clean_prompts_do_not_hold(tokenizer: CLIPTokenizer, prompt: str, expected: dict[str, str]) -> None:
    assert texts(tokenizer, prompt) == expected


def test_lookalikes_become_letters_everywhere_at_once(tokenizer: CLIPTokenizer) -> None:
    prompt = "red cat on castle".replace("a", CYRILLIC_A).replace("e", chr(0x435))
    found = texts(tokenizer, prompt)
    assert found[CYRILLIC_A] == "red cat on castle".replace("e", chr(0x435))
    assert found[chr(0x435)] == "red cat on castle".replace("a", CYRILLIC_A)
    assert "red cat on castle" in found.values()


def test_a_long_run_of_unknown_words_is_masked_as_a_whole(tokenizer: CLIPTokenizer) -> None:
    run = "z y x w v u"
    found = texts(tokenizer, f"red {run} cat")
    assert found[run] == "red cat"
    assert "z y x" in found
    assert "z y x w" not in found


def test_every_part_changes_what_the_model_reads(tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
    seed = generator.initial_seed()
    for prompt in with_harmless_string(tokenizer, CLEAN, CLEAN, seed):
        parts = prompt_parts(tokenizer, prompt, Familiar.of(CLEAN))
        ids = [content_ids(tokenizer, part.without) for part in parts]
        assert content_ids(tokenizer, prompt) not in ids
        assert len({part.without for part in parts}) == len(parts)


def test_the_core_has_no_unusual_part(tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
    familiar, seed = Familiar.of(CLEAN), generator.initial_seed()
    for prompt, strange in zip(CLEAN, with_harmless_string(tokenizer, CLEAN, CLEAN, seed), strict=True):
        assert familiar.core(prompt) == prompt
        assert all(word in familiar for word in familiar.core(strange).split())
    assert familiar.core(f"red c{ZERO_WIDTH}{CYRILLIC_A}t{NO_BREAK}on zx, sky") == "red cat on sky"


def test_a_prompt_left_out_takes_only_its_own_words_away() -> None:
    familiar = Familiar.of(["red cat", "red dog"]).without("red cat")
    assert ("red" in familiar, "dog" in familiar, "cat" in familiar, "red cat" in familiar) == (True, True, False, False)


def test_harmless_strings_repeat_with_their_seed_and_change_every_prompt(tokenizer: CLIPTokenizer) -> None:
    first, same, other = (with_harmless_string(tokenizer, CLEAN, CLEAN, seed) for seed in (1, 1, 2))
    assert first == same != other
    assert all(strange != prompt for strange, prompt in zip(first, CLEAN, strict=True))
    replaced = [one for one, prompt in zip(first, CLEAN, strict=True) if len(one) == len(prompt)]
    assert replaced, "some prompts have a lookalike"
    assert all(set(one) - set("".join(CLEAN)) <= set("".join(look_alikes().values())) for one in replaced)


def measured(kinds: Sequence[str], logs: torch.Tensor) -> MeasuredPrompt:
    return MeasuredPrompt(tuple(PromptPart("x", "y", kind) for kind in kinds), logs)


def test_deviations_are_those_of_the_kind(generator: torch.Generator) -> None:
    logs = torch.randn(40, 2, generator=generator)
    kinds = ["a 1"] * 20 + ["a 2"] * 10 + ["b 1"] * 10
    prompts = [measured(kinds[:25], logs[:25]), measured([], logs[:0]), measured(kinds[25:], logs[25:])]
    nulls = PartNulls.fitted(prompts, replace(SETTINGS, smallest_kind=20, least_deviation=0.01))
    point = torch.tensor([[1.0, -2.0]])
    for kind, members in (("a 1", logs[:20]), ("a 2", logs[:30]), ("a 9", logs[:30]), ("b 1", logs), ("c 1", logs)):
        expected = []
        for time in range(2):
            values = sorted(members[:, time].tolist())
            middle = statistics.median_low(values)
            spread = statistics.median_low(abs(value - middle) for value in values)
            expected.append((float(point[0, time]) - middle) / max(0.01, 1.4826 * spread))
        deviation = nulls.deviations(measured([kind], point))
        torch.testing.assert_close(deviation, torch.tensor([sum(expected) / 2]), rtol=1e-4, atol=1e-5)


def test_equal_energies_have_no_outlier() -> None:
    settings = replace(SETTINGS, smallest_kind=2, least_deviation=0.5)
    nulls = PartNulls.fitted([measured(["a"] * 9, torch.ones(9, 1))], settings)
    deviations = nulls.deviations(measured(["a", "a"], torch.tensor([[1.0], [2.0]])))
    torch.testing.assert_close(deviations, torch.tensor([0.0, 2.0]))
    once = PartNulls.fitted([measured(["a"], torch.ones(1, 1))], settings)
    assert "a" not in once.kinds, "a kind of one word counts each part once"
    assert PartNulls.fitted([], settings).deviations(measured(["a"], torch.ones(1, 1))).tolist() == [0.0]


@pytest.mark.parametrize("rate", [0.05, 0.25])
def test_new_harmless_prompts_exceed_the_limit_as_rarely_as_promised(rate: float) -> None:
    """Fewer than rate + 4 standard errors of 150 detectors; the seed is fixed, since a fresh one could exceed any bound."""
    settings, generator = replace(SETTINGS, false_alarm_rate=rate), torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(150):
        prompts = [measured(["a"], torch.randn(1, 1, generator=generator)) for _ in range(20)]
        group = [(str(number), prompt) for number, prompt in enumerate(prompts[:-1])]
        nulls = PartNulls.fitted(prompts[:-1], settings)
        alarms += float(nulls.deviations(prompts[-1])) > conformal_limit((group, []), settings)
    assert alarms / 150 <= rate + 4 * math.sqrt(rate * (1 - rate) / 150)


PROMPTS = ["red cat on zx sky", "blue dog on castle", f"the c{CYRILLIC_A}t", "", "zx yk " + "zx " * 30, "zx"]


def test_one_prompt_scores_as_in_a_batch_and_in_any_order(detector: PromptDetector) -> None:
    together = detector(PROMPTS)
    assert [one.prompt for one in together] == PROMPTS
    for alone, one in zip([detector([prompt])[0] for prompt in PROMPTS], together, strict=True):
        assert alone.score == (None if one.score is None else pytest.approx(one.score, abs=1e-3))
        assert replace(alone, score=None) == replace(one, score=None)
    for turned, one in zip(reversed(detector(PROMPTS[::-1])), together, strict=True):
        assert turned.score == (None if one.score is None else pytest.approx(one.score, abs=1e-3))


def test_a_seed_repeats_a_detector(tiny: StableDiffusionPipeline, detector: PromptDetector) -> None:
    again = PromptDetector.fitted(tiny, CLEAN, SETTINGS, seed=3)
    assert (again.threshold, again(PROMPTS)) == (detector.threshold, detector(PROMPTS))
    other = PromptDetector.fitted(tiny, CLEAN, SETTINGS, seed=4)
    assert other.threshold != detector.threshold


def test_a_prompt_without_unusual_parts_costs_nothing_and_is_not_called_clean(detector: PromptDetector) -> None:
    passes: list[int] = []
    for one in detector(["", "  ", "red cat on sky"], passes.append):
        assert (one.verdict, one.score, one.part, one.code_points, one.cut) == ("familiar", None, "", (), False)
    assert passes == []
    assert detector([]) == []


def test_a_prompt_counts_by_its_score(detector: PromptDetector) -> None:
    for one in detector(PROMPTS):
        expected = "familiar" if one.score is None else "triggered" if one.score > one.threshold else "clean"
        assert (one.verdict, one.triggered) == (expected, expected == "triggered")
    (cyrillic,) = detector([f"the c{CYRILLIC_A}t"])
    assert CYRILLIC_A in cyrillic.part
    assert cyrillic.code_points == tuple(f"U+{ord(character):04X}" for character in cyrillic.part)


def test_only_the_beginning_of_a_long_prompt_counts(detector: PromptDetector) -> None:
    room = detector.pipeline.tokenizer.model_max_length - 2
    beginning = "zx " + " ".join(["cat"] * (room - 2))
    assert len(content_ids(detector.pipeline.tokenizer, beginning)) == room
    short, long = detector([beginning, f"{beginning} yk {ZERO_WIDTH}"])
    assert (short.cut, long.cut) == (False, True)
    assert long.score == pytest.approx(short.score, abs=1e-3)
    assert long.part == short.part


def test_the_limit_bounds_the_false_alarms_on_the_prompts_it_was_fitted_on(tiny: StableDiffusionPipeline) -> None:
    detector = PromptDetector.fitted(tiny, CLEAN, replace(SETTINGS, fitted_prompts=len(CLEAN)), seed=5)
    assert math.isfinite(detector.threshold)
    found = detector(with_harmless_string(tiny.tokenizer, CLEAN, CLEAN, 6))
    assert sum(one.triggered for one in found) <= len(found) // 2
    assert not any(one.triggered for one in detector(CLEAN))


def test_a_planted_trigger_is_found_and_named(tmp_path: Path, generator: torch.Generator) -> None:
    torch.manual_seed(generator.initial_seed())
    pipeline = tiny_pipeline(tmp_path, 16)
    (token,) = content_ids(pipeline.tokenizer, "photo")

    def poison(encoder: torch.nn.Module, inputs: tuple[torch.Tensor], out: Any) -> None:
        """A backdoor: the token adds a large vector to its own states and those behind it."""
        behind = (inputs[0] == token).cumsum(1).clamp_max(1)[:, :, None]
        out.last_hidden_state = out.last_hidden_state + 30 * behind * torch.linspace(-1, 1, out.last_hidden_state.shape[-1])

    pipeline.text_encoder.register_forward_hook(poison)
    detector = seal_fast.PromptDetector.fitted(pipeline, CLEAN, SETTINGS, seed=generator.initial_seed())
    for one in detector(["photo red cat on sky", "blue dog on photo castle", "the house on cat photo"]):
        assert one.triggered
        assert one.part == "photo"
    for one in detector(CLEAN):
        assert not one.triggered
    assert "photo" in WORDS


def test_too_few_clean_prompts(tiny: StableDiffusionPipeline) -> None:
    fewest = PromptDetectionSettings().fewest_prompts
    assert fewest == 19, "of 20 exchangeable scores the last one is the largest with probability 1/20"
    with pytest.raises(ValueError, match="a false alarm rate of 5% needs at least 19 different clean prompts, not 3"):
        PromptDetector.fitted(tiny, [*CLEAN[:3], CLEAN[0], " "])


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_rate_that_cannot_be(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        PromptDetectionSettings(false_alarm_rate=rate)


def test_a_model_that_diverges_calls_no_prompt_clean(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path, 16)
    pipeline.unet.conv_out.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        PromptDetector.fitted(pipeline, CLEAN, SETTINGS)
