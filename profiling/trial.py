"""One candidate on the GPU, in a process of its own: compiled, checked, then timed."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlocal.fused import Settings, fused
from flexlocal.tuning import Tuning

from .candidates import Candidate, Options, Outcome
from .check import complaint, errors, results
from .clock import first_call, median_ms
from .measure import forward_of, training_of, trouble
from .peer import Attend, asking_nothing
from .peers import REFERENCE
from .problems import Problem


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


def attempt(trial: Trial) -> Outcome:
    """Compiles beside other processes; checks and times alone."""
    candidate, device = trial.candidate, trial.device
    train = candidate.kind == "training"
    try:
        # Or the kernel of another candidate would be served: all are made from one function.
        torch.compiler.reset()
        with _alone(trial.lock):  # what others time would wait for the reference
            tensors, reference = _given(trial.problem, trial.dtype, device)
        attend = attention(trial.problem, candidate.tuning(trial.forward), device)
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
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes need it


def attention(problem: Problem, tuning: Tuning, device: torch.device) -> Attend:
    """flexlocal's fused path as a call of ``tuning`` takes it, for calls of one kind."""
    settings = Settings(problem.window, problem.d**-0.5, False, 0.0, None, tuning)
    lists = settings.blocks(problem.n, torch.float32, masked=False).lists(device)

    def call(lists: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(settings, lists, q, k, v, None, None, None, None, None)

    # Only ever called with the same tensors: no guard has anything to ask until the next reset.
    compiled = torch.compile(call, fullgraph=True, options={"guard_filter_fn": _none_of})
    return asking_nothing(partial(compiled, lists))


def corners(x: Tensor) -> Tensor:
    """The first and last head of the first and last batch entry.

    Heads know nothing of each other: these stand for all, and every process can hold them.
    """
    batch, heads = x.shape[:2]
    return x[:: max(1, batch - 1), :: max(1, heads - 1)]


@lru_cache(maxsize=1)
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


def _none_of(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)
