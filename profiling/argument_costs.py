"""What each argument of the layer costs: time of a call with it, over a call without, in turns.

    python -m profiling.argument_costs [--problem slide256] [--only "key mask"] [--json FILE]

By default slide256 in bf16 on a GPU, and a much smaller problem in fp32 on the CPU. The default
path's output and gradients are compared with the eager path's before it is timed. A call is
compared with the plain one, or with what it comes on top of: xpos with rotary, shared_qk on one
tensor, as Reformer has it, with one tensor for q and k.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexlocal import Rotary, local_attention

from . import machine
from .check import apart
from .options import add_output, add_problem, dtype_of, problems_of, reader
from .problems import Problem
from .terminal import Bar, number, paragraph, table
from .timing import TOO_NOISY, Run, add_times, peak_bytes, ratio_of_rows

BASE = {
    "xpos": "rotary",
    "shared_qk, q is k": "q is k",
    "shared_qk, rotary": "rotary",
    "key mask, rotary": "rotary",
}
"""What a call is compared with where that is not the plain one."""

MAY_SAVE = ("q is k", "key mask")
"""Beginnings of calls that may take less time than what they are compared with."""

KINDS = {"forward_ms": "forward", "train_ms": "training step", "kernels_ms": "its kernels"}
"""The times of a call and their words; a CPU tells no kernels' time."""


