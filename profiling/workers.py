"""Processes that each do one job at a time; one that dies, hangs or loses its GPU is replaced."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(Generic[Job, Result]):
    """``work`` in ``count`` fresh processes, started when they are first needed.

    Args:
        work: a function of a module, from a job to its result, which raises nothing.
        lost: the result of a job whose process was lost, and why.
        seconds: after which a job counts as hanging.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Job], Result],
        lost: Callable[[Job, str], Result],
        seconds: float,
    ) -> None:
        self._count, self._work, self._lost, self._seconds = count, work, lost, seconds
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def results(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """As they come."""
        threads = ThreadPoolExecutor(self._count)
        try:
            for future in as_completed([threads.submit(self._result, job) for job in jobs]):
                yield future.result()
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Ends the processes."""
        for _ in range(self._count):
            worker = self._idle.get()
            if worker is not None:
                worker.end()

    def _result(self, job: Job) -> Result:
        worker = self._idle.get() or _Worker(self._work)
        well = False
        try:
            result: Result
            result, well = worker.reply(job, self._seconds)
            return result
        except TimeoutError:
            return self._lost(job, f"no result within {self._seconds:g} s")
        except (EOFError, OSError):
            return self._lost(job, f"its process ended with status {worker.end()}")
        finally:
            if not well:
                worker.end()
            self._idle.put(worker if well else None)


class _Worker:
    def __init__(self, work: Callable[[Any], object]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, work), daemon=True)
        self._process.start()
        other.close()

    def reply(self, job: object, seconds: float) -> Any:
        """The result, and whether the process can go on."""
        self._pipe.send(job)
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv()

    def end(self) -> int | None:
        """The process's exit status; it is killed where it does not end by itself."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _serve(pipe: Connection, work: Callable[[Any], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who starts the processes ends them
    with suppress(EOFError, OSError):  # nobody asks any more
        while True:
            pipe.send((work(pipe.recv()), _gpu_is_well()))


def _gpu_is_well() -> bool:
    """False after an illegal access to memory, from which a process does not recover."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True
