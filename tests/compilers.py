"""What compilers make of a call, seen from outside."""

from contextlib import contextmanager
from functools import partial

import budget
import pytest
import torch
from budget import gradients
from strategies import Call

from flexlocal.torch_limits.kernels import unavailable

MOST_GRAPHS = 3  # one of a first length, one of any, and one more for lengths of another kind

needs_compiled_kernels_on_the_cpu = pytest.mark.skipif(
    unavailable(torch.device("cpu")) is not None,
    reason=f"no compiled kernel here: {unavailable(torch.device('cpu'))}",
)


def quick(names, kept):
    """Cases of a test by name: all but those that are kept run among the slow ones."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in kept]
    return [*kept, *slow]


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def never_dense(n):
    """Fails where an operator that ran inside was given all pairs of `n` tokens.

    So does FlexAttention where torch's compiler gave up on it: it then computes every score.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        yield
    dense = {
        event.name
        for event in profile.events()
        for shape in event.input_shapes
        if list(shape[-2:]) == [n, n]
    }
    assert not dense, f"computed for all pairs of tokens: {sorted(dense)}"


class DtypesOfKernels(torch.fx.Interpreter):
    """Runs a captured graph and notes what FlexAttention is called with."""

    def __init__(self, graph, found):
        super().__init__(graph)
        self.found = found

    def call_function(self, target, args, kwargs):
        if target is torch.ops.higher_order.flex_attention:
            self.found.append({x.dtype for x in args[:3]})
        return super().call_function(target, args, kwargs)


def noting_dtypes(found):
    """A backend for torch.compile that runs a graph as it is and notes its kernels' dtypes."""
    return lambda graph, inputs: DtypesOfKernels(graph, found).run


def called(layer, inside):
    """The layer as a user calls it: by itself, or as part of what is compiled."""
    return torch.compile(layer, fullgraph=True) if inside else layer


def report(what, count):
    print(f"{count} graphs: {what}")


def check_fused(case, dtype, run):
    """Output and gradients on the GPU against the oracle, and no dense arithmetic."""
    budget.check(case, dtype, partial(case.run, run), Call.cuda)
    call = case.tensors(dtype).cuda()
    with never_dense(case.n):
        gradients(case.run(run, call), call)


def code_for_hopper(kernel, kinds, constants):
    """What Triton makes of ``kernel`` for a Hopper GPU, without one; other arguments are int64."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kinds = {**kinds, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i64") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
