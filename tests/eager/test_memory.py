"""The eager path's memory is linear in the length, forward and backward."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from flexlocal import LocalAttention

n, kind = int(sys.argv[1]), sys.argv[2]
dim, dropout = 64 if kind == "rotary" else None, 0.1 if kind == "dropout" else 0.0
layer = LocalAttention(128, causal=True, dim=dim, dropout=dropout)
bias = torch.randn(2, 128, 256, requires_grad=True) if kind == "bias" else None

def run(n):
    q, k, v = (torch.randn(1, 2, n, 64, requires_grad=True) for _ in range(3))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer(q, k, v, attn_bias=bias).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 / (16 * q.numel())

run(512)  # what is loaded once is not the call's
print(run(n))
"""


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        pytest.param("plain", 1.5, marks=pytest.mark.slow),
        pytest.param("rotary", 2.8, marks=pytest.mark.slow),
        ("dropout", 1.7),
        pytest.param("bias", 1.6, marks=pytest.mark.slow),
    ],
)
def test_a_long_sequence_takes_some_times_its_own_size(kind, most):
    """Times the bytes of q, k, v and the output; the scores alone would take 128."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "65536", kind], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < most
