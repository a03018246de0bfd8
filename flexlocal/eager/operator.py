"""The eager path as one operator of torch, which compilers keep whole.

A compiler that looked inside would compute all tiles at once, by loops that it writes itself, and
take two to three times as long on a processor. Its graphs are kept on disk and read by other
processes: an operator's arguments are tensors and plain numbers, from which it makes the call anew.
Shapes are those of ``spec``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..masks.rule import Entry, Reach, Rule
from ..masks.window import Window
from ..spec import Inputs, Spec, wants_gradients
from ..torch_limits.sizes import Index
from ..torch_limits.tracing import is_exporting, is_transformed
from . import fused, fused_autograd
from .autograd import empty_output, gradients, output_by_torch, outputs
from .cutting import bias_within, in_tiles
from .formula import Formula, Operands, operands_of
from .tiles import Sizes


def serves(spec: Spec, rule: Rule, inputs: Inputs) -> bool:
    """Whether the operator does the call: on the CPU, and not in an exported graph.

    Exported graphs run where there is no flexlocal, and become ONNX. Plain numbers say what a
    ``Window`` is; of another rule the operator knows the bounds, but not the positions, which a
    bias, ``shared_qk`` and xpos go by.
    """
    if inputs.q.device.type != "cpu" or is_exporting() or is_transformed():
        return False
    by_bounds = inputs.bias is None and not spec.shared_qk and spec.xpos_base is None
    return rule.is_window or by_bounds and not rule.has_holes and isinstance(rule.lead, int)


def attend(
    spec: Spec, rule: Rule, inputs: Inputs, draws: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The output ``(b, h, n, d_v)`` and log-sum-exps ``(b, h, n)``; arguments as ``in_tiles``."""
    assert spec.scale is not None
    q, k, v, mask, bias, *_ = inputs
    first = last = None
    if rule.is_window:
        # Not dataclasses.astuple: torch 2.11 cannot trace its deepcopy.
        window = rule.window
        numbers = [window.size, int(window.causal), window.look_backward]
        numbers += [window.ahead, int(window.exact)]
    else:
        first, last = fused.bounds(rule, q, k)
        reach, lead = rule.reach, rule.lead
        assert isinstance(lead, int)
        numbers = [reach.keys, reach.back, reach.ahead, reach.align, lead]
    query_draws, key_draws = draws or (None, None)
    call = _Call(
        q, k, v, bias, inputs.sinks, mask, query_draws, key_draws, inputs.zeta, first, last,
        numbers, spec.scale, spec.softcap, spec.dropout, spec.xpos_base, spec.shared_qk,
        spec.return_lse, wants_gradients(inputs),
    )  # fmt: skip
    out, lse = attend_in_tiles(*call)
    return out, lse if spec.return_lse else None


@dataclass(frozen=True, eq=False)
class Bounds(Rule):
    """A rule whose bounds are written out.

    Args:
        first, last: int32 ``(b or 1, h or 1, n)``.
        known: the reach of the rule whose bounds they are.
        lead: see ``Rule``.
    """

    first: Tensor
    last: Tensor
    known: Reach
    lead: int = 0

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """First and last key that ``query`` sees."""
        entries, heads, _ = self.first.shape
        place: Any = batch if entries > 1 else 0, head if heads > 1 else 0, query
        first: Any = self.first[place]
        last: Any = self.last[place]
        return first, last

    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """Nobody asks: gradients go the way of the tiles."""
        raise NotImplementedError

    @property
    def reach(self) -> Reach:
        """That of the rule whose bounds these are."""
        return self.known

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The bounds."""
        return self.first, self.last

    @property
    def by_head(self) -> bool:
        """Whether the bounds differ by head."""
        return self.first.shape[1] > 1


class _Call(NamedTuple):
    """The operator's arguments.

    Attributes:
        q, k, v, bias, sinks, mask, zeta: as in ``Inputs``.
        query_draws, key_draws: ``Formula.draws``, or None for both.
        first, last: tensors of ``Bounds``; None for both where the rule is a ``Window``.
        numbers: the ``Window``'s, or those of ``Bounds``.
        scale, softcap, dropout, xpos_base, shared_qk, return_lse: as in ``Spec``.
        trains: whether gradients will be taken.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    query_draws: Tensor | None
    key_draws: Tensor | None
    zeta: Tensor | None
    first: Tensor | None
    last: Tensor | None
    numbers: Sequence[int]
    scale: float
    softcap: float | None
    dropout: float
    xpos_base: float | None
    shared_qk: bool
    return_lse: bool
    trains: bool

    @property
    def rule(self) -> Rule:
        """The rule of the call."""
        if self.first is None or self.last is None:
            return _window_of(*self.numbers)
        keys, back, ahead, align, lead = self.numbers
        return Bounds(self.first, self.last, Reach(keys, back, ahead, "bounds", align), lead)

    @property
    def described(self) -> tuple[Spec, Inputs]:
        """The call as the paths take it."""
        spec = Spec(
            self.rule, self.scale, self.shared_qk, self.dropout, self.xpos_base,
            softcap=self.softcap, return_lse=self.return_lse,
        )  # fmt: skip
        inputs = Inputs(
            self.q, self.k, self.v, self.mask, self.bias, zeta=self.zeta, sinks=self.sinks
        )
        return spec, inputs

    @property
    def keeps_result(self) -> bool:
        """Whether the backward pass is given the output and log-sum-exps, whatever the length.

        A compiler asks, which may not know lengths.
        """
        spec, inputs = self.described
        return self.trains and fused.has_backward(spec, spec.rule, inputs)

    def in_tiles(self) -> tuple[Operands, Formula, Sizes]:
        """The call as ``cutting`` makes it."""
        draws = None
        if self.query_draws is not None and self.key_draws is not None:
            draws = self.query_draws, self.key_draws
        spec, inputs = self.described
        return in_tiles(spec, spec.rule, inputs, draws)

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        """The tensors that may be given gradients."""
        return self.q, self.k, self.v, self.bias, self.sinks


