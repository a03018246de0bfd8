"""``LocalAttention``: the documented layer of zeta and lucidrains/local-attention."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cache import LocalCache
from .checks import (
    check_backend,
    check_dim,
    check_dropout,
    check_kernel_options,
    check_length,
    check_mask,
    check_scale,
    check_softcap,
    dim_of,
)
from .dispatch import Choice
from .functional import attention_map, explain, local_attention
from .masks import Window
from .masks.arguments import check_above_zero, check_count, check_flag, kind_of
from .rotary import Rotary
from .spec import BackendName

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .masks import MaskPicture


class LocalAttention(nn.Module):
    """Attention of each token to the keys of its window and of the windows around it.

    Args:
        window_size: tokens in a window.
        causal: a token sees no token after itself.
        look_backward: windows before its own that a token sees.
        look_forward: windows after its own; None means 0 when causal and 1 otherwise.
        dropout: probability to drop an attention weight, in training, in [0, 1).
        shared_qk: for queries that are the keys too: keys are scaled to length 1, and a token
            attends to itself only when it sees nothing else.
        rel_pos_emb_config: deprecated, a tuple that begins with the head size; use ``dim``.
        dim: head size, which q must have; turns rotary embeddings on.
        autopad: allow lengths that are no multiple of ``window_size``.
        exact_windowsize: a token sees ``look_backward * window_size`` keys back and, when not
            causal, ``look_forward * window_size`` ahead, besides its own.
        scale: factor on the query-key products, head size ** -0.5 by default.
        use_rotary_pos_emb: rotate queries and keys, where ``dim`` is given.
        use_xpos: also scale them by their distance (xpos); needs rotary embeddings.
        xpos_scale_base: tokens per unit of xpos's exponent, ``window_size // 2`` by default.
        backend: ``"auto"``, ``"flex"`` or ``"eager"``, see ``local_attention``.
        kernel_options: passed to ``flex_attention``; None with ``backend="eager"``.
        softcap: bound of the scores, see ``local_attention``.
        theta: base of rotary's frequencies.
        group: the ranks that a sequence lies on, a process group or a mesh of one dimension; a call
            then takes this rank's run, of any length, see
            ``distributed.sharded_local_attention``. None for whole sequences.

    Raises:
        ValueError: an argument does not fit; the message names it and says what would.
        TypeError: an argument is of the wrong kind.

    Source: https://github.com/lucidrains/local-attention, documented at
    https://zeta.apac.ai/en/latest/zeta/nn/attention/local_attention/. docs/differences.md lists
    where the results differ on purpose.
    """

    def __init__(
        self,
        window_size: int,
        causal: bool = False,
        look_backward: int = 1,
        look_forward: int | None = None,
        dropout: float = 0.1,
        shared_qk: bool = False,
        rel_pos_emb_config: tuple[int, ...] | None = None,
        dim: int | None = None,
        autopad: bool = False,
        exact_windowsize: bool = False,
        scale: float | None = None,
        use_rotary_pos_emb: bool = True,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        *,
        backend: BackendName = "auto",
        kernel_options: dict[str, Any] | None = None,
        softcap: float | None = None,
        theta: float = 10000.0,
        group: "ProcessGroup | DeviceMesh | None" = None,
    ) -> None:
        super().__init__()
        window_size = check_count("window_size", window_size)
        self.shared_qk = check_flag("shared_qk", shared_qk)
        self.autopad = check_flag("autopad", autopad)
        exact_windowsize = check_flag("exact_windowsize", exact_windowsize)
        use_rotary_pos_emb = check_flag("use_rotary_pos_emb", use_rotary_pos_emb)
        self.use_xpos = use_xpos = check_flag("use_xpos", use_xpos)
        self.window = Window(window_size, causal, look_backward, look_forward, exact_windowsize)
        dropout = check_dropout(dropout)
        self.scale = check_scale(scale)
        if xpos_scale_base is not None:
            xpos_scale_base = check_above_zero("xpos_scale_base", xpos_scale_base)
        check_backend(backend)
        check_kernel_options(kernel_options, backend)
        self.softcap = check_softcap(softcap)
        theta = check_above_zero("theta", theta)
        if rel_pos_emb_config is not None:
            warnings.warn(
                "rel_pos_emb_config is deprecated: give its first entry, the head size, as dim",
                DeprecationWarning,
                stacklevel=2,
            )
            dim = dim_of(rel_pos_emb_config, dim)
        self.dim = dim = None if dim is None else check_count("dim", dim)
        self.rel_pos: Rotary | None = None
        if use_rotary_pos_emb and dim is not None:
            base = xpos_scale_base
            if use_xpos and base is None:
                base = window_size // 2
                if base == 0:
                    raise ValueError("xpos_scale_base must be above 0, got 0 from window_size // 2")
            self.rel_pos = Rotary(dim, use_xpos, base, theta=theta)
        elif use_xpos:
            raise ValueError(
                "use_xpos must be False without rotary embeddings, got True with "
                f"use_rotary_pos_emb={use_rotary_pos_emb} and dim={dim}"
            )
        self.backend: BackendName = backend
        self.kernel_options = kernel_options
        if group is not None:
            # Here, because not every torch has torch.distributed.
            from .distributed.agreement import group_of

            group_of(group)
        self.group = group
        # A module, as in the documented layer, so that its `p` and training mode can be set.
        self.dropout: nn.Module = nn.Dropout(dropout)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
        *surplus: object,
        sinks: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        documents: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_offset: int | Tensor | None = None,
        return_lse: bool = False,
        cache: LocalCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Any:
        """Attention of each token to the keys that the window lets it see.

        Args:
            q: ``(*lead, n, d)``, ``n`` a multiple of the window's size unless ``autopad``, or
                documents or offsets say where windows begin.
            k: as ``q``; in 4 dimensions it may have fewer heads, and with an offset another length
                ``m``.
            v: as ``k``, but of any last size ``d_v``.
            mask: boolean ``(batch, m)``, True for keys to keep.
            input_mask: another name of ``mask``.
            attn_bias: ``(heads, W, window.span)``, added to the scores.
            window_size: another size for this call, with xpos only.
            surplus: nothing; the arguments below go by name.
            sinks: ``(heads,)``, a logit for each head that takes part in the softmax.
            dropout_seed: 0-d int64 tensor that decides which weights are dropped.
            documents: integer ``(batch, m)`` or ``(m,)``, the document of each key.
            q_offset, kv_offset: position of the first query and of the first key, ints or integer
                ``(batch,)``.
            return_lse: return the log-sum-exps as well.
            cache: a ``LocalCache`` of the tokens so far, which stores the new ones.
            lengths: tokens on each rank of a layer with a ``group``, which agrees on them unless
                they are given.

        Returns:
            ``(*lead, n, d_v)``; zeros for a query that sees no key. With ``return_lse`` a pair of
            that and the log-sum-exps ``(*lead, n)``. ``local_attention`` says more of each.

        Raises:
            ValueError, TypeError: as ``local_attention``.
        """
        if surplus:  # torch's older ONNX exporter gives all arguments by place
            raise TypeError(
                f"forward must be given 3 to 7 arguments by place, got {7 + len(surplus)}: the "
                "others go by name. An ONNX exporter that does otherwise is the older one; "
                "torch.onnx.export(..., dynamo=True) can export the layer"
            )
        placed = {
            "documents": documents,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "cache": cache,
        }
        window, arguments = self._call(q, k, mask, input_mask, attn_bias, window_size, placed)
        arguments |= {"sinks": sinks, "dropout_seed": dropout_seed, "return_lse": return_lse}
        if arguments["dropout"] == 1 and isinstance(v, Tensor):  # no weight is kept
            v, arguments["dropout"] = v.masked_fill(v.new_ones((), dtype=torch.bool), 0.0), 0.0
        if self.group is not None:
            from .distributed import sharded_local_attention

            if arguments.pop("cache") is not None:
                raise ValueError("cache must be None in a layer with a group, got a LocalCache")
            return sharded_local_attention(
                q, k, v, window, group=self.group, lengths=lengths, **arguments
            )
        if lengths is not None:
            raise ValueError(f"lengths must be None in a layer without a group, got {lengths}")
        return local_attention(q, k, v, window, **arguments)

    def explain(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
        *,
        sinks: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        documents: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_offset: int | Tensor | None = None,
        return_lse: bool = False,
        cache: LocalCache | None = None,
    ) -> Choice:
        """Which path a call takes, and why; its arguments are those of ``forward``.

        Args:
            k, v: as ``q`` by default.

        Raises:
            ValueError, TypeError: as ``forward``, which refuses ``backend="flex"`` where the fused
                kernel cannot run.
        """
        k, v = q if k is None else k, q if v is None else v
        placed = {
            "documents": documents,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "cache": cache,
        }
        window, arguments = self._call(q, k, mask, input_mask, attn_bias, window_size, placed)
        arguments |= {"sinks": sinks, "dropout_seed": dropout_seed, "return_lse": return_lse}
        if arguments["dropout"] == 1:
            arguments["dropout"] = 0.0
        return explain(q, k, v, window, **arguments)

    def mask(
        self,
        n: int,
        *,
        key_mask: Tensor | None = None,
        block_size: int | tuple[int, int] = 128,
        window_size: int | None = None,
        batch: int = 0,
        documents: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_offset: int | Tensor | None = None,
        n_keys: int | None = None,
    ) -> "MaskPicture":
        """Which keys each of ``n`` queries sees, as an object to ``print`` and draw.

        Args:
            n: queries, a multiple of the window's size unless ``autopad``, or documents or offsets
                say where windows begin.
            key_mask: boolean ``(n_keys,)`` or ``(1, n_keys)``, True for keys to keep.
            block_size: tokens in a block of the block map, or ``(queries, keys)`` in one.
            window_size: another size for this call, with xpos only.
            batch, documents, q_offset, kv_offset, n_keys: as for ``masks.inspect``.

        Raises:
            ValueError, TypeError: as ``masks.inspect``, and where ``forward`` would refuse.

        >>> print(LocalAttention(2, causal=True).mask(6).query(3))
        query 3 sees 4 keys: 0 to 3, the query's own included
        it stands in window 1, tokens 2 to 3, as token 1 of it
        """
        from .masks import inspect  # here, so that a layer loads no pictures

        window = self._window(window_size)
        head_size = 64 if self.dim is None else self.dim
        picture = inspect(
            window, n, n_keys=n_keys, key_mask=key_mask, block_size=block_size, head_size=head_size,
            batch=batch, documents=documents, q_offset=q_offset, kv_offset=kv_offset,
        )  # fmt: skip
        if documents is q_offset is kv_offset is None and not self.autopad:
            check_length("n", n, window.size)
        return picture

    def attention_map(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
        *,
        sinks: Tensor | None = None,
        dense: bool = False,
    ) -> Tensor:
        """The weights that ``forward`` mixes values with, before dropout.

        Args as those of ``forward``, and:
            dense: all pairs of tokens instead of the window, for short sequences.

        Returns:
            ``(*lead, n, window.span)``: column ``c`` of query ``i`` is the key
            ``window.span_start(i) + c``; with ``dense`` ``(*lead, n, n)``. ``masks.heat_map``
            draws either.

        Raises:
            ValueError, TypeError: as ``forward``, and for a dense map that is too large.
        """
        if self.group is not None:
            raise ValueError("group must be None for a map, which shows one rank's own keys alone")
        window, arguments = self._call(q, k, mask, input_mask, attn_bias, window_size, {})
        shared = ("mask", "attn_bias", "scale", "softcap", "shared_qk", "rotary")
        return attention_map(
            q, k, window, dense=dense, sinks=sinks, **{name: arguments[name] for name in shared}
        )

    def extra_repr(self) -> str:
        names = ("autopad", "shared_qk", "scale", "softcap", "backend", "kernel_options")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.window!r}\n{settings}"

    # The window, under the names of the documented layer.

    @property
    def window_size(self) -> int:
        """``window.size``."""
        return self.window.size

    @property
    def causal(self) -> bool:
        """``window.causal``."""
        return self.window.causal

    @property
    def look_backward(self) -> int:
        """``window.look_backward``."""
        return self.window.look_backward

    @property
    def look_forward(self) -> int:
        """``window.ahead``."""
        return self.window.ahead

    @property
    def exact_windowsize(self) -> bool:
        """``window.exact``."""
        return self.window.exact

    def _window(self, window_size: int | None) -> Window:
        """The window of a call."""
        if window_size is None:
            return self.window
        if not self.use_xpos:
            raise ValueError(
                f"window_size must be None in a call without use_xpos, got {window_size}"
            )
        return replace(self.window, size=check_count("window_size", window_size))

    def _rate(self) -> float:
        """Of dropout in a call; users put other modules in its place, or set ``p``."""
        module = self.dropout
        if not module.training or isinstance(module, nn.Identity):
            return 0.0
        rate: float | None = getattr(module, "p", None)
        if rate is None:
            raise TypeError(
                "dropout must be a module with a rate p, as nn.Dropout, or nn.Identity, "
                f"got {kind_of(module)}"
            )
        return rate

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        input_mask: Tensor | None,
        attn_bias: Tensor | None,
        window_size: int | None,
        placed: dict[str, Any],
    ) -> tuple[Window, dict[str, Any]]:
        """The window of a call, and arguments of ``local_attention`` by name.

        Args:
            placed: the arguments that say where tokens stand.
        """
        window = self._window(window_size)
        has_length = isinstance(q, Tensor) and q.dim() >= 2  # else local_attention refuses q
        counts_from_0 = all(x is None for x in placed.values())
        if has_length and counts_from_0 and not self.autopad and self.group is None:
            check_length("q's length", q.shape[-2], window.size)
        if has_length and self.dim is not None:
            check_dim("dim", self.dim, q)
        if mask is not None and input_mask is not None:
            raise ValueError("mask must be None where input_mask is given, got both")
        if has_length and input_mask is not None and isinstance(k, Tensor) and k.dim() >= 2:
            check_mask(input_mask, q, k.shape[-2], "input_mask")
        return window, {
            "mask": input_mask if mask is None else mask,
            "attn_bias": attn_bias,
            "scale": self.scale,
            "softcap": self.softcap,
            "shared_qk": self.shared_qk,
            "dropout": self._rate(),
            "rotary": self.rel_pos,
            "backend": self.backend,
            "kernel_options": self.kernel_options,
            **placed,
        }
