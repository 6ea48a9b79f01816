"""A tiny Stable Diffusion pipeline with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 48
WORDS = ("cat", "red", "on", "dog", "photo", "the", "sky", "blue", "house", "castle")
"""Words that are one token each; every other word is several."""


def byte_symbols() -> list[str]:
    """CLIP's 256 visible stand-ins for bytes, in the order of its vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def merges() -> list[tuple[str, str]]:
    """Merges of byte pairs that make the words, from the left."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(1, len(word)):
            found[word[:end], word[end] + ("</w>" if end == len(word) - 1 else "")] = None
    return list(found)


def write_tokenizer(folder: Path, length: int = LENGTH) -> None:
    symbols = byte_symbols()
    words = [
        *symbols,
        *(f"{s}</w>" for s in symbols),
        *map("".join, merges()),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges()), ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))


def tiny_unet(**options: Any) -> UNet2DConditionModel:
    """A UNet with random weights; options replace parts of its config."""
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**(config | options)).eval()


def tiny_pipeline(folder: Path, length: int = LENGTH) -> StableDiffusionPipeline:
    """Latents 4 x 8 x 8, images 16 x 16; weights from torch's global generator. `folder` holds its tokenizer."""
    write_tokenizer(folder / "words", length)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "words"), local_files_only=True)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = tiny_unet()
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    text_encoder = CLIPTextModel(text)
    with torch.no_grad():
        for module in (text_encoder, unet, vae):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline = StableDiffusionPipeline(
        vae.eval(), text_encoder.eval(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
