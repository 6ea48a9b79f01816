"""`seal-fast detect`: which noise inputs carry a trigger?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from seal_fast.cli.common import BACKDOORED, CLEAN, Format, OutputFormat, say, usage_errors

EPILOG = """Exit codes:

\b
4  usage error, such as a bad option, trigger or input file
1  an input carries the trigger
0  no input does"""


def detect(
    trigger: Annotated[
        Path, typer.Argument(metavar="TRIGGER", exists=True, dir_okay=False, help="trigger.safetensors of a scan.")
    ],
    inputs: Annotated[
        Path,
        typer.Argument(metavar="INPUTS", exists=True, dir_okay=False, help="Noise inputs [N,C,H,W]: .npy or .safetensors."),
    ],
    output: OutputFormat = Format.CONSOLE,
) -> None:
    """Find out which noise inputs carry a trigger."""
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.checkpoints.tensor_file import load_inputs
    from seal_fast.checkpoints.trigger import Trigger
    from seal_fast.noise_triggers import InputDetector
    from seal_fast.report.console import console_for, print_detection
    from seal_fast.report.json import detection_json
    from seal_fast.results.environment import tool

    with usage_errors():
        found, noise = Trigger.load(trigger), load_inputs(inputs)
        if noise.shape[1:] != found.mu.shape:
            shapes = f"{list(noise.shape[1:])} does not fit the trigger's {list(found.mu.shape)}"
            raise CheckpointError(inputs, f"the shape {shapes}")
    if not found.mu.any() and bool((found.gamma == 1).all()):
        say(f"{trigger} changes no noise, since the scan found no trigger: every input counts as clean")
    log_ratios = InputDetector(found).log_ratio(noise)[:, 0].tolist()
    if output is Format.JSON:
        typer.echo(detection_json(log_ratios, tool()))
    else:
        print_detection(log_ratios, console_for(sys.stdout))
    raise typer.Exit(BACKDOORED if any(value > 0 for value in log_ratios) else CLEAN)
