"""What each argument of the layer costs: time of a call with it, over a call without, in turns.

    python -m profiling.argument_costs [--problem slide256] [--only "key mask"] [--json FILE]

By default slide256 in bf16 on a GPU, and a much smaller problem in fp32 on the CPU. The default
path's output and gradients are compared with the eager path's before it is timed. A call is
compared with the plain one, or with what it comes on top of: xpos with rotary, shared_qk on one
tensor, as Reformer has it, with one tensor for q and k.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexlocal import Rotary, local_attention

from . import machine
from .check import apart
from .options import dtype_of, problems_of, reader
from .peers import forward_of, training_of
from .problems import Problem, Task
from .terminal import number, table, watched
from .timing import TOO_NOISY, Run, add_times, peak_bytes, ratio_of_rows

Rows = dict[str, dict[str, Any]]

BASE = {
    "xpos": "rotary",
    "shared_qk, q is k": "q is k",
    "shared_qk, rotary": "rotary",
    "key mask, rotary": "rotary",
}
"""What a call is compared with where that is not the plain one."""

KINDS = {"forward_ms": "forward", "train_ms": "training step", "kernels_ms": "its kernels"}
"""The times of a call and their words; a CPU tells no kernels' time."""


def calls(problem: Problem, q: Tensor, only: Sequence[str] = ()) -> Rows:
    """The arguments of each call, by name; tensors like ``q`` in dtype and device.

    Those whose names begin as one of ``only`` come with what they are compared with.
    """
    window, n, d = problem.window, problem.n, problem.d
    keep = torch.ones(problem.batch, n, dtype=torch.bool, device=q.device)
    few, half = keep.clone(), keep.clone()
    few[:, n - n // 20 :] = False
    half[:, n // 2 :] = False
    scattered = keep & (torch.rand(keep.shape, device=q.device) > 0.3)
    begins = torch.rand(keep.shape, device=q.device) < 1 / 2048
    rotary = Rotary(d).to(q.device)
    bias = torch.randn(problem.heads, window.size, window.span, device=q.device)
    every: Rows = {
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
        "documents of 2048 on average": {"documents": begins.cumsum(1)},
        "softcap": {"softcap": 50.0},
        "sinks": {"sinks": torch.randn(problem.heads, device=q.device).requires_grad_()},
        "log-sum-exp": {"return_lse": True},
    }
    wanted = [name for name in every if name.startswith(tuple(only) or "")]
    bases = {"plain", *(BASE[name] for name in wanted if name in BASE)}
    return {name: more for name, more in every.items() if name in bases.union(wanted)}


def measure(task: Task, only: Sequence[str] = ()) -> Rows:
    """By name of the call: forward and training time in ms, each round's and the peak's bytes.

    On a GPU also a training step's kernels alone. The program ends where a result is wrong.
    """
    problem, device = task.problem, task.device
    q, k, v, grad = task.tensors()
    rows: Rows = {}
    runs: dict[str, dict[str, Run]] = {"forward": {}, "train": {}}
    every = calls(problem, q, only)
    for name in watched(every, len(every), "checked"):
        given = {"q": q, "k": k, "v": v, "window": problem.window, **every[name]}
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        learned = {key: x for key, x in tensors.items() if x.requires_grad}

        def attend(*_: Tensor, given: dict[str, Any] = given, backend: str = "auto") -> Tensor:
            found = local_attention(**given, backend=backend)  # which holds what is learned
            return found if isinstance(found, Tensor) else found[0]

        names = ("the output", *(f"the gradient of {key}" for key in learned))
        passed = (*learned.values(), grad)
        wrong = apart(attend, partial(attend, backend="eager"), passed, names=names)
        if wrong is not None:
            sys.exit(f"not timed, {name} is wrong: {wrong}")
        runs["forward"][name] = forward_of(attend, passed)
        runs["train"][name], rows[name] = training_of(attend, passed), {}
        if device.type == "cuda":
            held = sum(x.nbytes for x in {*tensors.values(), grad})
            rows[name]["peak_bytes"] = peak_bytes(runs["train"][name], device, held)
    add_times(rows, runs["forward"], task, "forward_ms")
    add_times(rows, runs["train"], task, "train_ms", "kernels_ms")
    return rows


def _cells(rows: Rows, in_brackets: bool) -> tuple[list[str], list[list[str]], list[str]]:
    """Titles, each call's times with their ratios, and those whose ratio is noisy."""
    kinds = [kind for kind in KINDS if kind in rows["plain"]]
    lines, noisy = [], []
    for name, row in rows.items():
        base, cells = BASE.get(name, "plain"), [name]
        for kind in kinds:
            ratio = ratio_of_rows(row, rows[base], kind)
            words = f"({ratio.words(bracket=False)})" if in_brackets else ratio.words()
            cells.append(f"{number(row[kind])} {words}")
            noisy += [f"{name} ({KINDS[kind]})"] * ratio.noisy
        lines.append([*cells, base])
    return ["", *(f"{KINDS[kind]} ms" for kind in kinds), "compared with"], lines, noisy


def markdown(record: dict[str, Any]) -> str:
    """The table in docs."""
    (_, *titles), cells, _ = _cells(record["rows"], in_brackets=True)
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in cells)])


def text(rows: Rows) -> str:
    """A table for a terminal, and what the machine was too noisy for."""
    titles, cells, noisy = _cells(rows, in_brackets=False)
    made = table(titles, cells, ["compared with"])
    return f"{made}\n\n{TOO_NOISY} these ratios: {'; '.join(noisy)}" if noisy else made


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures and prints."""
    parser = reader("argument_costs", __doc__, "one", seconds=0.5)
    parser.add_argument("--only", nargs="+", default=[], help="calls whose names begin so")
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
    rows = measure(Task(problem, dtype, device, options.seconds), options.only)
    print(text(rows))
    settings = {"problem": problem.name, "shape": problem.shape, "dtype": str(dtype)}
    settings["seconds"] = options.seconds
    machine.write(machine.record(device, **settings) | {"rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
