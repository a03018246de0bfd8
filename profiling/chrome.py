"""Reads the Chrome trace that torch.profiler writes: own times by step, and memory over time.

Times are microseconds. An event's own time is its duration less that of the events inside it on
the same thread; a GPU kernel's is its duration.
"""

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("forward", "backward", "optimizer")
"""Labels of the phases of a training step."""

STEP = "ProfilerStep#"
"""What the labels of whole steps begin with; TensorBoard's plugin counts them by this name."""

REGION = "flexlocal::"
"""What the labels of the layer's own steps begin with."""

_HOST = ("cpu_op", "user_annotation")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

# The first that is found in the name says what an event computes. Inductor names a kernel after
# the operators that it fuses, in alphabetical order.
_RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), part)
    for pattern, part in (
        (r"flex_attention_backward", "attention backward"),
        (r"flex_attention|flex_decoding", "attention"),
        (r"(_|::)(cos|sin)(_|$)|triton.*_cat_.*_split", "rotary"),
        (r"adam|multi_tensor_apply|_foreach|optimizer", "optimizer"),
        (r"embedding", "embedding"),
        (r"layer_?norm", "norm"),
        (r"nll_loss|log_softmax|cross_entropy", "loss"),
        (r"gelu", "activation"),
        (r"gemm|cutlass|nvjet|cublas|mm$|matmul|linear|mmbackward", "linear"),
        (r"triton.*(arange|clamp|floor_divide|div_floor)", "block mask"),
        (r"CompiledFxGraph", "compiled graph"),
        (r"memcpy|memset|::copy_|::_to_copy|::clone|::zero_|::fill_", "copy"),
    )
)


@dataclass(frozen=True)
class Span:
    """Something that took time: an operator or a label on the host, or a kernel."""

    name: str
    category: str
    thread: tuple[Any, Any]
    start: float
    duration: float
    correlation: int | None
    """Shared by a kernel and the call that launched it."""
    sequence: int | None
    """Shared by a forward operator and the node of the backward pass that it made."""
    backward: bool
    """Whether it is such a node."""

    @property
    def end(self) -> float:
        return self.start + self.duration

    def holds(self, time: float) -> bool:
        """Whether ``time`` lies in it."""
        return self.start <= time <= self.end


@dataclass(frozen=True)
class Row:
    """Events of one name in one phase and one part of the layer or model."""

    name: str
    phase: str
    part: str
    calls: int
    own: float


@dataclass(frozen=True)
class Memory:
    """Bytes allocated on a device: ``held[i]`` from ``times[i]`` on; the first is the start."""

    times: list[float]
    held: list[int]

    @property
    def peak(self) -> int:
        """Most bytes above what was held at the start."""
        return max(self.held) - self.held[0]

    @property
    def growth(self) -> int:
        """Bytes held at the end above the start."""
        return self.held[-1] - self.held[0]


