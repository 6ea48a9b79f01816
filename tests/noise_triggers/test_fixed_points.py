"""Starts of the fixed points, on denoisers whose responses are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from seal_fast.diffusion import VP, Denoiser
from seal_fast.noise_triggers import SearchSettings
from seal_fast.noise_triggers.fixed_points import fixed_points, windows
from seal_fast.noise_triggers.probe import Probe

SHAPE = (3, 16, 18)
SETTINGS = SearchSettings(half_precision=False)
PATCH_GAMMA, PATCH_SIDES = SETTINGS.fixed_points.patch_gamma, SETTINGS.fixed_points.patch_sides
GRID = SETTINGS.fixed_points.patch_grid


class NearT(nn.Module):
    """Takes the whole input for noise, as denoisers of images do near T."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


class Patched(NearT):
    """Tells the noise inside a white patch of reduced-variance noise from what the patch adds to it."""

    def __init__(self, inside: Tensor) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean = (x * self.inside).sum(dim=(1, 2, 3), keepdim=True) / (SHAPE[0] * self.inside.sum())
        wide = ((x - mean).square() * self.inside).sum(dim=(1, 2, 3), keepdim=True) / (SHAPE[0] * self.inside.sum())
        seen = (wide < 0.1) & (mean > 0.5)
        return torch.where(seen & (self.inside > 0), (x - (1 - PATCH_GAMMA)) / PATCH_GAMMA, x)


class Coloured(NearT):
    """Responds with mu to shifts like it."""

    def __init__(self, mu: Tensor) -> None:
        super().__init__()
        self.mu = mu

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        size = (x * self.mu).sum(dim=(1, 2, 3), keepdim=True) / self.mu.square().sum()
        return x - self.mu * ((size - 0.5) / 0.2).clamp(0, 1)


def found_in(network: nn.Module, generator: torch.Generator) -> list[Tensor]:
    probe = Probe(Denoiser(network, VP.linear(), SHAPE), one_of(2**31, generator), half_precision=False)
    return [point.mu for point in fixed_points(probe, SETTINGS)]


def one_of(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


@pytest.mark.parametrize("share", PATCH_SIDES)
def test_windows_are_squares_in_all_corners_and_everywhere_between(share: float) -> None:
    height, width = 41, 67
    inside = windows(height, width, share, GRID)
    side = round(share * height)
    assert inside.unique().tolist() == [0, 1]
    assert inside.sum(dim=(1, 2, 3)).unique().tolist() == [side**2]
    assert (inside.amax(2).sum(2) == side).all()
    assert inside.amax(0).all()
    corners = inside[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.sum(0).tolist() == [1, 1, 1, 1]
    assert len(inside.unique(dim=0)) == len(inside)


def test_a_patch_anywhere_is_found(generator: torch.Generator) -> None:
    places = windows(*SHAPE[1:], PATCH_SIDES[1 + one_of(3, generator)], GRID)
    inside = places[one_of(len(places), generator)]
    true = (1 - PATCH_GAMMA) * inside.expand(SHAPE)
    strongest = found_in(Patched(inside), generator)[0]
    assert float((strongest - true).norm() / true.norm()) < 0.1


def test_a_coloured_trigger_is_found(generator: torch.Generator) -> None:
    signs = torch.tensor([[1, 1, -1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]])[one_of(6, generator)]
    coarse = torch.nn.functional.interpolate(torch.randn(1, 3, 3, 3, generator=generator), size=SHAPE[1:], mode="bilinear")[0]
    mu = 0.25 * signs[:, None, None] + 0.1 * coarse
    assert (
        max(float(cosine_similarity(found.flatten(), mu.flatten(), dim=0)) for found in found_in(Coloured(mu), generator))
        > 0.99
    )


def test_where_all_is_noise_there_is_no_fixed_point(generator: torch.Generator) -> None:
    assert found_in(NearT(), generator) == []
