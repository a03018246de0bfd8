"""A bias on the scores, relative to the window: ``bias[row % heads, query % W, column]``.

``column`` is the key's place among the keys of the query's windows, ``key - window.span_start``.
Shapes are those of ``spec``, and for the eager path of ``eager.tiles``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Rule, Window
from ..torch_limits.gradients import added_in_place
from ..torch_limits.memory import written_out
from ..torch_limits.sizes import at_least, at_most
from .score import Mod

Place = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From batch entry, head, query and key index to three indices of a bias."""


def bias_place(rule: Rule, heads: int, bias_heads: int, margin: int | None = None) -> Place:
    """The indices into a bias for a score: head, query's place in its window, column.

    Args:
        rule: gives the positions of queries and keys, and the window that the bias is relative to.
        heads: query heads; the row of a score is ``batch * heads + head``.
        bias_heads: heads of the bias; row ``r`` takes ``r % bias_heads``.
        margin: columns that the bias has beyond the window's on either side, ``with_margin``; None
            where it has none, and columns are clipped.
    """
    window: Window = rule.window

    def place(
        batch: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        position = rule.query_position(batch, head, query)
        column = rule.seen_position(batch, head, query, key) - window.span_start(position)
        if margin is None:
            column = at_most(at_least(column, 0), window.span - 1)
        else:
            column = column + margin
        return (batch * heads + head) % bias_heads, position % window.size, column

    return place


def added(bias: Tensor, place: Place) -> Mod:
    """For kernels: adds the element of ``bias`` at the indices that ``place`` gives."""

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[place(batch, head, query, key)]

    return Mod(add_bias)


def gathered(grad: Tensor, shape: torch.Size, where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """For kernels: the gradient of a bias of ``shape`` from that of the score at ``where``."""
    found: Tensor = torch.ops.flex_lib.zeros_and_scatter(shape, where, grad)
    return found


def with_margin(bias: Tensor, margin: int) -> Tensor:
    """``bias`` with ``margin`` zeros before and after its columns.

    Kernels compute the scores of whole blocks, also of keys outside the window. Columns for these
    make clipping needless. The look-up is then contiguous along the keys: several times as fast.
    """
    return written_out(F.pad(bias, (margin, margin)))


def add_to_tiles(scores: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """``scores`` ``(b, h, g, t, s)`` with ``bias`` ``(heads, t, s)`` added, in place if it can be.

    Args:
        rows: ``(b, h)``, the row of each head.
    """
    return added_in_place(scores, bias[rows % bias.shape[0]][:, :, None])


def add_gradient_of_tiles(total: Tensor, grad_scores: Tensor, rows: Tensor) -> None:
    """Adds the bias's part of ``grad_scores`` to ``total``; shapes as ``add_to_tiles``."""
    total.index_add_(0, rows.flatten() % total.shape[0], grad_scores.sum(2).flatten(0, 1))
