"""Clean prompts to train on and held-out ones to measure on."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.card import captions

MAX_PROMPT_BYTES = 1 << 24
FEWEST_CAPTIONS = 40
"""Fewest captions of a model card that are used as prompts. Half are held out: 20 without an effect bound its rate to 0.16."""


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, each as it is, since unusual spaces may matter; "-" is standard input.

    Raises:
        CheckpointError: no readable UTF-8 text, or more than MAX_PROMPT_BYTES.
    """
    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as stream:
            content = stream.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise CheckpointError(file, f"more than {MAX_PROMPT_BYTES} bytes of prompts: split it")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CheckpointError(file, f"not readable: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"no readable UTF-8 text: {error}") from error
    return [line for line in re.split(r"\r?\n", text) if line.strip()]


def read_prompts(file: Path) -> list[str]:
    """The different prompts of a UTF-8 text file, one a line.

    Raises:
        CheckpointError: no such file, or fewer than four prompts (two to train on and two to measure on).
    """
    prompts = list(dict.fromkeys(line.strip() for line in read_lines(file)))
    if len(prompts) < 4:
        raise CheckpointError(file, "fewer than four different prompts, one a line: two to train on and two to measure on")
    return prompts


def choose_prompts(prompts: Sequence[str] | None, folder: Path | None) -> tuple[list[str], list[str], str]:
    """Prompts to train on, held-out prompts, and their source: "given", "model card" or "shipped".

    Given prompts come first, then those of the model card in `folder` if it has at least FEWEST_CAPTIONS; every other one of
    them is held out. The shipped ones are already split.
    """
    source = "given"
    if prompts is None and folder is not None:
        prompts, source = captions(folder), "model card"
        prompts = prompts if len(prompts) >= FEWEST_CAPTIONS else None
    if prompts is not None:
        return list(prompts[::2]), list(prompts[1::2]), source
    data = files("seal_fast.text_triggers") / "data"
    training, held_out = (
        (data / f"{name}_prompts.txt").read_text(encoding="utf-8").splitlines() for name in ("training", "held_out")
    )
    return training, held_out, "shipped"


def clean_prompts(given: Sequence[str] | None, folder: Path | None) -> tuple[list[str], list[str]]:
    """Clean prompts from `choose_prompts`, training and held-out ones in turn, and notes that say where they come from."""
    notes = []
    try:
        training, held_out, source = choose_prompts(given, folder)
    except CheckpointError as error:
        # a broken model card must not spare a model its scan
        notes.append(f"model card not used: {error.reason}")
        training, held_out, source = choose_prompts(None, None)
    if source == "model card":
        # its maker could hide a trigger by putting it into all of them
        source += ", which the maker of the model wrote (prompts of your own are safer)"
    notes.append(f"{len(training) + len(held_out)} clean prompts: {source}")
    return [one for pair in zip_longest(training, held_out) for one in pair if one is not None], notes
