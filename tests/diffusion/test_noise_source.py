from __future__ import annotations

import torch

from seal_fast.diffusion import NoiseSource


def test_numbers_are_those_of_one_generator_on_the_cpu(generator: torch.Generator, device: str) -> None:
    seed = int(torch.randint(2**31, (), generator=generator))
    source, plain = NoiseSource(torch.device(device), seed), torch.Generator().manual_seed(seed)
    assert source.normal(2, 3).equal(torch.randn(2, 3, generator=plain))
    assert source.uniform(5).equal(torch.rand(5, generator=plain))
    assert source.integers(3, 9, 7).equal(torch.randint(3, 9, (7,), generator=plain))
    forked = source.fork()
    assert forked.initial_seed() == int(torch.randint(2**31, (), generator=plain))
    assert source.normal(4).equal(torch.randn(4, generator=plain))


def test_tensors_are_moved_to_the_device(generator: torch.Generator, device: str) -> None:
    x = torch.randn(3, 2, generator=generator)
    source = NoiseSource(torch.device(device), 0)
    moved = source.on_device(x)
    assert moved.device.type == source.fork().device.type == device
    assert moved.cpu().equal(x)
    assert source.on_device(moved).equal(moved)
