"""One peer on one problem: checked first, then timed."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .check import complaint, errors, results, shortened, truth
from .clock import first_call, host_us, kernels_ms, median_ms, peak_bytes
from .peers import OURS, REFERENCE, Attend, Peer
from .problems import Problem

Status = Literal["measured", "missing", "refused", "wrong", "out of memory", "failed"]


@dataclass(frozen=True)
class Task:
    """A problem and how it is to be measured."""

    problem: Problem
    dtype: torch.dtype
    device: torch.device
    views: bool = False
    train: bool = True
    host: bool = False
    seconds: float = 0.3

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient."""
        return self.problem.tensors(self.dtype, self.device, views=self.views)


@dataclass(frozen=True)
class Measurement:
    """What was found of a peer; ``reason`` says why there is nothing, or nothing of training.

    Kernels take less than a call where the host takes longer to launch them. A GPU's alone.
    """

    peer: str
    status: Status
    reason: str = ""
    error: float | None = None
    forward_ms: float | None = None
    train_ms: float | None = None
    forward_kernels_ms: float | None = None
    train_kernels_ms: float | None = None
    first_forward_s: float | None = None
    first_train_s: float | None = None
    peak_bytes: int | None = None
    host_us: float | None = None

    @property
    def bad(self) -> bool:
        """Whether it is wrong, or ours and does not run."""
        ours = self.peer == OURS.name and self.status in ("out of memory", "failed")
        return self.status == "wrong" or ours


def measure_all(task: Task, peers: Sequence[Peer]) -> Iterator[Measurement]:
    """Every peer's measurement, as it is found.

    flexlocal must agree with the brute-force truth on a shortened problem, all the others with
    flexlocal's eager path in fp32 on the whole one.
    """
    reason = _off_the_truth(REFERENCE, replace(task, dtype=torch.float32))
    if reason is not None:
        reason = f"nothing to compare with: {REFERENCE.name} is {reason}"
        yield from (Measurement(peer.name, "wrong", reason) for peer in peers)
        return
    reference = _reference(task)
    for peer in peers:
        yield _measure(peer, task, reference)


def _reference(task: Task) -> list[Tensor]:
    """In the host's memory, where it adds nothing to a peer's peak."""
    tensors = [x.detach().float().requires_grad_() for x in task.tensors()]
    attend = REFERENCE.attend(task.problem, task.device)
    return [x.cpu() for x in results(attend, tensors, task.train)]


def _off_the_truth(peer: Peer, task: Task) -> str | None:
    """How the peer differs from brute force on a shortened problem."""
    short = replace(task, problem=shortened(task.problem))
    tensors = short.tensors()
    found = results(peer.attend(short.problem, task.device), tensors, task.train)
    return complaint(errors(found, truth(short.problem, tensors, task.train)), task.dtype)


def _measure(peer: Peer, task: Task, reference: Sequence[Tensor]) -> Measurement:
    reason = peer.missing()
    if reason is not None:
        return Measurement(peer.name, "missing", reason)
    reason = peer.refusal(task.problem, task.dtype, task.device)
    if reason is not None:
        return Measurement(peer.name, "refused", reason)
    try:
        if peer is OURS:
            reason = _off_the_truth(peer, task)
        if reason is not None:
            return Measurement(peer.name, "wrong", f"on a short sequence {reason}")
        # Kernels made for another length or another peer are no matter of this one, and the limit
        # on recompilation counts them all.
        torch.compiler.reset()
        return _checked_and_timed(peer, task, reference)
    except Exception as error:  # a peer may raise anything; the others go on
        return Measurement(peer.name, *trouble(error))
    finally:
        gc.collect()
        if task.device.type == "cuda":
            torch.cuda.empty_cache()


def _checked_and_timed(peer: Peer, task: Task, reference: Sequence[Tensor]) -> Measurement:
    attend, tensors, device = peer.attend(task.problem, task.device), task.tensors(), task.device
    forward, train = forward_of(attend, tensors), training_of(attend, tensors)
    first = first_call(forward, device)
    off = errors(results(attend, tensors, train=False), reference)
    first_train, untrained = None, peer.inference_only(device) if task.train else None
    trains = task.train and untrained is None
    if trains:
        try:
            first_train = first_call(train, device)
            off = errors(results(attend, tensors), reference)
        except Exception as error:
            trains, untrained = False, ": ".join(trouble(error))
    wrong = complaint(off, task.dtype)
    if wrong is not None:
        return Measurement(peer.name, "wrong", wrong, error=max(off.values()))

    found = Measurement(
        peer.name,
        "measured",
        error=max(off.values()),
        first_forward_s=first,
        forward_ms=median_ms(forward, device, task.seconds),
        forward_kernels_ms=kernels_ms(forward, device),
        host_us=host_us(forward, device) if task.host else None,
    )
    if not trains:
        return replace(found, reason="" if untrained is None else f"training: {untrained}")
    return replace(
        found,
        first_train_s=first_train,
        train_ms=median_ms(train, device, task.seconds),
        train_kernels_ms=kernels_ms(train, device),
        peak_bytes=peak_bytes(train, device, sum(x.nbytes for x in tensors)),
    )


def forward_of(attend: Attend, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call of the forward pass."""
    return torch.no_grad()(lambda: attend(*tensors[:3]))


def training_of(attend: Attend, tensors: Sequence[Tensor]) -> Callable[[], object]:
    """A call of both passes."""
    *leaves, grad = tensors
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)


def trouble(error: Exception) -> tuple[Status, str]:
    """What kind of trouble it is, and its first line."""
    words = str(error).strip().split("\n")[0]
    if is_out_of_memory(error):
        return "out of memory", words
    return "failed", f"{type(error).__name__}: {words}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, for which the CPU's allocator has no class of its own."""
    of_its_own = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_its_own or "allocate memory" in str(error)
