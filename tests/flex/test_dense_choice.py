"""Which calls are short enough for ``scaled_dot_product_attention``'s kernels on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlocal import Rotary, Window, dispatch
from flexlocal.flex import dense, dense_tables, engines
from flexlocal.flex.tuning import STOCK, overriding
from flexlocal.spec import Inputs, Spec

H200 = (9, 0)
SLIDES = Window(100, causal=True, exact=True)


def on_gpu(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


Q = on_gpu(2, 6, 300, 64)
WHOLE = on_gpu(1, 6, 2100, 64)
LEFT = {
    "fp64": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float64)),
    "a head of 33": dict.fromkeys("qkv", on_gpu(2, 6, 300, 33)),
    "values": {"v": on_gpu(2, 6, 300, 32)},
    "a learned bias": {"bias": torch.zeros(6, 100, 200, dtype=torch.bfloat16).requires_grad_()},
    "a bias in fp32": {"bias": torch.zeros(6, 100, 200)},
    "a bias for each row": {"bias": torch.zeros(12, 100, 200, dtype=torch.bfloat16)},
    "shared_qk": {"shared_qk": True},
    "dropout": {"dropout": 0.1},
    "xpos": {"xpos_base": 64.0},
    "softcap": {"softcap": 30.0},
    "log-sum-exps": {"return_lse": True},
    "sinks": {"sinks": torch.zeros(6)},
    "cumulative lengths": {"cu_seqlens": torch.tensor([0, 100, 300])},
    "documents by head": {"documents": torch.zeros(12, 300, dtype=torch.int32)},
    "documents of rows": {
        **dict.fromkeys("qkv", on_gpu(5, 300, 64)), "documents": torch.zeros(300, dtype=torch.int32)
    },
    "documents at an offset": {
        "documents": torch.zeros(300, dtype=torch.int32), "q_offset": 1, "kv_offset": 0
    },
    "offsets": {"q_offset": 1, "kv_offset": 1},
    "options": {"kernel_options": {}},
    "scale zero": {"scale": 0.0},
    "scale below zero": {"scale": -0.3},
    "by name": {"backend": "flex"},
    "too long": dict.fromkeys("qkv", on_gpu(1, 1, 321, 64)),
    "too many": dict.fromkeys("qkv", on_gpu(40, 6, 300, 64)),
    "too long for a mask": {**dict.fromkeys("qkv", WHOLE), "mask": torch.ones(1, 2100) > 0},
    "a mask of too long documents": {
        **dict.fromkeys("qkv", WHOLE), "documents": torch.zeros(2100, dtype=torch.int32)
    },
}  # fmt: skip
SERVED_TOO = {
    "plain": {},
    "rows": dict.fromkeys("qkv", on_gpu(5, 300, 64)),
    "grouped": dict.fromkeys("kv", on_gpu(2, 3, 300, 64)),
    "fp32": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float32)),
    "fp16": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float16)),
    "a mask": {"mask": torch.ones(2, 300, dtype=torch.bool)},
    "rotary": {"inv_freq": Rotary(64).inv_freq},
    "documents": {"documents": torch.zeros(300, dtype=torch.int32)},
    "documents by entry": {"documents": torch.zeros(2, 300, dtype=torch.int32)},
    "a scale": {"scale": 0.3},
    "a bias": {"bias": torch.zeros(3, 100, 200, dtype=torch.bfloat16)},
}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(dense_tables, "LONGEST", 320)
    monkeypatch.setattr(dense, "capability", lambda device: H200)
    monkeypatch.setattr(dense, "has_address", lambda x: True)  # stand-ins serve here
    monkeypatch.setattr(dense, "MOST_SCORES", 4 * 2 * 6 * 300 * 300)


def served(window=SLIDES, **changes):
    arguments = {"q": Q, "k": Q, "v": Q, **changes}
    known = {name: arguments.pop(name) for name in Spec._fields if name in arguments}
    return dense.serves(Spec(window, **known), Inputs(**arguments))


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_other_kernels(name, measured):
    assert served()
    assert not served(Window(2100, causal=True) if "a mask" in name else SLIDES, **LEFT[name])


@pytest.mark.parametrize("name", SERVED_TOO)
def test_what_is_served(name, measured, monkeypatch):
    assert served(**SERVED_TOO[name])
    monkeypatch.setattr(dense, "capability", lambda device: (8, 0))  # not measured
    assert not served(**SERVED_TOO[name])


def test_what_hides_nothing_may_be_longer(measured):
    longer = dict.fromkeys("qkv", WHOLE)
    assert served(Window(2100, causal=True), **longer)
    assert not served(Window(1000, causal=True), **longer)
    assert not served(Window(9000, causal=True), **dict.fromkeys("qkv", on_gpu(1, 2, 8200, 64)))


def test_where_the_same_bits_are_asked_for_it_does_not_serve(measured):
    torch.use_deterministic_algorithms(True)
    try:
        assert not served()
    finally:
        torch.use_deterministic_algorithms(False)
    with overriding(STOCK):  # as a sweep does
        assert not served()
    assert served()


def test_the_choice_says_so(measured, monkeypatch):
    monkeypatch.setattr(dispatch.support, "refusal", lambda *_: None)
    choice = dispatch.choose(Spec(SLIDES), Inputs(Q, Q, Q))
    assert (choice.backend, choice.engine) == ("flex", "dense")
    assert "scaled_dot_product_attention's: for so few tokens" in str(choice)
    assert engines.preferred(Spec(SLIDES, backend="flex"), Inputs(Q, Q, Q)) == ("flex", None)
