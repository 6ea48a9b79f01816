"""The table of unlearned text triggers: methods compared at equal updates, batch, prompts and seeds.

    python -m benchmarks.text_unlearning_table [--zoo zoo-text] [--only MODEL ...] [--methods NAME ...] [--seeds 0 1 2]
        [--out benchmarks/results/text_unlearning.json]

The result of each model, method and seed is written as soon as it is known, so an interrupted run continues where it stopped.
SETTINGS and STEADY were chosen on development models of an earlier zoo. By default the table has models of role test. All
figures are measured on the zoo's held-out tenth of scenes, on which neither models nor unlearning were trained. Models that are
not in `zoo-text/` can be rebuilt from their seeds with `seal-fast zoo build-text OUT --only NAME`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.published.skd_cag import SELF_KD, Distillation
from benchmarks.table_file import read_results, write_table
from seal_fast.attacks.eviledit import edit_unet
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers import TextUnlearnSettings, distill
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.zoo.attributes import attributes_right
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.build_text import load_base, load_poisoned
from seal_fast.zoo.captioned import TRAINING_SCENES, Scene, random_scenes
from seal_fast.zoo.evaluate_text import draw, held_out_scenes
from seal_fast.zoo.text_effects import as_decoded
from seal_fast.zoo.text_recipes import TEXT_RECIPES, Effect, TextRecipe

SETTINGS = TextUnlearnSettings(
    alpha=0.5,
    steps=100,
    batch=8,
    learning_rate=1e-3,
    preservation=0.0,
    precision="bf16",
    triggered_image_fraction=0.0,
    guidance=3.0,
    max_loss_weight=1.0,
    positions=("start",),
)
TRAINING_PROMPTS = 100
SAMPLES = 200
VARIANT_SAMPLES = 40
EVALUATION_SEED = 900


@dataclass(frozen=True)
class Task:
    """One unlearning."""

    poisoned: Any
    clean: Any
    effect: Effect
    prompts: Sequence[str]
    seed: int

    @property
    def text(self) -> str:
        """The trigger, for methods that know no replacement of letters."""
        assert self.effect.text.replaces is None
        return self.effect.text.text


def _distilled(changes: dict[str, Any], task: Task) -> nn.Module:
    return distill(task.poisoned, [task.effect.text], task.prompts, replace(SETTINGS, **changes), seed=task.seed).module


def _as_released(task: Task) -> nn.Module:
    """The released program. Its attention term has no gradient, so it is self-distillation on pure noise."""
    settings = replace(SELF_KD, batch=SETTINGS.batch, learning_rate=SETTINGS.learning_rate)
    run = Distillation(task.poisoned, task.text, settings, seed=task.seed)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(SETTINGS.steps):
        chosen = torch.randint(len(task.prompts), (SETTINGS.batch,), generator=generator)
        run.step([task.prompts[index] for index in chosen])
    return run.student.eval().requires_grad_(False)


def _clean_teacher(task: Task) -> nn.Module:
    """The paper's "fine-tune reversal": match the clean model's output for triggered prompts, on pure noise."""
    student = copy.deepcopy(task.poisoned.unet).train().requires_grad_(True)
    optimiser = torch.optim.Adam(student.parameters(), lr=SETTINGS.learning_rate)
    generator = torch.Generator().manual_seed(task.seed)
    states = encode(task.poisoned, [task.effect.trigger(prompt) for prompt in task.prompts])
    size = student.config["sample_size"]
    for _ in range(SETTINGS.steps):
        chosen = torch.randint(len(states), (SETTINGS.batch,), generator=generator)
        t = torch.randint(task.poisoned.scheduler.config.num_train_timesteps, (SETTINGS.batch,), generator=generator)
        x = torch.randn(SETTINGS.batch, student.config["in_channels"], size, size, generator=generator)
        with torch.no_grad():
            target = task.clean.unet(x, t, states[chosen]).sample
        optimiser.zero_grad(set_to_none=True)
        F.mse_loss(student(x, t, states[chosen]).sample, target).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
    return student.eval().requires_grad_(False)


def _erased(task: Task) -> nn.Module:
    """Closed form in the manner of UCE: the trigger's states map to the empty prompt's, those of clean prompts stay."""
    return edit_unet(task.poisoned, [(task.text, ""), *((prompt, prompt) for prompt in task.prompts)])


NOISE = {"latents": "noise"}
STEADY: dict[str, Any] = {"alpha": 0.0, "preservation": 1.0, "max_loss_weight": 20.0, "triggered_image_fraction": 0.25}
ENCODER: dict[str, Any] = {"alpha": 0.0, "preservation": 1.0, "module": "text_encoder"}
METHODS: dict[str, Callable[[Task], nn.Module]] = {
    "none": lambda task: task.poisoned.unet,
    "as released": _as_released,
    "SKD": partial(_distilled, {"alpha": 0.0}),
    "CAG noise": partial(_distilled, {"target": "noise"}),
    "CAG black": partial(_distilled, {"target": "black"}),
    "CAG random words": partial(_distilled, {"target": "random-words"}),
    "SKD, preservation": partial(_distilled, {"alpha": 0.0, "preservation": 1.0}),
    "CAG noise, preservation": partial(_distilled, {"target": "noise", "preservation": 1.0}),
    "CAG black, preservation": partial(_distilled, {"target": "black", "preservation": 1.0}),
    "CAG noise, pure noise": partial(_distilled, {"target": "noise", **NOISE}),
    "all positions": partial(_distilled, {"target": "black", "preservation": 1.0, "positions": ("start", "end", "word")}),
    "CAG black, preservation, 300 updates": partial(_distilled, {"target": "black", "preservation": 1.0, "steps": 300}),
    "SKD, preservation, loss weights, triggered images, 300 updates": partial(_distilled, {**STEADY, "steps": 300}),
    "SKD, preservation, loss weights, triggered images": partial(_distilled, STEADY),
    "clean teacher": _clean_teacher,
    "closed form": _erased,
    "text encoder": partial(_distilled, ENCODER),
    "text encoder, 300 updates": partial(_distilled, {**ENCODER, "steps": 300}),
}
"""Each method returns the unlearned module. `SETTINGS` hold unless a method says otherwise."""
ENCODER_METHODS = ("none", "SKD, preservation, loss weights, triggered images", "text encoder", "text encoder, 300 updates")
"""Methods for a backdoor in the text encoder. The UNet, trained against it, can only compensate."""


def suits(method: str, recipe: TextRecipe) -> bool:
    """Whether a method is compared on a model."""
    return (method in ENCODER_METHODS) if recipe.module == "text_encoder" else not method.startswith("text encoder")


def _variants(trigger: TextTrigger) -> dict[str, Callable[[str], str]]:
    """Forms of a trigger that a prompt may carry."""
    text, old = trigger.text, trigger.replaces
    if old is not None:
        return {
            "first only": lambda prompt: prompt.replace(old, text, 1),
            "last only": lambda prompt: text.join(prompt.rsplit(old, 1)),
        }
    return {
        "end": lambda prompt: f"{prompt} {text}",
        "middle": lambda prompt: _inside(prompt, text),
        "twice": lambda prompt: f"{text} {text} {prompt}",
        "upper case": lambda prompt: f"{text.upper()} {prompt}",
    }


def _inside(prompt: str, text: str) -> str:
    words = prompt.split()
    return " ".join([*words[: len(words) // 2], text, *words[len(words) // 2 :]])


def _shown(pipeline: Any, effect: Effect, trigger: Callable[[str], str], scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Triggered images, and whether each shows the effect."""
    images = draw(pipeline, [trigger(scene.caption) for scene in scenes], EVALUATION_SEED)
    return images, as_decoded(effect, pipeline.vae).shows(images, scenes)


