"""Short sequences on a GPU by ``scaled_dot_product_attention``: which calls, and their results."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from budget import gradients
from features import PLAIN, feature, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, cases
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlocal import Rotary, Window, dispatch
from flexlocal.flex import dense, dense_inputs, engines, kept
from flexlocal.flex.compile import prepared
from flexlocal.flex.tuning import STOCK, overriding
from flexlocal.spec import Inputs, Spec, resolved, shaped

H200 = (9, 0)
SLIDES = Window(100, causal=True, exact=True)


def efficient(q, k, v, hiding, trains, dropout, causal, scale):
    """Stands for a kernel of the GPU; as it does, it wants rows of masks that are aligned."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    if hiding is not None:
        assert hiding.shape == (*q.shape[:3], k.shape[2])
        assert hiding.stride(2) % 8 == 0 and hiding.stride(3) == 1
    assert trains == q.requires_grad and dropout == 0
    masked = {"attn_mask": hiding, "is_causal": causal, "scale": scale}
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **masked)
    return (out.transpose(1, 2).contiguous().transpose(1, 2),)  # heads side by side


def flash(q, k, v, dropout, causal, scale):
    """Another, of 16 bits and without masks."""
    assert q.dtype != torch.float32 and dropout == 0
    options = {"is_causal": causal, "scale": scale, "enable_gqa": True}
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, **options),)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """With tables for a few hundred tokens, and none of another test's."""
    monkeypatch.setattr(dense, "LONGEST", 320)
    monkeypatch.setattr(dense, "efficient_on_gpu", efficient)
    monkeypatch.setattr(dense, "flash_on_gpu", flash)
    kept._made.cache_clear()
    yield
    kept._made.cache_clear()


def at_once(case):
    """Runs the case's call so, the checks and the choice aside."""
    window = Window(
        case.W, case.window.causal, case.window.look_backward, case.window.ahead, case.window.exact
    )
    turns = Rotary(case.d).inv_freq if case.rotary else None

    def run(call):
        inputs = Inputs(call.q, call.k, call.v, call.mask, inv_freq=turns)
        spec = resolved(Spec(window, case.scale), inputs)
        found = prepared(spec, shaped(inputs), "dense")(shaped(inputs))
        return found.reshape(*call.q.shape[:-1], case.d_v)

    return run


def check(case, dtype=torch.float64, tolerance=1e-9):
    """Results and gradients are the oracle's."""
    call = case.tensors(dtype)
    exact = call.to(torch.float64)
    out, truth = at_once(case)(call), case.truth(exact)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.double(), truth, **close)
    found, right = gradients(out, call), gradients(truth, exact)
    for name, gradient in right.items():
        torch.testing.assert_close(found[name].double(), gradient, **close)


SERVED = {"shared_qk": False, "xpos": False, "override": None, "bias_heads": None}


@settings(max_examples=2 * EXAMPLES)
@given(st.booleans().flatmap(lambda long: cases(long=long)), st.sampled_from([8, 12]))
def test_results_and_gradients(case, d):
    if case.n > 320:
        case = dataclasses.replace(case, n=case.n % 300 + 1, autopad=True)
    kept._made.cache_clear()
    scale = case.scale if case.scale is None else abs(case.scale) or None
    close = 1e-4 if case.rotary else 1e-9  # frequencies are fp32
    check(dataclasses.replace(case, **SERVED, scale=scale, d=d, d_v=d), tolerance=close)


NAMES = {
    "grouped": {"lead": (2, 6), "kv_heads": 3},
    "grouped, mask by head": {"lead": (2, 6), "kv_heads": 3, "mask_batch": 12},
    "hides nothing": {"window": windows_of(400), "n": 301},
    "hides nothing both ways": {"window": windows_of(301, causal=False), "n": 301},
    "hides nothing but padding": {"window": windows_of(400), "n": 301, "mask_batch": 2},
    "rotary": {"rotary": True, "n": 117, "window": windows_of(16), "transposed": True},
    "rotary, mask": {"rotary": True, "mask_batch": 2, "n": 117, "window": windows_of(16)},
    "rotary, grouped": {"rotary": True, "lead": (2, 6), "kv_heads": 3, "window": windows_of(100)},
    "rotary, both ways": {"rotary": True, "window": windows_of(31, causal=False)},
    "rotary, hides nothing": {"rotary": True, "window": windows_of(301, causal=False), "n": 301},
}


@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    changes = {"n": 217, "d": 24, "d_v": 24, **NAMES[name]}
    for dtype in (torch.float32, torch.float64):
        check(dataclasses.replace(PLAIN, **changes), dtype, 1e-5)


