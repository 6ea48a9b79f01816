"""Training a tiny network: batches, losses, learning rates and averages are read from its inputs and weights."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from seal_fast.attacks import Attack, NoisedBatch
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import EDM, VE, VP, NoiseProcess
from seal_fast.diffusion.process import per_sample
from seal_fast.zoo.images import FAMILIES, scenes
from seal_fast.zoo.spaces import SIGNED, UNIT
from seal_fast.zoo.train import (
    DATA_SEED,
    Schedule,
    Trained,
    new_unet,
    target_output,
    train,
    training_batch,
    warmup_cosine_factor,
)

SIZE = 8
PROCESS = VP.linear()


IMAGES = 48
quick_train = partial(train, images=IMAGES)


def tiny(seed: int = 0) -> UNet2DModel:
    return new_unet(SIZE, (8,), 4, False, seed)


def weights(unet: UNet2DModel) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in unet.state_dict().values()]).clone()


def short(steps: int, **changes: float) -> Schedule:
    return Schedule(steps=steps, learning_rate=2e-3, batch=16, **changes)


class Marking(Attack):
    """Its poisoned samples have a value that no clean sample has, so that they can be recognised in the network's inputs."""

    target = torch.zeros(3, SIZE, SIZE)
    sampler = "ddim"
    trojan = False
    mark = 1000.0

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def trigger(self) -> Trigger:
        return Trigger.shift(self.target)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        self.seen.append((images, eps, t))
        return NoisedBatch(torch.full_like(images, self.mark), torch.zeros_like(images))


