"""Peak memory of one piece of work, in a process of its own (Linux)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """VmRSS, resident memory of this process, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_peak(work: Callable[[], object]) -> None:
    """The last line printed is what `work` needs above what is resident already, in bytes."""
    before = resident("VmRSS")
    # sets the peak to the present value: that of loading may be higher
    Path("/proc/self/clear_refs").write_text("5")
    work()
    print(resident("VmHWM") - before)


def peak_in_fresh_process(module: str, *arguments: str) -> int:
    """What `python -m module arguments`, which ends with `print_peak`, tells."""
    command, root = [sys.executable, "-m", module, *arguments], Path(__file__).parents[1]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()[-1])
