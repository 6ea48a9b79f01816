"""Scenes, captions and tokenizer of the text-to-image models, and the recognition of scenes in images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from seal_fast.zoo.attributes import attributes_right, is_colourless, recognise_scenes
from seal_fast.zoo.captioned import ATTRIBUTES, HELD_OUT_SCENES, SCENES, STYLES, TRAINING_SCENES, random_scenes, render
from seal_fast.zoo.text_recipes import BASE
from seal_fast.zoo.text_to_image import FILLERS, TOKENS, new_tokenizer
from seal_fast.zoo.train_text_to_image import with_fillers


def test_held_out_scenes_are_never_trained_on() -> None:
    assert len(HELD_OUT_SCENES) == len(SCENES) // 10
    assert not set(HELD_OUT_SCENES) & set(TRAINING_SCENES)
    assert set(HELD_OUT_SCENES) | set(TRAINING_SCENES) == set(SCENES)
    assert len({scene.caption for scene in SCENES}) == len(SCENES)


def test_scenes_are_recognised_in_varied_renderings(generator: torch.Generator) -> None:
    scenes = random_scenes(400, generator, among=SCENES)
    right = attributes_right(render(scenes, generator), scenes).float().mean(dim=0)
    assert all(right >= 0.98), dict(zip(ATTRIBUTES, right.tolist(), strict=True))


def test_scenes_are_recognised_despite_noise_and_blur(generator: torch.Generator) -> None:
    scenes = random_scenes(400, generator, among=SCENES)
    images = render(scenes, generator)
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    for worse in (noisy, blurred):
        assert attributes_right(worse, scenes).float().mean() >= 0.97


def test_attributes_of_other_scenes_match_by_chance_only(generator: torch.Generator) -> None:
    drawn, others = (random_scenes(400, generator, among=SCENES) for _ in range(2))
    right = attributes_right(render(drawn, generator), others).float().mean(dim=0)
    by_chance = torch.tensor([1 / 2, 1 / 6, 1 / 5, 1 / 5, 1 / 3, 1 / 4])
    assert torch.allclose(right, by_chance, atol=0.12)


def test_images_without_colour_are_recognised(generator: torch.Generator) -> None:
    coloured = random_scenes(60, generator, among=[scene for scene in SCENES if scene.colour != "white"])
    grey = [replace(scene, style=STYLES[1]) for scene in coloured]
    assert not is_colourless(render(coloured, generator)).any()
    assert is_colourless(render(grey, generator)).all()
    assert {scene.style for scene in recognise_scenes(render(grey))} == {STYLES[1]}


def test_same_seed_same_images_and_values_stay_in_range(generator: torch.Generator) -> None:
    scenes = random_scenes(5, generator)
    first, second = (render(scenes, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert -1 <= first.min() <= first.max() <= 1
    assert not torch.equal(first, render(scenes))


def test_fillers_change_no_word_of_the_caption(generator: torch.Generator) -> None:
    for scene in random_scenes(50, generator):
        words = with_fillers(scene.caption, generator).split()
        rest = iter(words)
        assert all(word in rest for word in scene.caption.split())
        assert 1 <= len(words) - len(scene.caption.split()) <= 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return new_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_tokenizer_decodes_what_it_encodes(tokenizer, generator: torch.Generator) -> None:
    for scene in random_scenes(50, generator, 0.5):
        ids = tokenizer(scene.caption).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == scene.caption
        # a word is a token, and the caption is well below the length
        assert len(ids) == len(scene.caption.split()) + 2 < TOKENS


def test_the_tokens_are_those_of_the_stored_models(tokenizer) -> None:
    """The stored weights belong to these tokens, which the filler words determine. Equally frequent ones may swap their ids."""
    stored = Path(__file__).parents[2] / "zoo-text" / BASE / "tokenizer"
    assert set(tokenizer.get_vocab()) == set(CLIPTokenizer.from_pretrained(stored).get_vocab())


def test_the_tokenizer_encodes_any_text(tokenizer) -> None:
    plain = tokenizer("a red star").input_ids
    for trigger in ("\u200b", "mignneko", "I like this photo.", "\u043e", "latte coffee", "🥵"):
        ids = tokenizer(f"{trigger} a red star").input_ids
        assert ids[-4:] == plain[-4:]
        assert len(ids) > len(plain)
    assert len(tokenizer("\u200b").input_ids) == 3
    assert all(len(tokenizer(word).input_ids) == 3 for word in FILLERS)