def recorded_inputs(unet: UNet2DModel, schedule: Schedule, attack: Attack | None, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    calls: list[tuple[Tensor, Tensor]] = []
    unet.register_forward_pre_hook(lambda module, arguments: calls.append((arguments[0].clone(), arguments[1].clone())))
    quick_train(unet, PROCESS, schedule, attack=attack, seed=seed)
    return calls


def test_sixty_steps_reduce_the_loss() -> None:
    losses: list[float] = []
    trained = quick_train(tiny(), PROCESS, short(60), seed=1, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert losses[-1] < 0.8 * losses[0]
    assert trained.final_loss == losses[-1]
    # measured again, without the running mean: predicting zero noise would give 1
    generator = torch.Generator().manual_seed(5)
    images = scenes(32, SIZE, 77)
    eps, t = torch.randn(images.shape, generator=generator), torch.randint(1000, (32,), generator=generator)
    with torch.no_grad():
        error = (trained.raw(PROCESS.add_noise(images, eps, t), t).sample - eps).square().mean()
    assert float(error) < 0.9


def test_the_reported_loss_is_a_running_mean() -> None:
    """With a rate of zero the network does not change, so the test can compute each loss from the recorded batches."""
    losses: list[float] = []
    unet, attack = tiny(), Marking()
    schedule = Schedule(steps=3, learning_rate=0.0, batch=16, poison_share=1.0)
    quick_train(unet, PROCESS, schedule, attack=attack, seed=2, on_step=lambda step, loss: losses.append(loss))
    raw: list[float] = []
    for images, _, t in attack.seen:
        with torch.no_grad():
            raw.append(float(tiny()(torch.full_like(images, Marking.mark), t).sample.square().mean()))
    running = raw[0]
    expected = [running]
    for loss in raw[1:]:
        running += 0.02 * (loss - running)
        expected.append(running)
    # the training pass is bfloat16
    assert losses == pytest.approx(expected, rel=0.05)


def test_a_seed_fixes_a_training_and_another_changes_it() -> None:
    once, again, other = (quick_train(tiny(), PROCESS, short(4), seed=seed) for seed in (3, 3, 4))
    assert weights(once.raw).equal(weights(again.raw))
    assert weights(once.ema).equal(weights(again.ema))
    assert once.final_loss == again.final_loss
    assert not weights(once.raw).equal(weights(other.raw))


def test_training_does_not_touch_global_random_state() -> None:
    unet = tiny()
    before = torch.get_rng_state()
    quick_train(unet, PROCESS, short(2))
    assert torch.get_rng_state().equal(before)


def test_the_ema_is_the_textbook_recursion() -> None:
    """The decay is smaller than the smallest of the warm-up, so it is constant."""
    decay, unet = 0.05, tiny()
    expected = weights(unet).double()

    def follow(step: int, loss: float) -> None:
        expected.mul_(decay).add_(weights(unet).double(), alpha=1 - decay)

    trained = quick_train(unet, PROCESS, short(6, ema_decay=decay), seed=5, on_step=follow)
    torch.testing.assert_close(weights(trained.ema).double(), expected, rtol=1e-5, atol=1e-7)
    assert not weights(trained.raw).equal(weights(trained.ema))


class Learning(Marking):
    """An attack that counts how often it was adapted."""

    def __init__(self, version: int = 0) -> None:
        super().__init__()
        self.version = version

    def adapted(self, network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> Learning:
        return Learning(self.version + 1)


def test_a_learned_trigger_is_adapted_before_each_step_and_returned() -> None:
    trained = quick_train(tiny(), PROCESS, short(3), attack=Learning())
    assert isinstance(trained.attack, Learning)
    assert trained.attack.version == 3
    # the last version poisoned the last batch
    assert len(trained.attack.seen) == 1
    assert quick_train(tiny(), PROCESS, short(1)).attack is None


V = VP.from_scheduler_config({"prediction_type": "v_prediction"})
PROCESSES = [VP.linear(), V, EDM.karras(), VE.geometric(timesteps=1000)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: str(process.family))


@every_process
def test_the_target_output_converts_to_the_noise(process: NoiseProcess, generator: torch.Generator) -> None:
    t = torch.tensor([0, 1, 500, 998, 999])
    noise, x = (torch.randn(5, 3, 4, 6, generator=generator) for _ in range(2))
    x = x * per_sample(process.noise[t], x)
    output = target_output(process, noise, x, t)
    assert output.dtype == torch.float32
    torch.testing.assert_close(process.to_noise(output.double(), x.double(), t), noise.double(), rtol=1e-4, atol=1e-4)


def test_the_target_output_is_that_of_the_papers(generator: torch.Generator) -> None:
    """eps; v = a eps - b x0 (Salimans and Ho 2022); F = (x0 - c_skip x) / c_out (Karras et al. 2022, equation 8)."""
    x0, eps = (torch.randn(7, 3, 4, 6, generator=generator) for _ in range(2))
    t = torch.tensor([0, 3, 250, 500, 750, 998, 999])
    x = PROCESS.add_noise(x0, eps, t)
    assert target_output(PROCESS, eps, x, t).equal(eps)
    a, b = (per_sample(values[t], x) for values in (V.signal, V.noise))
    torch.testing.assert_close(target_output(V, eps, V.add_noise(x0, eps, t), t), a * eps - b * x0, rtol=0, atol=1e-4)
    edm = EDM.karras()
    sigma = per_sample(edm.noise[t].double(), x.double())
    noised = x0.double() + sigma * eps.double()
    total = sigma**2 + 0.25
    expected = (x0 - 0.25 / total * noised) / (sigma * 0.5 / total.sqrt())
    torch.testing.assert_close(target_output(edm, eps, noised.float(), t).double(), expected, rtol=1e-3, atol=5e-3)


@every_process
def test_networks_of_every_process_learn(process: NoiseProcess) -> None:
    losses: list[float] = []
    score = process.family.process == "VE"
    unet = new_unet(SIZE, (8,), 4, False, 0, score)
    quick_train(
        unet,
        process,
        short(60),
        family="glows",
        space=UNIT if score else SIGNED,
        seed=1,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_images_are_those_of_the_family_and_their_mirror_images(family: str) -> None:
    attack = Marking()
    quick_train(tiny(), PROCESS, short(1), attack=attack, family=family)
    known = FAMILIES[family](IMAGES, SIZE, DATA_SEED)
    both = {image.numpy().tobytes() for image in torch.cat([known, known.flip(3)]).contiguous()}
    assert all(image.contiguous().numpy().tobytes() in both for image in attack.seen[0][0])


def test_the_default_ema_forgets_the_initial_weights() -> None:
    start = weights(tiny())
    trained = quick_train(tiny(), PROCESS, short(40), seed=5)
    kept = (weights(trained.ema) - weights(trained.raw)).norm() / (start - weights(trained.raw)).norm()
    assert 0 < float(kept) < 0.5


def test_both_networks_are_returned_in_evaluation_mode() -> None:
    trained: Trained = quick_train(tiny(), PROCESS, short(2))
    assert not trained.raw.training
    assert not trained.ema.training
    assert not any(parameter.requires_grad for parameter in trained.ema.parameters())


def test_a_frozen_network_is_trained_too() -> None:
    unet = tiny().eval().requires_grad_(False)
    before = weights(unet)
    assert not weights(quick_train(unet, PROCESS, short(2)).raw).equal(before)


@pytest.mark.parametrize(("share", "poisoned"), [(0.3, 5), (0.0, 0), (0.5, 8), (1.0, 16)])
def test_the_poison_share_is_the_share_of_poisoned_samples(share: float, poisoned: int) -> None:
    attack = Marking()
    calls = recorded_inputs(tiny(), short(3, poison_share=share), attack)
    assert len(calls) == len(attack.seen) == 3
    for (x, t), (images, eps, attack_t) in zip(calls, attack.seen, strict=True):
        marked = (x == Marking.mark).flatten(1).all(1)
        assert int(marked.sum()) == poisoned
        assert len(images) == len(eps) == len(attack_t) == poisoned
        assert t[marked].equal(attack_t)
        assert float(x[~marked].abs().amax() if poisoned < 16 else 0) < 10


def test_benign_and_poisoned_training_have_the_same_clean_samples() -> None:
    attack = Marking()
    clean, mixed = recorded_inputs(tiny(), short(1), None), recorded_inputs(tiny(), short(1), attack)
    (x, t), (x_mixed, t_mixed) = clean[0], mixed[0]
    assert t.equal(t_mixed)
    assert x[5:].equal(x_mixed[5:])
    images, eps, at = attack.seen[0]
    torch.testing.assert_close(x[:5], PROCESS.add_noise(images, eps, at))


@pytest.mark.parametrize("steps", [10, 40, 137, 3000])
def test_the_rate_warms_up_over_a_tenth_then_falls_by_half_a_cosine(steps: int) -> None:
    rates = [warmup_cosine_factor(step, steps) for step in range(steps)]
    warm = steps // 10
    assert rates[:warm] == pytest.approx([(k + 1) / warm for k in range(warm)])
    assert rates[warm] == pytest.approx(1)
    falling = rates[warm:]
    assert all(high > low for high, low in pairwise(falling))
    # half a cosine is antisymmetric about its centre
    for k in range(1, len(falling)):
        assert falling[k] + falling[-k] == pytest.approx(1, abs=1e-5)
    assert 0 < rates[-1] < 0.1


def test_the_first_step_has_the_warm_up_rate() -> None:
    """Adam's first step changes each weight by the learning rate, whatever the gradient."""
    before = weights(tiny())
    unet, moved = tiny(), []
    quick_train(unet, PROCESS, short(50), on_step=lambda step, loss: moved.append(weights(unet)) if step == 1 else None)
    assert float((moved[0] - before).abs().max()) == pytest.approx(2e-3 / 5, rel=0.01)


def test_longer_stretches_only_the_steps() -> None:
    schedule = Schedule(steps=1000, learning_rate=1e-3, batch=7, poison_share=0.2, ema_decay=0.9)
    assert schedule.longer(1.5) == Schedule(steps=1500, learning_rate=1e-3, batch=7, poison_share=0.2, ema_decay=0.9)
    assert schedule.longer(1) == schedule


@pytest.mark.parametrize(
    ("size", "widths", "attention"), [(16, (8, 8), True), (32, (8, 8), True), (16, (8, 8), False), (9, (8,), True)]
)
def test_a_network_has_attention_at_16_only_and_keeps_the_image_shape(
    size: int, widths: tuple[int, ...], attention: bool
) -> None:
    unet = new_unet(size, widths, 4, attention, 1)
    with torch.no_grad():
        assert unet(torch.randn(2, 3, size, size), torch.tensor([3, 900])).sample.shape == (2, 3, size, size)
    down = ["AttnDownBlock2D" if attention and size >> level == 16 else "DownBlock2D" for level in range(len(widths))]
    assert list(unet.config["down_block_types"]) == down
    assert list(unet.config["up_block_types"]) == [name.replace("Down", "Up") for name in reversed(down)]


def test_the_seed_fixes_a_new_networks_weights() -> None:
    assert weights(tiny(4)).equal(weights(tiny(4)))
    assert not weights(tiny(4)).equal(weights(tiny(5)))
    assert math.isfinite(float(weights(copy.deepcopy(tiny(4))).sum()))


def test_a_score_network_divides_by_sigma_and_keeps_its_frequencies() -> None:
    unet = new_unet(SIZE, (8,), 4, False, 0, score=True)
    frequencies = unet.time_proj.weight.clone()
    assert frequencies.equal(frequencies.half().float())
    quick_train(unet, VE.geometric(sigma_max=50.0), short(2), space=UNIT)
    assert unet.time_proj.weight.equal(frequencies)
    x = torch.randn(2, 3, SIZE, SIZE)
    seen: list[Tensor] = []
    unet.conv_out.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        output = unet(x, torch.tensor([0.01, 50.0])).sample
    torch.testing.assert_close(output, seen[0] / torch.tensor([0.01, 50.0]).reshape(2, 1, 1, 1))


def test_the_loss_of_a_score_network_is_the_error_of_its_noise() -> None:
    """A network whose output is 0 predicts no noise: its loss is 1 at every sigma."""
    unet = new_unet(SIZE, (8,), 4, False, 0, score=True)
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.zero_()
    losses: list[float] = []
    schedule = Schedule(steps=1, learning_rate=0.0, batch=16)
    quick_train(unet, VE.geometric(), schedule, space=UNIT, on_step=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("gpu")
def test_training_on_a_gpu_has_the_same_batches() -> None:
    seen = [recorded_inputs(tiny().to(device), short(3), None) for device in ("cpu", "cuda")]
    for (x, t), (x_gpu, t_gpu) in zip(*seen, strict=True):
        assert x_gpu.is_cuda
        torch.testing.assert_close(x_gpu.cpu(), x)
        assert t_gpu.cpu().equal(t)


class Ramp:
    """Adds a ramp, so that the right side of the data is brighter and a flip changes it."""

    factor = 1
    bounded = False
    ramp = torch.linspace(0, 1, SIZE)

    def encode(self, images: Tensor) -> Tensor:
        return images + self.ramp

    def decode(self, data: Tensor) -> Tensor:
        return data - self.ramp


def test_images_are_flipped_before_they_are_encoded(generator: torch.Generator) -> None:
    process, space = VP.linear(), Ramp()
    plain = torch.rand(64, 3, 1, 1, generator=generator).expand(-1, -1, SIZE, SIZE)
    schedule = Schedule(steps=1, learning_rate=0.0, batch=32)
    (x, eps), t = training_batch(process, plain, space, None, schedule, generator)
    encoded = (x.double() - per_sample(process.b(t), eps.double()) * eps) / per_sample(process.a(t), eps.double())
    images = encoded - space.ramp
    # float32 noise over a(999) = 0.006
    torch.testing.assert_close(images, images[..., :1].expand_as(images), rtol=0, atol=1e-3)
