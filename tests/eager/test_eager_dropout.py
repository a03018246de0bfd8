"""Dropout on the eager path: which weights, how many, and the gradients of the rest."""

from dataclasses import replace

import pytest
import torch
from budget import gradients
from eager_cases import CAUSAL, SMALL, WIDE, dropped
from strategies import Window as Rule

from flexlocal import LocalAttention


def dropout_case(**changes):
    return replace(SMALL, **{"n": 36, "lead": (2, 6), "bias_heads": 3, **changes})


def plain_weights(case):
    """(*lead, n, n) weights without dropout, by the oracle."""
    unit = torch.eye(case.n, dtype=torch.float64)
    call = case.tensors(torch.float64)
    unit = unit.expand(*call.k.shape[:-2], case.n, case.n)
    return case.truth(replace(call, v=unit)).detach()


def test_dropout_keeps_or_drops_whole_weights():
    """A kept weight is divided by 1 - p; the normaliser counts the dropped ones too."""
    case = dropout_case(mask_batch=2, hide_a_row=False)
    p = 0.4
    found, full = dropped(case, p, torch.tensor(1234)), plain_weights(case)
    keep = found != 0
    torch.testing.assert_close(found, full * keep / (1 - p), rtol=1e-9, atol=1e-12)
    share = keep[full > 1e-9].double().mean().item()
    count = int((full > 1e-9).sum())
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5


def test_dropout_is_the_seeds():
    case = dropout_case()
    first, again, other = (dropped(case, 0.4, torch.tensor(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    seen = plain_weights(case) != 0
    agree = ((first != 0) == (other != 0))[seen].double().mean().item()
    assert abs(agree - (0.4**2 + 0.6**2)) < 0.06  # two independent draws


def test_dropout_differs_between_rows_queries_and_keys():
    """Independent along every axis: a hash that forgets one repeats itself along it."""
    window = Rule(size=40, causal=False, look_backward=0, look_forward=0, exact=False)
    case = dropout_case(window=window, autopad=True, bias_heads=None)
    keep = dropped(case, 0.5, torch.tensor(3)) != 0
    keep = keep.reshape(12, 36, 36).double()
    for axis in range(3):
        left = keep.narrow(axis, 0, keep.shape[axis] - 1)
        right = keep.narrow(axis, 1, keep.shape[axis] - 1)
        assert abs((left == right).double().mean().item() - 0.5) < 0.05, f"axis {axis}"


def test_dropout_draws_anew_without_a_seed():
    case = dropout_case()
    torch.manual_seed(0)
    first, second = dropped(case, 0.4, None), dropped(case, 0.4, None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, dropped(case, 0.4, None))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_qk": True, "rotary": True},
        {"window": CAUSAL},
        {"kv_heads": 1, "bias_heads": None},
        {"autopad": True, "n": 31},
        {"window": WIDE.window, "n": WIDE.n, "d": 6}
        | {"lead": (1, 4), "kv_heads": 2, "bias_heads": 2},
    ],
    ids=["plain", "shared_qk", "causal exact", "grouped", "autopad", "wide"],
)
def test_gradients_under_dropout(changes):
    """The same seed drops the same weights whatever the values: the oracle can be told which."""
    case = dropout_case(**changes)
    p, seed = 0.3, torch.tensor(99)
    keep = dropped(case, p, seed) != 0
    call = case.tensors(torch.float64)
    layer = LocalAttention(**{**case.arguments(), "dropout": p}, backend="eager").double()
    out = layer(call.q, call.k, call.v, attn_bias=call.bias, dropout_seed=seed)
    tables = {"frequencies": layer.rel_pos.inv_freq} if case.rotary else {}  # they are fp32
    truth = case.truth(call, keep=keep, dropout=p, **tables)
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9)
    ours, exact = gradients(out, call), gradients(truth, call)
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-8, atol=1e-8)


def test_no_dropout_in_evaluation():
    case = dropout_case()
    call = case.tensors(torch.float64)
    layer = LocalAttention(**{**case.arguments(), "dropout": 0.9}, backend="eager").double().eval()
    out = layer(call.q, call.k, call.v, attn_bias=call.bias, dropout_seed=torch.tensor(1))
    torch.testing.assert_close(out, case.truth(call), rtol=1e-9, atol=1e-9)


def test_the_submodule_decides():
    """Its rate and its mode, as in the documented layer."""
    layer, q, v = LocalAttention(4, dropout=0.9), torch.randn(2, 12, 6), torch.randn(2, 12, 5)
    whole = layer.eval()(q, q, v)
    layer.train()
    assert not torch.equal(layer(q, q, v), whole)
    layer.dropout.eval()
    assert torch.equal(layer(q, q, v), whole)
    layer.dropout.train()
    layer.dropout.p = 0.0
    assert torch.equal(layer(q, q, v), whole)
