"""``LocalCache``: the keys and values that the next tokens may still see, in a ring.

What leaves the window is overwritten, so that memory does not grow with the text. Keys are stored
as attention reads them, rotated; with xpos as they came, because its factors count from a window's
place. No number is read from a GPU. Rolling caches: Mistral 7B, arXiv:2310.06825, section 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks.arguments import check_count, check_integers, kind_of
from .masks.ring import NEVER_FILLED, Ring
from .masks.window import Window
from .torch_limits.sizes import at_least
from .torch_limits.tensors import stop_unless

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LocalCache:
    """A memory for decoding with a causal window; ``local_attention(..., cache=)`` fills it.

    Args:
        window: whose keys are kept; causal.
        batch: rows.
        kv_heads: key heads.
        head_size: channels of a key, ``d``.
        v_head_size: channels of a value, ``d_v``; ``head_size`` by default.
        dtype: of keys and values.
        device: where they live.
        rewindable: how many tokens ``rewind`` may take back.

    Attributes:
        keys: ``(batch, kv_heads, slots, d)``, the key at position ``p`` in slot ``p % slots``.
        values: ``(batch, kv_heads, slots, d_v)``, likewise.
        positions: int32 ``(batch, slots)``, position of the key in each slot; below 0 for none.
        lengths: int32 ``(batch,)``, tokens of each row so far: the position of the next one.
        slots: room for tokens, those of a window and ``rewindable`` more.

    Raises:
        ValueError: the window is not causal, or a number or dtype is out of range.
        TypeError: an argument is of the wrong kind.

    >>> import torch
    >>> cache = LocalCache(Window.sliding(4), 1, 2, 8, dtype=torch.float32, device="cpu")
    >>> cache.slots, cache.nbytes
    (4, 544)
    """

    def __init__(
        self,
        window: Window,
        batch: int,
        kv_heads: int,
        head_size: int,
        *,
        v_head_size: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        rewindable: int = 0,
    ) -> None:
        if not isinstance(window, Window):
            raise TypeError(f"window must be a Window, got {window!r} of {kind_of(window)}")
        if not window.causal:
            raise ValueError(
                f"window must be causal for a cache: later tokens would change what is out, got "
                f"{window!r}"
            )
        batch = check_count("batch", batch)
        kv_heads = check_count("kv_heads", kv_heads)
        head_size = check_count("head_size", head_size)
        v_head_size = head_size if v_head_size is None else check_count("v_head_size", v_head_size)
        rewindable = check_count("rewindable", rewindable, least=0)
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be a floating-point dtype, 16 to 64 bits wide, got {dtype}"
            )
        self.window = window
        self.rewindable = rewindable
        self.slots = window.reach.back + 1 + rewindable
        with torch.inference_mode(False):  # else only calls under inference_mode could fill it
            room = (batch, kv_heads, self.slots)
            self.keys = torch.zeros(*room, head_size, dtype=dtype, device=device)
            self.values = torch.zeros(*room, v_head_size, dtype=dtype, device=device)
            self.positions = torch.full(
                (batch, self.slots), NEVER_FILLED, dtype=torch.int32, device=device
            )
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self._longest = torch.zeros_like(self.lengths)
            self._row = torch.arange(batch, device=device)[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the same from the first token to the last."""
        held = self.keys, self.values, self.positions, self.lengths, self._longest, self._row
        return sum(x.nbytes for x in held)

    @torch.no_grad()
    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Empties rows, for texts that begin anew; all of them by default.

        Args:
            rows: a row, several, or boolean ``(batch,)``, True for rows to empty.

        Raises:
            TypeError, ValueError, IndexError: ``rows`` names none.
        """
        if rows is None:
            chosen = torch.ones_like(self.lengths, dtype=torch.bool)
        elif isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != self.lengths.shape:
                raise ValueError(
                    f"rows must be of shape {tuple(self.lengths.shape)} where they are boolean, "
                    f"got {tuple(rows.shape)}"
                )
            chosen = rows.to(self.lengths.device)
        else:
            index = torch.as_tensor(rows, device=self.lengths.device)
            check_integers("rows", index)
            chosen = torch.zeros_like(self.lengths, dtype=torch.bool)
            chosen[index] = True
        for x in (self.keys, self.values):  # not left to the mask: a NaN would spread
            x.masked_fill_(chosen[:, None, None, None], 0.0)
        self.positions.masked_fill_(chosen[:, None], NEVER_FILLED)
        for x in (self.lengths, self._longest):
            x.masked_fill_(chosen, 0)

    @torch.no_grad()
    def rewind(self, tokens: int | Tensor) -> None:
        """Takes back the last tokens, as speculative decoding does with those it rejects.

        Args:
            tokens: how many, for all rows, or integer ``(batch,)``. A row may go back to
                ``rewindable`` tokens before the longest that it has been, where no token that its
                window needs has been overwritten.

        Raises:
            ValueError: there are more than ``rewindable``, or than the row has. On a GPU numbers of
                a tensor are checked there, and stop the program later.
            TypeError: ``tokens`` is of the wrong kind.
        """
        if not isinstance(tokens, Tensor):
            check_count("tokens", tokens, least=0)
            if tokens > self.rewindable:
                raise ValueError(
                    f"tokens must be at most rewindable, {self.rewindable} for this cache, got "
                    f"{tokens}"
                )
            tokens = self.lengths.new_full((), tokens)
        check_integers("tokens", tokens)
        if tokens.dim() > 1 or tokens.dim() == 1 and tokens.shape != self.lengths.shape:
            raise ValueError(
                f"tokens must be an int or of shape {tuple(self.lengths.shape)}, got "
                f"{tuple(tokens.shape)}"
            )
        least = (self._longest - self.rewindable).clamp(min=0)
        left = self.lengths - tokens
        stop_unless(
            ((least <= left) & (left <= self.lengths)).all(),
            "tokens must be at least 0, and leave each row at least as many as it has had at most "
            f"less rewindable, {self.rewindable}",
        )
        self.lengths.copy_(left)

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, count: int | Tensor) -> Ring:
        """Stores tokens that leave all keys in the ring which they see themselves.

        Args:
            k: ``(batch, kv_heads, n, d)``, at most ``fits`` tokens.
            v: ``(batch, kv_heads, n, d_v)``.
            count: how many of them each row takes, from the first on: ``n`` or ``(batch,)``.

        Returns:
            What the tokens see, over ``keys`` and ``values``.
        """
        first = self.lengths.clone()
        self._write(k, v, first, count)
        self._grow(count)
        return self.rule(first)

    def append_one(self, k: Tensor, v: Tensor, length: int) -> None:
        """Stores a token in each row, all of which have this length; ``k`` and ``v`` as ``append``.

        They require no gradient.
        """
        slot = length % self.slots
        self.keys.narrow(2, slot, 1).copy_(k)
        self.values.narrow(2, slot, 1).copy_(v)
        self.positions.select(1, slot).fill_(length)
        self.lengths.fill_(length + 1)  # a third of the time that an addition takes
        self._remember_longest()

    def slots_seen(self, length: int) -> tuple[int, int] | None:
        """Slots that a row's next token sees, with its own: the first, and the one after the last.

        None where the ring closes in between.
        """
        first = max(0, self.window.first_key(length))
        if length + 1 - first == self.slots:
            return 0, self.slots
        start, stop = first % self.slots, length % self.slots + 1
        return (start, stop) if start < stop else None

    @torch.no_grad()
    def extend(self, k: Tensor, v: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores any number of tokens; arguments as ``append``.

        Returns:
            The keys and values that the tokens see and their own, ``(batch, kv_heads, slots + n, d
            or d_v)``, in order, and the position of the first new one, int32 ``(batch,)``; the
            first of all stands ``slots`` before it.
        """
        before, n, taken = self.lengths.clone(), k.shape[2], count
        first = before
        # In 32 bits: a compiled kernel takes the remainder for every number that it copies.
        place = torch.arange(self.slots, dtype=torch.int32, device=first.device)
        in_order = (first[:, None] + place).remainder(self.slots)
        seen_k, seen_v = (
            torch.cat((at_tokens(ring, in_order), new), dim=2)
            for ring, new in ((self.keys, k), (self.values, v))
        )
        # New tokens as they lie behind the old: a compiler could else write them before it has read
        # the ring, and would copy it for that.
        k, v = (x[:, :, self.slots :] for x in (seen_k, seen_v))
        if n > self.slots:  # the last ones alone: two tokens would be written to one slot
            left_out = at_least(first * 0 + count - self.slots, 0)
            k, v = (at_tokens(x, left_out[:, None] + place) for x in (k, v))
            first, count = first + left_out, count - left_out
        self._write(k, v, first, count)
        self._grow(taken)
        return seen_k, seen_v, before

    def _write(self, k: Tensor, v: Tensor, first: Tensor, count: int | Tensor) -> None:
        """Stores at most ``slots`` tokens at the positions from ``first`` ``(batch,)`` on."""
        token = torch.arange(k.shape[2], dtype=torch.int32, device=first.device)
        position = first[:, None] + token
        slot = position.remainder(self.slots)
        if isinstance(count, Tensor):
            takes = token < count[:, None]
            position = torch.where(takes, position, self.positions.gather(1, slot.long()))
            takes = takes[:, None, :, None]
            k = torch.where(takes, k, at_tokens(self.keys, slot))
            v = torch.where(takes, v, at_tokens(self.values, slot))
        # By index: of `scatter_` Inductor makes a copy of the whole ring.
        self.positions[self._row, slot] = position
        self.keys[self._row, :, slot] = k.transpose(1, 2)
        self.values[self._row, :, slot] = v.transpose(1, 2)

    def _grow(self, count: int | Tensor) -> None:
        self.lengths += count
        self._remember_longest()

    def _remember_longest(self) -> None:
        if self.rewindable:
            torch.maximum(self._longest, self.lengths, out=self._longest)

    def rule(self, first: Tensor) -> Ring:
        """What tokens at the positions from ``first`` ``(batch,)`` on see, over the ring."""
        return Ring(self.window, self.slots, first, self.positions)

    @property
    def kind(self) -> tuple[object, ...]:
        """All that a call asks of its cache: caches of one kind serve the same calls."""
        keys = self.keys
        return self.window, keys.shape, self.values.shape[-1], keys.dtype, keys.device

    @property
    def fits(self) -> int:
        """Most tokens that ``append`` takes: what the first of them sees is not overwritten."""
        return self.slots - self.window.reach.back

    def __repr__(self) -> str:
        batch, kv_heads, slots, head_size = self.keys.shape
        return (
            f"LocalCache({self.window!r}, batch={batch}, kv_heads={kv_heads}, slots={slots}, "
            f"head_size={head_size}, v_head_size={self.values.shape[-1]}, "
            f"dtype={self.keys.dtype}, device={self.keys.device}, rewindable={self.rewindable})"
        )


def at_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x`` ``(b, h, m, d)`` at the tokens ``index`` ``(b, n)``."""
    index = index.long()[:, None, :, None]
    return x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3]))
