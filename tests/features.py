"""Named calls, one for each argument and for pairs that meet in the kernel.

Compiling is slow, so the flex path is tried on these and on few random calls. Sequences are
longer than a block of 128, most are no multiple of it, and few are shorter. Sizes differ on every
axis of a case (batch, heads, key heads, n, d, d_v, W), so that no two can be swapped unseen.
"""

import dataclasses

from strategies import Case
from strategies import Window as Rule

PLAIN = Case(
    window=Rule(size=128, causal=True, look_backward=1, look_forward=None, exact=False),
    n=384,
    lead=(2, 3),
    kv_heads=None,
    d=64,
    d_v=48,
    autopad=True,
    scale=None,
    shared_qk=False,
    rotary=False,
    xpos=False,
    base=None,
    override=None,
    bias_heads=None,
    mask_batch=None,
    mask_name="mask",
    hide_a_row=False,
    empty_queries=True,
    transposed=False,
    seed=0,
)


def windows_of(size, **flags):
    rule = {"causal": True, "look_backward": 1, "look_forward": None, "exact": False, **flags}
    return Rule(size=size, **rule)


FEATURES: dict[str, dict] = {
    "both ways": {"window": windows_of(32, causal=False)},
    "far looks": {"window": windows_of(33, causal=False, look_backward=3, look_forward=2)},
    "rotary, exact both ways": {
        "rotary": True,
        "window": windows_of(100, causal=False, exact=True),
    },
    "xpos": {"rotary": True, "xpos": True, "window": windows_of(32)},
    "xpos, many segments": {
        "rotary": True,
        "xpos": True,
        "base": 2.0,  # so small that none may be scored the other way: causal
        "window": windows_of(16, look_backward=2),
    },
    "xpos, mask, bias, shared": {
        "rotary": True,
        "xpos": True,
        "window": windows_of(16, causal=False),
        "mask_batch": 2,
        "bias_heads": 3,
        "shared_qk": True,
        "n": 301,
    },
    "override": {"rotary": True, "xpos": True, "override": 24, "window": windows_of(32)},
    "mask": {"mask_batch": 2, "n": 301, "window": windows_of(32, causal=False)},
    "mask, blocks full and empty": {"lead": (5, 2), "mask_batch": 5, "n": 1024, "padded": True},
    "mask and bias, blocks full": {
        "lead": (5, 2),
        "mask_batch": 5,
        "bias_heads": 2,
        "n": 900,
        "padded": True,
        "window": windows_of(300, causal=False),
    },
    "mask, a row hidden": {"mask_batch": 2, "hide_a_row": True},
    "mask by head": {"mask_batch": 6, "hide_a_row": True},
    "bias": {"bias_heads": 3, "window": windows_of(32)},
    "bias over rows": {"bias_heads": 2, "window": windows_of(33, causal=False), "n": 200},
    "bias and shared": {"bias_heads": 1, "shared_qk": True, "window": windows_of(32)},
    "shared": {"shared_qk": True, "rotary": True},
    "shared both ways": {
        "shared_qk": True,
        "window": windows_of(128, causal=False),  # whole blocks, the diagonal's among them
        "n": 512,
    },
    "shared, odd windows both ways": {
        "shared_qk": True,
        "lead": (2, 6),
        "n": 44,
        "d": 4,
        "d_v": 5,
        "window": windows_of(3, causal=False, look_backward=3, look_forward=2),
    },
    "shared, mask": {"shared_qk": True, "mask_batch": 2, "window": windows_of(20), "n": 301},
    "shared, mask, odd windows both ways": {
        "shared_qk": True,
        "lead": (6,),
        "mask_batch": 3,
        "n": 60,
        "d": 4,
        "window": windows_of(5, causal=False, look_backward=3, look_forward=2),
    },
    "shared, mask, blocks full": {
        "shared_qk": True,
        "lead": (5, 2),
        "mask_batch": 5,
        "n": 1100,
        "padded": True,
        "window": windows_of(384, exact=True),
    },
    "grouped queries": {"lead": (2, 6), "kv_heads": 3, "d_v": 32, "rotary": True},
    "grouped, mask by head": {"lead": (2, 6), "kv_heads": 3, "mask_batch": 12},
    "wide values": {"d": 32, "d_v": 128, "window": windows_of(96)},
    "narrow values": {"d": 64, "d_v": 5},
    "odd head": {"d": 33, "d_v": 17},
    "views": {"transposed": True, "rotary": True},
    "plain views": {"transposed": True},
    "few queries, views": {"transposed": True, "rotary": True, "n": 60},
    "few queries, mask by head": {"mask_batch": 6, "n": 60, "window": windows_of(16)},
    "two dimensions": {"lead": ()},
    "three dimensions": {"lead": (5,), "mask_batch": 5},
    "five dimensions": {"lead": (2, 1, 3), "transposed": True},
    "scale zero": {"scale": 0.0},
    "scale below zero": {"scale": -0.3},
    "window of one": {"window": windows_of(1, look_backward=3)},
}


def feature(name, **more):
    """The plain call with the feature of that name, if there is one."""
    return dataclasses.replace(PLAIN, **{**FEATURES.get(name, {}), **more})