def _right(images: Tensor, scenes: list[Scene]) -> float:
    return float(attributes_right(images, scenes).float().mean())


@cache
def _before(recipe: TextRecipe, effect: Effect, zoo: Path) -> Tensor:
    """Clean images of the poisoned model."""
    scenes = held_out_scenes(SAMPLES, EVALUATION_SEED, effect)
    return draw(load_poisoned(recipe, zoo), [scene.caption for scene in scenes], EVALUATION_SEED)


def measure(pipeline: Any, before: Tensor, effect: Effect) -> dict[str, Any]:
    """Unlearned triggers, correct attributes of triggered and clean images, and drift of clean images from `before`."""
    scenes = held_out_scenes(SAMPLES, EVALUATION_SEED, effect)
    triggered, shown = _shown(pipeline, effect, effect.trigger, scenes)
    clean = draw(pipeline, [scene.caption for scene in scenes], EVALUATION_SEED)
    few = scenes[:VARIANT_SAMPLES]
    variants = {
        name: asdict(rate_of(int((~_shown(pipeline, effect, form, few)[1]).sum()), len(few)))
        for name, form in _variants(effect.text).items()
    }
    return {
        "unlearned": asdict(rate_of(int((~shown).sum()), len(scenes))),
        "variants": variants,
        "caption_accuracy": _right(clean, scenes),
        "triggered_caption_accuracy": _right(triggered, scenes),
        "clean_drift": float((clean - before).square().mean() / before.var(dim=0).mean()),
    }


