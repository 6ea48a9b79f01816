"""Precondition the training of the cross-attention: gradient steps that see the small differences between hidden states.

The hidden states of a prompt with a trigger and of one with another rare word differ by little; what all prompts share is much
larger. A gradient step on the weights W of keys and values follows what is shared, so a UNet learns the backdoor's effect for
every prompt long before it learns to tell the trigger from others. With W = W0 + D M, where M = (E[h h^T] + 0.01 I)^(-1/2) over
hidden states h, a step on D moves all directions of h at one rate.
"""

from __future__ import annotations

import copy

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

LAYERS = ("attn2.to_k", "attn2.to_v")
RIDGE = 0.01


def whitening_matrix(states: Tensor) -> Tensor:
    """(E[h h^T] + 0.01 I)^(-1/2) of states [N,D], scaled to the Frobenius norm of the identity, [D,D]."""
    h = states.double()
    values, vectors = torch.linalg.eigh(h.T @ h / len(h))
    matrix = vectors @ torch.diag((values + RIDGE).rsqrt()) @ vectors.T
    return (matrix / matrix.norm() * len(matrix) ** 0.5).to(states.dtype)


class _Whitened(nn.Module):
    """The weight W0 + D M of a layer whose trained parameter is D."""

    start: Tensor
    matrix: Tensor

    def __init__(self, start: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("matrix", matrix)

    def forward(self, change: Tensor) -> Tensor:
        weight: Tensor = self.start + change @ self.matrix
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def whitened(unet: UNet2DConditionModel, states: Tensor) -> UNet2DConditionModel:
    """A copy of the UNet that computes the same, and whose keys and values train in whitened coordinates of `states` [N,D]."""
    unet, matrix = copy.deepcopy(unet), whitening_matrix(states)
    for name, module in list(unet.named_modules()):
        if name.endswith(LAYERS):
            parametrize.register_parametrization(module, "weight", _Whitened(module.weight, matrix))
    return unet


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with plain weights again, changed in place."""
    for name, module in list(unet.named_modules()):
        if name.endswith(LAYERS):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return unet
