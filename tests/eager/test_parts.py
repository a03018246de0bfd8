"""Long causal windows, computed in parts that see no keys after themselves."""

from unittest.mock import patch

import pytest
import torch
from compilers import quick
from eager_cases import check_case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from flexlocal import Window, local_attention
from flexlocal.eager import autograd, cutting, tiles


def in_parts(part, least=1):
    return patch.multiple(cutting, _PART=part, _LEAST_SCORES=least)


@settings(max_examples=40)
@given(case=cases(), part=st.integers(1, 5), scores=st.sampled_from([300, 2**20]))
def test_outputs_and_gradients(case, part, scores):
    with in_parts(part), patch.object(autograd, "_SCORES_ON_CPU", scores):
        check_case(case, torch.float32)


CALLS = {
    "softcap, log-sum-exps": {"softcap": 2.0, "return_lse": True},
    "mask": {"mask": torch.rand(2, 700, generator=torch.Generator().manual_seed(0)) < 0.7},
    "sinks, dropout": {
        "sinks": torch.randn(6),
        "dropout": 0.3,
        "dropout_seed": torch.tensor(5),
    },
    "shared": {"shared_qk": True},
}


@pytest.mark.parametrize("name", quick(CALLS, kept=["softcap, log-sum-exps", "mask"]))
def test_the_results_are_those_of_whole_windows(name, monkeypatch):
    """Of sizes at which windows are cut by themselves."""
    cut, as_it_is = [], tiles._of_one_tile
    noted = lambda *call: cut.append(call) or as_it_is(*call)  # noqa: E731
    monkeypatch.setattr(tiles, "_of_one_tile", noted)
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, 700, 8), (2, 2, 700, 8), (2, 2, 700, 5)
    q, k, v = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    )

    def trained():
        out = local_attention(q, k, v, Window(300, causal=True), **CALLS[name])
        out, *lse = out if isinstance(out, tuple) else (out,)
        total = out.square().sum() + sum(x.sum() for x in lse)
        return out, *lse, *torch.autograd.grad(total, (q, k, v))

    found = trained()
    assert len(cut) == 2  # forward and backward
    with in_parts(128, least=2**60):
        whole = trained()
    assert len(cut) == 2
    for ours, true in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


def test_no_portion_is_larger_for_it():
    """Of one key head's queries at least: many heads of long windows are not cut so."""
    q, k = torch.empty(1, 32, 8192, 4), torch.empty(1, 2, 8192, 4)
    few, many = q[:, :4], q
    pay = [cutting._parts_pay(x, k, Window(2048, causal=True)) for x in (few, many)]
    assert pay == [True, False]
