"""Faults of kernels that read memory which is nobody's, each in a process of its own.

Such a fault may end all work on the GPU. As ``test_kernel_faults.py``, seen on an H200 with torch
2.11. Run by itself with a case's name, this file prints what came of it.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from faults import is_close, mended
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalAttention, Window, local_attention
from flexlocal.flex import attend
from flexlocal.masks import block_lists, block_mask, key_layout
from flexlocal.mods import bias, dropout

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
        ("lists of a block mask", "written_out(lists) in block_mask"),
        ("lists of a layer", "written_out(lists) in block_lists"),
        ("captured tensors", "written_out of tensors that a kernel looks up"),
        ("full lists narrower", "full lists as wide as the partial ones"),
        ("views past 2**31", "the limit of 2**31 - 1 elements between views"),
        ("tensors past 2**31", "the limit of 2**31 - 1 elements"),
    ],
)
def test_kernels_read_elsewhere(case, workaround):
    """Tests that fail without: test_gpu's of a block mask, of arguments and of compiled models.

    ``test_more_elements_than_32_bits_count`` of test_split does for the last two.
    """
    said = what_comes_of(case)
    print(said)
    assert RIGHT not in said, mended(workaround)
    assert re.search(FAULT, said), said


@pytest.mark.parametrize("case", ["all as it is"])
def test_a_process_of_its_own_computes_right(case):
    """The processes above fail for the fault alone."""
    assert RIGHT in what_comes_of(case)


def _leave_out(*modules):
    for module in modules:
        module.written_out = lambda x: x


def _compare(run, truth, learned):
    found = []
    for attention in (run, truth):
        out = attention()
        found.append((out, *torch.autograd.grad(out.square().sum(), learned)))
    torch.cuda.synchronize()
    print(RIGHT if is_close(*found, 1e-3) else WRONG)


def _inputs(n=1000, views=False):
    torch.manual_seed(0)
    shape = (2, n, 3) if views else (2, 3, n)
    stored = [torch.randn(*shape, d, device="cuda", requires_grad=True) for d in (32, 32, 48)]
    kept = torch.rand(2, n, device="cuda") > 0.3
    kept[0, n // 2 :] = False  # blocks that are empty
    kept[1, : n // 2] = True  # and full ones
    return stored, [x.transpose(1, 2) if views else x for x in stored], kept


def lists_of_a_block_mask():
    """As ``test_a_block_mask_made_inside_a_compiled_function``, whose lists are left alone."""
    _leave_out(block_lists)
    window, (learned, qkv, kept) = Window(64, causal=True, look_backward=3), _inputs()

    def attention(q, k, v, kept):
        n = q.shape[2]
        blocks = block_mask(window, n, n, device=q.device, key_mask=kept)
        return flex_attention(q, k, v, block_mask=blocks)

    run = torch.compile(attention, fullgraph=True)
    _compare(
        lambda: run(*qkv, kept),
        lambda: local_attention(*qkv, window, mask=kept, backend="eager"),
        learned,
    )


def _layer(n=1000, views=False, drop=0.0, **more):
    learned, qkv, kept = _inputs(n, views)
    layer = LocalAttention(64, True, look_backward=3, dropout=drop, autopad=True, backend="flex")
    run = torch.compile(layer, fullgraph=True)

    def by_eager():
        layer.backend = "eager"
        return layer(*qkv, mask=kept, **more)

    _compare(lambda: run(*qkv, mask=kept, **more), by_eager, learned)


def all_as_it_is():
    _layer()


def lists_of_a_layer():
    _leave_out(block_lists)
    _layer()


def captured_tensors():
    _leave_out(attend, bias, dropout, key_layout)
    table = torch.randn(3, 64, 256, device="cuda")
    seed = torch.tensor(5, device="cuda")
    _layer(n=349, views=True, drop=0.3, attn_bias=table, dropout_seed=seed)


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


def _past_32_bits(views):
    """600,064 tokens of 32 heads of 128: the last tokens against a call on these alone."""
    n, h, d, last, window = 600064, 32, 128, 1024, Window.sliding(128)
    shape = (1, n, h, d) if views else (1, h, n, d)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    by_head = [x.transpose(1, 2) if views else x for x in (q, k, v)]
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


def views_past_32_bits():
    _past_32_bits(views=True)


def tensors_past_32_bits():
    _past_32_bits(views=False)


CASES = {
    "all as it is": all_as_it_is,
    "lists of a block mask": lists_of_a_block_mask,
    "lists of a layer": lists_of_a_layer,
    "captured tensors": captured_tensors,
    "full lists narrower": full_lists_narrower,
    "views past 2**31": views_past_32_bits,
    "tensors past 2**31": tensors_past_32_bits,
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
