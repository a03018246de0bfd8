"""Calls of the eager path whose tiles torch's fused kernel computes, however small they are."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from flexlocal.eager import fused, fused_tiles


@contextmanager
def taken(least=1, tile=64, most=128, vector=16):
    """The kernel for every call that it can compute, in tiles of so many queries; notes calls."""
    calls, as_it_is = [], fused.output
    numbers = {"_LEAST_TILE": tile, "_MOST_TILE": most, "_VECTOR": vector}
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused, "_MOST_SCORES", 2**60))
        stack.enter_context(patch.object(fused, "_LEAST_PRODUCTS", least))
        for name, value in numbers.items():
            stack.enter_context(patch.object(fused_tiles, name, value))
        noted = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
        stack.enter_context(patch.object(fused, "output", noted))
        yield calls


def by_the_kernel(call, **tiles):
    """Runs ``call``: its output is the kernel's, its log-sum-exps are not."""

    def run(tensors):
        with taken(**tiles) as calls:
            out = call.run(tensors, return_lse=False, backend="eager")
        assert bool(calls) == (out.numel() > 0)
        return out, call.run(tensors, backend="eager")[1]

    return run
