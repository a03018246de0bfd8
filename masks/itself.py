"""Shared queries and keys: a token sees itself only when it sees nothing else.

Reformer (arXiv:2001.04451) sets the score of a token with itself to -5e4, whose weight is 0 beside
any other key's. A mask says the same and costs no arithmetic on the scores, where the window alone
decides what else is seen: not with a key mask, nor where a bias may push other scores below -5e4.
"""

import torch
from torch import Tensor

from .clip import at_least, at_most
from .rule import MaskMod, Rule, mask_mod
from .scores import ScoreMod
from .window import Window

OWN_SCORE = -49995.65625
"""``SELF_SCORE`` for kernels, which multiply scores by log2(e) and round to fp32.

In the backward pass a key that a query sees alone has the weight ``exp2`` of what that rounding
took away, off by a thousandth at -5e4. This is the nearest number that loses nothing.
"""


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


def itself_last(rule: Rule) -> ScoreMod:
    """FlexAttention's score_mod that sets the score of a token with itself.

    Queries that see nothing else are no exception: the arithmetic that tells them, beside the
    mask's, came out wrong for fp32 and windows of 3, 5 and 7 tokens where ptxas optimised it, and
    right where it did not (torch 2.11, Triton 3.6).

    Args:
        rule: the window, or the layout of its keys.
    """

    def demote(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(rule.key_position(query, key) == query, OWN_SCORE, score)

    return demote


def _alone(window: Window, n: int, query: Tensor) -> Tensor:
    """Whether the window shows ``query`` no key but its own."""
    first, last = at_least(window.first_key(query), 0), at_most(window.last_key(query), n - 1)
    return (first == query) & (last == query)
