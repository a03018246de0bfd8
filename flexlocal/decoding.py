"""Attention of new tokens to those in a cache and to each other.

The cache stores the new tokens, and a rule says which of its keys they see; the rest is a call like
any other. Few tokens are attended to where they lie, in the ring. More of them, a prompt, would
overwrite keys that their first ones see: then the ring is laid out in order before them, and what
is copied is as long as the prompt or the window.

Shapes: ``b`` rows, ``h`` query heads, ``n`` new tokens, ``d`` the head size.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, step
from .cache import LocalCache, at_tokens
from .dispatch import Choice
from .flex import tuning
from .flex.own_graph import for_one_kind, in_own_graph, without_gradients_on_cpu
from .masks.arguments import kind_of
from .masks.ring import Ring
from .rotation import rotate, table_of
from .spec import Inputs, Spec, resolved, with_plain_numbers
from .torch_limits.tracing import is_tracing


def attend(spec: Spec, inputs: Inputs, cache: LocalCache) -> Any:
    """Local attention of new tokens, which the cache stores; arguments in a user's shapes.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    spec, inputs, known = _checked(spec, inputs, cache)
    return known.run(spec, inputs, cache)


def choose(spec: Spec, inputs: Inputs, cache: LocalCache) -> Choice:
    """The path that ``attend`` would take."""
    spec, inputs, known = _checked(spec, inputs, cache)
    choice = _choice(spec, inputs, cache)
    if inputs.mask is not None or known.run is not _of_slices:
        return choice
    if step.slice_of(inputs.q, cache) is None:
        return choice
    return replace(choice, reason=f"{choice.reason}; a slice of the ring, without a mask")


def _choice(spec: Spec, inputs: Inputs, cache: LocalCache) -> Choice:
    """The path of a call that fits its cache."""
    first, n = cache.lengths, inputs.q.shape[2]
    inputs = inputs._replace(mask=None)  # of new tokens: it says which are stored
    if _fit_in_ring(spec, n, cache):
        call = _over_ring(spec, inputs, cache, cache.rule(first))
    else:
        rows, room = cache.keys.shape[:2], cache.slots + n
        k, v = (x.new_empty(*rows, room, x.shape[3]) for x in (inputs.k, inputs.v))
        call = _over_order(spec, inputs, cache, k, v, first)
    return dispatch.choose(*dispatch.checked(*call))


_Run = Callable[[Spec, Inputs, LocalCache], Any]


def _of_keys(spec: Spec, inputs: Inputs, cache: LocalCache) -> Any:
    """Over the ring or what it held and the new keys, by any path."""
    order = None if inputs.mask is None else _order_of(inputs.mask)
    if order is not None:
        q, k, v = (at_tokens(x, order.tokens) for x in inputs[:3])
        inputs = inputs._replace(q=q, k=k, v=v, mask=None)
    inputs = _turned(spec, inputs, cache)
    count = inputs.q.shape[2] if order is None else order.taken
    found = dispatch.attend(*_stored(spec, inputs, cache, count))
    if order is None:
        return found
    if isinstance(found, Tensor):
        return order.back(found, 0.0)
    out, lse = found
    return order.back(out, 0.0), order.back(lse[..., None], -torch.inf)[..., 0]


def _of_slices(spec: Spec, inputs: Inputs, cache: LocalCache) -> Any:
    """Over a slice of the ring, if all that tokens see lies in one."""
    seen = None if inputs.mask is not None else step.slice_of(inputs.q, cache)
    if seen is None:
        return _of_keys(spec, inputs, cache)
    return step.attend(spec, _turned(spec, inputs, cache), cache, seen)


def _in_own_graph(spec: Spec, inputs: Inputs, cache: LocalCache) -> _Run:
    """``_of_keys`` in one graph: a GPU has done a kernel before the host has launched the next."""
    q, keys, n = inputs.q, cache.keys, inputs.q.shape[2]
    given: list[object] = [type(x) for x in inputs]
    # Sizes that lead to other code count against a limit of their own.
    compiled = _compiled(
        resolved(spec, inputs), keys.dtype, keys.device, keys.shape[1:], cache.values.shape[-1],
        q.shape[1], *given, _fit_in_ring(spec, n, cache), n > cache.slots,
        len(q) if n == 1 else None, torch.is_grad_enabled(), tuning.overridden(),
    )  # fmt: skip
    call = for_one_kind(compiled)
    return lambda _, inputs, cache: call(cache, *without_gradients_on_cpu(inputs))


@lru_cache(maxsize=256)
def _compiled(spec: Spec, *kind: object) -> Callable[..., Any]:
    name = f"decoded_{spec.rule.reach.label}_{abs(hash((spec, kind))):x}"
    options = None if spec.kernel_options is None else dict(spec.kernel_options)
    spec = spec._replace(backend="flex", kernel_options=options)

    def call(cache: LocalCache, *inputs: Any) -> Any:
        return _of_keys(spec, Inputs(*inputs), cache)

    return in_own_graph(call, name, (".window", ".rewindable", ".slots"))


class _Order(NamedTuple):
    """How the tokens that a mask keeps come first in their rows.

    Attributes:
        tokens: int64 ``(b, n)``, the tokens in their new order.
        taken: int32 ``(b,)``, how many are kept.
        place: int64 ``(b, n)``, the new place of each token that is kept.
        kept: the mask.
    """

    tokens: Tensor
    taken: Tensor
    place: Tensor
    kept: Tensor

    def back(self, x: Tensor, value: float) -> Tensor:
        """``x`` ``(b, h, n, d)`` in the old order, with ``value`` for tokens that are not kept."""
        return at_tokens(x, self.place).masked_fill(~self.kept[:, None, :, None], value)


