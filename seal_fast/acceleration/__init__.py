"""A frozen denoiser made fast: exchanged layers, CUDA graphs, precision."""

from seal_fast.acceleration.accelerated import accelerated

__all__ = ["accelerated"]
