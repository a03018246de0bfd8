"""Score functions: what is done to a score before the softmax."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import at_least, at_most
from .dropout import kept
from .rule import Rule
from .window import Window

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SELF_SCORE = -5e4
"""Score of a token with itself when queries and keys are shared: seen only when alone."""


def unit_keys(key: Tensor) -> Tensor:
    """``key`` scaled to length 1 over its last dimension (Reformer, arXiv:2001.04451)."""
    compute = torch.promote_types(key.dtype, torch.float32)
    return F.normalize(key.to(compute), dim=-1).to(key.dtype)


def window_bias(bias: Tensor, window: Window, rule: Rule, heads: int) -> ScoreMod:
    """Adds ``bias[row % h, query % W, key - first key of the query's windows]``.

    Args:
        bias: ``(h, W, (1 + look_backward + look_forward) * W)``.
        window: the window that the bias is relative to.
        rule: ``window`` itself, or its layout; says which key a slot holds.
        heads: query heads; the row of a score is ``batch * heads + head``.
    """

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = rule.key_position(query, key) - window.span_start(query)
        # Kernels score whole blocks, keys outside the window too: stay within the bias.
        offset = at_most(at_least(offset, 0), window.span - 1)
        row = (batch * heads + head) % bias.shape[0]
        return score + bias[row, query % window.size, offset]

    return add_bias


def self_token(rule: Rule) -> ScoreMod:
    """Sets the score of a token with itself to ``SELF_SCORE``."""

    def demote(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(rule.key_position(query, key) == query, SELF_SCORE, score)

    return demote


def drop_scores(
    query_draws: Tensor, key_draws: Tensor, rule: Rule, heads: int, dropout: float
) -> ScoreMod:
    """Hides the scores that dropout drops.

    Args:
        query_draws: int32 ``(rows, n)``.
        key_draws: int32 ``(rows, n)``.
        rule: says which key a slot holds.
        heads: query heads.
        dropout: probability of a weight to be dropped.
    """
    last = key_draws.shape[-1] - 1

    def drop(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch * heads + head
        position = at_most(at_least(rule.key_position(query, key), 0), last)
        keep = kept(query_draws[row, query], key_draws[row, position], dropout)
        return torch.where(keep, score, -float("inf"))

    return drop


def in_turn(*score_mods: ScoreMod) -> ScoreMod | None:
    """One score_mod that applies all of them, first to last; ``None`` for none."""
    if not score_mods:
        return None

    def apply(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for score_mod in score_mods:
            score = score_mod(score, batch, head, query, key)
        return score

    return apply
