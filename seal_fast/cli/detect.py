"""`seal-fast detect`: which noise inputs, or which prompts, carry a trigger?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from seal_fast.cli.common import BACKDOORED, CLEAN, Format, OutputFormat, printing, say, seed_option, usage_errors

EPILOG = """Exit codes:

\b
4  usage error, such as a bad option, trigger, pipeline or input file
1  an input or a prompt carries a trigger
0  none does; familiar prompts were not measured"""

NOISE_SUFFIXES = (".npy", ".safetensors")
"""Of files with noise inputs."""

Model = Annotated[
    Path,
    typer.Argument(
        metavar="TRIGGER|PIPELINE",
        exists=True,
        help="trigger.safetensors of a scan, for noise; folder of a text-to-image pipeline, for prompts.",
    ),
]
Inputs = Annotated[
    Path,
    typer.Argument(
        # typer would refuse "-" as a file that does not exist; reading the file says what is wrong with it
        metavar="INPUTS|PROMPTS",
        help="Noise inputs [N,C,H,W]: .npy or .safetensors. Prompts: UTF-8 text, one a line; - for standard input.",
    ),
]
CleanPrompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Clean prompts, one a line, like those of PROMPTS (default: those of the model card, else shipped ones).",
    ),
]
Seed = Annotated[int | None, seed_option("Seed of the noise that prompts are tried on (default: 0).")]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="NUMBER", min=1.0, help="Guidance scale that the pipeline is used with (default: 7.5)."),
]


def detect(
    model: Model,
    inputs: Inputs,
    clean_prompts: CleanPrompts = None,
    seed: Seed = None,
    guidance: Guidance = None,
    output: OutputFormat = Format.CONSOLE,
) -> None:
    """Find out which noise inputs carry a trigger, or which prompts do that are given to a text-to-image pipeline."""
    noise = inputs.suffix in NOISE_SUFFIXES
    if model.is_dir():
        if noise:
            raise typer.BadParameter(f"{inputs} holds noise, which needs a trigger file; a pipeline takes prompts")
        triggered = _prompts(model, inputs, clean_prompts, seed or 0, guidance, output)
    else:
        if not noise:
            kinds = " or ".join(NOISE_SUFFIXES)
            raise typer.BadParameter(f"{inputs} is no {kinds} file of noise, which a trigger takes; prompts need a pipeline")
        if (clean_prompts, seed, guidance) != (None, None, None):
            raise typer.BadParameter(f"--clean-prompts, --seed and --guidance are for prompts; {model} is no pipeline folder")
        triggered = _inputs(model, inputs, output)
    raise typer.Exit(BACKDOORED if triggered else CLEAN)


def _prompts(model: Path, file: Path, clean_prompts: Path | None, seed: int, guidance: float | None, output: Format) -> bool:
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.report.console import console_for, print_prompt_detection
    from seal_fast.report.json import prompt_detection_json
    from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
    from seal_fast.workflows.detect_prompts import detect_prompts
    from seal_fast.workflows.prompts import read_lines

    settings = PromptDetectionSettings() if guidance is None else PromptDetectionSettings(guidance=guidance)
    with usage_errors():
        prompts = read_lines(file)
        if not prompts:
            raise CheckpointError(file, "no prompt: one a line is expected")
        clean = None if clean_prompts is None else read_lines(clean_prompts)
        report = detect_prompts(model, prompts, clean, settings, seed)
    for note in report.notes:
        say(note)
    with printing():
        if output is Format.JSON:
            typer.echo(prompt_detection_json(report))
        else:
            print_prompt_detection(report, console_for(sys.stdout))
    return any(one.triggered for one in report.prompts)


def _inputs(file: Path, inputs: Path, output: Format) -> bool:
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.checkpoints.tensor_file import load_inputs
    from seal_fast.checkpoints.trigger import Trigger
    from seal_fast.noise_triggers import InputDetector
    from seal_fast.report.console import console_for, print_detection
    from seal_fast.report.json import detection_json
    from seal_fast.results.environment import tool

    with usage_errors():
        found, noise = Trigger.load(file), load_inputs(inputs)
        if noise.shape[1:] != found.mu.shape:
            shapes = f"{list(noise.shape[1:])} does not fit the trigger's {list(found.mu.shape)}"
            raise CheckpointError(inputs, f"the shape {shapes}")
        log_ratios = InputDetector(found).log_ratio(noise)[:, 0].tolist()
    if not found.mu.any() and bool((found.gamma == 1).all()):
        say(f"{file} changes no noise, since the scan found no trigger: every input counts as clean")
    with printing():
        if output is Format.JSON:
            typer.echo(detection_json(log_ratios, tool()))
        else:
            print_detection(log_ratios, console_for(sys.stdout))
    return any(value > 0 for value in log_ratios)
