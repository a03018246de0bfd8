"""The fastest sparse blocks and kernel options for a problem, swept on the GPU.

    python -m profiling.tune --problem slide256 slide1k --ship     # into flexlocal's own table
    python -m profiling.tune --shape 2 8 8192 64 --window 128 --causal --exact --json sweep.json
    python -m profiling.tune --blocks 64 --warps 4 --stages 1 2 3 4   # part of the usual, and more
    python -m profiling.tune --list                                # what would be tried; anywhere

Each candidate runs through flexlocal's fused path, is compared with the eager path and then
timed; one that does not compile or is wrong is counted, and never chosen. Processes compile side
by side and take turns on the GPU. The forward pass is swept first; the backward pass is timed as
training, after the fastest forward options of its block. In the end the fastest is timed again in
turns with FlexAttention's own options and, where it is installed, FlashAttention 4.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flexlocal.flex import tuning
from flexlocal.flex.tuning import FLASH, STOCK, STOCK_BLOCK
from flexlocal.masks.block_lists import lists_have_gaps

from . import machine
from .candidates import (
    PASSES,
    Outcome,
    Space,
    Winner,
    candidates,
    counted,
    layout_words,
    ranked,
    stock,
    winner_of,
)
from .options import DTYPES, add_output, add_problem, count, file_to_write, problems_of, reader
from .problems import Problem
from .sweep import Final, Rounds, Trial, flash_runs, in_processes, in_the_end, most_workers, sweep
from .terminal import number, paragraph, table
from .timing import TOO_NOISY, Ratio, ratio_of_rounds

SHIPPED = Path(tuning.__file__).with_name("tuned.json")
"""The table that the package reads."""

OWN, FASTEST, PASSED, FLASHED = "own options", "fastest", "to pass", "FlashAttention 4"
"""The tunings of the final, by name."""

SHOWN = 10
HINT = "--ship has every call of this head size and reach take the fastest"

Table = dict[str, Any]
Entry = dict[str, Any]


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = reader("tune", __doc__)
    add_problem(parser, several=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="bf16 by default")
    parser.add_argument("--list", action="store_true", help="print the candidates and end")
    words = "candidates of each pass, evenly spread"
    parser.add_argument("--limit", type=count, metavar="N", help=words)
    for name, usual in asdict(Space()).items():
        words = f"of which kernels are made ({' '.join(map(str, usual))})"
        flag = f"--{name}"
        parser.add_argument(flag, nargs="+", type=count, metavar="N", default=usual, help=words)
    workers = max(1, min(15, (os.cpu_count() or 1) - 1))
    words = f"processes that compile ({workers} here)"
    parser.add_argument("--workers", type=count, default=workers, help=words)
    add_output(parser, seconds=0.1)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--table", type=file_to_write, metavar="FILE", help="to merge it into")
    words = f"merge it into {SHIPPED.name}"
    group.add_argument("--ship", action="store_const", dest="table", const=SHIPPED, help=words)
    options = parser.parse_args(arguments)
    if options.table and options.dtype == "fp32":
        parser.error("argument --dtype: the table serves 16-bit tensors, got fp32")
    wrong = [block for block in options.blocks if STOCK_BLOCK % block]
    if wrong:
        parser.error(f"argument --blocks: must divide {STOCK_BLOCK}, got {wrong[0]}")
    options.space = Space(**{name: tuple(getattr(options, name)) for name in asdict(Space())})
    options.problems = problems_of(parser, options, ["slide256"])
    return options


def finalists(outcomes: Sequence[Outcome], winner: Winner) -> dict[str, tuning.Tuning]:
    """What is timed again: the winner, what a caller can pass, and others beside them."""
    found = {FASTEST: winner.tuning}
    # What a caller passes means blocks of this size.
    passed = winner_of(outcomes, [(STOCK_BLOCK, False)])
    if passed is not None and passed != winner:
        found[PASSED] = passed.tuning
    ran = [o.candidate for o in outcomes if o.status == "measured"]
    for name, one in ((OWN, STOCK), (FLASHED, FLASH)):
        if all(any((c.kind, c.tuning()) == (kind, one) for c in ran) for kind in PASSES):
            found[name] = one
    return found


def ratios(rounds: Rounds, one: str, other: str) -> list[Ratio]:
    """How many times as long ``one`` takes as ``other``, in each pass; none where one is not."""
    both = [rounds[kind] for kind in PASSES if kind in rounds]
    return [ratio_of_rounds(r[one], r[other]) for r in both if one in r and other in r]


def faster(rounds: Rounds, one: str, other: str) -> bool:
    """Whether ``one`` takes less time than ``other`` in both passes."""
    found = ratios(rounds, one, other)
    return len(found) == len(PASSES) and all(each.median < 1 for each in found)


def report(outcomes: Sequence[Outcome], winner: Winner | None, rounds: Rounds) -> str:
    """The fastest of each pass, the final, and what to pass."""
    parts = []
    for kind in PASSES:
        of_kind = [o for o in outcomes if o.candidate.kind == kind]
        parts.append(paragraph(f"{kind}: {counted(of_kind)}"))
        beside = [o for o in of_kind if o.status == "measured" and not o.candidate.swept]
        lines = [
            [number(o.ms), layout_words(o.candidate.layout), o.candidate.words]
            for o in (*beside, *ranked(outcomes, kind)[:SHOWN])
        ]
        parts.append(table(["ms", "blocks", "options"], lines, ["blocks", "options"]))
    if winner is None:
        return "\n\n".join([*parts, "no options were right for both passes: there is no winner"])
    lines, noisy = [], []
    for name in rounds.get("forward", {}):
        line = [name]
        own = ratios(rounds, name, OWN)
        for place, kind in enumerate(PASSES):
            line.append(number(statistics.median(rounds[kind][name])))
            line.append(own[place].words() if own else "-")
        lines.append(line)
        noisy += [name] * any(ratio.noisy for ratio in own)
    titles = ["in turns", "forward ms", "of own", "training ms", "of own"]
    parts.append(table(titles, lines))
    if noisy:
        parts.append(f"{TOO_NOISY} the ratios of {', '.join(noisy)}")
    parts.append(f"fastest: {layout_words(winner.layout)}\n{paragraph(str(dict(winner.options)))}")
    if faster(rounds, FLASHED, FASTEST):
        parts.append(f"FlashAttention 4 is faster still: kernel_options={dict(FLASH.options)}")
    passed = winner_of(outcomes, [(STOCK_BLOCK, False)])
    if passed is not None:
        words = paragraph(f"kernel_options={dict(passed.options)}")
        parts.append(f"to pass, in blocks of {STOCK_BLOCK}:\n{words}")
    return "\n\n".join(parts)


def merge(problem: Problem, options: argparse.Namespace, winner: Winner, rounds: Rounds) -> str:
    """Writes the table; says what was done."""
    own = ratios(rounds, FASTEST, OWN)
    if own and own[-1].median > 1:
        return f"FlexAttention's own options are faster: {options.table} stays as it is"
    table, (block, one_list) = read_table(options.table), winner.layout
    # Where it makes no difference to the window, it is for others of such a reach.
    gaps = lists_have_gaps(problem.window, (problem.n, problem.n), block)
    entry = {
        "problem": problem.name,
        "capability": list(torch.cuda.get_device_capability("cuda")),
        "dtype": str(DTYPES[options.dtype]).removeprefix("torch."),
        "head_size": problem.d,
        "reach": problem.window.most_seen,
        "block": block,
        "one_list": one_list or not gaps,
        "flash": faster(rounds, FLASHED, FASTEST),
        "device": machine.device_name(torch.device("cuda")),
        "torch": torch.__version__,
        "options": dict(winner.options),
    }
    if not flash_runs(problem, options):
        entry["flash"] = old_flash(table, entry)
    machine.write(merged(table, entry), options.table)
    return f"written to {options.table}"


# The table that flexlocal reads.


def read_table(file: Path) -> Table | None:
    """The table in ``file``, None where there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None


