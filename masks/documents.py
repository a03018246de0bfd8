"""Documents that share a row: maximal runs of equal numbers; negative numbers are padding.

All of it is computed on the device that the numbers are on, without synchronisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_limits.memory import written_out
from .arguments import check_count, check_integers


def documents_from_positions(position_ids: Tensor) -> Tensor:
    """Documents by position: one begins wherever a position is not its predecessor plus one.

    Args:
        position_ids: integer ``(batch, n)`` or ``(n,)``, as Transformers' collators make them.

    Returns:
        int32 of the same shape, the number of each token's document in its row.

    Raises:
        ValueError, TypeError: it is no tensor of these.

    >>> documents_from_positions(torch.tensor([0, 1, 2, 0, 1, 0])).tolist()
    [0, 0, 0, 1, 1, 2]
    """
    check_integers("position_ids", position_ids)
    if position_ids.dim() not in (1, 2):
        raise ValueError(
            f"position_ids must have the shape (batch, n) or (n,), got {tuple(position_ids.shape)}"
        )
    begins = position_ids[..., 1:] != position_ids[..., :-1] + 1
    first = min(1, position_ids.shape[-1])
    return F.pad(begins.cumsum(-1, dtype=torch.int32), (first, 0))


def documents_from_cu_seqlens(cu_seqlens: Tensor, n: int) -> Tensor:
    """Documents by cumulative lengths, as FlashAttention's varlen functions take them.

    Args:
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 on and never decreasing: where each
            document begins, and last where the last one ends.
        n: tokens; those from the last number on are padding.

    Returns:
        int32 ``(n,)``, the number of each token's document, -1 for padding.

    Raises:
        ValueError, TypeError: an argument is not of these.

    >>> documents_from_cu_seqlens(torch.tensor([0, 3, 3, 5]), 6).tolist()
    [0, 0, 0, 2, 2, -1]
    """
    check_cu_seqlens(cu_seqlens)
    n = check_count("n", n, least=0)
    # Computed, and not a slice: on a GPU torch 2.11's Inductor searches a view without its offset.
    counts = torch.int64 if cu_seqlens.dtype == torch.int64 else torch.int32
    last = cu_seqlens[1:].to(counts) - 1
    token = torch.arange(n, dtype=counts, device=cu_seqlens.device)
    number = torch.searchsorted(last, token, out_int32=True)
    return number.masked_fill(number == last.shape[0], -1)


def check_cu_seqlens(cu_seqlens: object) -> None:
    """``cu_seqlens`` is a dense tensor of integers, ``(documents + 1,)``.

    Raises:
        ValueError, TypeError: it is not.
    """
    check_integers("cu_seqlens", cu_seqlens)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have the shape (documents + 1,), got {tuple(cu_seqlens.shape)}"
        )


def run_ends(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last index of each token's run of equal numbers.

    Args:
        documents: integer ``(..., n)``.

    Returns:
        Both int32 ``(..., n)``.
    """
    n = documents.shape[-1]
    flat = documents.flatten()
    index = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
    place = index % max(n, 1)
    # Runs are numbered, so that a binary search finds both ends. Scans other than sums are slow on
    # a GPU: those of one long row run on one multiprocessor.
    begins = (flat != flat.roll(1)) | (place == 0)
    number = written_out(begins.cumsum(0, dtype=torch.int32))
    first = torch.searchsorted(number, number, out_int32=True)
    after = torch.searchsorted(number, number, right=True, out_int32=True)
    row = index - place
    return (first - row).view(documents.shape), (after - 1 - row).view(documents.shape)
