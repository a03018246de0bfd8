"""What arguments must be; each check names the argument, what came and what would be right."""

import math
import sys
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .masks import Rule, Window
from .masks.arguments import check_above_zero, check_flag, check_integers, check_number, kind_of
from .masks.documents import check_cu_seqlens
from .mods.dropout import MOST_DROPOUT
from .positions import xpos_tokens
from .spec import BackendName, Inputs, Spec, without_values
from .xpos import xpos_products_fit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(spec: Spec, inputs: Inputs) -> None:
    """Every argument of a call fits, by itself and with the others.

    Raises:
        ValueError, TypeError: as ``local_attention``.
    """
    check_backend(spec.backend)
    check_scale(spec.scale)
    check_softcap(spec.softcap)
    check_flag("shared_qk", spec.shared_qk)
    check_flag("return_lse", spec.return_lse)
    check_dropout(spec.dropout)
    check_kernel_options(spec.kernel_options, spec.backend)
    q, k = inputs.q, inputs.k
    check_qkv(q, k, inputs.v, same_length=inputs.q_offset is None and spec.rule.is_window)
    check_rule(spec.rule, q)
    check_placed(spec.rule, inputs)
    check_mask(inputs.mask, q, k.shape[-2])
    check_bias(inputs.bias, q, spec.rule)
    check_sinks(inputs.sinks, q)
    check_seed(inputs.seed, q)
    check_rotary(spec, inputs)


def check_rule(rule: Rule, q: Tensor) -> None:
    """A rule's tensors are on q's device, and it equals a rule that differs in these alone."""
    if not rule.tensors:
        return
    for x in rule.tensors:
        _check_device("window's tensors", x, q)
    if torch.compiler.is_compiling():
        return
    name = type(rule).__name__
    try:
        equal = without_values(rule) == rule and hash(without_values(rule)) == hash(rule)
    except RuntimeError:  # an __eq__ that compares tensors
        equal = False
    if not equal:
        raise TypeError(
            "window must be equal to the same rule over other tensors, as Rule's own __eq__ has "
            f"it: got {name}, which must be declared with @dataclass(frozen=True, eq=False)"
        )


def check_backend(backend: object) -> None:
    """``backend`` is one of the names we know."""
    if backend not in get_args(BackendName):
        names = ", ".join(repr(name) for name in get_args(BackendName))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def check_dropout(dropout: float) -> float:
    """``dropout``, returned plain, is a probability below 1."""
    dropout = check_number("dropout", dropout)
    if not 0 <= dropout <= MOST_DROPOUT:
        raise ValueError(
            f"dropout must be at least 0 and below 1, by 2**-32 at least, got {dropout!r}"
        )
    return dropout


def check_scale(scale: float | None) -> float | None:
    """``scale``, returned plain, is a finite number or None."""
    if scale is None:
        return None
    scale = check_number("scale", scale, "a number or None")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def check_softcap(softcap: float | None) -> float | None:
    """``softcap``, returned plain, is a finite number above 0, or None."""
    return None if softcap is None else check_above_zero("softcap", softcap, "a number or None")


def check_kernel_options(options: object, backend: str) -> None:
    """``kernel_options`` is a dict of values by name, or None; with ``"eager"`` None."""
    if options is None:
        return
    if not isinstance(options, dict):
        raise TypeError(
            f"kernel_options must be a dict or None, got {options!r} of {kind_of(options)}"
        )
    for name, value in options.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(
                "kernel_options must have names as keys and flags, numbers or words as values, "
                f"got {name!r}: {value!r}"
            )
    if backend == "eager":
        raise ValueError(
            f"kernel_options must be None with backend='eager', which has no kernel, got {options}"
        )


def dim_of(rel_pos_emb_config: object, dim: int | None) -> int:
    """The head size that ``rel_pos_emb_config`` begins with, used as ``dim``."""
    config = rel_pos_emb_config
    if not isinstance(config, tuple | list) or not config:
        raise TypeError(
            "rel_pos_emb_config must be a tuple that begins with the head size, "
            f"got {config!r} of {kind_of(config)}"
        )
    if dim not in (None, config[0]):
        raise ValueError(f"rel_pos_emb_config must be None or begin with dim {dim}, got {config!r}")
    head_size: int = config[0]
    return head_size


