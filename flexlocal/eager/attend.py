"""The eager path: plain tensor operations, for every argument, device and dtype.

Queries are cut into tiles, each of which sees one interval of keys. Tiles are computed a portion at
a time (``autograd``). On processors a kernel of torch's computes most outputs (``fused``) and some
gradients (``fused_autograd``). A compiler takes all that for one operator (``operator``).
``torch.export`` and the transforms of ``torch.func`` are shown all tiles at once, in operators that
these know. On processors documents may be calls of their own (``apart``). Shapes are those of
``spec`` and ``tiles``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..masks.keys import does_no_harm, finite_padding, hides_none, without_padding
from ..masks.rule import Rule
from ..mods.dropout import key_draws, query_draws
from ..mods.shared_qk import unit_keys
from ..positions import beside_queries, first_positions, mask_of_queries, positions, rule_of
from ..regions import region
from ..rotation import rotate, tables_of
from ..spec import Inputs, Result, Spec, is_placed, wants_gradients
from ..torch_limits.tracing import is_transformed
from . import apart, dense, fused, fused_autograd, operator
from .autograd import attend_in_portions, output_by_torch, portions
from .cutting import bias_within, cleared, cropped, in_tiles, sizes_of
from .formula import Operands, formula_of, operands_of
from .tiles import every_tile


def attend(spec: Spec, inputs: Inputs) -> Result:
    """Local attention.

    Args:
        spec: the call, resolved.
        inputs: its tensors, shaped.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype, and with ``return_lse`` the log-sum-exps ``(b, h, n)``.
    """
    if inputs.mask is not None and hides_none(inputs.mask):
        inputs = inputs._replace(mask=None)
    pieces = apart.pieces_of(spec, inputs, wants_gradients(inputs))
    if pieces is not None:
        return apart.attend(attend, spec, inputs, pieces)
    if inputs.k.shape[2] == 0 < inputs.q.shape[2]:
        inputs = _with_a_hidden_key(inputs)
    rule = rule_of(spec, inputs)
    if is_placed(inputs):
        rule, inputs = _near_queries(spec, rule, inputs)
    q, k, v, mask, _, seed, *_ = inputs
    if mask is not None:
        with region("key mask"):
            q = _finite_padding(rule, inputs)
            if not _may_read_padding(spec, inputs):
                k, v = without_padding(k, mask), without_padding(v, mask)
    q, k = _turned(spec, rule, inputs._replace(q=q, k=k))
    inputs = inputs._replace(q=q, k=k, v=v)
    if dense.serves(spec, rule, inputs):
        with without_autocast(q.device), region("attention"):
            return dense.attend(spec, rule, inputs)
    b, h, n, _ = q.shape
    draws = None
    if spec.dropout > 0:
        assert seed is not None
        query, key = first_positions(inputs, rule)
        with region("dropout"):
            draws = query_draws(seed, b * h, n, query), key_draws(seed, b * h, k.shape[2], key)
    with without_autocast(q.device), region("attention"):
        if not (torch.compiler.is_compiling() or is_transformed()):
            if not wants_gradients(inputs):
                if fused.serves(spec, rule, inputs):
                    return output_by_torch(spec, rule, operands_of(inputs))
            elif fused.serves_backward(spec, rule, inputs):
                return fused_autograd.attend(spec, rule, inputs)
            out, lse = attend_in_portions(*in_tiles(spec, rule, inputs, draws))
        elif operator.serves(spec, rule, inputs):
            out, lse = operator.attend(spec, rule, inputs, draws)
        else:
            operands, formula, sizes = in_tiles(spec, rule, inputs, draws)
            out, lse = formula.output(every_tile(sizes), operands)
    return out if lse is None else (out, lse)


def turned(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys as ``attend`` multiplies them; arguments as there."""
    return _turned(spec, rule_of(spec, inputs), inputs)


def weights(spec: Spec, inputs: Inputs) -> Tensor:
    """The weights that ``attend`` mixes values with, before dropout; arguments as there.

    Returns:
        ``(b, h, n, span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, and 0 where it is hidden or outside the sequence.
    """
    q, k, _, mask, bias, *_ = inputs
    rule = rule_of(spec, inputs)
    window = rule.window
    if mask is not None:
        q, k = _finite_padding(rule, inputs), without_padding(k, mask)
    q, k = _turned(spec, rule, inputs._replace(q=q, k=k))
    sizes = cropped(sizes_of(q, k, rule, True, slides=True, may_shorten=False))
    formula = formula_of(spec, rule, inputs, sizes)
    if bias is not None:
        bias = cleared(bias_within(bias, sizes, rule), formula)
    operands = Operands(q, k, k, bias, inputs.sinks, mask)
    out = q.new_zeros((*q.shape[:-1], window.span), dtype=formula.compute)
    first = window.before - sizes.before
    columns = slice(first, first + sizes.span)
    with without_autocast(q.device):
        for tiles in portions(sizes, q.device):
            found = formula.weigh(tiles, *formula.scaled(tiles, q, k), operands)
            part = found.seeing(found.weights).flatten(2, 3)
            start = tiles.first * sizes.tile
            target = out[tiles.batch, tiles.heads, start : start + part.shape[2], columns]
            target.copy_(part[:, :, : target.shape[2]])
    return out


def _finite_padding(rule: Rule, inputs: Inputs) -> Tensor:
    """The call's queries, finite where they are padding and gradients are taken."""
    mask = mask_of_queries(rule, inputs)
    return inputs.q if mask is None else finite_padding(inputs.q, mask)


def _may_read_padding(spec: Spec, inputs: Inputs) -> bool:
    """Whether keys and values that the mask hides may be left as they are.

    Not with xpos and ``shared_qk``, which change the norms of keys.
    """
    assert spec.scale is not None
    if wants_gradients(inputs) or spec.xpos_base is not None or spec.shared_qk:
        return False
    return does_no_harm(*inputs[:3], spec.scale)


def _with_a_hidden_key(inputs: Inputs) -> Inputs:
    """A call without keys as one with a key that no query sees."""
    k, v = (F.pad(x, (0, 0, 0, 1)) for x in (inputs.k, inputs.v))
    mask = k.new_zeros((k.shape[0], 1, 1), dtype=torch.bool)
    documents = None if inputs.documents is None else F.pad(inputs.documents, (0, 1), value=-1)
    return inputs._replace(k=k, v=v, mask=mask, documents=documents)


def _near_queries(spec: Spec, rule: Any, inputs: Inputs) -> tuple[Rule, Inputs]:
    """The rule and the call's keys without those that no query may see, if offsets tell.

    Keys are copied where offsets differ by row, so that all queries stand at keys of their own
    index. Not where windows are wider than all keys, one tile of which is then less work.
    """
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    if isinstance(rule.lead, int):
        stays = rule.lead == 0 and n == m
    else:
        stays = rule.reach.back + rule.reach.ahead >= m and spec.xpos_base is None
    if stays:
        return rule, inputs
    return beside_queries(rule, inputs)


def _turned(spec: Spec, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys before their product: keys of length 1 and both rotated, where asked."""
    q, k, inv_freq = inputs.q, inputs.k, inputs.inv_freq
    if spec.shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        with region("rotary"):
            query, key = positions(rule, q, k.shape[2])
            shift = 0 if rule.window is None else rule.window.after
            of_queries, of_keys = tables_of(query, key, shift, inv_freq, q.dtype)
            q, k = rotate(q, of_queries).to(q.dtype), rotate(k, of_keys).to(k.dtype)
    return q, k
