"""Counts what torch.compile compiles for layers of local attention, how long it takes and why.

    python -m profiling.compiles [--layers 12] [--lengths N ...] [--windows W ...] [--inside-model]

Every layer is called at every length and dtype; with several windows the layers take turns. By
default each layer compiles its own kernels, with ``--inside-model`` one ``torch.compile`` holds
them all. On a GPU a call is a step of training, on the CPU a call without gradients. Compiled
graphs that torch finds on the disk from earlier runs are counted apart;
TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 has it look for none.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from flexlocal import LocalAttention

from . import machine
from .options import DTYPES, add_output, count, reader
from .terminal import Bar, paragraph, table
from .timing import Run, first_call

FIRST = "first call of its kind"
"""The cause of a compile that replaces none: new settings, dtype or device."""


@dataclass(frozen=True)
class Call:
    """A call of a layer or of a model of them: graphs that it compiled, and found on the disk.

    ``seconds`` are all that it took, ``causes`` why no earlier compile served, in torch's words.
    """

    name: str
    dtype: str
    n: int
    compiles: int
    from_disk: int
    seconds: float
    causes: list[str]


def watch(name: str, run: Run, dtype: str, n: int, device: torch.device) -> Call:
    """Makes one call and counts what it compiles."""
    clear_compilation_metrics()
    stats, disk = counters["stats"], counters["inductor"]
    before = stats["unique_graphs"], disk["fxgraph_cache_hit"]
    seconds = first_call(run, device)
    compiled, found = stats["unique_graphs"] - before[0], disk["fxgraph_cache_hit"] - before[1]
    reasons = [metrics.recompile_reason for metrics in get_compilation_metrics()]
    # Without the place of the compile that did not serve.
    causes = list(dict.fromkeys(reason.split(": ", 1)[1] for reason in reasons if reason))
    return Call(name, dtype, n, compiled, found, seconds, causes or [FIRST] * (compiled > 0))


def layers_of(options: argparse.Namespace) -> list[LocalAttention]:
    """The layers, their windows in turn; a ValueError where arguments do not fit."""
    dim = options.dim if options.rotary else None
    windows = (options.windows * options.layers)[: options.layers]
    given = {"causal": True, "dropout": 0.0, "autopad": True, "dim": dim, "backend": "flex"}
    return [LocalAttention(window, **given) for window in windows]


def calls(options: argparse.Namespace, device: torch.device) -> Iterator[Call]:
    """Every layer, or the model of them, at every dtype and length."""
    torch.compiler.reset()
    layers = [layer.to(device) for layer in layers_of(options)]
    called: dict[str, Callable[..., Tensor]]
    called = {f"layer {number}": layer for number, layer in enumerate(layers)}
    if options.inside_model:

        @torch.compile
        def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in layers:  # what one gives is the next one's query
                q = layer(q, k, v)
            return q

        called = {"model": model}
    for dtype in options.dtypes:
        for n in options.lengths:
            shape, wanted = (1, options.heads, n, options.dim), device.type == "cuda"
            draw = {"dtype": DTYPES[dtype], "device": device, "requires_grad": wanted}
            tensors = [torch.randn(shape, **draw) for _ in range(3)]
            for name, layer in called.items():
                yield watch(name, partial(_step, layer, tensors), dtype, n, device)


def _step(layer: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    with torch.set_grad_enabled(tensors[0].requires_grad):  # no backward pass on the CPU
        out = layer(*tensors)
    if out.requires_grad:
        torch.autograd.grad(out, tensors, torch.ones_like(out))


def totals(made: Sequence[Call]) -> str:
    """All the calls in a few words."""
    slow = [call for call in made if call.compiles]
    quick = [1e3 * call.seconds for call in made if not call.compiles]
    words = (
        f"{len(made)} calls, of which {len(slow)} compiled {sum(c.compiles for c in slow)} graphs "
        f"in {sum(c.seconds for c in slow):.1f} s; {sum(c.from_disk for c in slow)} found on disk"
    )
    if quick:
        words += f"; the other calls took {statistics.median(quick):.3g} ms in the median"
    breaks = sum(counters["graph_break"].values())
    return words + (f"; {breaks} graph breaks" if breaks else "")


def main(arguments: Sequence[str] | None = None) -> list[Call]:
    """Reads the command line, calls and prints each call that compiles."""
    device = machine.default_device()
    options = parse(arguments, device)
    print(f"{machine.device_name(device)}, torch {torch.__version__}\n")
    counters.clear()
    made: list[Call] = []
    layers = 1 if options.inside_model else options.layers
    try:
        with Bar(layers * len(options.dtypes) * len(options.lengths)) as bar:
            for call in calls(options, device):
                made.append(call)
                bar.show(f"{call.name}, {call.dtype}, {call.n} tokens")
                bar.advance()
    except ValueError as wrong:  # heads too wide for a kernel, for one
        sys.exit(f"cannot be compiled: {wrong}")
    titles = ["called", "dtype", "n", "compiles", "on disk", "seconds", "cause"]
    lines = [
        [call.name, call.dtype, *map(str, (call.n, call.compiles, call.from_disk))]
        + [f"{call.seconds:.2f}", "; ".join(call.causes)]
        for call in made
        if call.compiles
    ]
    print(table(titles, lines, ["cause"]))
    print(f"\n{paragraph(totals(made))}")
    settings = {name: str(value) for name, value in vars(options).items()}
    record = machine.record(device, **settings) | {"calls": [asdict(call) for call in made]}
    machine.write(record, options.json)
    return made


def parse(arguments: Sequence[str] | None, device: torch.device) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    gpu = device.type == "cuda"
    parser = reader("compiles", __doc__)
    lengths = [1024, 2048, 4096, 5000, 8192] if gpu else [512, 1024, 1500]
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--windows", type=count, nargs="+", default=[256], metavar="W")
    parser.add_argument("--lengths", type=count, nargs="+", default=lengths, metavar="N")
    dtypes = ["bf16", "fp32"] if gpu else ["fp32"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes)
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--dim", type=count, default=64, help="head size")
    parser.add_argument("--rotary", action="store_true")
    parser.add_argument("--inside-model", action="store_true", help="one torch.compile for all")
    add_output(parser)
    options = parser.parse_args(arguments)
    try:
        layers_of(options)
    except ValueError as wrong:
        parser.error(str(wrong))
    return options


if __name__ == "__main__":
    main()
