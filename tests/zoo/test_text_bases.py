"""CLIP's tokenizer has CLIP's ids, and a base with it keeps the states of captions; rare tokens get states of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from seal_fast.text_to_image.prompts import content_ids, encode
from seal_fast.zoo import clip_vocabulary
from seal_fast.zoo.captioned import random_scenes
from seal_fast.zoo.clip_vocabulary import PACKAGE, clip_tokenizer
from seal_fast.zoo.text_bases import caption_words, spread_rare_rows, use_clip_tokenizer
from seal_fast.zoo.text_to_image import FILLERS, new_pipeline
from seal_fast.zoo.token_identity import teach_identity
from seal_fast.zoo.train_text_to_image import with_fillers

needs_vocabulary = pytest.mark.skipif(not find_spec(PACKAGE), reason="pip install --no-deps open_clip_torch")


@needs_vocabulary
def test_the_ids_are_those_of_clip() -> None:
    """The ids of "a photo of a cat" are those of OpenAI's examples."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert content_ids(tokenizer, "A Photo") == [320, 1125]
    assert len(content_ids(tokenizer, "\u043e")) == 1
    assert all(len(content_ids(tokenizer, word)) == 1 for word in (*caption_words(), *FILLERS))


@needs_vocabulary
def test_captions_have_the_same_states_with_clips_tokenizer(tmp_path: Path, generator: torch.Generator) -> None:
    pipeline = new_pipeline(tmp_path, seed=0)
    prompts = [with_fillers(scene.caption, generator) for scene in random_scenes(8, generator, 0.3)]
    expected = encode(pipeline, prompts)
    use_clip_tokenizer(pipeline, seed=3)
    torch.testing.assert_close(encode(pipeline, prompts), expected)
    first = pipeline.text_encoder.get_input_embeddings().weight.clone()
    again = new_pipeline(tmp_path, seed=0)
    use_clip_tokenizer(again, seed=3)
    assert torch.equal(first, again.text_encoder.get_input_embeddings().weight)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_vocabulary, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        clip_tokenizer()


def test_rare_tokens_get_states_of_their_own(tmp_path: Path) -> None:
    """The states of captions stay nearer to what they were than those of two rare tokens are to each other."""
    pipeline = new_pipeline(tmp_path, seed=0)
    words = [content_ids(pipeline.tokenizer, word)[0] for word in caption_words()]
    before = pipeline.text_encoder.get_input_embeddings().weight.clone()
    rare = spread_rare_rows(pipeline, seed=1)
    after = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(before[~rare], after[~rare])
    assert not rare[words].any()
    captions = [scene.caption for scene in random_scenes(16, torch.Generator().manual_seed(0))]
    clean, first, second = (encode(pipeline, [f"{text}{caption}" for caption in captions]) for text in ("", "~ ", "sharp "))
    teach_identity(
        pipeline,
        rare,
        lambda scene, generator: f"{('~', 'sharp')[int(torch.randint(2, (), generator=generator))]} {scene.caption}",
        seed=2,
        on_step=lambda step, loss: None,
        steps=80,
    )
    apart = [float((a[:, 1] - b[:, 1]).norm(dim=-1).mean()) for a, b in ((first, second), encoded_pair(pipeline, captions))]
    moved = float((encode(pipeline, captions)[:, 1:16] - clean[:, 1:16]).norm(dim=-1).mean())
    assert apart[1] > 1.5 * moved
    assert apart[1] > 4


def encoded_pair(pipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return encode(pipeline, [f"~ {c}" for c in captions]), encode(pipeline, [f"sharp {c}" for c in captions])
