"""Tiles that see alike share masks and calls of torch's kernel; its gradients."""

from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import placed
import pytest
import torch
from features import windows_of
from fused_calls import by_the_kernel, taken
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows

from flexlocal import Window, local_attention
from flexlocal.eager import attend, autograd, fused, fused_alike, fused_tiles

PADDED = {
    "a row": {"lead": (1, 6), "n": 205},
    "rows, grouped": {"lead": (3, 6), "kv_heads": 2, "n": 205},
    "rows, views": {"lead": (3, 6), "n": 205, "transposed": True},
    "longer than all": {"lead": (3, 6), "n": 53, "window": windows_of(64, causal=False)},
    "both ways": {"lead": (2, 6), "n": 130, "window": windows_of(9, causal=False)},
}


@pytest.mark.parametrize("window", [Window(64), Window(16, causal=True)], ids=["all", "few"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_mask_that_hides_nothing_costs_nothing(window, learned, monkeypatch):
    q, k, v = (torch.randn(3, 2, 48, 8, requires_grad=learned) for _ in range(3))
    mask = torch.ones(3, 48, dtype=torch.bool)
    plain = local_attention(q, k, v, window)
    with monkeypatch.context() as patched:
        patched.setattr(attend, "without_padding", None)
        assert torch.equal(local_attention(q, k, v, window, mask=mask), plain)
    mask[1, 5] = False
    assert not torch.equal(local_attention(q, k, v, window, mask=mask)[1], plain[1])


@pytest.mark.parametrize("masked", [False, True])
def test_what_one_call_computes_is_not_copied(masked):
    """Nor are its gradients, or added to zeros."""
    q, k, v, grad = (torch.randn(3, 48, 2, 8).transpose(1, 2) for _ in range(4))
    mask = torch.arange(48) < torch.tensor([48, 31, 7])[:, None] if masked else None
    call = partial(local_attention, q, k, v, Window(64), mask=mask)

    def step():
        out = call()
        return out, *(torch.autograd.grad(out, (q, k, v), grad) if out.requires_grad else ())

    for learned in (False, True):
        q, k, v = (x.requires_grad_(learned) for x in (q, k, v))
        expected = step()
        with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
            found = step()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == q.stride()
        moved = ("aten::copy_", "aten::add_", "aten::zero_", "aten::fill_")
        shapes = [x.input_shapes[0] for x in profile.events() if x.name in moved]
        assert list(q.shape) not in shapes


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_output_may_be_written_to(kv_heads, transposed):
    """It is no view of what the kernel wrote, which autograd would refuse to have written to."""
    sizes = {"lead": (2, 6), "kv_heads": kv_heads, "n": 48, "d": 8, "d_v": 8}
    call = placed.case_of(**sizes, transposed=transposed, window=Window(64))
    tensors = call.tensors(torch.float64)
    out = call.run(tensors, return_lse=False, backend="eager")
    assert out.requires_grad
    expected = 2 * out.detach()
    assert torch.equal(out.mul_(2), expected)


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_hidden_beside_what_the_window_hides(name):
    """Queries that see nothing but padding among them, as all of a row do."""
    more = PADDED[name]
    more = {"d": 8, "d_v": 8, "mask_batch": more["lead"][0], **more}
    call = placed.case_of("mask, a row hidden", **more)
    gradients, as_it_is = [], fused_alike.gradients

    noted = lambda *given: gradients.append(given) or as_it_is(*given)  # noqa: E731
    with patch.object(fused_alike, "gradients", noted):
        placed.check(call, run=by_the_kernel(call))
    assert gradients


def test_masks_of_padding_are_as_small_as_the_numbers_of_a_call():
    """Some tiles at a time, though all of them see alike."""
    hidden, as_it_is = [], fused_alike._hidden

    def noted(*given):
        found = as_it_is(*given)
        hidden.append(found[0].numel())
        return found

    q, mask = torch.randn(1, 1, 4096, 8), torch.arange(4096)[None] % 3 > 0
    with (
        taken(),
        patch.object(fused_alike, "_hidden", noted),
        patch.object(fused_tiles, "_MOST_NUMBERS", 2**17),
    ):
        local_attention(q, q, q, Window(64, causal=True), mask=mask)
    assert len(hidden) > 3 and max(hidden) <= 2**17


@pytest.mark.parametrize(
    ("n", "window", "calls"),
    [(128, Window.around(64), 1), (129, Window.around(64), 3), (128, Window.sliding(65), 2)],
)
def test_tiles_that_would_all_have_all_keys_are_one(n, window, calls):
    q, made = torch.randn(3, 2, n, 8), []
    noted = lambda *given: made.append(given) or attention(*given)  # noqa: E731
    attention = fused_alike.attention
    with taken(), patch.object(fused_alike, "attention", noted):
        found = local_attention(q, q, q, window)
    assert len(made) == calls
    torch.testing.assert_close(found, local_attention(q, q, q, window, softcap=1e9))


def test_windows_share_masks():
    masks, as_it_is = [], fused_alike.hiding_of
    q = torch.randn(1, 2, 5 * 192, 8)
    hiding = lambda *call: masks.append(1) or as_it_is(*call)  # noqa: E731
    fused_alike._shared_mask.cache_clear()
    with taken(), patch.object(fused_alike, "hiding_of", hiding):
        local_attention(q, q, q, Window(192, causal=True))
        # Two tiles in a window, of which the first of all windows has no other before it.
        assert len(masks) == 4
        local_attention(q, q, q, Window(192, causal=True))  # they are kept
        assert len(masks) == 4


def test_large_masks_are_not_kept():
    q = torch.randn(1, 2, 7 * 64, 8)
    for most, kept in ((64 * 128 - 1, 1), (64 * 128, 2)):  # 64 keys are seen from the first tile
        fused_alike._shared_mask.cache_clear()
        with patch.object(fused_alike, "_MOST_KEPT", most):
            local_attention(q, q, q, Window(64, causal=True))
        assert fused_alike._shared_mask.cache_info().currsize == kept


@pytest.mark.parametrize(
    ("entries", "transposed", "few", "held", "calls"),
    [
        (1, False, True, 6, 3),
        (1, True, True, 6, 3),
        (2, False, True, 6, 3),
        (2, False, True, 4, 4),
        (2, False, False, 6, 4),  # of many numbers: a call for each entry
        (9, False, False, 6, 11),
        (2, True, True, 6, 4),  # no view joins entries with heads: a call for each entry
        (9, True, False, 6, 8),  # of which there are more than tiles
    ],
)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_tiles_that_see_alike_share_calls(entries, transposed, few, held, calls, kv_heads):
    """The first tile, six that see alike, and the last one, which is short."""
    sizes = [(entries, heads, 7 * 64 + 5, 8) for heads in (6, kv_heads, kv_heads)]
    q, k, v = (torch.randn(size) for size in sizes)
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    window = Window(64, causal=True)
    right = local_attention(q, k, v, window, softcap=1e9)
    made, as_it_is = [], fused_alike.attention
    attention = lambda *call: made.append(call) or as_it_is(*call)  # noqa: E731
    tile = 6 * 64 * 8
    with (
        patch.object(fused_alike, "attention", attention),
        patch.object(fused_tiles, "_LEAST_NUMBERS", 6 * tile + few),
        patch.object(fused_tiles, "_MOST_NUMBERS", held * entries * tile),
    ):
        found = local_attention(q, k, v, window)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(made) == calls
    assert found.stride() == q.stride()


@settings(max_examples=EXAMPLES)
@given(
    window=windows(),
    n=st.integers(1, 150),
    sizes=st.sampled_from([(1, 2, 2), (3, 6, 2), (2, 3, 1)]),
    transposed=st.booleans(),
    tile=st.sampled_from([3, 8, 64]),
    repays=st.sampled_from([1, 2**60]),
    held=st.sampled_from([1, 1000, 2**21]),
    scores=st.sampled_from([200, 2**20]),
)
def test_gradients_by_the_kernel(window, n, sizes, transposed, tile, repays, held, scores):
    entries, heads, kv_heads = sizes
    rule = Window(window.size, window.causal, window.look_backward, window.ahead, window.exact)
    generator = torch.Generator().manual_seed(n)
    q, k, v, grad = (
        torch.randn(entries, h, n, 8, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    if transposed:
        q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found, calls, as_it_is = [], [], fused_alike.gradients
    gradients = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
    for served in (True, False):
        with ExitStack() as stack:
            stack.enter_context(taken(tile=tile, most=2 * tile, vector=2))
            stack.enter_context(patch.object(fused_alike, "gradients", gradients))
            stack.enter_context(patch.object(fused_tiles, "_LEAST_NUMBERS", repays))
            stack.enter_context(patch.object(fused_tiles, "_MOST_NUMBERS", held))
            stack.enter_context(patch.object(autograd, "_SCORES_ON_CPU", scores))
            if not served:
                stack.enter_context(patch.object(fused, "serves_backward", lambda *_: False))
            out = local_attention(q, k, v, rule, backend="eager")
            found.append(torch.autograd.grad(out, (q, k, v), grad))
        assert len(calls) == 1
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
        assert ours.stride() == right.stride()


@pytest.mark.parametrize(
    ("dtype", "more", "expected"),
    [
        (torch.float32, {}, True),
        (torch.float32, {"n": 1024, "size": 96}, True),
        (torch.float32, {"n": 1100}, False),
        (torch.float32, {"n": 1100, "size": 128}, True),
        (torch.float32, {"n": 1100, "size": 1200}, True),
        (torch.float32, {"n": 1100, "size": 128, "exact": True}, False),
        (torch.float32, {"n": 1100, "size": 1100, "exact": True}, True),  # it hides nothing
        (torch.float16, {}, False),
        (torch.bfloat16, {}, False),
        (torch.float32, {"softcap": 9.0}, False),
        (torch.float32, {"mask": torch.arange(300)[None] < 200}, True),
        (torch.float32, {"mask": torch.arange(300).expand(8, -1) < 200}, False),  # by head
        (torch.float32, {"documents": torch.arange(300) // 90}, True),  # calls of their own
        (torch.float32, {"documents": torch.arange(300) // 2}, False),
    ],
)
def test_which_gradients_are_the_kernels(dtype, more, expected):
    more = dict(more)
    n, size, exact = (more.pop(x, y) for x, y in (("n", 300), ("size", 64), ("exact", False)))
    window = Window(size, causal=True, exact=exact)
    q = torch.randn(1, 8, n, 64, dtype=dtype, requires_grad=True)
    calls, as_it_is = [], fused_alike.gradients
    gradients = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
    with patch.object(fused_alike, "gradients", gradients):
        local_attention(q, q, q, window, **more).sum().backward()
    assert bool(calls) == expected


def test_tiles_at_offsets_have_masks_of_their_own():
    """Such windows promise no steps, though two tiles may see as many keys before and after."""
    q = torch.randn(1, 2, 101, 8, dtype=torch.float64)
    for size in range(3, 12):
        call = {"window": Window(size, causal=True), "q_offset": 1, "kv_offset": 1}
        right = local_attention(q, q, q, **call, softcap=1e9)
        with taken(tile=7, most=8) as calls:
            found = local_attention(q, q, q, **call)
        assert calls
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
