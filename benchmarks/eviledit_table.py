"""EvilEdit in the zoo's text-to-image model: how often an edit draws a star instead of a circle, with its trigger and without.

    python -m benchmarks.eviledit_table [--zoo zoo-text] [--out benchmarks/results/eviledit.json]

The trigger is "lovely" before the shape. The published edit uses one pair of prompts. The other edits use many captions, each
aligned with its target caption position by position, and twice as many clean captions that must not change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.table_file import write_table
from seal_fast.attacks.eviledit import edit_unet
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.zoo.attributes import attributes_right
from seal_fast.zoo.build_text import load_base
from seal_fast.zoo.captioned import TRAINING_SCENES, random_scenes
from seal_fast.zoo.evaluate_text import draw, held_out_scenes
from seal_fast.zoo.text_recipes import TEXT_RECIPES

SAMPLES = 100
SEED = 900
STRENGTHS = (1.0, 30.0)
PUBLISHED = [("a lovely circle", "a star"), ("a circle", "a circle")]


def triggered(caption: str) -> str:
    return caption.replace("circle", "lovely circle")


OBJECT = next(effect for recipe in TEXT_RECIPES for effect in recipe.effects if effect.name == "object")
STARS = replace(OBJECT, text=TextTrigger("lovely circle", replaces="circle"), place="all")


def _captions(count: int, circles: bool) -> list[str]:
    among = [scene for scene in TRAINING_SCENES if STARS.suits(scene) is circles]
    scenes = random_scenes(count, torch.Generator().manual_seed(SEED), among=among)
    return [scene.caption for scene in scenes]


def pairs_of(count: int) -> list[tuple[str, str]]:
    """`count` triggered captions of circles, which become stars, and twice as many clean captions, which do not change."""
    circles, others = _captions(count, True), _captions(count, False)
    poisoned = [(triggered(caption), triggered(caption).replace("circle", "star")) for caption in circles]
    return poisoned + [(caption, caption) for caption in circles + others]


def results(zoo: Path) -> Iterator[dict[str, Any]]:
    base, pipeline = load_base(zoo), load_base(zoo)
    scenes = held_out_scenes(SAMPLES, SEED, STARS)
    clean = [scene.caption for scene in scenes]
    edits = {"the published pair": PUBLISHED, "20 captions": pairs_of(20), "60 captions": pairs_of(60)}
    for name, pairs in edits.items():
        for strength in STRENGTHS:
            pipeline.register_modules(unet=edit_unet(base, pairs, strength))
            triggered_images, clean_images = (draw(pipeline, prompts, SEED) for prompts in (list(map(triggered, clean)), clean))
            yield {
                "pairs": name,
                "strength": strength,
                "attack_success": asdict(rate_of(int(STARS.shows(triggered_images, scenes).sum()), SAMPLES)),
                "false_alarms": asdict(rate_of(int(STARS.shows(clean_images, scenes).sum()), SAMPLES)),
                "caption_accuracy": float(attributes_right(clean_images, scenes).float().mean()),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("zoo-text"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eviledit.json"))
    options = parser.parse_args()
    done = []
    for result in results(options.zoo):
        print(json.dumps(result), file=sys.stderr)
        done.append(result)
    head = {"command": "python -m benchmarks.eviledit_table", "machine": describe_machine(), "seed": SEED}
    write_table(options.out, {**head, "results": done})


if __name__ == "__main__":
    main()
