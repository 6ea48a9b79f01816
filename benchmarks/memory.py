"""Peak memory of one piece of work, in a process of its own (Linux)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of VmRSS (resident memory of this process) or VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_peak(work: Callable[[], object]) -> None:
    """Print, as the last line, the bytes that `work` needs above what is already resident."""
    before = resident("VmRSS")
    # reset the peak to the present value: loading may have needed more
    Path("/proc/self/clear_refs").write_text("5")
    work()
    print(resident("VmHWM") - before)


def peak_in_fresh_process(module: str, *arguments: str) -> int:
    """The bytes that `python -m module arguments` prints with `print_peak` at its end."""
    command, root = [sys.executable, "-m", module, *arguments], Path(__file__).parents[1]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()[-1])
