"""The command line: ``python -m flexlocal demo``, ``doctor`` and ``mask``.

A thin reader of arguments; the work is in the module named like the subcommand, loaded when asked
for. What cannot be done ends with one line and exit status 2, whether the reader of arguments finds
out or the work does.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from .. import __version__
from .progress import Progress


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < (2**63 if kind is int else math.inf):
            what = "a whole number below 2**63" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, at least {least:g}, got {text!r}")
        return value

    return read


def parser() -> argparse.ArgumentParser:
    """The reader of the command line, with every subcommand and flag."""
    top = _Parser(
        prog="python -m flexlocal",
        description="Local attention for PyTorch: a demonstration, masks, and this machine.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"flexlocal {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    text = "train a small byte-level language model on Python's standard library"
    demo = commands.add_parser("demo", help=text, description=text, allow_abbrev=False)
    demo.add_argument("--steps", type=_number(int, 1), metavar="N", help="train for N steps")
    demo.add_argument(
        "--seconds", type=_number(float, 1), metavar="S", help="train for S seconds at most"
    )
    demo.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (cuda if there)")
    demo.add_argument(
        "--backend", choices=("auto", "flex", "eager"), default="auto", help="attention's path"
    )
    demo.add_argument(
        "--seed", type=_number(int, 0), default=0, metavar="N", help="of weights and batches (0)"
    )
    demo.add_argument(
        "--window", type=_number(int, 1), default=64, metavar="W", help="window size (64)"
    )
    demo.add_argument(
        "--no-compare",
        dest="compare",
        action="store_false",
        help="skip the comparison of the two paths, which compiles",
    )
    demo.add_argument(
        "--shard",
        action="store_true",
        help="train on sequences cut between the processes of torchrun, beside whole ones",
    )

    text = "say what can run on this machine, and what to install for the rest"
    doctor = commands.add_parser("doctor", help=text, description=text, allow_abbrev=False)
    doctor.add_argument(
        "--run", action="store_true", help="try each path on a small problem (compiles)"
    )

    text = "show which keys each query sees, as text, PNG, HTML and numbers"
    mask = commands.add_parser("mask", help=text, description=text, allow_abbrev=False)
    what = mask.add_mutually_exclusive_group(required=True)
    what.add_argument("--window", type=_number(int, 1), metavar="W", help="window size")
    what.add_argument("--preset", metavar="NAME", help="a real model's local attention")
    what.add_argument("--list", action="store_true", help="list the presets with their sources")
    mask.add_argument("--causal", action="store_true", help="no key after the query")
    mask.add_argument(
        "--look-backward", type=_number(int, 0), metavar="N", help="windows before its own (1)"
    )
    mask.add_argument(
        "--look-forward",
        type=_number(int, 0),
        metavar="N",
        help="windows after its own (1, or 0 with --causal)",
    )
    mask.add_argument("--exact", action="store_true", help="the window slides with the query")
    mask.add_argument(
        "--autopad", action="store_true", help="allow lengths that are no multiple of the window"
    )
    mask.add_argument(
        "--len", dest="length", type=_number(int, 1), metavar="N", help="tokens (4 windows)"
    )
    mask.add_argument("--hide", metavar="KEYS", help="keys that a key mask hides, as 3,8-11")
    mask.add_argument(
        "--blocks", type=_number(int, 1), metavar="B", help="show the map of blocks of B tokens"
    )
    mask.add_argument(
        "--query", type=_number(int, 0), metavar="I", help="say which keys query I sees"
    )
    mask.add_argument("--png", metavar="FILE", help="write the picture (needs matplotlib)")
    mask.add_argument("--html", metavar="FILE", help="write a page with picture, numbers, blocks")
    for command in (demo, doctor, mask):
        command.set_defaults(fail=command.error)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` when ``None``) and return its exit status."""
    known, unknown = parser().parse_known_args(arguments)
    options = vars(known)
    command = options.pop("command")
    fail: Callable[[str], NoReturn] = options.pop("fail")
    if unknown:
        fail(f"unrecognized arguments: {' '.join(unknown)}")
    if command == "doctor":
        with _loading():
            from . import doctor

        return doctor.run(**options)
    if command == "mask":
        with _loading():
            from . import mask

        try:
            return mask.run(**options)
        except mask.CannotShow as reason:
            fail(str(reason))
    with _loading():
        from . import demo

    try:
        if not options.pop("shard"):
            return demo.run(**options)
        from . import shard

        if options.pop("seconds") is not None:
            fail("argument --seconds: not with --shard, which goes by --steps")
        del options["compare"]
        return shard.run(**options)
    except demo.CannotRun as reason:
        fail(str(reason))


def program() -> NoReturn:
    """Run this process's command line and exit."""
    if hasattr(signal, "SIGPIPE"):  # who reads may leave before all is said, as `head` does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())


@contextmanager
def _loading() -> Iterator[None]:
    """Tell who waits at a terminal that importing torch takes seconds."""
    if sys.stderr.isatty():
        with Progress(sys.stderr).doing("loading torch"):
            yield
    else:
        yield
