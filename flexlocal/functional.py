"""``local_attention``; ``explain`` says which path it takes, ``attention_map`` what it weighs."""

from typing import Any

import torch
from torch import Tensor

from . import eager
from .backend import Choice, choose
from .call import BackendName, Call
from .masks import Window
from .masks.keys import for_each_head, mask_of_rows
from .masks.spans import MOST_DENSE, from_spans
from .masks.window import as_window
from .plan import checked, four_dimensional, plan_of
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
        scale: factor on the query-key products, ``d ** -0.5`` by default.
        shared_qk: keys are scaled to length 1, and a token attends to itself only when it sees
            nothing else (Reformer, arXiv:2001.04451).
        dropout: probability to drop an attention weight after the softmax, in [0, 1).
        dropout_seed: 0-d int64 tensor that decides which weights; by default drawn from torch's
            generator. Either path drops the same weights for the same seed.
        rotary: a ``Rotary`` of ``q``'s head size, on its device, that turns queries and keys first.
        backend: ``"auto"``, ``"flex"`` (one fused kernel) or ``"eager"`` (plain tensor
            operations, linear in ``n``). ``explain`` says what ``auto`` takes.
        kernel_options: passed to ``flex_attention``; None with ``backend="eager"``, and without
            effect where ``"auto"`` takes that path.

    Returns:
        ``(*lead, n, d_v)`` with ``q``'s leading sizes and dtype (autocast's, under autocast, which
        leaves float64 alone). A query that sees no key gives zeros.

    Raises:
        ValueError: an argument does not fit; the message names it and says what would.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on the fused path, where torch leaves the kernel uncompiled.
    """
    plan = plan_of(
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
    if q.dim() == 4 and mask is None:  # as below, without the microseconds that it takes
        return plan.run(q, k, v, None, attn_bias, dropout_seed, inv_freq, xpos)
    lead = q.shape[:-2]
    q, k, v = (four_dimensional(x, mask) for x in (q, k, v))
    key_mask, (k, v) = _masked(mask, q, k, v)
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

    Args as those of ``local_attention``, and:
        dense: all pairs of tokens instead of the window, for up to 4096 tokens.

    Returns:
        ``(*lead, n, window.span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, as in ``attn_bias``; 0 where it is hidden or outside the
        sequence. A row sums to 1, or to 0 where a query sees no key. With ``dense``
        ``(*lead, n, n)``, a column for each key.

    Raises:
        ValueError, TypeError: as ``local_attention``, and for a dense map that is too large.
    """
    call = Call(q, k, k, as_window(window), mask, attn_bias, scale, shared_qk, rotary=rotary)
    call = checked(call)
    n, lead, span = q.shape[-2], q.shape[:-2], call.window.span
    if dense and n * n > MOST_DENSE:
        raise ValueError(
            f"dense must be False for q of length {n}: its square is above {MOST_DENSE} pairs"
        )
    q, k = four_dimensional(call.q, mask), four_dimensional(call.k, mask)
    key_mask, (k,) = _masked(mask, q, k)
    found = eager.weights(
        q,
        k,
        window=call.window,
        key_mask=key_mask,
        bias=attn_bias,
        scale=call.factor,
        shared_qk=shared_qk,
        inv_freq=call.inv_freq,
        xpos=call.xpos,
    ).reshape(*lead, n, span)
    return from_spans(found, call.window) if dense else found


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
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Choice:
    """Which path ``local_attention`` would take for its arguments, and why.

    Raises:
        ValueError, TypeError: as ``local_attention``.
    """
    call = Call(
        q, k, v, as_window(window), mask, attn_bias, scale, shared_qk, dropout, dropout_seed,
        rotary, backend, kernel_options,
    )  # fmt: skip
    return choose(checked(call))


def _masked(
    mask: Tensor | None, q: Tensor, *keys: Tensor
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The key mask of ``q``'s rows, and the keys, by query head where the mask is."""
    if mask is None:
        return None, keys
    key_mask = mask_of_rows(mask, q.shape[0], q.shape[1])
    if key_mask.shape[1] > 1:
        keys = tuple(for_each_head(x, q.shape[1]) for x in keys)
    return key_mask, keys
