"""Short sequences by ``scaled_dot_product_attention``, on stand-ins for the GPU's kernels."""

import dataclasses
from unittest.mock import patch

import placed
import pytest
import torch
from budget import gradients
from features import PLAIN, feature, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, cases
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlocal import Rotary, Window
from flexlocal.flex import dense, dense_inputs, dense_tables, kept
from flexlocal.flex.compile import prepared
from flexlocal.shapes import shaped
from flexlocal.spec import Inputs, Spec, resolved


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
def on_the_cpu(monkeypatch, interpreted):
    """With tables for a few hundred tokens, and none of another test's."""
    monkeypatch.setattr(dense_tables, "LONGEST", 320)
    monkeypatch.setattr(dense_inputs, "_TOKENS", 128)  # the interpreter takes programs in turns
    monkeypatch.setattr(dense, "efficient_on_gpu", efficient)
    monkeypatch.setattr(dense, "flash_on_gpu", flash)
    kept._made.cache_clear()
    yield
    kept._made.cache_clear()


def at_once(case, documents=None):
    """Runs the case's call so, the checks and the choice aside."""
    window = Window(
        case.W, case.window.causal, case.window.look_backward, case.window.ahead, case.window.exact
    )
    turns = Rotary(case.d).inv_freq if case.rotary else None

    def run(call):
        inputs = Inputs(
            call.q, call.k, call.v, call.mask, call.bias, inv_freq=turns, documents=documents
        )
        spec = resolved(Spec(window, case.scale), inputs)
        found = prepared(spec, shaped(inputs), "dense")(shaped(inputs))
        return found.reshape(*call.q.shape[:-1], case.d_v)

    return run


def check(case, dtype=torch.float64, tolerance=1e-9):
    """Results and gradients are the oracle's."""
    call = case.tensors(dtype).with_fixed_bias()
    exact = call.to(torch.float64)
    out, truth = at_once(case)(call), case.truth(exact)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.double(), truth, **close)
    found, right = gradients(out, call), gradients(truth, exact)
    assert set(found) == {"q", "k", "v"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), right[name], **close)


SERVED = {"shared_qk": False, "xpos": False, "override": None}


def served(case, d):
    """The case, of what these kernels know."""
    if case.n > 320:
        case = dataclasses.replace(case, n=case.n % 300 + 1, autopad=True)
    scale = case.scale if case.scale is None else abs(case.scale) or None
    shares = len(case.lead) == 2 and case.bias_heads and not case.lead[1] % case.bias_heads
    bias_heads = case.bias_heads if shares else None
    return dataclasses.replace(case, **SERVED, scale=scale, d=d, d_v=d, bias_heads=bias_heads)


@given(st.booleans().flatmap(lambda long: cases(long=long)), st.sampled_from([8, 12]))
def test_results_and_gradients(case, d):
    kept._made.cache_clear()
    case = served(case, d)
    check(case, tolerance=1e-4 if case.rotary else 1e-9)  # frequencies are fp32


@settings(max_examples=min(EXAMPLES, 10))  # the interpreter takes a second or two for each
@given(
    placed.placed().filter(lambda call: len(call.case.lead) == 2),
    st.booleans(),
    st.sampled_from([5, 61, 149]),
)
def test_documents(call, by_row, n):
    """Runs of numbers, not all of them in order; some are padding."""
    kept._made.cache_clear()
    case = dataclasses.replace(served(call.case, 8), n=n)
    documents = case.lead[0] if by_row else 0
    nowhere = dict.fromkeys(("q_offset", "kv_offset", "offset_rows", "softcap", "sink_heads"))
    call = dataclasses.replace(call, case=case, m=n, documents=documents, **nowhere)
    tensors = call.tensors()
    if tensors.bias is not None:
        tensors.bias.requires_grad_(False)
    exact = tensors.to(torch.float64)
    out = at_once(case, tensors.documents)(tensors)
    truth, _ = call.truth(exact)
    close = dict.fromkeys(("rtol", "atol"), 1e-4 if case.rotary else 1e-9)
    torch.testing.assert_close(out, truth, **close)
    for x, right in zip(
        torch.autograd.grad((out * tensors.cotangent).sum(), (tensors.q, tensors.k, tensors.v)),
        torch.autograd.grad((truth * exact.cotangent).sum(), (exact.q, exact.k, exact.v)),
        strict=True,
    ):
        torch.testing.assert_close(x, right, **close)


