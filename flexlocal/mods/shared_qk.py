"""Shared queries and keys: keys of length 1, and a token sees itself only if it sees nothing else.

Reformer (arXiv:2001.04451) sets the score of a token with itself to -5e4, whose weight is 0 beside
that of any other key. Kernels do the same by a mask where they can, which costs no arithmetic on
scores. They cannot with a key mask, because the window alone does not tell then whether a token
sees another key. Nor can they with a bias, which may push other scores below -5e4.
"""

import torch
from torch import Tensor

from ..masks import Rule, Window, mask_mod
from ..masks.rule import MaskMod
from ..torch_limits.sizes import at_least, at_most
from .score import Mod

SELF_SCORE = -5e4
"""Score of a token with itself."""

SELF_SCORE_OF_KERNELS = -49995.65625
"""``SELF_SCORE`` for kernels, which multiply scores by log2(e) and round to fp32.

Where a query sees its own key alone, the backward pass computes its weight as ``exp2`` of the
rounding error. At -5e4 that weight is off by a thousandth (torch 2.11). This is the nearest number
whose rounding is exact.
"""


def unit_keys(key: Tensor) -> Tensor:
    """``key`` scaled to length 1 over its last dimension."""
    wide = key.to(torch.promote_types(key.dtype, torch.float32))
    # Not F.normalize: its second derivative is NaN at 0 (torch 2.11 to 2.15), and a mask sets
    # hidden keys to 0.
    square = wide.square().sum(-1, keepdim=True)
    return (wide / square.clamp_min(1e-24).sqrt()).to(key.dtype)


# For kernels.


def itself_last(rule: Rule) -> Mod:
    """Sets the score of a token with itself to a constant, whose gradient is 0."""

    def value(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(own_key(rule, batch, head, query, key), SELF_SCORE_OF_KERNELS, score)

    def gradient(
        grad: Tensor, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        return torch.where(own_key(rule, batch, head, query, key), 0.0, grad)

    return Mod(value, gradient)


def own_score_mended(lse: Tensor, shared_qk: bool) -> Tensor:
    """Log-sum-exps of kernels, as the true ``SELF_SCORE`` would make them."""
    if not shared_qk:
        return lse
    alone = (lse - SELF_SCORE_OF_KERNELS).abs() < 1
    return torch.where(alone, lse + (SELF_SCORE - SELF_SCORE_OF_KERNELS), lse)


def ends_alone(window: Window, n: int) -> tuple[bool, bool]:
    """Whether ``window`` shows the first and the last of ``n`` tokens no key but their own.

    False for causal windows, whose mask does not need it.
    """
    if window.causal:
        return False, False
    return _alone(window, n, 0), _alone(window, n, n - 1)


def but_itself_mod(rule: Rule, n: int | Tensor, ends: tuple[bool, bool]) -> MaskMod:
    """FlexAttention's mask_mod of ``rule`` without the query's own key, where it sees others.

    Args:
        rule: a window, or the layout of its keys.
        n: tokens; a 0-d tensor where kernels are to look it up.
        ends: ``ends_alone`` of the window.
    """
    window: Window = rule.window
    if window.most_seen == 1:
        return mask_mod(rule)
    sees = _before_itself(rule) if window.causal else _beside_itself(rule, n, ends)
    sees.__name__ = f"{rule.reach.label}_but_itself"
    return sees


def _before_itself(rule: Rule) -> MaskMod:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, itself = rule.keys(batch, head, query)
        return (first <= key) & (key <= at_least(itself - 1, at_least(first, 0)))

    return sees


def _beside_itself(rule: Rule, n: int | Tensor, ends: tuple[bool, bool]) -> MaskMod:
    # Where windows look both ways, only the first and the last token can see no key but their own.
    # Only these are compared, since ptxas before CUDA 13.1 miscompiles a comparison of every query:
    # on up to 127 tokens LLVM adds 16-bit indices in pairs, and ptxas omits the addition where one
    # index of a pair is missing.
    first_alone, last_alone = ends
    visible = mask_mod(rule)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        others = ~own_key(rule, batch, head, query, key)
        if first_alone:
            others = others | (query == 0)
        if last_alone:
            others = others | (query == n - 1)
        return visible(batch, head, query, key) & others

    return sees


def own_key(rule: Rule, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether the key is the query's own, by position; of keys that the query does not see, any."""
    itself = rule.query_position(batch, head, query)
    own: Tensor = rule.seen_position(batch, head, query, key) == itself
    return own


def _alone(window: Window, n: int, token: int) -> bool:
    return at_least(window.first_key(token), 0) == at_most(window.last_key(token), n - 1)


# For the eager path: scores ``(..., t, s)`` of tiles. ``own`` tells a query's own key, and is None
# where query ``i`` is key ``before + i``.


def with_own_scores(scores: Tensor, before: int, own: Tensor | None = None) -> Tensor:
    """``scores``, with those of tokens with themselves set; in place where ``own`` is None."""
    if own is not None:
        return scores.masked_fill(own, SELF_SCORE)
    scores.diagonal(before, -2, -1).fill_(SELF_SCORE)
    return scores


def clear_own_gradients(grad_scores: Tensor, before: int, own: Tensor | None = None) -> None:
    """Sets the gradients of the scores of tokens with themselves to 0, in place."""
    if own is None:
        grad_scores.diagonal(before, -2, -1).zero_()
    else:
        grad_scores.masked_fill_(own, 0.0)
