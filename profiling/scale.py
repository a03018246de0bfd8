"""How time, memory and the block mask of local attention grow with the length.

    python -m profiling.scale [--least 10] [--most 20] [--heads 8] [--rotary] [--json FILE]

One batch entry, and by default 256 keys back, exact. What grows linearly takes the same for each
token at any length. What a length cannot be measured for is said to be out of memory.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from flexlocal.masks import block_mask

from . import machine
from .bench import trouble
from .check import apart, shortened
from .options import count, dtype_of, layer_of, problems_of, reader
from .peers import forward_of, training_of
from .problems import Task
from .terminal import number, table, watched
from .timing import TOO_NOISY, add_times, peak_bytes, ratio_of_rounds

MEASURED = ("forward_ms", "train_ms", "kernels_ms", "peak_bytes", "mask_bytes", "mask_ms")
"""``kernels_ms`` is a training step's on a GPU; ``peak_bytes`` of training where the path can
train, else of the forward pass, with the tensors that are passed in. The block mask is timed by
itself, outside a compiled graph, which would fuse it."""

Length = dict[str, Any]
"""What was measured at one length, ``n``; None where memory ran out or the path cannot train."""


def measure(task: Task, options: argparse.Namespace) -> Length:
    """Everything about one length."""
    problem, device, n = task.problem, task.device, task.problem.n
    row: Length = {"n": n} | dict.fromkeys(MEASURED) | {"out_of_memory": False}
    # Kernels of the CPU, which only infer, want as many columns in the lists as there are blocks.
    mask = partial(block_mask, problem.window, n, n, device=device, full_width=not task.train)
    row["mask_bytes"] = sum(x.nbytes for x in mask().as_tuple() if isinstance(x, torch.Tensor))
    try:
        add_times({"": row}, {"": mask}, task, "mask_ms")
        layer, tensors = layer_of(problem, options).to(device), task.tensors()
        forward, train = forward_of(layer, tensors), training_of(layer, tensors)
        add_times({"": row}, {"": forward}, task, "forward_ms")
        if task.train:
            add_times({"": row}, {"": train}, task, "train_ms", "kernels_ms")
        passed = sum(x.nbytes for x in tensors)
        row["peak_bytes"] = peak_bytes(train if task.train else forward, device, passed)
    except RuntimeError as error:
        if trouble(error)[0] != "out of memory":
            raise
        row["out_of_memory"] = True
    torch.cuda.empty_cache()
    return row


def wrong(task: Task, options: argparse.Namespace) -> str | None:
    """How the layer differs from its eager path on a shortened problem."""
    short, seed = shortened(task.problem), torch.tensor(0, device=task.device)
    layer, eager = (layer_of(short, options).to(task.device) for _ in range(2))
    eager.backend = "eager"
    both = (partial(each, dropout_seed=seed) for each in (layer, eager))
    return apart(*both, replace(task, problem=short).tensors(), task.train)


def _cells(row: Length, mask: bool) -> list[str]:
    n, train, kernels, peak = (row[x] for x in ("n", "train_ms", "kernels_ms", "peak_bytes"))
    values = [row["forward_ms"], train, train and 1e6 * train / n, kernels and 1e6 * kernels / n]
    values += [peak and peak / 1e9, peak and peak / n]
    values += [row["mask_ms"], row["mask_bytes"] / n] if mask else []
    return [str(n), *map(number, values)]


def text(rows: Sequence[Length]) -> str:
    """A table for a terminal, and what there was too little memory for, or too much noise."""
    titles = ["tokens", "forward ms", "train ms", "ns each", "kernels", "GB", "B each"]
    lines = [_cells(row, mask=True) for row in rows]
    parts = [table([*titles, "mask ms", "B each"], lines)]
    for row in rows:
        for name, rounds in row.get("rounds", {}).items():
            if ratio_of_rounds(rounds, [1.0] * len(rounds)).noisy:
                parts.append(f"{TOO_NOISY} {name} at {row['n']} tokens")
        if row["out_of_memory"]:
            parts.append(f"out of memory at {row['n']} tokens")
    return "\n".join(parts)


def markdown(record: dict[str, Any]) -> str:
    """The table in docs of lengths."""
    titles = ["tokens", "forward ms", "training step ms", "its ns a token"]
    titles += ["its kernels' ns a token", "most GB", "its bytes a token"]
    lines = [titles, *(_cells(row, mask=False) for row in record["lengths"])]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(titles) + "|", *body])


def main(arguments: Sequence[str] | None = None) -> list[Length]:
    """Reads the command line, measures and prints."""
    device = machine.default_device()
    most = 20 if device.type == "cuda" else 14
    parser = reader("scale", __doc__, "window", layer=True, seconds=0.3)
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--least", type=int, default=10, metavar="POWER")
    parser.add_argument("--most", type=int, default=most, metavar="POWER", help=f"{most} here")
    options = parser.parse_args(arguments)
    least, most = options.least, options.most
    if not 0 <= least <= most <= 32:  # beyond, not even the block mask would fit
        parser.error(f"--most must be --least ({least}) or more, up to 32, got {most}")
    (problem,) = problems_of(parser, options, ["slide256"])
    problem, dtype = replace(problem, batch=1, heads=options.heads), dtype_of(options, device)
    title = f"{machine.device_name(device)}, 1 x {problem.heads} x n x {problem.d}, {dtype}"
    print(f"{title}, torch {torch.__version__}\n{problem.window}\n", flush=True)
    train = options.backend != "flex" or device.type == "cuda"  # no backward pass elsewhere
    task = Task(replace(problem, n=2**most), dtype, device, options.seconds, train=train)
    try:
        off = wrong(task, options)
    except ValueError as refused:  # dropout by flex on a CPU, for one
        sys.exit(f"cannot be measured: {refused}")
    if off is not None:
        sys.exit(f"not measured, the result is wrong: {off}")
    lengths, rows = [2**power for power in range(least, most + 1)], []
    for n in watched(lengths, len(lengths), "lengths"):
        rows.append(measure(replace(task, problem=replace(problem, n=n)), options))
    print(text(rows))
    names = ("heads", "rotary", "xpos", "dropout", "backend", "seconds")
    settings = {name: getattr(options, name) for name in names} | {"dtype": str(dtype)}
    settings |= {"batch": 1, "d": problem.d, "window": asdict(problem.window)}
    machine.write(machine.record(device, **settings) | {"lengths": rows}, options.json)
    return rows


if __name__ == "__main__":
    main()
