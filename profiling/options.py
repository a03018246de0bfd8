"""What the scripts' command lines share: which problem, and the layer that works on it."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from flexlocal import LocalAttention, Rotary

from .problems import PROBLEMS, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reader(script: str, words: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m profiling.<script>`` that shows the module's own text as help."""
    return argparse.ArgumentParser(
        prog=f"python -m profiling.{script}",
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_problem(parser: argparse.ArgumentParser, shape: bool = True, several: bool = False) -> None:
    """The flags that ``problems_of`` reads; without ``shape`` the script chooses the sizes."""
    flags = parser.add_argument_group("problem", "a standard one, and what is to be changed of it")
    nargs, names = "+" if several else 1, ", ".join(PROBLEMS)
    flags.add_argument("--problem", nargs=nargs, choices=PROBLEMS, metavar="NAME", help=names)
    if shape:
        flags.add_argument("--shape", type=count, nargs=4, metavar=("B", "H", "N", "D"))
    flags.add_argument("--window", type=count, metavar="W", help="tokens in a window")
    flags.add_argument("--causal", action=argparse.BooleanOptionalAction)
    flags.add_argument("--exact", action=argparse.BooleanOptionalAction)
    flags.add_argument("--look-backward", type=int, metavar="WINDOWS")
    flags.add_argument("--look-forward", type=int, metavar="WINDOWS")


def add_layer(parser: argparse.ArgumentParser) -> None:
    """The flags that ``layer_of`` and ``dtype_of`` read."""
    flags = parser.add_argument_group("layer")
    flags.add_argument("--rotary", action="store_true", help="rotary embeddings")
    flags.add_argument("--xpos", action="store_true", help="rotary embeddings with xpos")
    flags.add_argument("--dropout", type=float, default=0.0, metavar="P")
    flags.add_argument("--backend", choices=("auto", "flex", "eager"), default="auto")
    flags.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")


def add_output(
    parser: argparse.ArgumentParser, seconds: float | None = None, plot: bool = False
) -> None:
    """``--json`` and, where the script has them, ``--seconds`` and ``--plot``."""
    if seconds:
        words = f"of timed calls, each ({seconds:g})"
        parser.add_argument("--seconds", type=duration, default=seconds, help=words)
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the results too")
    if plot:
        parser.add_argument("--plot", type=picture_to_write, metavar="FILE.png")


def problems_of(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    default: Sequence[str],
    turned: bool = False,
) -> list[Problem]:
    """The problems that the flags name, with the changes that they ask for.

    The program ends where a window's numbers do not fit together, where no layer of
    ``add_layer``'s flags takes them and, with ``turned``, where rotary embeddings do not.
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
    batch, heads, n, d = getattr(options, "shape", None) or named.shape
    changes = {
        "size": options.window,
        "causal": options.causal,
        "look_backward": options.look_backward,
        "exact": options.exact,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    # What a window looks ahead by default depends on whether it is causal.
    turned = options.causal is not None and options.causal != named.window.causal
    if options.look_forward is not None or turned:
        changes["look_forward"] = options.look_forward
    window = replace(named.window, **changes)
    if (batch, heads, n, d) == named.shape and window == named.window:
        return named
    return Problem("custom", batch, heads, n, d, window)


def layer_of(problem: Problem, options: argparse.Namespace) -> LocalAttention:
    """The layer for the problem, on the CPU.

    Raises:
        ValueError: arguments that do not fit.
    """
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
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def file_to_write(text: str) -> Path:
    """A file from a flag: its folder must be there before anything is measured."""
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text}")
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text}")
    return file


def picture_to_write(text: str) -> Path:
    """As ``file_to_write``, a picture by its suffix; matplotlib, which draws it, must be there."""
    file = file_to_write(text)
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install matplotlib")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end with .png, .pdf or .svg, got {text}")
    return file
