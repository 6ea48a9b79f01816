"""Noise processes, denoisers and differentiable samplers."""

from seal_fast.diffusion.denoiser import Denoiser
from seal_fast.diffusion.family import ModelFamily
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
    "sample",
    "timestep_grid",
]
