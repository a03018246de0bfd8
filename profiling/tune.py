"""The fastest sparse blocks and kernel options for a problem, swept on the GPU.

    python -m profiling.tune --problem slide256 slide1k --ship     # into flexlocal's own table
    python -m profiling.tune --shape 2 8 8192 64 --window 128 --causal --exact --json sweep.json
    python -m profiling.tune --blocks 128        # what a caller can pass as kernel_options

Each candidate runs through flexlocal's flex path, is compared with the eager path and then
timed. The forward pass is swept first; the backward pass is timed as training, after the fastest
forward options of its blocks. In the end the fastest is timed again in turns with FlexAttention's
own options and, where it is installed, FlashAttention 4.
"""

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flexlocal import Window
from flexlocal.flex import tuning
from flexlocal.flex.tuning import FLASH, STOCK, STOCK_BLOCK
from flexlocal.masks.block_lists import lists_have_gaps

from . import machine
from .options import DTYPES, count, problems_of, reader
from .peers import PEERS
from .problems import Problem, Task
from .sweep import PASSES, SPACE, Trial, attempt, fastest, in_the_end, sweep
from .terminal import number, table
from .timing import TOO_NOISY, Ratio, ratio_of_rounds

SHIPPED = Path(tuning.__file__).with_name("tuned.json")
"""The table that the package reads."""

FASTEST, OWN, FLASHED = "fastest", "own options", "FlashAttention 4"
"""What is timed again, by name."""

Rounds = dict[str, dict[str, list[float]]]
"""Milliseconds of each round, by the pass and the name."""


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = reader("tune", __doc__, "several", seconds=0.1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="bf16 by default")
    for name, usual in SPACE.items():
        words = f"{' '.join(map(str, usual))} by default"
        parser.add_argument(f"--{name}", nargs="+", type=count, default=usual, help=words)
    workers = max(1, min(15, (os.cpu_count() or 1) - 1))
    words = f"processes that compile ({workers} here); each holds the problem in the GPU's memory"
    parser.add_argument("--workers", type=count, default=workers, help=words)
    parser.add_argument("--ship", action="store_true", help="for all calls of this size and reach")
    options = parser.parse_args(arguments)
    if options.ship and options.dtype == "fp32":
        parser.error("argument --dtype: the table serves 16-bit tensors, got fp32")
    wrong = [block for block in options.blocks if STOCK_BLOCK % block]
    if wrong:
        parser.error(f"argument --blocks: must divide {STOCK_BLOCK}, got {wrong[0]}")
    options.space = {name: getattr(options, name) for name in SPACE}
    options.problems = problems_of(parser, options, ["slide256"])
    return options


def ratios(rounds: Rounds, one: str, other: str) -> list[Ratio]:
    """How many times as long ``one`` takes as ``other``, in each pass; none where one is not."""
    both = [times for times in rounds.values() if one in times and other in times]
    return [ratio_of_rounds(times[one], times[other]) for times in both]


def for_flash(rounds: Rounds, window: Window) -> list[str]:
    """For which calls over such windows FlashAttention 4 is faster still, as the table names them.

    It must be in both passes over standing windows.
    """
    kinds = [kind for kind, times in rounds.items() if FLASHED in times]
    found = ratios(rounds, FLASHED, FASTEST)
    won = [kind for kind, ratio in zip(kinds, found, strict=True) if ratio.median < 1]
    if window.exact:
        return won
    return ["standing"] if len(won) == len(PASSES) else []


def report(trials: Sequence[Trial], rounds: Rounds) -> str:
    """The fastest of each pass, how the others ended, and what came of the turns."""
    parts = []
    for kind in PASSES:
        of_kind = [trial for trial in trials if trial.kind == kind]
        endings = Counter(f"{t.status} {t.reason[:80]}".strip() for t in of_kind).most_common(4)
        parts.append(f"{kind}: " + "; ".join(f"{times} {ending}" for ending, times in endings))
        lines = [[number(t.ms), t.words] for t in fastest(of_kind, kind)[:10]]
        parts.append(table(["ms", "options"], lines, ["options"]))
    lines = []
    for name in rounds.get("forward", {}):
        medians = [number(statistics.median(times[name])) for times in rounds.values()]
        own = ratios(rounds, name, OWN)
        lines.append([name, *medians, *([ratio.words() for ratio in own] or ["-"] * len(medians))])
        if any(ratio.noisy for ratio in own):
            parts.append(f"{TOO_NOISY} the ratios of {name}")
    if lines:
        titles = ["in turns", "forward ms", "training ms", "forward of own", "training of own"]
        parts.append(table(titles, lines))
    return "\n\n".join(parts)


