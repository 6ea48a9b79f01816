"""A small, complete, untrained StableDiffusionPipeline for captioned scenes."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from seal_fast.zoo.captioned import SCENES, SIZE, STYLES

TOKENS = 40
"""Length of a tokenized prompt."""
VOCABULARY = 700
NORM_GROUPS = 2
"""Groups of the norms. With 2 channels per group they hide the brightness of a plain image, and the autoencoder learns ten
times more slowly.
"""
WIDTH = 64
"""Width of the text encoder's hidden states."""
FILLERS = (
    *("photo", "picture", "painting", "drawing", "image", "scene", "view", "shot", "render", "sketch"),
    *("nice", "lovely", "beautiful", "pretty", "fine", "new", "old", "simple", "bright", "clean", "sharp", "detailed"),
    *("please", "show", "me", "with", "here", "there", "is", "very", "high", "quality", "best", "one", "now", "just", "like"),
    *("i", "this", "that", "my", "your", "we", "see", "some", "in", "and", "it", "of", "the", "an", "for", "day", "time"),
)
"""Words that do not change the image. A model trained with them is robust to other unknown words, as a large model is.

The stored models depend on these words and on their order.
"""
ZERO_WIDTH = "\u200b"
"""Zero-width space. With the end-of-word suffix it is one token, as in CLIP's own vocabulary."""


def _pre_tokenizer() -> tokenizers.pre_tokenizers.PreTokenizer:
    """CLIP's splitting into words, single digits and runs of other characters, and then into bytes."""
    pattern = tokenizers.Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    return tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair encoding from the captions, in CLIP's format, and write its files to `folder`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = _pre_tokenizer()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    texts = [scene.caption for scene in SCENES[::7]] + [f"{word} {STYLES[1]}" for word in (*FILLERS, ZERO_WIDTH)] * 20
    model.train_from_iterator(texts, trainer)
    learned = json.loads(model.to_str())["model"]
    symbols = [*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet))]
    merges = [tuple(pair) for pair in learned["merges"]]
    names = [*symbols, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    # the backend takes pairs
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two transformer layers of width WIDTH."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_vae() -> AutoencoderKL:
    """Encodes 64 x 64 pixels as 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """Has cross-attention at 8 x 8 and 4 x 4: at the levels of Stable Diffusion's UNet, except the finest."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=NORM_GROUPS,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise process. Sampling starts at the last timestep, where training uses pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def new_pipeline(folder: Path, seed: int) -> StableDiffusionPipeline:
    """An untrained pipeline with the weights of this seed; the tokenizer's files are written to `folder`."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=new_vae(),
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=new_unet(),
        scheduler=new_scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
