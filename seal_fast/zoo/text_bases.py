"""The clean pipelines that the models of the text-to-image zoo start from."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from seal_fast.attacks.harmless import Harmless, token_strings
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.zoo.captioned import SCENES, STYLES
from seal_fast.zoo.clip_vocabulary import clip_tokenizer
from seal_fast.zoo.text_to_image import FILLERS, new_text_encoder
from seal_fast.zoo.token_identity import teach_identity
from seal_fast.zoo.train_text_to_image import CaptionOf, OnStep, train_captions, train_vae, with_rare_strings

BASE = "text-64"
CLIP_BASE = "text-64-clip"
VAE_STEPS = 1000
VAE_SEED = 5
"""Seed of the autoencoder's training images."""
CAPTION_STEPS = 3500
ROBUST_STEPS = 750
CLIP_STEPS = 100
"""Steps with rare strings. CLIP's base starts from the first base's UNet; its rare tokens' states are as far apart."""
ROBUST_SEED = 141
ROW_SCALE = 2.0
"""Standard deviation of the embedding rows of rare tokens, in units of that of the words of captions. Rows that no caption
trains keep their small initial values."""


def caption_words() -> list[str]:
    """The words of all captions, in alphabetical order."""
    return sorted({word for scene in SCENES for word in scene.caption.split()} | {*STYLES[1].split()})


def _ids(tokenizer: CLIPTokenizer, words: list[str]) -> list[int]:
    return [content_ids(tokenizer, word)[0] for word in words]


def _table(pipeline: StableDiffusionPipeline) -> Tensor:
    weight: Tensor = pipeline.text_encoder.get_input_embeddings().weight.data
    return weight


def spread_rare_rows(pipeline: StableDiffusionPipeline, seed: int) -> Tensor:
    """Draw anew the rows of rare tokens, all but caption words and special ones. Returns which tokens are rare, bool [V]."""
    tokenizer, table = pipeline.tokenizer, _table(pipeline)
    words = _ids(tokenizer, caption_words())
    rare = torch.ones(len(tokenizer), dtype=torch.bool)
    rare[[*words, *tokenizer.all_special_ids]] = False
    rows = torch.randn(int(rare.sum()), table.shape[1], generator=torch.Generator().manual_seed(seed))
    table[rare] = rows * ROW_SCALE * table[words].std()
    return rare


def _captions_with_rare_strings(pipeline: StableDiffusionPipeline) -> CaptionOf:
    words = set(caption_words())
    return with_rare_strings(Harmless(tuple(text for text in token_strings(pipeline.tokenizer) if text not in words)))


def ignore_rare_strings(pipeline: StableDiffusionPipeline, steps: int, seed: int, on_step: OnStep) -> None:
    """Train the UNet on captions with rare strings, so that such strings change no image."""
    train_captions(
        pipeline,
        steps,
        images=min(12288, 32 * steps),
        rate=6e-4,
        seed=seed,
        caption=_captions_with_rare_strings(pipeline),
        frozen=lambda name: name.startswith("text_encoder."),
        on_step=on_step,
    )


def train_base(pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep) -> None:
    """Train a new pipeline: its autoencoder, its text encoder and UNet, then each of these two with rare strings."""
    train_vae(pipeline.vae, VAE_STEPS, seed=VAE_SEED, on_step=on_step)
    train_captions(pipeline, CAPTION_STEPS, seed=seed, on_step=on_step)
    rare = spread_rare_rows(pipeline, ROBUST_SEED)
    teach_identity(pipeline, rare, _captions_with_rare_strings(pipeline), seed=ROBUST_SEED, on_step=on_step)
    ignore_rare_strings(pipeline, ROBUST_STEPS, ROBUST_SEED, on_step)


def train_clip_base(pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep) -> None:
    """Train a pipeline that `use_clip_tokenizer` has prepared."""
    ignore_rare_strings(pipeline, CLIP_STEPS, seed, on_step)


def use_clip_tokenizer(pipeline: StableDiffusionPipeline, seed: int) -> None:
    """Exchange the tokenizer for CLIP's. The words of captions and fillers keep their embedding rows; the others are drawn."""
    old, tokenizer = pipeline.tokenizer, clip_tokenizer()
    encoder = new_text_encoder(tokenizer)
    weights = {name: value for name, value in pipeline.text_encoder.state_dict().items() if "token_embedding" not in name}
    encoder.load_state_dict(weights, strict=False)
    known = [*caption_words(), *FILLERS]
    table: Tensor = encoder.get_input_embeddings().weight.data  # type: ignore[assignment]
    words = _table(pipeline)[_ids(old, caption_words())]
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)) * ROW_SCALE * words.std())
    table[_ids(tokenizer, known)] = _table(pipeline)[_ids(old, known)]
    table[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = _table(pipeline)[[old.bos_token_id, old.eos_token_id]]
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval().requires_grad_(False))