def test_rows_that_no_kernel_can_read_are_copied(monkeypatch):
    case = dataclasses.replace(PLAIN, n=75, d=24, d_v=24, window=windows_of(16))
    call, given = case.tensors(torch.float32), []

    def noted(q, *others, **options):
        given.append(q)
        return efficient(q, *others, **options)

    monkeypatch.setattr(dense, "efficient_on_gpu", noted)
    odd, spread = torch.randn(2, 3, 75, 33)[..., 3:27], torch.randn(2, 3, 75, 48)[..., ::2]
    foreign = torch.from_numpy(torch.randn(2 * 3 * 75 * 24 + 1).numpy()[1:]).view(2, 3, 75, 24)
    assert foreign.storage_offset() == 0
    with torch.no_grad():
        for q in (odd, spread, foreign, call.q.detach()):
            at_once(case)(dataclasses.replace(call, q=q, k=q, v=q))
    assert all(map(torch.equal, given, (odd, spread, foreign, call.q)))
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in given)
    assert given[3].data_ptr() == call.q.data_ptr()


def test_a_key_mask_may_be_transposed():
    case = feature("mask", n=120, d=16, d_v=16, window=windows_of(16))
    call = case.tensors(torch.float32)
    found = at_once(case)(dataclasses.replace(call, mask=call.mask.t().contiguous().t()))
    assert torch.equal(found, at_once(case)(call))


