"""The problems that are measured: their truth and their sizes, by the oracle."""

from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal import Window
from profiling import check
from profiling.problems import PROBLEMS, Problem, Task

CPU = torch.device("cpu")


@given(windows(), st.integers(1, 60))
def test_visible_keys(window, n):
    rule = Window(**vars(window))
    found = check.visible(rule, torch.arange(n), n)
    assert torch.equal(found, window.mask(n))


@given(windows(), st.integers(1, 60), st.booleans())
def test_the_truth(window, n, rotary):
    problem = Problem("drawn", 1, 2, n, 6, Window(**vars(window)), rotary=rotary)
    tensors = Task(problem, torch.float64, CPU).tensors()
    *leaves, grad = tensors
    found = check.truth(problem, tensors)
    true = oracle.attend(
        *leaves,
        window.size,
        causal=window.causal,
        look_backward=window.look_backward,
        look_forward=window.look_forward,
        exact=window.exact,
        rotary=rotary,
    )
    expected = [true, *torch.autograd.grad(true, leaves, grad)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_shortened_problem_is_of_the_same_kind(name):
    problem = replace(PROBLEMS[name], n=PROBLEMS[name].n + 17)
    short = check.shortened(problem)
    assert short.window == problem.window and short.d == problem.d
    assert short.n % 128 == problem.n % 128
    assert short.n > problem.window.most_seen  # the window moves
    assert check.shortened(replace(problem, n=20)).n == 20


def test_views_hold_the_same_layout_as_a_projection():
    for x in Task(PROBLEMS["tiny"], torch.float32, CPU, views=True).tensors():
        assert x.shape == PROBLEMS["tiny"].shape
        assert x.transpose(1, 2).is_contiguous() and not x.is_contiguous()
