"""Which implementation of an op runs.

Every op has a reference in plain torch and, per device, a faster implementation. `SEAL_FAST_BACKEND` chooses:

    auto (default)                   the fastest one that can run; a warning says once when that is only the reference
    reference | cpu | triton | cuda  this one, or RuntimeError with the reason why it cannot run
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.ops import backends

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
DEVICES = {"reference": None, "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
"""The type of device that the tensors of each backend must be on; None for any."""
LIBRARY = torch.library.Library("seal_fast", "FRAGMENT")


def _never(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        backend: "reference", "cpu", "triton" or "cuda".
        run: called with the op's arguments; returns its result.
        missing: returns why it cannot run on this installation at all, or None.
        refuse: called with the op's arguments; returns why it cannot run for them, or None.
    """

    backend: str
    run: Callable[..., Any]
    missing: Callable[[], str | None] = _never
    refuse: Callable[..., str | None] = _never

    def refusal(self, device: str, wanted: str) -> str | None:
        """Why it cannot run on tensors of this type of device, whatever they are, where SEAL_FAST_BACKEND is `wanted`."""
        needed = DEVICES[self.backend]
        if needed in (None, device):
            return self.missing()
        # interpreting a kernel is a test of it: never a choice of "auto"
        if not (backends.INTERPRETED and self.backend == wanted == "triton"):
            absent = "; torch sees no CUDA device" if needed == "cuda" and not torch.cuda.is_available() else ""
            return f"needs tensors on {needed}, not {device}{absent}"
        return self.missing()


def compiled_implementations(
    run: Callable[..., Any], reference: Callable[..., Any], refuse: Callable[..., str | None] = _never
) -> list[Implementation]:
    """For an op whose kernel is compiled for both devices: `run` launches the one for the device of its tensors."""
    return [
        Implementation("cuda", run, backends.CUDA.missing, refuse),
        Implementation("cpu", run, backends.CPU.missing, refuse),
        Implementation("reference", reference),
    ]


@dataclass(frozen=True)
class OpStatus:
    """What runs for one op on one device, and why nothing faster does.

    Attributes:
        op: name of the op.
        device: "cpu" or "cuda".
        chosen: backend that runs; None when SEAL_FAST_BACKEND demands one that cannot.
        refusals: backend -> reason, for every faster one.
    """

    op: str
    device: str
    chosen: str | None
    refusals: dict[str, str]


class Op:
    """A registered op: `op(*args)` calls torch.ops.seal_fast.<name>, which runs the implementation that `choose` returns.

    An op is not differentiable: gradients belong in an `autograd.Function` around the call.

    Args:
        schema: signature for torch.library, "name(Tensor x, ...) -> Tensor".
        implementations: fastest first, the reference last.
        fake: shapes and dtypes of the result, from fake arguments.
    """

    def __init__(self, schema: str, implementations: list[Implementation], fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.implementations = implementations
        self._warned: set[str] = set()
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self.dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"seal_fast::{self.name}", fake, lib=LIBRARY)
        self._boundary = getattr(torch.ops.seal_fast, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._boundary(*args)

    def direct(self, *args: Any) -> Any:
        """Run the first implementation without asking whether it can run.

        This skips torch's dispatcher and `choose`: nothing reads SEAL_FAST_BACKEND, nothing checks the device and the dtype of
        the arguments, and torch.compile and torch.func do not see the call. The caller has made sure of all that once, for
        instance with `status`. A profiler or a mode that listens to the dispatcher (a FLOP counter) does see the call: then it
        is `self(*args)`. (The skipped part takes as long as a small op: 4% of a reversion at 16 px.)
        """
        # torch has no public question for either
        observed = torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack()
        return self._boundary(*args) if observed else self.implementations[0].run(*args)

    def dispatch(self, *args: Any) -> Any:
        """Run the implementation that is chosen for these arguments."""
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Implementation:
        """The implementation for these arguments.

        Raises:
            RuntimeError: SEAL_FAST_BACKEND names one that cannot run here, or none at all.
        """
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        wanted = requested_backend()
        refusals: dict[str, str] = {}
        for implementation in self._candidates(wanted):
            reason = implementation.refusal(device, wanted) or implementation.refuse(*args)
            if reason is None:
                if refusals:
                    self._say_slower(implementation, device, refusals)
                return implementation
            refusals[implementation.backend] = reason
        raise RuntimeError(
            f"SEAL_FAST_BACKEND={wanted} cannot run {self.name}: {self._why_not(wanted, refusals)}. "
            "Unset SEAL_FAST_BACKEND to use the fastest one that can, or run `seal-fast doctor` to see all."
        )

    def status(self, device: str) -> OpStatus:
        """The choice of `choose` on this type of device, for arguments that every implementation accepts."""
        refusals: dict[str, str] = {}
        wanted = requested_backend()
        for implementation in self.implementations:
            reason = implementation.refusal(device, wanted)
            if reason is None and wanted not in ("auto", implementation.backend):
                reason = f"SEAL_FAST_BACKEND={wanted}"
            if reason is None:
                return OpStatus(self.name, device, implementation.backend, refusals)
            refusals[implementation.backend] = reason
        return OpStatus(self.name, device, None, refusals)

    def _candidates(self, wanted: str) -> list[Implementation]:
        return [i for i in self.implementations if wanted in ("auto", i.backend)]

    def _why_not(self, wanted: str, refusals: dict[str, str]) -> str:
        have = ", ".join(i.backend for i in self.implementations)
        return refusals.get(wanted, f"it has no {wanted} implementation, only {have}")

    def _say_slower(self, chosen: Implementation, device: str, refusals: dict[str, str]) -> None:
        of_device = [i.backend for i in self.implementations if DEVICES[i.backend] == device]
        lost = {backend: refusals[backend] for backend in of_device if backend in refusals}
        if chosen.backend != "reference" or not lost or device in self._warned:
            return
        self._warned.add(device)
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in lost.items())
        warnings.warn(f"{self.name} runs on the slower torch reference ({reasons})", RuntimeWarning, stacklevel=2)


OPS: dict[str, Op] = {}


def requested_backend() -> str:
    """SEAL_FAST_BACKEND, checked.

    Raises:
        RuntimeError: it is not one of `BACKENDS`.
    """
    wanted = os.environ.get("SEAL_FAST_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise RuntimeError(f"SEAL_FAST_BACKEND must be one of {', '.join(BACKENDS)}, not {wanted!r}")
    return wanted


def explain() -> list[OpStatus]:
    """The status of every op on every device that torch sees here, for `seal-fast doctor`."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [op.status(device) for op in OPS.values() for device in devices]
