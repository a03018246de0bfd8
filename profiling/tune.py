"""The fastest sparse blocks and kernel options for a problem, swept on the GPU.

    python -m profiling.tune --problem slide256 slide1k --ship     # into flexlocal's own table
    python -m profiling.tune --shape 2 8 8192 64 --window 128 --causal --exact --json sweep.json
    python -m profiling.tune --blocks 64 --warps 4 --stages 1 2 3 4   # part of the usual, and more
    python -m profiling.tune --list                                # what would be tried; anywhere

Each candidate runs through flexlocal's fused path, is compared with the eager path and then
timed; one that does not compile or is wrong is counted, and never chosen. Processes compile side
by side and take turns on the GPU. The forward pass is swept first; the backward pass is timed as
training, after the fastest forward options of its block. FlexAttention's own options, and
FlashAttention 4 where it is installed, are measured beside them.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flexlocal.masks.blocks import lists_have_gaps
from flexlocal.tuning import FLASH, STOCK_BLOCK

from . import machine
from .candidates import (
    PASSES,
    Layout,
    Outcome,
    Space,
    Winner,
    candidates,
    counted,
    flash_is_faster,
    layout_words,
    milliseconds,
    ranked,
    stock,
    winner_of,
)
from .options import DTYPES, add_problem, count, duration, file_to_write, problems_of
from .problems import Problem
from .report import number, ratio
from .sweep import flash_runs, sweep, workers_for
from .tuned_table import SHIPPED, Entry, merged, old_flash, read_table, text_of

CUDA = torch.device("cuda")
SHOWN = 10
SPACE = {
    "blocks": "tokens in a sparse block",
    "tiles": "rows and columns of a tile, where they divide a block",
    "warps": "warps of a program",
    "stages": "stages of its pipeline",
}
"""Options that change what is combined."""
HINT = "--ship has every call of this head size and reach take the fastest"


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_problem(parser, several=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="bf16 by default")
    parser.add_argument("--list", action="store_true", help="print the candidates and end")
    parser.add_argument(
        "--limit", type=count, metavar="N", help="candidates of each pass, evenly spread"
    )
    for name, words in SPACE.items():
        usual = getattr(Space(), name)
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=count,
            metavar="N",
            default=usual,
            help=f"{words} ({' '.join(map(str, usual))})",
        )
    parser.add_argument("--seconds", type=duration, default=0.1, help="of timed calls, each (0.1)")
    workers = max(1, min(15, (os.cpu_count() or 1) - 1))
    parser.add_argument(
        "--workers", type=count, default=workers, help=f"processes that compile ({workers} here)"
    )
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="every candidate's outcome"
    )
    table = parser.add_mutually_exclusive_group()
    table.add_argument(
        "--table", type=file_to_write, metavar="FILE", help="merge the fastest into it"
    )
    table.add_argument(
        "--ship", action="store_const", dest="table", const=SHIPPED, help=f"into {SHIPPED.name}"
    )
    options = parser.parse_args(arguments)
    if options.table and options.dtype == "fp32":
        parser.error("argument --dtype: the table serves 16-bit tensors, got fp32")
    wrong = [block for block in options.blocks if STOCK_BLOCK % block]
    if wrong:
        parser.error(f"argument --blocks: must divide {STOCK_BLOCK}, got {wrong[0]}")
    options.space = Space(**{name: tuple(getattr(options, name)) for name in SPACE})
    try:
        options.problems = problems_of(options, ["slide256"])
    except ValueError as reason:
        parser.error(str(reason))
    return options


def listing(problem: Problem, space: Space, limit: int | None) -> str:
    """The candidates and their number."""
    lines = [problem.label]
    for kind in PASSES:
        found = candidates(kind, problem, space, limit)
        lines.append(f"{kind}: {len(found)} candidates")
        lines += [f"  {layout_words(each.layout)}: {each.words}" for each in found]
    return "\n".join(lines)


def report(outcomes: Sequence[Outcome], winner: Winner | None) -> str:
    """The fastest of each pass beside FlexAttention's own options, and what to pass."""
    lines = []
    for kind in PASSES:
        of_kind = [o for o in outcomes if o.candidate.kind == kind]
        own = milliseconds(outcomes, stock(kind))
        lines.append(f"{kind}: {counted(of_kind)}")
        lines.append(f"{'ms':>9}  own/it  {'':24}  options")
        beside = [o for o in of_kind if o.ms is not None and not o.candidate.swept]
        for outcome in [*beside, *ranked(outcomes, kind)[:SHOWN]]:
            ms, candidate = outcome.ms, outcome.candidate
            times = f"{number(ms):>9}  {ratio(own, ms):>6}  {layout_words(candidate.layout):24}"
            lines.append(f"{times}  {candidate.words}")
    if winner is None:
        return "\n".join([*lines, "no options were right for both passes: there is no winner"])
    lines.append(f"fastest: {layout_words(winner.layout)}, {_words(outcomes, winner)}")
    lines.append(f"  {dict(winner.options)}")
    if flash_is_faster(outcomes, winner):
        lines.append(f"FlashAttention 4 is faster still: kernel_options={dict(FLASH.options)}")
    # What a caller passes means blocks of this size.
    passed = winner_of(outcomes, [(STOCK_BLOCK, False)])
    if passed is not None:
        lines.append(f"to pass, in blocks of {STOCK_BLOCK}, {_words(outcomes, passed)}:")
        lines.append(f"  kernel_options={dict(passed.options)}")
    return "\n".join(lines)


