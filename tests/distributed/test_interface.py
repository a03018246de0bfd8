"""What users call: its arguments, and what is refused before ranks talk to each other."""

import inspect

import pytest
import torch
import torch.distributed as dist

from flexlocal import LocalAttention, Rotary, Window, local_attention
from flexlocal.distributed import (
    gather_sequence,
    shard_lengths,
    shard_sequence,
    sharded_local_attention,
)
from flexlocal.masks import Rule


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_it_takes_every_argument_of_one_call():
    ours, whole = (
        inspect.signature(function).parameters
        for function in (sharded_local_attention, local_attention)
    )
    own = {"group", "lengths", "overlap"}
    assert ours.keys() == whole.keys() - {"cache"} | own  # a cache holds a whole sequence's keys
    for name in whole.keys() - {"cache"}:
        assert ours[name].default == whole[name].default, name
        assert ours[name].kind == whole[name].kind, name


def test_one_rank_is_one_call(group):
    q, k, v = torch.randn(3, 2, 4, 23, 8, dtype=torch.float64).unbind()
    arguments = {"rotary": Rotary(8), "documents": torch.arange(23) // 6, "return_lse": True}
    for lengths in (None, [23]):
        found = sharded_local_attention(q, k, v, 5, group=group, lengths=lengths, **arguments)
        for x, y in zip(found, local_attention(q, k, v, 5, **arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_autocast_is_that_of_one_call(group):
    q = torch.randn(2, 4, 23, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = sharded_local_attention(q, q, q, 5, group=group)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, local_attention(q, q, q, 5))


class Own(Rule):
    """A rule of a user's."""

    def keys(self, batch, head, query):
        return query, query

    def queries(self, batch, head, key):
        return key, key

    @property
    def reach(self):
        return Window(1, causal=True, look_backward=0).reach


Q = torch.zeros(2, 3, 8, 4)
OFFSET = torch.tensor([1, 2])
WRONG = {
    "group": ({"group": "all"}, TypeError, "group must be a ProcessGroup or a DeviceMesh, got ty"),
    "overlap": ({"overlap": 1}, TypeError, "overlap must be True or False, got 1 of type int"),
    "a rule": (
        {"window": Own()},
        ValueError,
        "window must be a Window over several ranks, got Own",
    ),
    "two offsets": (
        {"q_offset": OFFSET, "kv_offset": OFFSET.clone()},
        ValueError,
        "q_offset and kv_offset must be ints or the same tensor over several ranks, got type",
    ),
    "mask": ({"mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, "mask must have the shape"),
    "many lengths": (
        {"lengths": [4, 4]},
        ValueError,
        "lengths must be one for each of 1 ranks, go",
    ),
    "other lengths": ({"lengths": [7]}, ValueError, "lengths must say for rank 0 how many tokens"),
    "no lengths": (
        {"lengths": 8},
        TypeError,
        "lengths must be a sequence of ints or None, got typ",
    ),
    "odd lengths": (
        {"lengths": [8.0]},
        TypeError,
        "each of lengths must be an int, got 8.0 of typ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, group):
    more, kind, words = WRONG[name]
    with pytest.raises(kind) as raised:
        sharded_local_attention(Q, Q, Q, **{"window": 5, "group": group, **more})
    assert str(raised.value).startswith(words)


def test_wrong_sequences_are_named(group):
    x = torch.zeros(2, 9)
    for call, words in (
        (lambda: shard_sequence([1], group), "x must be a tensor, got type list"),
        (lambda: shard_sequence(x, group, 2), "dim must be a dimension of x, of 2, got 2"),
        (lambda: shard_sequence(x, group, lengths=[4]), "lengths must add up to x's 9 tokens"),
        (lambda: gather_sequence(x, group, -3), "dim must be at least -2, got -3"),
        (lambda: shard_lengths(-1, group), "n must be at least 0, got -1"),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        assert str(raised.value).startswith(words)


def test_a_layer_and_its_group(group):
    layer = LocalAttention(5, causal=True, dim=4, dropout=0.0, group=group)
    whole = LocalAttention(5, causal=True, dim=4, dropout=0.0, autopad=True)
    torch.testing.assert_close(layer(Q + 1, Q, Q + 2), whole(Q + 1, Q, Q + 2))
    with pytest.raises(ValueError, match="group must be None for a map"):
        layer.attention_map(Q, Q)
    with pytest.raises(ValueError, match="lengths must be None in a layer without a group"):
        whole(Q, Q, Q, lengths=[8])
    with pytest.raises(TypeError, match="group must be a ProcessGroup or a DeviceMesh, got type i"):
        LocalAttention(5, group=0)
