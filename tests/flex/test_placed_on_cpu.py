"""Positions, documents and softcap in the compiled kernel of the CPU, against the oracle."""

import placed
import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu

pytestmark = [needs_compiled_kernels_on_the_cpu, pytest.mark.slow]

CASES = {
    "padding on the left": placed.CASES["padding on the left"],
    "a part of documents by row, xpos, many segments": placed.case_of(
        "xpos, many segments", **{**placed.PART, "documents": 2, "offset_rows": 2}
    ),
    "a part of documents, bias, softcap": placed.case_of(
        "bias over rows", **{**placed.PART, "documents": 3}, softcap=2.0
    ),
    "documents, shared, mask by head": placed.case_of(
        "grouped, mask by head", **placed.PACKED, shared_qk=True
    ),
}
"""Without sinks, which need a log-sum-exp. ``test_fused_gradients`` has each argument by itself."""


@pytest.mark.parametrize("name", CASES)
def test_results(name):
    case = CASES[name]
    call = case.tensors(torch.float32)
    with torch.no_grad():
        found = case.run(call, backend="flex", return_lse=False).double()
        truth, _ = case.truth(call.to(torch.float64))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
