"""A sequence on several devices against one device that has all of it.

    torchrun --nproc-per-node 2 -m profiling.several [--tokens 524288] [--model] [--json FILE]

A training step of attention with rotary embeddings, 256 keys back, bf16 on GPUs: each rank holds
``--tokens``, and one device all of them. Times are the slowest rank's, of steps that follow each
other without a pause; "exposed" is what of them the ranks wait for each other's keys. ``--model``
trains four local layers under FSDP2, on ranks that share sequences and on one. ``--tiny`` tries the
script on a CPU.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flexlocal import Rotary, Window, local_attention
from flexlocal.cli.byte_model import EMBEDDING, Block
from flexlocal.distributed import shard_lengths, shard_sequence, sharded_local_attention

from . import machine
from .options import count, file_to_write
from .terminal import number, table
from .timing import Timing, in_turns, ratio_of_rounds, synchronize

HEAD, LAYERS, CHECKED = 64, 4, 3000  # head size; layers of the model; tokens of the check
WHOLE, STILL = "one device, all tokens", ", nothing travels"
Step = Callable[[], object]


def step(attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """Forward and backward, with the output as its own gradient."""
    q, k, v = (x.requires_grad_() for x in tensors)
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), out.detach())


def slowest_ms(run: Step, device: torch.device, steps: int) -> float:
    """Milliseconds of a step on the slowest rank, of so many one after the other."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize(device)
    found = torch.tensor(1e3 * (time.perf_counter() - start) / steps, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


@contextmanager
def silent() -> Iterator[None]:
    """Exchanges take no time and bring nothing: what is left is what they are hidden behind."""

    class Done:
        def wait(self) -> None:
            pass

    real = dist.all_to_all_single
    dist.all_to_all_single = lambda received, *_, **__: received.zero_() is None or Done()
    try:
        yield
    finally:
        dist.all_to_all_single = real


def wrong(attend: Callable[..., Tensor], tensors: Sequence[Tensor], rotary: Rotary) -> str | None:
    """How the shards differ from one call, over few tokens that every rank has."""
    group, window = dist.group.WORLD, Window(256, causal=True, exact=True)
    n = CHECKED + len(shard_lengths(0, group))
    draw = torch.Generator().manual_seed(0)
    shape = (3, 1, tensors[0].shape[1], n, HEAD)
    whole = torch.randn(shape, generator=draw).to(tensors[0])
    truth = local_attention(*whole.float(), window, rotary=rotary, backend="eager")
    own = attend(*(shard_sequence(x, group, 2) for x in whole), lengths=shard_lengths(n, group))
    apart = (own - shard_sequence(truth, group, 2)).abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    return None if apart < 0.05 else f"{apart.item():.2g} apart"


def ways(options: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """A step of this rank, in each way."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    window, rotary = Window(256, causal=True, exact=True), Rotary(HEAD).to(device)
    draw = torch.Generator(device).manual_seed(rank)

    def tensors(n: int) -> list[Tensor]:
        shape = (1, options.heads, n, HEAD)
        return [torch.randn(shape, device=device, dtype=dtype, generator=draw) for _ in range(3)]

    mine, lengths = tensors(options.tokens), [options.tokens] * ranks
    alone = partial(local_attention, window=window, rotary=rotary)
    shared = partial(sharded_local_attention, window=window, rotary=rotary, group=dist.group.WORLD)
    off = wrong(shared, mine, rotary)
    if off is not None:
        sys.exit(f"not measured, the result is wrong: {off}")
    whole = tensors(options.tokens * ranks) if rank == 0 else []
    found: dict[str, Step] = {
        WHOLE: partial(step, alone, whole) if rank == 0 else lambda: None,
        "a rank's tokens alone, no halo": partial(step, alone, mine),
        "sharded, ranks agree": partial(step, shared, mine),
    }
    for words, overlap in (("sharded", True), ("sharded, after the travel", False)):
        known = partial(shared, lengths=lengths, overlap=overlap)
        found[words] = partial(step, known, mine)
        found[words + STILL] = partial(_silently, found[words])
        if not options.tiny and not overlap:  # a compiler makes one call in any case
            compiled = torch.compile(sharded_local_attention, fullgraph=True)
            found[f"{words}, compiled"] = partial(step, partial(compiled, **known.keywords), mine)
    return found


def _silently(run: Step) -> None:
    with silent():
        run()


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each way, in turns."""
    runs = ways(options, device)
    for run in runs.values():  # what changes length is compiled once more
        run()
    timing = Timing(device, seconds=0)
    rounds = in_turns(runs, timing, lambda run, device, _: slowest_ms(run, device, options.steps))
    return {name: {"ms": statistics.median(each), "rounds": each} for name, each in rounds.items()}


def text(found: dict[str, dict[str, Any]]) -> str:
    """What follows from the times."""
    lines = []
    for name, row in found.items():
        throughput = ratio_of_rounds(found[WHOLE]["rounds"], row["rounds"])
        still = found.get(name + STILL)
        exposed = "" if still is None else f"{100 * (1 - still['ms'] / row['ms']):.1f} %"
        lines.append([name, number(row["ms"]), throughput.words(), exposed])
    return table(["", "ms", "times one device", "exposed"], lines)


class Model(nn.Module):
    """Bytes in, logits of the next byte out; local layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(256, EMBEDDING), nn.Linear(EMBEDDING, 256)
        self.blocks = nn.ModuleList(Block(64, "auto") for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def trained(options: argparse.Namespace, device: torch.device) -> float:
    """The largest difference between the losses of ranks and those of one device."""
    ranks = dist.get_world_size()
    share = 2 if ranks % 2 == 0 else ranks  # ranks that share a sequence
    names = ("sequence", "data")
    mesh = init_device_mesh(device.type, (share, ranks // share), mesh_dim_names=names)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model().to(device))
    one, shared = models
    for block in shared.blocks:
        block.attention.group = mesh["sequence"]
        fully_shard(block, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    draw, worst, n = torch.Generator().manual_seed(1), 0.0, min(options.tokens * share, 16384)
    for _ in range(options.steps):
        # Bytes of a small alphabet, in runs, so that there is something to learn.
        rows = torch.randint(16, (ranks // share * 2, n // 4 + 1), generator=draw)
        rows = rows.repeat_interleave(4, dim=1)[:, : n + 1].to(device)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        place = mesh["data"].get_local_rank()
        runs = [
            shard_sequence(x.chunk(ranks // share)[place], mesh["sequence"]).contiguous()
            for x in (inputs, targets)
        ]
        losses = []
        for model, optimizer, (x, y) in zip(
            models, optimizers, ((inputs, targets), runs), strict=True
        ):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        dist.all_reduce(losses[1], dist.ReduceOp.SUM)
        worst = max(worst, abs(losses[0].item() - losses[1].item() / ranks))
    if dist.get_rank() == 0:
        print(
            f"four local layers, FSDP2 and {share} ranks to a sequence of {n}, {options.steps} "
            f"steps: loss {losses[0].item():.4f} on one device, at most {worst:.1e} apart"
        )
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and prints."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m profiling.several", description=__doc__, formatter_class=shown
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="of each rank (524288)")
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--steps", type=count, default=10, help="in a turn (10)")
    parser.add_argument("--model", action="store_true", help="train a model instead")
    parser.add_argument("--tiny", action="store_true", help="few tokens, uncompiled")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="for the results")
    options = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 -m profiling.several")
    options.tokens = options.tokens or (1024 if options.tiny else 524288)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if options.model:
            found: dict[str, Any] = {"losses_apart": trained(options, device)}
        else:
            found = measure(options, device)
        if dist.get_rank() == 0:
            if not options.model:
                print(text(found))
            settings = {"ranks": dist.get_world_size(), "tokens": options.tokens}
            settings |= {"heads": options.heads, "d": HEAD, "steps": options.steps}
            machine.write(machine.record(device, **settings) | {"found": found}, options.json)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
