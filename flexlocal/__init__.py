"""Local attention for PyTorch as one fused kernel.

``LocalAttention`` is the layer, ``local_attention`` the function under it, ``Window`` the rule
that says which keys a query sees, ``Rotary`` what turns the function's queries and keys;
``LocalCache`` holds what is decoded so far, ``local_attention_varlen`` takes documents one after
the other, ``merge_attention`` makes one of two attentions, ``explain`` gives a ``Choice`` of path;
``LocalMHA`` and ``DynamicPositionBias`` are blocks around the layer. They load when first used: the
rules in ``flexlocal.masks`` need nothing of the layer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import LocalCache
    from .dispatch import Choice
    from .functional import attention_map, explain, local_attention
    from .layer import LocalAttention
    from .masks import Window
    from .merge import merge_attention
    from .mha import DynamicPositionBias, LocalMHA
    from .rotary import Rotary
    from .varlen import local_attention_varlen

__version__ = "0.1.0"

__all__ = [
    "Choice", "DynamicPositionBias", "LocalAttention", "LocalCache", "LocalMHA", "Rotary", "Window",
    "attention_map", "explain", "local_attention", "local_attention_varlen", "merge_attention",
]  # fmt: skip

_HOMES = {
    "Choice": "dispatch",
    "DynamicPositionBias": "mha",
    "LocalAttention": "layer",
    "LocalCache": "cache",
    "LocalMHA": "mha",
    "Rotary": "rotary",
    "Window": "masks",
    "attention_map": "functional",
    "explain": "functional",
    "local_attention": "functional",
    "local_attention_varlen": "varlen",
    "merge_attention": "merge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
