"""What the device can do at most, measured: a copy and a matrix product."""

from dataclasses import dataclass

import torch

from .clock import median_ms
from .problems import Problem

_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes
_PRODUCT = {"cuda": 8192, "cpu": 1024}  # rows and columns


@dataclass(frozen=True)
class Rates:
    """Bytes read and written, and floating-point operations of a product, in a second."""

    copy: float
    product: float

    def memory_ms(self, problem: Problem, dtype: torch.dtype, train: bool) -> float:
        """Milliseconds to read and write the problem's tensors once."""
        return 1e3 * problem.traffic(dtype, train) / self.copy

    def arithmetic_ms(self, problem: Problem, train: bool) -> float:
        """Milliseconds for the problem's operations at the product's rate."""
        return 1e3 * problem.flops(train) / self.product


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> Rates:
    """The rates of ``device``, products at ``dtype``."""
    count, side = _COPIED[device.type], _PRODUCT[device.type]
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_ms(lambda: target.copy_(source), device, seconds)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    multiplied = median_ms(lambda: matrix @ matrix, device, seconds)
    return Rates(1e3 * 2 * count / copied, 1e3 * 2 * side**3 / multiplied)
