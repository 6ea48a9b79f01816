"""Noise processes, denoisers and differentiable samplers."""

from seal_fast.diffusion.denoiser import Denoiser
from seal_fast.diffusion.noise_source import NoiseSource
from seal_fast.diffusion.process import EDM, VE, VP, NoiseProcess
from seal_fast.diffusion.samplers import SAMPLERS, sample, timestep_grid
from seal_fast.diffusion.trigger import Trigger

__all__ = [
    "EDM",
    "SAMPLERS",
    "VE",
    "VP",
    "Denoiser",
    "NoiseProcess",
    "NoiseSource",
    "Trigger",
    "sample",
    "timestep_grid",
]
