"""What a call costs the host: outside a compiled model a GPU may wait for it.

    python -m profiling.bench --host

A call is 1 x 8 x 1024 x 64 in bf16, 128 keys back; its bias is not learned. Results are checked
first. A time is that of calls that follow each other without a pause, until each has launched its
kernels; they do not wait for these. Ratios are to compiled FlexAttention by itself, whose mask is
ready.

A second table compares the two ways of short sequences by size, with the kernels' own times as
well: all pairs of tokens (``flexlocal.flex.dense``) over FlexAttention's kernels.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flexlocal import LocalAttention, Window, local_attention
from flexlocal.flex import dense

from . import machine
from .check import complaint, errors, results
from .peers import PEERS, Attend, forward_of, training_of
from .problems import Problem, Task
from .terminal import number, table
from .timing import TOO_NOISY, Run, Timing, in_turns, kernels_ms, ratio_of_rounds, synchronize

BARE = "FlexAttention, stock"
OTHERS = (BARE, "FlashAttention 4")

HOST = Problem("host", 1, 8, 1024, 64, Window(128, causal=True, exact=True))

_BACK, _ALL = Window(128, causal=True, exact=True), Window(4096, causal=True, exact=True)

_SHAPES = {
    _BACK: [(1, 8, 256, 64), (1, 8, 1024, 64), (8, 8, 512, 64), (8, 12, 1024, 64)],
    _ALL: [(1, 16, 512, 128), (1, 16, 2048, 128), (8, 16, 2048, 128)],
}

SIZES = [
    Problem(" x ".join(map(str, shape)), *shape, window, words)
    for (window, shapes), words in zip(_SHAPES.items(), ("128 back", "all"), strict=True)
    for shape in shapes
]

_IN_A_ROW = 50  # calls, fewer than a GPU's queue of launches holds


def host_ms(run: Run, device: torch.device, seconds: float) -> float:
    """Milliseconds of the host's for a warm call."""
    found, end = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_IN_A_ROW):
            run()
        found.append((time.perf_counter() - start) / _IN_A_ROW)
    synchronize(device)
    return 1e3 * statistics.median(found)


def ours(problem: Problem, device: torch.device) -> dict[str, Callable[[str], Attend]]:
    """flexlocal's calls by name, each for a backend."""
    batch, heads, n, d = problem.shape
    mask = torch.arange(n, device=device).expand(batch, n) < n - 100
    of_bias = heads, problem.window.size, problem.window.span
    bias = torch.randn(of_bias, device=device, dtype=torch.bfloat16)

    def by_name(of: Callable[[str], Attend]) -> Callable[[str], Attend]:
        return lambda backend: of("flex" if backend == "auto" else backend)

    def function(backend: str) -> Attend:
        return lambda q, k, v: local_attention(q, k, v, problem.window, backend=backend)

    def layer(dim: int | None = None, **more: Tensor) -> Callable[[str], Attend]:
        def made(backend: str) -> Attend:
            built = LocalAttention(**problem.arguments, dim=dim, backend=backend).to(device)
            return lambda q, k, v: built(q, k, v, **more)

        return made

    return {
        "local_attention": function,
        "LocalAttention": layer(),
        "with rotary embeddings": layer(d),
        "with a key mask": layer(mask=mask),
        "with a bias": layer(attn_bias=bias),
        "backend='flex'": by_name(function),
        "backend='flex', rotary": by_name(layer(d)),
        "backend='flex', key mask": by_name(layer(mask=mask)),
    }


