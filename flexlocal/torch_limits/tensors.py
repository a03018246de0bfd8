"""What a tensor is: a place in memory, whose numbers can be looked at."""

import torch
from torch import Tensor


def has_values(x: Tensor) -> bool:
    """Whether numbers of ``x`` and of what is made of it can be looked at.

    Not those of stand-ins, such as fake tensors, nor in a mode that records or fakes operators.
    """
    return has_address(x) and not torch._C._len_torch_dispatch_stack()


def has_address(x: Tensor) -> bool:
    """Whether ``x`` is a place in memory, and neither a stand-in nor made of other tensors."""
    return type(x) in (Tensor, torch.nn.Parameter)


def raw_stream(device: torch.device) -> int:
    """The address of a GPU's current stream; ``current_stream`` takes ten times as long to tell."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def state_of(x: Tensor) -> tuple[int, int] | None:
    """What is another once ``x`` has changed, unless it was through ``x.data``.

    None where nothing tells: of a stand-in, and of a tensor of inference mode.
    """
    return (x._version, x.data_ptr()) if has_values(x) and not x.is_inference() else None


def stop_unless(true: Tensor, message: str, *, waits: bool = False) -> None:
    """Raises ``ValueError`` unless the 0-d ``true`` is; a GPU stops the program some time later.

    Compiled, it is asked when the program runs, and raises a ``RuntimeError``.

    Args:
        waits: wait for a GPU, and raise at once.
    """
    if torch.compiler.is_compiling() or not waits and true.device.type != "cpu":
        torch._assert_async(true, message)
    elif not true:
        raise ValueError(message)
