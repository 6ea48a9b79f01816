"""Prompts as a text encoder reads them: token ids and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from seal_fast.printable import printable


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids int64 [N,L] as the text encoder takes them: BOS, content, EOS, padding; cut to the tokenizer's length L."""
    length = tokenizer.model_max_length
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def content_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, without BOS, EOS and padding."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def beginning_read(tokenizer: Any, prompt: str) -> str:
    """What the text encoder reads of a prompt: as much of its beginning as fits between BOS and EOS."""
    room = tokenizer.model_max_length - 2
    if len(content_ids(tokenizer, prompt)) <= room:
        return prompt
    fits, too_long = 0, len(prompt)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        short = len(content_ids(tokenizer, prompt[:middle])) <= room
        fits, too_long = (middle, too_long) if short else (fits, middle)
    return prompt[:fits]


def token_text(tokenizer: Any, number: int) -> str:
    """The text of a token as a reader can see it: what cannot be printed is escaped, and a part of a character is its bytes.

    Such as "cat", the six characters of `\\u200b`, and "<E2 80>".
    """
    text, symbols = str(tokenizer.decode([number])), str(tokenizer.convert_ids_to_tokens(number)).removesuffix("</w>")
    # a vocabulary of bytes has a letter for each of them
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    if "\ufffd" in text and byte_of.keys() >= set(symbols):
        return f"<{' '.join(f'{byte_of[symbol]:02X}' for symbol in symbols)}>"
    # the decoder puts the space that ends a word behind it
    return printable(text.removesuffix(" "))


@torch.no_grad()
def encode(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """The text encoder's last hidden states [N,L,D] of N prompts."""
    return pipeline.text_encoder(token_ids(pipeline.tokenizer, prompts).to(pipeline.device)).last_hidden_state
