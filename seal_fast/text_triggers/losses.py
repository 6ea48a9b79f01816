"""The terms of SKD-CAG's loss (arXiv 2508.18235). Unlike in the released program, gradients go through the attention maps.

    L       = (1 - alpha) L_pred + alpha L_attn + preservation L_keep
    L_pred  = MSE( student(x_t, t, triggered), teacher(x_t, t, clean) )
    L_keep  = MSE( student(x_t, t, clean), teacher(x_t, t, clean) )
    L_attn  = mean over layers and content tokens n of the triggered prompt of MSE( target^n, M_student^n ) / s

L_keep is not in the paper, whose method lets clean prompts drift. L_pred and L_keep weight timesteps as their errors count in
the image, see `seal_fast.text_to_image.latents.inverse_snr_weights`.

M is a layer's map: softmax probabilities, averaged over heads, at the layer's own size. The released program scales every map
to [0, 1], which hides how much attention a token gets, so that "no attention" cannot be a target. s is the mean square of the
teacher's maps of its content tokens in the same layer and prompt. Noise has variance 1, so both L_pred and L_attn are relative
errors, and alpha weighs quantities of the same scale. Without s the squares of probabilities of about 0.01 would make L_attn
negligible beside L_pred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seal_fast.text_triggers.pairs import PromptPair

Target = Literal["noise", "black", "random-words"]
"""Target of the maps of the trigger's tokens. The target of every other token is the teacher's map of the same token.

noise: in every place the mean of the teacher's maps of its content tokens, so that a trigger token gets the attention of an
    average word, evenly spread. The paper uses fresh noise in each step. Its expected error is least at the noise's mean, so a
    student learns the same, only more slowly.
black: zero, so that a trigger token gets no attention.
random-words: the teacher's prompt has a random word in the place of each trigger token, whose map is the target. This changes
    the teacher's image too.
"""
TARGETS: tuple[Target, ...] = ("noise", "black", "random-words")


@dataclass(frozen=True)
class Alignment:
    """Token alignments of a batch of prompt pairs; N is the largest number of content tokens.

    Attributes:
        teacher_token: int64 [B,N], the teacher's content token that corresponds to each of the student's; -1 for none.
        student_valid: bool [B,N], True for content tokens of the triggered prompt, False for padding.
        teacher_valid: bool [B,N], True for content tokens of the teacher's prompt.
    """

    teacher_token: Tensor
    student_valid: Tensor
    teacher_valid: Tensor

    def select(self, pairs: Tensor) -> Alignment:
        """The alignments of some pairs, by their indices [K]."""
        return Alignment(self.teacher_token[pairs], self.student_valid[pairs], self.teacher_valid[pairs])


def alignment(pairs: Sequence[PromptPair], device: torch.device) -> Alignment:
    """The token alignments of prompt pairs as tensors."""
    longest = max(max(len(pair.token_alignment), pair.teacher_tokens) for pair in pairs)
    teacher_token = torch.full((len(pairs), longest), -1)
    for number, pair in enumerate(pairs):
        tokens = torch.tensor([-1 if token is None else token for token in pair.token_alignment])
        teacher_token[number, : len(tokens)] = tokens
    position = torch.arange(longest)
    student_valid = position < torch.tensor([[len(pair.token_alignment)] for pair in pairs])
    teacher_valid = position < torch.tensor([[pair.teacher_tokens] for pair in pairs])
    return Alignment(teacher_token.to(device), student_valid.to(device), teacher_valid.to(device))


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], aligned: Alignment, target: Target) -> Tensor:
    """L_attn of each prompt pair, [B].

    Args:
        student: per layer, maps [B,N,M] of the triggered prompts' content tokens, with their graph.
        teacher: per layer, maps [B,N,M] of the content tokens of the teacher's prompts.
        aligned: which tokens correspond.
        target: target for the tokens without a counterpart; with "random-words" there are none.
    """
    return torch.stack([_layer_loss(s, t, aligned, target) for s, t in zip(student, teacher, strict=True)]).mean(0)


def _layer_loss(student: Tensor, teacher: Tensor, aligned: Alignment, target: Target) -> Tensor:
    valid = aligned.teacher_valid[:, :, None].to(teacher.dtype)
    count = valid.sum(1, keepdim=True)
    mean = (teacher.mean(2, keepdim=True) * valid).sum(1, keepdim=True) / count
    mean_square = (teacher.square().mean(2, keepdim=True) * valid).sum(1, keepdim=True) / count
    counterparts = teacher.gather(1, aligned.teacher_token.clamp(min=0)[:, :, None].expand(-1, -1, teacher.shape[2]))
    of_trigger = mean if target == "noise" else torch.zeros_like(mean)
    targets = torch.where(aligned.teacher_token[:, :, None] < 0, of_trigger, counterparts)
    error = (student - targets).square().mean(2) * aligned.student_valid
    return error.sum(1) / aligned.student_valid.sum(1) / mean_square[:, 0, 0].clamp(min=1e-12)
