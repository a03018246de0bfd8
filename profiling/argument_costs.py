"""What each argument of the layer costs: time of a call with it, over a call without.

    python profiling/argument_costs.py [--length 16384] [--json FILE]

By default on a GPU, bf16, 4 x 16 x 16384 x 64 with 256 keys back (exact, causal); on the CPU in
fp32 and much smaller. The default path's result is compared with the eager path's before it is
timed. Times are medians in milliseconds; peak is what a training step holds at most.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from flexlocal import Window, local_attention
from flexlocal.rotary import Rotary

MOST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Norm of the difference over the norm; fp32 allows for TF32."""


def calls(window: Window, batch: int, heads: int, n: int, d: int, x: Tensor) -> dict[str, Any]:
    """The arguments of each call, by name; like ``x`` in dtype and device."""
    keep = torch.ones(batch, n, dtype=torch.bool, device=x.device)
    keep[:, -(n // 100) - 1 :] = False
    half = keep.clone()
    half[:, n // 2 :] = False
    bias = torch.randn(heads, window.size, window.span, dtype=x.dtype, device=x.device)
    return {
        "plain": {},
        "rotary": {"rotary": Rotary(d).to(x.device)},
        "xpos": {"rotary": Rotary(d, True, window.size // 2).to(x.device)},
        "shared_qk": {"shared_qk": True},
        "key mask, 1 % hidden": {"mask": keep},
        "key mask, half hidden": {"mask": half},
        "bias, fixed": {"attn_bias": bias},
        "bias, learned": {"attn_bias": bias.clone().requires_grad_()},
        "dropout": {"dropout": 0.1, "dropout_seed": torch.tensor(0, device=x.device)},
    }


def check(attend: Callable[..., Tensor], dtype: torch.dtype, name: str) -> None:
    """End the program where the default path differs from the eager one."""
    with torch.no_grad():
        ours, eager = attend(), attend(backend="eager")
    error = ((ours - eager).float().norm() / eager.float().norm()).item()
    if not error < MOST_ERROR[dtype]:
        sys.exit(f"not timed, {name} is wrong: off by {error:.1e}")


def measure(
    shape: tuple[int, int, int, int], size: int, device: str
) -> dict[str, dict[str, float]]:
    """Forward and training time in ms, and peak GB on a GPU, by name of the call."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    window = Window(size, causal=True, exact=True)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    rows = {}
    for name, arguments in calls(window, *shape, q).items():
        learned = [q, k, v]
        if name == "bias, learned":
            learned.append(arguments["attn_bias"])

        def attend(arguments: Any = arguments, **more: Any) -> Tensor:
            return local_attention(q, k, v, window, **arguments, **more)

        def train(attend: Any = attend, learned: Any = learned) -> None:
            torch.autograd.grad(attend(), learned, grad)

        check(attend, dtype, name)
        row = {}
        for kind, run in (("forward", torch.no_grad()(attend)), ("train", train)):
            run()
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            row[kind] = 1e3 * timer.blocked_autorange(min_run_time=0.3).median
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            train()
            row["peak"] = torch.cuda.max_memory_allocated() / 1e9
        rows[name] = row
        plain = rows["plain"]
        ratios = "  ".join(
            f"{row[kind]:9.3f} ms {row[kind] / plain[kind]:5.2f}x" for kind in ("forward", "train")
        )
        peak = f"  {row['peak']:.2f} GB" if "peak" in row else ""
        print(f"{name:24}{ratios}{peak}", flush=True)
    return rows


def main() -> None:
    """Read the command line, measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = (4, 16, 16384, 64, 256) if gpu else (1, 4, 2048, 64, 128)
    for name, default in zip(("batch", "heads", "length", "dim", "window"), defaults, strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    device = "cuda" if gpu else "cpu"
    shape = (options.batch, options.heads, options.length, options.dim)
    machine = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {shape}, window {options.window}")
    rows = measure(shape, options.window, device)
    if options.json:
        record = {
            "device": machine,
            "torch": torch.__version__,
            "shape": shape,
            "window": options.window,
            "milliseconds": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
