"""Shared queries and keys: a token sees itself only when it sees nothing else.

Reformer (arXiv:2001.04451) sets the score of a token with itself to -5e4, whose weight is 0 beside
any other key's. A mask says the same and costs no arithmetic on the scores; but where a bias may
push other scores below -5e4, only the score can say it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import at_least, at_most
from .rule import MaskMod, Rule
from .scores import SELF_SCORE, ScoreMod
from .window import Window


def alone(window: Window, kept: Tensor, query: Tensor) -> Tensor:
    """Which queries see no key but their own.

    Args:
        kept: boolean ``(batch, heads, n)``, the keys that a key mask keeps.
        query: positions ``(m,)``.

    Returns:
        Boolean ``(batch, heads, m)``.
    """
    before = F.pad(kept.cumsum(-1), (1, 0))  # kept keys before each position
    first, last = _ends(window, kept.shape[-1], query)
    seen = before.index_select(-1, last + 1) - before.index_select(-1, first)
    return seen == kept.index_select(-1, query)


def but_itself_mod(rule: Rule, window: Window, n: int, lonely: Tensor | None = None) -> MaskMod:
    """FlexAttention's mask_mod of all keys but the query's own, which only lonely queries see.

    Args:
        rule: the window, or the layout of its keys.
        window: the window.
        n: tokens.
        lonely: boolean ``(batch, heads or 1, n)``, where a key mask decides it too; see ``alone``.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if lonely is None:
            first, last = _ends(window, n, query)
            only = (first == query) & (last == query)
        else:
            only = lonely[batch, head if lonely.shape[1] > 1 else 0, query]
        return only | (rule.key_position(query, key) != query)

    sees.__name__ = "but_itself"
    return sees


def itself_last(rule: Rule) -> ScoreMod:
    """FlexAttention's score_mod that sets the score of a token with itself to ``SELF_SCORE``."""

    def demote(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(rule.key_position(query, key) == query, SELF_SCORE, score)

    return demote


def _ends(window: Window, n: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """First and last key of ``n`` that a query sees."""
    return at_least(window.first_key(query), 0), at_most(window.last_key(query), n - 1)
