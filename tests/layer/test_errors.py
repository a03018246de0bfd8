"""Every error of the specification: its type, the argument's name, what came, what would do.

Run for every backend, the fused one too: a wrong argument is refused before any work, so nothing
here compiles.
"""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.convert_frame

from flexlocal import LocalAttention, Rotary, local_attention

B, H, N, D, D_V, W = 2, 3, 20, 6, 7, 5


def tensors(**changes):
    call = {
        "q": torch.randn(B, H, N, D),
        "k": torch.randn(B, H, N, D),
        "v": torch.randn(B, H, N, D_V),
    }
    return {**call, **changes}


@dataclass(frozen=True)
class Wrong:
    """One wrong argument. `says`: its name, then other parts of the message."""

    name: str
    kind: type
    says: tuple
    layer: dict = field(default_factory=dict)
    call: Any = None  # None: the constructor must refuse; else a function -> arguments of the call


POSITIVE = "at least 1"
NOT_NEGATIVE = "at least 0"
INTEGER = "an int"
KEEP = "boolean (True = keep)"
XPOS = {"dim": D, "use_xpos": True}


def mask(*shape):
    return torch.ones(*shape, dtype=torch.bool)


CONSTRUCTOR = [
    Wrong("no softcap", ValueError, ("softcap", "above 0", "got 0"), {"softcap": 0}),
    Wrong("softcap below 0", ValueError, ("softcap", "above 0", "got -2.0"), {"softcap": -2.0}),
    Wrong("endless softcap", ValueError, ("softcap", "finite", "inf"), {"softcap": float("inf")}),
    Wrong("softcap of text", TypeError, ("softcap", "a number or None", "'5'"), {"softcap": "5"}),
    Wrong("no theta", ValueError, ("theta", "above 0", "got 0.0"), {"theta": 0.0}),
    Wrong("theta of None", TypeError, ("theta", "a number", "None"), {"theta": None}),
    Wrong("zero window", ValueError, ("window_size", "0", POSITIVE), {"window_size": 0}),
    Wrong("negative window", ValueError, ("window_size", "-3", POSITIVE), {"window_size": -3}),
    Wrong("float window", TypeError, ("window_size", "2.5", INTEGER), {"window_size": 2.5}),
    Wrong("text window", TypeError, ("window_size", "8", INTEGER), {"window_size": "8"}),
    Wrong("no window", TypeError, ("window_size", "None", INTEGER), {"window_size": None}),
    Wrong(
        "negative look_backward",
        ValueError,
        ("look_backward", "-1", NOT_NEGATIVE),
        {"look_backward": -1},
    ),
    Wrong(
        "negative look_forward",
        ValueError,
        ("look_forward", "-2", NOT_NEGATIVE),
        {"look_forward": -2},
    ),
    Wrong(
        "look_forward with causal",
        ValueError,
        ("look_forward", "2", "0 or None when causal"),
        {"causal": True, "look_forward": 2},
    ),
    *(
        Wrong(f"{name} in words", TypeError, (name, "'no'", "True or False"), {name: "no"})
        for name in (
            "causal",
            "shared_qk",
            "autopad",
            "exact_windowsize",
            "use_rotary_pos_emb",
            "use_xpos",
        )
    ),
    Wrong("odd dim", ValueError, ("dim", "7", "even"), {"dim": 7}),
    Wrong(
        "dim in words",
        TypeError,
        ("dim", "'abc'", "an int"),
        {"dim": "abc", "use_rotary_pos_emb": False},
    ),
    Wrong("dim of zero", ValueError, ("dim", "0", POSITIVE), {"dim": 0}),
    Wrong("text as scale", TypeError, ("scale", "'1'", "a number or None"), {"scale": "1"}),
    Wrong("endless scale", ValueError, ("scale", "inf", "finite"), {"scale": float("inf")}),
    *(
        Wrong(
            f"xpos base of {base!r}",
            kind,
            ("xpos_scale_base", repr(base), says),
            {"dim": D, "use_xpos": True, "xpos_scale_base": base},
        )
        for base, kind, says in (
            ("3", TypeError, "number"),
            (0, ValueError, "above 0"),
            (-2.0, ValueError, "above 0"),
            (float("inf"), ValueError, "finite"),
        )
    ),
    Wrong(
        "xpos base by default of windows of one token",
        ValueError,
        ("xpos_scale_base", "window_size // 2"),
        {"window_size": 1, "dim": D, "use_xpos": True},
    ),
    Wrong(
        "options as a number",
        TypeError,
        ("kernel_options", "3", "a dict or None"),
        {"kernel_options": 3},
    ),
    Wrong(
        "xpos with rotary off",
        ValueError,
        ("use_xpos", "use_rotary_pos_emb"),
        {"dim": D, "use_xpos": True, "use_rotary_pos_emb": False},
    ),
    Wrong("xpos without dim", ValueError, ("use_xpos", "dim"), {"use_xpos": True}),
    Wrong(
        "dropout of one", ValueError, ("dropout", "1.0", "at least 0 and below 1"), {"dropout": 1.0}
    ),
    Wrong("dropout below 0", ValueError, ("dropout", "-0.1", "at least 0"), {"dropout": -0.1}),
    Wrong("dropout of 1.5", ValueError, ("dropout", "1.5", "below 1"), {"dropout": 1.5}),
]
CALL = [
    Wrong(
        "ragged length",
        ValueError,
        ("q", "21", f"a multiple of window_size {W}", "unless autopad"),
        call=lambda: tensors(
            q=torch.randn(B, H, 21, D), k=torch.randn(B, H, 21, D), v=torch.randn(B, H, 21, D_V)
        ),
    ),
    Wrong(
        "override without xpos",
        ValueError,
        ("window_size", "10", "use_xpos"),
        {"dim": D},
        call=lambda: tensors(window_size=10),
    ),
    Wrong(
        "override of zero",
        ValueError,
        ("window_size", "0", POSITIVE),
        XPOS,
        call=lambda: tensors(window_size=0),
    ),
    Wrong(
        "override of text",
        TypeError,
        ("window_size", "10", INTEGER),
        XPOS,
        call=lambda: tensors(window_size="10"),
    ),
    Wrong(
        "ragged length for the override",
        ValueError,
        ("q", "20", "3", "autopad"),
        XPOS,
        call=lambda: tensors(window_size=3),
    ),
    Wrong(
        "another dim",
        ValueError,
        ("dim", f"q's head size {D}", "got 4"),
        {"dim": 4},
        call=tensors,
    ),
    Wrong(
        "another dim without rotary",
        ValueError,
        ("dim", f"q's head size {D}", "got 4"),
        {"dim": 4, "use_rotary_pos_emb": False},
        call=tensors,
    ),
    Wrong(
        "rotary left on another device",
        ValueError,
        ("rotary", "on q's device meta", "got cpu", ".to(q.device)"),
        {"dim": D},
        call=lambda: {name: x.to("meta") for name, x in tensors().items()},
    ),
    Wrong(
        "k of another length",
        ValueError,
        ("k", "15", "20"),
        call=lambda: tensors(k=torch.randn(B, H, 15, D)),
    ),
    Wrong(
        "k of another size",
        ValueError,
        ("k", "4", "6"),
        call=lambda: tensors(k=torch.randn(B, H, N, 4)),
    ),
    Wrong(
        "k of another batch",
        ValueError,
        ("k", "3, 3, 20", "(2, 3)"),
        call=lambda: tensors(k=torch.randn(3, H, N, D)),
    ),
    Wrong(
        "v of another length",
        ValueError,
        ("v", "15", "20"),
        call=lambda: tensors(v=torch.randn(B, H, 15, D_V)),
    ),
    Wrong(
        "v of another batch",
        ValueError,
        ("v", "3, 3, 20", "2, 3, 20"),
        call=lambda: tensors(v=torch.randn(3, H, N, D_V)),
    ),
    Wrong(
        "heads that k and v cannot share",
        ValueError,
        ("k", "(2, 2, 20, 6)", "fewer heads that divide q's"),
        call=lambda: tensors(k=torch.randn(B, 2, N, D), v=torch.randn(B, 2, N, D_V)),
    ),
    Wrong(
        "k of another dtype",
        ValueError,
        ("k", "float64", "float32"),
        call=lambda: tensors(k=torch.randn(B, H, N, D, dtype=torch.float64)),
    ),
    Wrong(
        "v of another dtype",
        ValueError,
        ("v", "bfloat16", "float32"),
        call=lambda: tensors(v=torch.randn(B, H, N, D_V).bfloat16()),
    ),
    Wrong(
        "k elsewhere",
        ValueError,
        ("k", "meta", "cpu"),
        call=lambda: tensors(k=torch.randn(B, H, N, D, device="meta")),
    ),
    Wrong(
        "v elsewhere",
        ValueError,
        ("v", "meta", "cpu"),
        call=lambda: tensors(v=torch.randn(B, H, N, D_V, device="meta")),
    ),
    Wrong(
        "heads without channels",
        ValueError,
        ("q", "head size", "at least 1", "(2, 3, 20, 0)"),
        call=lambda: tensors(q=torch.randn(B, H, N, 0), k=torch.randn(B, H, N, 0)),
    ),
    Wrong(
        "q of one dimension",
        ValueError,
        ("q", "(*lead, n, d)", "(20,)"),
        call=lambda: tensors(q=torch.randn(N), input_mask=mask(B, N)),
    ),
    Wrong(
        "q of integers",
        ValueError,
        ("q", "floating-point", "int64"),
        call=lambda: tensors(q=torch.zeros(B, H, N, D, dtype=torch.int64)),
    ),
    Wrong(
        "mask on another device",
        ValueError,
        ("mask", "meta", "cpu"),
        call=lambda: tensors(mask=mask(B, N).to("meta")),
    ),
    Wrong(
        "bias on another device",
        ValueError,
        ("attn_bias", "meta", "cpu"),
        call=lambda: tensors(attn_bias=torch.zeros(H, W, 15, device="meta")),
    ),
    Wrong(
        "seed on another device",
        ValueError,
        ("dropout_seed", "meta", "cpu"),
        call=lambda: tensors(dropout_seed=torch.tensor(1, device="meta")),
    ),
    Wrong(
        "seed of a float",
        ValueError,
        ("dropout_seed", "0-d int64", "float32"),
        call=lambda: tensors(dropout_seed=torch.tensor(1.0)),
    ),
    Wrong(
        "two seeds",
        ValueError,
        ("dropout_seed", "0-d int64", "(2,)"),
        call=lambda: tensors(dropout_seed=torch.tensor([1, 2])),
    ),
    Wrong("q as a list", TypeError, ("q", "list", "a tensor"), call=lambda: tensors(q=[[0.0]])),
    Wrong(
        "mask of floats",
        ValueError,
        ("mask", "float32", KEEP),
        call=lambda: tensors(mask=torch.ones(B, N)),
    ),
    Wrong(
        "input_mask of integers",
        ValueError,
        ("input_mask", "int64", KEEP),
        call=lambda: tensors(input_mask=torch.ones(B, N, dtype=torch.int64)),
    ),
    Wrong(
        "mask as a list",
        TypeError,
        ("mask", "list", "a tensor"),
        call=lambda: tensors(mask=[[True] * N] * B),
    ),
    Wrong(
        "bias as a number",
        TypeError,
        ("attn_bias", "float", "a tensor"),
        call=lambda: tensors(attn_bias=0.5),
    ),
    Wrong(
        "mask of another length",
        ValueError,
        ("mask", "19", "20"),
        call=lambda: tensors(mask=mask(B, 19)),
    ),
    Wrong(
        "mask of another batch",
        ValueError,
        ("mask", "4", "6"),
        call=lambda: tensors(mask=mask(4, N)),
    ),
    Wrong(
        "mask without batch",
        ValueError,
        ("mask", "(20,)", "(batch, 20)"),
        call=lambda: tensors(mask=mask(N)),
    ),
    Wrong(
        "mask of three dimensions",
        ValueError,
        ("mask", "(2, 1, 20)", "(batch, 20)"),
        call=lambda: tensors(mask=mask(B, 1, N)),
    ),
    Wrong(
        "both masks",
        ValueError,
        ("mask", "None where input_mask is given", "both"),
        call=lambda: tensors(mask=mask(B, N), input_mask=mask(B, N)),
    ),
    Wrong(
        "bias over all pairs",
        ValueError,
        ("attn_bias", "3, 20, 20", "5, 15"),
        call=lambda: tensors(attn_bias=torch.randn(H, N, N)),
    ),
    Wrong(
        "bias too narrow",
        ValueError,
        ("attn_bias", "3, 5, 10", "5, 15"),
        call=lambda: tensors(attn_bias=torch.randn(H, W, 10)),
    ),
    Wrong(
        "bias of the constructor's window under an override",
        ValueError,
        ("attn_bias", "3, 5, 15", "10, 30"),
        XPOS,
        call=lambda: tensors(attn_bias=torch.randn(H, W, 15), window_size=10),
    ),
    Wrong(
        "bias without heads",
        ValueError,
        ("attn_bias", "(heads, 5, 15)", "got (5, 15)"),
        call=lambda: tensors(attn_bias=torch.randn(W, 15)),
    ),
    Wrong(
        "bias of heads that do not divide the rows",
        ValueError,
        ("attn_bias", "4", "6"),
        call=lambda: tensors(attn_bias=torch.randn(4, W, 15)),
    ),
    Wrong(
        "documents of another length",
        ValueError,
        ("documents", "(20,) or (batch, 20)", "6 rows", "got (2, 19)"),
        call=lambda: tensors(documents=torch.zeros(B, 19).long()),
    ),
    Wrong(
        "documents of another batch",
        ValueError,
        ("documents", "a divisor of q's 6 rows", "got (4, 20)"),
        call=lambda: tensors(documents=torch.zeros(4, N).long()),
    ),
    Wrong(
        "documents of floats",
        ValueError,
        ("documents", "an integer dtype", "float32"),
        call=lambda: tensors(documents=torch.zeros(B, N)),
    ),
    Wrong(
        "documents of booleans",
        ValueError,
        ("documents", "an integer dtype", "bool"),
        call=lambda: tensors(documents=mask(B, N)),
    ),
    Wrong(
        "documents as a list",
        TypeError,
        ("documents", "a tensor", "list"),
        call=lambda: tensors(documents=[0] * N),
    ),
    Wrong(
        "documents elsewhere",
        ValueError,
        ("documents", "meta", "cpu"),
        call=lambda: tensors(documents=torch.zeros(N, device="meta").long()),
    ),
    Wrong(
        "an offset of a float",
        TypeError,
        ("q_offset", "an int or a tensor", "got 2.0 of type float"),
        call=lambda: tensors(q_offset=2.0),
    ),
    Wrong(
        "an offset of a flag",
        TypeError,
        ("kv_offset", "an int or a tensor", "got True of type bool"),
        call=lambda: tensors(kv_offset=True),
    ),
    Wrong(
        "offsets of floats",
        ValueError,
        ("q_offset", "an integer dtype", "float32"),
        call=lambda: tensors(q_offset=torch.zeros(B)),
    ),
    Wrong(
        "offsets of another batch",
        ValueError,
        ("kv_offset", "of shape (batch,), batch a divisor of q's 6 rows", "got (4,)"),
        call=lambda: tensors(kv_offset=torch.zeros(4).long()),
    ),
    Wrong(
        "an offset without a batch",
        ValueError,
        ("q_offset", "of shape (batch,)", "got ()"),
        call=lambda: tensors(q_offset=torch.tensor(3)),
    ),
    Wrong(
        "offsets elsewhere",
        ValueError,
        ("q_offset", "meta", "cpu"),
        call=lambda: tensors(q_offset=torch.zeros(B, device="meta").long()),
    ),
    Wrong(
        "sinks as a number",
        TypeError,
        ("sinks", "a tensor or None", "float"),
        call=lambda: tensors(sinks=0.5),
    ),
    Wrong(
        "sinks of heads that do not divide the rows",
        ValueError,
        ("sinks", "(heads,), heads a divisor of q's 6 rows", "got (4,)"),
        call=lambda: tensors(sinks=torch.zeros(4)),
    ),
    Wrong(
        "sinks of integers",
        ValueError,
        ("sinks", "floating-point", "int64"),
        call=lambda: tensors(sinks=torch.zeros(H).long()),
    ),
    Wrong(
        "sinks elsewhere",
        ValueError,
        ("sinks", "meta", "cpu"),
        call=lambda: tensors(sinks=torch.zeros(H, device="meta")),
    ),
    Wrong(
        "return_lse of a number",
        TypeError,
        ("return_lse", "True or False", "got 1 of type int"),
        call=lambda: tensors(return_lse=1),
    ),
    Wrong(
        "v of another length than k",
        ValueError,
        ("v", "agree with k (2, 3, 15, 6)", "got (2, 3, 16, 7)"),
        call=lambda: tensors(k=torch.randn(B, H, 15, D), v=torch.randn(B, H, 16, D_V), q_offset=3),
    ),
]
BACKENDS = ["auto", "eager", "flex"]


