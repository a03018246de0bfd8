"""The graph of the flex path: a call of FlexAttention, with what is done before and after it.

It is always compiled, on its own or as part of a user's model. Rotary, xpos's layout and the mask
are part of the graph. Inductor makes a few small kernels of them beside that of attention, and
fewer where it can fuse them with a user's operators. FlexAttention: arXiv:2412.05496. Shapes are
those of ``spec``.
"""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ..masks import Window
from ..masks.key_layout import KeyLayout
from ..masks.keys import finite_padding, without_padding
from ..masks.rule import Rule
from ..mods.bias import with_margin
from ..mods.dropout import key_draws, query_draws
from ..mods.shared_qk import ends_alone, own_score_mended, unit_keys
from ..positions import beside_queries, first_positions, mask_of_queries, rule_of
from ..spec import Inputs, Result, Spec, is_placed, xpos_of
from ..torch_limits.kernels import LEAST_HEAD, LEAST_HEAD_ON_CPU, MOST_HEAD, MOST_HEAD_BETWEEN
from ..torch_limits.memory import copied, number_in_memory, written_out
from ..torch_limits.sizes import plain_int
from ..xpos import most_windows
from .kernel import Blocks, Kernel
from .renormalised import attend_renormalised, attend_with_lse
from .tuning import STOCK_BLOCK, Tuning
from .turned import turned


def attend(
    spec: Spec, inputs: Inputs, tuning: Tuning, lists: tuple[Tensor, ...] | None = None
) -> Result:
    """Local attention.

    Args:
        spec: the call, resolved.
        inputs: its tensors, shaped.
        tuning: blocks and options of the kernel.
        lists: the index tensors of the block mask, see ``Blocks.lists``; only for a graph that is
            no part of a user's. None where the graph is to compute them.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype, and with ``return_lse`` the log-sum-exps ``(b, h, n)``.
    """
    if not is_placed(inputs):
        return _attend(spec, rule_of(spec, inputs), inputs, tuning, lists)
    inputs = with_offsets_in_memory(inputs)
    rule, inputs, padding = _near_queries(spec, rule_of(spec, inputs), inputs)
    found = _attend(spec, rule, inputs, tuning, None)
    if padding is None:
        return found
    before, after = padding
    queries = slice(before, inputs.q.shape[2] - after)
    if isinstance(found, Tensor):
        return found[:, :, queries]
    return found[0][:, :, queries], found[1][:, :, queries]


