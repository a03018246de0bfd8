"""Traces the layer under torch.profiler: where time and memory go.

    python -m profiling.trace [--problem NAME] [--rotary] [--forward-only] [--out DIR]

writes a folder for TensorBoard's profiler plugin. The trace in it is a Chrome trace as well, which
https://ui.perfetto.dev opens; the labels ``flexlocal::...`` in it are the layer's own steps. Both
draw the bytes allocated over time. Compilation happens before the trace begins.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from flexlocal.regions import labelled

from .machine import default_device, device_name
from .options import count, dtype_of, layer_of, problems_of, reader
from .peers import forward_of, training_of
from .problems import Task
from .terminal import table
from .timing import memory_of, synchronize

WARM_UP = 3  # steps before the trace: they compile, and make what is made once


def own_time(average: Any) -> float:
    """Microseconds in the kernels or operators of a name."""
    on_host = average.device_type == DeviceType.CPU
    return average.self_cpu_time_total if on_host else average.self_device_time_total


def record(
    step: Callable[[], object], device: torch.device, folder: Path, steps: int
) -> tuple[Path, list[Any]]:
    """Runs ``steps`` steps under the profiler, after others that it does not see.

    The file of the trace, and the profiler's averages by name of kernels, or of operators and
    labels where no kernel ran, longest own time first.
    """
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
        on_trace_ready=tensorboard_trace_handler(str(folder)),
    )
    with labelled(), profiler:
        for number in range(steps):
            # TensorBoard's plugin counts steps by this name.
            with record_function(f"ProfilerStep#{number}"):
                made = step()
                synchronize(device)
                # By now the backward pass's thread has mostly let go of them: the profiler does not
                # see what that thread frees after it is done.
                del made
    (file,) = set(folder.glob("*.pt.trace.json")) - before
    averages = profiler.key_averages()
    on_device = [each for each in averages if each.device_type != DeviceType.CPU]
    kernels = [each for each in on_device if not each.is_user_annotation]
    return file, sorted(kernels or averages, key=own_time, reverse=True)


def summary(file: Path, rows: Sequence[Any], steps: int) -> str:
    """Where the time of a step went, by kernel or operator, and the memory's peak."""
    times = [f"{own_time(row) / steps / 1e3:.3f}" for row in rows[:15]]
    lines = [[r.key[:80], ms, f"{r.count / steps:g}"] for r, ms in zip(rows, times, strict=False)]
    parts = [table(["own time", "ms a step", "calls"], lines)]
    for device, held in memory_of(file).items():
        peak, end = (1e-6 * (value - held[0]) for value in (max(held), held[-1]))
        parts.append(f"memory on {device}: at most {peak:.2f} MB above the start, {end:+.2f} after")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> tuple[Path, list[Any]]:
    """Reads the command line, traces, writes and prints."""
    device = default_device()
    parser = reader("trace", __doc__, "one", layer=True)
    parser.add_argument("--forward-only", action="store_true", help="without gradients")
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.out.is_file():
        parser.error(f"argument --out: must be a folder, got the file {options.out}")
    (problem,) = problems_of(parser, options, ["slide256" if device.type == "cuda" else "cpu"])
    flags = ("rotary", "xpos", "dropout", "forward_only")
    words = [name for name in flags if getattr(options, name)]
    words += [options.backend] * (options.backend != "auto")
    folder = options.out / "-".join([problem.name, *words])  # the run's name in TensorBoard
    dtype, layer = dtype_of(options, device), layer_of(problem, options).to(device)
    tensors = Task(problem, dtype, device).tensors()
    step = (forward_of if options.forward_only else training_of)(layer, tensors)
    try:
        file, rows = record(step, device, folder, options.steps)
    except ValueError as wrong:  # flex on a CPU, for one
        sys.exit(f"cannot be traced: {wrong}")
    print(f"{device_name(device)}, torch {torch.__version__}, {problem.label}, {dtype}")
    print(f"{problem.window}\n\n{summary(file, rows, options.steps)}")
    print(f"\n{file}\n    open it in https://ui.perfetto.dev, or in TensorBoard:")
    print(f"    tensorboard --logdir {options.out}   # its pages load Google Charts")
    return file, rows


if __name__ == "__main__":
    main()