def assert_names(message, says):
    """The first of ``says`` is what must be otherwise; the message has the rest, and what came."""
    name, *others = says
    assert re.match(rf"{name}('s \w+)? must ", message), message
    assert "got " in message
    assert_says(message, others)


def assert_says(message, says):
    for words in says:
        assert words in message, f"{words!r} is not in: {message}"


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("compiled before the arguments were checked")

    monkeypatch.setattr(torch._dynamo.convert_frame.ConvertFrame, "__call__", refuse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", CONSTRUCTOR, ids=lambda wrong: wrong.name)
def test_constructor(wrong, backend):
    with pytest.raises(wrong.kind) as raised:
        LocalAttention(**{"window_size": W, **wrong.layer}, backend=backend)
    assert type(raised.value) is wrong.kind
    assert_names(str(raised.value), wrong.says)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", CALL, ids=lambda wrong: wrong.name)
def test_call(wrong, backend):
    layer = LocalAttention(**{"window_size": W, "dropout": 0.0, **wrong.layer}, backend=backend)
    with pytest.raises(wrong.kind) as raised:
        layer(**wrong.call())
    assert type(raised.value) is wrong.kind
    assert_names(str(raised.value), wrong.says)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls them a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(H, N, D)] * B)

FUNCTION = [
    ({"window": 0}, ValueError, ("window", "0", POSITIVE)),
    ({"window": True}, TypeError, ("window", "True", "a Window, another Rule or an int")),
    ({"window": 2.5}, TypeError, ("window", "2.5", "a Window, another Rule or an int")),
    ({"shared_qk": 1}, TypeError, ("shared_qk", "1", "True or False")),
    ({"rotary": True}, TypeError, ("rotary", "bool", "Rotary")),
    ({"rotary": Rotary(4)}, ValueError, ("rotary", f"dim must be q's head size {D}", "got 4")),
    ({"v": torch.zeros(B, H, N, D_V).int()}, ValueError, ("v", "int32", "floating-point")),
    (
        {"q": torch.zeros(B, H, N, D).to(torch.float8_e4m3fn)},
        ValueError,
        ("q", "float8", "16 to 64"),
    ),
    ({"q": torch.zeros(B, H, N, D).to_sparse()}, ValueError, ("q", "dense", "torch.sparse_coo")),
    ({"k": NESTED}, ValueError, ("k", "dense", "a nested tensor")),
    ({"k": torch.zeros(B, 2, N, D)}, ValueError, ("k", "2, 2, 20, 6", "divide")),
    ({"kernel_options": 3}, TypeError, ("kernel_options", "3", "dict")),
    ({"kernel_options": {"BLOCK_M": [64]}}, TypeError, ("kernel_options", "'BLOCK_M': [64]")),
    ({"kernel_options": {"BLOCK_M": 64, 2: 3}}, TypeError, ("kernel_options", "2: 3", "names")),
    ({"dropout": 1 - 2**-33}, ValueError, ("dropout", "2**-32")),  # would keep every weight
    ({"scale": 10**400}, ValueError, ("scale", "finite")),
    ({"dropout": 1.0}, ValueError, ("dropout", "1.0", "below 1")),
    ({"mask": torch.ones(B, N)}, ValueError, ("mask", "float32", KEEP)),
    ({"mask": mask(4, N)}, ValueError, ("mask", "4", "6")),
    ({"attn_bias": torch.zeros(H, N, N)}, ValueError, ("attn_bias", "3, 20, 20", "5, 15")),
    ({"k": torch.zeros(B, H, 15, D)}, ValueError, ("k", "15", "20")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "kind", "says"), FUNCTION, ids=lambda x: str(x)[:20])
