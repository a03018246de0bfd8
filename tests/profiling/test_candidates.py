"""The candidates: all fit the kernels, none comes twice, and wrong or failed ones never win."""

import random
from dataclasses import replace

import pytest

from flexlocal import Window
from flexlocal.flex import tuning
from flexlocal.flex.tuning import FLASH, STOCK_BLOCK, TABLE
from profiling.candidates import (
    PASSES,
    Candidate,
    Outcome,
    Space,
    candidates,
    counted,
    flash,
    ranked,
    spread,
    stock,
    winner_of,
)
from profiling.problems import Problem

BLOCKS = Space().blocks
SLIDING, STANDING = Window(256, causal=True, exact=True), Window(256, causal=True)
KINDS = pytest.mark.parametrize("kind", PASSES)
HEADS = pytest.mark.parametrize("head_size", [16, 64, 128, 256])


# Which candidates there are.


def usual(kind, head_size=64, window=SLIDING, **space):
    problem = Problem("some", 1, 2, 1024, head_size, window)
    return candidates(kind, problem, Space(**space))


@KINDS
@HEADS
def test_candidates_fulfil_the_conditions_of_the_kernels(kind, head_size):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    for candidate in usual(kind, head_size):
        options = dict(candidate.options)
        assert len(options) == len(candidate.options)
        assert all(name.startswith(prefix) for name in options)
        own = {name.removeprefix(prefix): value for name, value in options.items()}
        tiles = {name: own.pop(name) for name in list(own) if name.startswith("BLOCK_")}
        assert set(tiles) == ({"BLOCK_M", "BLOCK_N"} if kind == "forward" else BACKWARD_TILES)
        block, _ = candidate.layout
        assert STOCK_BLOCK % block == 0
        assert all(block % size == 0 for size in tiles.values())
        if kind == "training":
            assert tiles["BLOCK_N1"] % tiles["BLOCK_M1"] == 0
            assert tiles["BLOCK_M2"] % tiles["BLOCK_N2"] == 0
        assert own.pop("num_warps") in (4, 8)
        assert own.pop("num_stages") in (2, 3)
        assert own in ([{}] if head_size < 128 else [{}, {"USE_TMA": True}])
        assert candidate.swept


BACKWARD_TILES = {"BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"}


@KINDS
@HEADS
def test_no_candidate_comes_twice_and_all_layouts_come(kind, head_size):
    found = usual(kind, head_size)
    assert len({(c.layout, frozenset(c.options)) for c in found}) == len(found)
    assert {c.layout for c in found} == {(64, False), (64, True), (128, False), (128, True)}


@KINDS
def test_one_list_is_tried_where_two_have_gaps(kind):
    """Windows of whole blocks leave none, on a sequence of whole blocks."""
    assert {c.layout for c in usual(kind, window=STANDING)} == {(64, False), (128, False)}
    uneven = usual(kind, window=Window(64, causal=True))
    assert {c.layout for c in uneven} == {(64, False), (128, False), (128, True)}
    ragged = candidates(kind, Problem("some", 1, 2, 1000, 64, STANDING), Space())
    assert (64, True) in {c.layout for c in ragged}


def test_how_many_there_are():
    # Tiles in blocks of 64 and 128, by warps and stages: 2 ** 2 + 3 ** 2, and pairs in order.
    assert len(usual("forward", window=STANDING)) == 4 * (4 + 9)
    assert len(usual("training", window=STANDING)) == 4 * (3**2 + 6**2)
    for kind in PASSES:
        assert len(usual(kind)) == 2 * len(usual(kind, window=STANDING))
        assert len(usual(kind, 128)) == 2 * len(usual(kind))
    assert len(usual("forward", blocks=(64,), tiles=(64,), warps=(2,), stages=(1, 5))) == 4


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.head_size}-{e.reach}")
@KINDS
def test_what_is_shipped_is_among_them(entry, kind):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    options = {pair for pair in entry.tuning.options if pair[0].startswith(prefix)}
    found = usual(kind, entry.head_size, stages=(1, 2, 3, 4))
    layout = entry.tuning.block, entry.tuning.one_list
    assert (layout, options) in [(c.layout, set(c.options)) for c in found]


@pytest.mark.parametrize("count", [1, 2, 10, 52])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 60, None])
def test_a_limit_spreads(count, limit):
    found = spread(list(range(count)), limit)
    assert len(found) == min(count, limit or count)
    assert found[0] == 0
    if len(found) > 1:
        assert found[-1] == count - 1
        steps = {b - a for a, b in zip(found, found[1:], strict=False)}
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1


def test_a_call_gets_sorted_options():
    """As ``flexlocal.flex.tuning`` keeps them, so that equal ones share a kernel."""
    backward = usual("training", blocks=(64,))[-1]
    forward = usual("forward")[0].options
    made = backward.tuning(forward)
    assert (made.block, made.one_list) == (64, True)
    assert list(made.options) == sorted({*backward.options, *forward})
    assert flash("training").tuning() == FLASH
    assert stock("forward").tuning() == tuning.STOCK


# Which one wins.


def candidate(kind, block, warps):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    return Candidate(kind, (block, False), ((f"{prefix}num_warps", warps),))


def measured(kind, block, ms, warps=4):
    return Outcome(candidate(kind, block, warps), "measured", error=0.0, ms=ms)


def test_the_least_sum_over_a_block_wins():
    """The fastest forward pass does not, where its block is slow backward; nor in between."""
    outcomes = [
        measured("forward", 64, 2.0, 4),
        measured("forward", 64, 1.5, 8),
        measured("forward", 128, 1.0, 4),
        measured("training", 64, 5.0, 8),
        measured("training", 64, 4.0, 4),
        measured("training", 128, 4.5, 4),
    ]
    for _ in range(5):
        random.shuffle(outcomes)
        winner = winner_of(outcomes)
        assert winner.layout == (64, False)
        assert dict(winner.options) == {"fwd_num_warps": 8, "bwd_num_warps": 4}
        assert (winner.forward_ms, winner.training_ms) == (1.5, 4.0)
    other = winner_of(outcomes, [(128, False)])
    assert (other.layout[0], other.forward_ms, other.training_ms) == (128, 1.0, 4.5)


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory"])
def test_the_wrong_and_the_failed_never_win(status):
    bad = [
        replace(measured(kind, block, 0.1, 8), status=status) for kind in PASSES for block in BLOCKS
    ]
    assert winner_of(bad) is None
    good = [measured("forward", 128, 2.0), measured("training", 128, 5.0)]
    winner = winner_of(bad + good)
    assert (winner.layout[0], winner.forward_ms, winner.training_ms) == (128, 2.0, 5.0)
    assert all(o.status == "measured" for kind in PASSES for o in ranked(bad + good, kind))


def test_what_is_measured_beside_the_sweep_never_wins():
    beside = [Outcome(each(kind), "measured", ms=0.1) for each in (stock, flash) for kind in PASSES]
    assert winner_of(beside) is None
    good = [measured("forward", 64, 2.0), measured("training", 64, 5.0)]
    assert winner_of(beside + good).forward_ms == 2.0


def test_both_passes_must_have_run_in_a_block():
    assert winner_of([measured("forward", 64, 1.0), measured("training", 128, 1.0)]) is None


def test_those_that_were_not_measured_are_counted():
    one = candidate("forward", 64, 4)
    outcomes = [Outcome(one, "failed", reason) for reason in ("no room", "no room", "other")]
    outcomes += [Outcome(one, "wrong", "off by 1"), measured("forward", 64, 1.0)]
    assert counted(outcomes) == "3 failed (no room), 1 wrong (off by 1), 1 measured"
