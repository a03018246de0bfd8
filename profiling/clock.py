"""How a call is timed: medians, on the GPU with an empty cache, on the CPU with torch's timer."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, compilation included where it has not happened yet."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_ms(run: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """Median milliseconds of a warm call, over ``seconds`` of them.

    On a GPU its own time, by events, with the second-level cache emptied before each call.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds = 1e3 * seconds
        found: float = do_bench(
            run, warmup=milliseconds / 3, rep=milliseconds, return_mode="median"
        )
        return found
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def host_us(run: Callable[[], Any], device: torch.device, calls: int = 200) -> float:
    """Median microseconds that the host spends in a warm call, without waiting for the device."""
    times = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[calls // 2]


def kernels_ms(run: Callable[[], Any], device: torch.device, calls: int = 5) -> float | None:
    """Milliseconds that the kernels of a warm call take on a GPU, one after the other.

    Where the host takes longer to launch them, a call takes longer than they do. The cache is as
    the call before left it. Long calls without a pause bring a card to its limit of power, and read
    some per cent more than by ``median_ms``. None elsewhere.
    """
    if device.type != "cuda":
        return None
    run()
    synchronize(device)
    # torch 2.11 warns that it forgets earlier events, of which there are none, unless told not to.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            run()
        synchronize(device)
    spans = profiler.key_averages()
    return sum(span.self_device_time_total for span in spans) / calls / 1e3


def peak_bytes(run: Callable[[], Any], device: torch.device, passed: int) -> int | None:
    """Bytes that a call holds at most on a GPU; None elsewhere.

    Args:
        passed: bytes of what it is given. What else lay there before, as a library's workspace,
            does not count.
    """
    if device.type != "cuda":
        return None
    run()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return passed + torch.cuda.max_memory_allocated(device) - before
