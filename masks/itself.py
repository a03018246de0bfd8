"""Shared queries and keys: a token sees itself only when it sees nothing else.

Reformer (arXiv:2001.04451) sets the score of a token with itself to -5e4, whose weight is 0 beside
any other key's. A mask says the same and costs no arithmetic on the scores, where the window alone
decides what else is seen: not with a key mask, nor where a bias may push other scores below -5e4.
"""

import torch
from torch import Tensor

from .clip import at_least, at_most
from .rule import MaskMod, Rule, mask_mod
from .scores import SELF_SCORE, ScoreMod
from .window import Window


def but_itself_mod(rule: Rule, window: Window, n: int) -> MaskMod:
    """FlexAttention's mask_mod of ``rule`` without the query's own key, where it sees others.

    Args:
        rule: the window, or the layout of its keys.
        window: the window, which alone decides what a query sees.
        n: tokens.
    """
    visible = mask_mod(rule)

    def before_itself(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, last = rule.first_key(query), rule.last_key(query)  # its own key is the last
        others = at_least(first, 0) < last
        return (first <= key) & (key <= torch.where(others, last - 1, last))

    def beside_itself(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        others = _alone(window, n, query) | (rule.key_position(query, key) != query)
        return visible(batch, head, query, key) & others

    sees = before_itself if window.causal else beside_itself
    sees.__name__ = f"{rule.label}_but_itself"
    return sees


def itself_last(rule: Rule, window: Window, n: int) -> ScoreMod:
    """FlexAttention's score_mod that sets the score of a token with itself.

    To ``SELF_SCORE``; to 0 where the window shows a query nothing else, since its weight is 1
    whatever the score, and kernels know a score of that size to the third digit only.

    Args:
        rule: the window, or the layout of its keys.
        window: the window.
        n: tokens.
    """

    def demote(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # By themselves two numbers would be of the default dtype, whatever the score is.
        own = torch.where(_alone(window, n, query), 0.0, SELF_SCORE).to(score.dtype)
        return torch.where(rule.key_position(query, key) == query, own, score)

    return demote


def _alone(window: Window, n: int, query: Tensor) -> Tensor:
    """Whether the window shows ``query`` no key but its own."""
    first, last = at_least(window.first_key(query), 0), at_most(window.last_key(query), n - 1)
    return (first == query) & (last == query)
