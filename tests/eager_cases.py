"""Calls that the eager path is tried on beside random ones, and how."""

from dataclasses import replace
from functools import partial

import budget
import torch
from features import PLAIN
from strategies import Window as Rule

from flexlocal import LocalAttention

# All sizes differ. Few tokens: gradcheck is quadratic.
SMALL = replace(
    PLAIN,
    window=Rule(size=3, causal=False, look_backward=1, look_forward=None, exact=False),
    n=9,
    lead=(2,),
    d=4,
    d_v=5,
    autopad=False,
    seed=11,
)
CAUSAL = Rule(size=3, causal=True, look_backward=2, look_forward=None, exact=True)
# So many scores that whatever works in portions needs several for one head: seven windows of 150.
WIDE = replace(
    SMALL,
    window=Rule(size=150, causal=False, look_backward=2, look_forward=2, exact=False),
    n=1050,
    lead=(1, 4),
    kv_heads=2,
    d=6,
)


def layer_of(case, **more):
    return LocalAttention(**case.arguments(), backend="eager", **more)


def check_case(case, dtype, wrap=lambda layer: layer):
    layer = wrap(layer_of(case))
    budget.check(case, dtype, partial(case.run, layer))


def dropped(case, p, seed):
    """What dropout makes of the weights themselves: values that are a unit per key show them."""
    call = case.tensors(torch.float64)
    layer = LocalAttention(**{**case.arguments(), "dropout": p}, backend="eager").double()
    unit = torch.eye(case.n, dtype=torch.float64).expand(*call.k.shape[:-2], case.n, case.n)
    return layer(call.q, call.k, unit, call.mask, attn_bias=call.bias, dropout_seed=seed).detach()
