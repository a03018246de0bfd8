"""What calls of one kind share: that their arguments fit, the path, and the dtype.

A warm call finds all this by the kind of its arguments, since checking them anew would take longer
than launching the kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import eager, flex
from .autocast import autocast_dtype
from .backend import BackendName, Choice, choose
from .checks import (
    check_backend,
    check_bias,
    check_dropout,
    check_head_size,
    check_kernel_options,
    check_mask,
    check_qkv,
    check_rotary,
    check_scale,
    check_seed,
    check_xpos_reach,
)
from .masks import Window
from .masks.arguments import check_flag
from .masks.window import as_window
from .rotary import Rotary


@dataclass(frozen=True)
class Plan:
    """What all calls of one kind share.

    Attributes:
        run: the chosen path: ``run(q, k, v, key_mask, bias, seed, inv_freq, xpos)``.
        dtype: what autocast makes of q, k and v; None to leave them.
    """

    run: Callable[..., Tensor]
    dtype: torch.dtype | None


_PLANS: dict[object, Plan] = {}
_MOST_PLANS = 1024


def plan_of(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Plan:
    """The plan for a call; its arguments are those of ``_made``, and checked as there."""
    if torch.compiler.is_compiling():
        return _made(q, k, v, *arguments)
    return _cached(q, k, v, *arguments)


def _cached(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Plan:
    """``_made``, for calls of one kind once: the checks take longer than a launch."""
    try:
        kind = (
            _kind(q), _kind(k), _kind(v), *map(_kind, arguments), torch.is_grad_enabled(),
            autocast_dtype(q.device),
        )  # fmt: skip
        plan = _PLANS.get(kind)
    except (AttributeError, TypeError):  # no tensor, or nothing to look up by: the checks will say
        return _made(q, k, v, *arguments)
    if plan is None:
        plan = _made(q, k, v, *arguments)
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        _PLANS[kind] = plan
    return plan


def _kind(argument: Any) -> Any:
    """All of ``argument`` that a plan depends on."""
    if isinstance(argument, Tensor):
        x = argument
        return type(x), x.shape, x.dtype, x.device, x.requires_grad, x.is_contiguous()
    if isinstance(argument, Rotary):
        return _kind(argument.inv_freq), argument.use_xpos, argument.scale_base
    if isinstance(argument, dict):
        return tuple(sorted(argument.items()))
    # 1, 1.0 and True are equal, and not all of them right.
    return argument if argument is None else (type(argument), argument)


def _made(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | int,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | None,
    shared_qk: bool,
    dropout: float,
    dropout_seed: Tensor | None,
    rotary: Rotary | None,
    backend: BackendName,
    kernel_options: dict[str, Any] | None,
) -> Plan:
    """Checks the arguments and picks the path."""
    window = as_window(window)
    dtype = q.dtype if isinstance(q, Tensor) else None
    q, k, v = checked(
        q, k, v, window, mask, attn_bias, scale, shared_qk, dropout, rotary, backend, kernel_options
    )
    check_seed(dropout_seed, q)
    choice = choice_of(
        q, k, v, window, mask, attn_bias, shared_qk, dropout, rotary, backend, kernel_options
    )
    settled: dict[str, Any] = {
        "window": window,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "shared_qk": shared_qk,
        "dropout": dropout,
    }
    if choice.backend == "eager":
        if backend == "auto" and q.device.type == "cuda" and q.numel() and v.numel():
            flex.warn_once(choice.reason)
        run: Callable[..., Tensor] = partial(eager.attend, **settled)
    else:
        xpos_base = None if rotary is None or rotary.xpos is None else rotary.xpos.base
        run = flex.prepared(
            four_dimensional(q, mask),
            four_dimensional(k, mask),
            v,
            xpos_base=xpos_base,
            masked=mask is not None,
            biased=attn_bias is not None,
            rotated=rotary is not None,
            flash=choice.flash,
            kernel_options=kernel_options,
            **settled,
        )
    return Plan(run, None if q.dtype == dtype else q.dtype)


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | None,
    shared_qk: bool,
    dropout: float,
    rotary: Rotary | None,
    backend: BackendName,
    kernel_options: dict[str, Any] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of the call, once everything fits."""
    check_backend(backend)
    check_scale(scale)
    check_flag("shared_qk", shared_qk)
    check_dropout(dropout)
    check_kernel_options(kernel_options)
    check_qkv(q, k, v)
    check_mask(mask, q)
    check_bias(attn_bias, q, window)
    check_rotary(rotary)
    if rotary is not None:
        check_head_size(rotary.dim, q)
        check_xpos_reach(rotary, window)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def choice_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    shared_qk: bool,
    dropout: float,
    rotary: Rotary | None,
    backend: BackendName,
    kernel_options: dict[str, Any] | None,
) -> Choice:
    """The path for checked arguments, and why."""
    plain = mask is None and attn_bias is None and not shared_qk and dropout == 0
    plain = plain and (rotary is None or not rotary.use_xpos)
    flash = flex.prefers_flash(q, k, v, window, plain, kernel_options)
    return choose(backend, q, k, v, window, attn_bias, dropout, rotary, flash)


def four_dimensional(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(*lead, n, d)`` as ``(b, h, n, d)``, the rows in the same order; a view but in 5-D."""
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(0, -4)
    rows = math.prod(x.shape[:-2])
    # Rows that share a mask become heads of one batch entry, so that the mask has no heads.
    batch = 1 if mask is None else mask.shape[0]
    return x.reshape(batch, rows // batch, *x.shape[-2:])
