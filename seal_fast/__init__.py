"""Find backdoors in diffusion checkpoints and seal them, fast.

Names are imported when first used, so that `import seal_fast` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seal_fast import ops as ops
    from seal_fast.checkpoints import CheckpointError as CheckpointError
    from seal_fast.checkpoints import load_denoiser as load_denoiser
    from seal_fast.diffusion import Denoiser as Denoiser
    from seal_fast.diffusion import Trigger as Trigger
    from seal_fast.scan import ModelResult as ModelResult
    from seal_fast.scan import ScanReport as ScanReport
    from seal_fast.scan import scan as scan
    from seal_fast.scan.unlearn_text import UnlearnResult as UnlearnResult
    from seal_fast.scan.unlearn_text import unlearn as unlearn
    from seal_fast.skd_cag import PromptMaps as PromptMaps
    from seal_fast.skd_cag import UnlearnSettings as UnlearnSettings
    from seal_fast.skd_cag import attention_maps as attention_maps
    from seal_fast.terd import Calibration as Calibration
    from seal_fast.terd import FixedPointSettings as FixedPointSettings
    from seal_fast.terd import InputDetector as InputDetector
    from seal_fast.terd import ReversionSettings as ReversionSettings
    from seal_fast.terd import reverse_trigger as reverse_trigger

try:
    __version__ = metadata.version("seal-fast")
except metadata.PackageNotFoundError:
    __version__ = "unknown (seal-fast is not installed: run `pip install -e .`)"

_ROOM_OF = {
    "Calibration": "terd",
    "CheckpointError": "checkpoints",
    "Denoiser": "diffusion",
    "FixedPointSettings": "terd",
    "InputDetector": "terd",
    "ModelResult": "scan",
    "PromptMaps": "skd_cag",
    "ReversionSettings": "terd",
    "ScanReport": "scan",
    "Trigger": "diffusion",
    "UnlearnResult": "scan.unlearn_text",
    "UnlearnSettings": "skd_cag",
    "attention_maps": "skd_cag",
    "load_denoiser": "checkpoints",
    "reverse_trigger": "terd",
    "unlearn": "scan.unlearn_text",
}
_ROOMS = ("ops", "scan")

__all__ = ["__version__", *_ROOM_OF, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"seal_fast.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'seal_fast' has no attribute {name!r}")
    value = getattr(import_module(f"seal_fast.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
