"""Noise processes, denoisers and differentiable samplers."""

from seal_fast.diffusion.denoiser import Denoiser
from seal_fast.diffusion.family import ModelFamily
from seal_fast.diffusion.noise_source import NoiseSource
from seal_fast.diffusion.process import EDM, VE, VP, NoiseProcess
from seal_fast.diffusion.samplers import SAMPLERS, sample, timestep_grid

__all__ = [
    "EDM",
    "SAMPLERS",
    "VE",
    "VP",
    "Denoiser",
    "ModelFamily",
    "NoiseProcess",
    "NoiseSource",
    "sample",
    "timestep_grid",
]
