"""What a peer is: an implementation of local attention, and why it cannot always take part."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlocal.rotary import Rotary, rotate

from .problems import Problem

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k and v to the output, all ``(batch, heads, n, d)``."""

Make = Callable[[Problem, torch.device], Attend]

Condition = Callable[[Problem, torch.dtype, torch.device], str | None]
"""What may be in a peer's way: gives the reason, or None where nothing is."""


@dataclass(frozen=True)
class Peer:
    """An implementation.

    Attributes:
        name, words: what tables call it, and what it is.
        make: the implementation for a problem on a device.
        conditions: what may be in the way.
        module, package: what it imports, and the package that brings it; empty for torch itself.
        no_training_on_cpu: why it cannot train there, None where it can.
        ours: whether it is flexlocal; then it applies rotary embeddings itself.
    """

    name: str
    words: str
    make: Make
    conditions: tuple[Condition, ...] = ()
    module: str = ""
    package: str = ""
    no_training_on_cpu: str | None = None
    ours: bool = False

    def missing(self) -> str | None:
        """Which package it lacks here."""
        if not self.module:
            return None
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:  # of the package around the module
            found = None
        return None if found else f"the package {self.package} is not installed"

    def refusal(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot compute the problem."""
        reasons = (condition(problem, dtype, device) for condition in self.conditions)
        return next((reason for reason in reasons if reason is not None), None)

    def inference_only(self, device: torch.device) -> str | None:
        """Why it cannot train on the device."""
        return self.no_training_on_cpu if device.type == "cpu" else None

    def attend(self, problem: Problem, device: torch.device) -> Attend:
        """The implementation, after compiled rotary embeddings where it has none of its own."""
        made = self.make(problem, device)
        return _after_rotary(made, problem, device) if problem.rotary and not self.ours else made


def _after_rotary(attend: Attend, problem: Problem, device: torch.device) -> Attend:
    inv_freq = Rotary(problem.d).to(device).inv_freq
    shift = problem.window.after

    @torch.compile(fullgraph=True)
    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(q.shape[-2], device=q.device)
        q_turned = rotate(q, position + shift, inv_freq)
        return q_turned.to(q.dtype), rotate(k, position, inv_freq).to(k.dtype)

    return lambda q, k, v: attend(*rotated(q, k), v)


def asking_nothing(attend: Attend) -> Attend:
    """``attend``; under ``no_grad`` on tensors that could not want a gradient.

    Kernels of the CPU refuse those that could.
    """

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            q, k, v = q.detach(), k.detach(), v.detach()
        return attend(q, k, v)

    return call
