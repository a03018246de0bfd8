"""What the ranks of a group tell each other before tensors travel: lengths, and whether all fit.

One small message from each rank to each, over the CPU, so that no GPU is waited for. A rank whose
arguments are wrong says so there, and every rank raises, where the others would wait for its keys.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..masks.arguments import kind_of


def group_of(group: object) -> dist.ProcessGroup:
    """The process group that a user gave.

    Raises:
        TypeError: it is neither a group nor a mesh.
        ValueError: a mesh of several dimensions, or a group that this process is not of.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a DeviceMesh of one dimension, such as mesh['sequence'], got one of "
                f"{group.ndim}"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {kind_of(group)}")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process is a rank of, got one that it is not")
    return group


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="shards are agreed upon between ranks: with lengths=..., as flexlocal.distributed."
    "shard_lengths gives them, nothing is left to agree upon and the graph does not break"
)
def agreed(
    group: dist.ProcessGroup, sizes: tuple[int, int], facts: Mapping[str, object] | Exception
) -> tuple[list[int], list[int]]:
    """The sizes of all ranks, once all of them have said that they can go on.

    Args:
        sizes: of this rank.
        facts: what must be the same on all ranks, by name; or why this rank cannot go on.

    Returns:
        For each of ``sizes``, that of every rank.

    Raises:
        Exception: ``facts``, if it is one.
        ValueError: another rank cannot go on, or facts differ; the message names them.
    """
    on_host, ranks = _host_group(group), dist.get_world_size(group)
    failed = isinstance(facts, Exception)
    digest = 0 if isinstance(facts, Exception) else _digest(facts)
    own = torch.tensor([failed, *sizes, digest], dtype=torch.int64, device="cpu")
    found = torch.empty(ranks * len(own), dtype=torch.int64, device="cpu")
    dist.all_to_all_single(found, own.repeat(ranks), group=on_host)
    failures, first, second, digests = found.view(ranks, -1).T.tolist()
    if any(failures) or len(set(digests)) > 1:
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, _words(facts) if failed else facts, group=on_host)
        if isinstance(facts, Exception):
            raise facts
        raise ValueError(_fault(told))
    return first, second


def _fault(told: list[Any]) -> str:
    """Why ranks cannot go on; ``told`` is words of a failure or facts, for each rank."""
    for rank, words in enumerate(told):
        if isinstance(words, str):
            return f"rank {rank} of group cannot take part: {words}"
    name, rank = next(
        (name, rank)
        for rank, facts in enumerate(told)
        for name in told[0]
        if facts[name] != told[0][name]
    )
    return (
        f"{name} must be the same on all ranks of group, got {told[0][name]} on rank 0 and "
        f"{told[rank][name]} on rank {rank}"
    )


def _words(failure: object) -> str:
    return f"{type(failure).__name__}: {failure}"


def _digest(facts: Mapping[str, object]) -> int:
    found = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=8).digest()
    return int.from_bytes(found, "big", signed=True)


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that sends the CPU's tensors; made when first asked for."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    known = _HOST_GROUPS.get(group.group_name)
    if known is None or known[0] is not group:
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _HOST_GROUPS[group.group_name] = known = (group, made)
    return known[1]


_HOST_GROUPS: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
"""By name, a group that was asked for and the one made for it."""
