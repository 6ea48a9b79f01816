"""Scan checkpoints for backdoors: discovery, one verdict per model, one report."""

from __future__ import annotations

import sys
from types import ModuleType

from seal_fast.scan.discovery import Candidate, find_candidates
from seal_fast.scan.result import ModelResult, ScanReport
from seal_fast.scan.run import Progress, scan

__all__ = ["Candidate", "ModelResult", "Progress", "ScanReport", "find_candidates", "scan"]


class _CallableRoom(ModuleType):
    # Python binds the name `seal_fast.scan` to this package whatever else carries it, so the public call lives here too
    __call__ = staticmethod(scan)


sys.modules[__name__].__class__ = _CallableRoom
