"""How tests of workarounds ask whether torch still has a fault."""

import re

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def mended(workaround):
    """What a test says where torch does right without ``workaround``."""
    return (
        f"torch {torch.__version__} does right without {workaround}. Say so where it stands, and "
        "take it away once no version that flexlocal supports needs it"
    )


def assert_refused(call, said, workaround):
    """``call`` raises an error that says ``said``, which ``workaround`` goes around."""
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        if not re.search(said, str(error), re.IGNORECASE):
            raise
        return
    pytest.fail(mended(workaround))


def is_close(found, right, tolerance=1e-4):
    """Whether numbers are finite and right; all of them, of one tensor or of several."""
    if isinstance(found, torch.Tensor):
        found, right = [found], [right]
    return all(
        torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance)
        for x, y in zip(found, right, strict=True)
    )


def dense_attention(q, k, v, visible=None, score_mod=None):
    """Attention in float64 over all pairs, by the textbook.

    Args:
        visible: boolean, broadcast to the scores ``(b, h, n, m)``.
        score_mod: as FlexAttention takes it.
    """
    b, h, n = q.shape[:3]
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if score_mod is not None:
        places = [torch.arange(size, device=q.device) for size in (b, h, n, k.shape[2])]
        batch, head, query, key = torch.meshgrid(*places, indexing="ij")
        scores = score_mod(scores, batch, head, query, key)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v.double()
