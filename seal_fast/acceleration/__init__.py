"""Make a frozen denoiser fast: equivalent layers, CUDA graphs, precision."""

from seal_fast.acceleration.accelerated import accelerated

__all__ = ["accelerated"]
