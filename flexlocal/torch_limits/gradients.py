"""Batches of ``torch.vmap``, gradients that come in one, and gradients of gradients."""

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


def refuse_to_be_differentiated(whose: str) -> None:
    """Refuses a backward pass whose gradients are to be differentiated, by kernels that cannot be.

    ``once_differentiable`` refuses later, and not at all where the gradient that came in is a
    constant, as that of a sum: what depends on the gradients is then left out (torch 2.11 to 2.15).

    Raises:
        RuntimeError: ``create_graph=True`` was asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{whose} kernels have no second derivative: create_graph must be False here, "
            "or backend 'eager'"
        )
