"""How far a result may be off, and whether it is.

An error budget is never picked by hand. The oracle's plain arithmetic is run once in float64 (the
truth) and once in the dtype under test; what is tested may be a small factor worse than the second.
"""

import torch

# The plain arithmetic may be lucky in its largest error, and it may be exact (a query with one
# key), so that a few roundings of a number of the result's own size are always allowed.
FACTOR = 3
ROUNDINGS = 4


def gradients(out, call):
    named = call.learned()
    found = torch.autograd.grad((out * call.cotangent).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def sizes(case, call):
    """The size of the numbers that each gradient is a difference of.

    The gradient of a score is its weight times a difference of <cotangent, v>: it may be exactly 0
    by cancelling, and then a rounding of what cancelled is no error.
    """
    heads = call.q.shape[-3] // call.k.shape[-3] if case.kv_heads else 1
    v = call.v.repeat_interleave(heads, dim=-3) if heads > 1 else call.v
    swing = (call.cotangent.abs() @ v.abs().transpose(-1, -2)).max().item()
    scale = abs(case.d**-0.5 if case.scale is None else case.scale)
    q, k = (x.norm(dim=-1).max().item() for x in (call.q, call.k))
    return {"q": swing * scale * k, "k": swing * scale * q, "bias": swing, "v": 1.0}


def assert_within_budget(ours, plain, truth, dtype, what, size=1.0):
    ours, plain = ours.detach().double(), plain.detach().double()
    truth = truth.detach()
    assert ours.shape == truth.shape
    assert ours.isfinite().all(), f"{what} is not finite"
    size = max(size, truth.abs().max().item())
    allowed = FACTOR * (plain - truth).abs().max().item()
    allowed += ROUNDINGS * torch.finfo(dtype).eps * size
    worst = (ours - truth).abs().max().item()
    assert worst <= allowed, f"{what} is {worst:.3g} off, {allowed:.3g} is allowed"


def check(case, dtype, attend, moved=lambda call: call):
    """Output and gradients of a call are within the budget.

    attend: from the call's tensors to its output. moved: takes the tensors to where it works.
    """
    call = case.tensors(dtype)
    ours = moved(call)
    exact, plain = call.to(torch.float64), call.to(dtype)  # their rounding is nobody's error
    out = attend(ours)
    assert out.dtype == dtype
    assert out.shape == (*case.lead, case.n, case.d_v)
    truth, rough = case.truth(exact), case.truth(plain, dtype)
    assert_within_budget(out.cpu(), rough, truth, dtype, "the output")
    found, size = gradients(out, ours), sizes(case, exact)
    truth, rough = gradients(truth, exact), gradients(rough, plain)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        what = f"the gradient of {name}"
        assert_within_budget(gradient.cpu(), rough[name], truth[name], dtype, what, size[name])
