"""Which weights of the student are trained: all, those of cross-attention, or low-rank changes (LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seal_fast.text_to_image.attention import cross_attention_layers
from seal_fast.text_triggers.settings import TextUnlearnSettings

_ATTENTION = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


class TrainedPart:
    """The student, with gradients for the weights that the settings select.

    Attributes:
        parameters: the weights that are trained, by name.
    """

    def __init__(self, student: nn.Module, settings: TextUnlearnSettings, seed: int) -> None:
        self.student, self.settings, self._adapted = student, settings, None
        student.requires_grad_(settings.trained == "all")
        if settings.trained == "cross-attention":
            for layer in cross_attention_layers(student).values():
                layer.requires_grad_(True)
        elif settings.trained == "lora":
            self._adapted = _with_adapters(student, settings, seed)
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}

    def close(self) -> dict[str, Tensor] | None:
        """End the training: merge low-rank changes into the weights and return them as a patch; None if others were trained."""
        patch = None
        if self._adapted is not None:
            prefix = f"{self.settings.module}."
            patch = {prefix + name: p.detach().cpu().contiguous().clone() for name, p in _peft_names(self._adapted).items()}
            self._adapted.merge_and_unload()
        self.student.requires_grad_(False)
        return patch


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError('trained="lora" needs peft: pip install "seal-fast[train]"') from None
    return peft


def _with_adapters(student: nn.Module, settings: TextUnlearnSettings, seed: int) -> Any:
    peft = _peft()
    # the scale lora_alpha / rank is 1, so that a reader of the patch need not know it
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=_ATTENTION[settings.module])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(student, config)


def _peft_names(adapted: Any) -> dict[str, Tensor]:
    state = _peft().get_peft_model_state_dict(adapted)
    return {name.removeprefix("base_model.model."): value for name, value in state.items()}


def save_patch(patch: Mapping[str, Tensor], path: Path) -> None:
    """Write a LoRA patch that stock diffusers reads: `pipeline.load_lora_weights(path)`, then `fuse_lora()`.

    Args:
        patch: see `Distilled.patch`.
        path: a .safetensors file.
    """
    save_file(dict(patch), path)
