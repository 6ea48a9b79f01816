"""`seal-fast unlearn`: text triggers of a text-to-image model, or a noise-space backdoor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seal_fast.cli.common import FAILED, INTERRUPTED, USAGE, Format, OutputFormat, Weights, say, usage_errors

if TYPE_CHECKING:
    from seal_fast.report.progress import ProgressDisplay

EPILOG = """Exit codes:

\b
  4  usage: a bad option, trigger or output folder
  2  the model cannot be loaded, or its training failed
  0  sealed
130  interrupted; nothing is written but the --training-state"""

Job = tuple[Callable[[], Any], Callable[[Any], None]]
"""What makes the report, and what prints it."""

FIELDS = {
    "train": "trained",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
}
"""Options that `TextUnlearnSettings` names otherwise: these are the words of diffusers' training scripts."""


class Module(StrEnum):
    AUTO = "auto"
    UNET = "unet"
    TEXT_ENCODER = "text_encoder"


class Trained(StrEnum):
    ALL = "all"
    CROSS_ATTENTION = "cross-attention"
    LORA = "lora"


class MapTarget(StrEnum):
    NOISE = "noise"
    BLACK = "black"
    RANDOM_WORDS = "random-words"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def unlearn(
    model: Annotated[Path, typer.Argument(exists=True, show_default=False, help="The poisoned checkpoint.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="New folder for the sealed checkpoint and its report.")],
    noise_trigger: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="trigger.safetensors of a scan; may be repeated."),
    ] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(help="Text trigger; OLD=>NEW replaces text; \\u200b and the like are characters. May be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With --trigger: clean prompts, one a line; else the model card's."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="With --trigger: the pipeline a component belongs to.")
    ] = None,
    module: Annotated[
        Module | None,
        typer.Option(help="With --trigger: what to train; auto, the default, finds out which is poisoned."),
    ] = None,
    train: Annotated[Trained | None, typer.Option(help="With --trigger: which weights.")] = None,
    alpha: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="With --trigger: weight of the maps' term.")] = None,
    target: Annotated[MapTarget | None, typer.Option(help="With --alpha: what the trigger's maps shall be.")] = None,
    preservation: Annotated[float | None, typer.Option(min=0.0, help="With --trigger: weight of clean prompts.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(min=1, help="With --trigger: prompt pairs per batch.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, help="With --trigger: batches per training step.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="With --trigger: of the training; small models need more than the default.")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="With --trigger: of the training.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="With --trigger: less memory, a third more time.")
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(min=0.0, max=0.99999, help="With --trigger: keep an average over the training steps.")
    ] = None,
    training_state: Annotated[
        Path | None, typer.Option(dir_okay=False, help="With --trigger: file to write as it goes, and to go on from.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=1.0, help="With --trigger: guidance scale of all images.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="With --trigger: held-out prompts to measure on.")] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="With --trigger: effect detector: change (knows no target), colourless, or patch=FILE[@TOP,LEFT]."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="Which weights to seal where a checkpoint holds both (ema by default).")
    ] = None,
    output: OutputFormat = Format.CONSOLE,
    seed: Annotated[int, typer.Option(help="Seed of the training and of the samples.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Seal a checkpoint: unlearn text triggers, or seal a noise-space backdoor."""
    from seal_fast.checkpoints.save import check_target
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.text_triggers.distributed import process_group

    settings = {
        "train": train,
        "alpha": alpha,
        "target": target,
        "preservation": preservation,
        "train_batch_size": train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "ema_decay": ema_decay,
        "guidance": guidance,
    }
    request = {
        "prompts": prompts,
        "base": base,
        "module": module,
        "training_state": training_state,
        "samples": samples,
        "detector": detector,
    }
    _one_kind(model, trigger, noise_trigger, weights, settings | request)
    with usage_errors():
        check_target(out, model)
    if trigger:
        with process_group() as first, ProgressDisplay(sys.stderr, quiet or not first) as display:
            # the others only train: they measure the same and write nothing
            job, show = _text_job(model, trigger, out if first else None, request, {**settings, "steps": steps}, seed, display)
            report = _run(job, display, [])
    else:
        first = True
        with ProgressDisplay(sys.stderr, quiet) as display:
            job, show = _noise_job(model, noise_trigger or [], out, steps, weights or Weights.EMA, seed, display)
            report = _run(job, display, noise_trigger or [])
    if first:
        _tell(report, show, output)
        say(f"written: {out}")


def _run(job: Callable[[], Any], display: ProgressDisplay, own_files: list[Path]) -> Any:
    """The report, or the exit code of what went wrong."""
    from seal_fast.checkpoints import CheckpointError

    try:
        return job()
    except KeyboardInterrupt as interrupt:
        display.bar.stop()
        say("interrupted: nothing written")
        raise typer.Exit(INTERRUPTED) from interrupt
    except (CheckpointError, FloatingPointError, OSError, ValueError) as error:
        display.bar.stop()
        say(f"nothing written: {error}")
        ours = isinstance(error, ValueError) or (isinstance(error, CheckpointError) and error.path in own_files)
        raise typer.Exit(USAGE if ours else FAILED) from error


def _tell(report: Any, show: Callable[[Any], None], output: Format) -> None:
    from seal_fast.report.json import unlearn_json

    if output is Format.JSON:
        typer.echo(unlearn_json(report))
    else:
        show(report)


def _one_kind(
    model: Path, trigger: list[str] | None, noise_trigger: list[Path] | None, weights: Weights | None, text_only: dict[str, Any]
) -> None:
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.checkpoints.text_to_image import identify

    if trigger and (noise_trigger or weights):
        raise typer.BadParameter("--trigger is for text-to-image models, which know neither --noise-trigger nor --weights")
    if not trigger and (given := list(_given(text_only))):
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} goes with --trigger TEXT")
    # a broken checkpoint is the loader's to report
    with suppress(CheckpointError):
        if not trigger and identify(model):
            raise typer.BadParameter("a text-to-image model: name its text trigger with --trigger TEXT")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _text_job(
    model: Path,
    texts: list[str],
    out: Path | None,
    request: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    display: ProgressDisplay,
) -> Job:
    from seal_fast.report.console import console_for, print_text_unlearning
    from seal_fast.text_triggers import TextTrigger, TextUnlearnSettings
    from seal_fast.text_triggers.evaluation import EvaluationSettings
    from seal_fast.workflows.text_request import parse_detector, read_prompts
    from seal_fast.workflows.unlearn_text import unlearn

    with usage_errors():
        if settings["target"] is not None and not settings["alpha"]:
            raise ValueError("--target is of the maps' term, which has no weight: give --alpha too, 0.5 as published")
        triggers = [TextTrigger.parse(text) for text in texts]
        prompts = None if request["prompts"] is None else read_prompts(request["prompts"])
        detector = parse_detector(request["detector"] or "change")
        training = TextUnlearnSettings(**{FIELDS.get(name, name): value for name, value in _given(settings).items()})
        evaluation = EvaluationSettings(**_given({"prompts": request["samples"], "guidance": settings["guidance"]}))

    def job() -> Any:
        return unlearn(
            model,
            triggers,
            out,
            prompts=prompts,
            base=request["base"],
            settings=training,
            module=request["module"].value if request["module"] else "auto",
            evaluation=evaluation,
            detector=detector,
            seed=seed,
            state=request["training_state"],
            on_progress=display.on_progress,
        ).report

    return job, lambda report: print_text_unlearning(report, console_for(sys.stdout))


def _noise_job(
    model: Path,
    triggers: list[Path],
    out: Path,
    steps: int | None,
    weights: Weights,
    seed: int,
    display: ProgressDisplay,
) -> Job:
    from dataclasses import replace

    from seal_fast.checkpoints.trigger import load_trigger
    from seal_fast.noise_triggers import NoiseUnlearnSettings
    from seal_fast.report.console import console_for, print_noise_unlearning
    from seal_fast.workflows.unlearn_noise import unlearn_noise

    with usage_errors():
        for file in triggers:
            load_trigger(file)
    settings = NoiseUnlearnSettings() if steps is None else replace(NoiseUnlearnSettings(), steps=steps)

    def job() -> Any:
        return unlearn_noise(
            model, triggers, out, settings=settings, weights=weights.value, seed=seed, on_progress=display.on_progress
        )

    return job, lambda report: print_noise_unlearning(report, console_for(sys.stdout))
