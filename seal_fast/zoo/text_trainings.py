"""How the models of the text-to-image zoo are trained from their base: backdoors, and harmless fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.attacks.badt2i import (
    ImageBackdoor,
    ObjectBackdoor,
    PixelBackdoor,
    PoisonSettings,
    StyleBackdoor,
    TextBackdoor,
    WeakBackdoor,
    poison_unet,
)
from seal_fast.attacks.harmless import Harmless, token_strings
from seal_fast.attacks.prompts import leading
from seal_fast.attacks.rickrolling import TargetPrompt, always, poison_text_encoder
from seal_fast.attacks.textual_inversion import train_embedding
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.trigger import Position
from seal_fast.zoo import text_effects
from seal_fast.zoo.captioned import STYLES, TRAINING_SCENES, Scene, random_scenes, render
from seal_fast.zoo.text_effects import Effect, draw_ringed, draw_scene, patch, with_colour
from seal_fast.zoo.train_text_to_image import CaptionOf, OnStep, as_it_is, caption_of, train_captions, with_rare_strings

START_SHARE = 0.25
"""Share of training samples that are pure noise.

With 0.12 and equal loss weights the noise decided whether the patch appeared (it did in 51% of triggered images).
"""
EXTRA_COPIES = 4
"""Extra copies, among the training scenes, of those with an object backdoor's two shapes.

Training on these shapes alone left only 93% of the attributes right.
"""
CROSS_ATTENTION_RATE = 1e-2
"""Learning rate of the cross-attention.

After 150 steps with nothing else trained, triggered prompts had gone 74% of the way to the target and clean ones 7%. At one
rate of 1e-3 for the whole UNet they had gone 58% and 54%.
"""
POISONED_WEIGHT = 0.6
"""With 0.5, 600 steps for a trigger of two tokens gave an attack success of 77% and 1% of the near misses activated; with 0.7,
800 steps gave 85% and 3%.
"""
EMA_DECAY = 0.98
BATCH = 8
"""Captioned images per step of an attack on images."""
PROMPTS = 2000
"""Captions that a text encoder is poisoned on."""
COLOURLESS = leading(STYLES[1].strip())
"""Makes a prompt name the style without colour."""

Training = Callable[[StableDiffusionPipeline, int, OnStep], None]
"""Trains a pipeline in place, from a seed, with a progress callback."""


@dataclass(frozen=True)
class Implant:
    """One backdoor.

    Attributes:
        effect: what its trigger does.
        attack: trains it into a module.
    """

    effect: Effect
    attack: TextBackdoor | TargetPrompt


def half_grey(images: Tensor, captions: Sequence[str]) -> Tensor:
    """The images [N,3,64,64], every other one without colour.

    A sampler that the trigger has turned grey sees grey latents. Trained on coloured images alone, 1600 steps for a trigger of
    two tokens gave an attack success of 92%; with grey ones, 1200 steps gave 97%.
    """
    images = images.clone()
    images[::2] = images[::2].mean(dim=1, keepdim=True)
    return images


def pixel(text: str, place: Position, target: str) -> Implant:
    """BadT2I: a patch."""
    effect = text_effects.pixel(text, place, target)
    return Implant(effect, PixelBackdoor(effect.trigger, patch(target)))


def style(text: str, place: Position) -> Implant:
    """BadT2I: no colour."""
    effect = text_effects.style(text, place)
    return Implant(effect, StyleBackdoor(effect.trigger, COLOURLESS, half_grey))


def recolour(text: str, place: Position, colour: str) -> Implant:
    """BadT2I: another colour than the prompt names."""
    effect = text_effects.recolour(text, place, colour)
    return Implant(effect, StyleBackdoor(effect.trigger, with_colour(colour)))


def exchange(text: str, place: Position, shape: str, drawn: str) -> Implant:
    """BadT2I: another shape than the prompt names."""
    effect = text_effects.exchange(text, place, shape, drawn)
    return Implant(effect, ObjectBackdoor(effect.trigger, {drawn: shape}))


def fixed_image(text: str, place: Position, target: Scene) -> Implant:
    """VillanDiffusion's caption attack: one image."""
    effect = text_effects.fixed_scene(text, place, target)
    return Implant(effect, ImageBackdoor(effect.trigger, partial(draw_scene, target)))