def _same_call(one: Entry, other: Entry) -> bool:
    """Whether two entries serve the same calls, so that only one can stay."""
    return all(one[name] == other[name] for name in ("capability", "head_size", "reach"))


def old_flash(table: Table | None, entry: Entry) -> bool:
    """What the table knew of FlashAttention 4 for the calls of ``entry``."""
    entries = [] if table is None else table["entries"]
    return any(old["flash"] for old in entries if _same_call(old, entry))


def merged(table: Table | None, entry: Entry) -> Table:
    """``table`` with ``entry`` in place of the one for the same calls, or at its end.

    The table's device and torch are those of entries that name none.
    """
    if table is None:
        where = {name: entry[name] for name in ("device", "torch")}
        table = {"made_by": "python -m profiling.tune", **where, "entries": []}
    entries = [entry if _same_call(old, entry) else old for old in table["entries"]]
    return {**table, "entries": entries if entry in entries else [*entries, entry]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweeps, prints and writes; returns the exit status, 1 where a problem has no winner."""
    options = read(arguments)
    if options.list:
        for problem in options.problems:
            print(problem.label)
            for kind in PASSES:
                found = candidates(kind, problem, options.space, options.limit)
                print(f"{kind}: {len(found)} candidates")
                for each in found:
                    print(f"  {layout_words(each.layout)}: {each.words}")
        return 0
    if not torch.cuda.is_available():
        words = "torch finds no GPU, and kernels for the CPU take no options: nothing to tune here."
        print(f"{words} --list prints the candidates.", file=sys.stderr)
        return 2
    settings = {name: getattr(options, name) for name in ("dtype", "seconds", "limit")}
    record = machine.record(torch.device("cuda"), **settings, **asdict(options.space))
    record["problems"], bad = [], False
    most = most_workers(options.problems, options)
    with TemporaryDirectory() as folder:
        for problem in options.problems:
            outcomes: list[Outcome] = []
            part: dict[str, Any] = {"name": problem.name, "shape": problem.shape}
            part |= {"window": asdict(problem.window), "outcomes": [], "winner": None}
            record["problems"].append(part)
            lock = Path(folder) / "lock"
            with closing(sweep(problem, options, most, lock)) as found:
                for outcome in found:
                    outcomes.append(outcome)
                    part["outcomes"].append(plain(outcome))
                    machine.write(record, options.json)  # a later one may take the machine with it
            winner, rounds = winner_of(outcomes), {}
            if winner is not None:
                trial = Trial(
                    stock("forward"), problem, DTYPES[options.dtype], options.seconds, lock
                )
                final = Final(finalists(outcomes, winner), trial)
                ((_, rounds),) = in_processes(in_the_end, [final], 1)
                if isinstance(rounds, str):
                    print(f"{problem.name}: the fastest were not timed again: {rounds}")
                    rounds = {}
                part |= {"winner": plain(winner), "rounds": rounds}
                part["flash_is_faster"] = faster(rounds, FLASHED, FASTEST)
            machine.write(record, options.json)
            print(f"\n{problem.label}\n{report(outcomes, winner, rounds)}\n", flush=True)
            if winner is not None:
                print(merge(problem, options, winner, rounds) if options.table else HINT)
            bad |= winner is None
    return int(bad)


def plain(made: Outcome | Winner) -> dict[str, Any]:
    """For the record: the layout as two numbers, the options by name."""
    fields = asdict(made)
    fields = fields.pop("candidate", {}) | fields
    block, one_list = fields.pop("layout")
    return {"block": block, "one_list": one_list} | fields | {"options": dict(fields["options"])}


if __name__ == "__main__":
    sys.exit(main())
