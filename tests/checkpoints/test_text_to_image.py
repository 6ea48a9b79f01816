"""Stable Diffusion folders: loaded as stock diffusers loads them, written as it reads them, and refused if hostile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.text_to_image import PIPELINE, TEXT_ENCODER, UNET, LoadedPipeline, load_pipeline, save_pipeline
from tests.tiny_pipeline import tiny_pipeline

MODULES = ("unet", "vae", "text_encoder")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def saved(original: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    original.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def stock(folder: Path, **options: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name].to(ours[name])) for name in ours)


def trained(loaded: LoadedPipeline, name: str) -> StableDiffusionPipeline:
    with torch.no_grad():
        for parameter in getattr(loaded.pipeline, name).parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return loaded.pipeline


def files(folder: Path) -> set[str]:
    return {os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_is_loaded_as_stock_diffusers_loads_it(folder: Path) -> None:
    loaded, expected = load_pipeline(folder), stock(folder)
    assert loaded.format == PIPELINE
    for name in MODULES:
        ours = getattr(loaded.pipeline, name)
        assert type(ours) is type(getattr(expected, name))
        assert same(ours, getattr(expected, name))
        assert not ours.training
    prompts = ["a red cat \u200b on", "É" * 50]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = [pipeline.tokenizer(prompts, **options).input_ids for pipeline in (loaded.pipeline, expected)]
    assert torch.equal(*ids)
    hidden = [p.text_encoder(i).last_hidden_state for p, i in zip((loaded.pipeline, expected), ids, strict=True)]
    torch.testing.assert_close(*hidden)
    assert (
        dict(loaded.pipeline.scheduler.config).items()
        >= {k: v for k, v in expected.scheduler.config.items() if not k.startswith("_")}.items()
    )


@pytest.mark.parametrize("changed", ["unet", "text_encoder"])
def test_a_saved_pipeline_differs_in_one_module(folder: Path, tmp_path: Path, changed: str) -> None:
    pipeline = trained(load_pipeline(folder), changed)
    (folder / "unet" / "run_me.py").write_text("raise SystemExit")
    out = tmp_path / "out"
    out.mkdir()
    save_pipeline(folder, pipeline, changed, out)
    assert files(out) == files(folder) - {"unet/run_me.py"}
    before, after = stock(folder), stock(out)
    for name in MODULES:
        assert same(getattr(pipeline, name), getattr(after, name))
        assert same(getattr(before, name), getattr(after, name)) == (name != changed)


def test_every_variant_shard_and_pickle_is_rewritten_in_its_own_dtype(
    original: StableDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    original.save_pretrained(folder, variant="fp16")
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(half).items()}, half, {"format": "pt"})
    original.unet.save_pretrained(folder / "unet", safe_serialization=False)
    pipeline = trained(load_pipeline(folder), "unet")
    out = tmp_path / "out"
    out.mkdir()
    save_pipeline(folder, pipeline, "unet", out)
    assert files(out) == files(folder)
    weights = pipeline.unet.state_dict()
    for name, dtype in (("fp16.safetensors", torch.float16), ("safetensors", torch.float32), ("bin", torch.float32)):
        path = out / "unet" / f"diffusion_pytorch_model.{name}"
        written = torch.load(path, weights_only=True) if name == "bin" else load_file(path)
        assert written.keys() == weights.keys()
        for key, tensor in written.items():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor, weights[key].to(dtype), rtol=0, atol=0)
    assert stock(out, variant="fp16", torch_dtype=torch.float16).unet.dtype == torch.float16


def test_shards_are_read_and_rewritten(original: StableDiffusionPipeline, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    original.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    loaded = load_pipeline(folder)
    assert same(loaded.pipeline.unet, original.unet)
    out = tmp_path / "out"
    out.mkdir()
    save_pipeline(folder, trained(loaded, "unet"), "unet", out)
    assert files(out) == files(folder)
    assert same(loaded.pipeline.unet, stock(out).unet)


def test_old_tensor_names_of_the_text_encoder_are_read_and_kept(folder: Path, tmp_path: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(48)[None]
    save_file(old, path, {"format": "pt"})
    loaded = load_pipeline(folder)
    assert same(loaded.pipeline.text_encoder, stock(folder).text_encoder)
    out = tmp_path / "out"
    out.mkdir()
    save_pipeline(folder, trained(loaded, "text_encoder"), "text_encoder", out)
    assert load_file(out / "text_encoder" / "model.safetensors").keys() == old.keys()
    assert same(loaded.pipeline.text_encoder, stock(out).text_encoder)


@pytest.mark.parametrize(("part", "format"), [("unet", UNET), ("text_encoder", TEXT_ENCODER)])
def test_a_component_is_loaded_with_a_base_and_saved_alone(folder: Path, tmp_path: Path, part: str, format: str) -> None:
    torch.manual_seed(1)
    other = tiny_pipeline(tmp_path)
    alone, out = tmp_path / "alone", tmp_path / "out"
    getattr(other, part).save_pretrained(alone)
    with pytest.raises(CheckpointError, match="--base"):
        load_pipeline(alone)
    loaded = load_pipeline(alone, base=folder)
    assert loaded.format == format
    base = stock(folder)
    for name in MODULES:
        assert same(getattr(loaded.pipeline, name), getattr(other if name == part else base, name))
    out.mkdir()
    save_pipeline(alone, trained(loaded, part), part, out)
    assert files(out) == files(alone)
    assert same(type(getattr(other, part)).from_pretrained(out), getattr(loaded.pipeline, part))
    with pytest.raises(CheckpointError, match="alone"):
        save_pipeline(alone, loaded.pipeline, "unet" if part == "text_encoder" else "text_encoder", out)
    with pytest.raises(CheckpointError, match="no base"):
        load_pipeline(folder, base=folder)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Call:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def pickled(folder: Path, part: str, name: str) -> None:
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": Call(folder.parent / "executed")}, folder / part / name)


def linked(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def code_in_safety_checker(folder: Path) -> None:
    (folder / "safety_checker").mkdir()
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    pickled(folder, "safety_checker", "pytorch_model.bin")


def weight_with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet"),
    "no vae weights": (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler_config"),
    "unet not listed": (lambda f: edit(f / "model_index.json", unet=None), "lists no unet"),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"), "only diffusers'"),
    "pipeline of its own": (lambda f: edit(f / "model_index.json", _class_name=["pipeline", "Mine"]), "only diffusers'"),
    "unet of its own": (lambda f: edit(f / "model_index.json", unet=["my_unet", "UNet2DConditionModel"]), "never run"),
    "other text encoder": (lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5Model"]), "never run"),
    "part outside": (lambda f: edit(f / "model_index.json", feature_extractor=["transformers", "X"]), "no folder"),
    "part by a path": (lambda f: edit(f / "model_index.json", **{"../model/vae": ["a", "b"]}), "no folder"),
    "code in the unet": (lambda f: pickled(f, "unet", "diffusion_pytorch_model.bin"), r"posix\.system"),
    "code in the text encoder": (lambda f: pickled(f, "text_encoder", "pytorch_model.bin"), r"posix\.system"),
    "code in the safety checker": (code_in_safety_checker, r"posix\.system"),
    "linked weights": (lambda f: linked(f / WEIGHTS), "leaves the checkpoint"),
    "linked config": (lambda f: linked(f / "unet" / "config.json"), "leaves the checkpoint"),
    "linked vocabulary": (lambda f: linked(f / "tokenizer" / "tokenizer.json"), "leaves the checkpoint"),
    "huge config": (lambda f: edit(f / "unet" / "config.json", block_out_channels=[10**9, 32]), "not supported"),
    "wide config": (lambda f: edit(f / "unet" / "config.json", block_out_channels=[8192, 16384]), "misshapen"),
    "many levels": (lambda f: edit(f / "vae" / "config.json", layers_per_block=10**6), "not supported"),
    "option not covered": (lambda f: edit(f / "unet" / "config.json", addition_embed_type="text"), "addition_embed_type"),
    "huge vocabulary": (lambda f: edit(f / "text_encoder" / "config.json", vocab_size=10**12), "not supported"),
    "odd model type": (lambda f: edit(f / "text_encoder" / "config.json", model_type="t5"), "only CLIP"),
    "another width": (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=64), "misshapen"),
    "nan": (weight_with_nan, "NaN"),
    "cut short": (lambda f: os.truncate(f / WEIGHTS, 1000), "safetensors"),
    "no json": (lambda f: (f / "model_index.json").write_text("{"), "JSON"),
    "scheduler of no process": (lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="Os"), "not supported"),
    "impossible betas": (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_end=10.0), "beta_end"),
    "panic of the parser": (
        lambda f: edit(f / "tokenizer" / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "PanicException",
    ),
    "no room": (lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=-1), "model_max_length"),
    "half a token": (lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=8.5), "model_max_length"),
    "long prompts": (lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=10**9), "model_max_length"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_folders_are_refused(folder: Path, case: str) -> None:
    harm, reason = HOSTILE[case]
    harm(folder)
    with pytest.raises(CheckpointError, match=reason):
        load_pipeline(folder)
    assert not (folder.parent / "executed").exists()


def test_tokenizer_options_open_no_other_file(folder: Path) -> None:
    secret = folder.parent / "secret.json"
    shutil.copyfile(folder / "tokenizer" / "tokenizer.json", secret)
    edit(secret, post_processor=None)
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_file=os.fspath(secret))
    assert load_pipeline(folder).pipeline.tokenizer("cat").input_ids[0] == load_pipeline(folder).pipeline.tokenizer.bos_token_id


@pytest.mark.parametrize("what", ["file", "empty", "absent", "unconditional"])
def test_other_paths_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model"
    if what == "file":
        path.write_bytes(b"1")
    elif what != "absent":
        path.mkdir()
    if what == "unconditional":
        (path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="no text-to-image checkpoint"):
        load_pipeline(path)


def test_the_digest_is_that_of_the_checkpoint_without_its_base(
    folder: Path, original: StableDiffusionPipeline, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    original.text_encoder.save_pretrained(alone)
    assert isinstance(original.text_encoder, CLIPTextModel)
    first = load_pipeline(alone, base=folder).sha256
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    assert load_pipeline(alone, base=folder).sha256 == first
    assert load_pipeline(folder).sha256 != first
