"""Counts what torch.compile compiles for layers of local attention, how long it takes and why.

    python -m profiling.compiles [--layers 12] [--lengths N ...] [--windows W ...] [--inside-model]

Every layer is called at every length and dtype; with several windows the layers take turns. By
default each layer compiles its own kernels, with ``--inside-model`` one ``torch.compile`` holds
them all. On a GPU a call is a step of training, on the CPU a call without gradients. Compiled
graphs that torch finds on the disk from earlier runs are counted apart; ``--cold`` ignores them.
"""

import argparse
import json
import logging
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flexlocal import LocalAttention

from . import machine
from .clock import first_call
from .options import DTYPES, count, file_to_write

FIRST = "first call of its kind"
"""The cause of a compile that replaces none: new settings, dtype or device."""


@dataclass(frozen=True)
class Call:
    """One call of a layer or of a model of them.

    Attributes:
        name: which of the layers, or ``model``.
        dtype, n: of query, key and value.
        compiles: graphs that torch.compile traced during the call.
        from_disk: graphs, backward ones included, whose kernels were found on the disk.
        seconds: that it took, compilation included.
        causes: why an earlier compile did not serve, as torch says it.
    """

    name: str
    dtype: str
    n: int
    compiles: int
    from_disk: int
    seconds: float
    causes: tuple[str, ...]


class Layers(nn.Module):
    """Layers one after the other: what one gives is the next one's query."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(q, k, v)
        return q


@contextmanager
def recompile_causes() -> Iterator[list[str]]:
    """Collects the guards that fail, in torch's words, instead of printing them."""
    found: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        found.extend(guards(record.getMessage()))
        return False  # printed nowhere

    # A filter stays where it is when torch sets up its handlers anew, as it does while it loads.
    logger = logging.getLogger("torch._dynamo.guards.__recompiles")
    logger.addFilter(collect)
    torch._logging.set_logs(recompiles=True)  # documented, whatever its name looks like
    try:
        yield found
    finally:
        torch._logging.set_logs()
        logger.removeFilter(collect)


def guards(message: str) -> list[str]:
    """The failed guards of torch's message about a recompile, without the code they stand in."""
    lines = re.findall(r"^\s*- \d+/\d+: (.*?)(?:\s+# .*)?$", message, re.MULTILINE)
    return list(dict.fromkeys(lines))


def watch(
    name: str, run: Callable[[], None], dtype: str, n: int, device: torch.device, causes: list[str]
) -> Call:
    """Makes one call and counts what it compiles."""
    causes.clear()
    before = _compiles(), _from_disk()
    seconds = first_call(run, device)
    compiled, found = _compiles() - before[0], _from_disk() - before[1]
    why = tuple(dict.fromkeys(causes)) or ((FIRST,) if compiled else ())
    return Call(name, dtype, n, compiled, found, seconds, why)


def _compiles() -> int:
    return counters["stats"]["unique_graphs"]


def _from_disk() -> int:
    return counters["inductor"]["fxgraph_cache_hit"]


def layers_of(options: argparse.Namespace) -> list[LocalAttention]:
    """The layers, their windows in turn.

    Raises:
        ValueError: arguments that do not fit.
    """
    dim = options.dim if options.rotary else None
    windows = (options.windows * options.layers)[: options.layers]
    given = {"causal": True, "dropout": 0.0, "autopad": True, "dim": dim, "backend": "flex"}
    return [LocalAttention(window, **given) for window in windows]


def calls(options: argparse.Namespace, device: torch.device) -> Iterator[Call]:
    """Every layer, or the model of them, at every dtype and length."""
    torch.compiler.reset()
    layers = [layer.to(device) for layer in layers_of(options)]
    called: list[tuple[str, Callable[..., Tensor]]]
    if options.inside_model:
        called = [("model", torch.compile(Layers(layers)))]
    else:
        called = [(f"layer {number}", layer) for number, layer in enumerate(layers)]
    with recompile_causes() as causes:
        for dtype in options.dtypes:
            for n in options.lengths:
                tensors = _tensors((1, options.heads, n, options.dim), DTYPES[dtype], device)
                for name, layer in called:
                    run = _step(layer, *tensors)
                    yield watch(name, run, dtype, n, device, causes)


def _tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    # FlexAttention has no backward pass on the CPU.
    wanted = device.type == "cuda"
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=wanted) for _ in range(3)]


def _step(layer: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    def run() -> None:
        if q.requires_grad:
            out = layer(q, k, v)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        else:
            with torch.no_grad():
                layer(q, k, v)

    return run


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


def main(argv: list[str] | None = None) -> list[Call]:
    """Reads the command line, calls and prints each call that compiles."""
    device = machine.default_device()
    options = parse(argv, device)
    print(f"{machine.device_name(device)}, torch {torch.__version__}")
    print(
        f"{'called':10} {'dtype':>5} {'n':>8} {'compiles':>8} {'on disk':>7} {'seconds':>8}  cause"
    )
    counters.clear()
    # Only there to be ignored where it is asked for; it is put back for what runs after.
    kept, torch.compiler.config.force_disable_caches = (
        torch.compiler.config.force_disable_caches,
        options.cold,
    )
    made = []
    try:
        for call in calls(options, device):
            made.append(call)
            if call.compiles:
                cells = f"{call.name:10} {call.dtype:>5} {call.n:8} {call.compiles:8}"
                cells += f" {call.from_disk:7} {call.seconds:8.2f}"
                print(f"{cells}  {'; '.join(call.causes)}", flush=True)
    except ValueError as wrong:  # heads too wide for a kernel, for one
        sys.exit(f"cannot be compiled: {wrong}")
    finally:
        torch.compiler.config.force_disable_caches = kept
    print(totals(made))
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = machine.record(device, **settings) | {"calls": [asdict(call) for call in made]}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return made


def parse(argv: list[str] | None, device: torch.device) -> argparse.Namespace:
    """The command line."""
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="python -m profiling.compiles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lengths = [1024, 2048, 4096, 5000, 8192] if gpu else [512, 1024, 1500]
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--windows", type=count, nargs="+", default=[256], metavar="W")
    parser.add_argument("--lengths", type=count, nargs="+", default=lengths, metavar="N")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"] if gpu else ["fp32"]
    )
    parser.add_argument("--heads", type=count, default=8)
    parser.add_argument("--dim", type=count, default=64, help="head size")
    parser.add_argument("--rotary", action="store_true")
    parser.add_argument("--inside-model", action="store_true", help="one torch.compile for all")
    parser.add_argument("--cold", action="store_true", help="ignore what earlier runs compiled")
    parser.add_argument("--json", type=file_to_write, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        layers_of(options)
    except ValueError as wrong:
        parser.error(str(wrong))
    return options


if __name__ == "__main__":
    main()
