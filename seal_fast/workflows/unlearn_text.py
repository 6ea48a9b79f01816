"""One unlearning of text triggers: load, find the module, train, measure on unseen prompts, write."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from seal_fast.checkpoints.card import CARD
from seal_fast.checkpoints.save import check_target, whole_folder
from seal_fast.checkpoints.text_to_image import COMPONENTS, LoadedPipeline, load_pipeline, save_pipeline
from seal_fast.report.figures import draw_attention, draw_samples
from seal_fast.report.json import unlearn_json
from seal_fast.report.model_card import text_unlearn_card
from seal_fast.results.environment import environment, tool
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.text_unlearning import TextUnlearnReport, TriggerTokens
from seal_fast.text_to_image import attention_maps
from seal_fast.text_triggers import Distilled, TextUnlearnSettings, Trigger, distill, prompt_pair
from seal_fast.text_triggers.effect_detectors import EffectDetector
from seal_fast.text_triggers.evaluation import EvaluationSettings, Examples, evaluate
from seal_fast.text_triggers.locate import COLLAPSES, fitting, locate
from seal_fast.text_triggers.trained_part import save_patch
from seal_fast.text_triggers.variants import name_of
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.text_request import choose_prompts
from seal_fast.workflows.unlearn_noise import IMAGE, peak_memory

ATTENTION = "attention_{}.png"
"""Name of a trigger's attention maps, numbered in the order given."""
PATCH = "pytorch_lora_weights.safetensors"
"""Name of the low-rank change alone, which stock diffusers loads; the model beside it has it merged."""
STAGES = {"images": (0.0, 0.1), "training": (0.1, 0.25), "measuring": (0.35, 0.6)}
"""Where each begins in a run with the defaults, and its share."""

Module = Literal["auto", "unet", "text_encoder"]


@dataclass(frozen=True)
class TextUnlearnResult:
    """The trained pipeline, which shares the untouched modules with the given one, and the report."""

    pipeline: Any
    report: TextUnlearnReport


def _tokens(tokenizer: Any, trigger: Trigger, prompts: Sequence[str]) -> TriggerTokens:
    """Raises ValueError if the tokenizer does not see the trigger."""
    pair = prompt_pair(tokenizer, fitting(prompts, trigger)[0], trigger, "start", torch.Generator())
    seen = trigger if isinstance(trigger, str) else trigger[1]
    ids = tokenizer(seen, add_special_tokens=False).input_ids
    assert pair.clean_ids != pair.triggered_ids
    words = (str(token) for token in tokenizer.convert_ids_to_tokens(ids))
    return TriggerTokens(name_of(trigger), tuple(word.removesuffix("</w>") or word for word in words))


def _choose_module(
    loaded: LoadedPipeline, triggers: Sequence[Trigger], prompts: Sequence[str], module: Module
) -> tuple[Literal["unet", "text_encoder"], str]:
    at = locate(loaded.pipeline, triggers, prompts)
    found = (
        f"with the trigger the text encoder reads different prompts {at.collapse:.1f} times as alike as with harmless words; "
        f"above {COLLAPSES:.0f} it holds the backdoor"
    )
    if module != "auto":
        return module, f"asked for; {found}"
    if loaded.format in COMPONENTS:
        return COMPONENTS[loaded.format], f"it came alone; {found}"
    return at.module, found


