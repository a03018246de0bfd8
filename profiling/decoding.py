"""What a token costs while a text is written: a step with ``LocalCache`` and with other caches.

    python -m profiling.decoding [--batch 32] [--window 4096] [--prompt 65536] [--json FILE]

A step appends one token to a full cache and attends. All caches hold the same tokens, and their
outputs are compared before anything is timed. On a GPU each step is also timed inside a CUDA graph,
where the host does not count, and so is a copy of keys and values: to read them once, which is the
floor, takes half of that.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalCache, Window, local_attention

from . import machine
from .options import count
from .terminal import number, table
from .timing import ROUNDS, Timing, in_turns, median_ms, ratio_of_rounds

SECONDS = 0.06 * ROUNDS  # of timed calls, each

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""One new token's q, k and v, ``(batch, heads, 1, d)``, to its output."""


def by_hand(k: Tensor, v: Tensor) -> Step:
    """Concatenate, slice, and torch's attention: what is written without a library."""
    held, window = [k, v], k.shape[2]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held[0] = torch.cat((held[0], k), dim=2)[:, :, -window:]
        held[1] = torch.cat((held[1], v), dim=2)[:, :, -window:]
        return F.scaled_dot_product_attention(q, *held, enable_gqa=q.shape[1] != k.shape[1])

    return step


def of_transformers(k: Tensor, v: Tensor, kind: str) -> Step:
    """Transformers' sliding caches with its own attention over torch's."""
    from transformers import cache_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = k.shape[2]
    if kind == "dynamic":
        cache: Any = cache_utils.DynamicSlidingWindowLayer(sliding_window=window)
    else:
        cache = cache_utils.StaticSlidingWindowLayer(2 * window, window)
    place = {"cache_position": torch.arange(window, device=k.device)}
    cache.update(k, v, place)
    module = torch.nn.Module()
    module.is_causal = False

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.num_key_value_groups = q.shape[1] // k.shape[1]
        held = cache.update(k, v, {"cache_position": place["cache_position"][-1:] + 1})
        mask = None
        if kind == "static":  # which always has one
            mask = torch.ones(1, 1, 1, window, dtype=torch.bool, device=k.device)
        return sdpa_attention_forward(module, q, *held, mask)[0].transpose(1, 2)

    return step


def ours(k: Tensor, v: Tensor, compiled: bool = False) -> Step:
    """A step with a ``LocalCache``."""
    batch, heads, tokens, d = k.shape
    window = Window.sliding(tokens)
    cache = LocalCache(window, batch, heads, d, dtype=k.dtype, device=k.device)
    cache.extend(k, v, tokens)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, window, cache=cache)

    return torch.compile(step, fullgraph=True) if compiled else step


def steps_of(k: Tensor, v: Tensor) -> dict[str, Step]:
    """Every cache, filled with ``k`` and ``v``."""
    made = {"flexlocal": ours(k, v), "by hand": by_hand(k, v)}
    if k.device.type == "cuda":
        made["flexlocal, compiled"] = ours(k, v, compiled=True)
    try:
        for kind in ("dynamic", "static"):
            made[f"Transformers, {kind}"] = of_transformers(k, v, kind)
    except ImportError:
        print("Transformers is not installed, and not compared with")
    return made