def _words(outcomes: Sequence[Outcome], pair: Winner) -> str:
    """A pair's times, and how many times faster it is than FlexAttention's own options."""
    parts = []
    for kind, ms in zip(PASSES, (pair.forward_ms, pair.training_ms), strict=True):
        own = milliseconds(outcomes, stock(kind))
        parts.append(f"{kind} {number(ms)} ms ({ratio(own, ms)}x)")
    return ", ".join(parts)


def entry_of(
    problem: Problem, dtype: str, device: torch.device, winner: Winner, flash: bool
) -> Entry:
    """The table's entry."""
    block, one_list = winner.layout
    # Where it makes no difference to the window, it is for others of such a reach.
    gaps = lists_have_gaps(problem.window, (problem.n, problem.n), block)
    return {
        "problem": problem.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "dtype": dtype,
        "head_size": problem.d,
        "reach": problem.window.most_seen,
        "block": block,
        "one_list": one_list or not gaps,
        "flash": flash,
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "options": dict(winner.options),
    }


def _merge(
    problem: Problem, options: argparse.Namespace, outcomes: Sequence[Outcome], winner: Winner
) -> str:
    """Writes the table; says what was done."""
    own = milliseconds(outcomes, stock("training"))
    if own is not None and own < winner.training_ms:
        return f"FlexAttention's own options are faster: {options.table} stays as it is"
    dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
    table, faster = read_table(options.table), flash_is_faster(outcomes, winner)
    entry = entry_of(problem, dtype, CUDA, winner, faster)
    if not flash_runs(problem, options):
        entry["flash"] = old_flash(table, entry)
    options.table.write_text(text_of(merged(table, entry)))
    return f"written to {options.table}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweeps, prints and writes; returns the exit status, 1 where a problem has no winner."""
    options = read(arguments)
    if options.list:
        listed = (listing(each, options.space, options.limit) for each in options.problems)
        print("\n\n".join(listed))
        return 0
    if not torch.cuda.is_available():
        print(
            "torch finds no GPU, and kernels for the CPU take no options: there is nothing to "
            "tune here. --list prints the candidates.",
            file=sys.stderr,
        )
        return 2
    settings = {"dtype": options.dtype, "seconds": options.seconds, "limit": options.limit}
    record: dict[str, Any] = {**machine.record(CUDA, **settings), "problems": []}
    print(f"{record['device']}, {options.dtype}, torch {torch.__version__}")
    bad = False
    with workers_for(options.problems, options) as workers, TemporaryDirectory() as folder:
        for problem in options.problems:
            outcomes: list[Outcome] = []
            part: dict[str, Any] = {"name": problem.name, "shape": problem.shape}
            part |= {"window": asdict(problem.window), "outcomes": [], "winner": None}
            record["problems"].append(part)
            with closing(sweep(problem, options, workers, Path(folder) / "lock")) as found:
                for outcome in found:
                    outcomes.append(outcome)
                    part["outcomes"].append(_plain(outcome))
                    _write(record, options.json)  # a later one may take the machine with it
            winner = winner_of(outcomes)
            if winner is not None:
                part["winner"] = _plain_pair(winner)
                part["flash_is_faster"] = flash_is_faster(outcomes, winner)
            _write(record, options.json)
            print(f"\n{problem.label}\n{report(outcomes, winner)}", flush=True)
            if winner is not None:
                print(_merge(problem, options, outcomes, winner) if options.table else HINT)
            bad |= winner is None
    return int(bad)


def _plain(outcome: Outcome) -> dict[str, Any]:
    candidate, fields = outcome.candidate, asdict(outcome)
    del fields["candidate"]
    options = dict(candidate.options)
    return {"kind": candidate.kind, **_plain_layout(candidate.layout), "options": options, **fields}


def _plain_pair(winner: Winner) -> dict[str, Any]:
    fields = {**asdict(winner), "options": dict(winner.options)}
    del fields["layout"]
    return {**_plain_layout(winner.layout), **fields}


def _plain_layout(layout: Layout) -> dict[str, Any]:
    block, one_list = layout
    return {"block": block, "one_list": one_list}


def _write(record: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
