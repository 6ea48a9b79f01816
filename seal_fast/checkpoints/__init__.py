"""Load untrusted checkpoint files as a Denoiser or a text-to-image pipeline. No other package opens them."""

from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.load import LoadedCheckpoint, discover, identify, load_denoiser

__all__ = ["CheckpointError", "LoadedCheckpoint", "discover", "identify", "load_denoiser"]
