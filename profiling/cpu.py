"""flexlocal on a processor beside the other ways to compute local attention, size by size.

    python -m profiling.cpu --threads 1 --json run.json
    python -m profiling.cpu --lengths 512 --windows 512 --dtypes bf16 --peers SDPA

Causal attention of 8 heads to a window and the one before it. Times are medians of calls in turns,
each result is compared before it is timed, and a wrong one ends the program with status 1. SDPA is
scaled_dot_product_attention with the window as its mask. Flex is compiled FlexAttention, which has
no backward pass on a processor, and compiles for 10 to 30 seconds a size.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from flexlocal import Window

from . import machine
from .bench import measure_all
from .options import DTYPES, count, reader
from .peers import OURS, PEERS, Peer
from .problems import Problem, Task
from .report import KINDS
from .terminal import number, table, watched
from .timing import Ratio, ratio_of_rows

Cell = dict[str, Any]
"""``n``, ``window``, ``batch``, ``d``, ``dtype``, and by peer the ``rows`` of ``measure_all``."""

COMPILED = Peer("compiled", lambda *sizes: torch.compile(OURS.make(*sizes)), ours=True)


def _too_dense(problem: Problem, *_: object) -> str | None:
    dense = problem.n > 8 * problem.window.size
    return "a dense mask is not timed for more than eight windows" if dense else None


OTHERS = {
    "local-attn": PEERS["local-attention"],
    "l.a. comp.": PEERS["local-attention compiled"],
    "SDPA": replace(PEERS["dense SDPA"], obstacle=_too_dense),
    "Flex": PEERS["FlexAttention, stock"],
}
"""By the titles of their columns."""

LEAST = 0.95
"""Of flexlocal's time, the least that a peer may take without being named."""


def cells_of(options: Any) -> list[tuple[Problem, str]]:
    """The problems that are asked for, and the name of the dtype of each."""
    sizes = options.lengths, options.windows, options.batches, options.head_sizes
    return [
        (Problem(f"{dtype}, {n} in {size}s", batch, 8, n, d, Window(size, causal=True)), dtype)
        for dtype in options.dtypes
        for n, size, batch, d in product(*sizes)
    ]


def ratio(cell: Cell, peer: Peer, kind: str) -> Ratio | None:
    """How many times flexlocal's time ``peer`` takes."""
    rows = cell["rows"]
    if peer.name not in rows:
        return None
    return ratio_of_rows(rows[peer.name], rows[OURS.name], f"{kind}_ms")


def fastest(cell: Cell, kind: str) -> tuple[float, str] | None:
    """The least ratio of another's time to flexlocal's, and the title of whose it is."""
    found = {title: ratio(cell, peer, kind) for title, peer in OTHERS.items()}
    return min(((x.median, title) for title, x in found.items() if x), default=None)


def text(cells: Sequence[Cell]) -> str:
    """A table for each dtype and pass with the geometric means below it, and what is missing."""
    parts = [
        "ms: flexlocal's time. Others: how many times that in the same round, and half\n"
        "the distance of its quartiles."
    ]
    for dtype, kind in product(dict.fromkeys(cell["dtype"] for cell in cells), KINDS):
        chosen = [cell for cell in cells if cell["dtype"] == dtype]
        parts += [f"{dtype}, {KINDS[kind]}", _table(chosen, kind), _summary(chosen, kind)]
    reasons = [
        f"{row['peer']}: {row['status']}: {row['reason']}" if row["status"] != "measured" else ""
        for cell in cells
        for row in cell["rows"].values()
    ]
    return "\n\n".join([*parts, "\n".join(filter(None, dict.fromkeys(reasons)))]).rstrip()


def _table(cells: Sequence[Cell], kind: str) -> str:
    columns = {"compiled": COMPILED, **OTHERS}
    columns = {x: peer for x, peer in columns.items() if any(ratio(c, peer, kind) for c in cells)}
    lines = []
    for cell in cells:
        sizes = [str(cell[size]) for size in ("n", "window", "batch", "d")]
        times = number(cell["rows"][OURS.name][f"{kind}_ms"])
        ratios = [_spread(ratio(cell, peer, kind)) for peer in columns.values()]
        lines.append([*sizes, times, *ratios])
    return table(["n", "W", "b", "d", "ms", *columns], lines)


def _spread(found: Ratio | None) -> str:
    if found is None:
        return "-"
    digits = 1 if found.median >= 9.95 else 2
    words = f"{found.median:.{digits}f}"
    if found.low is None or found.high is None:
        return words
    return f"{words} \N{PLUS-MINUS SIGN}{(found.high - found.low) / 2:.{digits}f}"


def _summary(cells: Sequence[Cell], kind: str) -> str:
    """The geometric means over cells, and the cells in which another is faster."""
    least = [(cell, found) for cell in cells if (found := fastest(cell, kind))]
    if not least:
        return "no other was measured"
    plain = statistics.geometric_mean(x for _, (x, _) in least)
    lines = [f"geometric mean of {len(least)}: the fastest other takes {plain:.2f}x"]
    inside = [(x, ratio(cell, COMPILED, kind)) for cell, (x, _) in least]
    ratios = [x / own.median for x, own in inside if own]
    if ratios:
        lines[0] += f", {statistics.geometric_mean(ratios):.2f}x of flexlocal compiled"
    for cell, (x, title) in least:
        if x < LEAST:
            sizes = f"n={cell['n']} W={cell['window']} b={cell['batch']} d={cell['d']}"
            lines.append(f"below {LEAST}: {sizes}: {title} takes {x:.2f}x")
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """The same for a page."""
    return f"```text\n{text(record['cells'])}\n```"


def measure(problems: Iterable[tuple[Problem, str]], peers: Sequence[Peer], seconds: float) -> Any:
    """Each problem's ``Cell``, one after the other."""
    for problem, dtype in problems:
        torch.compiler.reset()  # one function is compiled for so many sizes only
        task = Task(problem, DTYPES[dtype], torch.device("cpu"), seconds)
        rows = {row["peer"]: row for row in measure_all(task, peers)}
        sizes = {"n": problem.n, "window": problem.window.size, "batch": problem.batch}
        yield {**sizes, "d": problem.d, "dtype": dtype, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status, 1 where something was wrong."""
    parser = reader("cpu", __doc__, seconds=0.5)
    defaults = {"lengths": [512, 2048, 8192], "windows": [64, 128, 512]}
    for name, default in (defaults | {"batches": [1], "head-sizes": [64]}).items():
        words = " ".join(map(str, default))
        parser.add_argument(f"--{name}", type=count, nargs="+", default=default, help=f"({words})")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    others = {"nargs": "*", "choices": OTHERS, "default": ["local-attn", "SDPA", "Flex"]}
    parser.add_argument("--peers", **others, metavar="NAME", help=", ".join(map(repr, OTHERS)))
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device, peers = torch.device("cpu"), [OURS, COMPILED, *(OTHERS[x] for x in options.peers)]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    record = machine.record(device, **settings) | {"cells": []}
    print(f"{record['device']}, torch {torch.__version__}\n", flush=True)
    problems = cells_of(options)
    for cell in measure(watched(problems, len(problems), "sizes"), peers, options.seconds):
        record["cells"].append(cell)
        machine.write(record, options.json)
    print(text(record["cells"]))
    rows = [row for cell in record["cells"] for row in cell["rows"].values()]
    wrong = [row["peer"] for row in rows if row["status"] == "wrong"]
    failed = any(row["status"] != "measured" for row in rows if row["peer"] == OURS.name)
    return int(bool(wrong) or failed)


if __name__ == "__main__":
    sys.exit(main())
