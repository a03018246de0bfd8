"""Plans: a warm call is not checked again, and no other call is taken for it."""

import pytest
import torch

from flexlocal import LocalAttention, Window, dispatch, explain, local_attention
from flexlocal.rotary import Rotary

Q, K, V = torch.randn(3, 2, 3, 20, 8)
BIAS = torch.randn(3, 5, 15)
MASK = torch.ones(2, 20, dtype=torch.bool)

GOOD_THEN_BAD = [
    ({"scale": 1.0}, {"scale": True}, TypeError, "scale"),
    ({"dropout": 0.0}, {"dropout": False}, TypeError, "dropout"),
    ({"window": 1}, {"window": True}, TypeError, "window"),
    ({"mask": MASK}, {"mask": MASK.int()}, ValueError, "mask"),
    ({"mask": MASK}, {"mask": MASK[:, :-1]}, ValueError, "mask"),
    ({"attn_bias": BIAS}, {"attn_bias": BIAS.long()}, ValueError, "attn_bias"),
    ({"attn_bias": BIAS}, {"attn_bias": BIAS.repeat(2, 1, 1)[:4]}, ValueError, "attn_bias"),
    ({"rotary": Rotary(8)}, {"rotary": Rotary(6)}, ValueError, "rotary's dim"),
    ({}, {"k": K.double()}, ValueError, "k"),
    ({}, {"k": K[:, :2], "v": V[:, :2]}, ValueError, "k"),
    ({}, {"v": V[..., :-1, :]}, ValueError, "v"),
    ({}, {"v": None}, TypeError, "v"),
    ({"shared_qk": True}, {"shared_qk": 1}, TypeError, "shared_qk"),
    ({}, {"rotary": True}, TypeError, "rotary"),
    ({}, {"backend": "flux"}, ValueError, "backend"),
    ({}, {"dropout_seed": 3, "dropout": 0.1}, TypeError, "dropout_seed"),
]


def call(**changes):
    arguments = {"q": Q, "k": K, "v": V, "window": 5, "backend": "eager", **changes}
    return local_attention(**arguments)


@pytest.mark.parametrize(("good", "bad", "error", "name"), GOOD_THEN_BAD)
def test_a_bad_call_is_refused_after_a_good_one(good, bad, error, name):
    for _ in range(2):
        call(**good)
        with pytest.raises(error, match=f"^{name} must"):
            call(**bad)


def test_calls_of_a_kind_share_a_plan(monkeypatch):
    made = []
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    as_it_is = dispatch._prepare
    monkeypatch.setattr(dispatch, "_prepare", lambda *more: made.append(1) or as_it_is(*more))
    for _ in range(3):
        call()
        call(q=Q + 1, mask=MASK)
    assert len(made) == 2
    with torch.no_grad():
        call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call().dtype == torch.bfloat16
    assert call().dtype == torch.float32
    assert len(made) == 4


@pytest.mark.usefixtures("graphs_without_code")
def test_a_plan_knows_what_wants_a_gradient():
    """The flex path of a CPU has none to give, and says so."""
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        for learning in (False, True):
            call(q=Q.clone().requires_grad_(learning), backend="flex")


def test_a_plan_knows_how_tensors_lie(monkeypatch):
    """FlashAttention 4's kernel is taken for contiguous ones alone."""
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    call()
    call(q=Q.transpose(1, 2).contiguous().transpose(1, 2))
    assert len(dispatch._PREPARED) == 2


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    monkeypatch.setattr(dispatch, "_MOST_KEPT", 4)
    for n in range(1, 12):
        call(q=Q[:, :, :n], k=K[:, :, :n], v=V[:, :, :n])
        assert len(dispatch._PREPARED) <= 4


def test_a_reason_is_given_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    with pytest.warns(UserWarning, match="^too wide$"):
        dispatch.warn_once("too wide")
    dispatch.warn_once("too wide")  # or this would be an error
    with pytest.warns(UserWarning, match="too deep"):
        dispatch.warn_once("too deep")


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda", 0)


def test_a_call_on_a_gpu_that_goes_unfused_is_warned_of(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setattr(dispatch, "checked", lambda spec, inputs: (spec, inputs))
    monkeypatch.setattr(dispatch.support, "refusal", lambda *_: "too wide")
    q = Q.as_subclass(OnGPU)
    says = "^local attention takes its eager path, which is slower: too wide. backend='eager' asks"
    with pytest.warns(UserWarning, match=says):
        dispatch._prepare(dispatch.Spec(Window(5)), dispatch.Inputs(q, q, q))
    by_name = dispatch.Spec(Window(5), backend="eager")
    dispatch._prepare(by_name, dispatch.Inputs(q, q, q))  # or this would be an error


def test_options_that_no_kernel_gets_are_mentioned():
    said = "auto takes the fused kernel on a GPU, and q is on cpu"
    assert explain(Q, K, V, 5, dropout_seed=torch.tensor(1), dropout=0.1).reason == said
    unused = explain(Q, K, V, 5, kernel_options={"BLOCK_M": 64}, dropout=0.1)
    assert unused.reason == f"{said}; kernel_options have no kernel to go to"


def test_a_warning_is_given_where_the_layer_is_called(monkeypatch):
    """As if a call on the GPU came to be planned, by a function of the library's."""
    monkeypatch.setattr(dispatch, "_SAID", set())
    library = {"__name__": "flexlocal.more", "dispatch": dispatch, "attend": dispatch.attend}
    exec("def warned(*call): dispatch.warn_once('too wide'); return attend(*call)", library)
    monkeypatch.setattr(dispatch, "attend", library["warned"])
    with pytest.warns(UserWarning, match="too wide") as warned:
        LocalAttention(4, dropout=0.0)(Q, K, V)
    assert [warning.filename for warning in warned] == [__file__]
