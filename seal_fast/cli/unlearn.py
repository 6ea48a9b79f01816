"""`seal-fast unlearn`: text triggers of a text-to-image model, or noise triggers of an unconditional one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seal_fast.cli.common import (
    BASE_HELP,
    FAILED,
    INTERRUPTED,
    PROMPTS_HELP,
    USAGE,
    Format,
    Weights,
    printing,
    say,
    seed_option,
    usage_errors,
)

if TYPE_CHECKING:
    from seal_fast.results.text_unlearning import TextUnlearnReport
    from seal_fast.results.unlearning import NoiseUnlearnReport
    from seal_fast.workflows.found import NoiseTriggers, TextTriggers
    from seal_fast.workflows.unlearn_noise import NoiseUnlearning
    from seal_fast.workflows.unlearn_text import TextUnlearning

EPILOG = """Exit codes:

\b
  4  usage: a bad option, trigger or output folder
  2  the model cannot be loaded, or its training failed
  0  unlearned
130  interrupted; nothing is written but the --training-state"""

TRIGGER, TRAINING, EVALUATION, OUTPUT = "Trigger", "Training", "Evaluation", "Output"
TEXT_TRAINING, TEXT_EVALUATION = "Training, with text triggers only", "Evaluation, with text triggers only"

NOISE_ONLY = frozenset({"noise_trigger", "weights"})
FOR_BOTH = frozenset({"model", "out", "found", "steps", "seed", "output", "quiet"})
"""Parameters of `unlearn`; all others are for text triggers only."""


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


Model = Annotated[Path, typer.Argument(metavar="MODEL", exists=True, show_default=False, help="The poisoned checkpoint.")]
Triggers = Annotated[
    list[str] | None,
    typer.Option(
        "--trigger",
        metavar="TEXT",
        help="Text trigger; OLD=>NEW replaces text; \\u200b and the like stand for characters. May be repeated.",
        rich_help_panel=TRIGGER,
    ),
]
NoiseTriggerFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--noise-trigger",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="trigger.safetensors of a scan. May be repeated. Without any trigger, random shifts of the noise are unlearned.",
        rich_help_panel=TRIGGER,
    ),
]
Found = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Folder of a scanned model, DIR/MODEL of `scan --out DIR`, whose triggers are unlearned.",
        rich_help_panel=TRIGGER,
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        help="Weights to unlearn if a checkpoint holds both (default: ema). Not with --trigger.", rich_help_panel=TRAINING
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER", min=1, help="Training steps (default: 500, with noise triggers 240).", rich_help_panel=TRAINING
    ),
]
Seed = Annotated[int, seed_option("Seed of the training and of all samples.", rich_help_panel=TRAINING)]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help=PROMPTS_HELP,
        rich_help_panel=TEXT_TRAINING,
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        help=BASE_HELP,
        rich_help_panel=TEXT_TRAINING,
    ),
]
ModuleOption = Annotated[
    Module | None,
    typer.Option(
        help="Module to train; auto, the default, takes the one of --found, else finds out which one is poisoned.",
        rich_help_panel=TEXT_TRAINING,
    ),
]
Train = Annotated[Trained | None, typer.Option(help="Weights to train (default: all).", rich_help_panel=TEXT_TRAINING)]
Alpha = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER", min=0.0, max=1.0, help="Weight of the attention map term (default: 0).", rich_help_panel=TEXT_TRAINING
    ),
]
Target = Annotated[
    MapTarget | None,
    typer.Option(help="With --alpha: target of the trigger tokens' maps (default: noise).", rich_help_panel=TEXT_TRAINING),
]
Preservation = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER", min=0.0, help="Weight of the clean prompts' term (default: 1).", rich_help_panel=TEXT_TRAINING
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(metavar="INTEGER", min=1, help="Prompt pairs per batch (default: 4).", rich_help_panel=TEXT_TRAINING),
]
Accumulation = Annotated[
    int | None,
    typer.Option(metavar="INTEGER", min=1, help="Batches per training step (default: 1).", rich_help_panel=TEXT_TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        min=0.0,
        help="Learning rate (default: 1e-5; small models need a larger one).",
        rich_help_panel=TEXT_TRAINING,
    ),
]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Precision of the networks (default: fp32).", rich_help_panel=TEXT_TRAINING)
]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Use less memory and a third more time.", rich_help_panel=TEXT_TRAINING),
]
EmaDecay = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        min=0.0,
        max=0.99999,
        help="Decay of a moving average of the weights, which is returned (default: 0, none).",
        rich_help_panel=TEXT_TRAINING,
    ),
]
TrainingState = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", dir_okay=False, help="File that the training saves to and resumes from.", rich_help_panel=TEXT_TRAINING
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="NUMBER", min=1.0, help="Guidance scale of all images (default: 7.5).", rich_help_panel=TEXT_TRAINING),
]
SamplerSteps = Annotated[
    int | None,
    typer.Option(metavar="INTEGER", min=1, help="Sampler steps of all images (default: 25).", rich_help_panel=TEXT_TRAINING),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER", min=2, help="Held-out prompts to measure on (default: 100).", rich_help_panel=TEXT_EVALUATION
    ),
]
Detector = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Effect detector: change (the default, knows no target), colourless, or patch=FILE[@TOP,LEFT].",
        rich_help_panel=TEXT_EVALUATION,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", file_okay=False, help="New folder for the unlearned checkpoint and its report.", rich_help_panel=OUTPUT
    ),
]
Output = Annotated[Format, typer.Option("--format", help="Format of the result on standard output.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.", rich_help_panel=OUTPUT)]


def unlearn(
    ctx: typer.Context,
    model: Model,
    out: Out,
    trigger: Triggers = None,
    noise_trigger: NoiseTriggerFiles = None,
    found: Found = None,
    steps: Steps = None,
    seed: Seed = 0,
    weights: WeightsOption = None,
    base: Base = None,
    module: ModuleOption = None,
    prompts: Prompts = None,
    train: Train = None,
    alpha: Alpha = None,
    target: Target = None,
    preservation: Preservation = None,
    train_batch_size: BatchSize = None,
    gradient_accumulation_steps: Accumulation = None,
    learning_rate: LearningRate = None,
    precision: PrecisionOption = None,
    gradient_checkpointing: Checkpointing = None,
    ema_decay: EmaDecay = None,
    guidance: Guidance = None,
    sampler_steps: SamplerSteps = None,
    training_state: TrainingState = None,
    samples: Samples = None,
    detector: Detector = None,
    output: Output = Format.CONSOLE,
    quiet: Quiet = False,
) -> None:
    """Unlearn text triggers of a text-to-image model, or noise triggers of an unconditional model."""
    from seal_fast.noise_triggers import NoiseUnlearnSettings
    from seal_fast.report.figures import BEFORE_AFTER
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.text_triggers.distributed import process_group
    from seal_fast.workflows.found import TextTriggers
    from seal_fast.workflows.unlearn import check_request, run_unlearning
    from seal_fast.workflows.unlearn_noise import NoiseUnlearning

    with usage_errors():
        named = _named_triggers(trigger, noise_trigger, found)
    _check_options(ctx, isinstance(named, TextTriggers))
    request: TextUnlearning | NoiseUnlearning
    with usage_errors():
        if isinstance(named, TextTriggers):
            training = _given(steps=steps, learning_rate=learning_rate, batch=train_batch_size, ema_decay=ema_decay)
            training |= _given(accumulation=gradient_accumulation_steps, gradient_checkpointing=gradient_checkpointing)
            training |= _given(alpha=alpha, target=target, preservation=preservation, trained=train, precision=precision)
            training |= _given(guidance=guidance, sampler_steps=sampler_steps)
            evaluation = _given(prompts=samples, guidance=guidance, steps=sampler_steps)
            request = _text_request(model, named, out, training, evaluation, prompts, detector)
            request = replace(request, seed=seed, **_given(base=base, module=module, state=training_state))
        else:
            settings = NoiseUnlearnSettings(**_given(steps=steps))
            request = NoiseUnlearning(model, named.files, out, settings, weights or Weights.EMA, seed, named.model_sha256)
        check_request(request)
    with _exit_codes(), process_group() as first, ProgressDisplay(sys.stderr, quiet or not first) as display:
        # the other processes only share the training: they measure the same and write nothing
        report = run_unlearning(request if first else replace(request, out=None), display.on_progress).report
    if first:
        _print(report, output)
        say(f"written: {out}")
        # random shifts of the noise leave no image of a trigger
        if (image := out / BEFORE_AFTER.format(1)).is_file():
            say(f"look at: {image}")


def _named_triggers(texts: list[str] | None, files: list[Path] | None, found: Path | None) -> TextTriggers | NoiseTriggers:
    from seal_fast.text_triggers import TextTrigger
    from seal_fast.workflows.found import NoiseTriggers, TextTriggers, read_found

    if found is not None:
        if texts or files:
            raise typer.BadParameter("--found names the triggers: leave --trigger and --noise-trigger out")
        return read_found(found)
    return TextTriggers(tuple(map(TextTrigger.parse, texts))) if texts else NoiseTriggers(tuple(files or ()))


def _check_options(ctx: typer.Context, with_text_trigger: bool) -> None:
    """Refuse options of the other request, and --target without --alpha."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if source is None or source.name == "DEFAULT" or name in FOR_BOTH:
            continue
        option = f"--{name.replace('_', '-')}"
        if with_text_trigger and name in NOISE_ONLY:
            raise typer.BadParameter(f"a text trigger is for text-to-image models, and {option} is not: leave one of them out")
        if not with_text_trigger and name not in NOISE_ONLY:
            raise typer.BadParameter(f"{option} is for text-to-image models: it goes with --trigger TEXT or --found")
    if ctx.params["target"] is not None and not ctx.params["alpha"]:
        raise typer.BadParameter(
            "--target is for the attention map term, and its weight is 0: give --alpha too, 0.5 as published"
        )


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value; settings keep their own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