def _attend(
    spec: Spec,
    call_rule: Rule,
    inputs: Inputs,
    tuning: Tuning,
    lists: tuple[Tensor, ...] | None,
) -> Result:
    """``attend``, over the keys and by the rule that are given."""
    q, k, v, mask, bias, seed, *_ = inputs
    sinks, own_graph = inputs.sinks, lists is not None
    b, h, n, _ = q.shape
    h = plain_int(h)  # score_mods capture it, and cannot capture a symbolic int
    if tuning.decodes(n):  # kernels that share keys out are compiled for one batch size
        b = plain_int(b)
        q, k, v = (x.expand(b, -1, -1, -1) for x in (q, k, v))
    blocks = blocks_of(spec, call_rule, inputs, tuning)
    if mask is not None:
        # `expand` tells Dynamo that the mask's sizes are q's, however they were computed.
        mask = mask.expand(-1, 1 if mask.shape[1] == 1 else h, k.shape[2])
        padded_queries = mask_of_queries(call_rule, inputs._replace(mask=mask))
        if padded_queries is not None:
            q = finite_padding(q, padded_queries)
        v = without_padding(v, mask)
        # Forward, kernels hide a score before they use it, so that hidden keys may hold NaN. Their
        # backward pass multiplies by hidden keys.
        if torch.is_grad_enabled() and (k.requires_grad or q.requires_grad):
            k = without_padding(k, mask)
    if spec.shared_qk:
        k = unit_keys(k)
    layout = cast(KeyLayout, blocks.rule) if blocks.laid_out else None
    if layout is not None:
        v = layout.in_slots(v)
    if inputs.inv_freq is not None:
        q, k = turned(call_rule, layout, inputs._replace(q=q, k=k), xpos_of(spec, inputs))
    draws = None
    if spec.dropout > 0:
        assert seed is not None
        query, key = first_positions(inputs, call_rule)
        of_keys = key_draws(seed, b * h, inputs.k.shape[2], key)
        draws = query_draws(seed, b * h, n, query), _by_slot(layout, of_keys)

    kept = None if mask is None else _by_slot(layout, mask)
    on_gpu, d_v, grouped = q.device.type == "cuda", v.shape[-1], k.shape[1] != h
    q, k, v = _as_kernels_read(q, k, v, tuning.decodes(n), own_graph)
    if lists is None:
        lists = blocks.lists(q.device, kept)
    bias_heads = margin = None
    if bias is not None:
        bias_heads = plain_int(bias.shape[0])
        bias, margin = _bias_table(bias, bias_heads, blocks, on_gpu)
    wants_lse = spec.return_lse or sinks is not None
    # A log-sum-exp counts a token's own score, which the mask would hide.
    own_by_mask = spec.shared_qk and kept is None and bias is None and not wants_lse
    ends = ends_alone(call_rule.window, n) if own_by_mask and call_rule.is_window else None
    looked_up = list(call_rule.for_scores().tensors)
    if is_placed(inputs) or not on_gpu:
        looked_up = [written_out(x) for x in looked_up]
    if layout is not None and layout.looks_up_length:
        looked_up.append(number_in_memory(n, q.device))
    fast_tanh = on_gpu and q.dtype in (torch.bfloat16, torch.float16)
    scored = replace(blocks, rule=blocks.rule.for_scores())
    kernel = Kernel(
        scored, len(looked_up), h, grouped, _scale(spec), spec.softcap, fast_tanh, bias_heads,
        margin, on_gpu, ends,
    )  # fmt: skip
    if kept is not None:
        looked_up.append(kept)
    if kernel.last_alone:
        looked_up.append(number_in_memory(n, q.device))
    if draws is not None or sinks is not None:
        out, lse = attend_renormalised(
            kernel, spec.dropout, q, k, v, bias, sinks, draws, lists, tuple(looked_up)
        )
        out = _narrowed(out, d_v)
        return (out, own_score_mended(lse, spec.shared_qk)) if spec.return_lse else out
    arguments = kernel.arguments(lists, looked_up)
    score_mod = kernel.score_mod(bias, looked_up)
    if spec.return_lse:
        out, lse = attend_with_lse(q, k, v, score_mod=score_mod, **arguments)
        return _narrowed(out, d_v), own_score_mended(lse, spec.shared_qk)
    plain: Tensor = flex_attention(q, k, v, score_mod=score_mod, **arguments)
    return _narrowed(plain, d_v) if on_gpu or own_graph else copied(plain)


def with_offsets_in_memory(inputs: Inputs) -> Inputs:
    """``inputs``, shaped, with offsets in tensors: a kernel would be compiled for each number."""
    q_offset, kv_offset, seeing = inputs.q_offset, inputs.kv_offset, inputs.seeing

    def in_memory(offset: Any) -> Any:
        if not isinstance(offset, int):
            return offset
        return number_in_memory(offset, inputs.q.device).view(1, 1, 1)

    if seeing is not None:
        inputs = inputs._replace(seeing=(in_memory(seeing[0]), in_memory(seeing[1])))
    if not isinstance(q_offset, int) and not isinstance(kv_offset, int):
        return inputs
    same = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset
    first = in_memory(q_offset)
    return inputs._replace(q_offset=first, kv_offset=first if same else in_memory(kv_offset))


def _near_queries(
    spec: Spec, rule: Any, inputs: Inputs
) -> tuple[Rule, Inputs, tuple[int, int] | None]:
    """The rule and the call's keys, without those that no query may see where they are many.

    xpos's layout wants as many queries as keys, each at the index of the key at its position.

    Returns:
        The rule, the inputs, and how many queries were added before and after the call's own.
    """
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    apart = not isinstance(rule.lead, int) or n != m
    aligned = apart and spec.xpos_base is not None
    if not aligned and not (apart and rule.reach.sees_few(n, m)):
        return rule, inputs, None
    if aligned and isinstance(rule.lead, int):
        rule = replace(rule, lead=number_in_memory(rule.lead, inputs.q.device).view(1, 1, 1))
    rule, inputs = beside_queries(rule, inputs)
    if not aligned:
        return rule, inputs, None
    before, after = rule.reach.back, rule.reach.ahead
    q = F.pad(inputs.q, (0, 0, before, after))
    q_offset = inputs.q_offset - before
    return rule.for_every_key(n), inputs._replace(q=q, q_offset=q_offset), (before, after)