def unlearn(
    model: Any,
    triggers: Sequence[Trigger],
    out: str | os.PathLike[str] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    settings: TextUnlearnSettings | None = None,
    module: Module = "auto",
    evaluation: EvaluationSettings | None = None,
    judge: EffectDetector | None = None,
    seed: int = 0,
    state: Path | None = None,
    on_progress: OnProgress = lambda at: None,
) -> TextUnlearnResult:
    """Unlearn text triggers from a text-to-image model by SKD-CAG (arXiv 2508.18235).

    Args:
        model: folder of a StableDiffusionPipeline, or of its UNet or text encoder alone; or a pipeline in memory, unchanged.
        triggers: texts, or pairs (old, new) of text and what replaces it.
        out: new folder for the checkpoint, report.json, README.md and images; whole or not at all. None keeps nothing.
        prompts: clean ones, half to train on and half to measure on, in turn; None for those of the pipeline's model card
            (`widget`) where it has at least FEWEST_CAPTIONS, else the shipped ones.
        base: folder of the pipeline that a component belongs to.
        settings: of the training; their `module` is overruled.
        module: what to train; "auto" for what came alone, else for the one that `seal_fast.text_triggers.locate` takes for the
            backdoor's.
        evaluation: how much is measured.
        judge: of the effect, see `seal_fast.text_triggers.effect_detectors`; None for one that knows nothing of the target.
        seed: of training and images.
        state: file to write as the training goes and to go on from, see `distill`.
        on_progress: called as the work goes on.

    Raises:
        CheckpointError: the model, the base or `out` is refused.
        ValueError: no trigger, one that the tokenizer does not see, or too few prompts.
        FloatingPointError: the training diverged.
        OSError: `out` cannot be written.
    """
    started = time.perf_counter()
    path = Path(model) if isinstance(model, str | os.PathLike) else None
    _check_request(triggers, path, out)
    at = Progress(path.name if path else type(model).__name__, 1, 1, "loading")
    on_progress(at)
    loaded = (
        load_pipeline(path, base=None if base is None else Path(base), device=default_device())
        if path
        else LoadedPipeline(model, "", "pipeline", ())
    )
    root = path if base is None else Path(base)
    training, held_out, source = choose_prompts(prompts, root)
    tokens = tuple(_tokens(loaded.pipeline.tokenizer, trigger, training) for trigger in triggers)
    chosen, reason = _choose_module(loaded, triggers, training, module)
    settings = replace(settings or TextUnlearnSettings(), module=chosen)
    evaluation = evaluation or EvaluationSettings()

    def on_step(stage: str, iteration: int, iterations: int, loss: float) -> None:
        begun, share = STAGES[stage]
        fraction = begun + share * iteration / iterations
        on_progress(replace(at, stage=stage, iteration=iteration, iterations=iterations, fraction=fraction))

    trained = distill(loaded.pipeline, triggers, training, settings, seed=seed, state=state, on_step=on_step)
    sealed = _with_module(loaded.pipeline, trained)
    measured, examples = evaluate(
        loaded.pipeline, sealed, triggers, held_out, evaluation, judge=judge, seed=seed, on_step=on_step
    )
    report = TextUnlearnReport(
        **vars(measured),
        **_training_figures(trained),
        model=at.model,
        sha256=loaded.sha256 or None,
        format=loaded.format,
        module=chosen,
        module_reason=reason,
        triggers=tokens,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(loaded.pipeline.device),
        tool=tool(),
        environment=environment(),
        config={
            "settings": asdict(settings),
            "evaluation": asdict(evaluation),
            "prompts": {"training": len(training), "held_out": len(held_out), "from": source},
            "seed": seed,
            "device": str(loaded.pipeline.device),
        },
        notes=loaded.notes,
    )
    if out is not None and path is not None:
        on_progress(replace(at, stage="writing", fraction=0.95))
        with whole_folder(Path(out)) as folder:
            save_pipeline(path, sealed, chosen, folder)
            if trained.patch is not None:
                save_patch(trained.patch, folder / PATCH)
            _draw(loaded.pipeline, sealed, examples, evaluation, seed, folder)
            (folder / "report.json").write_text(unlearn_json(report) + "\n", encoding="utf-8")
            (folder / CARD).write_text(text_unlearn_card(report), encoding="utf-8")
    return TextUnlearnResult(sealed, report)


def _check_request(triggers: Sequence[Trigger], path: Path | None, out: str | os.PathLike[str] | None) -> None:
    if not triggers:
        raise ValueError("name at least one trigger")
    if out is not None:
        if path is None:
            raise ValueError("out needs a checkpoint folder as model: a pipeline in memory has no files to keep")
        check_target(Path(out), path)


def _training_figures(trained: Distilled) -> dict[str, Any]:
    losses = {
        "prediction": trained.prediction_loss,
        "attention": trained.attention_loss,
        "preservation": trained.preservation_loss,
    }
    return {"losses": losses, "steps": trained.steps, "training_seconds": trained.seconds}


def _with_module(pipeline: Any, trained: Distilled) -> Any:
    parts = pipeline.components | {trained.module_name: trained.module}
    return type(pipeline)(**parts, requires_safety_checker=pipeline.config.requires_safety_checker)


def _draw(
    before: Any, after: Any, examples: Sequence[Examples], evaluation: EvaluationSettings, seed: int, folder: Path
) -> None:
    for number, one in enumerate(examples, 1):
        draw_samples(_rows(one), folder / IMAGE.format(number), one.prompts)
        maps = {
            name: attention_maps(
                pipeline, one.triggered_prompts[0], steps=evaluation.steps, guidance=evaluation.guidance, seed=seed
            )
            for name, pipeline in (("before", before), ("after", after))
        }
        draw_attention(maps, folder / ATTENTION.format(number))


def _rows(examples: Examples) -> dict[str, torch.Tensor]:
    rows = {
        "before: clean prompt": examples.clean_before,
        "before: with the trigger": examples.triggered_before,
        "after: with the trigger": examples.triggered_after,
        "after: clean prompt": examples.clean_after,
    }
    return {title: 2 * images - 1 for title, images in rows.items()}
