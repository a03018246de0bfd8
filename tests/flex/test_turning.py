"""Queries and keys that are rotated in a graph of their own, apart from attention."""

import oracle
import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu

from flexlocal import Rotary, Window
from flexlocal.flex import compile as compiled
from flexlocal.shapes import shaped
from flexlocal.spec import Inputs, Spec

pytestmark = needs_compiled_kernels_on_the_cpu


def rotated(q, k, window, q_offset, kv_offset):
    inputs = Inputs(q, k, k, inv_freq=Rotary(8).inv_freq, q_offset=q_offset, kv_offset=kv_offset)
    inputs = shaped(inputs)
    return compiled.turning(Spec(window, scale=1.0), inputs)(inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "q_offset", "kv_offset", "m"),
    [
        (Window(5, causal=True), 31, torch.tensor([3, 11]), 29),
        (Window(5, causal=True), None, None, 23),
        (Window(5), 7, 7, 23),  # queries as if they stood a window further on
    ],
)
def test_it_rotates_by_position_and_its_gradients_back(window, q_offset, kv_offset, m):
    q, k = torch.randn(2, 23, 6, 8).transpose(1, 2), torch.randn(2, 3, m, 8)
    q, k = q.requires_grad_(), k.requires_grad_()
    found = rotated(q, k, window, q_offset, kv_offset)
    assert found[0].stride() == q.stride()
    (places,) = found[0].grad_fn.turn.args
    for kept in places[:3]:
        assert kept.untyped_storage().nbytes() == 0, "memory of queries or keys is held"
    at = [torch.as_tensor(0 if x is None else x).view(-1, 1, 1) for x in (q_offset, kv_offset)]
    shift = 0 if window.causal else 5
    true = (
        oracle.rotate(q.double(), at[0] + shift + torch.arange(23)),
        oracle.rotate(k.double(), at[1] + torch.arange(m)),
    )
    # A part of a larger tensor, as the gradients of joined keys are.
    grads = torch.randn_like(q), torch.randn(2, 3, m + 4, 8)[:, :, 4:]
    gradients = [
        torch.autograd.grad(out, (q, k), [x.to(out[0].dtype) for x in grads])
        for out in (found, true)
    ]
    for x, y in zip((*found, *gradients[0]), (*true, *gradients[1]), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=2e-6, atol=2e-6)
