"""The strings that a search tries as triggers: single tokens, unusual characters, replaced letters, published triggers.

Users type strings, so every string goes through the pipeline's own tokenizer. Strings with equal token ids are one candidate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

CHARACTER_BLOCKS = (
    *((0x00A0, 0x0250), (0x0300, 0x0310), (0x0370, 0x0530), (0x0531, 0x0590), (0x05D0, 0x05EB), (0x0620, 0x064B)),
    *((0x0905, 0x093A), (0x0E01, 0x0E5C), (0x10D0, 0x10FB), (0x1E00, 0x1F00), (0x2000, 0x2070), (0x20A0, 0x20C0)),
    *((0x2100, 0x2150), (0x2190, 0x2200), (0x2580, 0x2650), (0xFE00, 0xFE10), (0xFEFF, 0xFF00), (0x1F300, 0x1F650)),
)
"""Ranges of code points that are tried by themselves: Latin letters with accents, combining marks, Greek, Cyrillic, Armenian,
Hebrew, Arabic, Devanagari, Thai, Georgian, invisible characters, spaces, punctuation, currencies, arrows, symbols and emoji."""
PUBLISHED = ("latte coffee", "mignneko", "sks", "....", "I like this photo.")
"""Triggers of published attacks: of VillanDiffusion's caption attack, and BadT2I's sentence. A large vocabulary has too many
phrases to try, and people who copy an attack keep its trigger."""
SKIPPED_CATEGORIES = ("Cn", "Co", "Cs", "Cc")
"""Unicode's unassigned, private, surrogate and control characters."""


def single_tokens(tokenizer: Any) -> list[str]:
    """Every string that the tokenizer makes exactly one token of, in the order of the ids.

    A token that only begins a longer word is none: no string gives it alone.
    """
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    texts = [tokenizer.decode([number]).strip() for number in ids]
    found = tokenizer(texts, add_special_tokens=False).input_ids
    return [text for text, number, back in zip(texts, ids, found, strict=True) if text and back == [number]]


def characters() -> Iterator[str]:
    """The characters of CHARACTER_BLOCKS and all lookalikes of Latin letters."""
    for first, end in CHARACTER_BLOCKS:
        for number in range(first, end):
            if unicodedata.category(chr(number)) not in SKIPPED_CATEGORIES:
                yield chr(number)
    for replacements in look_alikes().values():
        yield from replacements


@cache
def look_alikes() -> dict[str, str]:
    """Lower-case Latin letter -> characters that look like it: those of Unicode TR39, and the letter with accents.

    i and l share theirs.
    """
    lines = (files("seal_fast.text_triggers") / "data" / "look_alikes.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line.startswith("#"):
            continue
        letter, *numbers = line.split()
        accented = (chr(number) for number in range(0x80, 0x2000) if _is_accented(chr(number), letter))
        found[letter] = "".join(dict.fromkeys([*(chr(int(number, 16)) for number in numbers), *accented]))
    # to a reader these two letters are one, such as the Cyrillic palochka in place of either
    found["i"], found["l"] = ("".join(dict.fromkeys(found[a] + found[b])) for a, b in ("il", "li"))
    return found


def _is_accented(character: str, letter: str) -> bool:
    decomposed = unicodedata.normalize("NFD", character)
    return unicodedata.category(character) == "Ll" and len(decomposed) > 1 and decomposed[0] == letter


def distinct(tokenizer: Any, texts: Iterable[str]) -> dict[tuple[int, ...], str]:
    """Token ids -> the first of the texts that has them, in lower case if one is, without texts that the tokenizer drops."""
    unique = sorted(dict.fromkeys(texts), key=lambda text: text != text.lower())
    found: dict[tuple[int, ...], str] = {}
    for text, ids in zip(unique, tokenizer(unique, add_special_tokens=False).input_ids if unique else [], strict=True):
        if ids:
            found.setdefault(tuple(ids), text)
    return found


def words_of(prompts: Sequence[str]) -> list[str]:
    """The different words of the prompts in lower case, as tokenizers read them, the most frequent first."""
    counts: dict[str, int] = {}
    for prompt in prompts:
        for word in re.findall(r"[^\W_]+", prompt.lower()):
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: -counts[word])


def holds(prompt: str, word: str | None) -> bool:
    """Whether the prompt holds the word; every prompt holds None."""
    return word is None or word in words_of([prompt])


def with_more_holding(prompts: Sequence[str], words: Iterable[str | None]) -> list[str]:
    """The prompts, of which those that hold a word are repeated until they are about half, for every word in turn."""
    found = list(prompts)
    for word in words:
        held = [prompt for prompt in found if holds(prompt, word)]
        if held:
            found += held * (len(found) // len(held) - 2)
    return found


def kind_of(text: str, tokens: int) -> str:
    """The kind of strings that an inserted text compares with: "word", "symbol" or "character", and its token count.

    A character of one token counts as a symbol, since a small vocabulary has too few of them to compare with.
    """
    name = "symbol" if text.isascii() or tokens == 1 else "character"
    name = "word" if text.isascii() and text.isalpha() else name
    return f"{name} of {tokens} token{'' if tokens == 1 else 's'}"
