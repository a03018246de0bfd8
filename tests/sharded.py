"""Jobs of ``ranks``: sharded calls against whole ones, and what they send."""

import contextlib
import copy
import math

import placed
import torch
import torch.distributed as dist
from features import windows_of
from hypothesis import assume
from hypothesis import strategies as st

from flexlocal import LocalAttention
from flexlocal.distributed import (
    gather_sequence,
    shard_lengths,
    shard_sequence,
    sharded_local_attention,
)

SUMMARY = 4 * 8  # bytes of what a rank tells of each row's documents


def cuts(tokens, ranks):
    """How many of so many tokens lie on each rank: uneven, some none."""
    edges = st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1).map(sorted)
    return edges.map(lambda at: [b - a for a, b in zip([0, *at], [*at, tokens], strict=True)])


@st.composite
def calls(draw, most_ranks, ranks=None):
    """A call, and how many of its queries and keys lie on each rank."""
    case = draw(placed.placed())
    assume(case.offset_rows is None or case.same_offset)
    ranks = draw(st.integers(1, most_ranks)) if ranks is None else ranks
    queries = draw(cuts(case.case.n, ranks))
    keys = queries if case.q_offset is None else draw(cuts(case.m, ranks))
    return case, queries, keys


def part(x, lengths, rank, dim):
    return None if x is None else x.narrow(dim, sum(lengths[:rank]), lengths[rank])


def shard(call, queries, keys, rank):
    """The rank's run of a call's tensors, leaves that collect gradients."""

    def own(name, x):
        if x is None or name in ("bias", "sinks", "q_offset", "kv_offset"):
            return x
        if name in ("q", "cotangent", "lse_cotangent"):
            return part(x, queries, rank, -1 if name == "lse_cotangent" else -2)
        return part(x, keys, rank, -2 if name in ("k", "v") else -1)

    made = {name: own(name, x) for name, x in vars(call).items()}
    learned = call.learned()
    leaves = {name: made[name].detach().clone().requires_grad_() for name in learned}
    return placed.Tensors(**made | leaves)


def expected(case, dtype, device, **more):
    """What one call gives, by name, with its gradients."""
    call = case.tensors(dtype, device)
    results = case.run(call, return_lse=True, **more)
    return {"output": results[0], "lse": results[1], **placed.gradients(results, call)}


def check(rank, case, queries, keys, overlap, dtype, tolerance, device="cpu", dropout=0.0):
    """A sharded call equals the whole one, with its gradients, and again in the same bits.

    Within ``tolerance`` of a result's size, and of what the whole call itself is off.
    """
    call, more = case.tensors(dtype, device), {"dropout": dropout}
    if dropout:
        more["dropout_seed"] = torch.tensor(7, device=device)
    whole = expected(case, dtype, device, **more)
    exact = whole if dtype == torch.float64 else expected(case, torch.float64, device, **more)
    first = None
    for _ in range(2):
        own = shard(call, queries, keys, rank)
        arguments = case.arguments(own, return_lse=True, **more)
        if dropout and rank:  # rank 0's counts
            arguments["dropout_seed"] = torch.tensor(rank, device=device)
        results = sharded_local_attention(
            own.q, own.k, own.v, case.window, group=dist.group.WORLD, overlap=overlap, **arguments
        )
        found = {"output": results[0], "lse": results[1], **placed.gradients(results, own)}
        for name in ("bias", "sinks"):
            if name in found:
                dist.all_reduce(found[name])
        # A bias's and sinks' gradients are atomic additions on a GPU.
        steady = list(found.values())[: None if device == "cpu" else 5]
        assert first is None or all(map(torch.equal, first, steady)), "other bits"
        first = steady
    for name, x in found.items():
        y, true = (part_of(name, z[name], queries, keys, rank) for z in (whole, exact))
        assert torch.equal(x.isinf(), y.isinf()), name
        x, y, true = (z.detach().double().masked_fill(z.isinf(), 0) for z in (x, y, true))
        if not y.numel():
            continue
        allowed = tolerance * max(1.0, y.abs().max().item()) + (y - true).abs().max().item()
        worst = (x - y).abs().max().item()
        assert worst <= allowed, f"{name} is {worst:.3g} off, {allowed:.3g} is allowed: {case}"


def part_of(name, x, queries, keys, rank):
    """This rank's part of a result or a gradient; a bias and sinks belong to all."""
    if name in ("bias", "sinks"):
        return x
    lengths = keys if name in ("k", "v") else queries
    return part(x, lengths, rank, -1 if name == "lse" else -2)


def check_all(rank, cases, *more, **options):
    for case, queries, keys in cases:
        check(rank, case, queries, keys, *more, **options)


