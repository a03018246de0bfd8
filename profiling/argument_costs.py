"""What each argument of the layer costs: time of a call with it, over a call without.

    python -m profiling.argument_costs [--problem slide256] [--only "key mask"] [--json FILE]

By default slide256 in bf16 on a GPU, and a much smaller problem in fp32 on the CPU. The default
path's output and gradients are compared with the eager path's before it is timed. A call is
compared with the plain one, or with what it comes on top of: xpos with rotary, shared_qk on one
tensor, as Reformer has it, with one tensor for q and k.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexlocal import local_attention
from flexlocal.rotary import Rotary

from . import machine
from .check import apart
from .clock import kernels_ms, median_ms, peak_bytes
from .options import add_problem, file_to_write, problem_of, usual_dtype
from .problems import PROBLEMS, Problem
from .report import number, ratio

BASE = {
    "xpos": "rotary",
    "shared_qk, q is k": "q is k",
    "shared_qk, rotary": "rotary",
    "key mask, rotary": "rotary",
}
"""What a call is compared with where that is not the plain one."""

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


def check(attend: Callable[..., Tensor], learned: dict[str, Tensor], grad: Tensor) -> str | None:
    """How the default path differs from the eager one, in the output and its gradients.

    Args:
        learned: what wants a gradient, by name of the argument.
        grad: the output's gradient.
    """
    names = ("the output", *(f"the gradient of {name}" for name in learned))
    tensors = (*learned.values(), grad)
    return apart(lambda *_: attend(), lambda *_: attend(backend="eager"), tensors, names=names)


def measure(
    problem: Problem, device: torch.device, dtype: torch.dtype, only: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Forward and training time in ms, by name of the call.

    On a GPU also the time of a training step's kernels alone, and its peak bytes. ``only`` as for
    ``calls``.
    """
    q, k, v, grad = problem.tensors(dtype, device)
    rows: dict[str, dict[str, float]] = {}
    for name, more in calls(problem, q, only).items():
        given = {"q": q, "k": k, "v": v, "window": problem.window, **more}
        attend = partial(local_attention, **given)
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        learned = {key: x for key, x in tensors.items() if x.requires_grad}

        def train(attend: Any = attend, learned: Any = learned) -> None:
            torch.autograd.grad(attend(), tuple(learned.values()), grad)

        wrong = check(attend, learned, grad)
        if wrong is not None:
            sys.exit(f"not timed, {name} is wrong: {wrong}")
        row = {
            "forward_ms": median_ms(torch.no_grad()(attend), device),
            "train_ms": median_ms(train, device),
        }
        passed = sum(x.nbytes for x in {*tensors.values(), grad})
        on_gpu = {
            "kernels_ms": kernels_ms(train, device),
            "peak_bytes": peak_bytes(train, device, passed),
        }
        row |= {key: value for key, value in on_gpu.items() if value is not None}
        rows[name] = row
        base = rows[BASE.get(name, "plain")]
        parts = [
            f"{row[kind]:9.3f} ms {ratio(row[kind], base[kind]):>5}x"
            for kind in KINDS
            if kind in row
        ]
        print(f"{name:32}{'  '.join(parts)}  over {BASE.get(name, 'plain')}", flush=True)
    return rows


def markdown(record: dict[str, Any]) -> str:
    """A Markdown table: each call's times, and how many times its base's they are."""
    rows = record["rows"]
    kinds = {kind: words for kind, words in KINDS.items() if kind in rows["plain"]}
    lines = [
        f"| | {' | '.join(f'{words} ms' for words in kinds.values())} | compared with |",
        "|" + "---|" * (len(kinds) + 2),
    ]
    for name, row in rows.items():
        base = BASE.get(name, "plain")
        cells = [f"{number(row[kind])} ({ratio(row[kind], rows[base][kind])}x)" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} | {base} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.argument_costs", description=__doc__.split("\n")[0]
    )
    add_problem(parser)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CALL", help="calls whose names begin so"
    )
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="write the results there too"
    )
    options = parser.parse_args(arguments)
    device = machine.default_device()
    try:
        problem = problem_of(options, PROBLEMS["slide256" if device.type == "cuda" else "cpu"])
        Rotary(problem.d)  # which refuses heads that it cannot turn
    except ValueError as wrong:
        parser.error(str(wrong))
    names = list(calls(problem, torch.empty((), device="meta")))
    for words in options.only:
        if not any(name.startswith(words) for name in names):
            parser.error(f"--only must begin as one of {'; '.join(names)}, got {words!r}")
    print(f"{machine.device_name(device)}, torch {torch.__version__}, {problem.label}")
    dtype = usual_dtype(device)
    rows = measure(problem, device, dtype, options.only)
    if options.json:
        settings = {"problem": problem.name, "shape": problem.shape, "dtype": str(dtype)}
        record = machine.record(device, **settings)
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