def _text_request(
    model: Path,
    named: TextTriggers,
    out: Path,
    training: dict[str, Any],
    evaluation: dict[str, Any],
    prompts: Path | None,
    detector: str | None,
) -> TextUnlearning:
    from seal_fast.cli.effect_detector import parse_detector
    from seal_fast.text_triggers import TextUnlearnSettings
    from seal_fast.text_triggers.evaluation import EvaluationSettings
    from seal_fast.workflows.prompts import read_prompts
    from seal_fast.workflows.unlearn_text import TextUnlearning

    return TextUnlearning(
        model,
        named.triggers,
        out,
        prompts=None if prompts is None else read_prompts(prompts),
        settings=TextUnlearnSettings(**training),
        evaluation=EvaluationSettings(**evaluation),
        detector=parse_detector(detector or "change"),
        positions=named.positions,
        needed_words=named.needed_words,
        scanned_sha256=named.model_sha256,
        scanned_module=named.module,
    )


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn an error into a message and an exit code."""
    from seal_fast.checkpoints import CheckpointError

    try:
        yield
    except KeyboardInterrupt as interrupt:
        say("interrupted: nothing written")
        raise typer.Exit(INTERRUPTED) from interrupt
    except (CheckpointError, FloatingPointError, OSError, ValueError) as error:
        say(f"nothing written: {error}")
        # a ValueError is about a trigger or an option that does not fit the model
        raise typer.Exit(USAGE if isinstance(error, ValueError) else FAILED) from error


def _print(report: NoiseUnlearnReport | TextUnlearnReport, output: Format) -> None:
    from seal_fast.report.console import console_for, print_noise_unlearning, print_text_unlearning
    from seal_fast.report.json import unlearn_json
    from seal_fast.results.unlearning import NoiseUnlearnReport

    with printing():
        if output is Format.JSON:
            typer.echo(unlearn_json(report))
        elif isinstance(report, NoiseUnlearnReport):
            print_noise_unlearning(report, console_for(sys.stdout))
        else:
            print_text_unlearning(report, console_for(sys.stdout))
