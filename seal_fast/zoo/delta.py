"""A fine-tuned model as its difference from a base: small enough for a repository, and restored in a second.

The change of a matrix is stored as its largest singular components, in half precision; a change that has no rank, or too few
values for it, is stored whole. Tensors that are equal in both are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
MARK = ":"
LEFT, RIGHT, WHOLE = f"{MARK}left", f"{MARK}right", f"{MARK}whole"


def pack(base: Weights, changed: Weights, rank: int) -> dict[str, Tensor]:
    """The delta of `changed` from `base`, float16.

    Args:
        base: weights by name.
        changed: weights of the same names.
        rank: most singular components per matrix. A convolution's kernel [O,I,h,w] is a matrix [O, I h w].
    """
    delta: dict[str, Tensor] = {}
    for name, new in changed.items():
        change = new.double() - base[name].double()
        if bool(change.any()):
            delta.update(_packed(name, change, rank))
    return {name: tensor.contiguous() for name, tensor in delta.items()}


def _packed(name: str, change: Tensor, rank: int) -> dict[str, Tensor]:
    if change.ndim < 2 or rank * (change.shape[0] + change[0].numel()) >= change.numel():
        return {name + WHOLE: change.half()}
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    root = values[:rank].sqrt()
    return {name + LEFT: (left[:, :rank] * root).half(), name + RIGHT: (root[:, None] * right[:rank]).half()}


def restore(base: Weights, delta: Weights) -> dict[str, Tensor]:
    """All weights of the model that `pack` has stored, with the base's dtypes.

    Raises:
        ValueError: the delta names a weight that the base lacks.
    """
    weights = {name: tensor.clone() for name, tensor in base.items()}
    for stem in {name.rpartition(MARK)[0] for name in delta}:
        if stem not in base:
            raise ValueError(f"the delta changes {stem}, which the base lacks: it belongs to another base")
        old, whole = base[stem], delta.get(stem + WHOLE)
        change = delta[stem + LEFT].double() @ delta[stem + RIGHT].double() if whole is None else whole.double()
        weights[stem] = (old.double() + change.reshape(old.shape)).to(old.dtype)
    return weights
