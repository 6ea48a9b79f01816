"""A delta restores what it was made from, exactly where its rank suffices, and as well as any matrix of its rank elsewhere."""

from __future__ import annotations

import pytest
import torch

from seal_fast.zoo.delta import pack, restore


def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"a.weight": (24, 20), "conv.weight": (16, 8, 3, 3), "a.bias": (24,), "same": (5, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_change_of_low_rank_comes_back(generator: torch.Generator) -> None:
    base = weights(generator)
    changed = {name: tensor.clone() for name, tensor in base.items()}
    changed["a.weight"] += torch.randn(24, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    changed["conv.weight"] += (torch.randn(16, 2, generator=generator) @ torch.randn(2, 72, generator=generator)).view(
        16, 8, 3, 3
    )
    changed["a.bias"] += 1.5
    delta = pack(base, changed, rank=2)
    assert not [name for name in delta if name.startswith("same")]
    assert sum(tensor.numel() for tensor in delta.values()) == 2 * (24 + 20) + 2 * (16 + 72) + 24
    restored = restore(base, delta)
    assert restored.keys() == changed.keys()
    for name, tensor in changed.items():
        torch.testing.assert_close(restored[name], tensor, rtol=2e-3, atol=2e-2)


def test_the_largest_components_are_kept(generator: torch.Generator) -> None:
    """By Eckart and Young no matrix of this rank is nearer: the error's norm is that of the singular values left out."""
    base = weights(generator)
    change = torch.randn(24, 20, generator=generator)
    restored = restore(base, pack(base, base | {"a.weight": base["a.weight"] + change}, rank=3))["a.weight"]
    left_out = torch.linalg.svdvals(change)[3:].norm()
    assert float((restored - base["a.weight"] - change).norm()) == pytest.approx(float(left_out), rel=1e-2)


def test_a_delta_of_another_base_is_refused(generator: torch.Generator) -> None:
    base = weights(generator)
    delta = pack(base, base | {"a.bias": base["a.bias"] + 1}, rank=1)
    with pytest.raises(ValueError, match="another base"):
        restore({"other": torch.zeros(1)}, delta)
