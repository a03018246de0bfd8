"""Whole calls of the layer, drawn from its whole argument space.

A `Case` is numbers only, so that a failing one prints as one line that builds it again. Sizes
that could be swapped by mistake are kept apart: values have odd sizes, heads even ones.
"""

import math
from dataclasses import dataclass, replace

import oracle
import torch
from hypothesis import settings
from hypothesis import strategies as st

MAX_TOKENS = 70
EXAMPLES = settings().max_examples  # the profile's: tests take multiples of it


@dataclass(frozen=True)
class Window:
    """Which keys a query sees; what tests pass to the package and to the oracle."""

    size: int
    causal: bool
    look_backward: int
    look_forward: int | None
    exact: bool

    @property
    def ahead(self):
        return (0 if self.causal else 1) if self.look_forward is None else self.look_forward

    @property
    def letters(self):
        """The window in the letters of the oracle."""
        return {
            "causal": self.causal, "b": self.look_backward, "f": self.ahead, "exact": self.exact,
        }  # fmt: skip

    def mask(self, n_queries, n_keys=None):
        return oracle.dense_mask(n_queries, self.size, n_keys=n_keys, **self.letters)


@st.composite
def windows(draw, max_size=13, max_look=3):
    causal = draw(st.booleans())
    ahead = st.sampled_from([None, 0]) if causal else st.sampled_from([None, *range(max_look + 1)])
    return Window(
        size=draw(st.integers(1, max_size)),
        causal=causal,
        look_backward=draw(st.integers(0, max_look)),
        look_forward=draw(ahead),
        exact=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Call:
    """The tensors of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    cotangent: torch.Tensor  # the loss is (out * cotangent).sum()

    def to(self, dtype):
        """The same values, rounded to dtype, as leaves that collect gradients."""

        def leaf(x):
            if x is None:
                return None
            return x.detach().to(dtype, memory_format=torch.preserve_format).requires_grad_()

        cotangent = self.cotangent.to(dtype)
        return Call(leaf(self.q), leaf(self.k), leaf(self.v), self.mask, leaf(self.bias), cotangent)

    def cuda(self, device="cuda"):
        """The same tensors on a GPU, leaves where they are leaves."""
        moved = {
            name: None if x is None else x.detach().to(device).requires_grad_(x.requires_grad)
            for name, x in vars(self).items()
        }
        return Call(**moved)

    def learned(self):
        """name -> every tensor that has a gradient."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        learns_bias = self.bias is not None and self.bias.requires_grad
        return named | ({"bias": self.bias} if learns_bias else {})

    def with_fixed_bias(self):
        """The same, with a bias that is not learned."""
        return replace(self, bias=None if self.bias is None else self.bias.detach())


@dataclass(frozen=True)
class Case:
    """One call of one layer."""

    window: Window
    n: int
    lead: tuple
    kv_heads: int | None  # None: as many as q has
    d: int
    d_v: int
    autopad: bool
    scale: float | None
    shared_qk: bool
    rotary: bool
    xpos: bool
    base: float | None
    override: int | None
    bias_heads: int | None
    mask_batch: int | None
    mask_name: str  # "mask" or "input_mask"
    hide_a_row: bool  # one batch entry keeps no key at all
    empty_queries: bool  # False: the mask leaves every query at least one key
    transposed: bool  # q, k, v are views of (..., n, heads, d)
    seed: int
    padded: bool = False  # the mask hides a run at the end of each entry, as padding does

    @property
    def W(self):
        """The window size that counts."""
        return self.window.size if self.override is None else self.override

    def _draw(self, lead, size, generator):
        shape = (*lead, self.n, size)
        if self.transposed and lead:
            stored = (*lead[:-1], self.n, lead[-1], size)
            drawn = torch.randn(stored, generator=generator, dtype=torch.float64)
            return drawn.transpose(-2, -3)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def _mask(self, generator):
        if self.mask_batch is None:
            return None
        mask = torch.rand(self.mask_batch, self.n, generator=generator) < 0.7
        if self.padded:
            length = torch.randint(self.n + 1, (self.mask_batch, 1), generator=generator)
            mask = torch.arange(self.n) < length
        if self.hide_a_row:
            mask[-1] = False
        if not self.empty_queries:  # a query always sees its own key
            window = oracle.dense_mask(self.n, self.W, **self.window.letters)
            empty = ~(window[None] & mask[:, None, :]).any(-1)
            mask = mask | empty
        return mask

    def tensors(self, dtype=torch.float64):
        """The call's tensors, the same for every dtype up to its rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        kv_lead = self.lead
        if self.kv_heads is not None:
            kv_lead = (self.lead[0], self.kv_heads)
        q = self._draw(self.lead, self.d, generator)
        k = self._draw(kv_lead, self.d, generator)
        v = self._draw(kv_lead, self.d_v, generator)
        cotangent = torch.randn(*self.lead, self.n, self.d_v, generator=generator)
        bias = None
        if self.bias_heads is not None:
            slots = (1 + self.window.look_backward + self.window.ahead) * self.W
            bias = torch.randn(self.bias_heads, self.W, slots, generator=generator)
        return Call(q, k, v, self._mask(generator), bias, cotangent).to(dtype)

    def arguments(self):
        """The constructor's arguments: those that upstream has too."""
        return {
            "window_size": self.window.size,
            "causal": self.window.causal,
            "look_backward": self.window.look_backward,
            "look_forward": self.window.look_forward,
            "exact_windowsize": self.window.exact,
            "dropout": 0.0,
            "shared_qk": self.shared_qk,
            "dim": self.d if self.rotary else None,
            "autopad": self.autopad,
            "scale": self.scale,
            "use_xpos": self.xpos,
            "xpos_scale_base": self.base,
        }

    def run(self, layer, call):
        """The layer's output."""
        named = {}
        if call.mask is not None:
            named[self.mask_name] = call.mask
        if call.bias is not None:
            named["attn_bias"] = call.bias
        if self.override is not None:
            named["window_size"] = self.override
        return layer(call.q, call.k, call.v, **named)

    def truth(self, call, dtype=torch.float64, **options):
        """The oracle's output."""
        return oracle.attend(
            call.q,
            call.k,
            call.v,
            self.window.size,
            causal=self.window.causal,
            look_backward=self.window.look_backward,
            look_forward=self.window.look_forward,
            exact=self.window.exact,
            scale=self.scale,
            shared_qk=self.shared_qk,
            rotary=self.rotary,
            xpos=self.xpos,
            base=self.base,
            bias=call.bias,
            mask=call.mask,
            override=self.override,
            dtype=dtype,
            **options,
        )


def divisors(x):
    return [y for y in range(1, x + 1) if x % y == 0]


@st.composite
def cases(draw, upstream=False, long=False):
    """upstream=True keeps to where the specification says that upstream does the same.

    long=True draws hundreds of tokens in wider windows, for code that works in portions.
    """
    window = draw(windows(max_size=60 if long else 13))
    fewest, most = (150, 500) if long else (1, MAX_TOKENS)
    rotary = draw(st.booleans())
    xpos = rotary and draw(st.booleans())
    base = None
    if xpos:
        bases = st.sampled_from([16, 24.5, 30] if long else [3, 5, 7.5, 16])
        # window_size // 2 is 0 for a window of one: there is no default base
        base = draw(bases) if window.size == 1 else draw(st.none() | bases)
    autopad = draw(st.booleans())
    override = None
    if xpos and not (upstream and (window.exact or autopad)):
        # a window far wider than the base makes scores of 1e6: nothing to compare
        widest = int(min(60 if long else 13, 4 * (base or window.size // 2)))
        override = draw(st.none() | st.integers(1, widest))
    W = window.size if override is None else override

    if autopad:
        n = draw(st.integers(fewest, most))
    else:
        n = W * draw(st.integers(-(-fewest // W), max(1, most // W)))

    leads = [st.just(()), st.tuples(st.integers(1, 6))]
    if long:
        leads.append(st.sampled_from([(1, 4), (2, 3), (3, 2), (1, 3, 2)]))
    else:
        leads.append(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6])))
        leads.append(st.tuples(st.just(2), st.sampled_from([1, 3]), st.integers(1, 2)))
    lead = draw(st.one_of(leads))
    rows = math.prod(lead)
    kv_heads = None
    if len(lead) == 2 and not upstream:
        kv_heads = draw(st.none() | st.sampled_from(divisors(lead[1])))

    mask_batch = draw(st.none() | st.sampled_from(divisors(rows)))
    if upstream and autopad and n % W and not window.causal:
        mask_batch = mask_batch or 1
    return Case(
        window=window,
        n=n,
        lead=lead,
        kv_heads=kv_heads,
        d=draw(st.sampled_from([2, 4, 6] if long else [2, 4, 6, 10, 14])),
        d_v=draw(st.sampled_from([1, 3, 5, 7, 11])),
        autopad=autopad,
        scale=draw(st.sampled_from([None, None, 0.0, 0.37, -0.61])),
        shared_qk=draw(st.booleans()),
        rotary=rotary,
        xpos=xpos,
        base=base,
        override=override,
        bias_heads=draw(st.none() | st.sampled_from(divisors(rows))),
        mask_batch=mask_batch,
        mask_name=draw(st.sampled_from(["mask", "input_mask"])),
        hide_a_row=not upstream and draw(st.booleans()),
        empty_queries=not upstream,
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        padded=draw(st.booleans()),
    )
