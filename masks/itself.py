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


def ends_alone(window: Window, n: int) -> tuple[bool, bool]:
    """Whether ``window`` shows the first and the last of ``n`` tokens no key but their own.

    False for causal windows, whose mask can do without.
    """
    if window.causal:
        return False, False
    return _alone(window, n, 0), _alone(window, n, n - 1)


def but_itself_mod(rule: Rule, window: Window, n: int | Tensor, ends: tuple[bool, bool]) -> MaskMod:
    """FlexAttention's mask_mod of ``rule`` without the query's own key, where it sees others.

    Args:
        rule: the window, or the layout of its keys.
        window: the window, which alone decides what a query sees.
        n: tokens; in a 0-d tensor for a kernel to look up.
        ends: ``ends_alone`` of them.
    """
    if window.most_seen == 1:
        return mask_mod(rule)
    sees = _before_itself(rule) if window.causal else _beside_itself(rule, n, ends)
    sees.__name__ = f"{rule.label}_but_itself"
    return sees


def itself_last(rule: Rule) -> ScoreMod:
    """FlexAttention's score_mod that sets the score of a token with itself.

    Args:
        rule: the window, or the layout of its keys.
    """

    def demote(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(rule.key_position(query, key) == query, OWN_SCORE, score)

    return demote


def _before_itself(rule: Rule) -> MaskMod:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, itself = rule.first_key(query), rule.last_key(query)
        return (first <= key) & (key <= at_least(itself - 1, at_least(first, 0)))

    return sees


def _beside_itself(rule: Rule, n: int | Tensor, ends: tuple[bool, bool]) -> MaskMod:
    # Where windows look both ways only the first and the last token can see none but itself. A
    # kernel that asks each query for it comes out wrong on short sequences: up to 127 tokens LLVM
    # adds numbers of 16 bits in pairs, and where one of a pair is missing, ptxas before CUDA 13.1
    # forgets to add.
    first_alone, last_alone = ends
    visible = mask_mod(rule)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        others = rule.key_position(query, key) != query
        if first_alone:
            others = others | (query == 0)
        if last_alone:
            others = others | (query == n - 1)
        return visible(batch, head, query, key) & others

    return sees


def _alone(window: Window, n: int, token: int) -> bool:
    return at_least(window.first_key(token), 0) == at_most(window.last_key(token), n - 1)
