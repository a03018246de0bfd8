"""Documents that cross the borders of shards.

Positions count from a document's first token, which may lie on an earlier rank. So each rank tells
the others four numbers for each row: its first key's document, its last key's, where the last one's
run begins, and whether that is at its own first key. From these every rank knows where each of its
runs begins in the whole sequence. That index names the document as well as a number does, and is
what travels with the halo.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks.documents import run_ends
from .plan import Run


def summary(documents: Tensor, own: Run) -> Tensor:
    """What other ranks have to know of ``documents`` ``(rows, m)``: int64 ``(rows, 4)``.

    The numbers of the first and of the last key; the index in the whole sequence at which the last
    one's run begins here; and 1 where that is this rank's first key, before which the run may go
    on. Zeros where there is no key.
    """
    if not own.size:
        return torch.zeros(documents.shape[0], 4, dtype=torch.int64, device=documents.device)
    first, _ = run_ends(documents)
    last = first[:, -1]
    ends = documents[:, 0], documents[:, -1], last + own.start, last == 0
    return torch.stack([x.to(torch.int64) for x in ends], dim=-1)


def begins(documents: Tensor, summaries: Tensor, owns: Sequence[Run], rank: int) -> Tensor:
    """Where the document of each key begins: its index in the whole sequence, -1 for padding.

    Args:
        documents: integer ``(rows, m)``, those of this rank.
        summaries: ``summary`` of every rank, ``(ranks, rows, 4)``.
        owns: the keys of every rank.

    Returns:
        int32 ``(rows, m)``.
    """
    own = owns[rank]
    if not own.size:
        return documents.to(torch.int32)
    first = run_ends(documents)[0] + own.start
    # The run that a shard begins with goes on from the shard before, where the numbers are equal.
    earlier = [i for i in range(rank) if owns[i].size]
    if earlier:
        told = torch.stack([summaries[i] for i in (*earlier, rank)])
        first_number, last_number, last_begin, is_first = told.unbind(-1)
        goes_on = first_number[1:] == last_number[:-1]
        begun = torch.cat((torch.zeros_like(goes_on[:1]), goes_on[:-1]))
        # Where the last run of each shard begins, if on that shard; the latest such index counts.
        here = (is_first[:-1] == 0) | ~begun
        latest = torch.where(here, last_begin[:-1], -1).amax(0)
        from_before = goes_on[-1:].T & (first == own.start)
        first = torch.where(from_before, latest[:, None], first)
    return first.masked_fill(documents < 0, -1).to(torch.int32)


def begin_of_first(begins: Tensor, offset: int | Tensor, rows: int) -> Tensor:
    """The position at which each row's first document begins: integer ``(batch,)``.

    Args:
        begins: as ``begins`` returns it, for the keys of one call, at least one.
        offset: position of the whole sequence's first key, a number or integer ``(batch,)``.
        rows: rows of the call. Where it has several batch entries of documents and others of
            offsets, the result is for each row.
    """
    index = begins[:, 0]
    if isinstance(offset, Tensor) and 1 < len(offset) != len(index) > 1:
        index, offset = (x.repeat_interleave(rows // len(x)) for x in (index, offset))
    # The whole sequence's first document counts from position 0, wherever its first key stands.
    return torch.where(index <= 0, 0, (index + offset).clamp(min=0)).to(torch.int32)
