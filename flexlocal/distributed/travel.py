"""The halo of one call: keys, values, and what goes with each, from rank to rank."""

import math
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from .exchange import Arrival, sent
from .plan import Plan, Run
from .shard import TOKENS, Keys, Own

Halo = tuple[list[Keys | None], Tensor]
"""The keys that have come from each rank, and the numbers that they were made of."""


def start(plan: Plan, own: Own, group: dist.ProcessGroup) -> Callable[[], Halo]:
    """Sends each rank the keys that it needs; returns what waits for those that this one needs.

    Keys and values travel together; key masks and documents, where there are any, each by
    themselves.
    """
    crossings = {
        fields: _start(plan, own, fields, group)
        for fields in (("k", "v"), ("mask",), ("begins",))
        if getattr(own.whole, fields[0]) is not None
    }

    def arrived() -> Halo:
        came: list[dict[str, Tensor]] = [{} for _ in plan.receives]
        received = {fields: crossing() for fields, crossing in crossings.items()}
        for fields, numbers in received.items():
            counts = [_count(own, name, run) for run in plan.receives for name in fields]
            parts = iter(numbers.split(counts))
            for run, keys in zip(plan.receives, came, strict=True):
                for name in fields:
                    keys[name] = next(parts).view(_shape(own, name, run))
        halo = [
            Keys(**keys) if run.size else None
            for run, keys in zip(plan.receives, came, strict=True)
        ]
        return halo, received["k", "v"]

    return arrived


def _start(plan: Plan, own: Own, fields: Sequence[str], group: dist.ProcessGroup) -> Arrival:
    parts, counts = [], []
    for to, come in zip(plan.sends, plan.receives, strict=True):
        parts.append([getattr(own.piece(to), name) for name in fields])
        counts.append(sum(_count(own, name, come) for name in fields))
    return sent(parts, counts, group)


def _shape(own: Own, name: str, run: Run) -> list[int]:
    """The shape of a field over so many keys."""
    x, dim = getattr(own.whole, name), TOKENS[name]
    shape = list(x.shape)
    shape[dim] = run.size
    return shape


def _count(own: Own, name: str, run: Run) -> int:
    return math.prod(_shape(own, name, run))