def calls(problem: Problem, q: Tensor, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The arguments of each call, by name; tensors like ``q`` in dtype and device.

    Args:
        only: beginnings of the names that are wanted, which come with what they are compared with.
    """
    window, n, d = problem.window, problem.n, problem.d
    keep = torch.ones(problem.batch, n, dtype=torch.bool, device=q.device)
    few, half = keep.clone(), keep.clone()
    few[:, n - n // 20 :] = False
    half[:, n // 2 :] = False
    scattered = keep & (torch.rand(keep.shape, device=q.device) > 0.3)
    rotary = Rotary(d).to(q.device)
    bias = torch.randn(problem.heads, window.size, window.span, device=q.device)
    every: dict[str, dict[str, Any]] = {
        "plain": {},
        "rotary": {"rotary": rotary},
        "xpos": {"rotary": Rotary(d, True, max(1, window.size // 2)).to(q.device)},
        "shared_qk": {"shared_qk": True},
        "q is k": {"k": q},
        "shared_qk, q is k": {"k": q, "shared_qk": True},
        "shared_qk, rotary": {"shared_qk": True, "rotary": rotary},
        "key mask, the last 5 % hidden": {"mask": few},
        "key mask, rotary": {"mask": few, "rotary": rotary},
        "key mask, 30 % here and there": {"mask": scattered},
        "key mask, half the keys hidden": {"mask": half},
        "bias": {"attn_bias": bias.to(q.dtype)},
        "bias, learned": {"attn_bias": bias.to(q.dtype, copy=True).requires_grad_()},
        "bias, learned in fp32": {"attn_bias": bias.clone().requires_grad_()},
        "dropout": {"dropout": 0.1, "dropout_seed": torch.tensor(0, device=q.device)},
    }
    wanted = [name for name in every if name.startswith(tuple(only) or "")]
    bases = {"plain", *(BASE[name] for name in wanted if name in BASE)}
    return {name: more for name, more in every.items() if name in bases.union(wanted)}


def measure(
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    only: Sequence[str] = (),
    seconds: float = 0.5,
) -> dict[str, dict[str, Any]]:
    """Forward and training time in ms by name of the call, and what each round took.

    On a GPU also the time of a training step's kernels alone, and its peak bytes. ``only`` as for
    ``calls``.
    """
    q, k, v, grad = problem.tensors(dtype, device)
    rows: dict[str, dict[str, Any]] = {}
    forward: dict[str, Run] = {}
    train: dict[str, Run] = {}
    every = calls(problem, q, only)
    with Bar(len(every) + 2) as bar:
        for name, more in every.items():
            bar.show(f"{name}: checked")
            given = {"q": q, "k": k, "v": v, "window": problem.window, **more}
            attend = partial(local_attention, **given)
            tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
            learned = {key: x for key, x in tensors.items() if x.requires_grad}
            names = ("the output", *(f"the gradient of {key}" for key in learned))
            both = (partial(_alone, attend), partial(_alone, partial(attend, backend="eager")))
            wrong = apart(*both, (*learned.values(), grad), names=names)
            if wrong is not None:
                sys.exit(f"not timed, {name} is wrong: {wrong}")
            forward[name] = torch.no_grad()(attend)
            train[name] = partial(_train, attend, tuple(learned.values()), grad)
            passed = sum(x.nbytes for x in {*tensors.values(), grad})
            peak = peak_bytes(train[name], device, passed)
            rows[name] = {} if peak is None else {"peak_bytes": peak}
            bar.advance()
        for runs, kinds in ((forward, ["forward_ms"]), (train, ["train_ms", "kernels_ms"])):
            bar.show(f"{KINDS[kinds[0]]}: in turns")
            add_times(rows, runs, kinds, device, seconds)
            bar.advance()
    return rows


def _alone(attend: Callable[[], Tensor], *_: Tensor) -> Tensor:
    """For ``apart``, which passes what wants a gradient: the call holds that already."""
    return attend()


def _train(attend: Callable[[], Tensor], learned: Sequence[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attend(), learned, grad)


def _cells(rows: dict[str, dict[str, Any]], markdown: bool) -> list[list[str]]:
    """Each call's times, and how many times its base's they are."""
    lines = []
    for name, row in rows.items():
        base = BASE.get(name, "plain")
        line = [name]
        for kind in (kind for kind in KINDS if kind in row):
            times = ratio_of_rows(row, rows[base], kind)
            assert times is not None  # every row has the same times
            words = f"({times.words(bracket=False)})" if markdown else times.words()
            line.append(f"{number(row[kind])} {words}")
        lines.append([*line, base])
    return lines


def markdown(record: dict[str, Any]) -> str:
    """The table in docs."""
    kinds = [words for kind, words in KINDS.items() if kind in record["rows"]["plain"]]
    lines = [
        f"| | {' | '.join(f'{words} ms' for words in kinds)} | compared with |",
        "|" + "---|" * (len(kinds) + 2),
        *(f"| {' | '.join(cells)} |" for cells in _cells(record["rows"], markdown=True)),
    ]
    return "\n".join(lines)


def text(rows: dict[str, dict[str, Any]]) -> str:
    """A table for each kind of call, and what the machine was too noisy for."""
    parts = []
    for kind, words in KINDS.items():
        if kind not in rows["plain"]:
            continue
        lines, noisy, impossible = [], [], []
        for name, row in rows.items():
            base = BASE.get(name, "plain")
            times = ratio_of_rows(row, rows[base], kind)
            assert times is not None  # every row has the same times
            lines.append([name, number(row[kind]), times.words(), base])
            if times.noisy:
                noisy.append(name)
            elif times.impossible and not name.startswith(MAY_SAVE):
                impossible.append(name)
        parts.append(table([words, "ms", "times", "compared with"], lines, ["compared with"]))
        if noisy:
            parts.append(paragraph(f"{TOO_NOISY} these ratios: {'; '.join(noisy)}"))
        if impossible:
            less = "added work cannot take less time"
            parts.append(paragraph(f"{TOO_NOISY} these, as {less}: {'; '.join(impossible)}"))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures and prints."""
    parser = reader("argument_costs", __doc__)
    add_problem(parser)
    words = "calls whose names begin so"
    parser.add_argument("--only", nargs="+", default=[], metavar="CALL", help=words)
    add_output(parser, seconds=0.5)
    options = parser.parse_args(arguments)
    device = machine.default_device()
    default = "slide256" if device.type == "cuda" else "cpu"
    (problem,) = problems_of(parser, options, [default], turned=True)
    names = list(calls(problem, torch.empty((), device="meta")))
    for words in options.only:
        if not any(name.startswith(words) for name in names):
            parser.error(f"--only must begin as one of {'; '.join(names)}, got {words!r}")
    print(f"{machine.device_name(device)}, torch {torch.__version__}, {problem.label}\n")
    dtype = dtype_of(options, device)
    rows = measure(problem, device, dtype, options.only, options.seconds)
    print(text(rows))
    settings = {"problem": problem.name, "shape": problem.shape, "dtype": str(dtype)}
    record = machine.record(device, **settings, seconds=options.seconds)
    machine.write({**record, "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
