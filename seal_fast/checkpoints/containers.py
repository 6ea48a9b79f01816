"""Read the keys and tensors of weight files, safetensors and torch.save, without running any code in them.

torch.save files are pickles. Before `torch.load(weights_only=True)` opens one, its opcodes are read (not run), and every global
in them must be one of the few that plain tensors need. This names the offending global, and is a second guard beside torch's.
"""

from __future__ import annotations

import io
import math
import pickletools
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import parse_json, weight_size
from seal_fast.checkpoints.zip_archive import MAX_PICKLE_BYTES, zip_pickle

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
MAX_HEADER_BYTES = 8 << 20
MAX_PICKLE_OPCODES = 500_000
"""Few bytes of opcodes can create many objects; this limit bounds them to some hundred MB."""
MAX_DIMENSIONS = 8

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_PICKLES = 5
"""Pickles in a file of torch.save before 1.6: magic number, protocol, system, object, storage keys; the data follows."""

SAFETENSORS_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
PLAIN_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        *(
            f"torch {dtype}Storage"
            for dtype in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
        ),
    }
)
# the opcodes that fetch a global or call a constructor by themselves; torch.save writes only GLOBAL
FETCHES = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"})


def keys(path: Path) -> frozenset[str]:
    """Names in a weight file, read without loading its tensors.

    Returns:
        The tensor names of a safetensors file, or all strings in a torch.save file, which include the tensor names.

    Raises:
        CheckpointError: the file is of another format, damaged or over a limit, or its pickle needs more than plain tensors.
    """
    return frozenset(_safetensors_header(path)) if path.suffix == ".safetensors" else _pickle_strings(path)


def load(path: Path) -> Any:
    """The content of a weight file, on the CPU: a dict of tensors (safetensors), or the plain containers that torch.save wrote.

    Tensors are mapped from the file if the format allows it, so nothing larger than the file is ever allocated.

    Raises:
        CheckpointError: see `keys`.
    """
    keys(path)
    with refusing(path, "cannot be loaded safely"):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except UnpicklingError as error:
            # torch's own text advises to load without this guard
            raise CheckpointError(path, "cannot be loaded safely: its pickle is damaged, or needs more than tensors") from error


def state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """Check that `value` is a flat dict of dense tensors that fit into their file.

    Raises:
        CheckpointError: `value` is something else, or its tensors claim more bytes than the file has (strides of 0 can).
    """
    if not isinstance(value, dict) or not value:
        raise CheckpointError(path, f"a state dict was expected, not {type(value).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(
                path, f"the state dict holds {type(tensor).__name__} at {str(name)[:80]!r}, not a dense tensor"
            )
        tensors[name] = tensor.detach()
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > weight_size(path):
        raise CheckpointError(path, f"its tensors claim {claimed} bytes, more than the file has")
    return tensors


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Tensor name -> header entry, checked against the size of the file."""
    size = weight_size(path)
    with refusing(path, "cannot be read"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(path, f"not a safetensors file, or cut short: a header of {length} bytes in {size}")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        with refusing(path, f"malformed safetensors entry {name[:80]!r}"):
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
                raise ValueError("shape and data_offsets must be short lists of non-negative integers")
            if end - begin != math.prod(shape) * SAFETENSORS_BYTES[entry["dtype"]]:
                raise ValueError("shape and dtype do not match data_offsets")
            if end > size - 8 - length:
                raise ValueError(f"data up to byte {end}, but the file holds {size - 8 - length}")
    return header


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _pickle_strings(path: Path) -> frozenset[str]:
    """All strings in the pickles of a torch.save file."""
    size = weight_size(path)
    with refusing(path, "neither safetensors nor a torch.save file"):
        if _is_zip(path):
            return _checked_strings(io.BytesIO(zip_pickle(path, size)), 1, path)
        with path.open("rb") as file:
            return _checked_strings(io.BytesIO(file.read(MAX_PICKLE_BYTES)), LEGACY_PICKLES, path)


def _checked_strings(stream: io.BytesIO, pickles: int, path: Path) -> frozenset[str]:
    """All strings in the first `pickles` pickles of a stream; CheckpointError for a global that plain tensors do not need."""
    strings: list[str] = []
    opcodes, modern = 0, False
    for _ in range(pickles):
        for opcode, argument, _position in pickletools.genops(stream):
            opcodes += 1
            if opcodes > MAX_PICKLE_OPCODES:
                raise CheckpointError(path, f"a pickle of more than {MAX_PICKLE_OPCODES} opcodes")
            if opcode.name == "STACK_GLOBAL":
                argument, modern = " ".join(strings[-2:]), True
            if opcode.name in FETCHES:
                if argument not in PLAIN_GLOBALS:
                    raise _refused(path, argument or opcode.name)
            elif isinstance(argument, str):
                strings.append(argument)
    # weights_only cannot read STACK_GLOBAL either, and its arguments need not be the two strings before it
    if modern:
        raise CheckpointError(
            path, "pickle protocol 4 or later, which cannot be read safely; save it with torch.save's default protocol"
        )
    return frozenset(strings)


def _refused(path: Path, name: Any) -> CheckpointError:
    return CheckpointError(
        path,
        f"refused: loading its pickle would run {str(name)[:120].replace(' ', '.')!r}, which plain tensors never need; "
        "ask its author for a state dict in safetensors",
    )
