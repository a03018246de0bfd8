"""The problems that are measured: their truth, their sizes and their floors, by the oracle."""

from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal import Window
from profiling import check
from profiling.problems import PROBLEMS, Problem

CPU = torch.device("cpu")


@given(windows(), st.integers(1, 60))
def test_visible_keys(window, n):
    rule = Window(**vars(window))
    found = check.visible(rule, torch.arange(n), n)
    assert torch.equal(found, window.mask(n))


@given(windows(), st.integers(1, 60), st.booleans())
def test_the_truth(window, n, rotary):
    problem = Problem("drawn", 1, 2, n, 6, Window(**vars(window)), rotary=rotary)
    tensors = [x.detach().requires_grad_() for x in problem.tensors(torch.float64, CPU)]
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


@given(windows(), st.integers(1, 60), st.integers(1, 3), st.integers(1, 3))
def test_pairs_and_operations(window, n, batch, heads):
    problem = Problem("drawn", batch, heads, n, 7, Window(**vars(window)))
    pairs = batch * heads * int(window.mask(n).sum())
    assert problem.pairs == pairs
    # A product takes a multiplication and an addition for each of a head's 7 numbers.
    scores_and_output = 2 * (pairs * 7 * 2)
    assert problem.flops(train=False) == scores_and_output
    # Backward: scores again, and the gradients of the weights, q, k and v.
    assert problem.flops(train=True) == scores_and_output + 5 * (pairs * 7 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype):
    problem = PROBLEMS["tiny"]
    q, k, v, grad = problem.tensors(dtype, CPU)
    out = torch.empty_like(v)
    forward = sum(x.nbytes for x in (q, k, v, out))
    assert problem.traffic(dtype, train=False) == forward
    read_again, written = (q, k, v, out, grad), (q, k, v)
    backward = sum(x.nbytes for x in (*read_again, *written))
    assert problem.traffic(dtype, train=True) == forward + backward


def test_views_hold_the_same_layout_as_a_projection():
    for x in PROBLEMS["tiny"].tensors(torch.float32, CPU, views=True):
        assert x.shape == PROBLEMS["tiny"].shape
        assert x.transpose(1, 2).is_contiguous() and not x.is_contiguous()
