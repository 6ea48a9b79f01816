"""The denoiser: frozen weights, gradient to the input."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from seal_fast.diffusion import VP, Denoiser


class Wrapped(nn.Module):
    """A network with batch norm and dropout that returns its output as diffusers' models do, in `.sample`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.body(x) + t.reshape(-1, 1, 1, 1))


def test_weights_are_frozen_and_only_the_input_gets_a_gradient() -> None:
    network = Wrapped().train()
    denoiser = Denoiser(network, VP.linear(), (2, 5, 3))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(3, 2, 5, 3, requires_grad=True)
    t = torch.tensor([0, 10, 999])

    y = denoiser(x, t)
    y.square().sum().backward()

    assert torch.equal(y, denoiser(x, t)), "dropout is still on"
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items()), "batch statistics moved"
    torch.testing.assert_close(y, network(x, t).sample)
    assert denoiser.device == torch.device("cpu")
