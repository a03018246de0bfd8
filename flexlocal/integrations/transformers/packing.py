"""Documents that share a row, from what Transformers hands to masks and to layers.

Shapes: ``b`` batch entries, ``n`` tokens. Documents are int32 numbers that grow along a row.
"""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import warn_once
from ...masks import documents_from_cu_seqlens, documents_from_positions
from ...torch_limits.tensors import stop_unless


def documents_of_mask(
    mask_function: Callable[..., Tensor], batch: int, n: int, device: torch.device | str
) -> Tensor:
    """``(b, n)`` by a causal mask of Transformers: where a token does not see its predecessor.

    Its mask of packed rows is one closure of window and documents. Asked for neighbours alone it
    answers with n values for a row, and not with n * n. A chunk begins such a document too, which
    is as good: no query of it sees a key before it.

    Raises:
        ValueError: a query sees a later key. In a compiled model a RuntimeError when it runs.
    """
    entry = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    later = torch.arange(1, n, device=device)
    follows = mask_function(entry, head, later, later - 1).expand(batch, n - 1)
    ahead = mask_function(entry, head, later - 1, later)
    stop_unless(
        ~ahead.any(),
        "attn_implementation='flexlocal' serves causal windows; here tokens of one block (an "
        "image, as block_sequence_ids has it) see each other both ways. 'sdpa' and 'eager' do that",
        waits=True,
    )
    return F.pad((~follows).cumsum(-1, dtype=torch.int32), (1, 0))


def documents_of_positions(position_ids: Tensor, kept: Tensor | None) -> Tensor:
    """``(b or 1, n)``: one begins where a position is not the one after the last token's.

    Args:
        position_ids: integer ``(b or 1, n)``.
        kept: boolean ``(b, n)``, False for padding, whose positions mean nothing.
    """
    if kept is None:
        return documents_from_positions(position_ids)
    index = torch.arange(position_ids.shape[-1], device=kept.device)
    last = torch.where(kept, index, -1).cummax(-1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)  # the token before, padding passed over
    positions = position_ids.expand(kept.shape)
    follows = positions == positions.gather(-1, before.clamp(min=0)) + 1
    begins = kept & (before >= 0) & ~follows
    return begins.cumsum(-1, dtype=torch.int32)


def documents_of_sums(cu_seq_lens: Tensor, batch: int, n: int) -> Tensor:
    """``(b, n)`` by cumulative lengths, which count through all rows of a batch."""
    return documents_from_cu_seqlens(cu_seq_lens, batch * n).view(batch, n)


def sums_of_documents(documents: Tensor) -> Tensor:
    """The cumulative lengths of ``(1, n)``, int32 ``(documents + 1,)``; waits for the device."""
    begins = F.pad(documents[0, 1:] != documents[0, :-1], (1, 1), value=True)
    return begins.nonzero()[:, 0].to(torch.int32)


def warn_of_leaks(
    mask: object, query: Tensor, key: Tensor, position_ids: object, cu_seq_lens: Tensor | None
) -> None:
    """Warns, once, where a layer that is not local sees across the documents of a row.

    Transformers leaves documents out of its masks where there is a cache (``use_cache`` is on by
    default) or a mask of padding, and in some models always.

    Args:
        mask: boolean or additive ``(b, 1, n, n)``, or None for a causal or empty one; of others
            nothing is known.
        query, key: ``(b, h, n, d)``.
        position_ids, cu_seq_lens: as a layer was given them.
    """
    given = position_ids if cu_seq_lens is None else cu_seq_lens
    batch, n = query.shape[0], query.shape[2]
    if torch.compiler.is_compiling() or not 1 < n == key.shape[2] or not isinstance(given, Tensor):
        return
    if not (mask is None or isinstance(mask, Tensor)) or _asked_before(given, mask):
        return
    if cu_seq_lens is not None:
        documents = documents_of_sums(cu_seq_lens, batch, n)
    elif given.dim() == 2 and given.shape[-1] == n:
        documents = documents_from_positions(given)
    else:
        return
    across = documents[:, 1:] != documents[:, :-1]
    if isinstance(mask, Tensor):
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = visible.diagonal(-1, -2, -1) & visible.diagonal(0, -2, -1)[..., 1:]
        across = across & seen.any(1)
    if bool(across.any()):
        warn_once(
            "layers that are not local see across packed documents here: Transformers made their "
            "mask without them. Call the model with use_cache=False and without attention_mask, or "
            "register(full_attention='flexlocal')"
        )


def _asked_before(given: Tensor, mask: Tensor | None) -> bool:
    """Whether the last question was the same one, as it is in all layers of a forward pass."""
    global _asked
    question = (given, given if mask is None else mask)
    before, _asked = _asked, tuple(weakref.ref(x) for x in question)
    return len(before) == 2 and all(x() is y for x, y in zip(before, question, strict=True))


_asked: tuple[weakref.ref[Tensor], ...] = ()
