"""Which blocks a kernel's lists name, and which the tokens of a key mask lie in."""

import torch


def listed(number, indices, rows, columns):
    """(rows, columns) booleans: the blocks that one head's lists name."""
    assert number.shape == (rows,)
    assert indices.shape[0] == rows
    grid = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        named = indices[row, : int(number[row])].tolist()
        assert len(named) == int(number[row]), "the list is narrower than its count"
        assert named == sorted(set(named)), "a list is in order and names nothing twice"
        assert not named or (named[0] >= 0 and named[-1] < columns)
        grid[row, named] = True
    return grid


def blocks_that_keep(key_mask, block):
    """(..., blocks) booleans: the key blocks that keep some key of (..., n)."""
    padded = torch.nn.functional.pad(key_mask, (0, -key_mask.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).any(-1)
