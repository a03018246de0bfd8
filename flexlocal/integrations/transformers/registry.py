"""``register`` and ``unregister``: flexlocal's name among Transformers' implementations."""

from typing import Any

import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ...torch_limits.tracing import seen_as_constant
from .attention import attend, hand_over
from .mask import LocalMask, local_mask

NAME = "flexlocal"
"""What ``attn_implementation`` is called."""

OLDEST = (5, 17)
"""The oldest release whose mask interface is the one that is served here."""


def register(*, full_attention: str = "sdpa") -> None:
    """Makes ``attn_implementation="flexlocal"`` known to Transformers.

    Models are switched by ``from_pretrained(..., attn_implementation="flexlocal")`` or by
    ``model.set_attn_implementation("flexlocal")``. To register again replaces ``full_attention``.

    Args:
        full_attention: the implementation for layers that are not local: ``"sdpa"``,
            ``"flex_attention"``, another name in Transformers' ``AttentionInterface``, or
            ``"flexlocal"`` itself, which then sees all keys by a window over everything and keeps
            packed documents apart there as well. Models whose scores ``"sdpa"`` does not compute
            (a softcap, as in Gemma 2; sinks, as in gpt-oss) take ``"flexlocal"`` in its place.

    Raises:
        ValueError: no such implementation, or FlashAttention, which looks its own name up in the
            model's config.
        ImportError: Transformers is older than 5.17.
    """
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"flexlocal needs transformers 5.17 or later, got {transformers.__version__}"
        )
    _check_full(full_attention)

    def mask(**arguments: Any) -> Any:
        local = arguments.get("local_size") is not None
        if local or _full(full_attention, arguments["config"]) == NAME:
            return local_mask(**arguments)
        return ALL_MASK_ATTENTION_FUNCTIONS[full_attention](**arguments)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
    ) -> Any:
        if isinstance(attention_mask, LocalMask):
            return attend(module, query, key, value, attention_mask, **rest)
        full = "sdpa" if full_attention == NAME else full_attention
        return hand_over(full, module, query, key, value, attention_mask, **rest)

    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def unregister() -> None:
    """Takes the name back; models that are switched to it must be switched to another before."""
    for interface in (ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
        interface._global_mapping.pop(NAME, None)  # Transformers has no public way


def _check_full(name: object) -> None:
    if name == NAME:
        return
    both = set(ALL_ATTENTION_FUNCTIONS) & set(ALL_MASK_ATTENTION_FUNCTIONS) - {NAME}
    known = sorted(one for one in both if "flash" not in one)
    if name not in known:
        why = ", which looks its name up in the model's config" if "flash" in str(name) else ""
        raise ValueError(
            f"full_attention must be one of {', '.join([*known, NAME])}, got {name!r}{why}"
        )


def _full(named: str, config: Any) -> str:
    """The implementation for layers of a model that are not local."""
    if named != "sdpa":
        return named
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return NAME if capped or not _sdpa_serves(type(config)) else named


@seen_as_constant
def _sdpa_serves(config: type) -> bool:
    """Whether a model's authors let sdpa compute its layers; True where the model is not known."""
    if config not in MODEL_MAPPING:
        return True
    found = MODEL_MAPPING[config]
    models = found if isinstance(found, tuple) else (found,)
    return all(getattr(model, "_supports_sdpa", True) for model in models)
