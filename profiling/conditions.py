"""What may be in a peer's way; each function is a ``peer.Condition``."""

import torch

from flexlocal import explain

from .problems import Problem

MOST_PAIRS = 2**26
"""Entries of the largest dense mask."""


def needs_gpu(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "runs on NVIDIA GPUs only"


def exact_window(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    return None if problem.window.exact else "takes windows that slide with the query only"


def half_precision(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype in (torch.bfloat16, torch.float16):
        return None
    return f"takes 16-bit tensors only, not {str(dtype).removeprefix('torch.')}"


def head_of_eighths(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if problem.d % 8 == 0 and problem.d <= 256:
        return None
    return f"takes heads up to 256 wide and a multiple of 8, not {problem.d}"


def small_mask(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if problem.n**2 <= MOST_PAIRS:
        return None
    return f"its mask would have {problem.n} x {problem.n} entries"


def fused_path(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Asks flexlocal, of an inference."""
    x = torch.empty(1, 1, problem.n, problem.d, dtype=dtype, device=device)
    try:
        explain(x, x, x, problem.window, backend="flex")
    except ValueError as reason:
        return str(reason)
    return None


def not_by_itself(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    return "flexlocal takes this path by itself on a GPU" if device.type == "cuda" else None


def head_of_16(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cpu" or problem.d >= 16:
        return None
    return f"takes heads of 16 or wider on a GPU, not {problem.d}"
