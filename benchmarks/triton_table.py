"""Registers, stack and shared memory of the compiled Triton kernels, measured without a GPU.

    python -m benchmarks.triton_table [--out benchmarks/results/triton_compile.json]
    python -m benchmarks.triton_table --check NAME ...

Compiles what `kernels.cross_attention` would launch, for two architectures and all head sizes of Stable Diffusion. A stack
means that registers spilled. --check compiles the named entries again and fails where a stack has grown or shared memory does
not fit. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.table_file import read_table, write_table
from seal_fast.kernels import cross_attention as kernels

OUT = Path("benchmarks/results/triton_compile.json")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
KERNELS = ("forward", "query_grad", "key_value_grad")
HEADS = (40, 64, 80, 128, 160)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
"""Architecture -> bytes of shared memory that one program can have."""

Entry = dict[str, Any]


def launches(
    dimensions: int, dtype: torch.dtype, queries: int = 1024, chosen: int | None = 5, loss: str = "both"
) -> dict[str, kernels.Launch]:
    """Launches by kernel, for two prompts and eight heads in one tensor, with maps of chosen or all tokens.

    No memory is touched.

    loss: which outputs have a gradient: "out", "maps" or "both".
    """

    def heads(rows: int) -> Tensor:
        return torch.empty(2, rows, 8, dimensions, dtype=dtype, device="meta").transpose(1, 2)

    q, k, v = heads(queries), heads(77), heads(77)
    tokens = None if chosen is None else torch.empty(chosen, dtype=torch.int64, device="meta")
    maps = torch.empty(2, chosen or 77, queries, device="meta")
    sums = torch.empty(kernels.query_slices(q, k), 2, 77, 8, dimensions, device="meta")
    out_grad, maps_grad = (None if loss == "maps" else heads(queries)), (None if loss == "out" else maps)
    given = kernels.forward(q, k, v, tokens, 0.1, heads(queries), maps)
    v_sums = None if out_grad is None else sums
    given += kernels.backward(q, k, v, tokens, 0.1, out_grad, maps_grad, heads(queries), sums, v_sums)
    return {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in given}


def names() -> list[str]:
    """Names of all entries: kernel, dimensions of a head, dtype, architecture."""
    return ["-".join(map(str, case)) for case in product(KERNELS, HEADS, DTYPES, SHARED_LIMITS)]


def signature(launch: kernels.Launch) -> dict[str, str]:
    """Type of each argument. Types and constants alone decide whether a kernel is compiled anew.

    Raises:
        TypeError: the value of an integer would decide too.
    """
    types = {}
    for parameter in launch.kernel.params[: len(launch.arguments)]:
        value = launch.arguments[parameter.name]
        if isinstance(value, int) and not parameter.do_not_specialize:
            raise TypeError(f"{parameter.name} of {launch.kernel.fn.__name__} is specialised: add it to do_not_specialize")
        types[parameter.name] = type_name(value)
    return {**types, **dict.fromkeys(launch.constants, "constexpr")}


def type_name(value: Any) -> str:
    if value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def compile_entry(name: str) -> Entry:
    kernel, head, dtype, architecture = name.split("-")
    launch = launches(int(head), DTYPES[dtype])[kernel]
    binary = compile_launch(launch, int(architecture))
    registers, stack = resources(binary.asm["cubin"])
    return {
        "name": name,
        "queries": launch.constants["BLOCK"],
        "warps": launch.warps,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": binary.metadata.shared,
    }


def compile_launch(launch: kernels.Launch, architecture: int) -> Any:
    types = signature(launch)
    absent = {name: None for name, value in launch.arguments.items() if value is None}
    # torch allocates at multiples of 16 bytes and more; Triton looks at the addresses when it launches
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(launch.kernel, types, {**launch.constants, **absent}, aligned)
    options = {**launch.options, "debug": launch.kernel.debug or False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no registers: {printed!r}")
    return int(found[1]), int(found[2])


def problems(entry: Entry, committed: Entry) -> list[str]:
    """What is worse than the committed entry, as messages."""
    found = []
    if entry["stack_bytes"] > committed["stack_bytes"]:
        stacks = f"spills {entry['stack_bytes']} bytes, the table says {committed['stack_bytes']}"
        found.append(f"{entry['name']} {stacks}: make its tiles smaller")
    limit = SHARED_LIMITS[int(entry["name"].rpartition("-")[2])]
    if entry["shared_bytes"] > limit:
        found.append(f"{entry['name']} needs {entry['shared_bytes']} bytes of shared memory, the GPU has {limit}")
    return found


def check(wanted: list[str]) -> list[str]:
    """Compile these entries and the kernel that links tokens again; return the problems found."""
    content = read_table(OUT)
    committed = {entry["name"]: entry for entry in content["results"]}
    if content["triton"] != triton.__version__:
        return [f"the table was made by Triton {content['triton']}, this is {triton.__version__}: make it anew"]
    link = compile_launch(launches(40, torch.float16)["link_tokens"], 90)
    found = [] if "__assertfail" in link.asm["ptx"] else ["link_tokens does not check that tokens are keys"]
    for name in wanted:
        found += problems(compile_entry(name), committed[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", nargs="+", choices=names(), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.check is not None:
        found = check(arguments.check)
        sys.exit("\n".join(found) if found else 0)
    entries: list[Entry] = []
    for name in names():
        entries.append(compile_entry(name))
        print(entries[-1], file=sys.stderr, flush=True)
    content = {"command": "python -m benchmarks.triton_table", "triton": triton.__version__, "results": entries}
    write_table(arguments.out, content)


if __name__ == "__main__":
    main()
