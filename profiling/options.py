"""What the scripts' command lines share: which problem, and the layer that works on it."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexlocal import LocalAttention, Rotary

from .problems import PROBLEMS, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reader(
    script: str, words: str | None, problem: str = "", layer: bool = False, seconds: float = 0
) -> argparse.ArgumentParser:
    """A parser for ``python -m profiling.<script>`` that shows the module's own text as help.

    ``problem`` is "one", "several" or the "window" of one, for ``problems_of``; ``layer`` adds what
    ``layer_of`` reads; ``seconds`` are of timed calls by default, which ``--json`` keeps.
    """
    shown, name = argparse.RawDescriptionHelpFormatter, f"python -m profiling.{script}"
    parser = argparse.ArgumentParser(prog=name, description=words, formatter_class=shown)
    if seconds:
        parser.add_argument("--json", type=file_to_write, metavar="FILE", help="for the results")
        words = f"of timed calls, each ({seconds:g})"
        parser.add_argument("--seconds", type=duration, default=seconds, help=words)
    if problem:
        nargs, names = "+" if problem == "several" else 1, ", ".join(PROBLEMS)
        parser.add_argument("--problem", nargs=nargs, choices=PROBLEMS, metavar="NAME", help=names)
        parser.add_argument("--window", type=count, metavar="W", help="tokens in a window")
        for name in ("causal", "exact"):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        for name in ("backward", "forward"):
            parser.add_argument(f"--look-{name}", type=int, metavar="WINDOWS")
    if problem in ("one", "several"):
        parser.add_argument("--shape", type=count, nargs=4, metavar=("B", "H", "N", "D"))
    if layer:
        parser.add_argument("--rotary", action="store_true", help="rotary embeddings")
        parser.add_argument("--xpos", action="store_true", help="rotary embeddings with xpos")
        parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
        parser.add_argument("--backend", choices=("auto", "flex", "eager"), default="auto")
        parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")
    return parser


def problems_of(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    default: Sequence[str],
    turned: bool = False,
) -> list[Problem]:
    """The problems that the flags name, with the changes that they ask for.

    The program ends where a window's numbers or the layer's arguments do not fit together and,
    with ``turned``, where rotary embeddings do not fit the head size.
    """
    try:
        found = [_changed(PROBLEMS[name], options) for name in options.problem or default]
        for problem in found:
            if turned:
                Rotary(problem.d)
            if "backend" in options:
                layer_of(problem, options)
    except ValueError as wrong:
        parser.error(str(wrong))
    return found


def _changed(named: Problem, options: argparse.Namespace) -> Problem:
    asked = {"size": options.window, "look_backward": options.look_backward}
    asked |= {"causal": options.causal, "exact": options.exact}
    changes = {name: value for name, value in asked.items() if value is not None}
    # What a window looks ahead by default depends on whether it is causal.
    turned = options.causal is not None and options.causal != named.window.causal
    if options.look_forward is not None or turned:
        changes["look_forward"] = options.look_forward
    window, shape = replace(named.window, **changes), getattr(options, "shape", None) or named.shape
    if tuple(shape) == named.shape and window == named.window:
        return named
    return Problem("custom", *shape, window)


def layer_of(problem: Problem, options: argparse.Namespace) -> LocalAttention:
    """The layer for the problem, on the CPU; a ValueError where arguments do not fit."""
    return LocalAttention(
        **{**problem.arguments, "dropout": options.dropout},
        dim=problem.d if options.rotary or options.xpos else None,
        use_xpos=options.xpos,
        backend=options.backend,
    )


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype that is asked for; by default bf16 on a GPU, else fp32."""
    usual = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[getattr(options, "dtype", None) or usual]


def count(text: str) -> int:
    """A whole number above 0, from a flag."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def duration(text: str) -> float:
    """Seconds to measure for, from a flag."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return float(text)


@contextmanager
def record_in(
    file: Path, parser: argparse.ArgumentParser, writers: str
) -> Iterator[dict[str, Any]]:
    """The record that ``file`` holds; the program ends where it is none, or not of ``writers``."""
    try:
        yield json.loads(file.read_text())
    except (OSError, ValueError) as wrong:  # of which a text that is no JSON is one
        parser.error(f"{file}: {wrong}")
    except (KeyError, TypeError, IndexError, AttributeError):
        parser.error(f"{file}: must hold what {writers} wrote")


def file_to_write(text: str) -> Path:
    """A file from a flag: its folder must be there before anything is measured."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text}")
    return file
