"""How time, memory and the block mask of local attention grow with the length.

    python -m profiling.scale [--least 10] [--most 20] [--heads 8] [--rotary] [--json FILE]

One batch entry, and by default 256 keys back, exact. Growth is the slope of a straight line
through the longer half of the lengths, on logarithmic axes: 1 is linear. What a length cannot be
measured for is said to be out of memory, and left out of the growth.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flexlocal.kernel import Blocks
from flexlocal.masks.blocks import block_lists
from flexlocal.tuning import STOCK, nearest

from . import machine
from .check import apart, shortened
from .chrome import Trace
from .clock import kernels_ms, median_ms, peak_bytes
from .lengths import MEASURED, Length, draw, growth_line, growths, heading, line
from .measure import is_out_of_memory
from .options import (
    add_layer,
    add_problem,
    count,
    dtype_of,
    duration,
    file_to_write,
    layer_of,
    picture_to_write,
    problem_that_fits,
)
from .problems import PROBLEMS, Problem

GPU_MOST, CPU_MOST = 20, 14
"""Powers of two that the lengths go up to by default."""

LONGEST = 32
"""The largest power of two: beyond, not even the block mask would fit."""


def measure(
    problem: Problem, options: argparse.Namespace, device: torch.device, seconds: float
) -> Length:
    """Everything about one length."""
    dtype = dtype_of(options, device)
    fused_on_cpu = options.backend == "flex" and device.type == "cpu"
    lists = block_lists_of(problem, dtype, device, full_width=fused_on_cpu)
    found: dict[str, Any] = dict.fromkeys(set(MEASURED) - {"mask_bytes"})
    enough = True
    try:
        found["mask_ms"] = median_ms(lists, device, seconds)
        layer = layer_of(problem, options).to(device)
        q, k, v, grad = problem.tensors(dtype, device)
        forward = torch.no_grad()(partial(layer, q, k, v))

        def train() -> None:
            torch.autograd.grad(layer(q, k, v), (q, k, v), grad)

        found["forward_ms"] = median_ms(forward, device, seconds)
        if not fused_on_cpu:
            found["train_ms"] = median_ms(train, device, seconds)
            found["kernels_ms"] = kernels_ms(train, device)
        passed = sum(x.nbytes for x in (q, k, v, grad))
        found["peak_bytes"] = most_bytes(forward if fused_on_cpu else train, device, passed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        enough = False
    if device.type == "cuda":
        torch.cuda.empty_cache()
    size = sum(x.nbytes for x in lists())
    return Length(problem.n, mask_bytes=size, out_of_memory=not enough, **found)


def block_lists_of(
    problem: Problem, dtype: torch.dtype, device: torch.device, full_width: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Makes the block mask's index tensors as the layer's kernel has them."""
    window, n, tuning = problem.window, problem.n, STOCK
    if device.type == "cuda":
        entry = nearest(torch.cuda.get_device_capability(device), dtype, problem.d, window)
        tuning = STOCK if entry is None else entry.tuning
    blocks = Blocks(window, window, n, masked=False, shared_qk=False, tuning=tuning)
    sizes = tuning.block, tuning.block
    return lambda: block_lists(
        window, (n, n), sizes, device, full_width=full_width, one_list=blocks.one_list
    )


def wrong(problem: Problem, options: argparse.Namespace, device: torch.device) -> str | None:
    """How the layer differs from its eager path on a shortened problem."""
    short = shortened(problem)
    layer, eager = (layer_of(short, options).to(device) for _ in range(2))
    eager.backend = "eager"
    seed = torch.tensor(0, device=device)
    train = options.backend != "flex" or device.type == "cuda"
    tensors = short.tensors(dtype_of(options, device), device)
    return apart(
        partial(layer, dropout_seed=seed), partial(eager, dropout_seed=seed), tensors, train
    )


def most_bytes(run: Callable[[], Any], device: torch.device, passed: int) -> int:
    """Bytes that a call holds at most, the ``passed`` ones of its arguments included."""
    on_gpu = peak_bytes(run, device, passed)
    if on_gpu is not None:
        return on_gpu
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return passed + Trace(file).memory()["cpu"].peak


def main(argv: list[str] | None = None) -> list[Length]:
    """Reads the command line, measures and prints as it goes."""
    device = machine.default_device()
    options, problem = parse(argv, GPU_MOST if device.type == "cuda" else CPU_MOST)
    dtype = dtype_of(options, device)
    title = f"{machine.device_name(device)}, 1 x {problem.heads} x n x {problem.d}, {dtype}"
    print(f"{title}, torch {torch.__version__}\n{problem.window}\n\n{heading()}", flush=True)
    try:
        off = wrong(replace(problem, n=2**options.most), options, device)
    except ValueError as refused:  # dropout by flex on a CPU, for one
        sys.exit(f"cannot be measured: {refused}")
    if off is not None:
        sys.exit(f"not measured, the result is wrong: {off}")
    rows = []
    for power in range(options.least, options.most + 1):
        rows.append(measure(replace(problem, n=2**power), options, device, options.seconds))
        print(line(rows[-1]), flush=True)
    found = growths(rows)
    print(growth_line(found))
    if options.json:
        settings = {"rotary": options.rotary, "xpos": options.xpos, "dropout": options.dropout}
        settings |= {"backend": options.backend, "dtype": str(dtype), "seconds": options.seconds}
        shape = {"batch": 1, "heads": problem.heads, "d": problem.d}
        record = machine.record(device, **shape, window=asdict(problem.window), **settings)
        record |= {"lengths": [asdict(row) for row in rows], "growth": found}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.plot:
        draw(rows, title, options.plot)
    return rows


def parse(argv: list[str] | None, most: int) -> tuple[argparse.Namespace, Problem]:
    """The command line, and the problem that it names; wrong arguments end the program."""
    parser = argparse.ArgumentParser(prog="python -m profiling.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_problem(parser, shape=False)
    add_layer(parser)
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--least", type=int, default=10, metavar="POWER")
    parser.add_argument("--most", type=int, default=most, metavar="POWER", help=f"{most} here")
    parser.add_argument("--seconds", type=duration, default=0.3, help="that each figure takes")
    parser.add_argument("--json", type=file_to_write, metavar="FILE")
    parser.add_argument("--plot", type=picture_to_write, metavar="FILE")
    options = parser.parse_args(argv)
    if not 0 <= options.least <= options.most <= LONGEST:
        parser.error(
            f"--most must be --least ({options.least}) or more, up to {LONGEST}, got {options.most}"
        )
    problem = problem_that_fits(parser, options, PROBLEMS["slide256"])
    return options, replace(problem, batch=1, heads=options.heads)


if __name__ == "__main__":
    main()
