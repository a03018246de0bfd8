"""What traces a call: a compiler, an exporter, a transform."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def seen_as_constant(function: Function) -> Function:
    """Has a compiler call ``function`` while it traces, and take the result for a constant.

    As ``torch.compiler.assume_constant_result``, which would import the compiler here. torch 2.11
    takes ``is_exporting()`` for True wherever it traces it, so that it must not be traced.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@seen_as_constant
def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is at work."""
    return torch._C._get_tracing_state() is not None


@seen_as_constant
def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, or ``torch.jit.trace``."""
    return torch.compiler.is_exporting() or is_tracing()


@seen_as_constant
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, forward-mode differentiation, or a tracer.

    They take plain operators only: an ``autograd.Function`` that writes in place has no rule for
    ``vmap``, nor a derivative in forward mode, and ``torch.jit.trace`` cannot look inside (torch
    2.11 to 2.15).
    """
    stack = torch._C._functorch.peek_interpreter_stack()
    return is_tracing() or stack is not None or torch.autograd.forward_ad._current_level >= 0


def refuse_old_onnx() -> None:
    """torch's older ONNX exporter can neither unfold a tensor of any length nor pad it.

    torch 2.11 to 2.15.

    Raises:
        RuntimeError: it is at work.
    """
    if is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch's older ONNX exporter cannot hold local attention: "
            "torch.onnx.export(..., dynamo=True) does, for every length"
        )
