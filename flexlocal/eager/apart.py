"""Long documents as calls of their own, on processors.

Windows of documents in a row begin anywhere, and a tile of queries needs more keys than where they
begin at tiles. A call has a cost of its own: short documents stay together.
Shapes are those of ``spec``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Inputs, Result, Spec, wants_gradients
from ..torch_limits.tensors import has_values
from ..torch_limits.tracing import is_transformed

LEAST, LEAST_IN_TRAINING = 2**26, 2**27
"""Products in a document that is worth a call; measured with 8 heads of 64, and 32 to 512 tokens in
a window."""


class Piece(NamedTuple):
    """Tokens in a row: those of a document, or of several that stay together."""

    tokens: int
    alone: bool


def pieces_of(spec: Spec, inputs: Inputs) -> list[list[Piece]] | None:
    """The pieces of each row of documents; None where one call takes them all.

    Numbers of documents are read, which a processor does without waiting.

    Args:
        inputs: shaped.
    """
    documents, q = inputs.documents, inputs.q
    if documents is None or q.device.type != "cpu" or inputs.q_offset is not None:
        return None
    if torch.compiler.is_compiling() or is_transformed() or not has_values(documents):
        return None
    entries, by_head, _ = documents.shape
    # Weights are dropped by the tokens' places in the row.
    if spec.dropout > 0 or by_head > 1 or inputs.begin is not None:
        return None
    for x in (inputs.bias, inputs.sinks):
        if entries > 1 and x is not None and q.shape[1] % x.shape[0]:
            return None
    least = least_tokens(spec, inputs)
    pieces = [_pieces_of(row[0], least) for row in documents]
    return pieces if any(piece.alone for row in pieces for piece in row) else None


def least_tokens(spec: Spec, inputs: Inputs) -> int:
    """Tokens in a document that is worth a call; a window at least."""
    q, v, window = inputs.q, inputs.v, spec.rule.window
    assert inputs.documents is not None
    entries = q.shape[0] if inputs.documents.shape[0] == 1 else 1
    of_a_token = entries * q.shape[1] * window.reach.keys * (q.shape[3] + v.shape[3])
    products = LEAST_IN_TRAINING if wants_gradients(inputs) else LEAST
    least: int = max(products // max(of_a_token, 1), window.size)
    return least


def _pieces_of(row: Tensor, least: int) -> list[Piece]:
    numbers, counts = torch.unique_consecutive(row, return_counts=True)
    found: list[Piece] = []
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        alone = number >= 0 and count >= least
        if found and not alone and not found[-1].alone:
            found[-1] = Piece(found[-1].tokens + count, False)
        else:
            found.append(Piece(count, alone))
    return found


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
