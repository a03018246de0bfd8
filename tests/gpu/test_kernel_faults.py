"""Faults of FlexAttention's kernels on a GPU, made again without what goes around them.

Seen on an H200 with torch 2.11. A test that fails says that this torch has mended the fault. Faults
that read memory that is nobody's are in ``test_memory_faults.py``, those of the flex path's own
backward pass in ``test_backward_faults.py``. Docstrings name tests that fail when a workaround is
taken away.
"""

import itertools

import pytest
import torch
from faults import TORCH, assert_refused, dense_attention, is_close, mended
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexlocal import Window
from flexlocal.flex import renormalised
from flexlocal.masks import block_mask, mask_mod
from flexlocal.mods.shared_qk import SELF_SCORE, SELF_SCORE_OF_KERNELS, own_key
from flexlocal.torch_limits import at_least, at_most, number_in_memory, written_out

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_heads_above_256_have_no_tiles_that_fit(dtype):
    """Which ``MOST_HEAD`` goes around, by test_gpu's ``test_wide_heads_go_to_the_eager_path``."""
    q, k, v = qkv(1, 2, 256, 264, dtype=dtype)
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


def test_a_score_of_minus_50000_is_rounded_in_the_backward_pass():
    """Which ``SELF_SCORE_OF_KERNELS`` goes around, and what its rounding is exact for."""
    q, k, v = learned(1, 1, 128, 16)
    blocks = block_mask(Window(128, causal=True), 128, 128, device="cuda")

    def weight(own):
        """That of the first token's own key, the only one that it sees."""

        def mod(score, batch, head, query, key):
            return torch.where(query == key, own, score)

        out = compiled(flex_attention)(q, k, v, score_mod=mod, block_mask=blocks)
        (grad,) = torch.autograd.grad(out[:, :, 0].sum(), v)
        return grad[0, 0, 0].double()

    assert (weight(SELF_SCORE_OF_KERNELS) - 1).abs().max() < 1e-6
    off = (weight(SELF_SCORE) - 1).abs().max()
    assert off > 1e-4, mended("SELF_SCORE_OF_KERNELS")


def alone(window, n, query):
    """Whether ``query`` sees no key but its own: what ptxas loses a constant of."""
    first, last = at_least(window.first_key(query), 0), at_most(window.last_key(query), n - 1)
    return (first == query) & (last == query)


def test_ptxas_loses_a_constant_of_16_bit_arithmetic():
    """Which ``_beside_itself`` goes around: it asks the first and the last token alone.

    Triton's ptxas before CUDA 13.1, in fp32, for one of these at least. test_gpu's tests of
    "shared, odd windows both ways" fail where every query is asked.
    """
    found = {}
    for size, n in itertools.product((3, 5, 7), (36, 44, 60)):
        window = Window(size, look_backward=3, look_forward=2)
        q, k, v = qkv(3, 2, n, 16)
        kept = drawn(3, 1, n) < 0.5

        def visible(batch, head, query, key, window=window, n=n, kept=kept):
            itself = own_key(window, batch, head, query, key)
            others = alone(window, n, query) | ~itself
            return mask_mod(window)(batch, head, query, key) & others & kept[batch, 0, key]

        lists = block_mask(window, n, n, device="cuda", key_mask=kept[:, 0])
        lists = lists.kv_num_blocks, lists.kv_indices, None, None
        blocks = BlockMask((n, n), *lists, *lists, (128, 128), visible)
        places = [torch.arange(count, device="cuda") for count in (3, 1, n, n)]
        truth = dense_attention(q, k, v, visible(*torch.meshgrid(*places, indexing="ij")))
        with torch.no_grad():
            out = compiled(flex_attention)(q, k, v, block_mask=blocks)
        found[size, n] = is_close(out, truth)
        torch.compiler.reset()
    assert False in found.values(), mended("_beside_itself")


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_kernel_captures_no_arithmetic_on_a_symbolic_length(training):
    """Which ``number_in_memory`` goes around."""

    def attend(q, k, v, number):
        n = number(q.shape[2], q.device)

        def mod(score, batch, head, query, key):
            return torch.where(query == n - 1, 2.0 * score, score)

        return flex_attention(q, k, v, score_mod=mod)

    def is_right(number):
        torch.compiler.reset()
        run = torch.compile(attend, fullgraph=True, dynamic=True)
        for n in (130, 150):
            q, k, v = learned(1, 2, n, 32)

            def twice(score, batch, head, query, key, n=n):
                return torch.where(query == n - 1, 2.0 * score, score)

            truth = dense_attention(q, k, v, score_mod=twice)
            with torch.set_grad_enabled(training):
                out = run(q, k, v, number)
            if not is_close(out, truth):
                return False
            if training:
                grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, truth)]
                if not is_close(*grads):
                    return False
        return True

    assert is_right(number_in_memory)
    try:
        right = is_right(lambda n, device: n)
    except Exception as error:  # the control above has shown that it is none of the test's
        print(error)
        right = False
    assert not right, mended("number_in_memory")


@pytest.mark.parametrize("shape", [(65536, 1), (1, 65536)], ids=["batch", "heads"])
def test_a_launch_counts_to_65535(shape):
    """Which ``flex/split.py`` goes around; test_split fails on many entries and heads without."""
    q, k, v = qkv(*shape, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_refused(
            lambda: compiled(flex_attention)(q, k, v), "invalid argument", "parts of 65,535"
        )
