"""The command line: ``python -m flexlocal demo`` and ``python -m flexlocal doctor``.

A thin reader of arguments; the work is in the module named like the subcommand, loaded when
asked for. Wrong arguments end with one line and exit status 2.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, at least {least:g}, got {text!r}")
        return value

    return read


def parser() -> argparse.ArgumentParser:
    """The reader of the command line, with every subcommand and flag."""
    top = _Parser(
        prog="python -m flexlocal",
        description="Local attention for PyTorch: a demonstration and a look at this machine.",
        allow_abbrev=False,
    )
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

    text = "say what can run on this machine, and what to install for the rest"
    doctor = commands.add_parser("doctor", help=text, description=text, allow_abbrev=False)
    doctor.add_argument(
        "--run", action="store_true", help="try each path on a small problem (compiles)"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` when ``None``) and return its exit status."""
    reader = parser()
    options = vars(reader.parse_args(arguments))
    if options.pop("command") == "doctor":
        from . import doctor

        return doctor.run(**options)
    from . import demo

    try:
        return demo.run(**options)
    except demo.CannotRun as reason:
        reader.error(str(reason))


if __name__ == "__main__":
    sys.exit(main())
