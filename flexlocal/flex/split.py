"""Calls that are too large for one launch of a kernel, as several over parts of the rows.

A GPU's grid counts batch entries and heads in 16 bits: more than 65,535 are refused ("CUDA driver
error: invalid argument"). And kernels count elements in 32 bits: beyond, torch 2.11 refuses some
calls ("signed integer is greater than maximum") and gets the gradients of others wrong. A part is
some batch entries, or some heads of one. Its tensors lie in memory of their own where the call's
are too far apart. Shapes are those of ``spec``.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mods.dropout import seed_from_row
from ..spec import Inputs, Result, Spec
from ..torch_limits.kernels import LEAST_HEAD, MOST_HEAD, MOST_HEAD_BETWEEN
from ..torch_limits.memory import written_out


class Limits(NamedTuple):
    """What a kernel can count to.

    Attributes:
        grid: batch entries, and heads.
        elements: of a tensor, from the first to the last in memory.
    """

    grid: int
    elements: int


def limits(device: torch.device) -> Limits | None:
    """Those of ``device``; None where there are none."""
    return Limits(2**16 - 1, 2**31 - 1) if device.type == "cuda" else None


class Parts(NamedTuple):
    """Batch entries and query heads of a part; the last ones may have fewer."""

    batch: int
    heads: int


def refusal(spec: Spec, inputs: Inputs) -> str | None:
    """Why a call cannot be split that would have to be; None where it can, or need not be.

    Args:
        inputs: in a user's shapes.
    """
    most, q = limits(inputs.q.device), inputs.q
    if most is None or not q.numel():
        return None
    head = _elements_of_a_head(spec, inputs)
    if head > most.elements:
        return f"kernels take up to {most.elements} numbers, and a head of this call has {head}"
    bias = inputs.bias
    if bias is not None and 2 * bias.numel() > most.elements:  # kernels are given it with margins
        return f"kernels take up to {most.elements} numbers, and attn_bias has {bias.numel()}"
    rows = q.shape[:-2].numel()
    entries = max(q.shape[:2]) if q.dim() == 4 else rows
    if not spec.rule.is_window and (entries > most.grid or rows * head > most.elements):
        name = type(spec.rule).__name__
        return f"a call of this size is split, which {name} does not know of: a Window does"
    return None


def parts_of(spec: Spec, inputs: Inputs) -> Parts | None:
    """How a call whose inputs are shaped is split; None where it need not be."""
    most = limits(inputs.q.device)
    if most is None:
        return None
    b, h = inputs.q.shape[:2]
    head = _elements_of_a_head(spec, inputs)
    apart = any(_extent(x) > most.elements for x in (inputs.q, inputs.k, inputs.v))
    if max(b, h) <= most.grid and b * h * head <= most.elements and not apart:
        return None
    rows = most.elements // head
    if h <= min(rows, most.grid):
        return Parts(min(b, most.grid, rows // h), h)
    group = h // inputs.k.shape[1]
    return Parts(1, max(1, min(rows, most.grid) // group) * group)


def in_parts(
    parts: Parts, inputs: Inputs, run_of: Callable[[Inputs], Callable[[Inputs], Result]]
) -> Result:
    """The results of all parts, joined.

    Args:
        run_of: from a part's inputs to what computes calls like it.
    """
    found: list[list[Any]] = []
    for row in _split(parts, inputs):
        results = [run_of(part)(part) for part in row]
        found.append([_joined(x, 1) for x in zip(*map(_listed, results), strict=True)])
    out, *lse = (_joined(x, 0) for x in zip(*found, strict=True))
    return (out, lse[0]) if lse else out


def _split(parts: Parts, inputs: Inputs) -> Iterator[list[Inputs]]:
    """The inputs of each part, by batch entries and then by heads."""
    b, h = inputs.q.shape[:2]
    kv_heads = max(1, parts.heads * inputs.k.shape[1] // h)
    # `split` and not slices, each of whose gradients would be as large as the whole.
    tensors = {
        name: _pieces(x, parts.batch, kv_heads if name in ("k", "v") else parts.heads)
        for name, x in zip(inputs._fields, inputs, strict=True)
        if name in _BY_ROW and isinstance(x, Tensor)
    }
    for i, entry in enumerate(range(0, b, parts.batch)):
        row = []
        for j, head in enumerate(range(0, h, parts.heads)):
            cut: dict[str, Any] = {
                name: x[i % len(x)][j % len(x[0])] for name, x in tensors.items()
            }
            if inputs.q_offset is inputs.kv_offset and "q_offset" in cut:
                cut["kv_offset"] = cut["q_offset"]  # the same tensor says that lengths agree
            first = entry * h + head
            row.append(
                inputs._replace(
                    **cut,
                    bias=_from_row(inputs.bias, first),
                    sinks=_from_row(inputs.sinks, first),
                    seed=_seed(inputs.seed, first),
                )
            )
        yield row


_BY_ROW = ("q", "k", "v", "mask", "documents", "q_offset", "kv_offset")
"""``Inputs`` that have the dimensions ``(b or 1, heads or 1, ...)``."""


def _pieces(x: Tensor, batch: int, heads: int) -> list[list[Tensor]]:
    entries = x.split(batch, 0) if x.shape[0] > 1 else (x,)
    by_head = (y.split(heads, 1) if y.shape[1] > 1 else (y,) for y in entries)
    return [[_near(y) for y in row] for row in by_head]


def _near(x: Tensor) -> Tensor:
    """``x``, in memory of its own where its elements are too far apart."""
    most = limits(x.device)
    if most is None or _extent(x) <= most.elements:
        return x
    for dim in reversed(range(x.dim())):
        if x.shape[dim] == 1:  # whose stride is the whole tensor's, and leads nowhere
            x = x.squeeze(dim).unsqueeze(dim)
    return x if _extent(x) <= most.elements else written_out(x.contiguous())


def _from_row(x: Tensor | None, first: int) -> Tensor | None:
    """``x`` ``(heads, ...)``, of which row ``r`` takes ``r % heads``, for rows from ``first``."""
    if x is None or first % x.shape[0] == 0:
        return x
    return x.roll(-(first % x.shape[0]), 0)


def _seed(seed: Tensor | None, first: int) -> Tensor | None:
    return seed if seed is None or first == 0 else seed_from_row(seed, first)


def _listed(result: Result) -> list[Tensor]:
    results = [result] if isinstance(result, Tensor) else list(result)
    return [_near_gradient(x) for x in results]


def _joined(pieces: Any, dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _near_gradient(x: Tensor) -> Tensor:
    found: Tensor = _NearGradient.apply(x)  # type: ignore[no-untyped-call]
    return found


class _NearGradient(torch.autograd.Function):
    """The tensor itself; its gradient ``_near``, since kernels read that as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _near(grad)


def _elements_of_a_head(spec: Spec, inputs: Inputs) -> int:
    """Most numbers of one head in any tensor that a kernel indexes."""
    q, k, v = inputs.q, inputs.k, inputs.v
    keys = k.shape[-2]
    if spec.xpos_base is not None:  # its layout holds a key once for each window that sees it
        keys = keys * -(-spec.rule.window.span // spec.rule.window.size) + spec.rule.window.span
    wide = max(q.shape[-1], v.shape[-1], LEAST_HEAD)
    if wide > MOST_HEAD_BETWEEN.get(q.dtype, wide):
        wide = MOST_HEAD
    return max(q.shape[-2], keys) * wide


def _extent(x: Tensor) -> int:
    """Elements from the first to the last of ``x`` in memory, or the largest stride, if larger.

    Kernels are given the strides of single batch entries and heads too.
    """
    apart = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return max(1 + apart, *x.stride())
