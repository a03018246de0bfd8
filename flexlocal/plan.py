"""What calls of one kind share: that their arguments fit, the path, and the dtype.

A warm call finds all this by the kind of its arguments, since checking them anew would take longer
than launching the kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor

from . import eager, flex
from .autocast import autocast_dtype
from .backend import choose
from .call import Call
from .checks import check_call
from .masks import Window
from .masks.window import as_window
from .rotary import Rotary
from .tuning import overridden


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
            autocast_dtype(q.device), overridden(),
        )  # fmt: skip
        plan = _PLANS.get(kind)
    except (AttributeError, TypeError, RuntimeError):  # nothing to look up by: the checks will say
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


def _made(q: Tensor, k: Tensor, v: Tensor, window: Window | int, *arguments: Any) -> Plan:
    """Checks the arguments and picks the path."""
    call = checked(Call(q, k, v, as_window(window), *arguments))
    choice = choose(call)
    if choice.backend == "flex":
        q4, k4, v4 = (four_dimensional(x, call.mask) for x in (call.q, call.k, call.v))
        run = flex.prepared(replace(call, q=q4, k=k4, v=v4), choice.flash)
    else:
        on_gpu = call.q.device.type == "cuda" and call.q.numel() and call.v.numel()
        if call.backend == "auto" and on_gpu:
            flex.warn_once(choice.reason)
        run = partial(
            eager.attend,
            window=call.window,
            scale=call.factor,
            shared_qk=call.shared_qk,
            dropout=call.dropout,
        )
    return Plan(run, None if call.q.dtype == q.dtype else call.q.dtype)


def checked(call: Call) -> Call:
    """The call in its dtype, once everything fits."""
    check_call(call)
    dtype = autocast_dtype(call.q.device)
    if dtype is None or call.q.dtype == torch.float64:
        return call
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def four_dimensional(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(*lead, n, d)`` as ``(b, h, n, d)``, the rows in the same order; a view but in 5-D.

    Compiled, any ``b`` is served by one kernel, but each ``h`` by one of its own.
    """
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(0, -4)
    rows = math.prod(x.shape[:-2])
    # Rows that share a mask become heads of one batch entry, so that the mask has no heads.
    batch = max(1, rows if mask is None else mask.shape[0])
    heads = index(rows // batch)
    # Expanded for a compiler: it would take a quotient of sizes for the heads, not the number.
    return x.reshape(batch, heads, *x.shape[-2:]).expand(-1, heads, -1, -1)
