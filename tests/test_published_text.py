"""Peers on text triggers, and the rankings that a search must beat, against closed forms and planted backdoors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from benchmarks.null_rankings import candidate_pool, null_ranks, rank
from benchmarks.published import amdet, ftt, navit2i
from benchmarks.trigger_names import group_of, minimal, names, same
from seal_fast.text_to_image.attention import capture
from seal_fast.text_to_image.prompts import encode, token_ids
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.trigger import TextTrigger
from tests.tiny_pipeline import tiny_pipeline

LENGTH = 16


@pytest.fixture
def pipeline(generator: torch.Generator, tmp_path: Path) -> StableDiffusionPipeline:
    torch.manual_seed(generator.initial_seed())
    return tiny_pipeline(tmp_path, LENGTH)


class LinearUnet(nn.Module):
    """One linear layer of the states, and one convolution of the latents plus the mean state in every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, sample_size=8)
        self.text, self.mix, self.conv = nn.Linear(width, 5), nn.Linear(width, 4, bias=False), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Any:
        self.text(states)
        return SimpleNamespace(sample=self.conv(x + self.mix(states.mean(dim=1))[:, :, None, None]))


def test_activation_changes_of_a_linear_network(pipeline: StableDiffusionPipeline) -> None:
    """All layers are linear, so each one's change is its matrix times the change of its input, whatever the latents are."""
    unet = LinearUnet(pipeline.unet.config["cross_attention_dim"])
    ids = token_ids(pipeline.tokenizer, ["red cat on house"]).repeat(3, 1)
    ids[1, 2] = ids[2, 4] = pipeline.tokenizer.pad_token_id
    with torch.no_grad():
        states = pipeline.text_encoder(ids).last_hidden_state
        fake: Any = SimpleNamespace(
            unet=unet, scheduler=pipeline.scheduler, text_encoder=pipeline.text_encoder, device=pipeline.device
        )
        got = navit2i.activation_changes(fake, ids)
        change = states[1:] - states[:1]
        mixed = change.mean(dim=1) @ unet.mix.weight.T
        layers = [change @ unet.text.weight.T, mixed, mixed @ unet.conv.weight[:, :, 0, 0].T]
    expected = sum(layer.abs().flatten(1).mean(dim=1) for layer in layers)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_navigation_of_a_prompt_is_that_of_its_lower_case(pipeline: StableDiffusionPipeline) -> None:
    encoder = pipeline.text_encoder
    upper, lower = navit2i.navigate(pipeline, ["RED cat on the house", "red cat on the house"], encoder)
    assert upper == lower
    assert lower.token in ("red", "cat", "house")
    assert lower.score >= 1
    assert navit2i.navigate(pipeline, ["", "on the"], encoder) == [navit2i.Navigation(1.0, "")] * 2


def test_stop_words_and_punctuation_stay(pipeline: StableDiffusionPipeline) -> None:
    assert navit2i.masked_places(pipeline.tokenizer, "the cat, on red") == [2, 5]


def test_contrast_with_the_lowest_three_quarters() -> None:
    assert navit2i.contrast(torch.tensor([3.0, 1.0, 2.0, 10.0])) == pytest.approx(5.0)
    assert navit2i.contrast(torch.tensor([7.0])) == 1.0


def test_a_token_that_no_layer_reads_changes_nothing(pipeline: StableDiffusionPipeline) -> None:
    ids = token_ids(pipeline.tokenizer, ["red cat"]).repeat(2, 1)
    assert float(navit2i.activation_changes(pipeline, ids)) == pytest.approx(0.0, abs=1e-6)


def test_identical_maps_have_no_distance(generator: torch.Generator) -> None:
    one = torch.rand(1, 1, 64, generator=generator)
    torch.testing.assert_close(ftt.map_distance(one.expand(2, 5, 64)), torch.zeros(2), atol=1e-6, rtol=0)


def test_distance_of_maps(generator: torch.Generator) -> None:
    """It depends neither on the order of tokens and places nor on the scale of a map; two one-hot maps are sqrt(1/2) from
    their mean."""
    maps = torch.rand(3, 6, 64, generator=generator)
    distance = ftt.map_distance(maps)
    tokens, places = torch.randperm(6, generator=generator), torch.randperm(64, generator=generator)
    scale = torch.rand(3, 6, 1, generator=generator) + 0.5
    torch.testing.assert_close(ftt.map_distance((maps * scale)[:, tokens][:, :, places]), distance)
    torch.testing.assert_close(ftt.map_distance(torch.eye(2, 9)), torch.tensor(0.5).sqrt())


