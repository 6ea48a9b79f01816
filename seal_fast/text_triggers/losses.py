"""The terms of SKD-CAG's loss (arXiv 2508.18235), with the gradient through the attention maps that its program cuts off.

    L       = (1 - alpha) L_pred + alpha L_attn + preservation L_keep
    L_pred  = MSE( student(x_t, t, triggered), teacher(x_t, t, clean) )
    L_keep  = MSE( student(x_t, t, clean), teacher(x_t, t, clean) )            not in the paper, which lets clean prompts drift
    L_attn  = mean over layers and content tokens n of the triggered prompt of MSE( target^n, M_student^n ) / s

Both MSEs count timesteps by their weight in the image, see `seal_fast.text_to_image.latents.inverse_snr_weights`.
M is a layer's raw map: softmax probabilities, averaged over heads, at the layer's own size. The paper's program scales every
map to [0, 1], which hides how much a token is attended: then "no attention" cannot be asked for. s is the mean square of the
teacher's maps of its content tokens in the same layer and row. Noise has variance 1, so L_pred is a relative error too and
alpha weighs like with like; without s, probabilities of a hundredth each would make L_attn vanish beside L_pred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seal_fast.text_triggers.pairs import PromptPair

Target = Literal["noise", "black", "random-words"]
"""What the maps of trigger tokens shall be; words follow the teacher's maps of the same words.

noise: in every place the mean of the teacher's maps of its content tokens, so a trigger token is seen like an average word,
    everywhere alike. The paper spreads attention over the image with fresh noise in each step; the error to fresh noise is
    least at the noise's mean, so that is what a student learns from it, only more slowly.
black: zero; a trigger token is not seen at all.
random-words: the teacher's prompt has a random word in the place of each trigger token, which follows its map. This changes
    what the teacher draws too.
"""
TARGETS: tuple[Target, ...] = ("noise", "black", "random-words")


@dataclass(frozen=True)
class Alignment:
    """Partners of a batch of pairs; N is the largest number of content tokens.

    Attributes:
        partners: int64 [B,N], content token of the teacher's prompt for each of the triggered prompt; -1 for none.
        valid: bool [B,N], False beyond the triggered prompt's tokens.
        taught: bool [B,N], True for the content tokens of the teacher's prompt.
    """

    partners: Tensor
    valid: Tensor
    taught: Tensor

    def rows(self, index: Tensor) -> Alignment:
        return Alignment(self.partners[index], self.valid[index], self.taught[index])


def alignment(pairs: Sequence[PromptPair], device: torch.device) -> Alignment:
    """Partners of pairs as tensors."""
    longest = max(max(len(pair.partners), pair.teacher_tokens) for pair in pairs)
    partners = torch.full((len(pairs), longest), -1)
    for row, pair in enumerate(pairs):
        partners[row, : len(pair.partners)] = torch.tensor([-1 if p is None else p for p in pair.partners])
    number = torch.arange(longest)
    valid = number < torch.tensor([[len(pair.partners)] for pair in pairs])
    taught = number < torch.tensor([[pair.teacher_tokens] for pair in pairs])
    return Alignment(partners.to(device), valid.to(device), taught.to(device))


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], of: Alignment, target: Target) -> Tensor:
    """L_attn of each row, [B].

    Args:
        student: per layer, maps [B,N,M] of the triggered prompts' content tokens, with their graph.
        teacher: per layer, maps [B,N,M] of the teacher's prompts' content tokens.
        of: who is whose partner.
        target: for tokens without a partner; "random-words" leaves none.
    """
    return torch.stack([_layer(s, t, of, target) for s, t in zip(student, teacher, strict=True)]).mean(0)


def _layer(student: Tensor, teacher: Tensor, of: Alignment, target: Target) -> Tensor:
    taught = of.taught[:, :, None].to(teacher.dtype)
    count = taught.sum(1, keepdim=True)
    level = (teacher.mean(2, keepdim=True) * taught).sum(1, keepdim=True) / count
    power = (teacher.square().mean(2, keepdim=True) * taught).sum(1, keepdim=True) / count
    words = teacher.gather(1, of.partners.clamp(min=0)[:, :, None].expand(-1, -1, teacher.shape[2]))
    wanted = torch.where(of.partners[:, :, None] < 0, level if target == "noise" else torch.zeros_like(level), words)
    error = (student - wanted).square().mean(2) * of.valid
    return error.sum(1) / of.valid.sum(1) / power[:, 0, 0].clamp(min=1e-12)
