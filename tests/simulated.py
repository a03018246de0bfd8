"""Ranks of a group as a loop in one process: travel is handing over, all else is the code's own.

The graph of gradients runs through all ranks, as it does through all processes.
"""

import torch

from flexlocal.distributed.attention import sight_of
from flexlocal.distributed.documents import begins, summary
from flexlocal.distributed.plan import plan, runs
from flexlocal.distributed.shard import Keys, attend, own_keys, turned
from flexlocal.masks.window import as_rule
from flexlocal.spec import Inputs, Spec, offsets_of, rotation_of


def along(x, run, dim):
    return None if x is None else x.narrow(dim, run.start, run.size)


def attention(q, k, v, window, queries, keys, overlap=True, **arguments):
    """``local_attention`` of whole tensors, computed by ranks that hold so many of its tokens."""
    rule, (base, inv_freq, zeta) = as_rule(window), rotation_of(arguments["rotary"])
    names = ("scale", "shared_qk", "softcap", "return_lse", "backend", "dropout")
    spec = Spec(rule, xpos_base=base, **{x: arguments[x] for x in names if x in arguments})
    offsets = offsets_of(q, k, arguments["q_offset"], arguments["kv_offset"])
    documents = arguments["documents"]
    if documents is not None and documents.dim() == 1:
        documents = documents[None]
    every = []
    for own_queries, own_run in zip(runs(queries), runs(keys), strict=True):
        every.append(
            Inputs(
                along(q, own_queries, -2), along(k, own_run, -2), along(v, own_run, -2),
                along(arguments["mask"], own_run, -1), arguments["attn_bias"],
                arguments.get("dropout_seed"), inv_freq, zeta, (), arguments["sinks"],
                along(documents, own_run, -1), *offsets,
            )
        )  # fmt: skip
    sight = sight_of(spec, every[0])
    plans = [plan(sight, rank, queries, keys, overlap) for rank in range(len(queries))]
    every = [turned(own, spec, x) for own, x in zip(plans, every, strict=True)]
    told = None
    if documents is not None:
        told = torch.stack([summary(x.documents, p.own) for x, p in zip(every, plans, strict=True)])
    owns = []
    for rank, x in enumerate(every):
        places = None if told is None else begins(x.documents, told, runs(keys), rank)
        owns.append(own_keys(plans[rank], Keys(x.k, x.v, x.mask, places)))
    found = []
    for rank, x in enumerate(every):
        came = [
            owns[other].pieces[run] if run.size else None
            for other, run in enumerate(plans[rank].receives)
        ]
        found.append(attend(plans[rank], spec, x, owns[rank], lambda came=came: came))
    out, *lse = zip(*found, strict=True)
    if not lse:
        return torch.cat(out, dim=-2)
    return torch.cat(out, dim=-2), torch.cat(lse[0], dim=-1)
