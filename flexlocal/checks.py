"""What arguments must be; each check names the argument, what came and what would be right."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .backend import BackendName
from .masks import Window


def check_backend(backend: object) -> None:
    """``backend`` is one of the names we know."""
    if backend not in get_args(BackendName):
        names = ", ".join(repr(name) for name in get_args(BackendName))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def check_dropout(dropout: object) -> None:
    """``dropout`` is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout must be a number, got {dropout!r} of {_kind(dropout)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_scale(scale: object) -> None:
    """``scale`` is a finite number or None."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {scale!r} of {_kind(scale)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_dim(dim: object) -> None:
    """``dim`` is a head size that rotary can turn: even and above 0."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r} of {_kind(dim)}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2 for rotary embeddings, got {dim}")


def check_qkv(q: object, k: object, v: object) -> None:
    """q, k and v belong together: shapes, dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_kind(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {x.dtype}")
        if x.dim() < 2:
            raise ValueError(f"{name} must have the shape (*lead, n, d), got {_shape(x)}")
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.shape[-2] != q.shape[-2]:
            raise ValueError(f"{name} must have q's length {q.shape[-2]}, got {_shape(x)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size {q.shape[-1]}, got {_shape(k)}")
    _check_leads(q, k, v)


def check_mask(mask: object, q: Tensor, name: str = "mask") -> None:
    """A key mask is boolean, ``(batch, n)``, and its batch divides q's rows."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {_kind(mask)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean (True = keep), got {mask.dtype}")
    rows, n = math.prod(q.shape[:-2]), q.shape[-2]
    if mask.dim() != 2 or mask.shape[1] != n or mask.shape[0] == 0 or rows % mask.shape[0]:
        raise ValueError(
            f"{name} must have the shape (batch, {n}), batch a divisor of q's {rows} rows, "
            f"got {_shape(mask)}"
        )
    _check_device(name, mask, q)


def check_bias(bias: object, q: Tensor, window: Window) -> None:
    """A bias is ``(heads, W, span)``, and its heads divide q's rows."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a tensor or None, got {_kind(bias)}")
    if not bias.is_floating_point():
        raise ValueError(f"attn_bias must be of a floating-point dtype, got {bias.dtype}")
    rows = math.prod(q.shape[:-2])
    right = bias.dim() == 3 and tuple(bias.shape[1:]) == (window.size, window.span)
    if not right or bias.shape[0] == 0 or rows % bias.shape[0]:
        raise ValueError(
            f"attn_bias must have the shape (heads, {window.size}, {window.span}), heads a "
            f"divisor of q's {rows} rows, got {_shape(bias)}"
        )
    _check_device("attn_bias", bias, q)


def check_seed(seed: object, q: Tensor) -> None:
    """A dropout seed is one int64 number on q's device."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed must be a tensor or None, got {_kind(seed)}")
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"dropout_seed must be a 0-d int64 tensor, got {seed.dtype} of shape {_shape(seed)}"
        )
    _check_device("dropout_seed", seed, q)


def check_head_size(dim: int, q: Tensor) -> None:
    """Rotary's ``dim`` is q's head size."""
    if q.shape[-1] != dim:
        raise ValueError(f"dim must be q's head size, got dim {dim} and q of shape {_shape(q)}")


def check_length(n: int, window_size: int) -> None:
    """Without autopad the windows must fill the sequence."""
    if n % window_size:
        raise ValueError(
            f"q must have a length that is a multiple of window_size {window_size} unless "
            f"autopad is True, got length {n}"
        )


def _check_leads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must agree with k {_shape(k)} up to its last size, got {_shape(v)}")
    if k.shape[:-2] == q.shape[:-2]:
        return
    grouped = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0]
    if not grouped or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must have q's leading sizes {_shape(q[..., 0, 0])} or, in 4 dimensions, fewer "
            f"heads that divide q's, got {_shape(k)}"
        )


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _shape(x: Tensor) -> Sequence[int]:
    return tuple(x.shape)


def _kind(value: object) -> str:
    return f"type {type(value).__name__}"
