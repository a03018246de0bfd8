"""xpos's layout of the keys, slot by slot: which key a slot holds, and where its gradient goes."""

from dataclasses import asdict

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal.masks import KeyLayout, Window


def copies(layout, n):
    """(slots, n) booleans: the key that each slot holds, from the words of the specification."""
    window = layout.window
    before = window.look_backward * window.size
    after = window.ahead * window.size
    queries = layout.windows * window.size
    rows = []
    for segment in range(-(-n // queries)):
        for place in range(-before, queries + after):
            rows.append(torch.arange(n) == segment * queries + place)
    return torch.stack(rows)


@given(windows(), st.integers(1, 5), st.integers(1, 60), st.booleans())
def test_slots_hold_their_keys_and_keys_gather_their_gradients(rule, windows_each, n, flags):
    layout = KeyLayout(Window(**asdict(rule)), windows_each, n)
    held = copies(layout, n).double()
    assert held.shape[0] == layout.all_slots
    keys = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    found = layout.in_slots(keys)
    torch.testing.assert_close(found, held @ keys)
    grad = torch.randn_like(found)
    (gathered,) = torch.autograd.grad(found, keys, grad)
    torch.testing.assert_close(gathered, held.T @ grad)
    if flags:  # a key mask, which hides the slots without a key
        mask = torch.rand(1, n) < 0.5
        kept = layout.in_slots(mask[..., None])[..., 0]
        assert torch.equal(kept[0], (held @ mask[0].double()) > 0)


def test_nan_stays_in_its_slots():
    layout = KeyLayout(Window(4, causal=True), 2, 20)
    keys = torch.zeros(1, 20, 1)
    keys[0, 7] = float("nan")
    assert torch.equal(layout.in_slots(keys)[0, :, 0].isnan(), copies(layout, 20)[:, 7])
