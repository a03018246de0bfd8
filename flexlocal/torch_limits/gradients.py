"""Batches of ``torch.vmap``, and gradients that come in one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tracing import is_transformed


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    """``x.add_(y)``; a new tensor for ``vmap``, which cannot write a batch into what is none.

    torch 2.11 to 2.15.
    """
    return x + y if is_transformed() else x.add_(y)


def for_each_gradient(
    function: Callable[..., Sequence[Tensor | None]], *grads: Tensor | None
) -> list[Tensor | None]:
    """``function`` of gradients, called for one at a time where they come in a batch.

    ``is_grads_batched`` and ``jacobian(vectorize=True)`` make such batches by an older ``vmap``,
    which knows few operators and cannot write a batch into what is none (torch 2.11 to 2.15).
    """
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    batches = [x for x in grads if x is not None and is_batch(x)]
    if not batches:
        return list(function(*grads))
    level = torch._C._vmapmode_increment_nesting() - 1  # nothing else tells the level
    torch._C._vmapmode_decrement_nesting()
    count = len(torch._remove_batch_dim(batches[0], level, 0, 0))
    apart = [None if x is None else torch._remove_batch_dim(x, level, count, 0) for x in grads]
    found = [function(*(None if x is None else x[i] for x in apart)) for i in range(count)]
    return [
        None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)
        for each in zip(*found, strict=True)
    ]