class Trace:
    """The events of one file, as ``torch.profiler`` exports it, gzip or not."""

    def __init__(self, path: Path) -> None:
        unzip = gzip.open if path.suffix == ".gz" else open
        with unzip(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        self.spans = [_span(event) for event in events if event.get("ph") == "X"]
        self._memory = [event for event in events if event["name"] == "[memory]"]
        labels = [span for span in self.spans if span.category == "user_annotation"]
        self.steps = [label for label in labels if label.name.startswith(STEP)]
        self.phases = [label for label in labels if label.name in PHASES]
        self.regions = [label for label in labels if label.name.startswith(REGION)]
        self._nodes = [span for span in self.spans if span.backward]
        # Operators that make no node carry the number of the next one that does: the last counts.
        in_turn = sorted(self.spans, key=lambda span: span.start)
        self._makers = {span.sequence: span for span in in_turn if not span.backward}

    @property
    def start(self) -> float:
        """When the first event on the host began."""
        return min(span.start for span in self.spans if span.category in _HOST)

    def own_times(self) -> list[Row]:
        """Kernels by own time, longest first; operators and labels where no kernel ran."""
        kernels = [span for span in self.spans if span.category in _KERNELS]
        launches = {span.correlation: span for span in self.spans if span.category in _LAUNCHES}
        timed = [
            (kernel, launches.get(kernel.correlation, kernel), kernel.duration)
            for kernel in kernels
        ]
        timed = timed or [(span, span, own) for span, own in _nested(self.spans)]
        totals: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for span, cause, own in timed:
            key = _plain(span.name), self._phase(cause), part_of(span.name, self._region(cause))
            totals[key].append(own)
        rows = [Row(*key, len(own), sum(own)) for key, own in totals.items()]
        return sorted(rows, key=lambda row: -row.own)

    def memory(self) -> dict[str, Memory]:
        """By device, ``cpu`` or ``cuda:0``; times count from the trace's start."""
        found: dict[str, Memory] = {}
        for event in sorted(self._memory, key=lambda event: event["ts"]):
            facts = event["args"]
            index = facts["Device Id"]
            device = "cpu" if facts["Device Type"] == 0 else f"cuda:{index}"
            # Not the sum of what each event says: the profiler misses what the backward pass's
            # thread frees after it is done, but the next event tells what is held since.
            held = facts["Total Allocated"]
            line = found.setdefault(device, Memory([0.0], [held - facts["Bytes"]]))
            line.times.append(event["ts"] - self.start)
            line.held.append(held)
        return found

    def _phase(self, cause: Span) -> str:
        # By time alone: the backward pass may run on a thread of its own.
        return next((phase.name for phase in self.phases if phase.holds(cause.start)), "")

    def _region(self, cause: Span) -> str | None:
        region, suffix = _innermost(self.regions, cause), ""
        node = _innermost(self._nodes, cause)
        if region is None and node is not None and node.sequence in self._makers:
            region, suffix = _innermost(self.regions, self._makers[node.sequence]), " backward"
        return None if region is None else region.name.removeprefix(REGION) + suffix


def part_of(name: str, region: str | None) -> str:
    """The part of the layer or model that an event belongs to.

    A fused kernel says so in its name; of other events the region around them knows best.
    """
    by_name = next((part for pattern, part in _RULES if pattern.search(name)), None)
    fused = name.startswith("triton_")
    return (by_name if fused or region is None else region) or region or "other"


def _span(event: dict[str, Any]) -> Span:
    facts = event.get("args", {})
    return Span(
        event["name"],
        event.get("cat", ""),
        (event["pid"], event["tid"]),
        event["ts"],
        event.get("dur", 0.0),
        facts.get("correlation"),
        facts.get("Sequence number"),
        facts.get("Fwd thread id", 0) != 0,
    )


def _nested(spans: list[Span]) -> list[tuple[Span, float]]:
    """Each event on the host with its own time."""
    host = (span for span in spans if span.category in _HOST)
    ordered = sorted(host, key=lambda span: (str(span.thread), span.start, -span.duration))
    inside = [0.0] * len(ordered)
    around: list[int] = []  # places of those that an event lies in, innermost last
    for place, span in enumerate(ordered):
        while around and not _within(span, ordered[around[-1]]):
            around.pop()
        if around:
            inside[around[-1]] += span.duration
        around.append(place)
    own = (span.duration - inner for span, inner in zip(ordered, inside, strict=True))
    return list(zip(ordered, own, strict=True))


def _innermost(spans: list[Span], event: Span) -> Span | None:
    """The shortest of those that an event began in, on the same thread."""
    around = (span for span in spans if span.thread == event.thread and span.holds(event.start))
    return min(around, key=lambda span: span.duration, default=None)


def _within(span: Span, other: Span) -> bool:
    return span.thread == other.thread and span.start < other.end


def _plain(name: str) -> str:
    """Without the number of a step or of a compiled graph."""
    return re.sub(r"^(ProfilerStep|## Call CompiledFxGraph)[# ].*", r"\1", name)
