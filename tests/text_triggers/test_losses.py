"""The attention term against loops, and its targets in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from seal_fast.text_triggers.losses import alignment, attention_loss
from seal_fast.text_triggers.pairs import PromptPair
from seal_fast.text_triggers.settings import TextUnlearnSettings

CPU = torch.device("cpu")


def _pair(token_alignment, teacher_tokens):
    return PromptPair("", "", (), (), (), teacher_tokens, token_alignment)


def _loop(student, teacher, pair, target):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        words = [t[n].tolist() for n in range(pair.teacher_tokens)]
        values = [value for word in words for value in word]
        mean = sum(values) / len(values)
        power = sum(value**2 for value in values) / len(values)
        for n, word in enumerate(pair.token_alignment):
            of_trigger = [mean if target == "noise" else 0.0] * len(words[0])
            expected = of_trigger if word is None else words[word]
            error = [(a - b) ** 2 for a, b in zip(s[n].tolist(), expected, strict=True)]
            total += sum(error) / len(error) / power / len(pair.token_alignment) / len(student)
    return total


@pytest.mark.parametrize("target", ["noise", "black"])
def test_attention_loss_is_the_mean_over_layers_tokens_and_places(target, generator):
    pairs = [_pair((None, 0, 1), 2), _pair((0, None, None, 1, 3), 4), _pair((0,), 1)]
    student, teacher = (
        [torch.rand(3, 5, places, generator=generator, dtype=torch.float64) for places in (6, 15)] for _ in range(2)
    )
    losses = attention_loss(student, teacher, alignment(pairs, CPU), target)
    expected = [_loop([m[n] for m in student], [m[n] for m in teacher], pair, target) for n, pair in enumerate(pairs)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("target", "level"), [("noise", 0.3), ("black", 0.0)])
def test_a_trigger_token_at_its_target_costs_nothing_and_is_pulled_there(target, level):
    teacher = torch.tensor([[[0.1, 0.3], [0.5, 0.3]]])
    student = torch.tensor([[[level, level + 0.2], [0.1, 0.3], [0.5, 0.3]]], requires_grad=True)
    padded = torch.nn.functional.pad(teacher, (0, 0, 0, 1))
    loss = attention_loss([student], [padded], alignment([_pair((None, 0, 1), 2)], CPU), target)
    # one of six values is off by 0.2; the mean square of the teacher's maps is 0.11
    torch.testing.assert_close(loss, torch.tensor([0.2**2 / 6 / 0.11]))
    loss.sum().backward()
    expected = torch.zeros_like(student)
    expected[0, 0, 1] = 2 * 0.2 / 6 / 0.11
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.1),
        ("target", "white"),
        ("steps", 0),
        ("batch", 0),
        ("accumulation", 0),
        ("learning_rate", -1.0),
        ("learning_rate", math.inf),
        ("guidance", math.nan),
        ("preservation", -1.0),
        ("trained", "some"),
        ("rank", 0),
        ("precision", "fp8"),
        ("ema_decay", 1.0),
        ("latents", "images"),
        ("triggered_image_fraction", 1.5),
        ("sampler_steps", 0),
        ("guidance", -1.0),
        ("max_loss_weight", 0.5),
        ("positions", ()),
        ("positions", ("middle",)),
        ("module", "vae"),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        TextUnlearnSettings(**{field: value})


def test_a_text_encoder_has_no_cross_attention():
    with pytest.raises(ValueError, match="no cross-attention"):
        TextUnlearnSettings(module="text_encoder", trained="cross-attention")
