"""flexlocal beside the other ways to compute local attention: checked, then timed.

    python -m profiling.bench                                  # all that can run here
    python -m profiling.bench --problem slide256 --peer cuDNN "FlashAttention 2"
    python -m profiling.bench --shape 2 8 8192 64 --window 128 --causal --exact --dtype fp32

Every result is compared before it is timed, and a wrong one ends the program with status 1. Who
cannot take part is listed with the reason. Times are medians of warm calls; the first calls
include compilation. The floors are what the device, by its measured copies and matrix products,
would take for the problem's bytes and operations.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from flexlocal.rotary import Rotary

from . import machine, report
from .measure import Measurement, Task, measure_all
from .options import (
    DTYPES,
    add_problem,
    dtype_of,
    duration,
    file_to_write,
    picture_to_write,
    problems_of,
)
from .peers import OURS, PEERS, Peer
from .problems import STANDARD, Problem
from .progress import Progress
from .rates import Rates, measure_rates


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_problem(parser, several=True)
    names = ", ".join(map(repr, PEERS))
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")
    parser.add_argument(
        "--rotary", action="store_true", help="our layer with rotary; compiled rotary, then others"
    )
    parser.add_argument(
        "--views", action="store_true", help="(batch, n, heads, d) seen as (batch, heads, n, d)"
    )
    parser.add_argument("--forward-only", action="store_true", help="without training")
    parser.add_argument("--host", action="store_true", help="also the host's time, in the JSON")
    parser.add_argument("--seconds", type=duration, default=0.3, help="of timed calls, each (0.3)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE")
    parser.add_argument(
        "--plot", type=picture_to_write, metavar="FILE.png", help="needs matplotlib"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU, got cuda")
    try:
        options.problems = _problems(options)
    except ValueError as reason:
        parser.error(str(reason))
    return options


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device) if options.device else machine.default_device()


def _problems(options: argparse.Namespace) -> list[Problem]:
    standard = STANDARD if _device(options).type == "cuda" else ("cpu",)
    custom = options.shape is not None
    found = problems_of(options, standard[:1] if custom else standard)
    if options.rotary:
        for problem in found:
            Rotary(problem.d)  # which refuses heads that it cannot turn
    return [replace(problem, rotary=options.rotary) for problem in found]


def _peers(options: argparse.Namespace) -> list[Peer]:
    """Those asked for; flexlocal always, since ratios are to its time."""
    asked = options.peer or list(PEERS)
    return [peer for name, peer in PEERS.items() if peer is OURS or name in asked]


def entry_of(task: Task, rates: Rates, rows: Sequence[Measurement]) -> report.Entry:
    """A problem's part of the record."""
    problem = task.problem
    return {
        "name": problem.name,
        "words": problem.words,
        "shape": problem.shape,
        "window": asdict(problem.window),
        "rule": problem.window.words,
        "floors": {
            kind: {
                "memory_ms": rates.memory_ms(problem, task.dtype, kind == "train"),
                "arithmetic_ms": rates.arithmetic_ms(problem, kind == "train"),
            }
            for kind in report.KINDS
        },
        "rows": [asdict(row) for row in rows],
    }


def _record(options: argparse.Namespace, device: torch.device, rates: Rates) -> dict[str, Any]:
    begin = machine.record(
        device,
        dtype=str(dtype_of(options, device)).removeprefix("torch."),
        rotary=options.rotary,
        views=options.views,
        forward_only=options.forward_only,
        seconds=options.seconds,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
    )
    return {**begin, "rates": asdict(rates), "problems": []}


def _watched(task: Task, peers: Sequence[Peer], progress: Progress) -> Iterator[Measurement]:
    found = measure_all(task, peers)
    for peer in peers:
        progress.show(f"{task.problem.name}: {peer.name}")
        yield next(found)
        progress.done += 1
    progress.clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status, 1 where something was wrong."""
    options = read(arguments)
    device, peers = _device(options), _peers(options)
    dtype = dtype_of(options, device)
    rates = measure_rates(device, dtype, options.seconds)
    record = _record(options, device, rates)
    print(f"{record['device']}, {record['settings']['dtype']}, torch {torch.__version__}")
    progress, bad = Progress(len(options.problems) * len(peers)), False
    for problem in options.problems:
        task = Task(
            problem,
            dtype,
            device,
            views=options.views,
            train=not options.forward_only,
            host=options.host,
            seconds=options.seconds,
        )
        rows = list(_watched(task, peers, progress))
        bad |= any(row.bad for row in rows)
        record["problems"].append(entry_of(task, rates, rows))
        print(f"\n{report.table(record['problems'][-1])}", flush=True)
        if options.json:  # after each problem: a later one may take the machine with it
            options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.plot:
        report.plot(record, options.plot)
    return int(bad)


@contextmanager
def _cold_caches() -> Iterator[None]:
    """First calls compile, whatever an earlier run left on the disk; unless a folder is named."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        yield


if __name__ == "__main__":
    with _cold_caches():
        sys.exit(main())
