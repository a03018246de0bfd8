"""FlexAttention's kernel options for a problem, tried one by one in processes that share the GPU.

Each process compiles beside the others; who checks or times has the GPU to itself.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from flexlocal import local_attention
from flexlocal.flex.tuning import Tuning, overriding
from flexlocal.masks.block_lists import lists_have_gaps

from .bench import trouble
from .check import complaint, errors, results
from .peers import REFERENCE, Attend, forward_of, training_of
from .problems import Problem, Task
from .terminal import watched
from .timing import in_turns, median_ms

PASSES = {"forward": ("fwd_", forward_of), "training": ("bwd_", training_of)}
"""What is timed, with the prefix of the options that are swept for it, and what makes the call."""

Space = dict[str, Sequence[int]]
SPACE: Space = {"blocks": (64, 128), "tiles": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)}
"""What is combined: sparse blocks, tiles that divide them, warps and pipeline stages."""


@dataclass(frozen=True)
class Trial:
    """Options of a pass and what came of them: ``status`` and ``reason`` are as ``bench`` has them.

    Options for training hold the forward pass's too, and ``ms`` is of both passes then.
    """

    kind: str
    block: int
    one_list: bool
    options: dict[str, Any]
    status: str = ""
    reason: str = ""
    error: float | None = None
    ms: float | None = None

    @property
    def tuning(self) -> Tuning:
        """For a call."""
        return Tuning(self.block, tuple(sorted(self.options.items())), self.one_list)

    @property
    def words(self) -> str:
        """What is swept, for a table."""
        prefix, _ = PASSES[self.kind]
        swept = [name for name in self.options if name.startswith(prefix)]
        named = (f"{name.removeprefix(prefix)}={self.options[name]}" for name in swept)
        return f"blocks of {self.block}{' in one list' * self.one_list}: {' '.join(named)}"


def candidates(kind: str, problem: Problem, space: Space) -> list[Trial]:
    """All that the kernels of a pass can run; one list of blocks where two would have gaps."""
    # Narrower heads are loaded without the tensor memory accelerator.
    tma = ({}, {"USE_TMA": True}) if problem.d >= 128 else ({},)
    found = []
    for block in space["blocks"]:
        gaps = lists_have_gaps(problem.window, (problem.n, problem.n), block)
        tiles = _tiles(kind, [size for size in space["tiles"] if block % size == 0])
        lists = (False, True) if gaps else (False,)
        every = product(lists, tiles, space["warps"], space["stages"], tma)
        for one_list, tile, warps, stages, more in every:
            options = {**tile, "num_warps": warps, "num_stages": stages, **more}
            prefixed = {PASSES[kind][0] + name: value for name, value in options.items()}
            found.append(Trial(kind, block, one_list, prefixed))
    return found


def _tiles(kind: str, sizes: Sequence[int]) -> list[dict[str, int]]:
    """M1 and N1 make the gradients of key and value, M2 and N2 that of the query."""
    if kind == "forward":
        return [{"BLOCK_M": m, "BLOCK_N": n} for m, n in product(sizes, repeat=2)]
    return [
        {"BLOCK_M1": m1, "BLOCK_N1": n1, "BLOCK_M2": m2, "BLOCK_N2": n2}
        for m1, n1, m2, n2 in product(sizes, repeat=4)
        if n1 % m1 == 0 and m2 % n2 == 0
    ]


def fastest(trials: Sequence[Trial], kind: str) -> list[Trial]:
    """Those of a pass that were right, the fastest first."""
    right = [trial for trial in trials if trial.kind == kind and trial.status == "measured"]
    return sorted(right, key=lambda trial: trial.ms)


def sweep(
    problem: Problem, space: Space, workers: int, try_one: Callable[[Trial], Trial]
) -> Iterator[Trial]:
    """Every candidate, tried; those of training with the fastest forward options of its blocks."""
    best: dict[tuple[int, bool], Trial] = {}
    for kind in PASSES:
        trials = candidates(kind, problem, space)
        if kind == "training":
            of_blocks = [(trial, best.get((trial.block, trial.one_list))) for trial in trials]
            trials = [replace(t, options=f.options | t.options) for t, f in of_blocks if f]
        tried, found = [], in_processes(try_one, trials, workers)
        for trial, result in watched(found, len(trials), f"{problem.name}: {kind}"):
            lost = isinstance(result, str)
            tried.append(replace(trial, status="failed", reason=result) if lost else result)
            yield tried[-1]
        best = {(t.block, t.one_list): t for t in reversed(fastest(tried, kind))}


def attempt(task: Task, lock: Path, trial: Trial) -> Trial:
    """The trial with what came of it: compiled beside others, checked and timed alone."""
    try:
        with _alone(lock):  # what others time would wait for the reference
            tensors, reference = _given(task)
        attend = attention(task.problem, trial.tuning)
        run = PASSES[trial.kind][1](attend, tensors)
        run()
        with _alone(lock):
            off = _errors(attend, tensors, reference, trial.kind == "training")
            wrong = complaint(off, task.dtype)
            ms = None if wrong else median_ms(run, task.device, task.seconds)
        status, reason = ("wrong", wrong) if wrong else ("measured", "")
        found = {"error": max(off.values()), "ms": ms}
        return replace(trial, status=status, reason=reason, **found)
    except Exception as error:  # compilers and drivers raise anything; the others go on
        status, reason = trouble(error)
        return replace(trial, status=status, reason=reason)


def in_the_end(task: Task, tunings: dict[str, Tuning]) -> dict[str, dict[str, list[float]]]:
    """By pass and name, milliseconds of each round of the tunings that run and are right."""
    tensors, reference = _given(task)
    right, found = {}, {}
    for name, tuning in tunings.items():
        attend = attention(task.problem, tuning)
        try:
            if complaint(_errors(attend, tensors, reference), task.dtype) is None:
                right[name] = attend
        except Exception:  # as FlashAttention 4's kernel, which does not take all heads
            continue
    for kind, (_, made) in PASSES.items():
        runs = {name: made(attend, tensors) for name, attend in right.items()}
        found[kind] = in_turns(runs, replace(task, seconds=5 * task.seconds), median_ms)
    return found


def attention(problem: Problem, tuning: Tuning) -> Attend:
    """The layer's flex path as a call of ``tuning`` takes it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with overriding(tuning):
            return local_attention(q, k, v, problem.window, backend="flex")

    return attend


