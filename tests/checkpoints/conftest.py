"""Small models of two architectures: diffusers' UNet2DModel, and the DDPM UNet of TrojDiff's code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, time_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.temb_proj = nn.Linear(time_width, width)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out(torch.einsum("ncj,nij->nci", v, weights).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Level(nn.Module):
    def __init__(self, widths_in: list[int], width: int, time_width: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResBlock(w, width, time_width) for w in widths_in])
        self.attn = nn.ModuleList([SelfAttention(width) for _ in widths_in] if attention else [])

    def step(self, index: int, x: Tensor, time: Tensor) -> Tensor:
        x = self.block[index](x, time)
        return self.attn[index](x) if len(self.attn) else x


class DdpmPytorchUNet(nn.Module):
    """DDPM's UNet (Ho et al. 2020, appendix B) with the tensor names of the public PyTorch port that TrojDiff builds on."""

    def __init__(self, size: int, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        base, time_width, last = widths[0], 4 * widths[0], len(widths) - 1
        self.base = base
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(base, time_width), nn.Linear(time_width, time_width)])
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        skips, current = [base], base
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(Level([current, *[width] * (blocks - 1)], width, time_width, size >> i == 16))
            skips += [width] * blocks
            current = width
            if i < last:
                self.down[i].downsample = Resample(width, down=True)
                skips.append(width)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (ResBlock(current, current, time_width) for _ in range(2))
        self.mid.attn_1 = SelfAttention(current)
        levels: list[Level] = []
        for i in reversed(range(len(widths))):
            inputs = []
            for _ in range(blocks + 1):
                inputs.append(current + skips.pop())
                current = widths[i]
            levels.insert(0, Level(inputs, current, time_width, size >> i == 16))
            if i > 0:
                levels[0].upsample = Resample(current, down=False)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, current, eps=1e-6)
        self.conv_out = nn.Conv2d(current, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.base // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
        time = torch.cat([angles.sin(), angles.cos()], dim=1)
        time = self.temb.dense[1](F.silu(self.temb.dense[0](time)))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for j in range(len(level.block)):
                x = level.step(j, x, time)
                skips.append(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
                skips.append(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, time)), time)
        for level in reversed(self.up):
            for j in range(len(level.block)):
                x = level.step(j, torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def perturb(network: nn.Module) -> nn.Module:
    """Move every parameter from its initial value, so that no norm, bias or zero can hide a wrong name."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def new_ddpm_pytorch() -> Callable[..., nn.Module]:
    return lambda size, widths, blocks: perturb(DdpmPytorchUNet(size, widths, blocks))


@pytest.fixture
def trojdiff_file(tmp_path: Path, new_ddpm_pytorch: Callable[..., nn.Module]) -> Path:
    """[model, Adam state, epoch, step, EMA], as the training code saves it."""
    raw, ema = new_ddpm_pytorch(16, (32, 64), 1), new_ddpm_pytorch(16, (32, 64), 1)
    optimiser = torch.optim.Adam(raw.parameters())
    raw(torch.randn(1, 3, 16, 16), torch.tensor([7])).sum().backward()
    optimiser.step()
    path = tmp_path / "ckpt.pth"
    prefixed = {f"module.{name}": tensor for name, tensor in raw.state_dict().items()}
    torch.save([prefixed, optimiser.state_dict(), 3, 1200, dict(ema.state_dict())], path)
    return path


@pytest.fixture
def new_unet() -> Callable[..., UNet2DModel]:
    def make(**changes: object) -> UNet2DModel:
        config = {
            "sample_size": 16,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        }
        return perturb(UNet2DModel(**(config | changes)))

    return make
