"""Zeros for tokens past the last document, which FlashAttention 4's kernels leave unwritten.

Triton's kernel reads where these begin on the device, and mostly has nothing to do. To fill whole
tensors first takes a tenth of the time of attention. Shapes are those of ``spec``.
"""

import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 16  # for each head; as many as keep a GPU busy where a row holds next to nothing


def clear(sums: Tensor, *tensors: Tensor) -> None:
    """Writes the zeros.

    Args:
        sums: int32 ``(documents + 1,)``, where documents begin, and last where the last one ends.
        tensors: up to three, ``(1, heads, n, d)``, each token in one piece.
    """
    given = [*tensors, *[None] * (3 - len(tensors))]
    strides = [x.stride()[1:3] if x is not None else (0, 0) for x in given]
    heads = [x.shape[1] if x is not None else 0 for x in given]
    _clear[max(heads), _PROGRAMS, len(tensors)](
        *given, sums, sums.shape[0] - 1, tensors[0].shape[2], *strides[0], *strides[1],
        *strides[2], *heads, tensors[0].shape[3], _PROGRAMS,
    )  # fmt: skip


# Nothing is assumed of numbers and addresses: each length would have a kernel of its own.
@triton.jit(
    do_not_specialize=["last", "n", "x_h", "x_n", "y_h", "y_n", "z_h", "z_n"],
    do_not_specialize_on_alignment=["x", "y", "z", "sums"],
)
def _clear(
    x, y, z, sums, last: tl.int64, n: tl.int64,
    x_h: tl.int64, x_n: tl.int64, y_h: tl.int64, y_n: tl.int64, z_h: tl.int64, z_n: tl.int64,
    X_H: tl.constexpr, Y_H: tl.constexpr, Z_H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Programs are ``(the most heads, P, tensors)``; None stands for tensors that there are not."""
    first, which = tl.load(sums + last).to(tl.int64), tl.program_id(2)
    if which == 0:
        _clear_one(x, x_h, x_n, first, n, X_H, D, P)
    elif which == 1:
        if y is not None:
            _clear_one(y, y_h, y_n, first, n, Y_H, D, P)
    else:
        if z is not None:
            _clear_one(z, z_h, z_n, first, n, Z_H, D, P)


@triton.jit
def _clear_one(x, x_h, x_n, first, n, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """A program's share of the tokens of a head."""
    TOKENS: tl.constexpr = 16
    PLACES: tl.constexpr = triton.next_power_of_2(D)
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, PLACES)[None, :]
    if head < H:
        for begin in range(first + part * TOKENS, n, P * TOKENS):
            token = begin + tl.arange(0, TOKENS)[:, None]
            tl.store(x + head * x_h + token * x_n + place, 0.0, (token < n) & (place < D))