NAMES = {
    "grouped": {"lead": (2, 6), "kv_heads": 3},
    "grouped, mask by head": {"lead": (2, 6), "kv_heads": 3, "mask_batch": 12},
    "bias": {"bias_heads": 3, "window": windows_of(33, causal=False)},
    "bias, mask, sliding": {
        "bias_heads": 1, "mask_batch": 2, "window": windows_of(32, exact=True), "n": 203,
    },
    "bias, rotary, hides nothing": {"bias_heads": 3, "rotary": True, "window": windows_of(301)},
    "hides nothing": {"window": windows_of(400), "n": 301},
    "hides nothing both ways": {"window": windows_of(301, causal=False), "n": 301},
    "hides nothing but padding": {"window": windows_of(400), "n": 301, "mask_batch": 2},
    "rotary": {"rotary": True, "n": 117, "window": windows_of(16), "transposed": True},
    "rotary, mask": {"rotary": True, "mask_batch": 2, "n": 117, "window": windows_of(16)},
    "rotary, grouped": {"rotary": True, "lead": (2, 6), "kv_heads": 3, "window": windows_of(100)},
    "rotary, both ways": {"rotary": True, "window": windows_of(31, causal=False)},
    "rotary, hides nothing": {"rotary": True, "window": windows_of(301, causal=False), "n": 301},
}  # fmt: skip


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


def test_second_derivatives_are_refused():
    case = dataclasses.replace(PLAIN, n=11, d=8, d_v=8, rotary=True, window=windows_of(4))
    call = case.tensors(torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = at_once(case)(call)
    (first,) = torch.autograd.grad(out.square().sum(), call.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bf16 on a GPU
def test_padding_is_hidden(dtype):
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
    make = dense_tables._hiding
    monkeypatch.setattr(dense_tables, "_hiding", lambda *kind: made.append(kind) or make(*kind))
    for n in (117, 301, 40):
        check(feature("plain", n=n, d=16, d_v=16, window=windows_of(16)), torch.float32, 1e-5)
    assert len(made) == 1
    with FakeTensorMode():  # numbers of a stand-in are nothing to keep
        q = torch.empty(1, 2, 40, 16)
        dense_tables.hidden_by(Window(16, causal=True), q)
    assert len(made) == 2
    check(feature("plain", n=40, d=16, d_v=16, window=windows_of(16)), torch.float32, 1e-5)
    assert len(made) == 2


def test_what_hides_nothing_has_no_table():
    with patch.object(dense_tables, "_hiding", side_effect=AssertionError):
        check(dataclasses.replace(PLAIN, d_v=64, **NAMES["hides nothing"]), torch.float32, 1e-5)


def test_a_far_look_ahead_makes_no_longer_a_table(monkeypatch):
    made, make = [], dense_tables._turning
    monkeypatch.setattr(
        dense_tables, "_turning", lambda *kind: made.append(kind[1:3]) or make(*kind)
    )
    window = windows_of(5000, causal=False, look_forward=2)
    check(dataclasses.replace(PLAIN, d=8, d_v=8, n=40, rotary=True, window=window), tolerance=1e-4)
    assert made == [(0, 1024), (10000, 1024)]


def test_rotations_beyond_the_table_of_short_sequences():
    window = windows_of(1100, causal=False)
    case = dataclasses.replace(PLAIN, n=1100, lead=(1, 2), d=8, d_v=8, rotary=True, window=window)
    check(case, torch.float32, 1e-4)
