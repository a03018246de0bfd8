"""What serves calls of a kind: compiled callables, with their block lists, or kernels of others."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..positions import rule_of
from ..spec import Inputs, Result, Spec, is_placed, numbered
from ..torch_limits.compiling import mark_length_dynamic
from . import dense, flash_attention
from .attend import attend, blocks_of, with_offsets_in_memory
from .engines import Engine
from .kept import kept
from .kernel import Blocks
from .own_graph import for_one_kind, in_own_graph, without_gradients_on_cpu
from .split import in_parts, parts_of
from .tuning import Tuning, tuning_of, without_bounds
from .turned import Turn, turned

_Lists = tuple[Tensor, ...]
"""The index tensors of a block mask."""


def prepared(spec: Spec, inputs: Inputs, engine: Engine) -> Callable[[Inputs], Result]:
    """Local attention by fused kernels, for calls like this one.

    Args:
        spec: the call, resolved.
        inputs: its tensors, shaped.
        engine: whose kernels are called.

    Returns:
        A function of a call's shaped tensors, with the result of ``attend``.
    """
    parts = parts_of(spec, inputs)
    if parts is None:
        return _prepared(spec, inputs, engine)
    made: dict[object, Callable[[Inputs], Result]] = {}

    def run_of(part: Inputs) -> Callable[[Inputs], Result]:
        if torch.compiler.is_compiling():
            return _prepared(spec, part, engine)
        kind = part.q.shape[:2]
        if kind not in made:
            made[kind] = _prepared(spec, part, engine)
        return made[kind]

    return lambda inputs: in_parts(parts, inputs, run_of)


def _prepared(spec: Spec, inputs: Inputs, engine: Engine) -> Callable[[Inputs], Result]:
    """``prepared`` of calls that one launch of a kernel serves."""
    if engine == "flash":
        return _called_directly(spec, inputs)
    if engine == "dense":
        return dense.prepared(spec, inputs)
    tuning = tuning_of(spec, inputs, engine == "flash by flex")
    if torch.compiler.is_compiling():
        return partial(_in_a_users_graph, spec, tuning)
    if engine == "flex":
        tuning = without_bounds(tuning, spec, inputs)
    return _with_own_graph(spec, inputs, tuning)


def turning(spec: Spec, inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """What rotates queries and keys of calls like this one, without xpos, and nothing else."""
    if torch.compiler.is_compiling():
        return partial(_turned, spec)
    turn_of = _turn_of(spec, inputs)

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _Turned.apply(inputs.q, inputs.k, turn_of(inputs))  # type: ignore[no-untyped-call]
        return found

    return run


class _Turned(torch.autograd.Function):
    """Rotation by ``turn``, which turns gradients back as well.

    The backward pass of a compiled graph would first copy gradients that are parts of larger ones.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        ctx.turn = turn
        return turn(q, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.turn(q, k, back=True), None


def _turn_of(spec: Spec, inputs: Inputs) -> Callable[[Inputs], Turn]:
    """What rotates, for calls like this one: of a call's tensors, a function of queries and keys.

    One graph serves both directions.
    """
    with torch.no_grad():
        like = _of_turning(inputs)._replace(q=inputs.q.detach(), k=inputs.k.detach())
        run = _with_own_graph(spec, like, None)

    def turn(places: Inputs, q: Tensor, k: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        assert places.inv_freq is not None
        inv_freq = -places.inv_freq if back else places.inv_freq
        with torch.no_grad():
            q, k = run(places._replace(q=q.detach(), k=k.detach(), inv_freq=inv_freq))
        return q, k

    return lambda inputs: partial(turn, _of_turning(inputs))


def _of_turning(inputs: Inputs) -> Inputs:
    """``inputs`` without what does not place tokens, to be kept until the backward pass."""
    none = inputs.q.new_empty(0)  # no part of another tensor, whose memory it would hold
    return inputs._replace(
        q=none, k=none, v=none, mask=None, bias=None, seed=None, zeta=None, sinks=None
    )


def _turned(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    inputs = with_offsets_in_memory(numbered(inputs))
    return turned(rule_of(spec, inputs), None, inputs, None)


def _called_directly(spec: Spec, inputs: Inputs) -> Callable[[Inputs], Result]:
    """By FlashAttention 4's own functions: only what turns queries and keys is compiled here."""
    attend = partial(flash_attention.attend, spec)
    if inputs.inv_freq is None or torch.compiler.is_compiling():
        return attend
    turn_of = _turn_of(spec, inputs)
    return lambda inputs: attend(inputs, turn_of(inputs))


def _with_own_graph(
    spec: Spec, inputs: Inputs, tuning: Tuning | None
) -> Callable[[Inputs], Result]:
    """``attend`` with ``tuning``, compiled; without one, queries and keys, turned."""
    q, k, v, mask, bias, _, inv_freq, *_ = inputs
    # Each kernel has a callable of its own, so that torch's recompile limit counts for it alone.
    kind = [(x.dtype, x.device, x.shape[-1], x.requires_grad) for x in (q, k, v)]
    decodes = tuning is not None and tuning.decodes(q.shape[2])
    optional = (
        mask is not None,
        None if bias is None else bias.shape[0],
        inv_freq is not None,
        *(x is not None for x in inputs[_FIRST_OPTIONAL:]),
        len(q) if decodes else None,  # what such a kernel is compiled for
    )
    compiled = _compiled(
        spec._replace(backend="flex"), tuning, *kind, q.shape[1], k.shape[1], *optional,
        torch.is_grad_enabled(),
    )  # fmt: skip
    device, placed, call = q.device, is_placed(inputs), for_one_kind(compiled)
    blocks = None  # where the graph makes the lists of each call
    if tuning is not None and mask is None and not inputs.rule_tensors and not placed:
        blocks = blocks_of(spec, spec.rule, inputs, tuning)

    def run(inputs: Inputs) -> Result:
        if placed:
            inputs = with_offsets_in_memory(inputs)
        lists = None if blocks is None else _lists(blocks, device)
        return call(lists, *without_gradients_on_cpu(inputs))

    return run


_FIRST_OPTIONAL = Inputs._fields.index("sinks")


def _in_a_users_graph(spec: Spec, tuning: Tuning, inputs: Inputs) -> Result:
    return attend(spec, inputs, tuning)


@lru_cache(maxsize=256)
def _compiled(spec: Spec, tuning: Tuning | None, *kind: object) -> Callable[..., Result]:
    def call(lists: _Lists | None, *inputs: Any) -> Result:
        if tuning is None:
            return _turned(spec, Inputs(*inputs))
        return attend(spec, Inputs(*inputs), tuning, lists)

    name = f"fused_{spec.rule.reach.label}_{abs(hash((spec, tuning, kind))):x}"
    return in_own_graph(call, name)


def _lists(blocks: Blocks, device: torch.device) -> _Lists:
    """The lists of the block mask, kept from call to call."""
    return kept(blocks, device, partial(_made_lists, blocks, device))


def _made_lists(blocks: Blocks, device: torch.device) -> _Lists:
    lists = blocks.lists(device)
    for x in lists:
        mark_length_dynamic(x, 2)
    return lists
