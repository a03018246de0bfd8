"""The candidates of a problem, tried one by one in processes that share the GPU.

Each compiles beside the others; who checks or times has the GPU to itself.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from flexlocal import local_attention
from flexlocal.flex.tuning import Tuning, overriding

from .bench import forward_of, training_of, trouble
from .candidates import (
    PASSES,
    Candidate,
    Layout,
    Options,
    Outcome,
    candidates,
    flash,
    layout_words,
    ranked,
    stock,
)
from .check import complaint, errors, results
from .options import DTYPES
from .peers import PEERS, REFERENCE, Attend
from .problems import Problem
from .terminal import Bar
from .timing import first_call, in_turns, median_ms

MOST_SECONDS = 240.0
"""What a job may take, the start of its process and its wait for the GPU included."""

CONTEXT_BYTES = 2**30
"""Of GPU memory, that a process takes for itself."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what it is tried on.

    Attributes:
        forward: options of the forward pass, for a candidate of the backward pass.
        lock: a file; who holds its lock has the GPU to itself.
    """

    candidate: Candidate
    problem: Problem
    dtype: torch.dtype
    seconds: float
    lock: Path
    forward: Options = ()
    device: torch.device = torch.device("cuda")


@dataclass(frozen=True)
class Final:
    """Tunings by name that are timed again, in turns in one process."""

    tunings: dict[str, Tuning]
    trial: Trial  # whose candidate plays no part


Rounds = dict[str, dict[str, list[float]]]
"""Milliseconds of each round, by the pass and the name of the tuning."""


def attention(problem: Problem, tuning: Tuning) -> Attend:
    """The layer's fused path as a call of ``tuning`` takes it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with overriding(tuning):
            return local_attention(q, k, v, problem.window, backend="flex")

    return attend


def attempt(trial: Trial) -> Outcome:
    """Compiles beside other processes; checks and times alone."""
    candidate, device = trial.candidate, trial.device
    train = candidate.kind == "training"
    try:
        with _alone(trial.lock):  # what others time would wait for the reference
            tensors, reference = _given(trial.problem, trial.dtype, device)
        attend = attention(trial.problem, candidate.tuning(trial.forward))
        run = (training_of if train else forward_of)(attend, tensors)
        first = first_call(run, device)
        with _alone(trial.lock):
            off = errors([corners(x) for x in results(attend, tensors, train)], reference)
            wrong, error = complaint(off, trial.dtype), max(off.values())
            if wrong is not None:
                return Outcome(candidate, "wrong", wrong, error, first_s=first)
            ms = median_ms(run, device, trial.seconds)
        return Outcome(candidate, "measured", "", error, ms, first)
    except Exception as error:  # compilers and drivers raise anything; the others go on
        return Outcome(candidate, *trouble(error))


def in_the_end(final: Final) -> Rounds:
    """Both passes of each tuning in turns."""
    trial, found = final.trial, {}
    tensors, _ = _given(trial.problem, trial.dtype, trial.device)
    each = {name: attention(trial.problem, tuning) for name, tuning in final.tunings.items()}
    for kind, made in zip(PASSES, (forward_of, training_of), strict=True):
        runs = {name: made(attend, tensors) for name, attend in each.items()}
        found[kind] = in_turns(runs, trial.device, 5 * trial.seconds, median_ms)
    return found


def corners(x: Tensor) -> Tensor:
    """The first and last head of the first and last batch entry.

    Heads know nothing of each other: these stand for all, and every process can hold them.
    """
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]


def _given(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """q, k, v and the output's gradient, and what the eager path makes of their corners."""
    tensors = problem.tensors(dtype, device)
    exact = [corners(x).detach().float().requires_grad_() for x in tensors]
    return tensors, results(REFERENCE.attend(problem, device), exact)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits for the lock; it is free again when the process that holds it dies."""
    import fcntl  # not on Windows

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sweep(
    problem: Problem, options: argparse.Namespace, count: int, lock: Path
) -> Generator[Outcome, None, None]:
    """Every candidate's outcome as they come, ``count`` at a time; to be closed if left early."""
    dtype = DTYPES[options.dtype]
    forward: dict[Layout, Outcome] = {}
    for kind in PASSES:
        trials = []
        beside = [stock(kind)] + [flash(kind)] * flash_runs(problem, options)
        for candidate in beside + candidates(kind, problem, options.space, options.limit):
            trial = Trial(candidate, problem, dtype, options.seconds, lock)
            if kind == "training" and candidate.swept:
                if candidate.layout not in forward:
                    words = f"no forward options run with {layout_words(candidate.layout)}"
                    yield Outcome(candidate, "failed", words)
                    continue
                trial = replace(trial, forward=forward[candidate.layout].candidate.options)
            trials.append(trial)
        found = []
        with Bar(len(trials)) as bar:
            bar.show(f"{problem.name}: {kind}")
            for trial, result in in_processes(attempt, trials, count):
                lost = isinstance(result, str)
                outcome = Outcome(trial.candidate, "failed", result) if lost else result
                bar.show(f"{problem.name}: {kind}: {outcome.candidate.words}")
                bar.advance()
                found.append(outcome)
                yield outcome
        if kind == "forward":
            forward = {o.candidate.layout: o for o in reversed(ranked(found, kind))}


def flash_runs(problem: Problem, options: argparse.Namespace) -> bool:
    """Whether FlashAttention 4's kernel is here and takes the problem."""
    if options.dtype == "fp32" or problem.d % 8:
        return False
    return PEERS["FlashAttention 4"].missing() is None


def most_workers(problems: Sequence[Problem], options: argparse.Namespace) -> int:
    """As many processes as are asked for and the GPU's memory holds."""
    memory: int = torch.cuda.get_device_properties("cuda").total_memory
    tensors = max(p.traffic(DTYPES[options.dtype], train=True) for p in problems)
    return max(1, min(options.workers, memory // (tensors + CONTEXT_BYTES)))


def in_processes(
    work: Callable[[Any], Any], jobs: Sequence[Any], count: int, seconds: float = MOST_SECONDS
) -> Iterator[tuple[Any, Any]]:
    """Each job with its result as they come, ``count`` at a time, each in a fresh process.

    A process may die, hang or lose its GPU: then a text in place of the result says so.
    """
    threads = ThreadPoolExecutor(count)
    try:
        futures = {threads.submit(_in_a_process, work, job, seconds): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _in_a_process(work: Callable[[Any], Any], job: Any, seconds: float) -> Any:
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=_send, args=(other, work, job), daemon=True)
    process.start()
    other.close()
    try:
        return pipe.recv() if pipe.poll(seconds) else f"no result within {seconds:g} s"
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send(pipe: Connection, work: Callable[[Any], Any], job: Any) -> None:
    torch._inductor.config.compile_threads = 1  # the other processes compile as well
    pipe.send(work(job))
