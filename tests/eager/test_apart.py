"""Documents as calls of their own: which ones, and that nothing else changes."""

from contextlib import contextmanager
from itertools import product

import placed
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES

from flexlocal import Window, explain, local_attention
from flexlocal.eager import apart
from flexlocal.eager.apart import Costs, Piece


@contextmanager
def taken(costs=None):
    """A list of the pieces of each call that is made in pieces, which cost so much."""
    real, calls = apart.attend, []

    def recorded(run, spec, inputs, pieces):
        calls.append(pieces)
        return real(run, spec, inputs, pieces)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(apart, "attend", recorded)
        if costs is not None:
            patched.setattr(apart, "costs_of", lambda *_: costs)
        yield calls


@st.composite
def packed(draw):
    """Calls over documents, as many queries as keys."""
    case = draw(placed.placed().filter(lambda case: case.documents is not None))
    return placed.Placed(
        **{**vars(case), "m": case.case.n, "q_offset": None, "kv_offset": None, "offset_rows": None}
    )


FROM_FOUR_TOKENS_ON = Costs(call=4, call_together=0, of_a_score=1, keys=0, keys_together=1)


def test_results_and_gradients():
    with taken(FROM_FOUR_TOKENS_ON) as calls:

        @settings(max_examples=3 * EXAMPLES)
        @given(packed())
        def check(case):
            placed.check(case, backend="eager")

        check()
    assert len(calls) > EXAMPLES  # the others had no document so long
    assert any(len(pieces) > 1 for pieces in calls)
    assert any(not piece.alone for pieces in calls for piece in pieces[0])


def test_a_document_alone_has_the_bits_of_a_call_of_its_own():
    window, lengths = Window(64, causal=True), [30, 20, 700, 9, 650, 40]
    q, k, v = torch.randn(3, 2, 8, sum(lengths), 64)
    documents = torch.arange(6).repeat_interleave(torch.tensor(lengths))
    documents[-40:] = -1  # padding
    with taken(Costs(100, 0, 1, 0, 1)) as calls:
        out, lse = local_attention(q, k, v, window, documents=documents, return_lse=True)
    assert calls == [[[Piece(50, False), Piece(700, True), Piece(9, False), Piece(650, True),
                       Piece(40, False)]]]  # fmt: skip
    for start, stop in ((50, 750), (759, 1409)):
        alone = (x[:, :, start:stop] for x in (q, k, v))
        own, own_lse = local_attention(*alone, window, return_lse=True)
        assert torch.equal(out[:, :, start:stop], own)
        assert torch.equal(lse[:, :, start:stop], own_lse)
    assert not out[:, :, -40:].any()


@st.composite
def priced(draw):
    """Documents of a row, -1 for padding, and what they cost."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    numbers = [draw(st.sampled_from([i, i, -1 - i])) for i in range(len(lengths))]
    price = st.integers(0, 40)
    keys = draw(st.integers(1, 9))
    more = draw(st.integers(0, 9))
    return (
        lengths,
        numbers,
        Costs(draw(price), draw(price), draw(st.integers(1, 3)), keys, keys + more),
    )


@given(priced())
def test_no_other_pieces_cost_less(row):
    lengths, numbers, costs = row

    def cost(alone):
        """All that documents cost, some of them alone; those between share a call."""
        total, shares = 0, False
        for length, one in zip(lengths, alone, strict=True):
            if one:
                total += costs.call + costs.of_a_score * length * min(costs.keys, length)
            else:
                total += 0 if shares else costs.call_together
                total += costs.of_a_score * length * costs.keys_together
            shares = not one
        return total

    tokens = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
    found, at = apart._pieces_of(tokens, costs), 0
    assert sum(piece.tokens for piece in found) == sum(lengths)
    ends = {sum(lengths[:i]): i for i in range(len(lengths) + 1)}
    alone = []
    for piece in found:
        documents = ends[at + piece.tokens] - ends[at]
        assert documents == 1 or not piece.alone
        alone += [piece.alone] * documents
        at += piece.tokens
    assert not any(one and number < 0 for one, number in zip(alone, numbers, strict=True))
    assert not any(not a.alone and not b.alone for a, b in zip(found, found[1:], strict=False))
    ways = product(*[(False,) if number < 0 else (False, True) for number in numbers])
    assert cost(alone) == min(map(cost, ways))


ROW = torch.arange(1200) // 600
TOGETHER = {
    "short documents": {"documents": torch.arange(1200) // 3},
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
    assert bool(calls) == ("documents are calls of their own" in told) == (name in rows)


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
