"""Sinks: a learned logit for each head that takes part in the softmax and has no value.

A sink raises the normaliser of a query's weights and nothing else. Its own weight is
``exp(sink - L)``, where ``L`` is the log-sum-exp of the scores and the sink. Source: gpt-oss,
arXiv:2508.10925.
"""

import torch
from torch import Tensor


def sinks_of_rows(sinks: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sink of each row; row ``r`` takes ``sinks[r % heads]``. Shaped as ``rows``."""
    return sinks.to(dtype)[rows % sinks.shape[0]]


def with_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """The log-sum-exp of scores and sink; -inf where a query sees no key."""
    return torch.logaddexp(lse, sink.broadcast_to(lse.shape)).masked_fill(
        lse == -torch.inf, -torch.inf
    )


def gradient_of_sinks(sinks: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``sinks`` from that of each row's sink; fp32 at least.

    Args:
        rows: the rows, as for ``sinks_of_rows``.
        grad: shaped as ``rows``.
    """
    total = torch.zeros_like(sinks, dtype=grad.dtype)
    return total.index_add_(0, (rows % sinks.shape[0]).flatten(), grad.flatten())
