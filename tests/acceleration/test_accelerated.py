"""The accelerated network against the one it was made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from seal_fast.acceleration import accelerated
from seal_fast.diffusion import VP, Denoiser
from seal_fast.ops.backends import CPU
from seal_fast.training import native_bfloat16

SHAPE = (3, 8, 8)

pytestmark = pytest.mark.skipif(CPU.module is None, reason=f"nothing is exchanged: {CPU.reason}")

PLAIN: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 24),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "channels in whole vectors": {**PLAIN, "block_out_channels": (16, 48)},
    "mid block of another scale": {**PLAIN, "mid_block_scale_factor": 1.5, "downsample_padding": 0},
    "scale and shift by the timestep": {**PLAIN, "resnet_time_scale_shift": "scale_shift"},
    "other activation": {**PLAIN, "act_fn": "mish"},
    "resnets that sample": {**PLAIN, "downsample_type": "resnet", "upsample_type": "resnet"},
    "norms of single channels": {**PLAIN, "norm_num_groups": 8, "add_attention": False},
}


def denoiser(config: dict[str, Any], generator: torch.Generator) -> Denoiser:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    network = UNet2DModel(**config)
    with torch.no_grad():
        # diffusers starts norms as the identity
        for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
            norm.weight.normal_()
            norm.bias.normal_()
    return Denoiser(network, VP.linear(), SHAPE)


def predictions(model: Denoiser, x: Tensor, t: Tensor, half: bool = False) -> tuple[Tensor, Tensor]:
    """f and the gradient of a projection of it."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        f = model(x, t).float()
    weight = torch.sin(torch.arange(f.numel())).view_as(f)
    return f.detach(), torch.autograd.grad((f * weight).sum(), x)[0]


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, *SHAPE, generator=generator), torch.randint(1000, (3,), generator=generator)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_predictions_and_gradients_are_those_of_the_network(config: dict[str, Any], generator: torch.Generator) -> None:
    original = denoiser(config, generator)
    x, t = draw(generator)
    for got, want in zip(predictions(accelerated(original), x, t), predictions(original, x, t), strict=True):
        assert apart(got, want) < 1e-4
    with torch.no_grad():
        assert apart(accelerated(original)(x, t), original(x, t)) < 1e-4


@pytest.mark.parametrize("images", [5, 65])
def test_upsampling_keeps_the_layout(images: int, generator: torch.Generator) -> None:
    model = accelerated(denoiser(PLAIN, generator))
    upsampler = model.network.up_blocks[0].upsamplers[0]
    x = torch.randn(images, 24, 3, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    upsampler.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    upsampler(x)
    upsampler(x, (7, 11))
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in seen)
    for one, (height, width) in zip(seen, ((6, 10), (7, 11)), strict=True):
        vertical, horizontal = torch.arange(height) * 3 // height, torch.arange(width) * 5 // width
        assert torch.equal(one, x[:, :, vertical][:, :, :, horizontal])


def calls_of_winograd(model: Denoiser, generator: torch.Generator) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(*draw(generator))
    return sum(event.count for event in profile.key_averages() if event.key == "seal_fast::winograd_convolution")


def test_convolutions_of_whole_vectors_do_a_quarter_of_the_products(generator: torch.Generator) -> None:
    """Two per residual block, of two on the way down, two in the middle and four up, and one after the upsampling."""
    whole = denoiser(CONFIGS["channels in whole vectors"], generator)
    assert calls_of_winograd(accelerated(whole), generator) == 2 * 8 + 1
    assert calls_of_winograd(whole, generator) == 0
    assert calls_of_winograd(accelerated(denoiser(PLAIN, generator)), generator) == 0


@pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="the processor has no bfloat16")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_half_precision_is_as_exact_as_autocast(config: dict[str, Any], generator: torch.Generator) -> None:
    original = denoiser(config, generator)
    x, t = draw(generator)
    exact = predictions(original, x, t)
    autocast = predictions(original, x, t, half=True)
    got = predictions(accelerated(original, torch.bfloat16), x, t, half=True)
    for one, other, want in zip(got, autocast, exact, strict=True):
        assert apart(one, want) < 2 * apart(other, want)


def test_leaves_the_original_alone(generator: torch.Generator) -> None:
    original = denoiser(PLAIN, generator)
    modules, state = list(original.network.modules()), {k: v.clone() for k, v in original.network.state_dict().items()}
    accelerated(original, torch.bfloat16)
    assert all(one is other for one, other in zip(modules, original.network.modules(), strict=True))
    assert all(value.dtype == state[k].dtype and value.equal(state[k]) for k, value in original.network.state_dict().items())


def test_keeps_no_inputs_of_convolutions(generator: torch.Generator) -> None:
    """The memory that autograd keeps for the gradient shrinks to less than half."""

    def kept(model: Denoiser) -> int:
        seen: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        x, t = draw(generator)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x.requires_grad_(), t)
        return sum(seen.values())

    original = denoiser(PLAIN, generator)
    assert kept(accelerated(original)) < kept(original) / 2


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x)


def test_other_networks_stay_as_they_are(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Denoiser(Other(), VP.linear(), SHAPE)
    assert accelerated(other, torch.bfloat16) is other
    double = denoiser(PLAIN, generator)
    double.network.double()
    assert accelerated(double) is double
    monkeypatch.setenv("SEAL_FAST_BACKEND", "reference")
    plain = denoiser(PLAIN, generator)
    assert accelerated(plain) is plain
