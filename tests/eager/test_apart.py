"""Long documents as calls of their own: which ones, and that nothing else changes."""

from contextlib import contextmanager

import placed
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES

from flexlocal import Window, explain, local_attention
from flexlocal.eager import apart
from flexlocal.eager.apart import Piece


@contextmanager
def taken(least=None):
    """A list of the pieces of each call that is made in pieces, with documents of `least` alone."""
    real, calls = apart.attend, []

    def recorded(run, spec, inputs, pieces):
        calls.append(pieces)
        return real(run, spec, inputs, pieces)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(apart, "attend", recorded)
        if least is not None:
            patched.setattr(apart, "least_tokens", lambda *_: least)
        yield calls


@st.composite
def packed(draw):
    """Calls over documents, as many queries as keys."""
    case = draw(placed.placed().filter(lambda case: case.documents is not None))
    return placed.Placed(
        **{**vars(case), "m": case.case.n, "q_offset": None, "kv_offset": None, "offset_rows": None}
    )


def test_results_and_gradients():
    with taken(least=4) as calls:

        @settings(max_examples=3 * EXAMPLES)
        @given(packed())
        def check(case):
            placed.check(case, backend="eager")

        check()
    assert len(calls) > EXAMPLES  # the others had no document so long
    assert any(len(pieces) > 1 for pieces in calls)
    assert any(not piece.alone for pieces in calls for piece in pieces[0])


def test_a_long_document_has_the_bits_of_a_call_of_its_own():
    window, lengths = Window(64, causal=True), [30, 20, 700, 9, 650, 40]
    q, k, v = torch.randn(3, 2, 8, sum(lengths), 64)
    documents = torch.arange(6).repeat_interleave(torch.tensor(lengths))
    documents[-40:] = -1  # padding
    with taken() as calls:
        out, lse = local_attention(q, k, v, window, documents=documents, return_lse=True)
    assert calls == [[[Piece(50, False), Piece(700, True), Piece(9, False), Piece(650, True),
                       Piece(40, False)]]]  # fmt: skip
    for start, stop in ((50, 750), (759, 1409)):
        alone = (x[:, :, start:stop] for x in (q, k, v))
        own, own_lse = local_attention(*alone, window, return_lse=True)
        assert torch.equal(out[:, :, start:stop], own)
        assert torch.equal(lse[:, :, start:stop], own_lse)
    assert not out[:, :, -40:].any()


ROW = torch.arange(1200) // 600
TOGETHER = {
    "short documents": {"documents": torch.arange(1200) // 60},
    "dropout": {"documents": ROW, "dropout": 0.1},
    "a part": {"documents": ROW, "q_offset": 1, "kv_offset": 1},
    "by head": {"documents": ROW.expand(8, -1)},
    "sinks by row": {"documents": ROW.expand(2, -1), "sinks": torch.zeros(16)},
}


@pytest.mark.parametrize("name", [*TOGETHER, "apart", "sinks"])
def test_which_calls_are_made_in_pieces(name):
    rows = {"apart": {"documents": ROW}}
    rows["sinks"] = {"documents": ROW.expand(2, -1), "sinks": torch.zeros(8)}
    more = {**TOGETHER, **rows}[name]
    batch = 2 if "sinks" in name else 1
    q = torch.randn(batch, 8, 1200, 32)
    with taken() as calls, torch.no_grad():
        local_attention(q, q, q, Window(128), **more)
    told = explain(q, q, q, Window(128), **more).reason
    assert bool(calls) == ("long documents are calls of their own" in told) == (name in rows)


def test_training_takes_longer_documents():
    q = torch.randn(1, 8, 1200, 32)
    for learned, expected in ((q, 1), (q.clone().requires_grad_(), 0)):
        with taken() as calls:
            local_attention(learned, q, q, Window(128, causal=True), documents=ROW)
        assert len(calls) == expected


def test_transforms_and_compilers_see_no_pieces(fresh_compiler):
    q = torch.randn(3, 8, 1200, 32)

    def attend(q):
        return local_attention(q, q, q, Window(128), documents=ROW)

    with taken() as calls:
        found = torch.func.vmap(attend)(q[:, None])[:, 0]
        compiled = torch.compile(attend, fullgraph=True, backend="eager")(q)
        assert not calls
        expected = attend(q)
    assert calls
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled, expected)