def corners(x: Tensor) -> Tensor:
    """The first and last heads: they stand for all, and every process can hold them in fp32."""
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]


def _given(task: Task) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """q, k, v and the output's gradient, and what the eager path makes of their corners."""
    tensors = task.tensors()
    exact = [corners(x).detach().float().requires_grad_() for x in tensors]
    return tensors, results(REFERENCE.attend(task.problem, task.device), exact)


def _errors(
    attend: Attend, tensors: Sequence[Tensor], reference: Sequence[Tensor], train: bool = True
) -> dict[str, float]:
    return errors([corners(x) for x in results(attend, tensors, train)], reference)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits for the lock; it is free again when the process that holds it dies."""
    import fcntl  # not on Windows

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_processes(
    work: Callable[[Any], Any], jobs: Sequence[Any], count: int, seconds: float = 240.0
) -> Iterator[tuple[Any, Any]]:
    """Each job with its result, in a process of its own; with a text where that died or hung."""
    with ThreadPoolExecutor(count) as waiting:
        yield from zip(jobs, waiting.map(partial(_result, work, seconds), jobs), strict=True)


def _result(work: Callable[[Any], Any], seconds: float, job: Any) -> Any:
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_result, args=(sender, work, job), daemon=True)
    process.start()
    sender.close()  # so that the pipe ends with the process
    try:
        return receiver.recv() if receiver.poll(seconds) else f"no result within {seconds:g} s"
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()  # one that hangs as well, and with it its lock
        process.join()


def _send_result(sender: Connection, work: Callable[[Any], Any], job: Any) -> None:
    torch._inductor.config.compile_threads = 1  # the other processes compile as well
    sender.send(work(job))
