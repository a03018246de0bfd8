"""How calls are timed: in turns, so that what disturbs the machine disturbs all of them alike.

A ratio is the median over rounds of turns, with its quartiles. On a GPU the cache is emptied
before each call; on a CPU ``torch.utils.benchmark`` times.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from .problems import Task

Run = Callable[[], object]
Rows = Mapping[str, dict[str, Any]]

ROUNDS = 7  # turns that each call gets
NOISY = 0.2  # of a ratio's median, the distance of its quartiles from which on it means nothing
TOO_NOISY = "this machine was too noisy for"


def synchronize(device: torch.device) -> None:
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

        return do_bench(run, warmup=1e3 * seconds / 3, rep=1e3 * seconds, return_mode="median")
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def kernels_ms(run: Run, device: torch.device, seconds: float = 0.0, calls: int = 5) -> float:
    """Milliseconds that the kernels of a warm call take on a GPU, without the host's launches.

    The cache is as the call before left it. Long calls without a pause bring a card to its limit of
    power, and read some per cent more than by ``median_ms``.
    """
    # torch 2.11 warns that it forgets earlier events, of which there are none, unless told not to.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            run()
        synchronize(device)
    return sum(each.self_device_time_total for each in profiler.key_averages()) / calls / 1e3


@dataclass(frozen=True)
class Timing:
    """What ``in_turns`` asks of a task, for calls that are no problem's."""

    device: torch.device
    seconds: float


def in_turns(
    runs: Mapping[str, Run], task: Task | Timing, clock: Callable[[Run, torch.device, float], float]
) -> dict[str, list[float]]:
    """Milliseconds of each call by round; ``task.seconds`` are for all of ``ROUNDS`` rounds."""
    for run in runs.values():
        run()
    synchronize(task.device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(clock(run, task.device, task.seconds / ROUNDS))
    return found


def add_times(rows: Rows, runs: Mapping[str, Run], task: Task, *names: str) -> None:
    """Times ``runs`` in turns and adds medians and rounds to the rows of the same names.

    ``names`` are of a call's time and, where it is wanted on a GPU, of its kernels'.
    """
    for name_of_time, clock in zip(names, (median_ms, kernels_ms), strict=False):
        if clock is kernels_ms and task.device.type != "cuda":
            continue
        for name, rounds in in_turns(runs, task, clock).items():
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
    def noisy(self) -> bool:
        """Whether the rounds agree too little for the ratio to mean anything."""
        return self.low is not None and self.high - self.low > NOISY * self.median

    def words(self, bracket: bool = True) -> str:
        """``1.31x (1.28-1.35)``, or with a comma for use inside brackets."""
        digits = 1 if self.median >= 9.95 else 2
        text = f"{self.median:.{digits}f}x"
        if self.low is None:
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


def peak_bytes(run: Run, device: torch.device, passed: int) -> int:
    """Bytes that a call holds at most, the ``passed`` ones it is given included.

    What else lay there before, as a library's workspace, does not count.
    """
    run()
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return passed + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        held = memory_of(file)["cpu"]
    return passed + max(held) - held[0]


def memory_of(file: Path) -> dict[str, list[int]]:
    """Bytes allocated by device, ``cpu`` or ``cuda:0``, from a Chrome trace.

    First what was held at the start, then after each change.
    """
    found: dict[str, list[int]] = {}
    events = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    for event in sorted(changes, key=lambda event: event["ts"]):
        facts = event["args"]
        device = "cpu" if facts["Device Type"] == 0 else f"cuda:{facts['Device Id']}"
        # Not the sum of what each event says: the profiler misses what the backward pass's
        # thread frees after it is done, but the next event tells what is held since.
        held = facts["Total Allocated"]
        found.setdefault(device, [held - facts["Bytes"]]).append(held)
    return found
