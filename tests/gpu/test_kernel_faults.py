"""Faults of FlexAttention's kernels on a GPU, made again without what goes around them.

Seen on an H200 with torch 2.11. A test that fails says that this torch has mended the fault. Faults
that read memory that is nobody's are in ``test_memory_faults.py``, those of the flex path's own
backward pass in ``test_backward_faults.py``. Docstrings name tests that fail when a workaround is
taken away.
"""

import pytest
import torch
from faults import TORCH, assert_refused, dense_attention, is_close, mended
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexlocal import Window
from flexlocal.flex import renormalised
from flexlocal.masks import block_mask, documents_from_cu_seqlens
from flexlocal.torch_limits.memory import written_out

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


@pytest.fixture(autouse=True)
def same_numbers():
    """Tests draw the same numbers each time."""
    torch.manual_seed(0)


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def qkv(*shape, dtype=torch.float32):
    return [drawn(*shape, dtype=dtype) for _ in range(3)]


def learned(*shape, dtype=torch.float32):
    return [x.requires_grad_() for x in qkv(*shape, dtype=dtype)]


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


@pytest.mark.parametrize("d", [144, 192])
def test_float32_heads_above_128_have_no_tiles_that_fit(d):
    """Which ``MOST_HEAD_BETWEEN`` goes around; so does test_gpu's test of heads without it."""
    q, k, v = qkv(1, 2, 256, d)
    with torch.no_grad():
        assert_refused(
            lambda: compiled(flex_attention)(q, k, v), "resource|valid triton", "MOST_HEAD_BETWEEN"
        )


def test_a_search_reads_a_view_without_its_offset():
    """So ``documents_from_cu_seqlens`` searches what it computes."""

    def sliced(sums, token):
        return torch.searchsorted(sums[1:].contiguous(), token, right=True)

    sums = torch.tensor([0, 30, 30, 41, 100], device="cuda")
    lengths = torch.tensor([30, 0, 11, 59], device="cuda")
    right = torch.arange(4, device="cuda").repeat_interleave(lengths)
    numbers = compiled(lambda sums: documents_from_cu_seqlens(sums, 103))(sums)
    assert numbers.tolist() == [*right.tolist(), -1, -1, -1]
    found = compiled(sliced)(sums, torch.arange(100, device="cuda"))
    assert not torch.equal(found, right), mended("a difference in documents_from_cu_seqlens")


def test_heads_above_256_have_no_tiles_that_fit():
    """Which ``MOST_HEAD`` goes around, by test_gpu's ``test_wide_heads_go_to_the_eager_path``.

    In fp32 a forward pass finds some.
    """
    q, k, v = qkv(1, 2, 256, 264, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_refused(
            lambda: compiled(flex_attention)(q, k, v), "resource|valid triton", "MOST_HEAD"
        )


def test_a_decoding_kernel_takes_a_computed_query_for_contiguous():
    """Which ``written_out(q)`` goes around; test_gpu's test of a decoding kernel fails without.

    torch 2.15 decides on the query's layout before it asks for its strides.
    """
    x, (_, k, v) = drawn(2, 60, 3, 32), qkv(2, 3, 60, 32)

    def attend(x, k, v, prepared):
        q = prepared(x.transpose(1, 2) * 2.0)
        return flex_attention(q, k, v, kernel_options={"BACKEND": "TRITON_DECODE"})

    truth = dense_attention(x.transpose(1, 2) * 2.0, k, v)
    with torch.no_grad():
        assert is_close(compiled(attend)(x, k, v, written_out), truth)
        right = is_close(compiled(attend)(x, k, v, lambda q: q), truth)
    assert right == (TORCH >= (2, 15)), mended("written_out(q)")


@pytest.mark.parametrize("poisoned", ["query", "key", "value"])
def test_a_hidden_nan_spreads(poisoned):
    """Which ``finite_padding`` and ``without_padding`` go around; test_safety fails without them.

    A hidden key's gradient of a score is 0, but 0 * NaN is NaN. Forward its score is hidden first.
    """
    q, k, v = learned(1, 2, 256, 32)
    place = 100
    with torch.no_grad():
        {"query": q, "key": k, "value": v}[poisoned][:, :, place] = torch.nan
    kept = torch.ones(1, 256, dtype=torch.bool, device="cuda")
    kept[:, place] = False
    blocks = block_mask(Window(64, causal=True), 256, 256, device="cuda", key_mask=kept)
    out = compiled(flex_attention)(q, k, v, block_mask=blocks)
    grad = torch.ones_like(out)
    grad[:, :, place] = 0
    others = torch.arange(256, device="cuda") != place
    assert out[:, :, others].isfinite().all() == (poisoned != "value"), mended("without_padding(v)")
    if poisoned != "value":
        grads = torch.autograd.grad(out, (q, k), grad)
        finite = all(x[:, :, others].isfinite().all() for x in grads)
        assert not finite, mended(f"a padded {poisoned} that is cleared")


def test_sparse_blocks_of_64_leave_no_tiles_for_the_backward_pass():
    """Which ``Blocks.mask`` goes around, by blocks of 128 that options make smaller.

    Without it training in bf16 with heads of 64 fails, as in test_gpu's ``test_arguments``.
    """
    q, k, v = learned(1, 2, 512, 64, dtype=torch.bfloat16)
    blocks = block_mask(Window(128, causal=True), 512, 512, block_size=64, device="cuda")
    tiles = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
    tiles |= {f"bwd_BLOCK_{side}": 64 for side in ("M1", "N1", "M2", "N2")}
    out = compiled(flex_attention)

    def train():
        found = out(q, k, v, block_mask=blocks, kernel_options=tiles)
        torch.autograd.grad(found.sum(), (q, k, v))

    assert_refused(train, "no choices|no valid|divisible", "Blocks.mask's claim")


def test_a_log_sum_exp_alone_has_no_backward_pass():
    """Which ``_Together`` goes around; without it training on ``return_lse`` alone fails."""
    q, k, v = learned(1, 2, 256, 32)

    def lse(q, k, v, both):
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return renormalised._together(out, aux.lse)[1] if both else aux.lse

    renormalised.keep_whole()
    right = torch.autograd.grad(compiled(lse)(q, k, v, True).sum(), (q, k))
    scores = q.double() @ k.double().transpose(-1, -2) * 32**-0.5
    truth = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    assert is_close(right, truth)
    assert_refused(
        lambda: torch.autograd.grad(compiled(lse)(q, k, v, False).sum(), (q, k)),
        "make_loader|NoneType",
        "_Together",
    )


@pytest.mark.parametrize("shape", [(65536, 1), (1, 65536)], ids=["batch", "heads"])
def test_a_launch_counts_to_65535(shape):
    """Which ``flex/split.py`` goes around; test_split fails on many entries and heads without."""
    q, k, v = qkv(*shape, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_refused(
            lambda: compiled(flex_attention)(q, k, v), "invalid argument", "parts of 65,535"
        )


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="seen on Hopper alone",
)
def test_attention_with_a_mask_makes_a_plan_for_each_size():
    """By cuDNN: why ``efficient_on_gpu`` and ``flash_on_gpu`` are called by their own names."""
    q, k, v = qkv(2, 3, 203, 64, dtype=torch.bfloat16)
    hiding = torch.zeros(203, 208, device="cuda", dtype=torch.bfloat16)[:, :203]
    for given in ({"attn_mask": hiding}, {"is_causal": True}):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            scaled_dot_product_attention(q, k, v, **given)
            torch.cuda.synchronize()
        assert any("cudnn" in event.name for event in profile.events())
