"""How time, memory and the block mask of local attention grow with the length.

    python -m profiling.scale [--least 10] [--most 20] [--heads 8] [--rotary] [--json FILE]

One batch entry, and by default 256 keys back, exact. Growth is the slope of a straight line
through the longer half of the lengths, on logarithmic axes: 1 is linear. What a length cannot be
measured for is said to be out of memory, and left out of the growth.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flexlocal.masks import block_mask

from . import machine
from .bench import is_out_of_memory
from .check import apart, shortened
from .options import (
    add_layer,
    add_output,
    add_problem,
    count,
    dtype_of,
    layer_of,
    problems_of,
    reader,
)
from .problems import Problem
from .terminal import Bar, number, paragraph, table
from .timing import TOO_NOISY, Run, add_times, peak_bytes
from .trace import memory_of

GPU_MOST, CPU_MOST = 20, 14
"""Powers of two that the lengths go up to by default."""

LONGEST = 32
"""The largest power of two: beyond, not even the block mask would fit."""

MEASURED = {
    "forward_ms": "forward",
    "train_ms": "training",
    "kernels_ms": "kernels",
    "peak_bytes": "peak",
    "mask_bytes": "mask",
    "mask_ms": "mask",
}
"""What is measured of a length, and what tables call it.

``kernels_ms`` is a training step's, without the host's launches, on a GPU. ``peak_bytes`` is of
training where the path can train, else of the forward pass, with the tensors that are passed in.
The block mask is timed by itself, outside a compiled graph, which would fuse it.
"""

MOST_ERROR = 0.1
"""Standard error of an exponent from which on it means nothing."""

Length = dict[str, Any]
"""What was measured at one length, ``n``; None where memory ran out or the path cannot train."""


def per_token(row: Length, name: str) -> float | None:
    """One of the measured over the length, in ns or bytes."""
    value = row.get(name)
    return None if value is None else value / row["n"] * (1e6 if name.endswith("_ms") else 1)


def measure(
    problem: Problem, options: argparse.Namespace, device: torch.device, seconds: float
) -> Length:
    """Everything about one length."""
    dtype, n = dtype_of(options, device), problem.n
    infers = options.backend == "flex" and device.type == "cpu"  # which has no backward pass there
    row: Length = {"n": n} | dict.fromkeys(MEASURED) | {"out_of_memory": False}
    mask = partial(block_mask, problem.window, n, n, device=device, full_width=infers)
    row["mask_bytes"] = sum(x.nbytes for x in mask().as_tuple() if isinstance(x, torch.Tensor))
    try:
        add_times({"": row}, {"": mask}, ["mask_ms"], device, seconds)
        layer = layer_of(problem, options).to(device)
        q, k, v, grad = problem.tensors(dtype, device)
        forward = torch.no_grad()(partial(layer, q, k, v))

        def train() -> None:
            torch.autograd.grad(layer(q, k, v), (q, k, v), grad)

        add_times({"": row}, {"": forward}, ["forward_ms"], device, seconds)
        if not infers:
            add_times({"": row}, {"": train}, ["train_ms", "kernels_ms"], device, seconds)
        passed = sum(x.nbytes for x in (q, k, v, grad))
        row["peak_bytes"] = most_bytes(forward if infers else train, device, passed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["out_of_memory"] = True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def wrong(problem: Problem, options: argparse.Namespace, device: torch.device) -> str | None:
    """How the layer differs from its eager path on a shortened problem."""
    short = shortened(problem)
    layer, eager = (layer_of(short, options).to(device) for _ in range(2))
    eager.backend = "eager"
    seed = torch.tensor(0, device=device)
    train = options.backend != "flex" or device.type == "cuda"
    tensors = short.tensors(dtype_of(options, device), device)
    both = (partial(each, dropout_seed=seed) for each in (layer, eager))
    return apart(*both, tensors, train)


def most_bytes(run: Run, device: torch.device, passed: int) -> int:
    """Bytes that a call holds at most, the ``passed`` ones of its arguments included."""
    on_gpu = peak_bytes(run, device, passed)
    if on_gpu is not None:
        return on_gpu
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return passed + memory_of(file)["cpu"].peak


def growth(lengths: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """The exponent ``p`` of ``value = c * length ** p`` by least squares on logarithms.

    With its standard error, infinite where two lengths tell none.
    """
    x, y = [math.log(length) for length in lengths], [math.log(value) for value in values]
    slope, start = statistics.linear_regression(x, y)
    if len(x) < 3:
        return slope, math.inf
    off = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.mean(x)) ** 2 for a in x)
    return slope, math.sqrt(off / (len(x) - 2) / spread)


def growths(rows: Sequence[Length]) -> dict[str, tuple[float, float]]:
    """The growth of each of the measured over the longer half of the lengths that have it."""
    found = {}
    for name in MEASURED:
        known = [(row["n"], row[name]) for row in rows if row[name]]
        # Where calls are short, what a call costs at any length hides the growth.
        longer = known[min(len(known) // 2, max(0, len(known) - 3)) :]
        if len(longer) > 1:
            found[name] = growth(*zip(*longer, strict=True))
    return found


def text(rows: Sequence[Length]) -> str:
    """A table of times and bytes with their growth, and one of what each token takes."""
    names = [name for name in MEASURED if any(row[name] is not None for row in rows)]
    found, notes = growths(rows), ["out of memory" * row["out_of_memory"] for row in rows]

    def lines(value: Callable[[Length, str], float | None]) -> list[list[str]]:
        return [
            [str(row["n"]), *(number(value(row, name)) for name in names), note]
            for row, note in zip(rows, notes, strict=True)
        ]

    def whole(row: Length, name: str) -> float | None:
        value, unit = row[name], {"peak_bytes": 1e6, "mask_bytes": 1e3}.get(name, 1.0)
        return None if value is None else value / unit

    exponents = [f"n^{found[name][0]:.2f}" if name in found else "-" for name in names]
    units = {"peak_bytes": "MB", "mask_bytes": "kB"}
    titles = [f"{MEASURED[name]} {units.get(name, 'ms')}" for name in names]
    parts = [table(["tokens", *titles, ""], [*lines(whole), ["growth", *exponents, ""]])]
    each = [f"{MEASURED[name]} {'ns' if name.endswith('_ms') else 'B'}" for name in names]
    parts += ["For each token:", table(["tokens", *each, ""], lines(per_token))]
    errors = {f"{MEASURED[n]} ms": found[n][1] for n in found if n.endswith("_ms")}
    noisy = [name for name, error in errors.items() if MOST_ERROR < error < math.inf]
    if noisy:
        parts.append(paragraph(f"{TOO_NOISY} the growth of: {'; '.join(noisy)}"))
    if math.inf in errors.values():
        parts.append("With fewer than three lengths nothing tells how sure the growth is.")
    return "\n\n".join(parts)


def markdown(record: dict[str, Any]) -> str:
    """The table in docs of lengths."""
    lines = [
        "| tokens | forward ms | training step ms | its ns a token | its kernels' ns a token "
        "| most GB | its bytes a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["lengths"]:
        peak = row["peak_bytes"]
        values = [row["forward_ms"], row["train_ms"]]
        values += [per_token(row, "train_ms"), per_token(row, "kernels_ms")]
        values += [None if peak is None else peak / 1e9, per_token(row, "peak_bytes")]
        lines.append(f"| {row['n']} | {' | '.join(map(number, values))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Length]:
    """Reads the command line, measures and prints."""
    device = machine.default_device()
    most = GPU_MOST if device.type == "cuda" else CPU_MOST
    parser = reader("scale", __doc__)
    add_problem(parser, shape=False)
    add_layer(parser)
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--least", type=int, default=10, metavar="POWER")
    parser.add_argument("--most", type=int, default=most, metavar="POWER", help=f"{most} here")
    add_output(parser, seconds=0.3)
    options = parser.parse_args(arguments)
    least, most = options.least, options.most
    if not 0 <= least <= most <= LONGEST:
        parser.error(f"--most must be --least ({least}) or more, up to {LONGEST}, got {most}")
    (problem,) = problems_of(parser, options, ["slide256"])
    problem, dtype = replace(problem, batch=1, heads=options.heads), dtype_of(options, device)
    title = f"{machine.device_name(device)}, 1 x {problem.heads} x n x {problem.d}, {dtype}"
    print(f"{title}, torch {torch.__version__}\n{problem.window}\n", flush=True)
    try:
        off = wrong(replace(problem, n=2**most), options, device)
    except ValueError as refused:  # dropout by flex on a CPU, for one
        sys.exit(f"cannot be measured: {refused}")
    if off is not None:
        sys.exit(f"not measured, the result is wrong: {off}")
    rows: list[Length] = []
    with Bar(most + 1 - least) as bar:
        for power in range(least, most + 1):
            bar.show(f"{2**power} tokens")
            rows.append(measure(replace(problem, n=2**power), options, device, options.seconds))
            bar.advance()
    print(text(rows))
    names = ("rotary", "xpos", "dropout", "backend", "seconds")
    settings = {name: getattr(options, name) for name in names} | {"dtype": str(dtype)}
    shape = {"batch": 1, "heads": problem.heads, "d": problem.d}
    record = machine.record(device, **shape, window=asdict(problem.window), **settings)
    exponents = {name: exponent for name, (exponent, _) in growths(rows).items()}
    machine.write(record | {"lengths": rows, "growth": exponents}, options.json)
    return rows


if __name__ == "__main__":
    main()
