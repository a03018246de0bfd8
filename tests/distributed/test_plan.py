"""The plan of what travels, for groups of up to 64 ranks, against the oracle's dense mask."""

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import cuts
from strategies import EXAMPLES, windows

from flexlocal import Window
from flexlocal.distributed.plan import Plan, Run, Sight, plan


def plans(sight, queries, keys=None, overlap=True):
    return [plan(sight, rank, queries, keys, overlap) for rank in range(len(queries))]


@st.composite
def groups(draw):
    rule = draw(windows())
    n, ranks = draw(st.integers(0, 60)), draw(st.sampled_from([1, 2, 3, 8, 64]))
    return rule, draw(cuts(n, ranks))


def ours(rule):
    return Window(rule.size, rule.causal, rule.look_backward, rule.look_forward, rule.exact)


@settings(max_examples=EXAMPLES // 2)
@given(groups(), st.booleans())
def test_a_rank_receives_what_its_queries_see_and_no_more(drawn, overlap):
    rule, lengths = drawn
    seen = rule.mask(sum(lengths))
    for each in plans(Sight(ours(rule)), lengths, overlap=overlap):
        wanted = seen[each.queries.start : each.queries.stop].any(0).nonzero().flatten().tolist()
        away = [key for key in wanted if not each.own.start <= key < each.own.stop]
        received = [key for run in each.receives for key in range(*run)]
        assert received == away


@settings(max_examples=EXAMPLES // 2)
@given(groups(), st.booleans())
def test_what_one_rank_sends_another_receives(drawn, known):
    rule, lengths = drawn
    every = plans(Sight(ours(rule), known=known), lengths)
    for a in every:
        assert a.travels == any(each.halo for each in every)
        for b in every:
            assert a.sends[b.rank].size == b.receives[a.rank].size
            if a.sends[b.rank].size:
                assert a.sends[b.rank] == b.receives[a.rank]
                assert a.sends[b.rank].within(a.own) == a.sends[b.rank]


@settings(max_examples=EXAMPLES // 2)
@given(groups(), st.booleans(), st.integers(-9, 9), st.integers(-9, 9), st.booleans())
def test_portions_cover_the_queries_and_hold_their_keys(drawn, overlap, q_offset, kv_offset, known):
    rule, lengths = drawn
    sight, n = Sight(ours(rule), q_offset, kv_offset, known), sum(lengths)
    at = [[(x, 0 if x >= 0 else None) for x in range(first, first + n)] for first in
          (q_offset, kv_offset)]  # fmt: skip
    seen = oracle.seen_from([at[0]], [at[1]], rule.size, **rule.letters)[0]
    for each in plans(sight, lengths, overlap=overlap):
        covered = [query for portion in each.portions for query in range(*portion.queries)]
        assert covered == list(range(*each.queries))
        for portion in each.portions:
            outside = seen[portion.queries.start : portion.queries.stop].clone()
            outside[:, portion.keys.start : portion.keys.stop] = False
            assert not outside.any()
        assert sum(not each.needs_halo(portion) for portion in each.portions) <= 1


@settings(max_examples=EXAMPLES // 2)
@given(groups())
def test_queries_wait_for_no_key_that_they_do_not_see(drawn):
    rule, lengths = drawn
    seen = rule.mask(sum(lengths))
    for each in plans(Sight(ours(rule)), lengths):
        if len(each.portions) == 1:
            continue
        for portion in each.portions:
            for query in range(*portion.queries):
                keys = seen[query].nonzero().flatten()
                own = each.own.start <= keys.min() and keys.max() < each.own.stop
                assert own != each.needs_halo(portion)


# Gemma 3 27B at 131,072 tokens on 8 devices: 16 key heads of 128, bf16, a window of 1024 keys.
# gpt-oss: 8 key heads of 64, a window of 128.
MODELS = {
    "gemma 3 27b": (Window.sliding(1024), 16 * 2 * 128 * 2, 8_380_416, 939_524_096),
    "gpt-oss": (Window.sliding(128), 8 * 2 * 64 * 2, 260_096, 234_881_024),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [8, 64])
def test_the_halo_of_real_models(name, ranks):
    window, bytes_of_a_key, halo, every_key = MODELS[name]
    n = 131_072
    every = plans(Sight(window), [n // ranks] * ranks)
    assert {each.halo * bytes_of_a_key for each in every[1:]} == {halo}
    assert every[0].halo == 0
    assert all(len(each.portions) == 2 for each in every[1:])
    if ranks == 8:  # what gathering every key would bring
        assert (n - n // ranks) * bytes_of_a_key == every_key


def test_the_halo_does_not_grow_with_the_sequence():
    halos = set()
    for n in (1 << 12, 1 << 16, 1 << 20):
        halos.add(tuple(each.halo for each in plans(Sight(Window(64)), [n // 8] * 8)))
    assert halos == {(64, 128, 128, 128, 128, 128, 128, 64)}


def test_documents_may_begin_anywhere_in_a_window():
    known, loose = (
        [each.halo for each in plans(Sight(Window(5, causal=True), known=known), [10, 10])]
        for known in (True, False)
    )
    assert known == [0, 5] and loose == [0, 9]


def test_a_plan_that_loses_a_key_is_seen():
    each = plan(Sight(Window.sliding(4)), 1, [5, 5])
    assert each.receives == (Run(2, 5), Run(0, 0)) and isinstance(each, Plan)
