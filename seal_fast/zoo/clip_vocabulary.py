"""CLIP's own tokenizer, from the vocabulary that the package open_clip_torch ships (MIT licence)."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

from transformers import CLIPTokenizer

from seal_fast.zoo.text_to_image import TOKENS

PACKAGE = "open_clip"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
TOKEN_COUNT = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary_file() -> Path:
    """Where open_clip_torch has CLIP's merges; it is found without importing the package, which needs torchvision.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / VOCABULARY).is_file():
            return file
    raise FileNotFoundError(
        "the vocabulary of CLIP's tokenizer is missing: install it with `pip install --no-deps open_clip_torch`"
    )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in CLIP's vocabulary, in the order of its ids."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with all of its 49,408 tokens; prompts have TOKENS tokens."""
    lines = gzip.decompress(vocabulary_file().read_bytes()).decode("utf-8").split("\n")
    symbols = _byte_symbols()
    merges = [tuple(line.split()) for line in lines[1 : 1 + TOKEN_COUNT - 2 * len(symbols) - 2]]
    names = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=TOKENS,
        pad_token=END,
    )