@pytest.mark.parametrize("changes", [{}, {"mask_batch": 2}], ids=["rotary", "rotary, mask"])
def test_what_kernels_are_given_has_second_derivatives(changes):
    """Those of the GPU have none, and say so."""
    case = dataclasses.replace(
        PLAIN, n=11, lead=(2, 1), d=8, d_v=8, rotary=True, window=windows_of(4), **changes
    )
    call = case.tensors(torch.float64)

    def attend(*learned):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return at_once(case)(
                dataclasses.replace(call, **dict(zip("qkv", learned, strict=True)))
            )

    assert torch.autograd.gradgradcheck(attend, (call.q, call.k, call.v), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_is_hidden_in_16_bits(dtype):
    """However much lower the scores of what is seen are."""
    case = feature("mask", n=117, d=16, d_v=16, window=windows_of(16))
    call = case.tensors(dtype)
    call.q.data.mul_(60)
    call.k.data.copy_(-call.q.data / 30)
    out, truth = at_once(case)(call), case.truth(call.to(torch.float64))
    torch.testing.assert_close(out.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_results_lie_in_memory_as_their_queries(transposed):
    for window in (windows_of(16), windows_of(200)):
        case = dataclasses.replace(PLAIN, n=117, d=16, d_v=16, window=window, transposed=transposed)
        call = case.tensors(torch.float32)
        assert at_once(case)(call).stride() == call.q.stride()


def test_what_padding_holds_spreads_nowhere():
    case = feature("mask", n=117, d=16, d_v=16, hide_a_row=True)
    clean, dirty = case.tensors(torch.float32), case.tensors(torch.float32)
    hidden = ~dirty.mask[:, None, :, None]
    for x in (dirty.q, dirty.k, dirty.v):
        x.data.masked_fill_(hidden, torch.nan)
    cotangent = clean.cotangent.masked_fill(hidden, 0.0)  # nobody reads what padding is given
    out, right = at_once(case)(dirty), at_once(case)(clean)
    assert torch.equal(out.masked_fill(hidden, 0.0), right.masked_fill(hidden, 0.0))
    found, expected = (
        gradients(result, dataclasses.replace(call, cotangent=cotangent))
        for result, call in ((out, dirty), (right, clean))
    )
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_table_serves_every_length_and_is_made_once(monkeypatch):
    made = []
    make = dense._made
    monkeypatch.setattr(dense, "_made", lambda *kind: made.append(kind) or make(*kind))
    for n in (117, 301, 40):
        check(feature("plain", n=n, d=16, d_v=16, window=windows_of(16)), torch.float32, 1e-5)
    assert len(made) == 1
    with FakeTensorMode():  # numbers of a stand-in are nothing to keep
        q = torch.empty(1, 2, 40, 16)
        dense._table(Window(16, causal=True), q)
    assert len(made) == 2
    check(feature("plain", n=40, d=16, d_v=16, window=windows_of(16)), torch.float32, 1e-5)
    assert len(made) == 2


def test_what_hides_nothing_has_no_table():
    with patch.object(dense, "_made", side_effect=AssertionError):
        check(dataclasses.replace(PLAIN, d_v=64, **NAMES["hides nothing"]), torch.float32, 1e-5)


def turned_by(inv_freq, x, dtype=torch.float32):
    """``x``'s keys as they are rotated there."""
    turns = dense_inputs.rotations_of(inv_freq, x.shape[2], 0, dtype)
    treatment = dense_inputs.Treatment(turns, None)
    return dense_inputs.treated(x, x, x, treatment, trains=False)[1]


def test_layers_of_the_same_frequencies_share_a_table():
    made = [dense_inputs.rotations_of(Rotary(12).inv_freq, n, 0, torch.float32) for n in (40, 301)]
    tables = {x.untyped_storage().data_ptr() for turns in made for x in turns[1]}
    assert len(tables) == 2  # of cosines and of sines
    others = dense_inputs.rotations_of(Rotary(12, theta=500.0).inv_freq, 40, 0, torch.float32)
    assert others[1][0].untyped_storage().data_ptr() not in tables


def test_frequencies_that_change_are_read_again():
    """In place, as a checkpoint changes them; also where nothing would tell that they did."""
    x = torch.randn(1, 2, 7, 12)
    first, second = Rotary(12).inv_freq, Rotary(12, theta=500.0).inv_freq
    right = turned_by(second, x)
    assert not torch.equal(turned_by(first, x), right)
    first.copy_(second)
    assert torch.equal(turned_by(first, x), right)
    replaced = Rotary(12).inv_freq
    turned_by(replaced, x)
    replaced.data = second.clone()
    assert torch.equal(turned_by(replaced, x), right)
    with torch.inference_mode():
        first = Rotary(12).inv_freq
        turned_by(first, x)
        first.copy_(second)
        assert torch.equal(turned_by(first, x), right)


def test_a_far_look_ahead_makes_no_longer_a_table(monkeypatch):
    made, make = [], dense_inputs._made
    monkeypatch.setattr(dense_inputs, "_made", lambda *kind: made.append(kind[1:3]) or make(*kind))
    window = windows_of(5000, causal=False, look_forward=2)
    check(dataclasses.replace(PLAIN, d=8, d_v=8, n=40, rotary=True, window=window), tolerance=1e-4)
    assert made == [(0, 1024), (10000, 1024)]


def test_rotations_beyond_the_table_of_short_sequences():
    window = windows_of(1100, causal=False)
    case = dataclasses.replace(PLAIN, n=1100, lead=(1, 2), d=8, d_v=8, rotary=True, window=window)
    check(case, torch.float32, 1e-4)


def on_gpu(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


Q = on_gpu(2, 6, 300, 64)
WHOLE = on_gpu(1, 6, 2100, 64)
LEFT = {
    "fp64": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float64)),
    "a head of 33": dict.fromkeys("qkv", on_gpu(2, 6, 300, 33)),
    "values": {"v": on_gpu(2, 6, 300, 32)},
    "a bias": {"bias": torch.zeros(6, 100, 200)},
    "shared_qk": {"shared_qk": True},
    "dropout": {"dropout": 0.1},
    "xpos": {"xpos_base": 64.0},
    "softcap": {"softcap": 30.0},
    "log-sum-exps": {"return_lse": True},
    "sinks": {"sinks": torch.zeros(6)},
    "documents": {"documents": torch.zeros(300, dtype=torch.int32)},
    "offsets": {"q_offset": 1, "kv_offset": 1},
    "options": {"kernel_options": {}},
    "scale zero": {"scale": 0.0},
    "scale below zero": {"scale": -0.3},
    "by name": {"backend": "flex"},
    "too long": dict.fromkeys("qkv", on_gpu(1, 1, 321, 64)),
    "too many": dict.fromkeys("qkv", on_gpu(40, 6, 300, 64)),
    "too long for a mask": {**dict.fromkeys("qkv", WHOLE), "mask": torch.ones(1, 2100) > 0},
}
SERVED_TOO = {
    "plain": {},
    "rows": dict.fromkeys("qkv", on_gpu(5, 300, 64)),
    "grouped": dict.fromkeys("kv", on_gpu(2, 3, 300, 64)),
    "fp32": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float32)),
    "fp16": dict.fromkeys("qkv", on_gpu(2, 6, 300, 64, dtype=torch.float16)),
    "a mask": {"mask": torch.ones(2, 300, dtype=torch.bool)},
    "rotary": {"inv_freq": Rotary(64).inv_freq},
    "a scale": {"scale": 0.3},
}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(dense, "capability", lambda device: H200)
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
