"""Autocast's state. It is off on the meta device, where torch's own queries raise."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on ``device``; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off inside: operators keep the dtypes that they are given."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
