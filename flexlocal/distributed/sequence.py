"""Cutting a sequence into the runs that ranks hold, and joining them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..masks.arguments import check_count, kind_of
from .agreement import agreed, group_of
from .exchange import sent
from .lengths import checked_lengths, shard_lengths
from .plan import runs


def shard_sequence(
    x: Tensor,
    group: dist.ProcessGroup | DeviceMesh,
    dim: int = 1,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """This rank's run of a sequence that every rank holds whole.

    Args:
        x: ``(batch, n, ...)``, or of any shape with the tokens along ``dim``.
        group: the ranks: a process group, or a mesh of one dimension.
        dim: the dimension of tokens.
        lengths: tokens for each rank; by default those of ``shard_lengths``.

    Returns:
        A view of ``x``. Its gradient is this rank's share: zeros for the tokens of other ranks.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    group = group_of(group)
    _check(x, dim)
    if lengths is None:
        lengths = shard_lengths(x.shape[dim], group)
    rank = dist.get_rank(group)
    run = runs(checked_lengths(lengths, group))[rank]
    total = sum(lengths)
    if total != x.shape[dim]:
        raise ValueError(f"lengths must add up to x's {x.shape[dim]} tokens, got {total}")
    return x.narrow(dim, run.start, run.size)


def gather_sequence(
    x: Tensor,
    group: dist.ProcessGroup | DeviceMesh,
    dim: int = 1,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The whole sequence on every rank, joined from the ranks' runs.

    Differentiable: a rank's run gets the sum of the gradients that all ranks have for it, added in
    rank order. Where every rank computes the same loss from the result, that is ``ranks`` times the
    loss's gradient; divide the loss, or let one rank alone compute it and the others take it times
    0.

    Args:
        x: this rank's run, ``(batch, n, ...)``, or of any shape with the tokens along ``dim``.
        group: the ranks: a process group, or a mesh of one dimension.
        dim: the dimension of tokens.
        lengths: tokens on each rank. As for ``sharded_local_attention``, the ranks agree on them
            unless they are given.

    Raises:
        ValueError: an argument does not fit, here or on another rank.
        TypeError: an argument of this rank is of the wrong kind.
    """
    group = group_of(group)
    try:
        _check(x, dim)
        size = x.shape[dim]
        facts: dict[str, object] | Exception = {
            "x's sizes beside its tokens": (*x.shape[:dim], *x.shape[dim:][1:]),
            "dtype of x": str(x.dtype),
            "kind of device": x.device.type,
            "whether x requires a gradient": torch.is_grad_enabled() and x.requires_grad,
        }
    except Exception as error:
        if lengths is not None:
            raise
        size, facts = 0, error
    if lengths is None:
        found, _ = agreed(group, (size, size), facts)
    else:
        found = checked_lengths(lengths, group, size)
    ranks = len(found)
    # A copy for each rank, so that the gradients come back one by one, and in order.
    shapes = [[*x.shape[:dim], length, *x.shape[dim:][1:]] for length in found]
    counts = [torch.Size(shape).numel() for shape in shapes]
    received = sent([[part] for part in x.expand(ranks, *x.shape).unbind()], counts, group)()
    parts = received.split(counts)
    return torch.cat([part.view(s) for part, s in zip(parts, shapes, strict=True)], dim=dim)


def _check(x: object, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {kind_of(x)}")
    check_count("dim", dim, least=-x.dim())
    if dim >= x.dim():
        raise ValueError(f"dim must be a dimension of x, of {x.dim()}, got {dim}")
