"""The kernels of ``scaled_dot_product_attention``, by their own names."""

from functools import lru_cache

import torch

flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""The one for processors.

It returns the log-sum-exps that its backward pass takes, which are not to be had of the public
function, nor does that take them (torch 2.11 to 2.15).
"""

flash_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Its backward pass."""

efficient_on_gpu = torch._scaled_dot_product_efficient_attention
"""The one for GPUs that takes a mask and any dtype.

On Hopper the public function takes cuDNN's, which makes a plan for each size that it meets: 55 ms
forward and 60 backward (H200, torch 2.11).
"""

flash_on_gpu = torch._scaled_dot_product_flash_attention
"""The one for GPUs and 16 bits that takes no mask."""


@lru_cache
def multiplies_float16() -> bool:
    """Whether this processor multiplies fp16 numbers, as ``flash_on_cpu`` asks."""
    return not torch.backends.mkldnn.is_available() or bool(
        torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
