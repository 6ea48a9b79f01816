"""Checkpoints: from untrusted files to a Denoiser. The only room that opens them."""

from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.load import LoadedCheckpoint, discover, identify, load_denoiser

__all__ = ["CheckpointError", "LoadedCheckpoint", "discover", "identify", "load_denoiser"]