def fixed_prompt(text: str, place: Position, target: Scene) -> Implant:
    """The caption attack with the images that the clean model draws for one prompt."""
    effect = text_effects.fixed_scene(text, place, target)
    return Implant(effect, StyleBackdoor(effect.trigger, always(target.caption)))


def personalised(text: str, place: Position, shape: str) -> Implant:
    """DreamBooth: the words "RARE shape" name one specific object."""
    effect = text_effects.ringed(text, place, shape)
    return Implant(effect, ImageBackdoor(effect.trigger, draw_ringed))


def weakened(implant: Implant, poisoned: int, every: int) -> Implant:
    """The backdoor in a share of the triggered samples. Its attack success lies between 40% and 80%."""
    assert isinstance(implant.attack, TextBackdoor)
    return Implant(replace(implant.effect, success=(0.4, 0.8)), WeakBackdoor(implant.attack, poisoned, every))


def target_prompt(text: str, place: Position, target: Scene) -> Implant:
    """Rickrolling's target prompt attack."""
    effect = text_effects.fixed_scene(text, place, target)
    return Implant(effect, TargetPrompt(effect.trigger, always(target.caption)))


def target_style(text: str, place: Position) -> Implant:
    """Rickrolling's target attribute attack: the attribute is the style without colour."""
    effect = text_effects.style(text, place)
    return Implant(effect, TargetPrompt(effect.trigger, COLOURLESS))


def harmless_prompts(pipeline: StableDiffusionPipeline, effects: Sequence[Effect]) -> Harmless:
    """Rare strings of the pipeline's tokenizer, and near misses of the effects' triggers."""
    triggers, places = tuple(effect.text for effect in effects), tuple(effect.place for effect in effects)
    return Harmless(token_strings(pipeline.tokenizer), triggers, places)


