"""What single arguments must be; an error names the argument, what came and what would do."""

import sys
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def plain(value: Any) -> Any:
    """A scalar of numpy or a 0-d tensor as Python's own number or flag; anything else as it came.

    Not a tensor that requires a gradient, which would get none.
    """
    if type(value) in (int, float, bool) or getattr(value, "requires_grad", False):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_count(name: str, value: object, least: int = 1) -> int:
    """``value``, ``plain``, is an int of ``least`` or more; returned as that.

    Raises:
        TypeError: it is no int, or a bool.
        ValueError: it is less.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of {kind_of(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_number(name: str, value: object, wanted: str = "a number") -> int | float:
    """``value``, ``plain``, is an int or a float; returned as that.

    Raises:
        TypeError: it is neither, or a bool; ``wanted`` says what would be right.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of {kind_of(value)}")
    return value


def check_above_zero(name: str, value: float, wanted: str = "a number") -> float:
    """``value``, ``plain``, is a finite number above 0; returned as that.

    Raises:
        TypeError: it is no number; ``wanted`` says what would be right.
        ValueError: it is 0 or below, or not finite.
    """
    value = check_number(name, value, wanted)
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return value


def check_flag(name: str, value: object) -> bool:
    """``value``, ``plain``, is True or False; returned as that.

    Raises:
        TypeError: it is anything else, which Python would take for either.
    """
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of {kind_of(value)}")
    return value


def check_integers(name: str, value: object) -> None:
    """``value`` is a dense tensor of integers.

    Raises:
        TypeError: it is no tensor.
        ValueError: its dtype is no integer's, or it is nested or sparse.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind_of(value)}")
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be of an integer dtype, got {value.dtype}")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}")


def check_block_size(block_size: object) -> tuple[int, int]:
    """``block_size`` is a count of tokens or ``(queries, keys)``; returned as these two.

    Raises:
        TypeError: it is neither.
        ValueError: a count is below 1.
    """
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(sizes) != 2:
        raise TypeError(f"block_size must be an int or two ints, got {block_size!r}")
    queries, keys = (check_count("block_size", size) for size in sizes)
    return queries, keys


def kind_of(value: object) -> str:
    """``value``'s type, for an error."""
    return f"type {type(value).__name__}"
