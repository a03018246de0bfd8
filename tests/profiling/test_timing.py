"""Ratios of calls that take turns, and when they mean nothing."""

import time

import pytest
import torch

from profiling import timing
from profiling.problems import PROBLEMS, Task
from profiling.timing import Ratio, ratio_of_rounds, ratio_of_rows

CPU = torch.device("cpu")


def test_calls_take_turns():
    order, runs = [], {name: (lambda name=name: order.append(name)) for name in "ab"}

    def clock(run, device, seconds):
        run()
        return len(order)

    task = Task(PROBLEMS["tiny"], torch.float32, CPU, 0.7)
    found = timing.in_turns(runs, task, clock)
    assert order == list("ab" * (1 + timing.ROUNDS))  # the first time to warm up
    assert found["a"] == [2 * turn + 1 for turn in range(1, 1 + timing.ROUNDS)]


def test_a_slow_machine_slows_both_and_leaves_the_ratio():
    steady = ratio_of_rounds([3.0, 30.0, 3.0, 300.0], [2.0, 20.0, 2.0, 200.0])
    assert (steady.median, steady.low, steady.high) == (1.5, 1.5, 1.5)
    assert not steady.noisy
    assert ratio_of_rounds([1.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]).noisy


def test_what_a_ratio_says():
    ratio = Ratio(1.314, 1.279, 1.351)
    assert ratio.words() == "1.31x (1.28-1.35)"
    assert ratio.words(bracket=False) == "1.31x, 1.28-1.35"
    assert Ratio(1.314).words() == Ratio(1.314).words(bracket=False) == "1.31x"
    assert Ratio(12.34, 12.1, 12.6).words() == "12.3x (12.1-12.6)"


def test_rows_without_rounds_have_a_ratio_of_medians():
    row, base = {"ms": 3.0, "rounds": {"ms": [3.0, 3.0]}}, {"ms": 2.0}
    assert ratio_of_rows(row, base, "ms") == Ratio(1.5)
    assert ratio_of_rows(row, {"ms": None}, "ms") is None
    assert ratio_of_rows({}, base, "ms") is None
    assert ratio_of_rows(row, row, "ms") == Ratio(1.0, 1.0, 1.0)


def test_a_call_is_timed():
    assert timing.median_ms(lambda: time.sleep(0.01), CPU, 0.02) == pytest.approx(10, rel=0.5)
    assert 0.01 < timing.first_call(lambda: time.sleep(0.01), CPU) < 1
