"""Score functions: what is done to a score before the softmax."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffer import written_out
from .clip import at_least, at_most
from .dropout import keeps
from .rule import MaskMod, Rule
from .window import Window

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

Place = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From batch entry, head, query and key slot to three indices."""

SELF_SCORE = -5e4
"""Score of a token with itself when queries and keys are shared: seen only when alone."""


def unit_keys(key: Tensor) -> Tensor:
    """``key`` scaled to length 1 over its last dimension (Reformer, arXiv:2001.04451)."""
    long = key.to(torch.promote_types(key.dtype, torch.float32))
    # Not F.normalize: the second derivative of its norm is NaN at 0, where a mask puts keys.
    square = long.square().sum(-1, keepdim=True)
    return (long / square.clamp_min(1e-24).sqrt()).to(key.dtype)


def with_margin(bias: Tensor, margin: int) -> Tensor:
    """``bias`` with ``margin`` zeros before and after its columns, for ``window_bias``.

    Kernels score whole blocks, keys outside the window too. Columns for these keep the look-up
    inside the table and contiguous along the keys, which is several times as fast as clipping.
    """
    return written_out(F.pad(bias, (margin, margin)))


def bias_place(
    window: Window, rule: Rule, heads: int, bias_heads: int, margin: int | None = None
) -> Place:
    """Where in a bias a score finds its number: head, query's place in its window, column.

    Args:
        window: the window that the bias is relative to.
        rule: ``window`` itself, or its layout; says which key a slot holds.
        heads: query heads; the row of a score is ``batch * heads + head``.
        bias_heads: the bias's, which rows take in turn.
        margin: how far a key that is scored may lie outside of the windows; None where that is
            not known, and columns are clipped.
    """

    def place(
        batch: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        column = rule.key_position(query, key) - window.span_start(query)
        if margin is None:
            column = at_most(at_least(column, 0), window.span - 1)
        else:
            column = column + margin
        return (batch * heads + head) % bias_heads, query % window.size, column

    return place


def window_bias(
    bias: Tensor, window: Window, rule: Rule, heads: int, margin: int | None = None
) -> ScoreMod:
    """Adds ``bias[row % h, query % W, key - first key of the query's windows]``.

    Args:
        bias: ``(h, W, (1 + look_backward + look_forward) * W)``, or that ``with_margin``.
        window, rule, heads, margin: as for ``bias_place``.
    """
    return added(bias, bias_place(window, rule, heads, bias.shape[0], margin))


def added(bias: Tensor, place: Place) -> ScoreMod:
    """Adds what ``bias`` holds where ``place`` says."""

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[place(batch, head, query, key)]

    return add_bias


def dropout_mod(query_draws: Tensor, key_draws: Tensor, heads: int, dropout: float) -> MaskMod:
    """FlexAttention's mask_mod of the weights that dropout keeps.

    Args:
        query_draws: int32 ``(rows, n)``.
        key_draws: int32 ``(rows, slots)``.
        heads: query heads.
        dropout: probability of a weight to be dropped.
    """

    def keep(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch * heads + head
        return keeps(query_draws[row, query], key_draws[row, key], dropout)

    return keep


def drop_scores(query_draws: Tensor, key_draws: Tensor, heads: int, dropout: float) -> ScoreMod:
    """Hides the scores that dropout drops; arguments as ``dropout_mod``."""
    keep = dropout_mod(query_draws, key_draws, heads, dropout)

    def drop(score: Tensor, *place: Tensor) -> Tensor:
        return torch.where(keep(*place), score, -float("inf"))

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
