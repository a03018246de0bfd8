"""A compiled graph's two passes, called without what torch's compiler wraps around them.

Its wrappers look again, on every call, at what was settled when the graph was compiled: which
results are views, which inputs are written to, which gradients are wanted. Without them a training
step takes the host 0.81 to 0.87 of the time (H200, torch 2.11).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gradients import refuse_to_be_differentiated

Pass = Callable[[list[Any]], Sequence[Any]]
"""What Inductor makes of a pass. It empties the list that it is given, to free memory early."""


@dataclass(frozen=True)
class Passes:
    """What a graph was compiled to.

    Attributes:
        forward: from the graph's inputs to its results, followed by what the backward pass needs:
            tensors, then sizes.
        backward: from these sizes, these tensors and the gradients of all results to the gradients
            of all inputs.
        in_order: for each result, what lays its gradient out in memory as ``backward`` reads it.
        autocast: it was on when the graph was compiled, so that the graph holds its casts.
        deterministic: ``torch.use_deterministic_algorithms`` was on then.
    """

    forward: Pass
    backward: Pass
    in_order: tuple[Callable[[Tensor], Tensor], ...]
    autocast: bool
    deterministic: bool

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The graph's results, which can be differentiated once."""
        found: tuple[Tensor, ...] = _Step.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return found

    def run(self, one: Pass, arguments: list[Any]) -> Sequence[Any]:
        """``one(arguments)``, in which nothing is cast again."""
        with torch._C._DisableAutocast() if self.autocast else nullcontext():
            return one(arguments)


_SEEN_TO = (
    "num_mutated_inp_runtime_indices",
    "num_mutated_graph_handled_indices",
    "num_outputs_aliased",
    "num_tensors_saved_with_no_vc_check",
    "num_opaque_objects_saved_for_bw",
    "num_graphsafe_rng_states",
    "is_rng_op_functionalized",
    "tokens",
)
"""What torch's wrappers see to, by its name in the metadata of a graph, where it is 0 or empty if
there is nothing of it: inputs that are written to, results that are views of each other or of
inputs, saved tensors that may be written to, random numbers, side effects."""


def passes_of(compiled: Mapping[bool, Any], metadata: Any) -> Passes | None:
    """The passes of a graph, if nothing but them is needed; None where torch's wrappers are.

    Args:
        compiled: what Inductor made, by whether it is the backward pass.
        metadata: the graph's ``ViewAndMutationMeta``.
    """
    from torch._functorch._aot_autograd.runtime_wrappers import coerce_to_expected_memory_format

    if len(compiled) < 2 or not all(
        getattr(one, "_boxed_call", False) for one in compiled.values()
    ):
        return None
    if any(getattr(metadata, name, True) for name in _SEEN_TO):
        return None
    if not all(issubclass(x.raw_type, Tensor) and x.requires_grad for x in metadata.output_info):
        return None
    return Passes(
        forward=compiled[False],
        backward=torch.compiler.disable(compiled[True]),  # what compiled autograd would trace
        in_order=tuple(
            partial(coerce_to_expected_memory_format, memory_format=gradient.memory_format)
            for gradient in metadata.subclass_tangent_meta
        ),
        autocast=torch._C._is_any_autocast_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


class _Step(torch.autograd.Function):
    """A graph with its gradient, by ``passes``."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, *inputs: Any) -> tuple[Tensor, ...]:
        found = passes.run(passes.forward, list(inputs))
        count = len(passes.in_order)
        tensors = [_no_view(x) for x in found if isinstance(x, Tensor)]
        ctx.passes, ctx.sizes = passes, found[len(tensors) :]
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_to_be_differentiated("compiled")
        passes: Passes = ctx.passes
        if torch.are_deterministic_algorithms_enabled() and not passes.deterministic:
            raise RuntimeError(
                "this call's backward pass was compiled without deterministic algorithms: "
                "torch.use_deterministic_algorithms(True) must come before the call"
            )
        in_order = (lay(x) for lay, x in zip(passes.in_order, gradients, strict=True))
        arguments = [*ctx.sizes, *ctx.saved_tensors, *in_order]
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        return None, *passes.run(passes.backward, arguments)


def _no_view(x: Tensor) -> Tensor:
    """``x``, not taken for a view: nobody could write to such a result, or free what it shows."""
    return x.detach() if x._is_view() else x
