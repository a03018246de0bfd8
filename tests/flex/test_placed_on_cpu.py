"""Positions, documents and softcap in the compiled kernel of the CPU, against the oracle."""

import placed
import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu, quick

pytestmark = needs_compiled_kernels_on_the_cpu

NAMES = [
    "softcap",
    "documents",
    "documents of one row",
    "documents, xpos, many segments",
    "documents, bias",
    "documents, shared",
    "documents, mask by head",
    "a part by row, xpos",
    "a part of documents",
    "padding on the left",
]
"""Those without sinks, which need a log-sum-exp. ``test_fused_gradients`` has all of them."""

KEPT = ["documents"]


@pytest.mark.parametrize("name", quick(NAMES, KEPT))
def test_results(name):
    case = placed.CASES[name]
    call = case.tensors(torch.float32)
    with torch.no_grad():
        found = case.run(call, backend="flex", return_lse=False).double()
        truth, _ = case.truth(call.to(torch.float64))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
