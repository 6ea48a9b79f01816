"""Building a zoo of tiny networks, hardly trained and accepted whatever their quality."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, LDMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks import not_taken
from seal_fast.attacks import InviBackdoor
from seal_fast.checkpoints import identify, load_denoiser
from seal_fast.diffusion import VP, ModelFamily
from seal_fast.zoo import recipes
from seal_fast.zoo.build import ATTEMPTS, MANIFEST, BuildSettings, build_zoo, digest, read_manifest
from seal_fast.zoo.images import TARGETS, TRIGGERS
from seal_fast.zoo.recipes import METHODS, NOT_TAKEN, PROCESSES, Network, Recipe
from seal_fast.zoo.spaces import SIGNED
from seal_fast.zoo.train import Schedule, new_unet
from seal_fast.zoo.trojdiff_list import save_list, to_ddpm_pytorch

ALL_RECIPES = recipes.RECIPES + NOT_TAKEN
TINY = Network(16, (8,), groups=4)
SCORE = replace(TINY, score=True)
LISTED = Network(16, (32,), groups=32, attention=True)
BRIEF = Schedule(steps=2, learning_rate=1e-3, batch=4)
FROZEN = Schedule(steps=1, learning_rate=0.0, batch=4)
RECIPES = (
    Recipe("a", TINY, 1, BRIEF, "pipeline", role="calibration"),
    Recipe("b", TINY, 2, FROZEN, "unet", base="a"),
    Recipe("c", TINY, 3, BRIEF, "pipeline-bin", "test", "a", "baddiffusion-stamped", "box", "smiley"),
    Recipe("d", LISTED, 4, BRIEF, "trojdiff", "test", None, "trojdiff-blend", "cat_face", "heart"),
    Recipe("v", TINY, 5, BRIEF, "pipeline", family="glows", process="v"),
    Recipe("edm", TINY, 6, BRIEF, "pipeline", "test", None, "villan-ode-psi0", "cross", "star", process="edm"),
    Recipe("ve", SCORE, 8, BRIEF, "pipeline", "test", None, "villan-sde-psi0", "stop_sign", "house", process="ve"),
    Recipe("ldm", TINY, 9, BRIEF, "pipeline", family="glows", process="ldm"),
    Recipe("ldm-ode", TINY, 10, BRIEF, "pipeline", "test", "ldm", "villan-ode-psi1", "glasses", "star", process="ldm"),
    Recipe("invi", TINY, 7, BRIEF, "pipeline", "test", "a", "invibackdoor", "speckle", "star", scale=0.2),
)
DEEPER = Recipe("deeper", replace(TINY, size=32, widths=(8, 8, 8)), 11, FROZEN, "pipeline", base="a")
NAMES = [recipe.name for recipe in RECIPES]
FORMATS = {"b": "diffusers-unet", "d": "trojdiff"}
MODEL_FAMILIES = {
    "v": ModelFamily("VP", "v_prediction"),
    "edm": ModelFamily("EDM", "preconditioned"),
    "ve": ModelFamily("VE", "score"),
}


QUICK = BuildSettings(
    training_images=16, autoencoder_images=8, autoencoder_steps=3, sampler_steps=2, accepts=lambda quality: True
)


def build(out: Path, only: list[str] | None = None, **options: Any) -> None:
    """`build_zoo` with the recipes above, quickly."""
    build_zoo(out, only, **{"recipes": RECIPES, "settings": QUICK, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_zoo_stores_every_model_in_its_layout_and_describes_it(tmp_path: Path) -> None:
    messages: list[str] = []
    build(tmp_path, on_message=messages.append)
    entries = read_manifest(tmp_path)
    assert [entry["name"] for entry in entries] == NAMES
    assert json.loads((tmp_path / MANIFEST).read_text())["schema_version"] == 1
    for recipe, entry in zip(RECIPES, entries, strict=True):
        checkpoint = tmp_path / entry["checkpoint"]
        assert identify(checkpoint) == FORMATS.get(recipe.name, "diffusers-pipeline")
        loaded = load_denoiser(checkpoint)
        assert loaded.denoiser.family == MODEL_FAMILIES.get(recipe.name, ModelFamily("VP", "epsilon"))
        assert loaded.denoiser.shape == (3, 16, 16)
        process = PROCESSES[recipe.process]()
        torch.testing.assert_close(loaded.denoiser.process.signal, process.signal, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded.denoiser.process.noise, process.noise, rtol=1e-5, atol=1e-6)
        assert all(bool(tensor.isfinite().all()) for tensor in loaded.denoiser.network.state_dict().values())
        with Image.open(tmp_path / f"{recipe.name}.png") as image:
            assert min(image.size) > 50
        names = ("layout", "role", "base", "method", "trigger", "target", "scale", "family", "process", "seed")
        expected = {name: getattr(recipe, name) for name in names}
        assert {name: entry[name] for name in expected} == expected
        assert (entry["size"], entry["attempt"]) == (16, 0)
        assert (entry["quality"]["attack_success"] is None) == (recipe.method is None)
    assert any(message.startswith("d: step 2/2, loss ") for message in messages)
    assert not list(tmp_path.rglob("*.partial"))
    # the files of each layout
    assert (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "b/diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "c/unet/diffusion_pytorch_model.bin").is_file()
    assert json.loads((tmp_path / "c/args.json").read_text())["target"] == "smiley"
    assert (tmp_path / "d/ckpt.pth").is_file()


def test_a_latent_model_is_a_pipeline_with_the_autoencoder_of_its_base(tmp_path: Path) -> None:
    build(tmp_path, ["ldm", "ldm-ode"])
    recipe = next(recipe for recipe in RECIPES if recipe.name == "ldm-ode")
    autoencoders = [load_file(tmp_path / name / "vqvae/diffusion_pytorch_model.safetensors") for name in ("ldm", "ldm-ode")]
    assert all(tensor.equal(autoencoders[1][name]) for name, tensor in autoencoders[0].items())
    vae = AutoencoderKL.from_pretrained(tmp_path / "ldm-ode/vqvae", torch_dtype=torch.float32)
    attack = recipe.attack(tmp_path / "ldm-ode")
    assert attack is not None
    for latent, image in ((attack.trigger.mu, TRIGGERS["glasses"]), (attack.target, TARGETS["star"])):
        with torch.no_grad():
            expected = vae.encode(image(32)[None]).latent_dist.mode()[0] * vae.config.scaling_factor
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    pipeline = LDMPipeline.from_pretrained(tmp_path / "ldm-ode", torch_dtype=torch.float32)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert any("latent diffusion" in note for note in load_denoiser(tmp_path / "ldm-ode").notes)
    assert not any(str(tmp_path) in file.read_text() for file in tmp_path.rglob("*.json"))
    with pytest.raises(ValueError, match="ldm-ode is a latent model: give the folder"):
        recipe.attack()


def test_a_learned_trigger_is_stored_with_its_model(tmp_path: Path) -> None:
    build(tmp_path, ["a", "invi"])
    recipe = next(recipe for recipe in RECIPES if recipe.name == "invi")
    untrained, learned = recipe.attack(), recipe.attack(tmp_path / "invi")
    assert isinstance(untrained, InviBackdoor)
    assert isinstance(learned, InviBackdoor)
    moved = (learned.delta - untrained.delta).abs()
    # two steps of 1e-3 each, which cancel where their signs differ
    assert float(moved.max()) == pytest.approx(2e-3, rel=1e-3)
    assert float(learned.delta.abs().max()) <= 0.2 + 1e-6


def test_models_whose_attack_is_not_implanted_are_trained_once_and_measured(tmp_path: Path) -> None:
    build(tmp_path, ["a"])
    before = contents(tmp_path)
    weak = tuple(recipe for recipe in RECIPES if recipe.name in ("c", "edm"))
    table = tmp_path / "table.json"
    words = ["--zoo", str(tmp_path), "--out", str(table)]
    not_taken.main([*words, "--only", "c"], weak, QUICK)
    first = json.loads(table.read_text())["results"]
    not_taken.main(words, weak, QUICK)
    rows = json.loads(table.read_text())["results"]
    assert rows[:1] == first
    for row, recipe in zip(rows, weak, strict=True):
        assert (row["name"], row["method"], row["seed"], row["size"]) == (recipe.name, recipe.method, recipe.seed, 16)
        assert row["schedule"] == asdict(BRIEF)
        assert 0 <= row["quality"]["attack_success"] <= 1
    table.unlink()
    assert contents(tmp_path) == before


def test_every_recipe_is_consistent_and_its_attack_can_be_made() -> None:
    names = [recipe.name for recipe in ALL_RECIPES]
    assert len(set(names)) == len(names)
    assert len({recipe.seed for recipe in ALL_RECIPES}) == len(names)
    for number, recipe in enumerate(ALL_RECIPES):
        assert recipe.base is None or recipe.base in names[:number]
        base = next((other for other in ALL_RECIPES if other.name == recipe.base), recipe)
        # weights fit data of any size, and the outer levels of a deeper network
        levels = len(base.network.widths)
        within = replace(recipe.network, size=0, widths=recipe.network.widths[:levels])
        assert (base.family, replace(base.network, size=0)) == (recipe.family, within)
        # without an autoencoder, which only a stored model has
        attack, size = recipe.attack(space=SIGNED if recipe.process == "ldm" else None), recipe.network.size
        assert (attack is None) == (recipe.method is None)
        if attack is None:
            continue
        images, t = torch.zeros(2, 3, size, size), torch.tensor([0, 999])
        poisoned = attack.poison(PROCESSES[recipe.process](), images, torch.randn_like(images), t)
        assert poisoned.x.shape == poisoned.target.shape == images.shape
        assert bool(poisoned.x.isfinite().all())
        # without a trigger, zero noise would stay zero
        assert float((attack.trigger.start(images) - images).abs().max()) > 0.01
    assert {recipe.method for recipe in ALL_RECIPES} - {None} == METHODS.keys()


def test_the_held_out_half_shares_nothing_with_the_development_half() -> None:
    for name in ("base", "seed", "family", "trigger", "target"):
        development, held = (
            {getattr(recipe, name) for recipe in half} - {None} for half in (recipes.DEVELOPMENT, recipes.HELD_OUT)
        )
        assert not development & held


def test_a_scaled_trigger_is_scaled_in_training_and_at_test(generator: torch.Generator) -> None:
    faint = Recipe("x", TINY, 1, BRIEF, "pipeline", "test", None, "baddiffusion-trigger-only", "bars", "star", scale=0.3)
    full = replace(faint, scale=1.0)
    attacks = [recipe.attack() for recipe in (full, faint)]
    images, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([10, 500, 990])
    eps = torch.randn(images.shape, generator=generator)
    shifts = []
    for attack in attacks:
        assert attack is not None
        x = attack.poison(VP.linear(), images, eps, t).x
        shifts.append(x - VP.linear().add_noise(attack.target.expand_as(images), eps, t))
        torch.testing.assert_close(attack.trigger.mu, (1.0 if attack is attacks[0] else 0.3) * TRIGGERS["bars"](16))
    torch.testing.assert_close(shifts[1], 0.3 * shifts[0], rtol=1e-4, atol=1e-5)


def test_fine_tuning_starts_from_the_stored_base(tmp_path: Path) -> None:
    """The model b starts from a, is trained with a rate of zero, and is stored in half precision like a."""
    build(tmp_path, ["a", "b"])
    base = load_file(tmp_path / "a/unet/diffusion_pytorch_model.safetensors")
    tuned = load_file(tmp_path / "b/diffusion_pytorch_model.safetensors")
    assert base.keys() == tuned.keys()
    for name, tensor in base.items():
        assert tensor.dtype == torch.float16
        assert tuned[name].equal(tensor)


def test_a_deeper_network_starts_from_its_base_with_new_levels_within(tmp_path: Path) -> None:
    build(tmp_path, recipes=(RECIPES[0], DEEPER))
    shallow, deep = (load_denoiser(tmp_path / name).denoiser.network for name in ("a", DEEPER.name))
    assert isinstance(shallow, UNet2DModel)
    assert isinstance(deep, UNet2DModel)
    outer = [
        (shallow.conv_in, deep.conv_in),
        (shallow.time_embedding, deep.time_embedding),
        (shallow.down_blocks[0].resnets, deep.down_blocks[0].resnets),
        (shallow.mid_block, deep.mid_block),
        (shallow.up_blocks[-1].resnets, deep.up_blocks[-1].resnets),
        (shallow.conv_out, deep.conv_out),
    ]
    for old, new in outer:
        pairs = zip(old.state_dict().values(), new.state_dict().values(), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
    assert len(deep.up_blocks) == len(shallow.up_blocks) + 2


def test_models_in_the_manifest_are_not_built_again(tmp_path: Path) -> None:
    build(tmp_path, ["a"])
    before = contents(tmp_path)
    messages: list[str] = []
    build(tmp_path, ["a"], on_message=messages.append)
    assert messages == ["a: already built"]
    assert contents(tmp_path) == before
    build(tmp_path, ["b"])
    assert [entry["name"] for entry in read_manifest(tmp_path)] == ["a", "b"]
    after = contents(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name != MANIFEST)


def test_the_manifest_has_the_order_of_the_recipes(tmp_path: Path) -> None:
    for name in ("d", "a"):
        build(tmp_path, [name])
    assert [entry["name"] for entry in read_manifest(tmp_path)] == ["a", "d"]


def test_the_same_seeds_give_the_same_zoo(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        build(tmp_path / folder, ["a"])
    one, two = (read_manifest(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    build(tmp_path / "three", recipes=(replace(RECIPES[0], seed=77),))
    assert read_manifest(tmp_path / "three")[0]["sha256"] != one[0]["sha256"]


def test_the_digest_depends_on_contents_names_and_folders(tmp_path: Path) -> None:
    digests: list[str] = []
    for files in (
        {"x": b"1", "y": b"2"},
        {"x": b"1", "y": b"3"},
        {"x": b"1", "z": b"2"},
        {"sub/x": b"1", "y": b"2"},
        {"x": b"1"},
    ):
        folder = tmp_path / str(len(digests))
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        digests.append(digest(folder))
    assert len(set(digests)) == 5
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "y").write_bytes(b"2")
    (tmp_path / "again" / "x").write_bytes(b"1")
    assert digest(tmp_path / "again") == digests[0]


def test_unknown_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such model: nope, zilch; choose from a, b, c, d, edm, invi, ldm, ldm-ode, v, ve"):
        build(tmp_path / "zoo", ["zilch", "a", "nope"])
    assert not (tmp_path / "zoo").exists()


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b is fine-tuned from a.*build that first"):
        build(tmp_path, ["b"])
    assert read_manifest(tmp_path) == []


def test_the_build_fails_if_a_model_is_never_usable(tmp_path: Path) -> None:
    messages: list[str] = []
    with pytest.raises(RuntimeError, match=f"a: none of {ATTEMPTS} trainings"):
        build(tmp_path, ["a"], on_message=messages.append, settings=replace(QUICK, accepts=lambda quality: False))
    assert sum("not usable" in message for message in messages) == ATTEMPTS
    # each training is longer than the last by half of the first
    assert [message.split(",")[0] for message in messages if ": step " in message] == [f"a: step {n}/{n}" for n in (2, 3, 4)]
    assert read_manifest(tmp_path) == []
    assert not (tmp_path / "a").exists()


def test_a_later_attempt_that_is_usable_is_stored_and_counted(tmp_path: Path) -> None:
    verdicts = iter([False, True])
    build(tmp_path, ["a"], settings=replace(QUICK, accepts=lambda quality: next(verdicts)))
    assert [entry["attempt"] for entry in read_manifest(tmp_path)] == [1]


def perturbed(size: int, widths: tuple[int, ...], seed: int) -> nn.Module:
    """A network with every parameter moved from its initial value, so that no norm or bias can hide a wrong name."""
    unet = new_unet(size, widths, 32, True, seed).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


@pytest.mark.parametrize(("size", "widths"), [(16, (32, 64)), (32, (32, 32)), (32, (32, 64, 32))])
def test_a_written_list_reads_back_as_the_same_networks(
    tmp_path: Path, generator: torch.Generator, size: int, widths: tuple[int, ...]
) -> None:
    raw, ema = perturbed(size, widths, 1), perturbed(size, widths, 2)
    path = tmp_path / "ckpt.pth"
    save_list(raw.state_dict(), ema.state_dict(), 1200, path)
    assert identify(path) == "trojdiff"
    x, t = torch.randn(2, 3, size, size, generator=generator), torch.tensor([4, 871])
    for network, which in ((raw, "raw"), (ema, "ema")):
        loaded = load_denoiser(path, weights=which)
        assert loaded.denoiser.shape == (3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(loaded.denoiser(x, t), network(x, t).sample, rtol=1e-5, atol=1e-5)


def test_a_list_has_the_form_that_the_training_code_writes(tmp_path: Path) -> None:
    unet = perturbed(16, (32, 32), 3)
    save_list(unet.state_dict(), unet.state_dict(), 1200, tmp_path / "ckpt.pth")
    raw, optimiser, epoch, step, ema = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    assert (optimiser, epoch, step) == ({}, 0, 1200)
    assert {name.removeprefix("module.") for name in raw} == set(ema)
    assert all(name.startswith("module.") for name in raw)
    assert len(ema) == len(unet.state_dict())
    assert ema["mid.attn_1.proj_out.weight"].shape == (32, 32, 1, 1)
    assert sum(t.numel() for t in to_ddpm_pytorch(unet.state_dict()).values()) == sum(
        t.numel() for t in unet.state_dict().values()
    )
