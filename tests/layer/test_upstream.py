"""The same numbers as local-attention 1.11.2, wherever the specification names no difference."""

import pytest
import torch
from hypothesis import given, settings
from strategies import EXAMPLES, cases

from flexlocal import LocalAttention

upstream = pytest.importorskip("local_attention")


def run(layer, case):
    """The output and the gradients of q, k, v and the bias, in float32."""
    call = case.tensors(torch.float32)
    out = case.run(layer, call)
    named = call.learned()
    found = torch.autograd.grad((out * call.cotangent).sum(), list(named.values()))
    return {"output": out.detach(), **dict(zip(named, found, strict=True))}


@settings(max_examples=3 * EXAMPLES)
@given(cases(upstream=True))
def test_outputs_and_gradients(case):
    theirs = run(upstream.LocalAttention(**case.arguments()), case)
    ours = run(LocalAttention(**case.arguments(), backend="eager"), case)
    assert ours.keys() == theirs.keys()
    for name in ours:
        tolerance = 1e-5 if name == "output" else 1e-4
        size = max(1.0, theirs[name].abs().max().item())
        worst = (ours[name] - theirs[name]).abs().max().item()
        assert worst <= tolerance * size, f"{name} is {worst:.3g} off"


POSITIONS = [
    {"window_size": 8, "dim": 6},
    {"window_size": 8, "dim": 6, "use_xpos": True},
    {"window_size": 8, "dim": 6, "use_xpos": True, "xpos_scale_base": 5},
    {"window_size": 8, "dim": 6, "use_rotary_pos_emb": False},
    {"window_size": 8},
]


@pytest.mark.parametrize("arguments", POSITIONS, ids=str)
def test_checkpoints_load_in_both_directions(arguments):
    theirs, ours = upstream.LocalAttention(**arguments), LocalAttention(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {name for name, _ in ours.named_buffers()} == {n for n, _ in theirs.named_buffers()}
    assert list(ours.named_parameters()) == []


def test_a_checkpoints_frequencies_are_used():
    """inv_freq is part of a checkpoint, so what it holds must count."""
    arguments = {"window_size": 7, "dim": 6, "dropout": 0.0}
    theirs, ours = upstream.LocalAttention(**arguments), LocalAttention(**arguments)
    theirs.rel_pos.inv_freq.mul_(0.31)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 21, size, generator=generator) for size in (6, 6, 5))
    torch.testing.assert_close(ours(q, k, v), theirs(q, k, v), rtol=1e-5, atol=1e-5)
