"""What one rank computes from its own keys and its halo: ``local_attention`` at its positions.

Nothing here knows of other processes, so that ranks can be simulated one after the other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..spec import Inputs, Spec, offsets_of
from .documents import begin_of_first
from .exchange import cut, filled_in, tied
from .plan import Plan, Portion, Run

TOKENS = {"k": -2, "v": -2, "mask": -1, "begins": -1}
"""The dimension of tokens, by the field of ``Keys``."""


class Keys(NamedTuple):
    """Keys, and what goes with each.

    Attributes:
        k, v: ``(*lead, m, d or d_v)``.
        mask: boolean ``(batch, m)``.
        begins: int32 ``(batch, m)``, the index in the whole sequence at which a key's document
            begins, -1 for padding.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    begins: Tensor | None = None


Call = Callable[[Portion, Tensor, Run | None], list[Tensor]]
"""The results of a portion, from its queries, and from which of them see keys where not all do."""


class Own(NamedTuple):
    """A rank's own keys, whole and in pieces.

    Attributes:
        whole: all of them.
        pieces: by run of indices in the whole sequence, those that travel or that a portion of the
            queries sees beside the halo.
        nothing: an empty piece.
    """

    whole: Keys
    pieces: dict[Run, Keys]
    nothing: Keys

    def piece(self, run: Run) -> Keys:
        """The keys of ``run``, which may be empty."""
        return self.pieces[run] if run.size else self.nothing


def turned(plan: Plan, spec: Spec, inputs: Inputs) -> Inputs:
    """The rank's tensors, queries and keys rotated: each key once, on the rank that has it.

    Not with xpos, whose factors depend on the queries that read a key, nor with ``shared_qk``,
    which first scales keys.
    """
    if inputs.inv_freq is None or spec.xpos_base is not None or spec.shared_qk:
        return inputs
    # Positions are indices here: between tokens of a document both are as far apart.
    tokens, keys = Portion(plan.queries, plan.own), Keys(inputs.k, inputs.v)
    q, k = dispatch.turned(spec, _placed(tokens, inputs, inputs.q, keys))
    return inputs._replace(q=q, k=k, inv_freq=None)


def own_keys(plan: Plan, keys: Keys) -> Own:
    """The pieces of a rank's own keys that ``plan`` asks for."""
    sends = [run for run in plan.sends if run.size]
    seen = [portion.keys.within(plan.own) for portion in plan.portions if plan.needs_halo(portion)]
    wanted = [run for run in dict.fromkeys((*sends, *seen)) if run.size and run != plan.own]
    local = [Run(0, 0), *(run.less(plan.own.start) for run in wanted)]
    by_field = {
        name: [None] * (1 + len(local)) if x is None else cut(x, local, TOKENS[name])
        for name, x in keys._asdict().items()
    }
    whole, nothing, *pieces = (
        Keys(**dict(zip(by_field, one, strict=True)))
        for one in zip(*by_field.values(), strict=True)
    )
    return Own(whole, {plan.own: whole, **dict(zip(wanted, pieces, strict=True))}, nothing)


def attend(
    plan: Plan, spec: Spec, inputs: Inputs, own: Own, halo: Callable[[], Sequence[Keys | None]]
) -> list[Tensor]:
    """Attention of the rank's queries.

    Args:
        spec: the call.
        inputs: the rank's tensors; offsets are those of the whole sequence. Keys, values, mask and
            documents are taken from ``own`` and ``halo``.
        halo: gives the keys that have come from each rank. It is called once, and only after all
            that needs no halo has been computed.

    Returns:
        ``(*lead, n, d_v)``, and with ``return_lse`` the log-sum-exps ``(*lead, n)``.
    """
    if not plan.queries.size:
        return _nothing(spec, inputs, own.whole)
    came: Sequence[Keys | None] | None = None

    def call(portion: Portion, q: Tensor, seeing: Run | None) -> list[Tensor]:
        nonlocal came
        keys = own.whole
        if plan.needs_halo(portion):
            came = halo() if came is None else came
            keys = _keys_of(plan, portion, own, came)
        placed = _placed(portion, inputs, q, keys)._replace(seeing=seeing)
        results = dispatch.attend(spec, placed)
        return [results] if isinstance(results, Tensor) else list(results)

    if len(plan.portions) == 1:
        return call(plan.portions[0], inputs.q, None)
    return _of_portions(plan, inputs.q, call)


