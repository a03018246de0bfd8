"""Tensors on their way between ranks, forward and backward.

All travel is ``torch.distributed.all_to_all_single``, which gloo and NCCL have and
``torch.compile`` traces. Outside a compiler it runs beside what is computed meanwhile: what a call
needs is waited for when it is asked for, in the backward pass as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import Run

Arrival = Callable[[], Tensor]
"""Waits for what travels, and returns it."""


def sent(
    parts: Sequence[Sequence[Tensor]], counts: Sequence[int], group: dist.ProcessGroup
) -> Arrival:
    """Sends each rank its parts, differentiably. To be waited for once.

    Args:
        parts: for each rank, what goes there: tensors of one dtype and of any shapes. Where nothing
            goes, an empty one of what else might have gone, so that the way back is taken.
        counts: for each rank, how many elements come from there.

    Returns:
        What waits for the elements received, ``(sum(counts),)``, in rank order.
    """
    flat = torch.cat([part.reshape(-1) for of_rank in parts for part in of_rank])
    sizes = [sum(part.numel() for part in of_rank) for of_rank in parts]
    counts = list(counts)
    if torch.compiler.is_compiling():
        received: Tensor = _Exchanged.apply(flat, counts, sizes, group)  # type: ignore[no-untyped-call]
        return lambda: received
    crossing = _Crossing(counts, sizes, group)
    on_its_way = _Sent.apply(flat, crossing)  # type: ignore[no-untyped-call]
    return lambda: _Arrived.apply(on_its_way, crossing)  # type: ignore[no-untyped-call]


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` of every rank, ``(ranks, *shape)``; small, and without a gradient."""
    ranks = dist.get_world_size(group)
    received = sent([[x.detach()]] * ranks, [x.numel()] * ranks, group)()
    return received.view(ranks, *x.shape)


def cut(x: Tensor, runs: Sequence[Run], dim: int) -> list[Tensor]:
    """``x`` itself and its ``runs`` along ``dim``.

    The gradients of the runs are added to that of ``x`` in their order.
    """
    if torch.compiler.is_compiling():  # which fuses what autograd does for each run
        return [x, *(x.narrow(dim, run.start, run.size) for run in runs)]
    return list(_Cut.apply(x, tuple(runs), dim))  # type: ignore[no-untyped-call]


def filled_in(x: Tensor, parts: Mapping[Run, Tensor], dim: int) -> Tensor:
    """``x`` with ``parts`` written into it at their runs along ``dim``, outside a compiler.

    What computed ``x`` may keep it for its backward pass, where elements of these runs are to count
    for nothing whatever they are.
    """
    found: Tensor = _FilledIn.apply(x, dim, tuple(parts), *parts.values())  # type: ignore[no-untyped-call]
    return found


def tied(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``results``, whose backward pass goes by way of ``others`` as well, with zeros.

    A rank that computes nothing from what it receives has to take part in the way back all the
    same, where it gets its own keys' gradients. ``others`` are saved for the backward pass, as a
    rank that computes from them saves them: where a checkpoint makes it forget what it saved, it
    runs the forward pass again before the way back, as the other ranks do.
    """
    if torch.compiler.is_compiling():
        # A compiler drops an exchange that no result depends on, and moves one that depends on no
        # gradient into the forward pass. By a sum of no elements both depend, and nothing changes.
        for other in others:
            nothing = other.reshape(-1)[:0].sum()
            results = [x + nothing.to(x.dtype) for x in results]
        return list(results)
    return list(_Tied.apply(len(others), *others, *results))  # type: ignore[no-untyped-call]


class _Crossing:
    """One exchange, from its start to its end, and the same backward."""

    def __init__(self, counts: list[int], sizes: list[int], group: dist.ProcessGroup) -> None:
        self.counts, self.sizes, self.group = counts, sizes, group
        self.work: Any = None
        self.gradient: Tensor | None = None

    def start(self, x: Tensor, there: bool) -> Tensor:
        counts, sizes = (self.counts, self.sizes) if there else (self.sizes, self.counts)
        received = x.new_empty(sum(counts))
        self.work = dist.all_to_all_single(
            received, x.contiguous(), counts, sizes, group=self.group, async_op=True
        )
        return received

    def finish(self) -> None:
        self.work.wait()
        self.work = None


class _Sent(torch.autograd.Function):
    """Starts a crossing; backward waits for the gradients that come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.start(x, there=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        ctx.crossing.finish()
        found, ctx.crossing.gradient = ctx.crossing.gradient, None
        return found, None


class _Arrived(torch.autograd.Function):
    """Waits for what travels; backward starts the way back of its gradients."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.finish()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.gradient = ctx.crossing.start(grad, there=False)
        return grad, None


class _Exchanged(torch.autograd.Function):
    """Both at once, for a compiler."""

    @staticmethod
    def forward(x: Tensor, counts: list[int], sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        received = x.new_empty(sum(counts))
        dist.all_to_all_single(received, x.contiguous(), counts, sizes, group=group)
        return received

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.counts, ctx.sizes, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        received = grad.new_empty(sum(ctx.sizes))
        dist.all_to_all_single(received, grad.contiguous(), ctx.sizes, ctx.counts, group=ctx.group)
        return received, None, None, None


class _Cut(torch.autograd.Function):
    """``cut``, whose own backward would write a tensor of the size of ``x`` for each run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: tuple[Run, ...], dim: int) -> tuple[Tensor, ...]:
        ctx.runs, ctx.dim, ctx.shape = runs, dim, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), *(x.narrow(dim, run.start, run.size) for run in runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor | None, *parts: Tensor | None) -> tuple[Any, ...]:
        if whole is None:
            some = next((part for part in parts if part is not None), None)
            if some is None:
                return None, None, None
            whole = some.new_zeros(ctx.shape)
        elif 0 in whole.stride():  # elements that share their memory
            whole = whole.clone()
        for run, part in zip(ctx.runs, parts, strict=True):
            if part is not None:  # in place: no one else has seen this gradient
                whole.narrow(ctx.dim, run.start, run.size).add_(part)
        return whole, None, None


class _FilledIn(torch.autograd.Function):
    """``filled_in``, whose gradient is nowhere copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, runs: tuple[Run, ...], *parts: Tensor) -> Tensor:
        ctx.runs, ctx.dim = runs, dim
        written = x.data  # as which autograd does not count what is written
        for run, part in zip(runs, parts, strict=True):
            written.narrow(dim, run.start, run.size).copy_(part)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None, *(grad.narrow(ctx.dim, run.start, run.size) for run in ctx.runs)


class _Tied(torch.autograd.Function):
    """``tied``."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        count, *tensors = inputs
        ctx.save_for_backward(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(torch.zeros_like, ctx.saved_tensors), *grads
