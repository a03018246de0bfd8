"""Tensors that are made once on a device, and kept from call to call."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

import torch

from ..torch_limits.tensors import raw_stream

Made = TypeVar("Made")


def kept(key: Hashable, device: torch.device, make: Callable[[], Made]) -> Made:
    """``make()`` of an earlier call with this ``key``, if there was one.

    Args:
        make: tensors on ``device``, which nobody writes to.
    """
    by_stream: dict[int | None, Made] = _made(key, device)
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _of_a_graph(key, device, by_stream, make)
        # Kept for each stream: another stream would have to wait until they are written, and could
        # not tell when their memory is reused.
        stream = raw_stream(device)
    if stream not in by_stream:
        with torch.inference_mode(False), torch.no_grad():
            by_stream[stream] = make()
    return by_stream[stream]


@lru_cache(maxsize=256)
def _made(key: Hashable, device: torch.device) -> dict[int | None, Any]:
    """What is kept, by CUDA stream; by None on the CPU."""
    return {}


def _of_a_graph(
    key: Hashable, device: torch.device, made: dict[int | None, Made], make: Callable[[], Made]
) -> Made:
    """Tensors for a CUDA graph that is being captured, which reads them as long as it lives."""
    if made:  # by earlier calls, whose work is done: a capture begins with a synchronisation
        found: Made = _CAPTURED.setdefault((key, device), tuple(made.values())[0])
        return found
    return make()  # captured as well: each replay makes them again


_CAPTURED: dict[tuple[Hashable, torch.device], Any] = {}
"""What CUDA graphs read, kept for good: nothing tells when a graph is deleted."""
