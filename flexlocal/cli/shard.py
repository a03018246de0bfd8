"""The demonstration's model on several devices, beside one device that has whole sequences.

Every process trains two models of the same weights on the same batches: one on whole sequences, and
one on its run of each. ``torchrun --nproc-per-node 2 -m flexlocal demo --shard`` runs it.

Shapes: b batch, n tokens.
"""

import math
import os
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..distributed import shard_lengths, shard_sequence
from ..spec import BackendName
from .byte_model import ByteModel
from .demo import CONTEXT, RATE, TOKENS, CannotRun, read, rows, source_files
from .progress import Progress

STEPS = 30
APART = 1e-3  # bits per byte that the two losses may differ by: rounding, grown over the steps


def run(
    *, steps: int | None, device: str | None, backend: BackendName, seed: int, window: int
) -> int:
    """Train both models, report on rank 0's stdout, and return the exit status.

    Args:
        steps: training steps; ``STEPS`` for None.
        device: ``"cpu"`` or ``"cuda"``; None: a GPU for each process, if there are as many.
        backend: ``LocalAttention``'s.
        seed: of the weights and the batches.
        window: ``LocalAttention``'s window size.

    Returns:
        0, or 1 when the losses differ by more than ``APART``.

    Raises:
        CannotRun: not started by torchrun, no such device, or no source to train on.
    """
    if "LOCAL_RANK" not in os.environ:
        raise CannotRun(
            "argument --shard: processes are started by "
            "torchrun --nproc-per-node 2 -m flexlocal demo --shard"
        )
    where = _device(device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        return _train(steps or STEPS, where, backend, seed, window)
    finally:
        dist.destroy_process_group()


def _train(steps: int, where: torch.device, backend: BackendName, seed: int, window: int) -> int:
    group, first = dist.group.WORLD, dist.get_rank() == 0
    assert group is not None
    context = math.ceil(CONTEXT / window) * window
    text = read(source_files(Path(sysconfig.get_path("stdlib")))[0])
    if len(text) <= 2 * context:
        raise CannotRun(f"{len(text):,} bytes of source are too few for a context of {context:,}")
    whole, shared = (_model(window, backend, seed).to(where) for _ in range(2))
    for attention in shared.attentions:
        attention.group = group
    models = whole, shared
    optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in models]
    lengths = shard_lengths(context, group)
    if first:
        print(f"ranks        {len(lengths)} on {where.type}, {lengths} tokens of each sequence")
        print(f"mask         {whole.attentions[0].window.words}")
        print("\nstep   one device   sharded   difference   (bits/byte)")
    draw, worst, progress = torch.Generator().manual_seed(seed), 0.0, Progress(sys.stderr)
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - context, (max(1, TOKENS // context),), generator=draw)
        rows_bn = rows(text, starts, context + 1).to(where)
        inputs, targets = rows_bn[:, :-1], rows_bn[:, 1:]
        runs = (shard_sequence(x, group) for x in (inputs, targets))
        # The sum over the run, divided by the tokens of all ranks: gradients then add up.
        found = [_loss(whole, inputs, targets), _loss(shared, *runs)]
        found = [sums / targets.numel() for sums in found]
        for optimizer, loss in zip(optimizers, found, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for parameter in shared.parameters():
            dist.all_reduce(parameter.grad)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = RATE * min(1, step / 20)  # warm up
            optimizer.step()
        dist.all_reduce(total := found[1].detach())
        losses = found[0].item(), total.item()
        worst = max(worst, abs(losses[0] - losses[1]))
        if first:
            if step == 1 or step == steps or step % 10 == 0:
                apart = abs(losses[0] - losses[1])
                print(
                    f"{step:4}   {losses[0]:10.5f}   {losses[1]:7.5f}   {apart:10.1e}", flush=True
                )
            progress.show(step / steps, f"step {step:4}")
    equal = worst <= APART
    if first:
        words = "the losses are equal" if equal else "the losses are NOT equal"
        print(f"\n{words}: at most {worst:.1e} apart")
    return 0 if equal else 1


def _model(window: int, backend: BackendName, seed: int) -> ByteModel:
    torch.manual_seed(seed)
    return ByteModel(window, backend)


def _loss(model: ByteModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed over the tokens, in bits."""
    logits = model(inputs).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum") / math.log(2)


def _device(name: str | None, local_rank: int) -> torch.device:
    if name is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        name = "cuda" if torch.cuda.device_count() >= processes else "cpu"
    if name not in ("cpu", "cuda"):
        raise CannotRun(f"argument --device: must be cpu or cuda with --shard, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        raise CannotRun(
            f"argument --device: {torch.cuda.device_count()} GPUs are too few for process "
            f"{local_rank} of --shard"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
