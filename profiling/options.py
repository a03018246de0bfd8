"""What the scripts' command lines share: which problem, and the layer that works on it."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from flexlocal import LocalAttention, Window

from .problems import PROBLEMS, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_problem(parser: argparse.ArgumentParser, shape: bool = True, several: bool = False) -> None:
    """The flags that ``problem_of`` reads, with ``several`` ``problems_of``.

    Without ``shape`` the script chooses the sizes.
    """
    flags = parser.add_argument_group("problem", "a standard one, and what is to be changed of it")
    nargs = "+" if several else None
    names = ", ".join(PROBLEMS)
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


def problem_of(options: argparse.Namespace, default: Problem) -> Problem:
    """The problem that the flags name, or ``default``, with the changes that they ask for.

    Raises:
        ValueError: the window's numbers do not fit together.
    """
    return _changed(default if options.problem is None else PROBLEMS[options.problem], options)


def problem_that_fits(
    parser: argparse.ArgumentParser, options: argparse.Namespace, default: Problem
) -> Problem:
    """As ``problem_of``; where no layer would take it, the program ends."""
    try:
        problem = problem_of(options, default)
        layer_of(problem, options)
    except ValueError as wrong:
        parser.error(str(wrong))
    return problem


def problems_of(options: argparse.Namespace, default: Sequence[str]) -> list[Problem]:
    """The problems that the flags name, or those of ``default``, changed in the same way.

    Raises:
        ValueError: as ``problem_of``.
    """
    return [_changed(PROBLEMS[name], options) for name in options.problem or default]


def _changed(named: Problem, options: argparse.Namespace) -> Problem:
    batch, heads, n, d = getattr(options, "shape", None) or named.shape
    window = _window(options, named.window)
    if (batch, heads, n, d) == named.shape and window == named.window:
        return named
    return Problem("custom", batch, heads, n, d, window)


def layer_of(problem: Problem, options: argparse.Namespace) -> LocalAttention:
    """The layer for the problem, on the CPU.

    Raises:
        ValueError: arguments that do not fit.
    """
    asked = {**problem.arguments, "dropout": options.dropout}
    return LocalAttention(
        **asked,
        dim=problem.d if options.rotary or options.xpos else None,
        use_xpos=options.xpos,
        backend=options.backend,
    )


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype that is asked for; by default the device's usual one."""
    return DTYPES[options.dtype] if options.dtype else usual_dtype(device)


def usual_dtype(device: torch.device) -> torch.dtype:
    """What attention is mostly run in on the device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _window(options: argparse.Namespace, named: Window) -> Window:
    changes = {
        "size": options.window,
        "causal": options.causal,
        "look_backward": options.look_backward,
        "exact": options.exact,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    # What a window looks ahead by default depends on whether it is causal.
    turned = options.causal is not None and options.causal != named.causal
    if options.look_forward is not None or turned:
        changes["look_forward"] = options.look_forward
    return replace(named, **changes)


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


def folder_to_write(text: str) -> Path:
    """A folder from a flag, there or to be made."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {text}")
    return folder


def picture_to_write(text: str) -> Path:
    """As ``file_to_write``, a picture by its suffix; matplotlib, which draws it, must be there."""
    file = file_to_write(text)
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install matplotlib")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end with .png, .pdf or .svg, got {text}")
    return file
