"""Windows as long as the sequence: memory grows with the length and not with its square."""

import math

import oracle
import pytest
import torch
from compilers import quick
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexlocal import LocalAttention, Rotary, Window, local_attention
from flexlocal.eager import autograd


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor that is made inside has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        memory = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(storage.nbytes() // 4 for storage in memory)])
        return result


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(autograd, "_SCORES_ON_CPU", 2**13)


OFFSETS = torch.tensor([3, 0])
CALLS = {
    "standing, causal": {"window": lambda n: Window(n, causal=True)},
    "standing, both ways": {"window": lambda n: Window(n)},
    "looking far": {"window": lambda n: Window(n // 3, look_backward=2, look_forward=2)},
    "sliding": {"window": lambda n: Window.around(n)},
    "rotary, mask, dropout": {
        "window": Window, "rotary": Rotary(8), "mask": lambda n: torch.arange(n)[None] % 7 > 0,
        "dropout": 0.3, "dropout_seed": torch.tensor(1),
    },
    "xpos": {"window": lambda n: Window(n, causal=True), "rotary": Rotary(8, True, 200.0)},
    "shared": {"window": Window, "shared_qk": True, "return_lse": True, "softcap": 5.0},
    "documents": {"window": Window, "documents": lambda n: torch.arange(n) // 100},
    "offsets by row": {
        "window": lambda n: Window(2 * n), "q_offset": OFFSETS, "kv_offset": OFFSETS + 2,
    },
}  # fmt: skip


def trained(name, n):
    """Output and gradients of a call, and the numbers in the largest tensor that it made."""
    made = {key: x(n) if callable(x) and key != "rotary" else x for key, x in CALLS[name].items()}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, n, 8, generator=generator).requires_grad_() for _ in range(3))
    with Largest() as largest:
        out = local_attention(q, k, v, **made)
        out, *_ = out if isinstance(out, tuple) else (out,)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    return (out, *found), largest.numbers


@pytest.mark.parametrize("name", quick(CALLS, kept=["standing, both ways", "offsets by row"]))
def test_no_tensor_is_larger_than_a_few_portions_and_inputs(name, small_portions):
    assert trained(name, 600)[1] <= 4 * 2 * 600 * 8 < 600 * 600 / 8


@pytest.mark.parametrize("name", quick(CALLS, kept=["rotary, mask, dropout", "documents", "xpos"]))
def test_the_results_are_those_of_one_tile(name, monkeypatch):
    found = []
    for scores in (2**12, 2**26):
        monkeypatch.setattr(autograd, "_SCORES_ON_CPU", scores)
        found.append(trained(name, 333)[0])
    for short, whole in zip(*found, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)


def test_they_are_right(small_portions):
    q, k, v = torch.randn(3, 1, 2, 301, 6, dtype=torch.float64)
    for causal in (True, False):
        found = LocalAttention(150, causal, autopad=True, dropout=0.0)(q, k, v)
        torch.testing.assert_close(found, oracle.attend(q, k, v, 150, causal=causal))


def test_inputs_of_a_few_thousand_tokens_take_some_portions():
    """With the true size of a portion: 8192 tokens, whose scores would be 64 times as many."""
    q = torch.randn(1, 1, 8192, 4)
    with Largest() as largest:
        local_attention(q, q, q, Window(8192, causal=True))
    assert largest.numbers <= 2 * autograd._SCORES_ON_CPU < math.prod((8192, 8192)) / 16
