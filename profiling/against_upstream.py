"""flexlocal against PyPI's local-attention, on the CPU and, where there is one, a CUDA GPU.

    python profiling/against_upstream.py [--json FILE]

after the installation of the README. Results are compared before anything is timed: against
upstream in double precision, flexlocal may err no more than upstream does, with some slack. The
contestants take turns, and the table shows medians in milliseconds; other work on the machine
distorts them.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import flexlocal

try:
    import local_attention as upstream
except ImportError:
    sys.exit('local-attention is not installed: pip install -e ".[test]" -c constraints.txt')

Mode = Callable[[nn.Module, list[Tensor]], list[Tensor]]
SLACK = 4.0  # times upstream's own rounding error


@dataclass(frozen=True)
class Problem:
    """What is computed; shapes are ``(batch, heads, length, dim)``."""

    batch: int = 1
    heads: int = 8
    length: int = 4096
    dim: int = 64
    window: int = 128
    causal: bool = True
    rotary: bool = False
    dtype: str = "float32"

    def layer(self, kind: type[nn.Module]) -> nn.Module:
        """The layer of one of the two packages: they take the same arguments."""
        return kind(
            self.window,
            causal=self.causal,
            dropout=0.0,
            dim=self.dim if self.rotary else None,
        )

    def tensors(self, device: str) -> list[Tensor]:
        """q, k, v and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.heads, self.length, self.dim)
        numbers = [torch.randn(shape, generator=generator) for _ in range(4)]
        return [x.to(device, getattr(torch, self.dtype)) for x in numbers]


def forward(layer: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """The result, without gradients."""
    with torch.no_grad():
        return [layer(*tensors[:3])]


def both(layer: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = layer(*leaves)
    return [out, *torch.autograd.grad(out, leaves, tensors[3])]


MODES = {"forward": forward, "forward + backward": both}


def check(contestants: dict[str, nn.Module], tensors: list[Tensor]) -> None:
    """End the program when flexlocal's result or a gradient errs more than upstream's."""
    truth = both(contestants["local-attention"].double(), [x.double() for x in tensors])
    theirs = both(contestants["local-attention"].float(), tensors)
    ours = both(contestants["flexlocal"], tensors)
    for name, true, other, own in zip(("out", "q", "k", "v"), truth, theirs, ours, strict=True):
        budget = SLACK * (other - true).abs().max().item()
        error = (own - true).abs().max().item()
        if not error <= budget:
            sys.exit(f"not timed, {name} is wrong: off by {error:.1e}, {budget:.1e} is allowed")


def milliseconds(mode: Mode, layer: nn.Module, tensors: list[Tensor]) -> float:
    """Wall time of one run."""
    synchronize = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    mode(layer, tensors)
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def measure(problem: Problem, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, by mode and contestant."""
    tensors = problem.tensors(device)
    kinds = {
        "local-attention": upstream.LocalAttention,
        "flexlocal": flexlocal.LocalAttention,
    }
    contestants = {name: problem.layer(kind).to(device) for name, kind in kinds.items()}
    check(contestants, tensors)
    medians = {}
    for mode, function in MODES.items():
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(-3, repeats):  # the first three warm up
            for name, layer in contestants.items():
                spent = milliseconds(function, layer, tensors)
                if turn >= 0:
                    times[name].append(spent)
        medians[mode] = {name: statistics.median(spent) for name, spent in times.items()}
    return medians


def machine(device: str) -> dict[str, str | int]:
    """What the times were taken on."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return {
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def table(medians: dict[str, dict[str, float]]) -> str:
    """The medians and how many times faster flexlocal is."""
    lines = [f"{'':20}{'local-attention':>16}{'flexlocal':>12}{'ratio':>8}"]
    for mode, row in medians.items():
        theirs, ours = row["local-attention"], row["flexlocal"]
        lines.append(f"{mode:20}{theirs:13.2f} ms{ours:9.2f} ms{theirs / ours:7.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure on every device and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Problem()
    for name in ("batch", "heads", "length", "dim", "window"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--bidirectional", dest="causal", action="store_false")
    parser.add_argument("--rotary", action="store_true", help="with rotary embeddings")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns of each contestant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = vars(parser.parse_args())
    repeats, file = options.pop("repeats"), options.pop("json")
    if repeats < 1:
        parser.error(f"argument --repeats: must be at least 1, got {repeats}")
    problem = Problem(**options)
    if problem.rotary and problem.dtype != "float32":
        parser.error("argument --rotary: local-attention takes float32 only with it")

    versions = {name: version(name) for name in ("torch", "local-attention")}
    results = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        medians = measure(problem, device, repeats)
        results.append({"machine": machine(device), "milliseconds": medians})
        print(f"{device}: {problem}, torch {versions['torch']}, medians of {repeats}")
        print(table(medians), flush=True)
    if file:
        record = {
            "problem": asdict(problem),
            "repeats": repeats,
            "versions": versions,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "results": results,
        }
        file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
