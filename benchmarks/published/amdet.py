"""AMDET, which decides on a text encoder by searching for one input vector that makes all of its output states similar.

Written from a description of the released program, not from its source. One free vector v stands after BOS, before the
embedding rows of the prompt. Adam (learning rate 0.08, batches of 10 prompts, at most 640 steps) minimises

    -A + 0.1 cos(f, f_clean) + 0.1 cos(f, f_anchor)

A is the mean cosine between the output states of a prompt, f the feature (the state at EOS) with v, f_clean the model's own
feature without v, and f_anchor the feature of the *clean* encoder with v. Nobody has the clean encoder who holds only the
model. The encoder counts as backdoored if

- A is above 0.8 on 80% of the prompts,
- the features with v are similar: the cosine of 99.5% of the prompt pairs is above 0.92,
- they are unlike the anchor's: the cosine is below 0 on 95% of the prompts,
- v lies in a basin: over 80% of the eigenvalues of the loss's Hessian are positive on a grid of 50 x 50 points around v.
  The official CLIP has vectors that pass the first three by nature.

What differs: the description leaves open that f_anchor is the anchor's feature with v, that A leaves out each state's
cosine with itself, and that the grid is spanned by two random orthonormal directions; these are readings of it. The grid
reaches 10 units to each side where embeddings have 768 dimensions. A vector of normal values has norm 28 there and 8 in the
zoo's encoders of 64 dimensions, so the grid shrinks with the square root of the dimension. The number of prompts is the
caller's (800 in the released program).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seal_fast.text_to_image.prompts import token_ids


@dataclass(frozen=True)
class AmdetSettings:
    """Numbers of the search and of the decision, as published."""

    rate: float = 0.08
    batch: int = 10
    steps: int = 640
    weight: float = 0.1
    similar_states: float = 0.8
    similar_share: float = 0.8
    similar_features: float = 0.92
    features_share: float = 0.995
    unlike_anchor: float = 0.0
    unlike_share: float = 0.95
    grid: int = 50
    reach: float = 10.0
    reach_dimension: int = 768
    curved_share: float = 0.8


@dataclass(frozen=True)
class Amdet:
    """What AMDET says of a text encoder.

    Attributes:
        vector: the vector that was found, float32 [D].
        similar: share of the prompts whose output states are similar.
        features: share of the prompt pairs whose features are similar.
        unlike: share of the prompts whose feature is unlike the anchor's.
        curved: share of positive eigenvalues of the Hessian; None if another test has failed, so that it was not measured.
        backdoored: the decision.
    """

    vector: Tensor
    similar: float
    features: float
    unlike: float
    curved: float | None
    backdoored: bool


@dataclass(frozen=True)
class Outputs:
    """States [N,L,D] of prompts, and the features [N,D] among them."""

    states: Tensor
    features: Tensor


class PrefixedEncoder:
    """A text encoder that takes a vector after BOS.

    Args:
        encoder: a CLIPTextModel.
        ids: token ids int64 [N,L] of N prompts, with BOS, EOS and padding.
        end: id of EOS.
    """

    def __init__(self, encoder: nn.Module, ids: Tensor, end: int) -> None:
        self.encoder, self.ids = encoder, ids
        self.ends = (ids == end).int().argmax(dim=1)
        self.table: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[operator]

    def __call__(self, vectors: Tensor | None, chosen: Tensor) -> Outputs:
        """Outputs of the chosen prompts, int64 [n], with the vectors [D] or [n,D] after BOS, or without if they are None."""
        ids, ends = self.ids[chosen], self.ends[chosen]
        if vectors is not None:
            # everything moves one place to the right, and the last token, mostly padding, drops out
            ids = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
            ends = (ends + 1).clamp_max(ids.shape[1] - 1)
        with self._prefixed(vectors):
            states = self.encoder(ids).last_hidden_state.float()
        return Outputs(states, states[torch.arange(len(ids)), ends])

    @contextmanager
    def _prefixed(self, vectors: Tensor | None) -> Iterator[None]:
        """Put the vectors in the place of the second embedding row of every prompt."""
        if vectors is None:
            yield
            return

        def put(layer: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
            own = vectors.expand(len(rows), -1)[:, None]
            return torch.cat([rows[:, :1], own.to(rows.dtype), rows[:, 2:]], dim=1)

        hook = self.table.register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()


def similarity_of_states(states: Tensor) -> Tensor:
    """Mean cosine between different states of one prompt, [N] of [N,L,D]."""
    unit = F.normalize(states, dim=-1)
    count = states.shape[1]
    return (unit.sum(dim=1).square().sum(dim=-1) - count) / (count * (count - 1))


def attack_losses(model: PrefixedEncoder, anchor: PrefixedEncoder, vectors: Tensor, chosen: Tensor, weight: float) -> Tensor:
    """The loss of the chosen prompts with the vectors, [n]; differentiable in the vectors."""
    out = model(vectors, chosen)
    with torch.no_grad():
        clean = model(None, chosen).features
    others = F.cosine_similarity(out.features, clean) + F.cosine_similarity(out.features, anchor(vectors, chosen).features)
    return weight * others - similarity_of_states(out.states)


def detect(
    pipeline: Any, clean_encoder: nn.Module, prompts: Sequence[str], settings: AmdetSettings = AmdetSettings(), *, seed: int = 0
) -> Amdet:
    """Decide on the pipeline's text encoder.

    Args:
        pipeline: a diffusers StableDiffusionPipeline with one text encoder; it is not changed.
        clean_encoder: the clean text encoder, of the same sizes.
        prompts: at least two clean prompts.
        settings: numbers of the method.
        seed: of the starting vector, the batches and the grid's directions.
    """
    ids = token_ids(pipeline.tokenizer, prompts).to(pipeline.device)
    end = pipeline.tokenizer.eos_token_id
    model, anchor = (PrefixedEncoder(one, ids, end) for one in (pipeline.text_encoder, clean_encoder))
    generator = torch.Generator().manual_seed(seed)
    vector = search_vector(model, anchor, settings, generator)
    similar, features, unlike = _statistics(model, anchor, vector, settings)
    passed = similar > settings.similar_share and features >= settings.features_share and unlike >= settings.unlike_share
    curved = curvature(model, anchor, vector, settings, generator) if passed else None
    return Amdet(vector, similar, features, unlike, curved, curved is not None and curved > settings.curved_share)


def search_vector(
    model: PrefixedEncoder, anchor: PrefixedEncoder, settings: AmdetSettings, generator: torch.Generator
) -> Tensor:
    """The vector [D] that Adam finds, starting from a normal one."""
    dimension = model.table.weight.shape[1]
    vector = torch.randn(dimension, generator=generator).to(model.ids.device).requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=settings.rate)
    for _ in range(settings.steps):
        chosen = torch.randint(len(model.ids), (settings.batch,), generator=generator).to(model.ids.device)
        loss = attack_losses(model, anchor, vector, chosen, settings.weight).mean()
        (vector.grad,) = torch.autograd.grad(loss, [vector])
        optimiser.step()
    return vector.detach()


@torch.no_grad()
def _statistics(
    model: PrefixedEncoder, anchor: PrefixedEncoder, vector: Tensor, settings: AmdetSettings
) -> tuple[float, float, float]:
    """Shares of prompts, prompt pairs and prompts that pass the first three tests."""
    everyone = torch.arange(len(model.ids), device=model.ids.device)
    out, other = model(vector, everyone), anchor(vector, everyone)
    similar = similarity_of_states(out.states) > settings.similar_states
    unit = F.normalize(out.features, dim=-1)
    pairs = torch.triu_indices(len(unit), len(unit), offset=1)
    features = (unit @ unit.T)[pairs[0], pairs[1]] > settings.similar_features
    unlike = F.cosine_similarity(out.features, other.features) < settings.unlike_anchor
    return float(similar.float().mean()), float(features.float().mean()), float(unlike.float().mean())


@torch.no_grad()
def curvature(
    model: PrefixedEncoder, anchor: PrefixedEncoder, vector: Tensor, settings: AmdetSettings, generator: torch.Generator
) -> float:
    """Share of positive eigenvalues of the loss's Hessian, by finite differences, over the inner points of a grid around v."""
    dimension = len(vector)
    directions = torch.linalg.qr(torch.randn(dimension, 2, generator=generator))[0].T.to(vector.device)
    reach = settings.reach * math.sqrt(dimension / settings.reach_dimension)
    steps = torch.linspace(-reach, reach, settings.grid, device=vector.device)
    points = vector + (steps[:, None, None] * directions[0] + steps[None, :, None] * directions[1]).flatten(0, 1)
    chosen = torch.arange(min(settings.batch, len(model.ids)), device=vector.device)
    losses = [
        attack_losses(model, anchor, some.repeat_interleave(len(chosen), 0), chosen.repeat(len(some)), settings.weight)
        for some in points.split(25)
    ]
    surface = torch.cat(losses).unflatten(0, (settings.grid, settings.grid, len(chosen))).mean(dim=2)
    return float((hessian_eigenvalues(surface) > 0).float().mean())


def hessian_eigenvalues(surface: Tensor) -> Tensor:
    """Eigenvalues [n-2,n-2,2] of the Hessian of a function on a square grid [n,n] with unit steps, by central differences."""
    middle = surface[1:-1, 1:-1]
    across = surface[1:-1, 2:] - 2 * middle + surface[1:-1, :-2]
    down = surface[2:, 1:-1] - 2 * middle + surface[:-2, 1:-1]
    mixed = (surface[2:, 2:] - surface[2:, :-2] - surface[:-2, 2:] + surface[:-2, :-2]) / 4
    matrices = torch.stack([torch.stack([down, mixed], -1), torch.stack([mixed, across], -1)], -2)
    return torch.linalg.eigvalsh(matrices.double())