@contextlib.contextmanager
def counted():
    """Bytes that this rank receives from others, as a list of one number for each exchange."""
    received, real = [], dist.all_to_all_single
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def counting(output, x, counts=None, sizes=None, **more):
        counts = [output.numel() // ranks] * ranks if counts is None else counts
        received.append((sum(counts) - counts[rank]) * output.element_size())
        return real(output, x, counts, sizes, **more)

    dist.all_to_all_single = counting
    try:
        yield received
    finally:
        dist.all_to_all_single = real


def traffic(rank, case, queries, keys):
    """Bytes that a training step receives: at first, forward, and backward."""
    own = shard(case.tensors(torch.float32), queries, keys, rank)
    with counted() as forward:
        found = sharded_local_attention(
            own.q, own.k, own.v, case.window, group=dist.group.WORLD, **case.arguments(own)
        )
    with counted() as backward:
        (found * own.cotangent).sum().backward()
    return sum(forward), sum(backward)


def formula(rank, case, keys, receives):
    """Bytes that docs/several_devices.md says a rank receives, forward and backward.

    receives: how many keys the rank receives, and how many of its own others have received.
    """
    numbers, rows = case.case.d + case.case.d_v, math.prod(case.case.lead)
    if case.case.kv_heads is not None:
        rows = case.case.lead[0] * case.case.kv_heads
    others = len(keys) - 1
    halo, away = receives
    forward = halo * rows * numbers * 4 + others * 4 * 8
    if case.case.mask_batch is not None:
        forward += halo * case.case.mask_batch
    if case.documents is not None:
        batch = case.documents or 1
        forward += halo * batch * 4 + others * batch * SUMMARY
    return forward, away * rows * numbers * 4


def check_traffic(rank, case, lengths, receives):
    """What is received is what the formula says."""
    assert traffic(rank, case, lengths, lengths) == formula(rank, case, lengths, receives[rank])


def misfits(rank, name):
    """A call of two ranks that do not fit together, in one way or another."""
    q = torch.zeros(2, 4, 6 + rank, 8)
    more, k, v = {}, q, q
    if name == "heads" and rank:
        q = k = v = q[:, :2]
    if name == "head size" and rank:
        q = k = v = q[..., :6]
    if name == "dtype" and rank:
        q = k = v = q.double()
    if name == "window" and rank:
        more["window"] = 4
    if name == "mask" and rank:
        more["mask"] = torch.ones(2, 3, dtype=torch.bool)
    if name == "a kind" and rank:
        q = "text"
    if name == "one mask" and rank:
        more["mask"] = torch.ones(2, 7, dtype=torch.bool)
    if name == "gradients" and rank:
        k = k.clone().requires_grad_()
    if name == "backend" and rank:
        more["backend"] = "flex"
        q = k = v = q.double()
    sharded_local_attention(q, k, v, **{"window": 5, **more}, group=dist.group.WORLD)


def works(rank):
    """That the group is of use after an error."""
    check(
        rank, placed.case_of("grouped queries", n=30), [15, 15], [15, 15], True, torch.float32, 1e-6
    )


def check_sequences(rank, n):
    """Cutting and joining, and the gradients of both."""
    group = dist.group.WORLD
    ranks = dist.get_world_size()
    whole = torch.arange(2 * n * 3, dtype=torch.float64).view(2, n, 3).requires_grad_()
    for dim, x in ((1, whole), (-1, whole.transpose(1, 2)), (0, whole[0])):
        for lengths in (None, [n] + [0] * (ranks - 1)):
            own = shard_sequence(x, group, dim, lengths=lengths)
            known = shard_lengths(n, group) if lengths is None else lengths
            assert torch.equal(own, part(x, known, rank, dim))
            leaf = own.detach().requires_grad_()
            for more in (None, known):
                joined = gather_sequence(leaf, group, dim, lengths=more)
                assert torch.equal(joined, x)
                (gradient,) = torch.autograd.grad((joined * x.detach() * (rank + 1)).sum(), leaf)
                factor = sum(range(ranks + 1))
                assert torch.equal(gradient, part(x.detach(), known, rank, dim) * factor)
    (gradient,) = torch.autograd.grad(shard_sequence(whole, group).sum(), whole)
    assert gradient.sum() == 2 * 3 * shard_lengths(n, group)[rank]


def check_compiled(rank, backend):
    """Inside ``torch.compile``, with the graph in one piece."""
    small = {"lead": (1, 2), "d": 8, "d_v": 6, "window": windows_of(5)}
    case, lengths = placed.case_of(n=24, documents=1, **small), [13, 11]
    torch.compiler.reset()
    compiled = torch.compile(sharded_local_attention, fullgraph=True, backend=backend)
    found = []
    for run in (compiled, sharded_local_attention):
        own = shard(case.tensors(torch.float64), lengths, lengths, rank)
        more = {"lengths": lengths, "overlap": False, "group": dist.group.WORLD}
        out = run(own.q, own.k, own.v, case.window, **case.arguments(own, **more))
        learned = [own.q, own.k, own.v]
        found.append([out, *torch.autograd.grad((out * own.cotangent).sum(), learned)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def check_agreeing_compiled(rank):
    """The graph breaks where ranks agree, and goes on with what they have agreed upon."""
    torch.compiler.reset()
    compiled = torch.compile(gather_sequence, backend="eager")
    for length in (2, 3):
        found = compiled(torch.full((1, length + rank, 2), float(rank)), dist.group.WORLD)
        assert found[0, :, 0].tolist() == [0.0] * length + [1.0] * (length + 1)


def check_layer(rank):
    """A layer in a model, checkpointed or not, and with a rate that torch's generator seeds."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(5)
    whole = LocalAttention(5, causal=True, dim=8, dropout=0.2).double()
    layer = LocalAttention(5, causal=True, dim=8, dropout=0.2, group=dist.group.WORLD).double()
    x = torch.randn(3, 2, 4, 35, 8, dtype=torch.float64)
    found = []
    for model, run in ((whole, None), (layer, None), (layer, checkpoint)):
        lengths = [35] if model is whole else [18, 17]
        own = [part(one, lengths, 0 if model is whole else rank, -2) for one in x]
        own = [one.detach().clone().requires_grad_() for one in own]
        torch.manual_seed(11)
        if model is whole:
            model = copy.deepcopy(whole)
            model.autopad = True
        out = model(*own) if run is None else run(model, *own, use_reentrant=False)
        gradients = torch.autograd.grad((out * own[0].detach()).sum(), own)
        found.append([out, *gradients])
    for x, y, z in zip(*found, strict=True):
        torch.testing.assert_close(y, part(x, [18, 17], rank, -2), rtol=1e-9, atol=1e-9)
        assert torch.equal(y, z)
