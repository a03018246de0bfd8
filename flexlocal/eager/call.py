"""A call as an operator of torch is given it: as tensors and plain numbers.

A compiler's graphs are kept on disk and read by other processes, so that an operator makes the call
anew from these.
Shapes are those of ``spec``.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..masks.rule import Reach, Rule
from ..masks.window import Window
from ..spec import Inputs, Spec, wants_gradients
from ..torch_limits.tracing import seen_as_constant
from . import apart, fused
from .bounds import Bounds
from .cutting import in_tiles
from .formula import Formula, Operands
from .tiles import Sizes


class Call(NamedTuple):
    """The arguments of ``operator``'s operators.

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
    def alone(self) -> "Call":
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

    def parts(self) -> Iterator[tuple[slice, slice, "Call"]] | None:
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
    ) -> Iterator[tuple[slice, slice, "Call"]]:
        for row, of_row in enumerate(pieces):
            entries, start = slice(row, row + 1) if len(pieces) > 1 else slice(None), 0
            for piece in of_row:
                tokens = slice(start, start + piece.tokens)
                part = self._within(entries, tokens)
                yield entries, tokens, part.alone if piece.alone else part._replace(documents=None)
                start += piece.tokens

    def _within(self, entries: slice, tokens: slice) -> "Call":
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


def call_of(spec: Spec, rule: Rule, inputs: Inputs, draws: tuple[Tensor, Tensor] | None) -> Call:
    """A call that ``operator.serves``; arguments as ``in_tiles``."""
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
    return Call(
        q, k, v, bias, inputs.sinks, mask, query_draws, key_draws, inputs.zeta, first, last,
        documents, numbers, spec.scale, spec.softcap, spec.dropout, spec.xpos_base, spec.shared_qk,
        spec.return_lse, wants_gradients(inputs),
    )  # fmt: skip


@seen_as_constant
def _threads() -> int:
    return torch.get_num_threads()


@lru_cache
def _window_of(size: int, causal: int, backward: int, forward: int, exact: int) -> Window:
    return Window(size, bool(causal), backward, forward, bool(exact))


_IN_SCHEMAS: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    float: "float",
    float | None: "float?",
    bool: "bool",
}

ARGUMENTS = ", ".join(f"{_IN_SCHEMAS[kind]} {x}" for x, kind in get_type_hints(Call).items())
"""``Call`` as an operator's schema has it."""
