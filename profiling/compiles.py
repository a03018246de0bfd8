"""Counts what torch.compile compiles for layers of local attention, how long it takes and why.

    python -m profiling.compiles [--layers 12] [--lengths N ...] [--windows W ...] [--inside-model]

Every layer is called at every length; with several windows the layers take turns. By default each
layer compiles its own kernels, with ``--inside-model`` one ``torch.compile`` holds them all. On a
GPU a call is a step of training, in bf16 and in fp32, on the CPU a call without gradients in fp32.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from flexlocal import LocalAttention, Window

from . import machine
from .options import DTYPES, count, file_to_write, reader
from .peers import forward_of, training_of
from .problems import Problem, Task
from .terminal import table, watched
from .timing import Run, first_call

HEAD_SIZE = 64
FIRST = "first call of its kind"  # new settings, dtype or device

Call = dict[str, Any]
"""A call's ``name``, ``dtype`` and ``n``, how many graphs it ``compiles``, all the ``seconds`` that
it took, and ``causes``: why no earlier compile served, in torch's words."""


def watch(run: Run, device: torch.device) -> Call:
    """Makes one call and counts what it compiles."""
    clear_compilation_metrics()
    before = counters["stats"]["unique_graphs"]
    seconds = first_call(run, device)
    compiled = counters["stats"]["unique_graphs"] - before
    reasons = [metrics.recompile_reason for metrics in get_compilation_metrics()]
    # Without the place of the compile that did not serve.
    causes = list(dict.fromkeys(reason.split(": ", 1)[1] for reason in reasons if reason))
    causes = causes or [FIRST] * (compiled > 0)
    return {"compiles": compiled, "seconds": seconds, "causes": causes}


def layers_of(options: argparse.Namespace) -> list[LocalAttention]:
    """The layers, their windows in turn."""
    windows = (options.windows * options.layers)[: options.layers]
    given = {"causal": True, "dropout": 0.0, "autopad": True, "backend": "flex"}
    dim = HEAD_SIZE if options.rotary else None
    return [LocalAttention(window, **given, dim=dim) for window in windows]


def calls(options: argparse.Namespace, device: torch.device) -> Iterator[Call]:
    """Every layer, or the model of them, at every dtype and length."""
    torch.compiler.reset()
    layers = [layer.to(device) for layer in layers_of(options)]
    called: dict[str, Callable[..., Tensor]] = {
        f"layer {number}": layer for number, layer in enumerate(layers)
    }
    if options.inside_model:

        @torch.compile
        def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in layers:  # what one gives is the next one's query
                q = layer(q, k, v)
            return q

        called = {"model": model}
    dtypes = ["bf16", "fp32"] if device.type == "cuda" else ["fp32"]
    every = [(dtype, n) for dtype in dtypes for n in options.lengths]
    for dtype, n in watched(every, len(every), "lengths"):
        problem = Problem("", 1, 8, n, HEAD_SIZE, Window(1))
        tensors = Task(problem, DTYPES[dtype], device).tensors()
        made = training_of if device.type == "cuda" else forward_of  # no backward pass on the CPU
        for name, layer in called.items():
            yield {"name": name, "dtype": dtype, "n": n} | watch(made(layer, tensors), device)


def text(made: Sequence[Call]) -> str:
    """The calls that compiled, and all of them in a few words."""
    slow = [call for call in made if call["compiles"]]
    quick = [1e3 * call["seconds"] for call in made if not call["compiles"]]
    lines = [
        [*(str(call[name]) for name in ("name", "dtype", "n", "compiles"))]
        + [f"{call['seconds']:.2f}", "; ".join(call["causes"])]
        for call in slow
    ]
    titles = ["called", "dtype", "n", "compiles", "seconds", "cause"]
    graphs, seconds = (sum(call[name] for call in slow) for name in ("compiles", "seconds"))
    words = f"{len(made)} calls, of which {len(slow)} compiled {graphs} graphs in {seconds:.1f} s"
    if quick:
        words += f"; the other calls took {statistics.median(quick):.3g} ms in the median"
    breaks = sum(counters["graph_break"].values())
    return f"{table(titles, lines, ['cause'])}\n\n{words}; {breaks} graph breaks"


def main(arguments: Sequence[str] | None = None) -> list[Call]:
    """Reads the command line, calls and prints each call that compiles."""
    device = machine.default_device()
    parser = reader("compiles", __doc__)
    lengths = [1024, 2048, 5000, 8192] if device.type == "cuda" else [512, 1024, 1500]
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--windows", type=count, nargs="+", default=[256], metavar="W")
    parser.add_argument("--lengths", type=count, nargs="+", default=lengths, metavar="N")
    parser.add_argument("--rotary", action="store_true")
    parser.add_argument("--inside-model", action="store_true", help="one torch.compile for all")
    parser.add_argument("--json", type=file_to_write, metavar="FILE")
    options = parser.parse_args(arguments)
    print(f"{machine.device_name(device)}, torch {torch.__version__}\n")
    counters.clear()
    made = list(calls(options, device))
    print(text(made))
    settings = {name: str(value) for name, value in vars(options).items()}
    machine.write(machine.record(device, **settings) | {"calls": made}, options.json)
    return made


if __name__ == "__main__":
    # What an earlier run left on the disk would not be compiled again.
    torch.compiler.config.force_disable_caches = True
    main()
