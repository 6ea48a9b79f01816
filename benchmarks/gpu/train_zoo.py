"""Train, measure and scan models too large for a CPU: 32 and 64 px, the architecture of google/ddpm-cifar10-32.

    python -m benchmarks.gpu.train_zoo OUT [--only NAME ...] [--keep-models] [--tiny]

For each size it trains a benign model from scratch, and fine-tunes it with BadDiffusion and with TrojDiff. Each model's result
is written to OUT/train_zoo.json as soon as it is known, so an interrupted run continues where it stopped. A result holds the
loss, attack success and quality of clean samples, and the default scan's verdict. The benign model stays in OUT until its
backdoored models are done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from benchmarks import machine
from benchmarks.gpu.device import device, peak_bytes
from benchmarks.gpu.reversion import cifar_unet
from benchmarks.gpu.scanning import BRIEF as BRIEF_SEARCH
from seal_fast import scan
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, SearchSettings, shipped_calibration
from seal_fast.zoo.build import save_pipeline
from seal_fast.zoo.evaluate import evaluate
from seal_fast.zoo.recipes import PROCESSES, Network, Recipe
from seal_fast.zoo.train import TRAINING_IMAGES, Schedule, train

SIZES = (32, 64)
BENIGN = Schedule(steps=5_000, learning_rate=2e-4, batch=128, ema_decay=0.999)
BACKDOOR = Schedule(steps=2_500, learning_rate=2e-4, batch=128, ema_decay=0.999)
ATTACKS = {
    "bad": ("baddiffusion-stamped", "box", "smiley"),
    "troj": ("trojdiff-blend", "cat_face", "heart"),
}
"""Method, trigger and target of the zoo's recipes, by name."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and how it is measured.

    Attributes:
        sizes: sides of the images.
        benign, backdoor: schedules of the models without and with a base.
        width: channels of the first level; 128 is the real one.
        groups: of the group norms.
        samples: per figure of attack success and of clean samples.
        training_images: number of training images.
        sampler_steps: sampling steps of the measurements; None for those of the zoo.
        settings: of the scan's reversion; None for those that are shipped.
    """

    sizes: tuple[int, ...] = SIZES
    benign: Schedule = BENIGN
    backdoor: Schedule = BACKDOOR
    width: int = 128
    groups: int = 32
    samples: int = 64
    training_images: int = TRAINING_IMAGES
    sampler_steps: int | None = None
    settings: SearchSettings | None = None


TINY = Plan(
    (8,),
    Schedule(3, 1e-3, 4),
    Schedule(2, 1e-3, 4),
    width=8,
    groups=4,
    samples=2,
    training_images=24,
    sampler_steps=3,
    settings=BRIEF_SEARCH,
)


def recipes(plan: Plan) -> list[Recipe]:
    """A benign model and its backdoored models, for each size."""
    found = []
    for number, size in enumerate(plan.sizes):
        network = Network(size, (plan.width,), plan.groups)
        base = Recipe(f"gpu-{size}", network, 9000 + 10 * number, plan.benign, "pipeline")
        found.append(base)
        for offset, (name, (method, trigger, target)) in enumerate(ATTACKS.items(), 1):
            seed = base.seed + offset
            backdoored = replace(base, name=f"{base.name}-{name}", seed=seed, schedule=plan.backdoor, base=base.name)
            found.append(replace(backdoored, method=method, trigger=trigger, target=target))
    return found


def initial(recipe: Recipe, plan: Plan, out: Path) -> UNet2DModel:
    torch.manual_seed(recipe.seed)
    unet: Any = cifar_unet(recipe.network.size, plan.width, plan.groups)
    if recipe.base is not None:
        unet.load_state_dict(load_denoiser(out / recipe.base).denoiser.network.state_dict())
    return unet.to(device())


def build(recipe: Recipe, plan: Plan, out: Path) -> dict[str, Any]:
    """Train, store in half precision, measure and scan one model."""
    process, attack, size = PROCESSES[recipe.process](), recipe.attack(), recipe.network.size

    def progress(step: int, loss: float) -> None:
        if step % 500 == 0 or step == recipe.schedule.steps:
            print(f"{recipe.name}: step {step}/{recipe.schedule.steps}, loss {loss:.4f}", file=sys.stderr, flush=True)

    unet, began = initial(recipe, plan, out), time.perf_counter()
    images = plan.training_images
    trained = train(unet, process, recipe.schedule, attack=attack, seed=recipe.seed, images=images, on_step=progress)
    seconds = time.perf_counter() - began
    quality = evaluate(
        Denoiser(trained.ema, process, (3, size, size)),
        attack,
        seed=recipe.seed,
        count=plan.samples,
        steps=plan.sampler_steps,
        training_images=images,
    )
    save_pipeline(trained.ema.half().cpu(), process, out / recipe.name)
    calibration = shipped_calibration(DEFAULT_PRESET)
    if plan.settings is not None:
        calibration = replace(calibration, settings=plan.settings)
    scanned: list[Any] = []
    peak = peak_bytes(lambda: scanned.extend(scan(out / recipe.name, calibration=calibration).models))
    (result,) = scanned
    return {
        "name": recipe.name,
        "size": size,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "method": recipe.method,
        "trigger": recipe.trigger,
        "target": recipe.target,
        "base": recipe.base,
        "seed": recipe.seed,
        "schedule": asdict(recipe.schedule),
        "training_seconds": seconds,
        "final_loss": trained.final_loss,
        "quality": asdict(quality),
        "usable": quality.usable,
        "verdict": str(result.verdict),
        "evidence": None if result.evidence is None else asdict(result.evidence),
        "reason": result.reason,
        "scan_seconds": result.seconds,
        "scan_peak_bytes": peak,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor_name(),
        "torch": torch.__version__,
        "commit": machine.commit(),
    }


def run(plan: Plan, out: Path, only: list[str] | None, keep_models: bool) -> None:
    """Train every model of the plan that OUT/train_zoo.json lacks."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "train_zoo.json"
    known = json.loads(path.read_text()) if path.exists() else []
    results: dict[str, Any] = {result["name"]: result for result in known}
    wanted = [recipe for recipe in recipes(plan) if only is None or recipe.name in only]
    for recipe in wanted:
        if recipe.name in results:
            continue
        if recipe.base is not None and not (out / recipe.base).exists():
            sys.exit(f"{recipe.name} is trained from {recipe.base}, which is not in {out}: train that first")
        results[recipe.name] = build(recipe, plan, out)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(list(results.values()), indent=1) + "\n")
        partial.replace(path)
    for recipe in [] if keep_models else recipes(plan):
        backdoored = [other.name for other in recipes(plan) if other.base == recipe.name]
        if recipe.name in results and all(name in results for name in backdoored):
            shutil.rmtree(out / recipe.name, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[recipe.name for recipe in recipes(Plan())], metavar="NAME")
    parser.add_argument("--keep-models", action="store_true", help="Keep the trained models (some 70 MB each).")
    parser.add_argument("--tiny", action="store_true", help="Use sizes that only prove that it runs.")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("torch sees no CUDA device, and a CPU would take weeks: run this with a GPU, or with --tiny")
    run(TINY if arguments.tiny else Plan(), arguments.out, arguments.only, arguments.keep_models)


if __name__ == "__main__":
    main()
