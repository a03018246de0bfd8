"""Traces the layer under torch.profiler: where time and memory go.

    python -m profiling.trace [--problem NAME] [--rotary] [--forward-only] [--out DIR]

writes a folder for TensorBoard's profiler plugin. The trace in it is a Chrome trace as well, which
https://ui.perfetto.dev opens; the labels ``flexlocal::...`` in it are the layer's own steps. Both
draw the bytes allocated over time. Compilation happens before the trace begins.
"""

import argparse
import gc
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from flexlocal.regions import labelled

from .machine import default_device, device_name
from .options import add_layer, add_problem, count, dtype_of, layer_of, problems_of, reader
from .problems import Problem
from .terminal import table
from .timing import synchronize

WARM_UP = 3
"""Steps before the trace: they compile, and make what is made once."""

STEP = "ProfilerStep#"
"""What the labels of whole steps begin with; TensorBoard's plugin counts steps by this name."""


@dataclass(frozen=True)
class Row:
    """Kernels, operators or labels of one name: how many, and microseconds of all of them."""

    name: str
    calls: int
    time: float


@dataclass(frozen=True)
class Memory:
    """Bytes allocated on a device: ``held[i]`` from ``times[i]`` on; the first is the start."""

    times: list[float]
    held: list[int]

    @property
    def peak(self) -> int:
        """Most bytes above what was held at the start."""
        return max(self.held) - self.held[0]

    @property
    def growth(self) -> int:
        """Bytes held at the end above the start."""
        return self.held[-1] - self.held[0]


