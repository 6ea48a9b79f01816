"""`seal-fast doctor`: versions, devices, and the backend of every op on this machine."""

from __future__ import annotations

import typer

from seal_fast.version import __version__


def doctor() -> None:
    """Show what runs on this machine, and why not a faster backend."""
    from seal_fast.results.environment import environment, openmp_libraries

    typer.echo(f"seal-fast {__version__}")
    for name, value in environment().items():
        typer.echo(f"  {name}: {'not available' if value is None else value}")
    # choosing backends loads their libraries, so these are listed afterwards
    lines = backends()
    libraries = openmp_libraries()
    typer.echo("OpenMP: " + (", ".join(libraries) or "no runtime found"))
    if len(libraries) > 1:
        typer.echo("  more than one runtime: their threads compete for the same cores; set OMP_NUM_THREADS")
    typer.echo(lines)


def backends() -> str:
    """One line per op: the backend that runs it on this machine, and why faster ones do not.

    Raises:
        BadParameter: SEAL_FAST_BACKEND names no backend.
    """
    from seal_fast.ops import explain

    lines = []
    try:
        for op in explain():
            refusals = "".join(f"; not {backend}: {reason}" for backend, reason in op.refusals.items())
            lines.append(f"{op.op} on {op.device}: {op.chosen or 'no backend can run it'}{refusals}")
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error
    return "\n".join(lines)
