"""One graph for all lengths: `torch.jit.trace`, and `torch.export` over a named range of them."""

import pytest
import torch
from compilers import quick

from flexlocal import LocalAttention, Rotary, Window, attention_map, local_attention

HEADS, D = 2, 4
BOTH_WAYS, BACK = Window(5), Window(5, causal=True)
CALLS = {
    "rotary, back": ({"window": BACK, "rotary": Rotary(D)}, ()),
    "exact": ({"window": Window(3, exact=True)}, ()),
    "below one window": ({"window": Window(256, causal=True)}, ()),
    "xpos": ({"window": BOTH_WAYS, "rotary": Rotary(D, True, 4.0)}, ()),
    "mask, with log-sum-exps": ({"window": BOTH_WAYS, "return_lse": True}, ("mask",)),
    "shared, capped": ({"window": BACK, "shared_qk": True, "softcap": 3.0}, ()),
    "bias": ({"window": BACK, "attn_bias": torch.randn(HEADS, 5, 10)}, ()),
    "documents, mask": ({"window": BOTH_WAYS}, ("mask", "documents")),
    "one offset": ({"window": BOTH_WAYS, "q_offset": 3, "kv_offset": 3}, ()),
}
LENGTHS = (37, 64, 128, 200, 5, 3, 301)
"""Shorter and longer than a tile of 64 and than a window, multiples of either and none."""


class Call(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.arguments, self.more = CALLS[name]

    def forward(self, q, k, v, *more):
        given = dict(zip(self.more, more, strict=True))
        return local_attention(q, k, v, **self.arguments, **given)

    def inputs(self, n, batch=1):
        q, k, v = torch.randn(3, batch, HEADS, n, D)
        made = {"mask": torch.rand(batch, n) < 0.7, "documents": torch.arange(n)[None] // 7}
        return q, k, v, *(made[name].expand(batch, -1) for name in self.more)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
@pytest.mark.parametrize("name", quick(CALLS, kept=["rotary, back", "documents, mask"]))
def test_a_trace_serves_every_length_and_batch(name):
    call, first = Call(name), 200 if name == "exact" else 37
    traced = torch.jit.trace(call, call.inputs(first))
    for batch, n in enumerate(LENGTHS, start=1):
        inputs = call.inputs(n, batch)
        assert_same(traced(*inputs), call(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_a_traced_layer_takes_gradients():
    layer, q = LocalAttention(5, dim=D, autopad=True, dropout=0.0), torch.randn(1, 2, 9, D)
    traced = torch.jit.trace(layer, (q, q, q))
    x = torch.randn(1, 2, 70, D, requires_grad=True)
    found, expected = (
        torch.autograd.grad(run(x, x, x).square().sum(), x)[0] for run in (traced, layer)
    )
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("first", "name"),
    [
        (37, "rotary, back"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (200, "rotary, back"),
                (37, "xpos"),
                (200, "mask, with log-sum-exps"),
                (37, "documents, mask"),
            )
        ),
    ],
)
def test_an_export_over_a_named_range_serves_all_of_it(name, first):
    call = Call(name)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = [{2: length}] * 3
    if call.more:
        shapes.append(tuple({1: length} for _ in call.more))
    program = torch.export.export(call, call.inputs(first), dynamic_shapes=tuple(shapes))
    for n in LENGTHS:
        inputs = call.inputs(n)
        assert_same(program.module()(*inputs), call(*inputs))


@pytest.mark.slow
def test_an_export_over_a_named_range_of_multiples_without_autopad():
    layer, q = LocalAttention(8, causal=True, dropout=0.0), torch.randn(1, 2, 40, D)
    windows = torch.export.Dim("windows", min=1, max=512)
    shapes = ({2: 8 * windows},) * 3
    program = torch.export.export(layer, (q, q, q), dynamic_shapes=shapes)
    for n in (8, 64, 504):
        q = torch.randn(1, 2, n, D)
        assert_same(program.module()(q, q, q), layer(q, q, q))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own exporter
def test_what_cannot_be_served_says_what_can(tmp_path):
    layer, q = LocalAttention(5, autopad=True, dropout=0.0).eval(), torch.randn(1, 2, 9, D)
    for model, kind in ((layer, TypeError), (torch.nn.Sequential(Attends(layer)), RuntimeError)):
        inputs = (q, q, q) if model is layer else (q,)
        with pytest.raises(kind, match=r"torch\.onnx\.export\(\.\.\., dynamo=True\)"):
            torch.onnx.export(model, inputs, tmp_path / "x.onnx", dynamo=False)
    with pytest.raises(RuntimeError, match="attention_map cannot be traced.*torch.export takes it"):
        torch.jit.trace(lambda q: attention_map(q, q, 5), q)


class Attends(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x)


def test_surplus_arguments():
    layer, q = LocalAttention(5, autopad=True), torch.randn(1, 9, D)
    with pytest.raises(TypeError, match="3 to 7 arguments by place, got 8: the others go by name"):
        layer(q, q, q, None, None, None, None, None)
