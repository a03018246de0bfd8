"""Rotations before short sequences' kernels: the tables, and when they are made again."""

import pytest
import torch

from flexlocal import Rotary, Window
from flexlocal.flex import dense_inputs, dense_tables
from flexlocal.spec import Inputs

pytestmark = pytest.mark.usefixtures("interpreted")


def turned_by(inv_freq, x, dtype=torch.float32):
    """``x``'s keys as they are rotated there."""
    turns = dense_tables.rotations_of(inv_freq, x.shape[2], 0, dtype)
    treat = dense_inputs.Treatment(Window(8), Inputs(x, x, x, inv_freq=inv_freq), trains=False)
    return treat(x, x, x, dense_inputs.Beside(turns, None, None, None, None))[1]


def test_layers_of_the_same_frequencies_share_a_table():
    made = [dense_tables.rotations_of(Rotary(12).inv_freq, n, 0, torch.float32) for n in (40, 301)]
    tables = {x.untyped_storage().data_ptr() for turns in made for x in turns}
    assert len(tables) == 1
    others = dense_tables.rotations_of(Rotary(12, theta=500.0).inv_freq, 40, 0, torch.float32)
    assert others[1].untyped_storage().data_ptr() not in tables


def test_frequencies_that_change_are_read_again():
    """In place, as a checkpoint changes them; also where nothing would tell that they did."""
    x = torch.randn(1, 2, 7, 12)
    first, second = Rotary(12).inv_freq, Rotary(12, theta=500.0).inv_freq
    right = turned_by(second, x)
    assert not torch.equal(turned_by(first, x), right)
    first.copy_(second)
    assert torch.equal(turned_by(first, x), right)
    replaced = Rotary(12).inv_freq
    turned_by(replaced, x)
    replaced.data = second.clone()
    assert torch.equal(turned_by(replaced, x), right)
    with torch.inference_mode():
        first = Rotary(12).inv_freq
        turned_by(first, x)
        first.copy_(second)
        assert torch.equal(turned_by(first, x), right)