def check_qkv(q: object, k: object, v: object, same_length: bool = True) -> None:
    """q, k and v fit together: shapes, dtype and device.

    Args:
        same_length: there are as many keys as queries.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind_of(x)}")
        _check_floating_point(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name} must have the shape (*lead, n, d), got {_shape(x)}")
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    # Autocast makes one dtype of all three, and leaves float64 alone.
    mixed = autocast_dtype(q.device) is not None and torch.float64 not in (
        q.dtype,
        k.dtype,
        v.dtype,
    )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype and not mixed:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
        if same_length and x.shape[-2] != q.shape[-2]:
            raise ValueError(
                f"{name} must have q's length {q.shape[-2]} where no q_offset or kv_offset says at "
                f"which positions tokens stand, got {_shape(x)}"
            )
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a head size of at least 1, got {_shape(q)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size {q.shape[-1]}, got {_shape(k)}")
    _check_leads(q, k, v)


def _check_floating_point(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be of a floating-point dtype, 16 to 64 bits wide, got {x.dtype}"
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise ValueError(f"{name} must be a dense tensor, got {kind}")


def check_mask(mask: object, q: Tensor, keys: int, name: str = "mask") -> None:
    """A key mask is boolean, ``(batch, keys)``, and its batch divides q's rows."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {kind_of(mask)}")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be boolean (True = keep), got {mask.dtype}: {name}.bool() where 1 keeps "
            f"a key, {name} == 0 where the numbers are added to scores"
        )
    rows = math.prod(q.shape[:-2])
    if mask.dim() != 2 or mask.shape[1] != keys or not _divides(mask.shape[0], rows):
        raise ValueError(
            f"{name} must have the shape (batch, {keys}), batch a divisor of q's {rows} rows, "
            f"got {_shape(mask)}"
        )
    _check_device(name, mask, q)


def check_placed(rule: Rule, inputs: Inputs) -> None:
    """Documents and offsets are integers for q's rows, and what they place is a window."""
    given = {
        name: x
        for name in ("documents", "cu_seqlens", "q_offset", "kv_offset")
        if (x := getattr(inputs, name)) is not None
    }
    for name, x in given.items():
        if not rule.is_window:
            raise ValueError(
                f"{name} must be None with {type(rule).__name__}: it places a Window, and other "
                "rules say themselves what a query sees"
            )
        if name == "documents":
            check_documents(x, inputs.q, inputs.k.shape[-2])
        elif name == "cu_seqlens":
            check_cu_seqlens(x)
            _check_device(name, x, inputs.q)
        else:
            check_offset(name, x, inputs.q)


def check_documents(documents: object, q: Tensor, keys: int) -> None:
    """Documents are integers, ``(batch, keys)`` or ``(keys,)``."""
    check_integers("documents", documents)
    assert isinstance(documents, Tensor)
    rows = math.prod(q.shape[:-2])
    right = documents.dim() in (1, 2) and documents.shape[-1] == keys
    if not right or documents.dim() == 2 and not _divides_or_is_one(documents.shape[0], rows):
        raise ValueError(
            f"documents must have the shape ({keys},) or (batch, {keys}), batch a divisor of q's "
            f"{rows} rows, got {_shape(documents)}"
        )
    _check_device("documents", documents, q)


def check_offset(name: str, offset: object, q: Tensor) -> None:
    """An offset is an int, or integers ``(batch,)``."""
    if isinstance(offset, int) and not isinstance(offset, bool):
        return
    if not isinstance(offset, Tensor):
        raise TypeError(f"{name} must be an int or a tensor, got {offset!r} of {kind_of(offset)}")
    check_integers(name, offset)
    rows = math.prod(q.shape[:-2])
    if offset.dim() != 1 or not _divides_or_is_one(offset.shape[0], rows):
        raise ValueError(
            f"{name} must be an int or of shape (batch,), batch a divisor of q's {rows} rows, got "
            f"{_shape(offset)}"
        )
    _check_device(name, offset, q)