def measure(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each call: why it is left out, or milliseconds by round of both passes."""
    task = Task(HOST, torch.bfloat16, device, seconds)
    tensors = task.tensors()
    made = ours(HOST, device)
    plain = made["local_attention"]("eager")
    pairs = {name: (of("auto"), of("eager")) for name, of in made.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name in OTHERS:
        reason = PEERS[name].missing()
        rows[name] = {"call": name, "reason": reason or ""}
        if reason is None:
            pairs[name] = PEERS[name].attend(HOST, device), plain
    right = {}
    for name, (attend, reference) in pairs.items():
        exact = [x.detach().float().requires_grad_() for x in tensors]
        off = errors(results(attend, tensors), results(reference, exact))
        rows[name] = {"call": name, "reason": complaint(off, task.dtype) or ""}
        if not rows[name]["reason"]:
            right[name] = attend
    for kind, of_kind in (("forward", forward_of), ("step", training_of)):
        runs = {name: of_kind(attend, tensors) for name, attend in right.items()}
        for name, rounds in in_turns(runs, task, host_ms).items():
            rows[name][kind] = rounds
    return [rows[name] for name in (*OTHERS, *made)]


def by_size(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Rows of ``SIZES`` and passes: milliseconds of both ways by round, host's and kernels'."""
    rows = []
    everywhere = {"MOST_SCORES": 2**62, "MOST_WHOLE": 2**62}
    for problem in SIZES:
        tensors = Task(problem, torch.bfloat16, device).tensors()
        attend_by = ours(problem, device)["local_attention"]
        ways = {"all pairs": attend_by("auto"), "flex": attend_by("flex")}
        with patch.multiple(dense, **everywhere):  # a choice is made once
            for of_kind in (forward_of, training_of):
                of_kind(ways["all pairs"], tensors)()
        one, other = (attend(*tensors[:3]) for attend in ways.values())
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        for kind, of_kind in (("forward", forward_of), ("step", training_of)):
            runs = {name: of_kind(attend, tensors) for name, attend in ways.items()}
            for clock, what in ((host_ms, "host"), (kernels_ms, "kernels")):
                rounds = in_turns(runs, Timing(device, seconds), clock)
                row = {"size": problem.name, "window": problem.words, "pass": kind, "of": what}
                rows.append(row | {"rounds": rounds})
    return rows


def text_by_size(rows: list[dict[str, Any]]) -> str:
    """A table of ratios: all pairs over FlexAttention's kernels."""
    lines = []
    for row in rows:
        pairs, flex = (row["rounds"][name] for name in ("all pairs", "flex"))
        us = [number(1e3 * statistics.median(each)) for each in (pairs, flex)]
        what = [row[name] for name in ("size", "window", "pass", "of")]
        lines.append([*what, *us, ratio_of_rounds(pairs, flex).words()])
    return table(["size", "window", "pass", "of", "pairs us", "flex us", "ratio"], lines)


def text(rows: list[dict[str, Any]]) -> str:
    """A table of medians and ratios."""
    base, lines, words = rows[0], [], []
    for row in rows:
        if row["reason"]:
            lines.append([row["call"], "-", "-", "-", "-"])
            words.append(f"{row['call']}: {row['reason']}")
            continue
        line = [row["call"]]
        for kind in ("forward", "step"):
            ratio = ratio_of_rounds(row[kind], base[kind]) if base.get(kind) else None
            line += [
                number(1e3 * statistics.median(row[kind])),
                "-" if ratio is None else ratio.words(),
            ]
            if ratio is not None and ratio.noisy:
                words.append(f"{TOO_NOISY} the {kind} of {row['call']}")
        lines.append(line)
    titles = ["call", "forward us", "ratio", "step us", "ratio"]
    return "\n".join([table(titles, lines), *words])


def run(seconds: float) -> tuple[dict[str, Any], int]:
    """Measures and prints; returns the record, and 1 where a result was wrong."""
    device = torch.device("cuda")
    rows = measure(device, seconds)
    record = machine.record(device, seconds=seconds) | {"calls": rows}
    print(
        f"{record['device']}, torch {torch.__version__}: the host's time for a call\n{text(rows)}"
    )
    record["sizes"] = by_size(device, seconds / 4)
    print(f"\nShort sequences by size\n{text_by_size(record['sizes'])}")
    missing = [PEERS[name].missing() for name in OTHERS]
    return record, int(any(row["reason"] and row["reason"] not in missing for row in rows))
