"""Functions that are compiled here, outside a user's ``torch.compile``, and kept."""

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..spec import Inputs
from ..torch_limits.compiling import inductor, keep_guard
from .threads import GATE

Result = TypeVar("Result")


def in_own_graph(
    function: Callable[..., Result], name: str, settled: Sequence[str] = ()
) -> Callable[..., Result]:
    """``function``, compiled.

    Args:
        function: of one argument beside a call's inputs, and of these.
        name: of its graph, in profiles.
        settled: attributes of that argument which never change.
    """

    def call(beside: Any, *inputs: Any) -> Result:
        if not torch.compiler.is_compiling():  # FlexAttention would hold every score
            raise RuntimeError(
                "torch.compile left the fused kernel uncompiled (torch.compiler.set_stance?): "
                "backend must be 'eager' here"
            )
        return function(beside, *inputs)

    # torch counts recompiles by code object, so that each callable needs one of its own. Its
    # closure holds `function`: `_needed` finds guards on what that holds by this name.
    own = types.FunctionType(
        call.__code__.replace(co_name=name), globals(), name, closure=call.__closure__
    )
    compiled: Callable[..., Result] = torch.compile(
        own,
        fullgraph=True,
        backend=inductor,
        options={"guard_filter_fn": partial(_needed, ("function", "__import__", *settled))},
    )
    return compiled


def _needed(settled: Sequence[str], guards: Sequence[Any]) -> list[bool]:
    """Which guards a callable keeps: none on its closure, on modules or on globals.

    The key that a callable is kept by settles what these guard. To evaluate hundreds of them on
    every call would take longer than to launch the kernel.
    """
    return [keep_guard(guard, settled) for guard in guards]


def for_one_kind(compiled: Callable[..., Result]) -> Callable[..., Result]:
    """``compiled``, for calls of one kind: the first compiles, and is alone."""
    warm = False  # once this kind of call has been compiled, with its backward pass

    def run(*arguments: Any) -> Result:
        nonlocal warm
        call = partial(compiled, *arguments)
        if warm:
            return GATE.together(call)
        found = GATE.alone(call)
        warm = True
        return found

    return run


def without_gradients_on_cpu(inputs: Inputs) -> Inputs:
    """Of which nothing requires a gradient: kernels for the CPU refuse that, even under no_grad."""
    if inputs.q.device.type != "cpu":
        return inputs
    return Inputs(*map(_detached, inputs))


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
