"""``LocalMHA`` and ``DynamicPositionBias``: the blocks of local-attention around the layer.

Signatures and parameter names are those of local-attention 1.11.2, whose checkpoints load with
``strict=True``. Source: https://github.com/lucidrains/local-attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .cache import LocalCache
from .layer import LocalAttention
from .masks.arguments import check_count, check_flag


class LocalMHA(nn.Module):
    """Local attention with several heads, from ``(b, n, dim)`` to the same.

    Args:
        dim: channels of a token.
        window_size: tokens in a window.
        dim_head: channels of a head.
        heads: how many there are.
        dropout: probability to drop an attention weight, in training.
        causal: a token sees no token after itself.
        prenorm: normalise the input first.
        qk_rmsnorm: scale queries and keys to length 1, with a learned factor for each channel.
        qk_scale: factor on their products then; ``dim_head ** -0.5`` without ``qk_rmsnorm``.
        use_xpos, xpos_scale_base: as for ``LocalAttention``.
        exact_windowsize: as for ``LocalAttention``, but True by default.
        gate_values_per_head: multiply each head's output by a gate that a token computes.
        kwargs: further arguments of ``LocalAttention``.

    Raises:
        ValueError, TypeError: as ``LocalAttention``.
    """

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        causal: bool = False,
        prenorm: bool = False,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        exact_windowsize: bool | None = None,
        gate_values_per_head: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dim, dim_head = check_count("dim", dim), check_count("dim_head", dim_head)
        self.heads = heads = check_count("heads", heads)
        prenorm, qk_rmsnorm = check_flag("prenorm", prenorm), check_flag("qk_rmsnorm", qk_rmsnorm)
        gate_values_per_head = check_flag("gate_values_per_head", gate_values_per_head)
        self.norm = nn.LayerNorm(dim) if prenorm else None
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.qk_rmsnorm = qk_rmsnorm
        if qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(dim_head))
            self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.attn_fn = LocalAttention(
            window_size,
            causal,
            dim=dim_head,
            dropout=dropout,
            autopad=True,
            scale=qk_scale if qk_rmsnorm else None,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize,
            use_xpos=use_xpos,
            xpos_scale_base=xpos_scale_base,
            **kwargs,
        )
        self.to_v_gate = nn.Sequential(nn.Linear(dim, heads)) if gate_values_per_head else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        cache: LocalCache | Tensor | tuple[Tensor, Tensor] | None = None,
        return_cache: bool = False,
    ) -> Any:
        """The next layer's input.

        Args:
            x: ``(b, n, dim)``; with a cache the new tokens.
            mask: boolean ``(b, n)``, True for tokens to keep.
            attn_bias: ``(heads, W, window.span)``, added to the scores.
            cache: the tokens so far: a ``LocalCache``, whose memory is bounded, or what a call with
                ``return_cache`` has returned, which is copied for every token.
            return_cache: return the cache as well.

        Returns:
            ``(b, n, dim)``, and with ``return_cache`` a pair of that and the ``LocalCache``, or
            without one keys and values, not rotated, ``(2, b, heads, m, dim_head)``.

        Raises:
            ValueError, TypeError: as ``local_attention``; and a mask beside keys and values.
        """
        if self.norm is not None:
            x = self.norm(x)
        q, k, v = rearrange(
            self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        if self.qk_rmsnorm:
            q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        held: LocalCache | Tensor
        if isinstance(cache, LocalCache):
            held = cache
            out = self.attn_fn(q, k, v, mask=mask, attn_bias=attn_bias, cache=cache)
        elif cache is None:
            held = torch.stack((k, v)) if return_cache else k
            out = self.attn_fn(q, k, v, mask=mask, attn_bias=attn_bias)
        else:
            if mask is not None:
                raise ValueError(
                    "mask must be None beside keys and values: only a LocalCache has it"
                )
            held = self._with_new(cache, k, v)
            lead = held.shape[3] - q.shape[2]
            out = self.attn_fn(q, *held, attn_bias=attn_bias, q_offset=lead, kv_offset=0)
        if self.to_v_gate is not None:
            out = out * rearrange(self.to_v_gate(x), "b n h -> b h n 1").sigmoid()
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return (out, held) if return_cache else out

    def _with_new(self, cache: Any, k: Tensor, v: Tensor) -> Tensor:
        """The keys and values that new tokens may see, and their own.

        Whole windows are left out, so that the others begin where they did.
        """
        window = self.attn_fn.window
        old_k, old_v = cache
        left_out = max(0, old_k.shape[2] - window.reach.back) // window.size * window.size
        k, v = (
            torch.cat((old[:, :, left_out:], new), dim=2) for old, new in ((old_k, k), (old_v, v))
        )
        return torch.stack((k, v))


class DynamicPositionBias(nn.Module):
    """A bias that a small network computes from the distance of query and key.

    Args:
        dim: channels inside.
        heads: heads of the bias.

    Raises:
        ValueError, TypeError: a number is below 1, or no int.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        dim, heads = check_count("dim", dim), check_count("heads", heads)
        self.mlp = nn.Sequential(
            nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, heads)
        )

    @property
    def device(self) -> torch.device:
        """Where its parameters live."""
        return next(self.parameters()).device

    def forward(self, i: int, j: int) -> Tensor:
        """``(heads, i, j)`` for the last ``i`` of ``j`` tokens.

        A window of ``W`` tokens that looks one back takes ``(W, 2 * W)``: ``attn_bias`` of a causal
        layer.

        Raises:
            ValueError, TypeError: a number is below 1 or no int, or ``j`` is below ``i``.
        """
        i, j = check_count("i", i), check_count("j", j)
        if j < i:
            raise ValueError(f"j must be at least i, {i}, got {j}")
        token = torch.arange(j, device=self.device)
        dtype = next(self.parameters()).dtype
        by_distance = self.mlp(token[:, None].to(dtype))
        distance = (token[j - i :, None] - token).abs()
        bias: Tensor = rearrange(by_distance[distance], "i j h -> h i j")
        return bias