@lru_cache
def _window_of(size: int, causal: int, backward: int, forward: int, exact: int) -> Window:
    return Window(size, bool(causal), backward, forward, bool(exact))


_TENSORS = _Call._fields.index("numbers")

_IN_SCHEMAS: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    float: "float",
    float | None: "float?",
    bool: "bool",
}

_ARGUMENTS = ", ".join(f"{_IN_SCHEMAS[kind]} {x}" for x, kind in get_type_hints(_Call).items())
"""``_Call`` as an operator's schema has it."""


@torch.library.custom_op(
    "flexlocal::attend_in_tiles", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def attend_in_tiles(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output ``(b, h, n, d_v)`` and log-sum-exps ``(b, h, n)``.

    Log-sum-exps are ``(0,)`` where neither the caller nor the backward pass asks for them.
    Arguments are those of ``_Call``.
    """
    call = _Call(*arguments)
    spec, inputs = call.described
    with without_autocast(call.q.device):
        if call.trains and fused.serves_backward(spec, spec.rule, inputs):
            return fused_autograd.result(spec, spec.rule, inputs)
        if fused.serves(spec, spec.rule, inputs):
            out = output_by_torch(spec, spec.rule, operands_of(inputs))
            keeps_result = call.trains and fused.has_backward(spec, spec.rule, inputs)
            shape = call.q.shape[:-1] if keeps_result else (0,)
            return out, call.q.new_full(shape, torch.nan)  # nothing asks for them
        out, lse = outputs(*call.in_tiles())
    return out, call.q.new_empty(0) if lse is None else lse


@attend_in_tiles.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    compute = torch.promote_types(call.q.dtype, torch.float32)
    lse = call.q.new_empty(call.q.shape[:-1], dtype=compute)
    kept = call.return_lse or call.keeps_result
    return empty_output(call.q, call.v), lse if kept else call.q.new_empty(0)


@torch.library.custom_op(
    "flexlocal::gradients_in_tiles",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_lse, Tensor? out, Tensor? lse, {_ARGUMENTS}) -> Tensor[]",
)
def gradients_in_tiles(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """The gradients of ``_Call.learned``, from those of the output and the log-sum-exps.

    Args:
        out, lse: what ``attend_in_tiles`` returned, if ``_Call.keeps_result``.
    """
    call = _Call(*arguments)
    with without_autocast(grad.device):
        spec, inputs = call.described
        if out is not None and lse is not None and fused.serves_backward(spec, spec.rule, inputs):
            return list(fused_autograd.gradients(spec, spec.rule, inputs[:3], (out, lse), grad))
        operands, formula, sizes = call.in_tiles()
        *others, grad_bias, grad_sinks = gradients(operands, formula, sizes, grad, grad_lse)
    if call.bias is not None and grad_bias is not None:
        whole = torch.zeros_like(call.bias)
        bias_within(whole, sizes, call.rule).copy_(grad_bias)
        grad_bias = whole
    return [x for x in (*others, grad_bias, grad_sinks) if x is not None]


@gradients_in_tiles.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *arguments: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in _Call(*arguments).learned if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    kept = output if _Call(*inputs).keeps_result else (None, None)
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    call = _Call(*tensors, *ctx.numbers)
    given = grad_lse if call.return_lse else None
    found = iter(gradients_in_tiles(grad, given, out, lse, *call))
    grads = [None if x is None else next(found) for x in call.learned]
    return *grads, *(None for _ in call[len(grads) :])


attend_in_tiles.register_autograd(_backward, setup_context=_keep)
