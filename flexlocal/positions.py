"""Where a call's queries and keys stand, and the rule over them. Shapes are those of ``spec``."""

from typing import Any

import torch
from torch import Tensor

from .masks.placed import place
from .masks.rule import Rule
from .spec import Inputs, Spec, is_placed, wants_gradients


def rule_of(spec: Spec, inputs: Inputs) -> Rule:
    """The rule of a call over its own tensors and positions.

    Args:
        inputs: shaped and ``numbered``.
    """
    if inputs.rule_tensors:
        return spec.rule.with_tensors(inputs.rule_tensors)
    if not is_placed(inputs):
        return spec.rule
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    q_offset, kv_offset = (0 if x is None else x for x in (inputs.q_offset, inputs.kv_offset))
    return place(
        spec.rule.window, queries, keys, inputs.documents, q_offset, kv_offset,
        begin=inputs.begin, seeing=inputs.seeing,
    )  # fmt: skip


def beside_queries(rule: Any, inputs: Inputs) -> tuple[Any, Inputs]:
    """A placed rule and shaped inputs, over those keys alone that some query may see."""
    rule, near = rule.beside(inputs.q.shape[2], inputs.k.shape[2])
    mask = near.kept(inputs.mask)
    if mask is not None:
        mask = mask.expand(inputs.q.shape[0], -1, -1)
    return rule, inputs._replace(k=near.of(inputs.k), v=near.of(inputs.v), mask=mask)


def positions(rule: Rule, q: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, integer ``(n,)`` and ``(keys,)``, or ``(b, h or 1, ...)``.

    One tensor for both where each query is the token of the key at its index.

    Args:
        rule: the call's, over so many keys or key slots.
        q: ``(b, h, n, d)``.
    """
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    head = torch.arange(q.shape[1], device=q.device)[:, None]
    query, key = (torch.arange(length, device=q.device) for length in (q.shape[2], keys))
    of_keys = rule.key_position(batch, head, key)
    if q.shape[2] == keys and isinstance(rule.lead, int) and rule.lead == 0:
        return of_keys, of_keys
    return rule.query_position(batch, head, query), of_keys


def first_positions(inputs: Inputs, rule: Rule) -> tuple[int | Tensor, int | Tensor]:
    """Position in the whole sequence of the first query and of the first key.

    Args:
        inputs: shaped.
        rule: the call's, over the keys in question.

    Returns:
        Numbers, or integer ``(b * h, 1)``.
    """
    first = 0 if inputs.q_offset is None else inputs.q_offset
    b, h = inputs.q.shape[:2]
    numbers = first, first - rule.lead
    query, key = (x if isinstance(x, int) else x.expand(b, h, 1).reshape(-1, 1) for x in numbers)
    return query, key


def mask_of_queries(rule: Rule, inputs: Inputs) -> Tensor | None:
    """The key mask, where gradients are taken and each query is the token of the key at its index.

    Args:
        inputs: shaped.
        rule: the call's, over these keys.
    """
    if inputs.mask is None or not wants_gradients(inputs):
        return None
    lead, queries, keys = rule.lead, inputs.q.shape[2], inputs.k.shape[2]
    return inputs.mask if isinstance(lead, int) and lead == 0 and queries == keys else None


def xpos_tokens(spec: Spec, inputs: Inputs) -> int:
    """Consecutive tokens that share an origin of xpos at least: a window and all that it sees."""
    window = spec.rule.window
    # Windows that count from documents begin anywhere among the tokens that share an origin.
    loose = 0 if window.exact or not is_placed(inputs) else window.size - 1
    tokens: int = window.span + loose * (1 if window.causal else 2)
    return tokens
