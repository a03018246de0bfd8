"""What Transformers calls in each layer: ``local_attention``, or another implementation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import dispatch
from ...spec import Inputs, Spec, offsets_of
from .mask import LocalMask
from .packing import warn_of_leaks

LOCAL_LAYERS = ("sliding_attention", "chunked_attention")
"""Transformers' names for kinds of layers that are local."""


class Calls(NamedTuple):
    """Calls of layers since the program began, those that a compiler traced left out.

    Attributes:
        local: served by ``local_attention``, without a mask of queries by keys.
        full: layers that are not local, handed to the implementation named by ``full_attention``.
        dense: local layers that were given a dense mask, by the user or by the model's own code,
            and handed over with it. flexlocal itself builds none.
    """

    local: int = 0
    full: int = 0
    dense: int = 0


_calls = Calls()


def calls() -> Calls:
    """How many layers were served how; subtract two of these for what lies between."""
    return _calls


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LocalMask,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """A layer on ``local_attention``.

    Args:
        query: ``(b, h, n, d)``, rotated.
        key, value: ``(b, kv, m, d)`` and ``(b, kv, m, d_v)``, the cache's among them.
        mask: of this kind of layer.
        dropout: probability to drop a weight; 0 in inference.
        scaling: factor on the products.
        softcap: their bound.
        s_aux: ``(h,)``, the sinks.
        position_ids, cu_seq_lens_q: where they begin anew, documents do.
        others: of no effect here, such as the window, which the mask knows.

    Returns:
        ``(b, n, h, d_v)``, contiguous, and None in place of weights.

    Raises:
        ValueError: the layer asks for what windows cannot do.
    """
    if position_bias is not None:
        raise ValueError(
            "position_bias must be None with attn_implementation='flexlocal': 'sdpa' and 'eager' "
            "take it"
        )
    if output_attentions:
        raise ValueError(
            "output_attentions must be False with attn_implementation='flexlocal', which keeps no "
            "weights: 'eager' does"
        )
    mask.check(query, key)
    documents = mask.documents_with(position_ids, cu_seq_lens_q)
    sums = mask.sums_with(documents, cu_seq_lens_q)
    keys, lead, first = (_beside(query, x) for x in (mask.keys, mask.lead, mask.first))
    q_offset, kv_offset = offsets_of(query, key, first + lead, first)
    spec = Spec(mask.window, scaling, dropout=dropout, softcap=softcap)
    inputs = Inputs(
        query, key, value, keys, sinks=s_aux, documents=_beside(query, documents),
        q_offset=q_offset, kv_offset=kv_offset, cu_seqlens=_beside(query, sums),
    )  # fmt: skip
    out: Any = dispatch.attend(spec, inputs)
    _count(local=1)
    return out.transpose(1, 2).contiguous(), None


def hand_over(
    full_attention: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    **arguments: Any,
) -> Any:
    """A layer on another implementation of Transformers.

    Raises:
        ValueError: a local layer without a mask, or what that implementation would leave out.
    """
    local = is_local(module, arguments)
    if local and mask is None:
        raise ValueError(
            "a local layer came without a mask, so that its window is not known: "
            f"{type(module).__name__} makes no masks by Transformers' mask interface here. "
            "Continuous batching needs attn_implementation='paged|eager', 'sdpa' or FlashAttention"
        )
    if full_attention == "sdpa":
        for name in ("softcap", "s_aux"):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{name} is nothing that full_attention='sdpa' computes in "
                    f"{type(module).__name__}: register(full_attention='flexlocal')"
                )
        warn_of_leaks(
            mask, query, key, arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
        )
    _count(full=int(not local), dense=int(local))
    implementation = ALL_ATTENTION_FUNCTIONS[full_attention]
    return implementation(module, query, key, value, mask, **arguments)


def is_local(module: Any, arguments: dict[str, Any]) -> bool:
    """Whether a layer is one with a window or chunks, by its arguments and its model's config."""
    if arguments.get("sliding_window") is not None:
        return True
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return kinds is not None and index is not None and kinds[index] in LOCAL_LAYERS


def _beside(query: Tensor, x: Any) -> Any:
    """``x`` on the query's device: the layers of a model may lie on several."""
    return x.to(query.device) if isinstance(x, Tensor) else x


def _count(local: int = 0, full: int = 0, dense: int = 0) -> None:
    global _calls
    if not torch.compiler.is_compiling():
        _calls = Calls(_calls.local + local, _calls.full + full, _calls.dense + dense)