def memory_of(file: Path) -> dict[str, Memory]:
    """Memory over time by device, ``cpu`` or ``cuda:0``, from a Chrome trace, gzip or not.

    Times are microseconds since the first event on the host.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    found: dict[str, Memory] = {}
    start = min(e["ts"] for e in events if e.get("cat") in ("cpu_op", "user_annotation"))
    changes = [event for event in events if event["name"] == "[memory]"]
    for event in sorted(changes, key=lambda event: event["ts"]):
        facts = event["args"]
        device = "cpu" if facts["Device Type"] == 0 else f"cuda:{facts['Device Id']}"
        # Not the sum of what each event says: the profiler misses what the backward pass's
        # thread frees after it is done, but the next event tells what is held since.
        held = facts["Total Allocated"]
        line = found.setdefault(device, Memory([0.0], [held - facts["Bytes"]]))
        line.times.append(event["ts"] - start)
        line.held.append(held)
    return found


@dataclass(frozen=True)
class Traced:
    """The file of a trace, and what the profiler says of it.

    ``wall`` is all steps' microseconds; a label's time is all that passed in it. ``rows`` are own
    times of kernels, or of operators and labels where no kernel ran, longest first.
    """

    file: Path
    steps: int
    wall: float
    labels: list[Row]
    rows: list[Row]
    memory: dict[str, Memory]


def layer_step(
    problem: Problem, options: argparse.Namespace, device: torch.device
) -> Callable[[], object]:
    """One call of the layer, and its backward pass unless only the forward one is wanted.

    It returns the tensors that it made.
    """
    layer = layer_of(problem, options).to(device)
    q, k, v, grad = problem.tensors(dtype_of(options, device), device)

    def step() -> object:
        with record_function("forward"):
            out = layer(q, k, v)
        if options.forward_only:
            return out
        with record_function("backward"):
            return torch.autograd.grad(out, (q, k, v), grad)

    return step


def record(
    step: Callable[[], object], device: torch.device, folder: Path, steps: int, gzip: bool
) -> Traced:
    """Runs ``steps`` steps under the profiler, after others that it does not see."""
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    gc.collect()  # else what compiling left in cycles may be freed in the trace, as if a step did
    before = set(folder.glob("*"))
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    profiler = profile(
        activities=[ProfilerActivity.CPU, *gpu],
        record_shapes=True,
        profile_memory=True,
        on_trace_ready=tensorboard_trace_handler(str(folder), use_gzip=gzip),
    )
    with labelled(), profiler:
        for number in range(steps):
            with record_function(f"{STEP}{number}"):
                made = step()
                synchronize(device)
                # By now the backward pass's thread has mostly let go of them: the profiler does not
                # see what that thread frees after it is done.
                del made
    (file,) = set(folder.glob("*.pt.trace.json*")) - before
    averages = profiler.key_averages()
    marked = [each for each in averages if each.is_user_annotation and each.cpu_time_total]
    labels = [Row(each.key, each.count, each.cpu_time_total) for each in marked]
    (wall,) = (label.time for label in labels if label.name.startswith(STEP[:-1]))
    kernels = [
        Row(each.key, each.count, each.self_device_time_total)
        for each in averages
        if each.device_type != DeviceType.CPU and not each.is_user_annotation
    ]
    operators = [Row(each.key, each.count, each.self_cpu_time_total) for each in averages]
    rows = sorted(kernels or operators, key=lambda row: -row.time)
    return Traced(file, steps, wall, labels, rows, memory_of(file))


def summary(traced: Traced, top: int) -> str:
    """Where the time of a step went, by label and by kernel or operator, and the memory's peak."""
    every = sum(row.time for row in traced.rows)

    def lines(rows: Sequence[Row], all_of_it: float) -> list[list[str]]:
        return [
            [row.name[:80], f"{row.time / traced.steps / 1e3:.3f}", f"{row.time / all_of_it:.1%}"]
            + [f"{row.calls / traced.steps:g}"]
            for row in rows
        ]

    columns = "ms a step", "share", "calls"
    labels = lines(traced.labels, traced.wall)
    texts = [table(("label, on the host", *columns), labels)]
    texts.append(table(("own time", *columns), lines(traced.rows[:top], every)))
    for device, memory in traced.memory.items():
        time = memory.times[memory.held.index(max(memory.held))] / 1e3
        texts.append(
            f"memory on {device}: at most {memory.peak / 1e6:.2f} MB above the start, at "
            f"{time:.2f} ms;\n{memory.growth / 1e6:+.2f} MB at the end"
        )
    return "\n\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> Traced:
    """Reads the command line, traces, writes and prints."""
    device = default_device()
    parser = reader("trace", __doc__)
    add_problem(parser)
    add_layer(parser)
    parser.add_argument("--forward-only", action="store_true", help="without gradients")
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--top", type=count, default=15, help="kernels or operators to print")
    parser.add_argument("--gzip", action="store_true", help="compress the trace")
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    options = parser.parse_args(arguments)
    default = "slide256" if device.type == "cuda" else "cpu"
    if options.out.is_file():
        parser.error(f"argument --out: must be a folder, got the file {options.out}")
    (problem,) = problems_of(parser, options, [default])
    step = layer_step(problem, options, device)
    words = [name for name in ("rotary", "xpos", "dropout") if getattr(options, name)]
    words += ["forward"] * options.forward_only
    words += [options.backend] * (options.backend != "auto")
    folder = options.out / "-".join([problem.name, *words])  # the run's name in TensorBoard
    try:
        with torch.set_grad_enabled(not options.forward_only):
            traced = record(step, device, folder, options.steps, options.gzip)
    except ValueError as wrong:  # flex on a CPU, for one
        sys.exit(f"cannot be traced: {wrong}")
    unit = "kernels" if device.type == "cuda" else "operators; a label's own time is Python's"
    print(f"{problem.label}, {dtype_of(options, device)}\n{problem.window}")
    print(f"{device_name(device)}, torch {torch.__version__}; {unit}\n")
    print(summary(traced, options.top))
    print(f"\n{traced.file}\n    open it in https://ui.perfetto.dev, or in TensorBoard:")
    print(f"    tensorboard --logdir {options.out}   # its pages load Google Charts")
    return traced


if __name__ == "__main__":
    main()
