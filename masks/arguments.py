"""What single arguments must be; an error names the argument, what came and what would do."""

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_count(name: str, value: object, least: int = 1) -> None:
    """``value`` is an int of ``least`` or more.

    Raises:
        TypeError: it is no int, or a bool.
        ValueError: it is less.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of {kind_of(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object, wanted: str = "a number") -> None:
    """``value`` is an int or a float.

    Raises:
        TypeError: it is neither, or a bool; ``wanted`` says what would be right.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of {kind_of(value)}")


def check_flag(name: str, value: object) -> None:
    """``value`` is True or False.

    Raises:
        TypeError: it is anything else, which Python would take for either.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of {kind_of(value)}")


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
    for size in sizes:
        check_count("block_size", size)
    return sizes


def kind_of(value: object) -> str:
    """``value``'s type, for an error."""
    return f"type {type(value).__name__}"
