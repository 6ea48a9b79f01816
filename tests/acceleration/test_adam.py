"""Adam as a function against torch's optimiser."""

from __future__ import annotations

import torch

from seal_fast.acceleration.adam import adam_step, initial_moments


def test_steps_are_those_of_the_optimiser(generator: torch.Generator) -> None:
    mine = [torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)]
    theirs = [x.clone().requires_grad_() for x in mine]
    optimiser = torch.optim.Adam(theirs, lr=0.07)
    moments = initial_moments(mine)
    for _ in range(5):
        gradients = [torch.randn(x.shape, generator=generator) for x in mine]
        for x, gradient in zip(theirs, gradients, strict=True):
            x.grad = gradient.clone()
        optimiser.step()
        first, second, *moments = adam_step(mine, gradients, moments, 0.07)
        mine = [first, second]
        for got, want in zip(mine, theirs, strict=True):
            assert got.equal(want)


def test_what_was_given_stays_as_it_is(generator: torch.Generator) -> None:
    x, gradient = torch.randn(2, 3, 4, generator=generator)
    moments = initial_moments([x])
    before = [t.clone() for t in (x, gradient, *moments)]
    moved, *_ = adam_step([x], [gradient], moments, 0.1)
    assert not moved.equal(x)
    assert all(t.equal(kept) for t, kept in zip((x, gradient, *moments), before, strict=True))
