"""Traces the layer, or a small model with it, under torch.profiler: where time and memory go.

    python -m profiling.trace [--problem NAME] [--rotary] [--model] [--forward-only] [--out DIR]

writes a folder for TensorBoard's profiler plugin. The trace in it is a Chrome trace as well, which
https://ui.perfetto.dev opens; the labels ``flexlocal::...`` in it are the layer's own steps. Beside
it lie the bytes allocated over time, as a table and, with matplotlib, as a picture. Compilation
happens before the trace begins.
"""

import argparse
import csv
import gc
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from flexlocal.regions import labelled

from .chrome import STEP, Memory, Row, Trace
from .clock import synchronize
from .machine import default_device, device_name
from .model import VOCABULARY, Model, loss
from .options import (
    add_layer,
    add_problem,
    count,
    dtype_of,
    folder_to_write,
    layer_of,
    problem_that_fits,
)
from .problems import PROBLEMS, Problem

WARM_UP = 3
"""Steps before the trace: they compile, and make what is made once, as an optimizer's state."""


@dataclass(frozen=True)
class Traced:
    """The file of one trace, and what was read from it; ``wall`` is all steps' microseconds."""

    file: Path
    steps: int
    wall: float
    rows: list[Row]
    memory: dict[str, Memory]


Step = Callable[[], object]
"""One step; returns the tensors that it made and nobody else holds."""


def layer_step(problem: Problem, options: argparse.Namespace, device: torch.device) -> Step:
    """One call of the layer, and its backward pass unless only the forward one is wanted."""
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


def model_step(problem: Problem, options: argparse.Namespace, device: torch.device) -> Step:
    """One step of training of a small language model, or only its forward pass."""
    model: nn.Module = Model(problem.heads, problem.d, lambda: layer_of(problem, options))
    model.to(device, dtype_of(options, device))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCABULARY, (problem.batch, problem.n), device=device)

    def step() -> None:
        with record_function("forward"):
            found = loss(model, tokens)
        if options.forward_only:
            return
        with record_function("backward"):
            found.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def record(step: Step, device: torch.device, folder: Path, steps: int, gzip: bool) -> Traced:
    """Runs ``steps`` steps under the profiler, after others that it does not see."""
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    gc.collect()  # else what compiling left in cycles may be freed in the trace, as if a step did
    before = set(folder.glob("*"))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(
        activities=activities,
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
    trace = Trace(file)
    wall = sum(step.duration for step in trace.steps)
    return Traced(file, steps, wall, trace.own_times(), trace.memory())


def write_memory(traced: Traced) -> list[Path]:
    """Writes the memory timeline beside the trace, and a picture of it where it can be drawn."""
    stem = traced.file.name.split(".pt.trace")[0]
    table = traced.file.with_name(f"{stem}.memory.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("device", "microseconds", "bytes"))
        for device, memory in traced.memory.items():
            lines = zip(memory.times, memory.held, strict=True)
            writer.writerows((device, round(time, 3), held) for time, held in lines)
    if find_spec("matplotlib") is None:
        return [table]
    picture = table.with_suffix(".png")
    draw_memory(traced.memory, picture)
    return [table, picture]


def draw_memory(lines: dict[str, Memory], file: Path) -> None:
    """Draws bytes above the start against time, one plot for each device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 2.5 * len(lines)), layout="constrained")
    plots = figure.subplots(len(lines), squeeze=False)[:, 0]
    for plot, (device, memory) in zip(plots, lines.items(), strict=True):
        times = [time / 1e3 for time in memory.times]
        held = [(bytes_held - memory.held[0]) / 1e6 for bytes_held in memory.held]
        plot.fill_between(times, held, step="post", alpha=0.4)
        plot.step(times, held, where="post", linewidth=0.8)
        plot.set(title=device, xlabel="ms", ylabel="MB above the start")
    figure.savefig(file, dpi=120)


def summary(traced: Traced, top: int) -> str:
    """Where the time of a step went, by part and by kernel or operator, and the memory's peak."""
    every = sum(row.own for row in traced.rows)

    def cells(own: float) -> str:
        return f"{own / traced.steps / 1e3:10.3f} {own / every:7.1%}"

    parts: dict[tuple[str, str], float] = defaultdict(float)
    for row in traced.rows:
        parts[row.phase, row.part] += row.own
    listed, wall = (time / traced.steps / 1e3 for time in (every, traced.wall))
    lines = [f"a step takes {wall:.3f} ms; the lines below add up to {listed:.3f} ms\n"]
    lines += [f"{'ms a step':>10} {'share':>7}  {'phase':10} part"]
    for (phase, part), own in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"{cells(own)}  {phase:10} {part}")
    lines.append(f"\n{'own ms':>10} {'share':>7} {'calls':>6}  {'phase':10} {'part':18} name")
    for row in traced.rows[:top]:
        calls = f"{row.calls / traced.steps:6g}"
        lines.append(f"{cells(row.own)} {calls}  {row.phase:10} {row.part:18} {row.name[:80]}")
    lines.append("")
    for device, memory in traced.memory.items():
        time = memory.times[memory.held.index(max(memory.held))] / 1e3
        lines.append(
            f"memory on {device}: at most {memory.peak / 1e6:.2f} MB above the start, at "
            f"{time:.2f} ms; {memory.growth / 1e6:+.2f} MB at the end"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> Traced:
    """Reads the command line, traces, writes and prints."""
    device = default_device()
    options, problem = parse(argv, PROBLEMS["slide256" if device.type == "cuda" else "cpu"])
    step = (model_step if options.model else layer_step)(problem, options, device)
    folder = options.out / label(problem, options)
    try:
        with torch.set_grad_enabled(not options.forward_only):
            traced = record(step, device, folder, options.steps, options.gzip)
    except ValueError as wrong:  # flex on a CPU, for one
        sys.exit(f"cannot be traced: {wrong}")
    written = write_memory(traced)
    unit = "kernels" if device.type == "cuda" else "operators; a label's own time is Python's"
    print(f"{problem.label}, {dtype_of(options, device)}\n{problem.window}")
    print(f"{device_name(device)}, torch {torch.__version__}; {unit}\n")
    print(summary(traced, options.top))
    print(f"\n{traced.file}\n    open it in https://ui.perfetto.dev, or in TensorBoard:")
    print(f"    tensorboard --logdir {options.out}   # its pages load Google Charts")
    for file in written:
        print(file)
    return traced


def label(problem: Problem, options: argparse.Namespace) -> str:
    """The run's name in TensorBoard: what was traced."""
    words = ["model"] if options.model else ["layer"]
    words += [name for name in ("rotary", "xpos", "dropout") if getattr(options, name)]
    words += ["forward"] if options.forward_only else []
    words += [options.backend] if options.backend != "auto" else []
    return "-".join([problem.name, *words])


def parse(argv: list[str] | None, default: Problem) -> tuple[argparse.Namespace, Problem]:
    """The command line, and the problem that it names; wrong arguments end the program."""
    parser = argparse.ArgumentParser(prog="python -m profiling.trace", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_problem(parser)
    add_layer(parser)
    parser.add_argument("--model", action="store_true", help="a model of two blocks, and AdamW")
    parser.add_argument("--forward-only", action="store_true", help="without gradients")
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--top", type=count, default=15, help="kernels or operators to print")
    parser.add_argument("--gzip", action="store_true", help="compress the trace")
    parser.add_argument("--out", type=folder_to_write, default=Path("traces"), metavar="DIR")
    options = parser.parse_args(argv)
    return options, problem_that_fits(parser, options, default)


if __name__ == "__main__":
    main()
