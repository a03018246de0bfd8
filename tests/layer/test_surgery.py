"""Other modules in the place of the layer's dropout, and rates that are set on it."""

import pytest
import torch
from torch import nn

from flexlocal import LocalAttention


def call(layer):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 12, size, generator=generator) for size in (8, 8, 5))
    return layer(q, k, v.requires_grad_()), v


def test_a_module_without_a_rate_takes_the_place_of_dropout():
    layer = LocalAttention(4, causal=True, dropout=0.5)
    plain, _ = call(LocalAttention(4, causal=True, dropout=0.0))
    layer.dropout = nn.Identity()
    assert torch.equal(call(layer)[0], plain)
    layer.dropout = nn.Dropout1d(0.5).eval()
    assert torch.equal(call(layer)[0], plain)


def test_a_rate_of_1_drops_every_weight():
    layer = LocalAttention(4, causal=True)
    layer.dropout.p = 1
    out, v = call(layer)
    assert not out.any()
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert not grad.any()
    assert layer.explain(out).backend == "eager"
    assert call(layer.eval())[0].any()


def test_a_module_that_is_no_dropout_is_refused_by_name():
    layer = LocalAttention(4, causal=True)
    layer.dropout = nn.Softmax(-1)
    says = "^dropout must be a module with a rate p, .*nn.Identity, got type Softmax$"
    with pytest.raises(TypeError, match=says):
        call(layer)
    assert call(layer.eval())[0].any()


@pytest.mark.parametrize("xpos", [False, True])
def test_a_layer_built_in_inference_mode_trains(xpos):
    with torch.inference_mode():
        layer = LocalAttention(4, causal=True, dim=8, use_xpos=xpos, dropout=0.0)
    out, v = call(layer)
    assert torch.autograd.grad(out.sum(), v)[0].any()