def ship(task: Task, winner: Trial, rounds: Rounds) -> str:
    """Writes the winner into the table, with FlashAttention 4 only where that is installed."""
    own = ratios(rounds, FASTEST, OWN)
    if not own or own[-1].median > 1:
        return f"not faster than FlexAttention's own options: {SHIPPED} stays as it is"
    problem = task.problem
    # Where one list makes no difference to the window, it is for others of such a reach.
    gaps = lists_have_gaps(problem.window, (problem.n, problem.n), winner.block)
    entry = {
        "problem": problem.name,
        "capability": list(torch.cuda.get_device_capability("cuda")),
        "dtype": str(task.dtype).removeprefix("torch."),
        "head_size": problem.d,
        "reach": problem.window.most_seen,
        "block": winner.block,
        "one_list": winner.one_list or not gaps,
        "flash": for_flash(rounds, problem.window),
        "device": machine.device_name(torch.device("cuda")),
        "torch": torch.__version__,
        "options": winner.options,
    }
    machine.write(merged(json.loads(SHIPPED.read_text()), entry, problem.window.exact), SHIPPED)
    return f"written to {SHIPPED}"


def merged(shipped: dict[str, Any], entry: dict[str, Any], slides: bool) -> dict[str, Any]:
    """The table with ``entry`` in place of the one for the same calls, or at its end.

    What that one says of FlashAttention 4 over windows of the other kind stays.
    """
    entries, key = [*shipped["entries"]], ("capability", "head_size", "reach")
    for place, old in enumerate(entries):
        if all(old[name] == entry[name] for name in key):
            others = [kind for kind in old["flash"] if (kind == "standing") == slides]
            entries[place] = {**entry, "flash": [*others, *entry["flash"]]}
            break
    else:
        entries.append(entry)
    return {**shipped, "entries": entries}


def tune(problem: Problem, options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Sweeps a problem, adds it to the record, prints and ships; whether there is a winner."""
    task = Task(problem, DTYPES[options.dtype], torch.device("cuda"), options.seconds)
    trials: list[Trial] = []
    part: dict[str, Any] = {"name": problem.name, "shape": problem.shape}
    part |= {"window": asdict(problem.window), "outcomes": []}
    record["problems"].append(part)
    with TemporaryDirectory() as folder:
        try_one = partial(attempt, task, Path(folder) / "lock")
        for trial in sweep(problem, options.space, options.workers, try_one):
            trials.append(trial)
            part["outcomes"].append(asdict(trial))
            machine.write(record, options.json)  # a later one may take the machine with it
    winner, rounds = next(iter(fastest(trials, "training")), None), {}
    if winner is not None:
        tunings = {FASTEST: winner.tuning, OWN: STOCK}
        if PEERS["FlashAttention 4"].missing() is None:
            tunings[FLASHED] = FLASH
        rounds = in_the_end(task, tunings)
        torch.cuda.empty_cache()  # the next problem's processes want the memory
        part |= {"winner": asdict(winner), "rounds": rounds}
        machine.write(record, options.json)
    print(f"\n{problem.label}\n{report(trials, rounds)}\n")
    if winner is None:
        print("no options were right for both passes: there is no winner")
        return False
    print(f"fastest: {winner.words.split(':')[0]}\n{winner.options}")
    if kinds := for_flash(rounds, problem.window):
        print(f"FlashAttention 4 is faster still: {', '.join(kinds)}")
    if options.ship:
        print(ship(task, winner, rounds))
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweeps, prints and writes; returns the exit status, 1 where a problem has no winner."""
    options = read(arguments)
    if not torch.cuda.is_available():
        words = "torch finds no GPU, and kernels for the CPU take no options: nothing to tune here"
        print(words, file=sys.stderr)
        return 2
    settings = {"dtype": options.dtype, "seconds": options.seconds, **options.space}
    record = machine.record(torch.device("cuda"), **settings) | {"problems": []}
    return int(not all([tune(problem, options, record) for problem in options.problems]))


if __name__ == "__main__":
    sys.exit(main())
