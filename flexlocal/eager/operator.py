"""The eager path as one operator of torch, which compilers keep whole.

A compiler that looked inside would compute all tiles at once, by loops that it writes itself, and
take two to three times as long on a processor. Its graphs are kept on disk and read by other
processes: an operator's arguments are tensors and plain numbers, from which it makes the call anew.
Shapes are those of ``spec``.
"""

from collections.abc import Iterator, Sequence
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
from ..torch_limits.tracing import is_exporting, is_transformed, seen_as_constant
from . import apart, fused, fused_autograd
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
    first = last = documents = None
    window, numbers = rule.window, []
    if window is not None:
        # Not dataclasses.astuple: torch 2.11 cannot trace its deepcopy.
        numbers += [window.size, int(window.causal), window.look_backward]
        numbers += [window.ahead, int(window.exact)]
    if not rule.is_window:
        first, last = fused.bounds(rule, q, k)
        reach, lead = rule.reach, rule.lead
        assert isinstance(lead, int)
        bounds = [reach.keys, reach.back, reach.ahead, reach.align, lead]
        documents = inputs.documents if apart.may_serve(spec, inputs) else None
        # Threads as they are now: both passes have to cut alike.
        numbers = bounds if documents is None else [*bounds, *numbers, _threads()]
    query_draws, key_draws = draws or (None, None)
    call = _Call(
        q, k, v, bias, inputs.sinks, mask, query_draws, key_draws, inputs.zeta, first, last,
        documents, numbers, spec.scale, spec.softcap, spec.dropout, spec.xpos_base, spec.shared_qk,
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
        documents: as in ``Inputs``, where they may be calls of their own.
        numbers: the ``Window``'s, or those of ``Bounds``; with ``documents`` then the window's, and
            how many threads there are.
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
    documents: Tensor | None
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
        keys, back, ahead, align, lead = self.numbers[:5]
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
    def alone(self) -> "_Call":
        """The call of a single document, which is as long as this one."""
        if self.documents is None:
            return self
        return self._replace(first=None, last=None, documents=None, numbers=self.numbers[5:10])

    @property
    def keeps_result(self) -> bool:
        """Whether the backward pass is given the output and log-sum-exps, whatever the length.

        A compiler asks, which may not know lengths.
        """
        spec, inputs = self.alone.described
        return self.trains and fused.has_backward(spec, spec.rule, inputs)

    @property
    def shape_of_lse(self) -> Sequence[int]:
        """Of the log-sum-exps that the operator returns."""
        return self.q.shape[:-1] if self.return_lse or self.keeps_result else (0,)

    def parts(self) -> Iterator[tuple[slice, slice, "_Call"]] | None:
        """The calls that documents are cut into, and which batch entries and tokens each has.

        None where one call takes them all.
        """
        if self.documents is None:
            return None
        spec, inputs = self.alone.described
        inputs = inputs._replace(documents=self.documents)
        pieces = apart.pieces_of(spec, inputs, self.trains, self.numbers[10])
        return None if pieces is None else self._cut(pieces)

    def _cut(
        self, pieces: Sequence[Sequence[apart.Piece]]
    ) -> Iterator[tuple[slice, slice, "_Call"]]:
        for row, of_row in enumerate(pieces):
            entries, start = slice(row, row + 1) if len(pieces) > 1 else slice(None), 0
            for piece in of_row:
                tokens = slice(start, start + piece.tokens)
                part = self._within(entries, tokens)
                yield entries, tokens, part.alone if piece.alone else part._replace(documents=None)
                start += piece.tokens

    def _within(self, entries: slice, tokens: slice) -> "_Call":
        """The call of some tokens, which see no others, of some batch entries."""

        def cut(x: Tensor) -> Tensor:
            return x[entries if x.shape[0] > 1 else slice(None), :, tokens]

        assert self.first is not None and self.last is not None
        return self._replace(
            q=cut(self.q),
            k=cut(self.k),
            v=cut(self.v),
            mask=None if self.mask is None else cut(self.mask),
            first=cut(self.first) - tokens.start,
            last=cut(self.last) - tokens.start,
        )

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


@seen_as_constant
def _threads() -> int:
    return torch.get_num_threads()


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
    with without_autocast(call.q.device):
        lse = _log_sum_exps(call.q, call.shape_of_lse)
        parts = call.parts()
        if parts is None:
            out, found = _attend(call)
            return out, found if found.shape == lse.shape else lse
        out = empty_output(call.q, call.v)
        for entries, tokens, part in parts:
            out[entries, :, tokens], found = _attend(part)
            if lse.numel() and found.numel():
                lse[entries, :, tokens] = found
    return out, lse


def _attend(call: _Call) -> tuple[Tensor, Tensor]:
    """``attend_in_tiles`` of all tokens at once; log-sum-exps are ``(0,)`` where it has none."""
    spec, inputs = call.described
    if call.trains and fused.serves_backward(spec, spec.rule, inputs):
        return fused_autograd.result(spec, spec.rule, inputs)
    if fused.serves(spec, spec.rule, inputs):
        out = output_by_torch(spec, spec.rule, operands_of(inputs))
        return out, _log_sum_exps(call.q, (0,))
    out, lse = outputs(*call.in_tiles())
    return out, _log_sum_exps(call.q, (0,)) if lse is None else lse


def _log_sum_exps(q: Tensor, shape: Sequence[int]) -> Tensor:
    """Such as nothing asks for, or as are yet to be filled in."""
    return q.new_full(shape, torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))


@attend_in_tiles.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    compute = torch.promote_types(call.q.dtype, torch.float32)
    return empty_output(call.q, call.v), call.q.new_empty(call.shape_of_lse, dtype=compute)


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
        parts = call.parts()
        if parts is None:
            return _gradients(call, grad, grad_lse, out, lse)
        totals = [None if x is None else torch.zeros_like(x) for x in call.learned]
        for entries, tokens, part in parts:
            of_lse, *result = [
                None if x is None else x[entries, :, tokens] for x in (grad_lse, out, lse)
            ]
            found = iter(_gradients(part, grad[entries, :, tokens], of_lse, *result))
            for x, total in zip(part.learned, totals, strict=True):
                if x is not None and total is not None:
                    by_token = x.dim() == 4  # all but the sinks'
                    (total[entries, :, tokens] if by_token else total).add_(next(found))
    return [x for x in totals if x is not None]


def _gradients(
    call: _Call, grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> list[Tensor]:
    """``gradients_in_tiles`` of all tokens at once."""
    spec, inputs = call.described
    if out is not None and lse is not None and fused.serves_backward(spec, spec.rule, inputs):
        return list(fused_autograd.gradients(spec, spec.rule, inputs, (out, lse), grad))
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
