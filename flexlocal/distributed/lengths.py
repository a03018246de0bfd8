"""How many tokens of a sequence lie on each rank."""

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..masks.arguments import check_count, kind_of
from ..torch_limits.sizes import plain_int
from .agreement import group_of


def shard_lengths(n: int, group: dist.ProcessGroup | DeviceMesh) -> list[int]:
    """Tokens on each rank of a sequence of ``n`` that ``shard_sequence`` cuts.

    All ranks hold as many, or the first ones a token more.

    Raises:
        ValueError, TypeError: ``n`` is negative or no int, or ``group`` no group.
    """
    check_count("n", n, least=0)
    ranks = dist.get_world_size(group_of(group))
    return [n // ranks + (rank < n % ranks) for rank in range(ranks)]


def checked_lengths(lengths: object, group: dist.ProcessGroup, *sizes: int) -> list[int]:
    """``lengths`` as plain ints, one for each rank, this one's as it is.

    Args:
        sizes: how many tokens this rank holds, in each of its tensors.

    Raises:
        ValueError, TypeError: they are not.
    """
    if not isinstance(lengths, Sequence):
        raise TypeError(f"lengths must be a sequence of ints or None, got {kind_of(lengths)}")
    found = [plain_int(x) if isinstance(x, int) else x for x in lengths]
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(found) != ranks:
        raise ValueError(f"lengths must be one for each of {ranks} ranks, got {len(found)}")
    for length in found:
        check_count("each of lengths", length, least=0)
    if any(size != found[rank] for size in sizes):
        raise ValueError(
            f"lengths must say for rank {rank} how many tokens it holds, {sizes[0]}, got "
            f"{found[rank]}"
        )
    return found
