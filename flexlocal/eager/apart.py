"""Documents as calls of their own, on processors, where that costs less.

Windows of documents in a row begin anywhere, and a tile of queries needs more keys than where they
begin at tiles; it knows nothing of documents that are shorter than a window. But a call has a cost
of its own: short documents stay together.
Shapes are those of ``spec``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Inputs, Result, Spec
from ..torch_limits.tensors import has_values
from ..torch_limits.tracing import is_transformed
from .cutting import LEAST_TILE

CALL, CALL_TOGETHER = 2**21, 2**24
"""Products that one thread computes while a call is prepared, of one document and of several. On an
AMD EPYC (Zen 3) with 8 heads of 64 a call took 60 and 400 us by itself forward, and 250 and 700 in
training."""


class Piece(NamedTuple):
    """Tokens in a row: those of a document, or of several that stay together."""

    tokens: int
    alone: bool


def may_serve(spec: Spec, inputs: Inputs) -> bool:
    """Whether documents of such a call may be calls of their own; ``inputs`` are shaped."""
    documents, q = inputs.documents, inputs.q
    if documents is None or q.device.type != "cpu" or inputs.q_offset is not None:
        return False
    entries, by_head, _ = documents.shape
    # Weights are dropped by the tokens' places in the row.
    if spec.dropout > 0 or by_head > 1 or inputs.begin is not None:
        return False
    for x in (inputs.bias, inputs.sinks):
        if entries > 1 and x is not None and q.shape[1] % x.shape[0]:
            return False
    return True


def pieces_of(
    spec: Spec, inputs: Inputs, trains: bool, threads: int | None = None
) -> list[list[Piece]] | None:
    """The pieces of each row of documents; None where one call takes them all.

    Numbers of documents are read, which a processor does without waiting.

    Args:
        inputs: shaped.
        trains: whether gradients will be taken.
        threads: that compute; by default as many as there are.
    """
    documents = inputs.documents
    if torch.compiler.is_compiling() or is_transformed() or not may_serve(spec, inputs):
        return None
    assert documents is not None
    if not has_values(documents):
        return None
    costs = costs_of(spec, inputs, trains, threads or torch.get_num_threads())
    pieces = [_pieces_of(row[0], costs) for row in documents]
    return pieces if any(piece.alone for row in pieces for piece in row) else None


class Costs(NamedTuple):
    """What tokens of documents cost, in products.

    Attributes:
        call, call_together: of a call by itself, of one document and of several.
        of_a_score: products for a score.
        keys, keys_together: scores of a query, in a call of its document's and among others.
        by_documents: whether a tile among others has no keys but its documents', as in inference,
            where torch's kernel computes it.
    """

    call: int
    call_together: int
    of_a_score: int
    keys: int
    keys_together: int
    by_documents: bool = False

    def alone(self, tokens: int) -> int:
        """Of a document of so many tokens in a call of its own."""
        return self.call + self.of_a_score * tokens * min(self.keys, tokens)

    def together(self, tokens: int) -> int:
        """Of such a document in a call with others, less what the call costs by itself."""
        keys = self.keys_together
        if self.by_documents:
            keys = min(keys, LEAST_TILE + 2 * tokens)
        return self.of_a_score * tokens * keys


def costs_of(spec: Spec, inputs: Inputs, trains: bool, threads: int) -> Costs:
    """The costs of a call's rows; arguments as for ``pieces_of``."""
    q, v, reach = inputs.q, inputs.v, spec.rule.window.reach
    assert inputs.documents is not None
    entries = q.shape[0] if inputs.documents.shape[0] == 1 else 1
    of_a_score = entries * q.shape[1] * (q.shape[3] + v.shape[3])
    anywhere = replace(reach, align=1, step=0)  # as documents' windows begin
    keys, keys_together = (x.longest(x.in_steps(LEAST_TILE)) for x in (reach, anywhere))
    keys_together = min(keys_together, q.shape[2])
    calls = threads * CALL, threads * CALL_TOGETHER
    return Costs(*calls, of_a_score, keys, keys_together, by_documents=not trains)


class _Way(NamedTuple):
    """Pieces of the documents so far: the last one, and those before it."""

    cost: float
    last: Piece = Piece(0, False)
    before: "_Way | None" = None


def _cost(way: _Way) -> float:
    return way.cost


def _pieces_of(row: Tensor, costs: Costs) -> list[Piece]:
    """The pieces of a row ``(n,)`` that cost the least together."""
    numbers, counts = torch.unique_consecutive(row, return_counts=True)
    # The cheapest whose last document is alone, and the cheapest that others may still join.
    alone, together = _Way(0.0), _Way(math.inf)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        begun = _Way(alone.cost + costs.call_together, before=alone)
        joined = min(together, begun, key=_cost)
        least = min(alone, together, key=_cost)
        more = costs.alone(count) if number >= 0 else math.inf
        alone = _Way(least.cost + more, Piece(count, True), least)
        tokens = joined.last.tokens + count
        more = costs.together(count)
        together = _Way(joined.cost + more, Piece(tokens, False), joined.before)
    way, found = min(alone, together, key=_cost), []
    while way.before is not None:
        found.append(way.last)
        way = way.before
    return found[::-1]


def attend(
    run: Callable[[Spec, Inputs], Result],
    spec: Spec,
    inputs: Inputs,
    pieces: Sequence[Sequence[Piece]],
) -> Result:
    """The results of ``run`` for all pieces, joined; its arguments as those of the path."""
    rows = zip(_rows(inputs, len(pieces)), pieces, strict=True)
    found = [_joined([run(spec, part) for part in _parts(row, cut)], 2) for row, cut in rows]
    joined: Result = _joined(found, 0)
    return joined


def longest_alone(inputs: Inputs, pieces: Sequence[Sequence[Piece]]) -> Inputs:
    """The longest document that is a call of its own."""
    rows = zip(_rows(inputs, len(pieces)), pieces, strict=True)
    parts = (part for row, cut in rows for part in _parts(row, cut) if part.documents is None)
    return max(parts, key=lambda part: part.q.shape[2])


_BY_TOKEN = ("q", "k", "v", "mask", "documents")
"""``Inputs`` with batch entries first and tokens third."""


def _rows(inputs: Inputs, count: int) -> Iterator[Inputs]:
    """The inputs of each batch entry, where their documents differ."""
    if count == 1:
        return iter([inputs])
    return _cut(inputs, [1] * count, 0)


def _parts(inputs: Inputs, pieces: Sequence[Piece]) -> Iterator[Inputs]:
    cut = _cut(inputs, [piece.tokens for piece in pieces], 2)
    for part, piece in zip(cut, pieces, strict=True):
        yield part._replace(documents=None) if piece.alone else part


def _cut(inputs: Inputs, sizes: list[int], dim: int) -> Iterator[Inputs]:
    given = {name: x for name in _BY_TOKEN if (x := getattr(inputs, name)) is not None}
    # `split` and not slices, each of whose gradients would be as large as the whole.
    for parts in zip(*(x.split(sizes, dim) for x in given.values()), strict=True):
        changes: dict[str, Any] = dict(zip(given, parts, strict=True))
        yield inputs._replace(**changes)


def _joined(results: Sequence[Any], dim: int) -> Any:
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], Tensor):
        return torch.cat(list(results), dim)
    return tuple(torch.cat(x, dim) for x in zip(*results, strict=True))
