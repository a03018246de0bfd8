"""How calls are timed: in turns, so that what disturbs the machine disturbs all of them alike.

A ratio is the median over rounds of turns, with its quartiles. On a GPU the cache is emptied
before each call; on a CPU ``torch.utils.benchmark`` times.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Run = Callable[[], object]

ROUNDS = 7
"""Turns that each call gets; a ratio's quartiles are over these."""

NOISY = 0.2
"""Of a ratio's median, the distance of its quartiles from which on it means nothing."""

TOO_NOISY = "this machine was too noisy for"

_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes
_PRODUCT = {"cuda": 8192, "cpu": 1024}  # rows and columns


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call(run: Run, device: torch.device) -> float:
    """Seconds of one call, compilation included where it has not happened yet."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_ms(run: Run, device: torch.device, seconds: float) -> float:
    """Median milliseconds of a warm call, over ``seconds`` of them."""
    if device.type == "cuda":
        from triton.testing import do_bench

        rep = 1e3 * seconds
        found: float = do_bench(run, warmup=rep / 3, rep=rep, return_mode="median")
        return found
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def kernels_ms(run: Run, device: torch.device, seconds: float = 0.0, calls: int = 5) -> float:
    """Milliseconds that the kernels of a warm call take on a GPU, one after the other.

    A call takes longer than its kernels where the host needs longer to launch them. The cache is
    as the call before left it. Long calls without a pause bring a card to its limit of power, and
    read some per cent more than by ``median_ms``.
    """
    # torch 2.11 warns that it forgets earlier events, of which there are none, unless told not to.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            run()
        synchronize(device)
    return sum(each.self_device_time_total for each in profiler.key_averages()) / calls / 1e3


def in_turns(
    runs: Mapping[str, Run],
    device: torch.device,
    seconds: float,
    clock: Callable[[Run, torch.device, float], float],
) -> dict[str, list[float]]:
    """Milliseconds of each call in each of ``ROUNDS`` rounds, in which all have their turn.

    Args:
        seconds: of timed calls for each of ``runs``, over all rounds.
        clock: ``median_ms`` or ``kernels_ms``.
    """
    for run in runs.values():
        run()
    synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(clock(run, device, seconds / ROUNDS))
    return found


def add_times(
    rows: Mapping[str, dict[str, Any]],
    runs: Mapping[str, Run],
    names: Sequence[str],
    device: torch.device,
    seconds: float,
) -> None:
    """Times ``runs`` in turns and adds medians and rounds to the rows of the same names.

    Args:
        names: of a call's time and, where it is wanted on a GPU, of its kernels' time.
    """
    clocks = dict(zip(names, (median_ms, kernels_ms), strict=False))
    for name_of_time, clock in clocks.items():
        if clock is kernels_ms and device.type != "cuda":
            continue
        for name, rounds in in_turns(runs, device, seconds, clock).items():
            rows[name][name_of_time] = statistics.median(rounds)
            rows[name].setdefault("rounds", {})[name_of_time] = rounds


@dataclass(frozen=True)
class Ratio:
    """How many times as long one call takes as another.

    ``low`` and ``high`` are the quartiles over the rounds; None where only medians were kept.
    """

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def spread(self) -> float:
        """Between the quartiles."""
        return 0.0 if self.low is None or self.high is None else self.high - self.low

    @property
    def noisy(self) -> bool:
        """Whether the rounds agree too little for the ratio to mean anything."""
        return self.spread > NOISY * self.median

    @property
    def impossible(self) -> bool:
        """Whether it says that added work took less time, by more than its spread and 2 %."""
        return 1 - self.median > max(self.spread, 0.02)

    def words(self, bracket: bool = True) -> str:
        """``1.31x (1.28-1.35)``, or with a comma for use inside brackets."""
        digits = 1 if self.median >= 9.95 else 2
        text = f"{self.median:.{digits}f}x"
        if self.low is None or self.high is None:
            return text
        between = f"{self.low:.{digits}f}-{self.high:.{digits}f}"
        return f"{text} ({between})" if bracket else f"{text}, {between}"


def ratio_of_rounds(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """``ours`` over ``others``, both by round."""
    found = [one / other for one, other in zip(ours, others, strict=True)]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(median, low, high)


def ratio_of_rows(row: dict[str, Any], base: dict[str, Any], name: str) -> Ratio | None:
    """Of the time ``name`` in two rows of a record; files of earlier versions hold no rounds."""
    rounds = [each.get("rounds", {}).get(name) for each in (row, base)]
    if all(rounds):
        return ratio_of_rounds(*rounds)
    ours, others = row.get(name), base.get(name)
    return Ratio(ours / others) if ours is not None and others else None


def peak_bytes(run: Run, device: torch.device, passed: int) -> int | None:
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


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """What the device can do at most in a second: bytes of a copy, operations of a product."""
    count, side = _COPIED[device.type], _PRODUCT[device.type]
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_ms(lambda: target.copy_(source), device, seconds)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    multiplied = median_ms(lambda: matrix @ matrix, device, seconds)
    return {"copy": 1e3 * 2 * count / copied, "product": 1e3 * 2 * side**3 / multiplied}
