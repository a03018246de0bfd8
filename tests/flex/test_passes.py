"""Compiled graphs whose passes are called without torch's wrappers, against autograd alone.

No code is generated here: both passes are run as torch's compiler differentiates them.
``test_flex_on_cpu.py`` has some that are compiled to their end, ``tests/gpu`` attention.
"""

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor import compile_fx
from torch.multiprocessing.reductions import StorageWeakRef

from flexlocal.torch_limits.compiling import inductor

pytestmark = pytest.mark.usefixtures("fresh_compiler", "passes_as_they_are")


@pytest.fixture
def passes_as_they_are(monkeypatch):
    def uncompiled(graph, inputs, **options):
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", uncompiled)


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend=inductor, **options)


def has_own_step(x):
    """Whether its gradient comes without torch's wrappers."""
    name = type(x.grad_fn).__name__
    assert name in ("_StepBackward", "CompiledFunctionBackward"), name
    return name == "_StepBackward"


def randn(*shape, learned=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=learned)


def attention(q, k, v, bias):
    scores = q @ k.transpose(-1, -2) + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


LEARNED = st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda each: any(each[:2]))
LENGTHS = st.lists(st.integers(2, 7), min_size=1, max_size=3)


@settings(max_examples=25)
@given(learned=LEARNED, lengths=LENGTHS, turned=st.booleans(), used=st.sampled_from(["both", 0, 1]))
def test_results_and_gradients(learned, lengths, turned, used):
    """Of several lengths, which become symbolic; gradients lie as they come."""
    torch.compiler.reset()
    call = compiled(attention)
    for n in lengths:
        shapes = (3, 5, 11), (3, n, 11), (3, n, 13), (5, n)
        tensors = [randn(*shape, learned=x) for shape, x in zip(shapes, learned, strict=True)]
        grads = randn(3, 5, 13, learned=False), randn(3, 5, learned=False)
        if turned:
            grads = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in grads]
        found = []
        for each in (call, attention):
            results = each(*tensors)
            seen = [0, 1] if used == "both" else [used]
            roots = [results[i] for i in seen]
            leaves = [x for x in tensors if x.requires_grad]
            given_grads = [grads[i] for i in seen]
            more = torch.autograd.grad(roots, leaves, given_grads, materialize_grads=True)
            found.append([*results, *more])
        assert has_own_step(found[0][0])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def of_an_input(x, y):
    return (x @ y).sin(), x.view(-1)[3:]


def of_another_result(x, y):
    product = x @ y
    return product.sin(), product[0], product[1]


def without_gradient(x, y):
    product = x @ y
    return product.sin(), product.argmax(-1)


def into_an_input(x, y):
    y.add_(1)
    return (x @ y).sin(), x.sum()


@pytest.mark.parametrize(
    "function", [of_an_input, of_another_result, without_gradient, into_an_input]
)
def test_what_torchs_wrappers_see_to(function):
    x = randn(5, 7)
    found = []
    for each in (compiled(function), function):
        torch.manual_seed(0)
        y = randn(7, 5, learned=False)
        results = each(x, y)
        (grad,) = torch.autograd.grad(sum(out.sum() for out in results[:2]), x, retain_graph=True)
        (again,) = torch.autograd.grad(results[0].sum(), x)
        found.append([*results, grad, again, y])
    assert not has_own_step(found[0][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_is_refused():
    """Also where the gradient that comes in is a constant, as that of a sum is."""
    x = randn(5, 7)
    out = compiled(lambda x: x.exp().sin())(x)
    assert has_own_step(out)
    with pytest.raises(RuntimeError, match="no second derivative: create_graph must be False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    assert torch.autograd.grad(out.sum(), x)[0].grad_fn is None


@pytest.mark.parametrize("retain", [False, True])
def test_memory_is_freed_while_the_backward_pass_runs(retain, monkeypatch):
    """Each pass empties its list of arguments; what it was saved in must not hold them either."""
    held = {}

    def uncompiled(graph, inputs, is_backward=False, **options):
        def run(arguments):
            memory = [StorageWeakRef(each.untyped_storage()) for each in arguments]
            found = graph.forward(*arguments)
            arguments.clear()
            held[is_backward] = sum(not each.expired() for each in memory)
            return found

        run._boxed_call = True
        return run

    monkeypatch.setattr(compile_fx, "compile_fx_inner", uncompiled)
    x, y, grad = randn(5, 7), randn(7, 3), randn(5, 3, learned=False)
    out = compiled(lambda x, y: (x @ y).sin())(x, y)
    assert has_own_step(out)
    out.backward(grad, retain_graph=retain)
    product = 1
    assert held[True] == len([x, y, grad]) + product * retain
    if retain:
        out.backward(grad)
    torch.testing.assert_close(x.grad, (1 + retain) * (grad * (x @ y).cos()) @ y.T)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(grad)


def test_a_result_that_was_made_a_view_is_a_users_own():
    """It may be written to, and goes with its graph."""
    x, y = randn(5, 7), randn(7, 3)
    out = compiled(lambda x, y: (x @ y).sin()[None])(x, y)
    assert has_own_step(out)
    out.mul_(2)
    memory = StorageWeakRef(out.untyped_storage())
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, 2 * (x @ y).cos() @ y.T)
    del out
    assert memory.expired()


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_casts_once(outside):
    """As torch's own wrappers do: what asks for float32 is not cast when the graph is run."""

    def product(x, y):
        half = x @ y
        with torch.autocast("cpu", enabled=False):
            return half, x @ y

    x, y = (torch.randn(5, 5, requires_grad=True) for _ in range(2))
    found = []
    for call in (compiled(product), torch.compile(product, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            results = call(x, y)
            roots = partial(torch.autograd.grad, results[0].float().sum() + results[1].sin().sum())
            grads = None if outside else roots((x, y))
        found.append([*results, *(grads or roots((x, y)))])
    assert has_own_step(found[0][0])
    assert found[0][0].dtype == torch.bfloat16
    assert found[0][1].dtype == torch.float32
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_deterministic_algorithms_are_asked_for_before_the_call():
    x = randn(5, 7)
    call = compiled(lambda x: x.exp())
    out = call(x)
    assert has_own_step(out)
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="must come before the call"):
            out.sum().backward()
        call(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(x.grad, x.exp())