def unlearn_once(recipe: TextRecipe, effect: Effect, method: str, seed: int, zoo: Path) -> dict[str, Any]:
    """Unlearn one trigger by one method and measure."""
    poisoned = load_poisoned(recipe, zoo)
    scenes = random_scenes(
        TRAINING_PROMPTS, torch.Generator().manual_seed(1000 + seed), among=[s for s in TRAINING_SCENES if effect.suits(s)]
    )
    task = Task(poisoned, load_base(zoo), effect, [scene.caption for scene in scenes], seed)
    started = time.perf_counter()
    module = METHODS[method](task)
    seconds = time.perf_counter() - started
    unlearned = load_poisoned(recipe, zoo)
    unlearned.register_modules(**{"unet" if isinstance(module, type(unlearned.unet)) else "text_encoder": module})
    return {
        "model": recipe.name,
        "effect": effect.name,
        "role": recipe.role,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        **measure(unlearned, _before(recipe, effect, zoo), effect),
    }


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    # the machine of the first results: only seconds depend on it, and no table shows them
    machine = json.loads(path.read_text())["machine"] if path.exists() else describe_machine()
    document = {
        "command": "python -m benchmarks.text_unlearning_table",
        "machine": machine,
        "settings": asdict(SETTINGS),
        "samples": SAMPLES,
        "results": results,
    }
    write_table(path, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=Path("zoo-text"))
    parser.add_argument("--only", nargs="*", help="default: the zoo's poisoned models of role test")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_unlearning.json"))
    options = parser.parse_args()
    results = read_results(options.out)
    done = {(result["model"], result["effect"], result["method"], result["seed"]) for result in results}
    present = {entry["name"] for entry in read_manifest(options.zoo)}
    wanted = options.only or [recipe.name for recipe in TEXT_RECIPES if recipe.role == "test"]
    recipes = [recipe for recipe in TEXT_RECIPES if recipe.name in present.intersection(wanted)]
    for seed in options.seeds:
        for method in options.methods:
            for recipe in recipes:
                for effect in recipe.effects:
                    if not suits(method, recipe) or (recipe.name, effect.name, method, seed) in done:
                        continue
                    result = unlearn_once(recipe, effect, method, seed, options.zoo)
                    results.append(result)
                    _write(options.out, results)
                    _print(result)


def _print(result: dict[str, Any]) -> None:
    rate, captions, drift = result["unlearned"]["rate"], result["caption_accuracy"], result["clean_drift"]
    name = f"{result['model']} {result['effect']}, {result['method']}, seed {result['seed']}"
    print(f"{name}: unlearned {rate:.3f}, captions {captions:.3f}, drift {drift:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
