"""``LocalMask``: what a layer needs to know of who sees whom, in place of a mask.

Shapes: ``b`` batch entries, ``n`` queries, ``m`` keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...flex import flash
from ...masks import Window
from .packing import (
    documents_of_mask,
    documents_of_positions,
    documents_of_sums,
    sums_of_documents,
)

EVERYTHING = 2**28
"""Keys on a side that a window holds which is to hide nothing: more than any sequence has.

Sums of a few of it still fit into 32 bits, in which kernels count.
"""


@dataclass(eq=False)
class LocalMask:
    """Which keys each query of a forward pass sees, as ``local_attention`` takes it.

    Attributes:
        window: the rule.
        batch, n, m: batch entries, queries and keys of the forward pass.
        lead: index of the key at the first query, an int or integer ``(1,)``.
        first: position of the first key, an int or integer ``(1,)`` or ``(b,)``.
        keys: boolean ``(b, m)``, True for keys that are no padding; None where none is.
        documents: int32 ``(b, m)``, where Transformers found documents itself.
    """

    window: Window
    batch: int
    n: int
    m: int
    lead: int | Tensor = 0
    first: int | Tensor = 0
    keys: Tensor | None = None
    documents: Tensor | None = None
    _found: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    ndim: ClassVar[int] = 4
    """Of the mask that it stands for: models ask, to tell it from a user's mask of padding."""

    def check(self, query: Tensor, key: Tensor) -> None:
        """Queries and keys are as many as the mask was made for.

        Raises:
            ValueError: they are not: the model's layers hold keys that its masks do not know of.
        """
        if (query.shape[2], key.shape[2]) != (self.n, self.m):
            raise ValueError(
                f"flexlocal's mask was made for {self.n} queries and {self.m} keys, got "
                f"{query.shape[2]} and {key.shape[2]}: this model's layers need "
                "attn_implementation='sdpa' or 'eager'"
            )

    def documents_with(self, position_ids: object, cu_seq_lens: Tensor | None) -> Tensor | None:
        """The documents of the keys, int32 ``(b or 1, m)``; None where each row is one.

        Args:
            position_ids: the positions of the queries as a layer was given them; those that are no
                integer ``(b or 1, n)`` tell of no documents.
            cu_seq_lens: int32 ``(documents + 1,)``, as FlashAttention takes them, or None.

        Raises:
            ValueError: cumulative lengths with keys of an earlier call.
        """
        if cu_seq_lens is not None:
            return self._remembered(cu_seq_lens, self._of_sums)
        if self.documents is not None:
            return self.documents
        if self.n == 1 or not isinstance(position_ids, Tensor):
            return None
        if position_ids.dim() != 2 or position_ids.shape[-1] != self.n:
            return None
        return self._remembered(position_ids, self._of_positions)

    def sums_with(self, documents: Tensor | None, cu_seq_lens: Tensor | None) -> Tensor | None:
        """The cumulative lengths of a single row, by which FlashAttention 4 tells documents apart.

        Where a layer was given none they are read from the documents, once for all layers of a
        forward pass and only if that package is there: the host waits for the GPU. None where
        windows stand, which its kernels do not know.

        Args:
            documents: ``documents_with``'s.
            cu_seq_lens: as for ``documents_with``.
        """
        if documents is None or _stands(self.window) or self.batch > 1 or self.n != self.m:
            return None
        if cu_seq_lens is not None:
            return cu_seq_lens
        readable = documents.device.type == "cuda" and not torch.compiler.is_compiling()
        if not readable or self.keys is not None or not flash.installed():
            return None
        return self._remembered(documents, sums_of_documents)

    def _remembered(self, given: Tensor, find: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """``find(given)``, found once for all layers of a forward pass."""
        if torch.compiler.is_compiling():
            return find(given)
        before = self._found.get(find.__name__)
        if before is None or before[0] is not given:
            before = self._found[find.__name__] = given, find(given)
        return before[1]

    def _of_sums(self, cu_seq_lens: Tensor) -> Tensor:
        if self.n != self.m:
            raise ValueError(
                "cu_seq_lens_q must be None where a cache holds keys of earlier calls, got it "
                f"with {self.n} queries and {self.m} keys"
            )
        return documents_of_sums(cu_seq_lens, self.batch, self.n)

    def _of_positions(self, position_ids: Tensor) -> Tensor | None:
        query = torch.arange(self.n, device=position_ids.device) + self.lead
        kept = None if self.keys is None else self.keys[:, query]
        documents = documents_of_positions(position_ids, kept)
        # Transformers' own masks read values on the host here as well.
        if not torch.compiler.is_compiling() and not bool((documents[:, -1] > 0).any()):
            return None
        # Keys before the queries' are of the first query's document, those behind them not seen.
        key = torch.arange(self.m, device=position_ids.device) - self.lead
        return documents[:, key.clamp(0, self.n - 1)]


def local_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | LocalMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> LocalMask:
    """What Transformers' mask interface asks for, keywords only; once a kind of layer and call.

    Args:
        batch_size, q_length, kv_length: ``b``, ``n`` and ``m``.
        mask_function: who sees whom, apart from padding; a function of batch entry, head, query and
            key.
        q_offset, kv_offset: index in the row of the first query and of the first key.
        attention_mask: boolean ``(b, tokens so far)``, False for padding; or a ``LocalMask`` that
            a model hands back.
        local_size: the window or chunk by the model's own count; None for a layer that sees all.
        allow_is_causal_skip: False for packed rows, and for a step of a static cache.
        use_vmap: the model has altered the mask by functions of its own.
        others: ``allow_is_bidirectional_skip`` is among them for layers that see both ways.

    Raises:
        ValueError: the mask is no window, or padding is not ``(b, tokens)``.
    """
    if isinstance(attention_mask, LocalMask):
        return attention_mask
    if use_vmap:
        raise ValueError(
            "attn_implementation='flexlocal' serves windows, causal and chunked masks; "
            f"{type(config).__name__} adds a mask function of its own (for images, or to see both "
            "ways). 'sdpa' and 'eager' take it"
        )
    causal = "allow_is_bidirectional_skip" not in others
    window = _window(config, local_size, causal)
    lead, first = q_offset - kv_offset, kv_offset
    # A step of a static cache gets tensors, even of what is a number or all True: a compiler would
    # make the numbers of each token part of a graph.
    step = causal and q_length == 1 and not allow_is_causal_skip
    if not _stands(window):
        first = 0  # only what lies between two tokens counts
    keys = None
    if attention_mask is not None and not _hides_nothing(attention_mask, q_length, step):
        keys = _kept(attention_mask, kv_offset, kv_length)
        if _stands(window):  # windows begin at a row's first token
            first = first - (attention_mask.cumsum(-1) == 0).sum(-1)
    documents = None
    if causal and not allow_is_causal_skip and q_length == kv_length > 1:
        documents = documents_of_mask(mask_function, batch_size, q_length, device)
    return LocalMask(
        window,
        batch_size,
        q_length,
        kv_length,
        _number(lead, step, device),
        _number(first, step and _stands(window), device),
        keys,
        documents,
    )


def _window(config: Any, local_size: int | None, causal: bool) -> Window:
    """The rule of a layer.

    Raises:
        ValueError: windows and chunks of one size in one model, which cannot be told apart.
    """
    if not causal:
        return Window.around(EVERYTHING if local_size is None else local_size)
    if local_size is None:
        return Window.sliding(EVERYTHING)
    if getattr(config, "attention_chunk_size", None) != local_size:
        return Window.sliding(local_size)
    if getattr(config, "sliding_window", None) == local_size:
        raise ValueError(
            "sliding_window and attention_chunk_size must differ in a model that has both, got "
            f"{local_size} for both"
        )
    return Window.chunked(local_size)


def _hides_nothing(attention_mask: Tensor, q_length: int, step: bool) -> bool:
    """Whether a mask of padding is known to be True for all tokens so far.

    Raises:
        ValueError: it is not ``(b, tokens)``.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have the shape (batch, tokens), got {tuple(attention_mask.shape)}"
        )
    # A single query is not worth a synchronisation.
    if step or q_length == 1 or torch.compiler.is_compiling():
        return False
    return bool(attention_mask.all())


def _stands(window: Window) -> bool:
    """Whether it matters where positions begin."""
    return not window.exact


def _kept(attention_mask: Tensor, kv_offset: int | Tensor, kv_length: int) -> Tensor:
    """The part of the row's tokens that the keys are, ``(b, m)``; those to come are not kept."""
    if isinstance(kv_offset, Tensor):
        padded = F.pad(attention_mask, (0, kv_length))
        return padded[:, torch.arange(kv_length, device=padded.device) + kv_offset]
    missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])
    return F.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length]


def _number(number: int | Tensor, as_tensor: bool, device: torch.device | str) -> int | Tensor:
    """An offset as ``local_attention`` takes it."""
    if isinstance(number, Tensor):
        return number.reshape(-1)
    return torch.full((1,), number, device=device) if as_tensor else number
