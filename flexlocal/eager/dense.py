"""Attention to all keys at once by torch's ``scaled_dot_product_attention``, under a mask.

For few queries whose keys are no interval, as in a cache: tiles would hold all keys anyway. Shapes
are those of ``spec``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.rule import Rule
from ..spec import Inputs, Spec, is_plain


def serves(spec: Spec, rule: Rule, inputs: Inputs) -> bool:
    """Whether the call is one that torch's operator can do, and ``attend`` is the faster way."""
    plain = inputs.mask is None and is_plain(spec, inputs.bias, inputs.sinks)
    return plain and rule.has_holes and not rule.by_head


def attend(spec: Spec, rule: Rule, inputs: Inputs) -> Tensor:
    """Local attention ``(b, h, n, d_v)`` over ``inputs``, whose queries and keys are rotated."""
    q, k, v = inputs[:3]
    b, h, n, d = q.shape
    batch = torch.arange(b if rule.tensors else 1, device=q.device)[:, None, None, None]
    query = torch.arange(n, dtype=torch.int32, device=q.device)[:, None]
    key = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
    seen = rule.sees(batch, 0, query, key)
    # The heads of a group as queries of one head: torch would copy the keys for each of them.
    groups = h // k.shape[1]
    grouped = q.reshape(b, -1, groups * n, d)
    if n > 1:
        seen = seen.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen, scale=spec.scale)
    return out.reshape(b, h, n, -1)
