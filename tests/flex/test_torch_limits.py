"""Each workaround for torch: what goes wrong without it, so that one that is not needed shows.

A test here fails when torch does right what a workaround goes around, or when the workaround is
taken away. ``tests/package/test_workarounds.py`` lists such tests, these and others.
"""

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu
from faults import TORCH, assert_refused
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalAttention, Window, local_attention, spec
from flexlocal.flex import attend as graph
from flexlocal.masks import block_mask
from flexlocal.torch_limits.compiling import inductor
from flexlocal.torch_limits.kernels import KERNEL_DTYPES, unavailable
from flexlocal.torch_limits.sizes import at_least, at_most, is_symbolic, plain_int

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def with_neighbours(layer, x):
    """A graph with views before the kernel, and arithmetic behind it."""
    q, k, v = x.chunk(3, dim=-1)
    return 2 * layer(q.relu(), k, v) + q


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
def test_a_kernel_of_the_cpu_takes_no_neighbours():
    """Nor reads a view at its offset; which ``copied`` goes around."""
    x = torch.randn(2, 3, 40, 3 * 24)
    layers = {name: LocalAttention(8, dropout=0.0, backend=name) for name in ("eager", "flex")}
    compiled = torch.compile(with_neighbours, fullgraph=True)
    with torch.no_grad():
        right = with_neighbours(layers["eager"], x)
        torch.testing.assert_close(compiled(layers["flex"], x), right, rtol=1e-5, atol=1e-5)
        assert_refused(lambda: compiled(flex_attention, x), "epilogue|same buffer", "copied")


@needs_compiled_kernels_on_the_cpu
def test_a_kernel_of_the_cpu_wants_lists_as_wide_as_the_grid():
    """Which ``full_width`` goes around; a GPU's takes narrow ones."""
    window, n = Window(32, causal=True), 16384  # narrow lists are cut off from 64 blocks on
    q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))  # torch 2.11 refuses one buffer as all
    narrow = block_mask(window, n, n)
    assert narrow.kv_indices.shape[-1] < n // 128
    with torch.no_grad(), pytest.raises(Exception, match="(?i)assert"):
        torch.compile(flex_attention, fullgraph=True)(q, k, v, block_mask=narrow)


def test_the_gradient_of_a_sum_of_views_is_copied_by_torchs_own_compiler():
    """Which ``inductor`` goes around, by ``guess_tangent_strides_as_outputs``."""
    x, y, grad = (torch.randn(2, 30, 4, 16).transpose(1, 2) for _ in range(3))
    strides = []
    for backend in ("inductor", inductor):
        torch.compiler.reset()
        one = x.clone().requires_grad_()
        total = torch.compile(lambda x, y: 2 * x + y, fullgraph=True, backend=backend)
        (found,) = torch.autograd.grad(total(one, y), one, grad)
        torch.testing.assert_close(found, 2 * grad)
        strides.append(found.stride())
    assert strides[1] == x.stride()
    assert (strides[0] != x.stride()) == (TORCH == (2, 11)), "it is needed for other versions"


def test_sizes_become_symbolic_and_plain_again():
    """Which ``plain_int`` goes around: a kernel is made for numbers."""
    seen = []

    def look(x):
        seen.append((is_symbolic(x.shape[0]), type(plain_int(x.shape[0]))))
        return x + 1

    compiled = torch.compile(look, fullgraph=True, dynamic=True, backend="eager")
    for n in (5, 6, 7):
        compiled(torch.zeros(n, 3))
    assert {kind for _, kind in seen} == {int}
    assert not is_symbolic(5)


def test_clipping_is_right_for_numbers_and_tensors():
    x = torch.arange(-3, 4)
    assert torch.equal(at_least(x, -1), x.clamp(min=-1)) and at_least(-3, -1) == -1
    assert torch.equal(at_most(x, 2), x.clamp(max=2)) and at_most(3, 2) == 2


@needs_compiled_kernels_on_the_cpu
def test_positions_clipped_by_clamp_are_no_index():
    """Which ``at_least`` goes around, by ``torch.where``."""

    def first_blocks(clipped, blocks):
        return clipped(128 * torch.arange(5) - 70, 0) // 128 + blocks

    blocks = torch.zeros(5, dtype=torch.int64)

    def check(clipped):
        found = torch.compile(first_blocks, fullgraph=True)(clipped, blocks)
        assert found.tolist() == [0, 0, 1, 2, 3]

    check(at_least)
    if TORCH == (2, 13):
        assert_refused(lambda: check(torch.clamp), "vr must not be None", "at_least")
    else:
        check(torch.clamp)


@needs_compiled_kernels_on_the_cpu
def test_what_kernels_take_is_what_they_are_given():
    for dtype in KERNEL_DTYPES:
        assert unavailable(torch.device("cpu"), dtype) is None
    assert "float64" in str(unavailable(torch.device("cpu"), torch.float64))
    assert "meta" in str(unavailable(torch.device("meta")))


@pytest.mark.gpu
def test_narrow_heads_are_refused_by_kernels_of_the_gpu():
    """Which ``LEAST_HEAD`` goes around."""
    q = torch.randn(1, 2, 256, 8, device="cuda")
    local_attention(q, q, q, 64, backend="flex")
    with pytest.raises(Exception, match="(?i)embedding|head|dimension"):
        torch.compile(flex_attention, fullgraph=True)(q, q, q)


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
def test_a_kernel_is_made_for_a_number_of_heads(monkeypatch):
    """Which ``plain_int`` goes around."""
    layer = LocalAttention(16, True, autopad=True, dropout=0.0, backend="flex")
    q, k, v = (torch.randn(2, 3, 100, d) for d in (24, 24, 40))
    monkeypatch.setattr(graph, "plain_int", lambda size: size)
    monkeypatch.setattr(spec, "plain_int", lambda size: size)
    with torch.no_grad(), pytest.raises(torch._inductor.exc.InductorError):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        compiled(q, k, v, attn_bias=torch.randn(3, 16, 32))
