"""Numbers and flags that come from numpy or from a 0-d tensor, as torch's own layers take them."""

import numpy as np
import pytest
import torch

from flexlocal import LocalAttention, Rotary, Window, explain, local_attention, masks

SIZES = [np.int64, np.int32, np.uint8, np.array, torch.tensor]
RATES = [np.float64, np.float32, np.array, torch.tensor]
FLAGS = [np.bool_, np.array, torch.tensor]
WHOLE = {"window_size": 4, "look_backward": 2, "look_forward": 1, "dim": 6}
RATIO = {"dropout": 0.25, "scale": 0.5, "softcap": 8.0, "theta": 1024.0, "xpos_scale_base": 4.0}
FLAG = {
    "causal": False, "shared_qk": True, "autopad": True, "exact_windowsize": True,
    "use_rotary_pos_emb": True, "use_xpos": True,
}  # fmt: skip


def plain_type(value):
    return type(value) in (int, float, bool, type(None))


@pytest.mark.parametrize("made", range(4))
def test_a_layer(made):
    """The same layer, with the same results, that holds and prints plain numbers."""
    plain = {**WHOLE, **RATIO, **FLAG}
    given = {
        **{name: SIZES[made](x) for name, x in WHOLE.items()},
        **{name: RATES[made](x) for name, x in RATIO.items()},
        **{name: FLAGS[made % 3](x) for name, x in FLAG.items()},
    }
    ours, expected = LocalAttention(**given), LocalAttention(**plain)
    assert ours.window == expected.window and repr(ours) == repr(expected)
    assert all(map(plain_type, vars(ours.window).values()))
    held = ("scale", "softcap", "autopad", "shared_qk", "use_xpos", "dim")
    assert all(plain_type(getattr(ours, name)) for name in held)
    q, k, v = torch.randn(3, 2, 8, 6)
    seed, size = torch.tensor(3), SIZES[made](2)
    found = ours(q, k, v, window_size=size, dropout_seed=seed)
    assert torch.equal(found, expected(q, k, v, window_size=2, dropout_seed=seed))
    ours.dropout.p = RATES[made](0.0)
    assert torch.equal(ours(q, k, v), expected.eval()(q, k, v))


@pytest.mark.parametrize("made", range(4))
def test_the_function(made):
    q, k, v = torch.randn(3, 2, 8, 6)
    plain = {"scale": 0.5, "softcap": 4.0, "dropout": 0.25, "shared_qk": True, "return_lse": True}
    rate, flag = RATES[made], FLAGS[made % 3]
    given = {name: (flag if type(x) is bool else rate)(x) for name, x in plain.items()}
    seed, offset = torch.tensor(3), [np.int64, np.int32, np.uint8, np.array][made](5)
    window = SIZES[made](4)
    found = local_attention(q, k, v, window, dropout_seed=seed, q_offset=offset, **given)
    true = local_attention(q, k, v, 4, dropout_seed=seed, q_offset=5, **plain)
    assert all(map(torch.equal, found, true))
    assert explain(q, k, v, window, **given) == explain(q, k, v, 4, **plain)


@pytest.mark.parametrize("made", SIZES)
def test_rules_and_pictures(made):
    assert Window.sliding(made(7)) == Window.sliding(7)
    assert Window.around(made(7)) == Window.around(7)
    assert Window.left_right(made(4), made(6)) == Window.left_right(4, 6)
    assert Window.chunked(made(7)) == Window.chunked(7)
    assert repr(Rotary(made(8))) == repr(Rotary(8))
    picture = masks.inspect(made(4), made(12), n_keys=made(9), block_size=made(2))
    assert str(picture) == str(masks.inspect(4, 12, n_keys=9, block_size=2))
    assert picture.query(made(3)) == masks.inspect(4, 12, n_keys=9).query(3)
    blocks = masks.block_mask(Window(4), made(12), made(9), block_size=made(4))
    assert torch.equal(
        blocks.to_dense(), masks.block_mask(Window(4), 12, 9, block_size=4).to_dense()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", np.float64(8.0)),
        ("window_size", np.bool_(True)),
        ("window_size", np.array([8])),
        ("dropout", np.bool_(True)),
        ("causal", np.int64(1)),
        ("causal", torch.tensor(1.0)),
        ("scale", torch.tensor([0.5])),
        ("scale", torch.nn.Parameter(torch.tensor(0.5))),  # would get no gradient
        ("softcap", np.str_("2")),
    ],
)
def test_what_is_no_such_number(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be .*got "):
        LocalAttention(**{"window_size": 8, name: value})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("name", ["mask", "input_mask"])
def test_a_mask_of_numbers_is_refused_and_told_both_ways_out(dtype, name):
    """1 keeps a key in some, and 0 in those that are added to scores: only the caller knows."""
    q, mask = torch.randn(2, 8, 6), torch.ones(2, 8, dtype=dtype)
    says = rf"^{name} must be boolean.*got {dtype}: {name}\.bool\(\).*{name} == 0"
    with pytest.raises(ValueError, match=says):
        LocalAttention(4)(q, q, q, **{name: mask})
