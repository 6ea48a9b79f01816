"""Hostile and broken files: each is refused with its name and the reason, and costs no memory."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from seal_fast.checkpoints import CheckpointError, discover, identify, load_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Sandbox:
    """A folder with one good checkpoint of each format, for the tests to damage."""

    def __init__(self, root: Path, unet: nn.Module, trojdiff_file: Path) -> None:
        self.root, self.file = root, trojdiff_file
        self.marker = root / "executed"
        self.folder = root / "pipeline"
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(self.folder)
        self.weights = self.folder / "unet" / WEIGHTS

    def pickled(self, value: Any, protocol: int = 2, archive: bool = True) -> Path:
        """The TrojDiff file with `value` among its entries."""
        entries = [*torch.load(self.file, weights_only=True), value]
        torch.save(entries, self.file, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)
        return self.file

    def raw(self, data: bytes, name: str = "ckpt.pth") -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def config(self, **changes: Any) -> Path:
        path = self.folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return self.folder

    def tensors(self, **changes: torch.Tensor) -> Path:
        save_file(load_file(self.weights) | changes, self.weights)
        return self.folder

    def header(self, change: Callable[[dict], None], length: int | None = None) -> Path:
        """The safetensors file with another header over the same data."""
        data = self.weights.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes((length or len(text)).to_bytes(8, "little") + text + data[end:])
        return self.folder

    def rezipped(self, edit: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> Path:
        with zipfile.ZipFile(self.file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(self.file, "w") as archive:
            edit(archive, members)
        return self.file

    def sharded(self, name: str) -> Path:
        self.weights.rename(self.root / "outside.safetensors")
        weight_map = {"conv_in.weight": name}
        (self.folder / "unet" / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": weight_map}))
        return self.folder

    def linked(self, part: str) -> Path:
        """A part of the pipeline moved out of it, with a link in its place."""
        (self.folder / part).rename(self.root / "outside")
        (self.folder / part).symlink_to(self.root / "outside")
        return self.folder


def compressed(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    archive.writestr("archive/data/bomb", bytes(256 << 20), zipfile.ZIP_DEFLATED)


def overlapping(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    """Many directory entries of one stored member."""
    for name, data in members.items():
        archive.writestr(name, data)
    archive.writestr("archive/data/bomb", bytes(1 << 20))
    info = archive.infolist()[-1]
    for i in range(300):
        copy = zipfile.ZipInfo(f"archive/data/bomb{i}")
        copy.file_size, copy.compress_size, copy.CRC, copy.header_offset = (
            info.file_size,
            info.compress_size,
            info.CRC,
            info.header_offset,
        )
        archive.filelist.append(copy)
        archive.NameToInfo[copy.filename] = copy


def two_pickles(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        archive.writestr(name, data)
    archive.writestr("other/data.pkl", pickle.dumps({}))


def endless_pickle(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        archive.writestr(name, b"\x80\x02" + b"}" * 3_000_000 + b"." if name.endswith("data.pkl") else data)


def odd_opcode(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    """A pickle that duplicates an object, which torch.load refuses."""
    for name, data in members.items():
        archive.writestr(name, data[:-1] + b"2." if name.endswith("data.pkl") else data)


def large_pickle(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        archive.writestr(name, bytes(5 << 20) if name.endswith("data.pkl") else data)


def wide_strides(sandbox: Sandbox) -> Path:
    """Tensors of 4 TB over one stored float."""
    saved = torch.load(sandbox.file, weights_only=True)
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save([*saved[:4], saved[4] | {"conv_in.weight": huge}], sandbox.file)
    return sandbox.file


def legacy_claim(sandbox: Sandbox) -> Path:
    """A legacy file of some kilobytes whose storage claims 16 TB."""
    stream = io.BytesIO()
    torch.save(OrderedDict({"temb.dense.0.weight": torch.zeros(12345)}), stream, _use_new_zipfile_serialization=False)
    claimed = stream.getvalue().replace(b"M90", b"\x8a\x06" + (2**42).to_bytes(6, "little"))
    assert claimed != stream.getvalue()
    return sandbox.raw(claimed)


def sparse(sandbox: Sandbox) -> Path:
    return sandbox.pickled(torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 2)))


def fifo(sandbox: Sandbox) -> Path:
    sandbox.file.unlink()
    os.mkfifo(sandbox.file)
    return sandbox.file


def shifted(header: dict) -> None:
    header["conv_in.weight"]["data_offsets"] = [n + 10**9 for n in header["conv_in.weight"]["data_offsets"]]


def huge(header: dict) -> None:
    header["conv_in.weight"].update(shape=[2**40, 2**40], data_offsets=[0, 2**82])


def wide(header: dict) -> None:
    header["conv_in.weight"].update(shape=[2**62] * 100_000)


def negative(header: dict) -> None:
    header["conv_in.weight"]["data_offsets"] = [-8, 0]


def odd_dtype(header: dict) -> None:
    header["conv_in.weight"]["dtype"] = ["F32"]


class Layer(nn.Linear):
    """A user's module."""