def test_function(changes, kind, says, backend):
    with pytest.raises(kind) as raised:
        local_attention(**{**tensors(), "window": W, **changes}, backend=backend)
    assert type(raised.value) is kind
    assert_names(str(raised.value), says)


def test_kernel_options_without_a_kernel():
    says = ("kernel_options", "backend='eager'", "BLOCK_M")
    with pytest.raises(ValueError) as raised:
        LocalAttention(W, backend="eager", kernel_options={"BLOCK_M": 64})
    assert_names(str(raised.value), says)
    with pytest.raises(ValueError) as raised:
        local_attention(**tensors(), window=W, backend="eager", kernel_options={"BLOCK_M": 64})
    assert_names(str(raised.value), says)


def test_unknown_backend():
    says = ("backend", "triton", "flex", "eager", "auto")
    with pytest.raises(ValueError) as raised:
        LocalAttention(W, backend="triton")
    assert_says(str(raised.value), says)
    with pytest.raises(ValueError) as raised:
        local_attention(**tensors(), window=W, backend="triton")
    assert_says(str(raised.value), says)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_backend_that_cannot_run_here(name):
    """Compiled flex attention has no backward on the CPU: asked for by name, it says so."""
    call = tensors()
    call[name].requires_grad_()
    layer = LocalAttention(W, dropout=0.0, backend="flex")
    says = ("backend 'flex' cannot", "no backward pass on the CPU", "'auto' or 'eager'")
    with pytest.raises(ValueError) as raised:
        layer(**call)
    assert_says(str(raised.value), says)
    with pytest.raises(ValueError) as raised:
        local_attention(**call, window=W, backend="flex")
    assert_says(str(raised.value), says)


