"""``local_attention``: checks its arguments once, picks the path and runs it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import eager, flex
from .backend import BackendName, Choice, choose
from .checks import (
    check_backend,
    check_bias,
    check_dropout,
    check_head_size,
    check_mask,
    check_qkv,
    check_scale,
    check_seed,
)
from .masks import Window
from .masks.keys import mask_of_rows
from .masks.picture import MOST_DENSE
from .masks.spans import from_spans
from .rotary import Rotary


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Tensor:
    """Attention of each query to the keys that ``window`` lets it see.

    Args:
        q: ``(*lead, n, d)``; any length ``n``, any leading sizes.
        k: as ``q``; in 4 dimensions it may have fewer heads, a divisor of ``q``'s.
        v: as ``k``, its last size ``d_v`` free.
        window: the rule; an int is the size of a window that looks one back and one forward.
        mask: boolean ``(batch, n)``, True for keys to keep; ``batch`` divides ``q``'s rows (its
            leading sizes multiplied), and rows share a mask in runs of ``rows / batch``.
        attn_bias: ``(heads, W, window.span)``, added to the scores, indexed by the query's place
            in its window and the key's place in the windows that it looks at; ``heads`` divides
            ``q``'s rows, and row ``r`` takes ``r % heads``. It may require a gradient.
        scale: of the products of queries and keys, ``d ** -0.5`` by default.
        shared_qk: keys are scaled to length 1, and a token attends to itself only when it sees
            nothing else (Reformer, arXiv:2001.04451).
        dropout: probability to drop an attention weight after the softmax, in [0, 1).
        dropout_seed: 0-d int64 tensor that decides which weights; by default drawn from torch's
            generator. Either path drops the same weights for the same seed.
        rotary: rotates queries and keys first.
        backend: ``"auto"``, ``"flex"`` (one fused kernel) or ``"eager"`` (plain tensor
            operations, linear in ``n``). ``explain`` says what ``auto`` takes.
        kernel_options: passed to ``flex_attention``.

    Returns:
        ``(*lead, n, d_v)`` with ``q``'s leading sizes and dtype (autocast's, under autocast). A
        query that sees no key gives zeros.

    Raises:
        ValueError: an argument does not fit; the message names it and says what would.
        TypeError: an argument is of the wrong kind.
    """
    if torch.compiler.is_compiling():
        plan = _planned(
            q, k, v, window, mask, attn_bias, scale, shared_qk, dropout, dropout_seed, rotary,
            backend, kernel_options,
        )  # fmt: skip
    else:
        plan = _kept_plan(
            q, k, v, window, mask, attn_bias, scale, shared_qk, dropout, dropout_seed, rotary,
            backend, kernel_options,
        )  # fmt: skip
    if plan.dtype is not None:
        q, k, v = q.to(plan.dtype), k.to(plan.dtype), v.to(plan.dtype)
    if dropout == 0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), device=q.device)
    inv_freq = xpos = None
    if rotary is not None:
        inv_freq, xpos = rotary.inv_freq, rotary.xpos
    if q.dim() == 4 and mask is None:
        return plan.run(q, k, v, None, attn_bias, dropout_seed, inv_freq, xpos)
    lead = q.shape[:-2]
    q, k, v = (_four_dimensional(x, mask) for x in (q, k, v))
    key_mask = None if mask is None else mask_of_rows(mask, q.shape[0], q.shape[1])
    out = plan.run(q, k, v, key_mask, attn_bias, dropout_seed, inv_freq, xpos)
    return out.reshape(*lead, *out.shape[-2:])


def attention_map(
    q: Tensor,
    k: Tensor,
    window: Window | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    shared_qk: bool = False,
    rotary: Rotary | None = None,
    dense: bool = False,
) -> Tensor:
    """The weights that ``local_attention`` mixes values with, before dropout.

    Args:
        dense: all pairs of tokens instead of the window, for up to ``MOST_DENSE`` of them.
        The others are those of ``local_attention``.

    Returns:
        ``(*lead, n, window.span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, as in ``attn_bias``; 0 where it is hidden or outside the
        sequence. A row sums to 1, or to 0 where a query sees no key. With ``dense``
        ``(*lead, n, n)``, a column for each key.

    Raises:
        ValueError, TypeError: as ``local_attention``, and for a dense map that is too large.
    """
    window = _window(window)
    q, k, _ = _checked(q, k, k, window, mask, attn_bias, scale, 0.0, rotary, "eager")
    n, lead, d = q.shape[-2], q.shape[:-2], q.shape[-1]
    if dense and n * n > MOST_DENSE:
        raise ValueError(
            f"dense must be False for q of length {n}: its square is above {MOST_DENSE} pairs"
        )
    q, k = (_four_dimensional(x, mask) for x in (q, k))
    found = eager.weights(
        q,
        k,
        window=window,
        key_mask=None if mask is None else mask_of_rows(mask, q.shape[0], q.shape[1]),
        bias=attn_bias,
        scale=d**-0.5 if scale is None else scale,
        shared_qk=shared_qk,
        inv_freq=None if rotary is None else rotary.inv_freq,
        xpos=None if rotary is None else rotary.xpos,
    ).reshape(*lead, n, window.span)
    return from_spans(found, window) if dense else found


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    rotary: Rotary | None = None,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Choice:
    """Which path ``local_attention`` would take for these arguments, and why.

    Raises as ``local_attention`` does.
    """
    window = _window(window)
    q, k, v = _checked(q, k, v, window, mask, attn_bias, scale, dropout, rotary, backend)
    return _choice(
        q, k, v, window, mask, attn_bias, shared_qk, dropout, rotary, backend, kernel_options
    )


@dataclass(frozen=True)
class _Plan:
    """What all calls of one kind share.

    Attributes:
        run: the chosen path: ``run(q, k, v, key_mask, bias, seed, inv_freq, xpos)``.
        dtype: what autocast makes of q, k and v; None to leave them.
    """

    run: Callable[..., Tensor]
    dtype: torch.dtype | None


_PLANS: dict[object, _Plan] = {}
_MOST_PLANS = 1024


def _kept_plan(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> _Plan:
    """``_planned``, for calls of one kind once: the checks take longer than a launch."""
    try:
        kind = (
            _kind(q), _kind(k), _kind(v), *map(_kind, arguments), torch.is_grad_enabled(),
            torch.is_autocast_enabled(q.device.type) and torch.get_autocast_dtype(q.device.type),
        )  # fmt: skip
        plan = _PLANS.get(kind)
    except (AttributeError, TypeError):  # no tensor, or nothing to look up by: the checks will say
        return _planned(q, k, v, *arguments)
    if plan is None:
        plan = _planned(q, k, v, *arguments)
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


def _planned(
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
) -> _Plan:
    """Checks the arguments and picks the path."""
    window = _window(window)
    dtype = q.dtype if isinstance(q, Tensor) else None
    q, k, v = _checked(q, k, v, window, mask, attn_bias, scale, dropout, rotary, backend)
    check_seed(dropout_seed, q)
    choice = _choice(
        q, k, v, window, mask, attn_bias, shared_qk, dropout, rotary, backend, kernel_options
    )
    settled: dict[str, Any] = {
        "window": window,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "shared_qk": shared_qk,
        "dropout": dropout,
    }
    if choice.backend == "eager":
        run: Callable[..., Tensor] = partial(eager.attend, **settled)
    else:
        xpos_base = None if rotary is None or rotary.xpos is None else rotary.xpos.base
        run = flex.prepared(
            _four_dimensional(q, mask),
            _four_dimensional(k, mask),
            v,
            xpos_base=xpos_base,
            masked=mask is not None,
            biased=attn_bias is not None,
            rotated=rotary is not None,
            flash=choice.flash,
            kernel_options=kernel_options,
            **settled,
        )
    return _Plan(run, None if q.dtype == dtype else q.dtype)


def _window(window: Window | int) -> Window:
    return window if isinstance(window, Window) else Window(window)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | None,
    dropout: float,
    rotary: Rotary | None,
    backend: BackendName,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of the call, once everything fits."""
    check_backend(backend)
    check_scale(scale)
    check_dropout(dropout)
    check_qkv(q, k, v)
    check_mask(mask, q)
    check_bias(attn_bias, q, window)
    if rotary is not None:
        check_head_size(rotary.dim, q)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _choice(
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
    plain = mask is None and attn_bias is None and not shared_qk and dropout == 0
    plain = plain and (rotary is None or not rotary.use_xpos)
    flash = flex.prefers_flash(q, k, v, window, plain, kernel_options)
    return choose(backend, q, k, v, attn_bias, dropout, flash)


def _four_dimensional(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(*lead, n, d)`` as ``(b, h, n, d)``, the rows in the same order; a view but in 5-D."""
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(0, -4)
    rows = math.prod(x.shape[:-2])
    # Rows that share a mask become heads of one batch entry, so that the mask has no heads.
    batch = 1 if mask is None else mask.shape[0]
    return x.reshape(batch, rows // batch, *x.shape[-2:])
