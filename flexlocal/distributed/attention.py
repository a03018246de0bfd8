"""``sharded_local_attention``: local attention over a sequence that lies on several ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..dispatch import checked, choose
from ..masks import Rule
from ..masks.arguments import check_flag, kind_of
from ..rotary import Rotary
from ..spec import BackendName, Inputs, Spec, call_of
from .agreement import agreed, group_of
from .documents import begins, summary
from .exchange import gathered, tied
from .lengths import checked_lengths
from .plan import Sight, plan, runs
from .shard import Keys, attend, own_keys, turned
from .travel import start


def sharded_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    lengths: Sequence[int] | None = None,
    overlap: bool = True,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    documents: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Any:
    """``local_attention`` over a sequence of which each rank holds a run.

    Rank by rank the runs make up the sequence. They may be of any lengths, shorter than the window
    or empty. A rank receives the keys and values that its queries see and that lie elsewhere, from
    as many ranks as hold them, and sends their gradients back. Every rank of ``group`` has to make
    the call, and the backward pass of it. The result is this rank's part of what one call over the
    whole sequence gives, with the same dropped weights.

    Args:
        q, k, v, mask, documents: this rank's run of what ``local_attention`` takes.
        window: a ``Window`` or its size, the same on all ranks, as are all arguments below.
        group: the ranks: a process group, or a mesh of one dimension.
        lengths: tokens on each rank, as ``shard_lengths`` gives them for sequences cut by
            ``shard_sequence``. They save the message by which ranks otherwise agree on each call,
            and are needed inside ``torch.compile(fullgraph=True)``. Then nothing finds out that
            shards do not fit together: a rank that fails leaves the others waiting.
        overlap: compute queries that see no key of another rank in a call of their own while the
            others' keys travel. False makes a single call, after they have come; so does
            ``torch.compile``, in whose graphs nothing is computed while something travels.
        dropout_seed: as for ``local_attention``; rank 0's counts.
        q_offset, kv_offset: positions of the whole sequence's first query and key: ints, or one
            integer tensor ``(batch,)`` for both.
        attn_bias, scale, softcap, sinks, shared_qk, dropout, rotary, return_lse, backend,
            kernel_options: as for ``local_attention``. The gradients of bias and sinks are this
            rank's share: their sum over the ranks is that of one call.

    Returns:
        As ``local_attention``, for this rank's queries.

    Raises:
        ValueError: an argument does not fit, here or on another rank; unless ``lengths`` are given
            every rank raises.
        TypeError: an argument of this rank is of the wrong kind.
    """
    group = group_of(group)
    try:
        check_flag("overlap", overlap)
        given, inputs = call_of(
            q, k, v, window, mask, attn_bias, scale, softcap, sinks, shared_qk, dropout,
            dropout_seed, rotary, documents, q_offset, kv_offset, return_lse, backend,
            kernel_options,
        )  # fmt: skip
        spec, inputs = checked(given, inputs)
        check_shardable(spec, inputs)
        sizes = inputs.q.shape[-2], inputs.k.shape[-2]
        facts: dict[str, object] | Exception = {}
        if lengths is None:
            choose(spec, inputs)  # which may refuse, and has to before the others wait
            facts = _facts(spec, inputs)
    except Exception as error:
        if lengths is not None:
            raise
        sizes, facts = (0, 0), error
    if lengths is None:
        queries, keys = agreed(group, sizes, facts)
    else:
        queries = keys = checked_lengths(lengths, group, *sizes)
    return _attended(given, inputs, group, queries, keys, overlap)


def check_shardable(spec: Spec, inputs: Inputs) -> None:
    """What sharding asks for beside what every call does.

    Raises:
        ValueError: it is not so.
    """
    if not spec.rule.is_window:
        raise ValueError(
            f"window must be a Window over several ranks, got {type(spec.rule).__name__}: other "
            "rules count from the first key of a call"
        )
    q_offset, kv_offset = inputs.q_offset, inputs.kv_offset
    numbers = all(x is None or isinstance(x, int) for x in (q_offset, kv_offset))
    if not numbers and q_offset is not kv_offset:
        raise ValueError(
            "q_offset and kv_offset must be ints or the same tensor over several ranks, got "
            f"{kind_of(q_offset)} and {kind_of(kv_offset)}: which keys travel must be known on the "
            "host"
        )


def _facts(spec: Spec, inputs: Inputs) -> dict[str, object]:
    """What must be the same on all ranks, by the name that an error gives it."""
    q, k, v = inputs[:3]
    learns = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)

    def without_length(x: Tensor | None) -> object:
        return None if x is None else tuple(x.shape[:-1])

    def shape(x: Tensor | None) -> object:
        return None if x is None else tuple(x.shape)

    def number(x: int | Tensor | None) -> object:
        return tuple(x.shape) if isinstance(x, Tensor) else x or 0

    return {
        "q's leading sizes": tuple(q.shape[:-2]),
        "k's leading sizes": tuple(k.shape[:-2]),
        "head size": q.shape[-1],
        "v's last size": v.shape[-1],
        "dtype of q, k and v": str(q.dtype),
        "kind of device": q.device.type,
        "window": spec.rule.reach.label,
        "dropout": spec.dropout,
        "scale": spec.scale,
        "softcap": spec.softcap,
        "shared_qk": spec.shared_qk,
        "xpos's scale_base": spec.xpos_base,
        "rotary's dim": shape(inputs.inv_freq),
        "mask's batch": without_length(inputs.mask),
        "documents' batch": without_length(inputs.documents),
        "attn_bias's shape": shape(inputs.bias),
        "sinks' shape": shape(inputs.sinks),
        "q_offset": number(inputs.q_offset),
        "kv_offset": number(inputs.kv_offset),
        "whether k or v requires a gradient": learns,
    }


def _attended(
    spec: Spec,
    inputs: Inputs,
    group: dist.ProcessGroup,
    queries: Sequence[int],
    keys: Sequence[int],
    overlap: bool,
) -> Any:
    """The call, once all ranks are known to fit."""
    rank = dist.get_rank(group)
    overlap = overlap and not torch.compiler.is_compiling()
    mine = plan(sight_of(spec, inputs), rank, queries, keys, overlap)
    inputs = turned(mine, spec, inputs)
    if spec.dropout > 0:
        inputs = inputs._replace(seed=_seed_of_rank_0(inputs, group))
    documents = inputs.documents
    if documents is not None:
        documents = documents if documents.dim() == 2 else documents[None]
        told = gathered(summary(documents, mine.own), group)
        documents = begins(documents, told, runs(keys), rank)
    own = own_keys(mine, Keys(inputs.k, inputs.v, inputs.mask, documents))
    if not mine.travels:
        found = attend(mine, spec, inputs, own, lambda: [None] * len(keys))
    else:
        halo = start(mine, own, group)
        found = attend(mine, spec, inputs, own, lambda: halo()[0])
        if not mine.halo:
            _, nothing = halo()
            found = tied(found, [nothing]) if nothing.requires_grad else found
    return found[0] if len(found) == 1 else tuple(found)


def sight_of(spec: Spec, inputs: Inputs) -> Sight:
    """Which keys the queries of a call may see, as far as the host knows."""
    q_offset, kv_offset = (0 if x is None else x for x in (inputs.q_offset, inputs.kv_offset))
    window = spec.rule.window
    if isinstance(q_offset, int) and isinstance(kv_offset, int):
        return Sight(window, q_offset, kv_offset, known=inputs.documents is None)
    return Sight(window, known=False)


def _seed_of_rank_0(inputs: Inputs, group: dist.ProcessGroup) -> Tensor:
    seed = inputs.seed
    if seed is None:  # drawn on every rank, so that their generators stay in step
        seed = torch.randint(2**63 - 1, (), device=inputs.q.device)
    return gathered(seed, group)[0]
