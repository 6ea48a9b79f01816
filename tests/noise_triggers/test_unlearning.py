"""Unlearning of noise triggers: its objective in closed form on oracles, and the training of a small network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess, NoiseSource
from seal_fast.diffusion.process import per_sample
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, random_directions, unlearn_denoiser

SHAPE = (3, 6, 10)
ONE_STEP = NoiseUnlearnSettings(steps=1, batch=5, learning_rate=0.0, images=7, image_steps=3, half_precision=False)


class Oracle(nn.Module):
    """The denoiser of images that are all 0.25: it predicts the rest of x_t as noise. One parameter scales its output."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process, self.gain = process, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.process, VP):
            a, b = (per_sample(values[condition], x) for values in (self.process.signal, self.process.noise))
            return self.gain * (x - a * 0.25) / b
        return -self.gain * (x - 0.25) / per_sample(condition, x) ** 2


class Recorder(nn.Module):
    """Predicts 0 and records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.unused = nn.Parameter(torch.zeros(()))

    def __deepcopy__(self, memo: object) -> Recorder:
        other = Recorder()
        other.inputs = self.inputs
        return other

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.inputs.append((x.detach().clone(), t.clone()))
        return x * self.unused


class Small(nn.Module):
    """Two convolutions with b(t) as a further input channel."""

    def __init__(self, process: VP) -> None:
        super().__init__()
        self.process = process
        self.first, self.last = nn.Conv2d(4, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = per_sample(self.process.noise[t], x).expand(-1, 1, *x.shape[2:])
        return self.last(torch.tanh(self.first(torch.cat([x, level], dim=1))))


PROCESSES = [VP.linear(60), VE.geometric(0.01, 50.0, 60)]


@pytest.mark.parametrize("process", PROCESSES, ids=["VP", "VE"])
def test_a_model_that_treats_every_shift_as_noise_has_no_loss(process: NoiseProcess) -> None:
    unlearned = unlearn_denoiser(
        Denoiser(Oracle(process), process, SHAPE), settings=ONE_STEP, seed=int(torch.randint(1000, ()))
    )
    assert unlearned.clean_loss == 0
    assert unlearned.triggered_loss == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("known", "drawn"), [(0, 0), (2, 0), (1, 1)])
def test_states_and_targets_written_out(known: int, drawn: int, generator: torch.Generator) -> None:
    process = VP.linear(60)
    recorder = Recorder()
    triggers = [Trigger.shift(torch.randn(SHAPE, generator=generator)) for _ in range(known)]
    targets = [torch.rand(SHAPE, generator=generator) for _ in range(drawn)]
    # with gamma = 1 the triggered state exceeds the clean one by b m, and the teacher's 0 leaves m as the target
    settings = replace(ONE_STEP, batch=40, smallest_gamma=1.0, largest_shift=0.8)
    unlearned = unlearn_denoiser(Denoiser(recorder, process, SHAPE), triggers, settings, targets=targets, seed=3)
    (teacher_input, t), (student_input, twice) = recorder.inputs[-2:]
    clean, triggered = student_input.double().chunk(2)
    assert torch.equal(teacher_input.double(), clean)
    assert torch.equal(twice, t.repeat(2))
    b = process.noise[t].reshape(-1, 1, 1, 1)
    m = (triggered - clean) / b
    assert unlearned.clean_loss == 0
    assert unlearned.triggered_loss == pytest.approx(float((b**2 * m.square()).mean()), rel=1e-3)
    sizes = m.square().mean(dim=(1, 2, 3)).sqrt()
    assert 0.6 < float(sizes.max()) < 0.8 * 1.5
    directions = [*(trigger.mu for trigger in triggers), *targets]
    cosines = [torch.nn.functional.cosine_similarity(m.flatten(1), k.double().flatten()[None]) for k in directions]
    along = [int((cosine > 1 - 1e-3).sum()) for cosine in cosines]
    assert sum(along) == 0 if known == 0 else all(3 <= n <= 25 for n in along)


def small(process: VP, generator: torch.Generator) -> Small:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return Small(process)


def test_a_small_network_learns_and_its_teacher_stays(generator: torch.Generator) -> None:
    process = VP.linear(60, 1e-3, 0.3)
    denoiser = Denoiser(small(process, generator), process, SHAPE)
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    trigger = Trigger.shift(torch.randn(SHAPE, generator=generator))
    settings = replace(ONE_STEP, batch=16, steps=120, learning_rate=5e-3)
    steps: list[tuple[str, int, int]] = []
    unlearned = unlearn_denoiser(
        denoiser, [trigger], settings, seed=1, on_step=lambda stage, i, n, loss: steps.append((stage, i, n))
    )
    untrained = unlearn_denoiser(denoiser, [trigger], replace(settings, learning_rate=0.0), seed=1)
    assert unlearned.triggered_loss < 0.8 * untrained.triggered_loss
    assert untrained.clean_loss == 0
    assert all(torch.equal(value, before[name]) for name, value in denoiser.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in unlearned.denoiser.network.parameters())
    assert steps == [("images", 7, 7), *(("training", i, 120) for i in range(1, 121))]


def test_a_seed_means_the_same_run(generator: torch.Generator) -> None:
    process = VP.linear(60)
    denoiser = Denoiser(small(process, generator), process, SHAPE)
    settings = replace(ONE_STEP, steps=3, learning_rate=1e-3)
    first, second, other = (
        unlearn_denoiser(denoiser, settings=settings, seed=seed).denoiser.network.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_that_diverges_is_an_error(generator: torch.Generator) -> None:
    process = VP.linear(60)
    denoiser = Denoiser(small(process, generator), process, SHAPE)
    with pytest.raises(FloatingPointError, match="step"):
        unlearn_denoiser(denoiser, settings=replace(ONE_STEP, steps=20, learning_rate=1e30))


def test_a_trigger_or_target_of_another_shape_is_an_error() -> None:
    process, other = VP.linear(60), torch.zeros(3, 6, 6)
    for triggers, targets in (([Trigger.shift(other)], []), ([], [other])):
        with pytest.raises(ValueError, match="does not fit"):
            unlearn_denoiser(Denoiser(Recorder(), process, SHAPE), triggers, ONE_STEP, targets=targets)


@pytest.mark.parametrize("shape", [SHAPE, (1, 7, 5), (4, 33, 16)])
def test_random_directions_are_of_one_size_and_many_coarsenesses(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    source = NoiseSource(torch.device("cpu"), generator.initial_seed())
    batches = [random_directions(3, shape, source) for _ in range(60)]
    for batch in batches:
        assert batch.shape == (3, *shape)
        torch.testing.assert_close(batch.square().mean(dim=(1, 2, 3)), torch.ones(3))
    flat = [batch.flatten(2).std(dim=2).max() < 1e-6 for batch in batches]
    assert 0 < sum(map(bool, flat)) < len(flat)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch": 0}, {"images": 0}, {"learning_rate": -1.0}, {"largest_shift": 0.0}, {"smallest_gamma": 0.0}],
)
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        NoiseUnlearnSettings(**wrong)
