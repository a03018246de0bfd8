"""A bound on scores: ``softcap * tanh(score / softcap)``, before a bias is added.

Kernels are given scores that are divided by ``softcap`` already, which their scale does. Source:
Gemma 2, arXiv:2408.00118, section 2.
"""

import torch
from torch import Tensor

from ..torch_limits.tanh import fast_capped, fast_tanh, lower_fast_tanh
from .score import Mod


def capped(softcap: float, fast: bool) -> Mod:
    """For kernels: the capped score, from the score divided by ``softcap``.

    Args:
        fast: by an instruction of the GPU, which is as exact as products of 16-bit numbers.
    """
    if fast:
        lower_fast_tanh()

    def value(score: Tensor, *place: Tensor) -> Tensor:
        return fast_capped(score, softcap) if fast else torch.tanh(score) * softcap

    def gradient(grad: Tensor, score: Tensor, *place: Tensor) -> Tensor:
        ratio = fast_tanh(score) if fast else torch.tanh(score)
        return grad * (softcap - softcap * ratio * ratio)

    return Mod(value, gradient)


def cap_tiles(scores: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """For the eager path: ``scores``, capped, and what ``pull_back_tiles`` needs of them."""
    ratio = (scores / softcap).tanh()
    return ratio * softcap, ratio


def pull_back_tiles(grad_scores: Tensor, ratio: Tensor) -> None:
    """Turns gradients of capped scores into those of the scores, in place."""
    grad_scores.mul_(1 - ratio * ratio)