def blocks_of(spec: Spec, rule: Rule, inputs: Inputs, tuning: Tuning) -> Blocks:
    """The sparse blocks of a call.

    Args:
        rule: the call's. With xpos its window is laid out over slots on sequences that are too long
            for one origin.
    """
    b, h, n, _ = inputs.q.shape
    slots, masked = inputs.k.shape[2], inputs.mask is not None
    laid_out = False
    if spec.xpos_base is not None:
        windows = most_windows(rule, spec.xpos_base, inputs.q.dtype)
        if n > windows * rule.window.size:
            layout = KeyLayout(rule, windows, n)
            rule, slots, laid_out = layout, layout.all_slots, True
    entries = b if rule.tensors else 1, plain_int(h)
    return Blocks(rule, n, slots, entries, masked, spec.shared_qk, tuning, laid_out)


def _scale(spec: Spec) -> float:
    assert spec.scale is not None
    return spec.scale if spec.softcap is None else spec.scale / spec.softcap


def _by_slot(layout: KeyLayout | None, x: Tensor) -> Tensor:
    """``x`` ``(..., n)``, one element for each key, as ``(..., slots)`` in a buffer for kernels."""
    return written_out(x if layout is None else layout.in_slots(x[..., None])[..., 0])


def _bias_table(
    bias: Tensor, heads: int, blocks: Blocks, on_gpu: bool
) -> tuple[Tensor, int | None]:
    """``bias`` as kernels look it up, and its margin (``with_margin``), if it has one."""
    # `reshape` states plain sizes: Dynamo makes them symbolic after biases of several windows.
    window: Window = blocks.rule.window
    sized = bias.reshape(heads, window.size, window.span)
    if bias.dtype == torch.float64:
        bias = sized = written_out(sized.to(torch.float32))  # kernels read no float64
    if not on_gpu:
        # CPU kernels cannot read a bias that the graph computes, so that it gets a buffer. They
        # have no backward pass: a bias that requires a gradient does not reach them.
        learned = torch.is_grad_enabled() and bias.requires_grad
        return bias if learned else written_out(sized), None
    # Not where the last block is cut: kernels look up keys beyond the sequence's end there, and
    # these may lie beyond the margin.
    if not blocks.rule.is_window or blocks.n % STOCK_BLOCK:
        return bias, None
    margin = blocks.rule.window.block_margin(blocks.tuning.block)
    return with_margin(sized, margin), margin


def _as_kernels_read(
    q: Tensor, k: Tensor, v: Tensor, decodes: bool, own_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v padded to head sizes that kernels take, in memory that they read correctly.

    Args:
        decodes: a decoding kernel may be taken.
        own_graph: the graph is no part of a user's.
    """
    if q.device.type != "cuda":
        q, k = _at_least(q, LEAST_HEAD_ON_CPU), _at_least(k, LEAST_HEAD_ON_CPU)
        return (q, k, v) if own_graph else (copied(q), copied(k), copied(v))
    q, k, v = _padded_head(q), _padded_head(k), _padded_head(v)
    # torch 2.11 to 2.13 ask for the strides of a decoding kernel's query before they are settled: a
    # query computed from a transposed view was read wrongly.
    return written_out(q) if decodes else q, k, v


def _padded_head(x: Tensor) -> Tensor:
    """``x``, padded with zeros to a head size that kernels take on a GPU."""
    d = x.shape[-1]
    return _at_least(x, MOST_HEAD if d > MOST_HEAD_BETWEEN.get(x.dtype, d) else LEAST_HEAD)


def _at_least(x: Tensor, d: int) -> Tensor:
    """``x``, padded with zeros to head size ``d`` at least."""
    return x if x.shape[-1] >= d else F.pad(x, (0, d - x.shape[-1]))


def _narrowed(x: Tensor, d: int) -> Tensor:
    """``x`` without what lies past head size ``d``."""
    # Not sliced in vain: even a full slice is a view, which autograd would make again outside the
    # graph.
    return x if x.shape[-1] == d else x[..., :d]