def _order_of(mask: Tensor) -> _Order:
    tokens = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    counted = mask.cumsum(1)
    return _Order(tokens, mask.sum(1, dtype=torch.int32), (counted - 1).clamp(min=0), mask)


def _turned(spec: Spec, inputs: Inputs, cache: LocalCache) -> Inputs:
    """The call with its tokens rotated; xpos's factors count from a window's place."""
    if inputs.inv_freq is None or spec.xpos_base is not None:
        return inputs
    q, k = inputs.q, inputs.k
    position = (cache.lengths[:, None] + torch.arange(q.shape[2], device=q.device))[:, None]
    table = table_of(position, inputs.inv_freq, q.dtype)
    q, k = (rotate(x, table).to(x.dtype) for x in (q, k))
    return inputs._replace(q=q, k=k, inv_freq=None)


def _stored(
    spec: Spec, inputs: Inputs, cache: LocalCache, count: int | Tensor
) -> tuple[Spec, Inputs]:
    """The call over the cache's keys, which include its own."""
    k, v = inputs.k, inputs.v
    if _fit_in_ring(spec, k.shape[2], cache):
        return _over_ring(spec, inputs, cache, cache.append(k, v, count))
    return _over_order(spec, inputs, cache, *cache.extend(k, v, count))


def _fit_in_ring(spec: Spec, n: int, cache: LocalCache) -> bool:
    """Whether ``n`` tokens are attended to where they lie."""
    return n <= cache.fits and spec.xpos_base is None


def _over_ring(spec: Spec, inputs: Inputs, cache: LocalCache, rule: Ring) -> tuple[Spec, Inputs]:
    inputs = inputs._replace(k=cache.keys, v=cache.values, rule_tensors=rule.tensors)
    return spec._replace(rule=rule), inputs


def _over_order(
    spec: Spec, inputs: Inputs, cache: LocalCache, k: Tensor, v: Tensor, first: Tensor
) -> tuple[Spec, Inputs]:
    return spec, inputs._replace(k=k, v=v, q_offset=first, kv_offset=first - cache.slots)


class _Known(NamedTuple):
    """What all calls of a kind share.

    Attributes:
        dtype: what autocast wants for q, k and v, if they have another.
        run: how they are attended to.
    """

    dtype: torch.dtype | None
    run: _Run


_CHECKED: dict[object, _Known] = {}
"""By kind of call."""


def _checked(spec: Spec, inputs: Inputs, cache: object) -> tuple[Spec, Inputs, _Known]:
    """The call in autocast's dtype, and fit for its cache; checked once for all of a kind.

    All of it is checked here: a call that fails must leave the cache as it was.
    """
    if not isinstance(cache, LocalCache):
        raise TypeError(f"cache must be a LocalCache or None, got {kind_of(cache)}")
    spec = with_plain_numbers(spec)
    check = partial(_check, spec, inputs, cache)
    if torch.compiler.is_compiling() or is_tracing():
        known = check()
    else:
        known = dispatch.kept(_CHECKED, check, spec, inputs, cache.kind)
    if known.dtype is not None:
        q, k, v = (x.to(known.dtype) for x in inputs[:3])
        inputs = inputs._replace(q=q, k=k, v=v)
    return spec, inputs, known


def _check(spec: Spec, inputs: Inputs, cache: LocalCache) -> _Known:
    """Refuses what does not fit; gives what ``_CHECKED`` holds."""
    for name in ("documents", "cu_seqlens", "q_offset", "kv_offset"):
        if getattr(inputs, name) is not None:
            raise ValueError(f"{name} must be None with a cache, which counts positions itself")
    _, cast = dispatch.checked(spec, inputs)
    if spec.rule != cache.window:
        raise ValueError(f"cache must have the window {spec.rule!r}, got one for {cache.window!r}")
    if spec.dropout:
        raise ValueError(
            f"dropout must be 0 with a cache, got {spec.dropout}: put the module into eval mode"
        )
    q, k, v, mask = cast[:4]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "cache must be None where q, k or v requires a gradient: call under torch.no_grad()"
        )
    for name, x, held in (("k", k, cache.keys), ("v", v, cache.values)):
        wanted = (*held.shape[:2], x.shape[-2], held.shape[-1])
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name} must have the shape {wanted} for its cache, got {tuple(x.shape)}"
            )
        if x.dtype != held.dtype or x.device != held.device:
            raise ValueError(
                f"{name} must be {held.dtype} on {held.device} as its cache is, got {x.dtype} on "
                f"{x.device}"
            )
    if mask is not None and mask.shape[0] != q.shape[0]:
        raise ValueError(
            f"mask must have a row for each of the cache's {q.shape[0]}, got {tuple(mask.shape)}"
        )
    dtype = q.dtype if any(x.dtype != q.dtype for x in inputs[:3]) else None
    return _Known(dtype, _run_of(spec, cast, cache))


def _run_of(spec: Spec, inputs: Inputs, cache: LocalCache) -> _Run:
    """How calls like this one are attended to."""
    if step.serves(spec, inputs):
        return _of_slices
    if torch.compiler.is_compiling() or is_tracing():
        return _of_keys
    if _choice(spec, inputs, cache).backend == "flex":
        return _in_own_graph(spec, inputs, cache)
    return _of_keys