def test_auto_chooses_what_can_run():
    """Only auto may choose: the same call that flex refuses."""
    call = tensors()
    call["q"].requires_grad_()
    out = LocalAttention(W, dropout=0.0)(**call)
    expected = LocalAttention(W, dropout=0.0, backend="eager")(**call)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("config", "dim", "kind", "says"),
    [
        ((), None, TypeError, ("tuple", "head size", "()")),
        (D, None, TypeError, ("tuple", "head size", str(D))),
        ((D, 3), 4, ValueError, ("dim 4", f"({D}, 3)")),
    ],
)
@pytest.mark.filterwarnings("ignore:rel_pos_emb_config is deprecated:DeprecationWarning")
def test_wrong_rel_pos_emb_config(config, dim, kind, says):
    with pytest.raises(kind) as raised:
        LocalAttention(W, rel_pos_emb_config=config, dim=dim)
    assert_says(str(raised.value), ("rel_pos_emb_config", *says))


def test_deprecated_rel_pos_emb_config_warns_and_works():
    with pytest.warns(DeprecationWarning, match="rel_pos_emb_config.*dim") as warned:
        old = LocalAttention(W, rel_pos_emb_config=(D, 3), dropout=0.0)
    assert len(warned) == 1
    new = LocalAttention(W, dim=D, dropout=0.0)
    call = tensors()
    assert torch.equal(old(**call), new(**call))
    assert not torch.equal(new(**call), LocalAttention(W, dropout=0.0)(**call))
