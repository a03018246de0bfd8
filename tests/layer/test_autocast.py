"""Autocast makes one dtype of q, k and v, whatever mixture came, as torch's own attention does."""

from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flexlocal import LocalAttention, attention_map, explain, local_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXTURES = [which for which in product(DTYPES, repeat=3) if len(set(which)) > 1]


def tensors(dtypes, grad=False):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 40, 16), (2, 3, 40, 16), (2, 3, 40, 24))
    made = (torch.randn(size, generator=generator) for size in sizes)
    return [x.to(dtype).requires_grad_(grad) for x, dtype in zip(made, dtypes, strict=True)]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
def test_any_mixture_is_taken(dtypes):
    layer = LocalAttention(8, causal=True, dim=16, dropout=0.0)
    q, k, v = tensors(dtypes, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        out = layer(q, k, v)
        same = layer(*(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, same)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.dtype for x in grads] == list(dtypes)


def test_the_map_and_the_explanation_take_it_too():
    q, k, v = tensors((torch.float32, torch.bfloat16, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention_map(q, k, 8)
        same = attention_map(q.bfloat16(), k, 8)
        assert explain(q, k, v, 8).backend == "eager"
    assert torch.equal(mixed, same)


def test_a_call_of_another_mixture_is_not_taken_for_the_last_one():
    """What is prepared for bf16 alone casts nothing."""
    q, k, v = tensors((torch.bfloat16,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        first = local_attention(q, k, v, 8)
        assert torch.equal(local_attention(q, k, v.float(), 8), first)
        assert torch.equal(local_attention(q, k.float(), v, 8), first)


def test_inside_a_compiler():
    q, k, v = tensors((torch.float32, torch.float32, torch.bfloat16))
    compiled = torch.compile(local_attention, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = compiled(q, k, v, 8), local_attention(q, k, v, 8)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_float64_mixes_with_nothing(which):
    dtypes = [torch.float32] * 3
    dtypes[which] = torch.float64
    q, k, v = tensors(dtypes)
    name = "v" if which == 2 else "k"
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=f"^{name} must have q's dtype"),
    ):
        local_attention(q, k, v, 8)


def test_without_autocast_dtypes_must_agree():
    q, k, v = tensors((torch.float32, torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match=r"^v must have q's dtype torch\.float32, got torch\.bf"):
        local_attention(q, k, v, 8)