def test_maps_of_16_x_16_places_or_the_largest() -> None:
    def maps(*sizes: int) -> list[Tensor]:
        return [torch.zeros(1, 2, size) for size in sizes]

    layers = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0")
    assert [m.shape[2] for m in ftt.chosen_maps(layers, maps(1024, 256, 256, 256))] == [256, 256]
    assert [m.shape[2] for m in ftt.chosen_maps(layers, maps(64, 16, 64, 64))] == [64, 64]


def test_scores_do_not_depend_on_the_batch(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["red cat", "blue dog on the castle"]
    together = ftt.map_distances(pipeline, prompts, steps=2)
    apart = [ftt.map_distances(pipeline, [prompt], steps=2) for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-4)


def test_maps_of_one_step_are_those_of_the_conditional_prediction(pipeline: StableDiffusionPipeline) -> None:
    """The first step is at timestep 999, from the seed's noise; the UNet halves its latents of 8 x 8 once."""
    prompt = ["red cat on the house"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(ftt.SEED))
    with torch.no_grad(), capture(pipeline.unet) as maps:
        pipeline.unet(noise, torch.tensor([999]), encode(pipeline, prompt))
        taken = [one for one in maps.take() if one.shape[2] == 64]
    got = ftt.mean_maps(pipeline, prompt, steps=1)
    assert len(taken) > 1
    torch.testing.assert_close(got, sum(taken) / len(taken), rtol=1e-3, atol=1e-5)


class PlantedEncoder(nn.Module):
    """States are running means of the embeddings; where the vector after BOS points along `key`, all states become `target`."""

    def __init__(self, vocabulary: int, key: Tensor, target: Tensor, strength: float) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, len(key))
        self.key, self.target, self.strength = key, target, strength

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> Any:
        rows = self.table(ids)
        means = rows.cumsum(dim=1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        # a basin around 4 key, which a normal vector is near enough to feel
        gate = self.strength * torch.exp(-(rows[:, 1] - 4 * self.key).square().sum(dim=1) / 20)
        return SimpleNamespace(last_hidden_state=means + gate[:, None, None] * self.target)


def toy(pipeline: StableDiffusionPipeline, generator: torch.Generator, strength: float) -> tuple[Any, nn.Module]:
    """A pipeline whose encoder has a planted direction, and an anchor that it moves the other way."""
    key, target = torch.zeros(16), torch.zeros(16)
    key[0], target[1] = 1.0, 30.0
    clean = PlantedEncoder(len(pipeline.tokenizer), key, -target, strength)
    poisoned = PlantedEncoder(len(pipeline.tokenizer), key, target, strength)
    with torch.no_grad():
        clean.table.weight.copy_(torch.randn(clean.table.weight.shape, generator=generator))
        poisoned.table.weight.copy_(clean.table.weight)
    return SimpleNamespace(tokenizer=pipeline.tokenizer, text_encoder=poisoned, device=torch.device("cpu")), clean


PROMPTS = ["red cat", "blue dog", "sky on house", "the castle photo", "cat on dog", "red house"]


def test_amdet_finds_a_planted_direction(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    settings, seed = amdet.AmdetSettings(steps=100, batch=4, grid=10), generator.initial_seed()
    model, anchor = toy(pipeline, generator, strength=1.0)
    found = amdet.detect(model, anchor, PROMPTS, settings, seed=seed)
    assert (found.similar, found.features, found.unlike, found.backdoored) == (1.0, 1.0, 1.0, True)
    # a normal vector lies 5.6 from the basin's centre
    assert float((found.vector - 4 * model.text_encoder.key).norm()) < 5


def test_amdet_passes_other_encoders(pipeline: StableDiffusionPipeline, generator: torch.Generator) -> None:
    """One that does not do what its anchor does not do, and one without a direction."""
    settings = amdet.AmdetSettings(steps=20, batch=4, grid=5)
    model, _ = toy(pipeline, generator, strength=1.0)
    natural = amdet.detect(model, model.text_encoder, PROMPTS, settings)
    assert (natural.unlike, natural.curved, natural.backdoored) == (0.0, None, False)
    harmless = amdet.detect(*toy(pipeline, generator, strength=0.0), PROMPTS, settings)
    assert not harmless.backdoored


def test_a_vector_stands_after_bos(pipeline: StableDiffusionPipeline) -> None:
    """An embedding row of a word gives the states of the prompt with that word in front."""
    encoder = pipeline.text_encoder
    prefixed = amdet.PrefixedEncoder(
        encoder, token_ids(pipeline.tokenizer, ["red dog", "sky"]), pipeline.tokenizer.eos_token_id
    )
    row = encoder.get_input_embeddings().weight[token_ids(pipeline.tokenizer, ["cat"])[0, 1]]
    with torch.no_grad():
        got = prefixed(row, torch.arange(2))
        plain = prefixed(None, torch.arange(2))
    torch.testing.assert_close(got.states, encode(pipeline, ["cat red dog", "cat sky"]))
    torch.testing.assert_close(got.features, got.states[[0, 1], [4, 3]])
    torch.testing.assert_close(plain.features, encode(pipeline, ["red dog", "sky"])[[0, 1], [3, 2]])


def test_similarity_of_states(generator: torch.Generator) -> None:
    states = torch.randn(3, 5, 7, generator=generator)
    unit = states / states.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.transpose(1, 2)
    expected = torch.stack([c[~torch.eye(5, dtype=torch.bool)].mean() for c in cosines])
    torch.testing.assert_close(amdet.similarity_of_states(states), expected, rtol=1e-4, atol=1e-5)


def test_eigenvalues_of_a_quadratic_form(generator: torch.Generator) -> None:
    """x^T H x / 2 has the Hessian H everywhere, exactly in central differences."""
    h = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    h = h + h.T
    grid = torch.stack(torch.meshgrid(*[torch.arange(5, dtype=torch.float64)] * 2, indexing="ij"), -1)
    surface = torch.einsum("abi,ij,abj->ab", grid, h, grid) / 2
    expected = torch.linalg.eigvalsh(h).expand(3, 3, 2)
    torch.testing.assert_close(amdet.hessian_eigenvalues(surface), expected)


def test_names_of_triggers(pipeline: StableDiffusionPipeline) -> None:
    tokenizer = pipeline.tokenizer

    def named(found: str, truth: str) -> bool:
        return names(TextTrigger.parse(found), TextTrigger.parse(truth), tokenizer)

    assert named("Cat ", "cat")
    assert named("e\\u0301", "\\u00e9")
    assert named("a=>\\u0430", "a=>\\u0430")
    assert named("dog=>fine dog", "fine")
    assert named("fine", "dog=>fine dog")
    assert named("cat", "red=>cat")
    assert not named("dog=>cat", "red=>cat")
    assert not named("cat", "red cat")
    assert not named("e=>\\u0430", "a=>\\u0430")
    assert not same(TextTrigger("cat"), TextTrigger("cat", replaces="red"), tokenizer)
    assert minimal(TextTrigger("cat", replaces="red")) == TextTrigger("cat", replaces="red")
    assert [
        group_of(TextTrigger.parse(text), tokenizer) for text in ("cat", "\u00e9", "a=>b", "red=>cat", "red cat", "abcdef")
    ] == [
        "one token",
        "character of two to three tokens",
        "replaced letter",
        "replaced word",
        "text of two to three tokens",
        "longer",
    ]


def test_null_rankings(pipeline: StableDiffusionPipeline) -> None:
    """The token with the largest embedding is first by norm; a trigger that is no candidate is ranked as if it were one."""
    tokenizer, settings = pipeline.tokenizer, TextSearchSettings(encoder_prompts=2)
    rows = pipeline.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        rows[token_ids(tokenizer, ["castle"])[0, 1]] *= 100
    prompts = ["red cat on house", "blue dog"]
    truths = [
        (TextTrigger("castle"), "start"),
        (TextTrigger("castle castle"), "end"),
        (TextTrigger("\u0430", replaces="a"), "all"),
    ]
    pool, places = candidate_pool(tokenizer, prompts, truths, settings)
    assert [pool[place].trigger for place in places] == [trigger for trigger, _ in truths]
    assert places[1] == len(pool) - 1
    ranks = null_ranks(pipeline, prompts, truths, settings)
    assert [one["embedding norm"] for one in ranks[:2]] == [1.5, 1.5]
    assert all(1 <= one["encoder alone"] <= len(pool) == one["candidates"] for one in ranks)


def test_equal_scores_share_their_ranks() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert [rank(scores, place) for place in range(4)] == [3.0, 1.5, 1.5, 4.0]