def check_bias(bias: object, q: Tensor, rule: Rule) -> None:
    """A bias is ``(heads, W, span)``, and its heads divide q's rows."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a tensor or None, got {kind_of(bias)}")
    window = _window_for("attn_bias", rule)
    _check_floating_point("attn_bias", bias)
    rows = math.prod(q.shape[:-2])
    right = bias.dim() == 3 and tuple(bias.shape[1:]) == (window.size, window.span)
    if not right or not _divides(bias.shape[0], rows):
        raise ValueError(
            f"attn_bias must have the shape (heads, {window.size}, {window.span}), heads a "
            f"divisor of q's {rows} rows, got {_shape(bias)}"
        )
    _check_device("attn_bias", bias, q)


def check_sinks(sinks: object, q: Tensor) -> None:
    """Sinks are ``(heads,)``, and their heads divide q's rows."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a tensor or None, got {kind_of(sinks)}")
    _check_floating_point("sinks", sinks)
    rows = math.prod(q.shape[:-2])
    if sinks.dim() != 1 or not _divides(sinks.shape[0], rows):
        raise ValueError(
            f"sinks must have the shape (heads,), heads a divisor of q's {rows} rows, got "
            f"{_shape(sinks)}"
        )
    _check_device("sinks", sinks, q)


def check_seed(seed: object, q: Tensor) -> None:
    """A dropout seed is one int64 number on q's device."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed must be a tensor or None, got {kind_of(seed)}")
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"dropout_seed must be a 0-d int64 tensor, got {seed.dtype} of shape {_shape(seed)}"
        )
    _check_device("dropout_seed", seed, q)


def check_dim(name: str, dim: int, q: Tensor) -> None:
    """``dim`` is q's last size; ``name`` is what the caller's argument is called."""
    if dim != q.shape[-1]:
        raise ValueError(
            f"{name} must be q's head size {q.shape[-1]}, got {dim} for q of shape {_shape(q)}"
        )


def check_rotary(spec: Spec, inputs: Inputs) -> None:
    """A rotary has q's head size and device, and xpos's factors are finite."""
    q, inv_freq = inputs.q, inputs.inv_freq
    if inv_freq is None:
        return
    check_dim("rotary's dim", 2 * inv_freq.shape[0], q)
    remedy = ": move it, or the layer that holds it, with .to(q.device)"
    _check_device("rotary", inv_freq, q, remedy)
    if spec.xpos_base is None:
        return
    _window_for("rotary with xpos", spec.rule)
    tokens = xpos_tokens(spec, inputs)
    if not xpos_products_fit(tokens, spec.xpos_base, torch.float64):
        raise ValueError(
            "rotary's scale_base (xpos_scale_base of a layer) must be larger for windows that "
            f"reach so far: factors over {tokens} tokens overflow, got {spec.xpos_base}"
        )


def _window_for(name: str, rule: Rule) -> Window:
    """The window that an argument is relative to."""
    window: Window | None = rule.window
    if window is None:
        raise ValueError(
            f"{name} must be None with {type(rule).__name__}: it is relative to a Window, and this "
            "rule has none"
        )
    return window


def check_length(name: str, n: int, window_size: int) -> None:
    """Without autopad the windows must fill the sequence."""
    if n % window_size:
        raise ValueError(
            f"{name} must be a multiple of window_size {window_size} unless autopad is True, "
            f"got {n}"
        )


def _check_leads(q: Tensor, k: Tensor, v: Tensor) -> None:
    grouped = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0]
    grouped = grouped and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if k.shape[:-2] != q.shape[:-2] and not grouped:
        raise ValueError(
            f"k must have q's leading sizes {_shape(q[..., 0, 0])} or, in 4 dimensions, fewer "
            f"heads that divide q's, got {_shape(k)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must agree with k {_shape(k)} up to its last size, got {_shape(v)}")


def _check_device(name: str, x: Tensor, q: Tensor, remedy: str = "") -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}{remedy}")


def _divides(part: int, rows: int) -> bool:
    return rows % part == 0 if part else rows == 0


def _divides_or_is_one(part: int, rows: int) -> bool:
    return part == 1 or _divides(part, rows)


def _shape(x: Tensor) -> Sequence[int]:
    return tuple(x.shape)
