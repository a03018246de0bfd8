"""Calls whose tokens stand at positions of their own: documents, offsets; and what alters scores.

A `Placed` is a `Case` with more numbers. It calls the function, which takes every argument.
"""

import math
from dataclasses import dataclass

import torch
from features import feature
from hypothesis import strategies as st
from strategies import Case, cases, divisors

from flexlocal import Rotary, Window, local_attention


@dataclass(frozen=True)
class Tensors:
    """The tensors of one call, and what the loss multiplies its two results by."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    documents: torch.Tensor | None
    q_offset: object
    kv_offset: object
    cotangent: torch.Tensor
    lse_cotangent: torch.Tensor

    def to(self, dtype, device="cpu"):
        """The same values, rounded to dtype: leaves that collect gradients, the rest moved."""

        def moved(name, x):
            if not isinstance(x, torch.Tensor):
                return x
            if not x.is_floating_point():
                return x.to(device)
            x = x.detach().to(device, dtype, memory_format=torch.preserve_format)
            return x if "cotangent" in name else x.requires_grad_()

        made = {name: moved(name, x) for name, x in vars(self).items()}
        if self.kv_offset is self.q_offset:
            made["kv_offset"] = made["q_offset"]
        return Tensors(**made)

    def learned(self):
        """name -> every tensor that has a gradient."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: x for name, x in named.items() if x is not None}