def _of_portions(plan: Plan, q: Tensor, call: Call) -> list[Tensor]:
    """The results of several portions, without a copy of queries, of output or of gradients.

    All queries are in the call that needs no halo, where the others see nothing.
    """
    places = {portion: portion.queries.less(plan.queries.start) for portion in plan.portions}
    edges = [portion for portion in plan.portions if plan.needs_halo(portion)]
    (inside,) = places.keys() - edges
    whole, *pieces = cut(q, [places[portion] for portion in edges], -2)
    found = {inside: call(Portion(plan.queries, plan.own), whole, places[inside])}
    found |= {portion: call(portion, x, None) for portion, x in zip(edges, pieces, strict=True)}
    out, *lse = found[inside]
    out = filled_in(out, {places[portion]: found[portion][0] for portion in edges}, -2)
    if not lse:
        return [out]
    found[inside][1] = lse[0].narrow(-1, places[inside].start, places[inside].size)
    return [out, torch.cat([found[portion][1] for portion in plan.portions], dim=-1)]


def _nothing(spec: Spec, inputs: Inputs, keys: Keys) -> list[Tensor]:
    """The results of a rank without queries; they depend on the tensors that others' depend on."""
    q, d_v = inputs.q, inputs.v.shape[-1]
    out = q[..., :1].expand(*q.shape[:-1], d_v)
    lse = q.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    others = [x for x in (keys.k, keys.v, inputs.bias, inputs.sinks) if x is not None]
    return tied([out, lse] if spec.return_lse else [out], others)


def _keys_of(plan: Plan, portion: Portion, own: Own, came: Sequence[Keys | None]) -> Keys:
    """The keys of a portion, own ones and others, in order."""
    parts = []
    for rank, (run, keys) in enumerate(zip(plan.receives, came, strict=True)):
        if rank == plan.rank:
            of_own = portion.keys.within(plan.own)
            if of_own.size:
                parts.append(own.pieces[of_own])
            continue
        seen = run.within(portion.keys)
        if keys is not None and seen.size:
            parts.append(_narrowed(keys, seen.less(run.start)))
    if len(parts) == 1:
        return parts[0]

    def joined(pieces: Any, name: str) -> Any:
        return None if pieces[0] is None else torch.cat(pieces, dim=TOKENS[name])

    return Keys(*map(joined, zip(*parts, strict=True), Keys._fields))


def _narrowed(keys: Keys, run: Run) -> Keys:
    def part(x: Any, name: str) -> Any:
        return None if x is None else x.narrow(TOKENS[name], run.start, run.size)

    return Keys(*map(part, keys, Keys._fields))


def _placed(portion: Portion, inputs: Inputs, q: Tensor, keys: Keys) -> Inputs:
    """The tensors of a portion's call, at the positions of its queries and keys."""
    q_offset, kv_offset = (0 if x is None else x for x in (inputs.q_offset, inputs.kv_offset))
    same = q_offset is kv_offset and portion.queries.start == portion.keys.start
    first_query = q_offset + portion.queries.start
    first_key = first_query if same else kv_offset + portion.keys.start
    documents, begin = keys.begins, None
    if documents is not None and documents.shape[-1]:
        begin = begin_of_first(documents, kv_offset, math.prod(q.shape[:-2]))
    offsets = offsets_of(q, keys.k, first_query, first_key)
    return inputs._replace(
        q=q, k=keys.k, v=keys.v, mask=keys.mask, documents=documents, q_offset=offsets[0],
        kv_offset=offsets[1], begin=begin,
    )  # fmt: skip
