"""Rotation by position: its values, and its gradients."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlocal import LocalAttention, Window
from flexlocal.flex import attend as fused
from flexlocal.flex.tuning import STOCK
from flexlocal.rotary import Rotary
from flexlocal.rotation import rotate, table_of
from flexlocal.spec import Inputs, Spec


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 8))
def test_values_and_gradient(rows, n, pairs):
    x = torch.randn(rows, n, 2 * pairs, dtype=torch.float64, requires_grad=True)
    position = torch.randint(10**6, (n,))
    inv_freq = Rotary(2 * pairs).inv_freq
    found = rotate(x, table_of(position, inv_freq, x.dtype))
    true = oracle.rotate(x, position, inv_freq)
    torch.testing.assert_close(found, true)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, x, grad)[0] for out in (found, true)]
    torch.testing.assert_close(*gradients)


def test_positions_broadcast():
    x, position = torch.randn(2, 5, 3, 8), torch.arange(5)
    inv_freq = Rotary(8).inv_freq
    found = rotate(x, table_of(position[:, None], inv_freq, x.dtype))
    assert found.is_contiguous()
    expected = rotate(x.transpose(1, 2), table_of(position, inv_freq, x.dtype)).transpose(1, 2)
    assert torch.equal(found, expected)


def test_gradients_of_gradients():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    table = table_of(torch.arange(3), Rotary(4).inv_freq, x.dtype)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, table), x)


def test_the_factor_multiplies_both_halves():
    x, factor = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    position, inv_freq = torch.arange(5), Rotary(6).inv_freq
    found = rotate(x, table_of(position, inv_freq, x.dtype, factor))
    plain = rotate(x, table_of(position, inv_freq, x.dtype))
    torch.testing.assert_close(found, plain * factor.repeat(1, 2))


def test_transposed_views_are_rotated_as_they_lie(monkeypatch):
    """The kernel's output lies as its query does: else a model would copy it, and its gradient."""
    seen = []

    def kernel(q, k, v, **_):
        seen.extend((q.stride(), k.stride()))
        return q

    monkeypatch.setattr(fused, "flex_attention", kernel)
    spec = Spec(Window(4, causal=True), scale=1.0)
    for x in (torch.randn(2, 3, 5, 32), torch.randn(2, 5, 3, 32).transpose(1, 2)):
        inputs = Inputs(x, x, x, inv_freq=Rotary(32).inv_freq)
        lists = fused.blocks_of(spec, spec.rule, inputs, STOCK).lists(x.device)
        fused.attend(spec, inputs, STOCK, lists)
        assert seen == [x.stride(), x.stride()]
        seen.clear()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((7,), "dim must be even for rotary embeddings, got 7"),
        ((0,), "dim must be at least 2, got 0"),
        ((8, True), "scale_base must be given with use_xpos, got None"),
        ((8, True, 0.0), "scale_base must be finite and above 0, got 0.0"),
        ((8, True, float("inf")), "scale_base must be finite and above 0, got inf"),
        ((8, False, -1), "scale_base must be finite and above 0, got -1"),
        ((8, True, "3"), "scale_base must be a number, got '3' of type str"),
        ((8, "no", 3.0), "use_xpos must be True or False, got 'no' of type str"),
    ],
)
def test_what_cannot_rotate_is_refused(arguments, says):
    with pytest.raises((ValueError, TypeError), match=f"^{says}$"):
        Rotary(*arguments)


def test_theta_is_the_base_of_the_frequencies():
    c = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(Rotary(8, theta=500.0).inv_freq.double(), 500.0 ** (-2 * c / 8))
    with pytest.raises(ValueError, match="^theta must be finite and above 0, got -1$"):
        Rotary(8, theta=-1)
    layer = LocalAttention(4, dim=8, theta=500.0)
    rounded = {name: x.bfloat16() for name, x in layer.state_dict().items()}
    layer.load_state_dict(rounded)
    assert torch.equal(layer.rel_pos.inv_freq, Rotary(8, theta=500.0).inv_freq)


@pytest.mark.parametrize("xpos", [False, True])
def test_a_call_gives_what_the_documented_module_gives(xpos):
    upstream = pytest.importorskip(
        "local_attention.rotary", reason="local-attention is not installed"
    )
    theirs = upstream.SinusoidalEmbeddings(8, scale_base=6.0, use_xpos=xpos)
    keys = torch.randn(2, 3, 19, 8)
    for ours, expected in zip(Rotary(8, xpos, 6.0)(keys), theirs(keys), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        torch.testing.assert_close(ours, expected)


def test_a_call_with_positions():
    rotary, keys = Rotary(8, True, 6.0), torch.randn(2, 19, 8)
    angles, factors = rotary(keys)
    shuffled = torch.randperm(19).expand(2, 19)
    found = rotary(keys, shuffled)
    assert torch.equal(found[0], angles[shuffled]) and torch.equal(found[1], factors[shuffled])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_frequencies_are_exact_whatever_they_were_saved_in(dtype, assign):
    saved = {name: x.to(dtype) for name, x in LocalAttention(4, dim=32).state_dict().items()}
    layer = LocalAttention(4, dim=32)
    layer.load_state_dict(saved, assign=assign)
    assert layer.rel_pos.inv_freq.dtype == torch.float32
    assert torch.equal(layer.rel_pos.inv_freq, Rotary(32).inv_freq)
    assert all(x.dtype == dtype for x in saved.values())  # the caller's are left alone
    saved["rel_pos.inv_freq"] *= 2  # others than those of the formula
    layer.load_state_dict(saved, assign=assign)
    assert layer.rel_pos.inv_freq.dtype == torch.float32
    assert torch.equal(layer.rel_pos.inv_freq, saved["rel_pos.inv_freq"].float())


def test_a_layer_from_the_meta_device_is_whole_once_it_is_loaded():
    made = LocalAttention(4, dim=8, use_xpos=True, dropout=0.0, backend="eager")
    with torch.device("meta"):
        layer = LocalAttention(4, dim=8, use_xpos=True, dropout=0.0, backend="eager")
    layer.load_state_dict(made.state_dict(), assign=True)
    q, k, v = (torch.randn(2, 12, size) for size in (8, 8, 5))
    assert torch.equal(layer(q, k, v), made(q, k, v))