def in_a_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Replays of ``run``, captured in a CUDA graph."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """By name: milliseconds of a step by round, ``captured`` inside a CUDA graph."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch, heads, d, tokens = options.batch, options.heads, options.head_size, options.window
    torch.manual_seed(0)

    def draw(heads: int, n: int) -> Tensor:
        return torch.randn(batch, heads, n, d, dtype=dtype, device=device)

    k, v = (draw(options.kv_heads, tokens) for _ in range(2))
    new = draw(heads, 1), draw(options.kv_heads, 1), draw(options.kv_heads, 1)
    record: dict[str, Any] = {}
    timing = Timing(device, SECONDS)
    with torch.no_grad():
        steps = steps_of(k, v)
        truth = steps["by hand"](*new).float()
        for name, step in steps.items():
            off = 0.0 if name == "by hand" else (step(*new).float() - truth).abs().max().item()
            if not off < (2e-2 if dtype == torch.bfloat16 else 1e-4):
                sys.exit(f"not timed, {name} is wrong by {off}")
        runs = {name: (lambda step=step: step(*new)) for name, step in steps.items()}
        record["host"] = in_turns(runs, timing, median_ms)
        if device.type == "cuda":
            captured = {"copying the keys and values": lambda: (k.clone(), v.clone())}
            groups = heads // options.kv_heads
            grouped = {"enable_gqa": groups > 1}
            ready, flex = "attention to keys in one piece", torch.compile(flex_attention)
            captured[f"{ready}, torch's"] = lambda: F.scaled_dot_product_attention(
                new[0], k, v, **grouped
            )
            captured[f"{ready}, FlexAttention's"] = lambda: flex(new[0], k, v, **grouped)
            for name in ("flexlocal, compiled", "flexlocal", "by hand"):
                captured[name] = runs[name]
            captured = {name: in_a_graph(run) for name, run in captured.items()}
            record["captured"] = in_turns(captured, timing, median_ms)
        if options.prompt:
            record["prompt"] = _prompt(options, draw, device)
    return record


def _prompt(
    options: argparse.Namespace, draw: Callable[[int, int], Tensor], device: torch.device
) -> dict[str, list[float]]:
    """A prompt in pieces, with a cache, and in one."""
    window = Window.sliding(options.window)
    text = [draw(heads, options.prompt) for heads in (options.heads, *[options.kv_heads] * 2)]
    pieces = list(zip(*(x.split(options.piece, dim=2) for x in text), strict=True))
    batch, heads, _, d = text[1].shape
    cache = LocalCache(window, batch, heads, d, dtype=text[0].dtype, device=device)

    def in_pieces(attend: Callable[..., Tensor] = local_attention) -> list[Tensor]:
        cache.reset()
        return [attend(*x, window, cache=cache) for x in pieces]

    def whole() -> Tensor:
        return local_attention(*text, window)

    off = (torch.cat(in_pieces(), dim=2).float() - whole().float()).abs().max().item()
    if not off < 2e-2:
        sys.exit(f"not timed, a prompt in pieces is wrong by {off}")
    runs = {"in pieces": in_pieces, "in one": whole}
    if device.type == "cuda":
        compiled = torch.compile(local_attention, fullgraph=True)
        runs["in pieces, compiled"] = partial(in_pieces, compiled)
    return in_turns(runs, Timing(device, SECONDS), median_ms)


def text(record: dict[str, Any]) -> str:
    """A table for a terminal; ratios are of flexlocal's time to another's."""
    lines = []
    for kind, words in (("host", "a step"), ("captured", "in a CUDA graph")):
        rounds = record.get(kind, {})
        for name, found in rounds.items():
            base = next(x for x in rounds if x.startswith("flexlocal"))
            ratio = ratio_of_rounds(rounds[base], found).words()
            lines.append([words, name, number(sorted(found)[ROUNDS // 2]), ratio])
    rounds = record.get("prompt", {})
    for name, found in rounds.items():
        ratio = ratio_of_rounds(rounds["in pieces"], found).words()
        lines.append(["a prompt", name, number(sorted(found)[ROUNDS // 2]), ratio])
    return table(["", "", "ms", "flexlocal takes"], lines, ["", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures and prints."""
    device = machine.default_device()
    large = device.type == "cuda"
    parser = argparse.ArgumentParser(
        prog="python -m profiling.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {
        "batch": 32 if large else 1,
        "heads": 32 if large else 8,
        "kv-heads": 8,
        "head-size": 128 if large else 64,
        "window": 4096 if large else 512,
        "prompt": 0,
        "piece": 2048,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"({default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the results")
    options = parser.parse_args(arguments)
    print(f"{machine.device_name(device)}, torch {torch.__version__}\n")
    record = measure(options, device)
    print(text(record))
    settings = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in sizes}
    machine.write(machine.record(device, **settings) | record, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