@dataclass(frozen=True)
class Placed:
    """One call of the function."""

    case: Case
    m: int  # keys
    documents: int | None  # batch entries; 0: one row of numbers for all
    q_offset: int | None
    kv_offset: int | None
    offset_rows: int | None  # batch entries of the offsets; None: they are numbers
    same_offset: bool  # one tensor for both
    softcap: float | None
    sink_heads: int | None

    def tensors(self, dtype=torch.float64, device="cpu"):
        """The call's tensors, the same for every dtype up to its rounding."""
        case = self.case
        generator = torch.Generator().manual_seed(case.seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lead, rows = case.lead, math.prod(case.lead)
        kv_lead = lead if case.kv_heads is None else (lead[0], case.kv_heads)
        q, k, v = (
            draw(*lead, case.n, case.d),
            draw(*kv_lead, self.m, case.d),
            draw(*kv_lead, self.m, case.d_v),
        )
        if case.transposed and len(lead) == 2:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        mask = bias = sinks = documents = q_offset = kv_offset = None
        if case.mask_batch is not None:
            mask = torch.rand(case.mask_batch, self.m, generator=generator) < 0.7
        if case.bias_heads is not None:
            slots = (1 + case.window.look_backward + case.window.ahead) * case.W
            bias = draw(case.bias_heads, case.W, slots)
        if self.sink_heads is not None:
            sinks = draw(self.sink_heads)
        if self.documents is not None:
            batch = self.documents or 1
            begins = torch.rand(batch, self.m, generator=generator) < 0.15
            documents = begins.cumsum(-1) % 5 - (1 if case.padded else 0)
            documents = documents.to(torch.int32)[0 if self.documents == 0 else slice(None)]
        if self.q_offset is not None:
            q_offset, kv_offset = self.q_offset, self.kv_offset
            if self.offset_rows is not None:
                spread = torch.randint(0, 7, (2, self.offset_rows), generator=generator)
                q_offset, kv_offset = spread + torch.tensor([[q_offset], [kv_offset]])
                kv_offset = q_offset if self.same_offset else kv_offset
        cotangent, lse_cotangent = draw(*lead, case.n, case.d_v), draw(*lead, case.n)
        assert rows % (self.documents or 1) == 0
        made = Tensors(
            q, k, v, mask, bias, sinks, documents, q_offset, kv_offset, cotangent, lse_cotangent
        )
        return made.to(dtype, device)

    def rotary(self, device="cpu"):
        case = self.case
        if not case.rotary:
            return None
        base = case.base or case.window.size // 2
        return Rotary(case.d, case.xpos, base if case.xpos else None).to(device)

    def arguments(self, call, **more):
        """Arguments of `local_attention` beside the window."""
        return {
            "mask": call.mask,
            "attn_bias": call.bias,
            "scale": self.case.scale,
            "softcap": self.softcap,
            "sinks": call.sinks,
            "shared_qk": self.case.shared_qk,
            "rotary": more["rotary"] if "rotary" in more else self.rotary(call.q.device),
            "documents": call.documents,
            "q_offset": call.q_offset,
            "kv_offset": call.kv_offset,
            **more,
        }

    @property
    def window(self):
        rule = self.case.window
        return Window(self.case.W, rule.causal, rule.look_backward, rule.look_forward, rule.exact)

    def run(self, call, **more):
        """The output and the log-sum-exps."""
        arguments = self.arguments(call, **{"return_lse": True, **more})
        return local_attention(call.q, call.k, call.v, self.window, **arguments)

    def truth(self, call, dtype=torch.float64, **more):
        """Likewise by brute force."""
        case, rotary = self.case, self.rotary()
        more = {"lse": True, **more}
        if rotary is not None:  # the buffers' own fp32 numbers
            more |= {"frequencies": rotary.inv_freq, "decay": rotary.scale}
        return case.truth(
            call,
            dtype,
            softcap=self.softcap,
            sinks=call.sinks,
            documents=call.documents,
            q_offset=call.q_offset,
            kv_offset=call.kv_offset,
            **more,
        )


def loss(results, call):
    """Of both results; the log-sum-exp of a query that sees nothing is -inf, and left out."""
    out, lse = results
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return (out * call.cotangent).sum() + (finite * call.lse_cotangent).sum()


def gradients(results, call):
    named = call.learned()
    found = torch.autograd.grad(loss(results, call), list(named.values()))
    return dict(zip(named, found, strict=True))


def check(case, dtype=torch.float64, device="cpu", tolerance=1e-9, run=None, **more):
    """Outputs, log-sum-exps and gradients against the oracle, within `tolerance` of their size.

    run: from the call's tensors to its results; the case's own by default.
    """
    call = case.tensors(dtype, device)
    exact = call.to(torch.float64)
    found, truth = (run or case.run)(call, **more), case.truth(exact)
    assert found[0].dtype == dtype and found[0].shape == truth[0].shape
    assert found[1].dtype == torch.promote_types(dtype, torch.float32)
    assert found[1].shape == truth[1].shape
    unseen = truth[1] == -math.inf
    assert torch.equal(found[1].cpu() == -math.inf, unseen)
    assert not found[0].cpu()[unseen].any()

    def close(name, ours, true):
        assert ours.isfinite().all(), name
        size = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        worst = (ours.cpu().double() - true).abs().max().item() if true.numel() else 0.0
        assert worst <= tolerance * size, f"{name} is {worst:.3g} off, of {size:.3g}"

    close("the output", found[0].detach(), truth[0].detach())
    sums = (x[1].detach().masked_fill(x[1].isinf(), 0.0) for x in (found, truth))
    close("the log-sum-exp", *sums)
    ours, true = gradients(found, call), gradients(truth, exact)
    for name, gradient in ours.items():
        assert gradient.dtype == dtype
        close(f"the gradient of {name}", gradient, true[name])


def case_of(name="", **more):
    """The named feature of `features`, at positions of its own and with other scores."""
    own = {"m", "documents", "q_offset", "kv_offset", "offset_rows", "same_offset"}
    own |= {"softcap", "sink_heads"}
    case = feature(name, **{key: x for key, x in more.items() if key not in own})
    nothing = dict.fromkeys(sorted(own), None)
    given = {key: x for key, x in more.items() if key in own}
    return Placed(**{**nothing, "case": case, "m": case.n, "same_offset": False, **given})


PART = {"n": 150, "m": 301, "q_offset": 90, "kv_offset": 3}
PACKED = {"documents": 2, "n": 301, "padded": True}
ROW = {"n": 333, "documents": 0}

CASES = {
    "softcap": case_of(softcap=2.0, n=301),
    "softcap, bias, shared": case_of("bias and shared", softcap=1.5, n=301),
    "sinks": case_of("grouped queries", sink_heads=6, n=301),
    "sinks, bias, mask": case_of("mask and bias, blocks full", sink_heads=2, n=450),
    "sinks, shared both ways": case_of("shared both ways", sink_heads=3, n=301),
    "shared": case_of("shared, odd windows both ways"),
    "shared, rows without others": case_of("mask, a row hidden", shared_qk=True, n=301),
    "documents": case_of(**PACKED),
    "documents of one row": case_of("far looks", **ROW),
    "documents by head": case_of("grouped queries", **{**PACKED, "documents": 12}),
    "documents, sliding both ways": case_of("rotary, exact both ways", **PACKED),
    "documents, xpos": case_of("xpos", **PACKED),
    "documents, xpos, many segments": case_of("xpos, many segments", **PACKED),
    "documents, xpos both ways, everything": case_of(
        "xpos, mask, bias, shared", **{**PACKED, "softcap": 2.0, "sink_heads": 3}
    ),
    "documents, bias": case_of("bias over rows", **PACKED),
    "documents, shared": case_of("shared both ways", **PACKED),
    "documents, mask by head": case_of("grouped, mask by head", **PACKED),
    "documents, five dimensions": case_of("five dimensions", **PACKED),
    "a part": case_of("grouped queries", **PART),
    "a part, both ways": case_of("far looks", **PART),
    "a part by row": case_of("rotary, exact both ways", **PART, offset_rows=2),
    "a part by row, xpos": case_of("xpos, many segments", **PART, offset_rows=2),
    "a part, xpos": case_of("xpos", **PART),
    "a part by head, bias": case_of("bias", **PART, offset_rows=6),
    "a part, shared, mask": case_of("shared, mask", **PART, offset_rows=2),
    "a part of documents": case_of("bias over rows", **{**PART, "documents": 3}),
    "a part of documents, xpos": case_of("xpos", **{**PART, "documents": 2, "offset_rows": 2}),
    "few queries of many keys": case_of(
        "grouped queries", n=7, m=640, q_offset=600, kv_offset=0, sink_heads=3
    ),
    "few queries by row": case_of(
        "rotary, exact both ways", n=7, m=740, q_offset=690, kv_offset=0, offset_rows=2
    ),
    "padding on the left": case_of(
        "shared", n=301, q_offset=-50, kv_offset=-50, offset_rows=2, same_offset=True
    ),
    "padding on the left, apart": case_of(
        "mask", n=301, q_offset=-50, kv_offset=-50, offset_rows=2
    ),
}
"""Calls that kernels are compiled for: one for each argument, and pairs that meet in a kernel."""


@st.composite
def placed(draw):
    """Calls over the whole argument space."""
    case = draw(cases())
    if case.override is not None:
        case = Case(**{**vars(case), "override": None})
    rows = math.prod(case.lead)
    entries = st.sampled_from(divisors(rows))
    documents = draw(st.none() | st.just(0) | entries)
    m, q_offset, kv_offset, offset_rows = case.n, None, None, None
    if draw(st.booleans()):
        m = draw(st.integers(1, 70))
        q_offset, kv_offset = draw(st.integers(-9, 80)), draw(st.integers(-9, 30))
        offset_rows = draw(st.none() | entries)
    return Placed(
        case=case,
        m=m,
        documents=documents,
        q_offset=q_offset,
        kv_offset=kv_offset,
        offset_rows=offset_rows,
        same_offset=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 0.7, 3])),
        sink_heads=draw(st.none() | entries),
    )
