"""Which attention weights dropout keeps: a counter-based draw, the same on every path.

Every query and every key of a row (one head of one batch entry) gets a random odd 32-bit number,
hashed from the seed, the row and its position in the whole sequence. The product of two, modulo
2**32, is compared with a threshold and decides whether the weight between them is kept. That is one
multiplication for each weight, and there is no state: the backward pass, a recomputation, the other
path or a call over a part of the sequence drops the same weights.
"""

import torch
from torch import Tensor

from ..masks.rule import MaskMod
from ..torch_limits.memory import written_out
from .score import ScoreMod

MOST_DROPOUT = 1 - 2**-32
"""The highest probability whose threshold an int32 product can reach."""

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
_INVERSES = tuple((pow(x, -1, 2**64) + 2**63) % 2**64 - 2**63 for x in _MULTIPLIERS)
"""Modulo 2**64, as int64."""


def query_draws(seed: Tensor, rows: int, length: int, first: int | Tensor = 0) -> Tensor:
    """One number for each query: int32 ``(rows, length)`` on ``seed``'s device.

    Args:
        first: position of the first query, a number or integer ``(rows, 1)``.
    """
    return _draws(seed, rows, length, first, stream=1)


def key_draws(seed: Tensor, rows: int, length: int, first: int | Tensor = 0) -> Tensor:
    """One number for each key, as ``query_draws``."""
    return _draws(seed, rows, length, first, stream=0)


def keeps(query_draw: Tensor, key_draw: Tensor, dropout: float) -> Tensor:
    """True where the weight between a query and a key is kept, with probability 1 - dropout."""
    # int32 products wrap on every device, so they are uniform over the signed range.
    return query_draw * key_draw >= round((dropout - 0.5) * 2**32)


def seed_from_row(seed: Tensor, first: int) -> Tensor:
    """The seed whose row 0 draws what row ``first`` draws by ``seed``, and so on."""
    return _unmixed(_mix(seed) + 2 * first)


def _draws(seed: Tensor, rows: int, length: int, first: int | Tensor, stream: int) -> Tensor:
    row = torch.arange(rows, device=seed.device)[:, None]
    position = torch.arange(length, device=seed.device) + first
    mixed = _mix(_mix(_mix(seed) + 2 * row + stream) + position)
    return written_out((mixed >> 32).to(torch.int32) | 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014, section 6)."""
    bits = (bits ^ _shifted(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 31)


def _unmixed(bits: Tensor) -> Tensor:
    """The inverse of ``_mix``."""
    bits = bits ^ _shifted(bits, 31) ^ _shifted(bits, 62)
    bits = bits * _INVERSES[1]
    bits = (bits ^ _shifted(bits, 27) ^ _shifted(bits, 54)) * _INVERSES[0]
    return bits ^ _shifted(bits, 30) ^ _shifted(bits, 60)


def _shifted(bits: Tensor, by: int) -> Tensor:
    # A logical shift: int64's own shift copies the sign bit.
    return (bits >> by) & ((1 << (64 - by)) - 1)


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
    """FlexAttention's score_mod that hides dropped scores; arguments as ``dropout_mod``."""
    keep = dropout_mod(query_draws, key_draws, heads, dropout)

    def drop(score: Tensor, *place: Tensor) -> Tensor:
        return torch.where(keep(*place), score, -float("inf"))

    return drop
