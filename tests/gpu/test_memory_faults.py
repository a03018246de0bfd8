"""Faults of kernels that read memory which is nobody's, each in a process of its own.

Such a fault may end all work on the GPU. As ``test_kernel_faults.py``, seen on an H200 with torch
2.11. Run by itself with a case's name, this file prints what came of it.
"""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from faults import is_close, mended
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import Window
from flexlocal.masks import block_mask

pytestmark = pytest.mark.gpu

RIGHT, WRONG = "all is right", "numbers are wrong"
FAULT = f"{WRONG}|illegal memory access|signed integer is greater than maximum"


def what_comes_of(case):
    """What a process of its own prints, and the end of what it writes to stderr."""
    done = subprocess.run(
        [sys.executable, __file__, case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    return done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize(
    "case, workaround",
    [
        ("full lists narrower", "full lists as wide as the partial ones"),
        ("views past 2**31", "the limit of 2**31 - 1 elements between views"),
    ],
)
def test_kernels_read_elsewhere(case, workaround):
    """``test_more_elements_than_32_bits_count`` of test_split fails without the second."""
    said = what_comes_of(case)
    print(said)
    assert RIGHT not in said, mended(workaround)
    assert re.search(FAULT, said), said


def test_a_process_of_its_own_computes_right():
    """The processes above fail for the fault alone."""
    assert RIGHT in what_comes_of("views within 2**31")


def full_lists_narrower():
    window, n = Window.sliding(512), 2048
    blocks = block_mask(window, n, n, device="cuda")
    partial, full = blocks.kv_indices, blocks.full_kv_indices
    most = int(blocks.full_kv_num_blocks.max())
    assert most < partial.shape[-1] == full.shape[-1]
    narrow = block_mask(window, n, n, device="cuda")
    narrow.full_kv_indices = full[..., :most].contiguous()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, device="cuda") for _ in range(3))
    with torch.no_grad():
        found = [
            torch.compile(flex_attention, fullgraph=True)(q, k, v, block_mask=x)
            for x in (narrow, blocks)
        ]
    torch.cuda.synchronize()
    print(RIGHT if is_close(*found) else WRONG)


def _views(n):
    """``n`` tokens of 32 heads of 128: the last tokens against a call on these alone."""
    h, d, last, window = 32, 128, 1024, Window.sliding(128)
    q, k, v = (
        torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    found = []
    for length in (n, 2 * last):
        part = [x[:, :, -length:] for x in by_head]
        if length < n:
            part = [x.detach().clone().contiguous().requires_grad_() for x in part]
        blocks = block_mask(window, length, length, device="cuda")
        run = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        out = run(*part, block_mask=blocks)
        grads = torch.autograd.grad(out[:, :, -last:].float().square().sum(), part)
        found.append([x[:, :, -last:].detach().clone() for x in (out, *grads)])
        del out, grads, part
    torch.cuda.synchronize()
    print(RIGHT if is_close(*found, 0.05) else WRONG)


CASES = {
    "full lists narrower": full_lists_narrower,
    "views past 2**31": partial(_views, 600064),
    "views within 2**31": partial(_views, 20064),
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