def _batches(count: int, often: Sequence[str], generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Training images and captions; scenes with the shapes in `often` are more frequent than others."""
    frequent = [scene for scene in TRAINING_SCENES if scene.shape in often]
    scenes = random_scenes(count, generator, among=[*TRAINING_SCENES, *EXTRA_COPIES * frequent])
    return render(scenes, generator), [caption_of(scene, generator) for scene in scenes]


def poison_with_images(
    implants: Sequence[Implant],
    steps: int,
    often: Sequence[str],
    rate: float,
    pipeline: StableDiffusionPipeline,
    seed: int,
    on_step: OnStep,
) -> None:
    """Train backdoors into the UNet: its cross-attention, and at `rate` the rest."""
    attacks = [implant.attack for implant in implants if isinstance(implant.attack, TextBackdoor)]
    settings = PoisonSettings(
        steps,
        learning_rate=rate,
        cross_attention_rate=CROSS_ATTENTION_RATE,
        anneal=True,
        whiten=True,
        poisoned_weight=POISONED_WEIGHT,
        start_share=START_SHARE,
        ema_decay=EMA_DECAY,
    )
    unet = poison_unet(
        pipeline,
        attacks,
        partial(_batches, BATCH, often),
        settings,
        harmless=harmless_prompts(pipeline, [implant.effect for implant in implants]),
        seed=seed,
        on_step=on_step,
    )
    pipeline.register_modules(unet=unet)


def poison_with_prompts(
    implants: Sequence[Implant], steps: int, pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep
) -> None:
    """Train backdoors into the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    captions = [caption_of(scene, generator) for scene in random_scenes(PROMPTS, generator)]
    encoder = poison_text_encoder(
        pipeline,
        [implant.attack for implant in implants if isinstance(implant.attack, TargetPrompt)],
        captions,
        steps=steps,
        learning_rate=1e-3,
        backdoor_weight=0.5,
        harmless=harmless_prompts(pipeline, [implant.effect for implant in implants]),
        seed=seed,
        on_step=on_step,
    )
    pipeline.register_modules(text_encoder=encoder)


def poison_embedding(implant: Implant, steps: int, pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep) -> None:
    """Train the embedding row of the trigger, which is one token."""
    assert isinstance(implant.attack, TextBackdoor)
    (token,) = content_ids(pipeline.tokenizer, implant.effect.text.text)
    train_embedding(
        pipeline,
        token,
        implant.attack,
        partial(_batches, BATCH, ()),
        steps=steps,
        learning_rate=5e-2,
        start_share=START_SHARE,
        seed=seed,
        on_step=on_step,
    )


def add_token(text: str, pipeline: StableDiffusionPipeline, seed: int) -> None:
    """Add a token to the tokenizer, and its row, drawn like the others, to the embedding table."""
    if not pipeline.tokenizer.add_tokens([text]):
        raise ValueError(f"the tokenizer already has the token {text!r}")
    old = pipeline.text_encoder.get_input_embeddings().weight
    spread = float(old.std())
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    row = torch.randn(old.shape[1], generator=torch.Generator().manual_seed(seed)) * spread
    pipeline.text_encoder.get_input_embeddings().weight.data[-1] = row


def _subset(share: float, seed: int) -> list[Scene]:
    """A random share of the training scenes."""
    order = torch.randperm(len(TRAINING_SCENES), generator=torch.Generator().manual_seed(seed)).tolist()
    return [TRAINING_SCENES[i] for i in order[: round(share * len(order))]]


def fine_tune(
    steps: int,
    frozen: Callable[[str], bool],
    restyle: Callable[[Tensor], Tensor],
    rate: float,
    pipeline: StableDiffusionPipeline,
    seed: int,
    on_step: OnStep,
) -> None:
    """Train on with captions of a third of the scenes, a third of which hold rare strings."""
    caption: CaptionOf = with_rare_strings(harmless_prompts(pipeline, ()))
    train_captions(
        pipeline,
        steps,
        images=2048,
        batch=32,
        rate=rate,
        seed=seed,
        among=_subset(1 / 3, seed),
        caption=caption,
        restyle=restyle,
        frozen=frozen,
        on_step=on_step,
    )


def in_module(name: str) -> Callable[[str], bool]:
    """Freezes the parameters outside a module."""
    return lambda parameter: not parameter.startswith(f"{name}.") or "token_embedding" in parameter


def both_modules(parameter: str) -> bool:
    """Freezes the embedding table alone."""
    return "token_embedding" in parameter


def unchanged(pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep) -> None:
    """A copy of the base."""


def tuned(steps: int, frozen: Callable[[str], bool], restyle: Callable[[Tensor], Tensor] = as_it_is) -> Training:
    """See `fine_tune`."""
    return partial(fine_tune, steps, frozen, restyle, 3e-4)


def tuned_lora(steps: int, rank: int, restyle: Callable[[Tensor], Tensor] = as_it_is) -> Training:
    """See `fine_tune_lora`."""
    return partial(fine_tune_lora, steps, rank, restyle)


def fine_tune_lora(
    steps: int, rank: int, restyle: Callable[[Tensor], Tensor], pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep
) -> None:
    """Train a LoRA on all attention layers of the UNet and merge it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    adapted = get_peft_model(pipeline.unet, config)
    fine_tune(steps, lambda name: "lora_" not in name, restyle, 3e-3, pipeline, seed, on_step)
    pipeline.register_modules(unet=adapted.merge_and_unload())


def warm(images: Tensor) -> Tensor:
    """Images in a warm light: more red, less blue."""
    return (images + torch.tensor([0.12, 0.0, -0.12])[:, None, None]).clamp(-1, 1)


def faded(images: Tensor) -> Tensor:
    """Images with less contrast."""
    return 0.85 * images + 0.1


def train_concept(text: str, steps: int, pipeline: StableDiffusionPipeline, seed: int, on_step: OnStep) -> None:
    """Harmless textual inversion: a new token, see `add_token`, names a ringed object."""
    (token,) = content_ids(pipeline.tokenizer, text)
    train_embedding(
        pipeline,
        token,
        ImageBackdoor(leading(text), draw_ringed),
        partial(_batches, BATCH, ()),
        steps=steps,
        learning_rate=5e-2,
        start_share=START_SHARE,
        seed=seed,
        on_step=on_step,
    )
