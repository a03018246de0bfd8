"""Devices that hold no float64, as Apple's GPUs: the meta device stands in for one, or the CPU."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexlocal import LocalAttention, Rotary, Window, angles, local_attention
from flexlocal import rotary as rotary_module
from flexlocal import xpos as xpos_module
from flexlocal.eager import formula
from flexlocal.rotation import rotate, table_of


class RefusesFloat64(TorchDispatchMode):
    """No operator takes or makes a float64 tensor on the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64:
                raise TypeError(f"{function} with float64 on the device")
        return result


@pytest.fixture
def lacking(monkeypatch):
    """From a type of device to what has none of that type hold float64."""

    def lack(kind):
        for module in (angles, rotary_module, xpos_module, formula):
            monkeypatch.setattr(module, "has_float64", lambda device: device.type != kind)

    return lack


CALLS = {
    "rotary": {"dim": 8},
    "xpos": {"dim": 8, "use_xpos": True},
    "dropout": {"dropout": 0.3},
    "capped": {"softcap": 3.0, "shared_qk": True},
}
PLACED = {"documents": torch.arange(30) // 11, "q_offset": torch.tensor([5, 2])}


@pytest.mark.parametrize("place", [None, *PLACED])
@pytest.mark.parametrize("name", CALLS)
def test_no_operator_on_the_device_sees_float64(name, place, lacking):
    lacking("meta")
    layer = LocalAttention(5, **{"dropout": 0.0, **CALLS[name]}).to("meta")
    q, k, v = (torch.randn(2, 3, 30, 8, device="meta", requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 5, 15, device="meta", requires_grad=True)
    mask = torch.ones(2, 30, dtype=torch.bool, device="meta")
    sinks = torch.zeros(3, device="meta", requires_grad=True)
    placed = {} if place is None else {place: PLACED[place].to("meta")}
    with RefusesFloat64():
        out, lse = layer(q, k, v, mask=mask, attn_bias=bias, sinks=sinks, return_lse=True, **placed)
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, bias, sinks))
        if layer.rel_pos is not None:
            layer.rel_pos(k)


def test_the_stand_in_would_see_it():
    layer, q = LocalAttention(5, dim=8).to("meta"), torch.randn(1, 10, 8, device="meta")
    with RefusesFloat64(), pytest.raises(TypeError, match="float64 on the device"):
        layer(q, q, q)


@given(
    positions=st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=20),
    theta=st.floats(0.5, 1e8),
    pairs=st.integers(1, 40),
)
def test_angles_in_integers(positions, theta, pairs):
    """Against the product in Python's integers, which know no rounding."""
    inv_freq = Rotary(2 * pairs, theta=theta).inv_freq
    found = angles._by_integers(torch.tensor(positions), inv_freq)
    assert found.dtype == torch.float32 and found.abs().max() <= math.pi * (1 + 1e-7)
    for row, position in zip(found.tolist(), positions, strict=True):
        for angle, frequency in zip(row, inv_freq.tolist(), strict=True):
            top, bottom = frequency.as_integer_ratio()
            true = math.remainder(float_of(position * top, bottom), 2 * math.pi)
            off = math.remainder(angle - true, 2 * math.pi)
            assert abs(off) <= 2e-7 * max(1e-3, abs(angle)) + 1e-8


def float_of(top, bottom):
    """``top / bottom`` less whole turns, by pi to 60 digits."""
    scale = 10**60
    turn = 2 * 3141592653589793238462643383279502884197169399375105820974944  # / 10**60
    return top * scale // bottom % turn / scale


def test_frequencies_of_a_user(lacking):
    """Zero, as in partial rotary, and above 1."""
    lacking("cpu")
    inv_freq = torch.tensor([0.0, 1.0, 3.75, 1e-30, 2.0**-20])
    x, position = torch.randn(7, 10), torch.tensor([0, 1, 5, 999, 10**6, 2**24 + 1, -3])
    found = rotate(x, table_of(position, inv_freq, x.dtype))
    torch.testing.assert_close(found, oracle.rotate(x.double(), position, inv_freq).float())


@pytest.mark.parametrize("window", [Window(5), Window(4, causal=True, exact=True)])
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("offset", [0, 10**6])
def test_results_and_gradients(window, xpos, offset, lacking):
    rotary = Rotary(8, xpos, 4.0 if xpos else None)
    q, k, v = torch.randn(3, 2, 3, 31, 8).requires_grad_()
    runs = []
    for kind in ("none", "cpu"):
        lacking(kind)
        out = local_attention(q, k, v, window, rotary=rotary, q_offset=offset, kv_offset=offset - 2)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        runs[-1] += rotary(k)
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_windows_whose_factors_want_float64_are_refused(lacking):
    lacking("cpu")
    layer, q = LocalAttention(64, dim=8, use_xpos=True, xpos_scale_base=2.0), torch.randn(1, 128, 8)
    with pytest.raises(ValueError, match="scale_base must be larger on cpu.*no float64.*got 2.0"):
        layer(q, q, q)
