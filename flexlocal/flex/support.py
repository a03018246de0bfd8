"""What the flex path takes, and the reason where it cannot."""

from ..positions import xpos_tokens
from ..spec import Inputs, Spec, wants_gradients
from ..torch_limits.kernels import MOST_HEAD, unavailable
from ..torch_limits.tracing import is_exporting, is_transformed
from ..xpos import xpos_fits
from . import split


def refusal(spec: Spec, inputs: Inputs) -> str | None:
    """Why this call cannot take the flex path; None when it can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    reason = unavailable(q.device, q.dtype)
    if reason is not None:
        return reason
    if is_exporting():
        return "an exporter cannot hold FlexAttention's kernel"
    if is_transformed():
        return "torch.func's transforms cannot enter the fused kernel"
    if 0 in (q.numel(), k.numel(), v.numel()):
        return "there is nothing to compute: a tensor is empty"
    base = spec.xpos_base
    if base is not None and not xpos_fits(xpos_tokens(spec, inputs), base, q.dtype):
        return f"xpos's factors of windows that reach so far overflow {q.dtype}"
    too_large = split.refusal(spec, inputs)
    if too_large is not None:
        return too_large
    if q.device.type == "cuda" and max(q.shape[-1], v.shape[-1]) > MOST_HEAD:
        return f"kernels take heads up to {MOST_HEAD} wide"
    if q.device.type == "cpu":
        if wants_gradients(inputs):
            return "FlexAttention has no backward pass on the CPU; torch.no_grad() would do"
        needing = {
            "dropout": spec.dropout > 0,
            "sinks": inputs.sinks is not None,
            "return_lse": spec.return_lse,
        }
        for name in (name for name, needs in needing.items() if needs):
            return f"FlexAttention gives no log-sum-exp on the CPU, which {name} needs"
    return None