HOSTILE: dict[str, tuple[Callable[[Sandbox], Path], str]] = {
    # code in pickles
    "os.system": (lambda r: r.pickled(Call(os.system, f"touch {r.marker}")), r"posix\.system"),
    "os.system protocol 4": (lambda r: r.pickled(Call(os.system, f"touch {r.marker}"), protocol=4), r"posix\.system"),
    "os.system legacy": (lambda r: r.pickled(Call(os.system, f"touch {r.marker}"), archive=False), r"posix\.system"),
    "exec": (lambda r: r.pickled(Call(builtins.exec, f"open({str(r.marker)!r}, 'w')")), r"builtin.*\.exec"),
    "eval protocol 0": (lambda r: r.raw(pickle.dumps(Call(eval, f"open({str(r.marker)!r}, 'w')"), 0)), r"builtin.*\.eval"),
    "pickled path": (lambda r: r.raw(b"\x80\x02i" + b"os\nremove\n(tR."), "ckpt.pth"),
    "plain but protocol 4": (lambda r: r.pickled(0, protocol=4), "protocol 4"),
    "module": (lambda r: r.pickled(nn.Linear(2, 2)), "Linear"),
    "module legacy": (lambda r: r.pickled(Layer(2, 2), archive=False), "Layer"),
    "sparse tensor": (sparse, "_rebuild_sparse_tensor"),
    "bytearray": (lambda r: r.pickled(bytearray(8)), "bytearray"),
    # bombs
    "compressed archive": (lambda r: r.rezipped(compressed), "compressed members"),
    "overlapping members": (lambda r: r.rezipped(overlapping), "more bytes than the file"),
    "two pickles": (lambda r: r.rezipped(two_pickles), "2 data.pkl"),
    "endless pickle": (lambda r: r.rezipped(endless_pickle), "opcodes"),
    "large pickle": (lambda r: r.rezipped(large_pickle), "pickle of"),
    "odd opcode": (lambda r: r.rezipped(odd_opcode), "its pickle is damaged, or needs more than tensors"),
    "strides of zero": (wide_strides, "more than the file has"),
    "legacy storage claim": (legacy_claim, "cannot be loaded safely"),
    "header length": (lambda r: r.header(lambda h: None, 2**62), "a header of"),
    "huge tensor": (lambda r: r.header(huge), "conv_in.weight"),
    "endless shape": (lambda r: r.header(wide), "conv_in.weight"),
    "offsets outside": (lambda r: r.header(shifted), "conv_in.weight"),
    "negative offsets": (lambda r: r.header(negative), "conv_in.weight"),
    "odd dtype": (lambda r: r.header(odd_dtype), "conv_in.weight"),
    "huge widths": (lambda r: r.config(block_out_channels=[10**9, 10**9]), "block_out_channels"),
    "widths beyond the file": (lambda r: r.config(block_out_channels=[16384, 8192]), "misshapen"),
    "many layers": (lambda r: r.config(layers_per_block=10**6), "layers_per_block"),
    "many levels": (lambda r: r.config(block_out_channels=[32] * 10**5), "block_out_channels"),
    "huge image": (lambda r: r.config(sample_size=10**9), "sample_size"),
    "nested JSON": (lambda r: (r.folder / "unet/config.json").write_text("[" * 10**6) and r.folder, "JSON"),
    "large JSON": (lambda r: (r.folder / "unet/config.json").write_text(" " * (2 << 20)) and r.folder, "bytes of JSON"),
    # paths
    "linked weights": (lambda r: r.linked(f"unet/{WEIGHTS}"), "leaves the checkpoint folder"),
    "linked part": (lambda r: r.linked("unet"), "leaves the checkpoint folder"),
    "linked scheduler": (lambda r: r.linked("scheduler/scheduler_config.json"), "leaves the checkpoint folder"),
    "link to itself": (lambda r: (r.weights.unlink(), r.weights.symlink_to(WEIGHTS), r.folder)[2], "broken link"),
    "shard above": (lambda r: r.sharded("../../outside.safetensors"), "same folder"),
    "absolute shard": (lambda r: r.sharded(str(r.root / "outside.safetensors")), "same folder"),
    "missing shard": (lambda r: r.sharded("outside.safetensors"), "missing"),
    "pickle as shard": (lambda r: r.sharded("outside.bin"), "not the name of a safetensors file"),
    "shard map": (lambda r: r.sharded(["x"]), "weight_map"),  # type: ignore[arg-type]
    "FIFO": (fifo, "not a regular file"),
    # broken
    "empty file": (lambda r: r.raw(b""), "empty"),
    "random bytes": (lambda r: r.raw(os.urandom(5000)), "ckpt.pth"),
    "random archive": (lambda r: r.raw(b"PK\x03\x04" + os.urandom(5000)), "torch.save"),
    "HTML as safetensors": (lambda r: r.raw(b"<!DOCTYPE html><html></html>", "model.safetensors"), "not a safetensors file"),
    "HTML as weights": (
        lambda r: r.weights.write_bytes(b"<!DOCTYPE html><html></html>") and r.folder,
        "not a safetensors file",
    ),
    "short safetensors": (lambda r: r.raw(b"\x01", "model.safetensors"), "cut short"),
    "truncated safetensors": (lambda r: r.weights.write_bytes(r.weights.read_bytes()[:-1000]) and r.folder, "the file holds"),
    "truncated archive": (lambda r: r.raw(r.file.read_bytes()[:-1000]), "torch.save"),
    "pickle as safetensors": (lambda r: r.raw(r.file.read_bytes(), "model.safetensors"), "not a safetensors file"),
    "other archive": (lambda r: r.rezipped(lambda z, m: z.writestr("a.txt", b"a" * 99)), "0 data.pkl"),
    "empty folder": (lambda r: (r.root / "nothing").mkdir() or r.root / "nothing", "no checkpoint"),
    "nothing": (lambda r: r.root / "absent.pth", "does not exist"),
    "pipeline without weights": (lambda r: r.weights.unlink() or r.folder, "no weights"),
    "config is a list": (lambda r: (r.folder / "unet/config.json").write_text("[1]") and r.folder, "JSON object"),
    "index not UTF-8": (lambda r: (r.folder / "model_index.json").write_bytes(b'{"a": "\xff"}') and r.folder, "JSON"),
    "config class": (lambda r: r.config(_class_name={"a": []}), "class"),
    "unknown block": (lambda r: r.config(down_block_types=["os.system", "DownBlock2D"]), "down_block_types"),
    "groups that do not divide": (lambda r: r.config(norm_num_groups=7), "describes no UNet2DModel"),
    "one level too few": (lambda r: r.config(block_out_channels=[32]), "describes no UNet2DModel"),
    "infinite epsilon": (lambda r: r.config(norm_eps=float("inf")), "norm_eps"),
    "size the levels do not divide": (lambda r: r.config(sample_size=15), "multiple of 2"),
    "learned variance": (lambda r: r.config(out_channels=6), "variance"),
    "no image size": (lambda r: r.config(sample_size=None), "sample_size is missing"),
    "NaN": (lambda r: r.tensors(**{"conv_in.bias": torch.full((32,), float("nan"))}), "conv_in.bias holds NaN"),
    "infinity after rounding": (
        lambda r: r.tensors(**{"conv_in.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
        "conv_in.bias holds NaN",
    ),
    "integers": (lambda r: r.tensors(**{"conv_in.bias": torch.ones(32, dtype=torch.int32)}), "conv_in.bias is torch.int32"),
    "extra tensor": (lambda r: r.tensors(extra=torch.ones(1)), "1 tensors unexpected, such as extra"),
    "wrong shape": (lambda r: r.tensors(**{"conv_in.bias": torch.ones(31)}), "misshapen, such as conv_in.bias"),
    "LoRA": (lambda r: save_file({"unet.lora_A.weight": torch.ones(2)}, r.weights) or r.weights, "LoRA"),
    "text-to-image tensors": (
        lambda r: save_file({"down_blocks.0.attn2.to_k.weight": torch.ones(2)}, r.weights) or r.weights,
        "text-to-image",
    ),
    "a trigger": (lambda r: save_file({"mu": torch.ones(2)}, r.weights) or r.weights, "no diffusion network"),
}


@pytest.fixture
def sandbox(tmp_path: Path, new_unet: Callable, trojdiff_file: Path) -> Sandbox:
    return Sandbox(tmp_path, new_unet(), trojdiff_file)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_file_is_refused_with_its_name_and_the_reason(sandbox: Sandbox, name: str) -> None:
    spoil, reason = HOSTILE[name]
    path = spoil(sandbox)
    identify(path)
    if path.exists():
        discover(path)
    with pytest.raises(CheckpointError, match=reason) as refusal:
        load_denoiser(path)
    assert refusal.value.path.is_relative_to(path)
    assert str(refusal.value) == f"{refusal.value.path}: {refusal.value.reason}"
    assert len(refusal.value.reason) < 400
    assert "\n" not in refusal.value.reason
    assert "weights_only" not in refusal.value.reason
    assert not sandbox.marker.exists()


def test_the_hostile_pickle_would_run_if_it_were_loaded(sandbox: Sandbox) -> None:
    torch.load(HOSTILE["os.system"][0](sandbox), weights_only=False)
    assert sandbox.marker.exists()


LOAD_ALL = """
import resource, sys
from pathlib import Path
from seal_fast.checkpoints import CheckpointError, load_denoiser
good, *bad = map(Path, sys.argv[1:])
load_denoiser(good)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in bad:
    try:
        load_denoiser(path)
    except CheckpointError:
        continue
    sys.exit(f"{path} was loaded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

BOMBS = [*list(HOSTILE)[list(HOSTILE).index("compressed archive") : list(HOSTILE).index("linked weights")]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts kilobytes on Linux only")
def test_bombs_cost_no_memory(tmp_path: Path, new_unet: Callable, trojdiff_file: Path) -> None:
    original = trojdiff_file.read_bytes()
    unet, paths = new_unet(), []
    for i, name in enumerate(BOMBS):
        root = tmp_path / str(i)
        root.mkdir()
        file = root / "ckpt.pth"
        file.write_bytes(original)
        paths.append(str(HOSTILE[name][0](Sandbox(root, unet, file))))
    run = [sys.executable, "-c", LOAD_ALL, str(trojdiff_file), *paths]
    result = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200 * 1024, f"resident memory grew by {int(result.stdout) // 1024} MB"


@pytest.fixture
def small_files(tmp_path: Path, new_ddpm_pytorch: Callable) -> dict[str, bytes]:
    state = {name: tensor.half() for name, tensor in new_ddpm_pytorch(16, (32,), 1).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save([state, {"state": {}, "param_groups": [{"lr": 1e-4}]}, 1, 2, state], tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    return {name: (tmp_path / name).read_bytes() for name in ("a.safetensors", "b.pth", "c.pt")}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["a.safetensors", "b.pth", "c.pt"])
def test_damage_is_refused_or_harmless(tmp_path: Path, small_files: dict[str, bytes], name: str, data: st.DataObject) -> None:
    damaged = bytearray(small_files[name])
    # names, shapes and directories lie at either end: most damage should fall there
    ends = st.integers(0, 8000) | st.integers(len(damaged) - 8000, len(damaged) - 1)
    positions = st.lists(ends | st.integers(0, len(damaged) - 1), max_size=8)
    for position in data.draw(positions, "flipped"):
        damaged[position] ^= data.draw(st.integers(1, 255), "bits")
    length = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)), "length")
    path = tmp_path / f"damaged_{name}"
    path.write_bytes(damaged[:length])
    identify(path)
    discover(path)
    try:
        network = load_denoiser(path).denoiser.network
    except CheckpointError:
        return
    assert all(p.isfinite().all() for p in network.parameters())
