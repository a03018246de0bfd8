"""Traces: the layer's steps in them, times of labels and operators, memory over time."""

import gc
import json
import re
import weakref

import pytest
import torch

from profiling import trace

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The same traces with a GPU and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "default_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def traced(folder):
    """The layer, trained for two steps."""
    flags = ["--problem", "tiny", "--rotary", "--dropout", "0.1", "--gzip"]
    return trace.main([*flags, "--steps", str(STEPS), "--out", str(folder)])


def test_the_layers_steps_are_in_the_trace(traced):
    assert re.fullmatch(r".+_\d+\.\d+\.pt\.trace\.json\.gz", traced.file.name)
    assert traced.file.parent.name == "tiny-rotary-dropout"
    calls = {row.name: row.calls for row in traced.labels}
    for step in ("rotary", "dropout", "attention", "attention backward"):
        assert calls[f"flexlocal::{step}"] == STEPS
    assert calls["forward"] == calls["backward"] == STEPS


def test_labels_lie_in_each_other(traced):
    time = {row.name: row.time for row in traced.labels}
    assert time["forward"] + time["backward"] < traced.wall
    own = sum(time[f"flexlocal::{step}"] for step in ("rotary", "dropout", "attention"))
    assert 0 < own < time["forward"]
    assert time["flexlocal::attention backward"] < time["backward"]


def test_own_times_add_up_to_the_steps(traced):
    """On a CPU everything happens inside a step, on its thread."""
    assert {"aten::bmm", "aten::cos", "_TiledBackward"} <= {row.name for row in traced.rows}
    assert sum(row.time for row in traced.rows) == pytest.approx(traced.wall, rel=1e-2)
    assert traced.rows == sorted(traced.rows, key=lambda row: -row.time)


def test_memory_ends_where_it_began(traced):
    memory = traced.memory["cpu"]
    assert memory.growth == 0
    tensor = 2 * 256 * 16 * 4  # bytes; three gradients are there at the end of a step
    assert memory.peak > 3 * tensor
    assert memory.times == sorted(memory.times)


def test_what_the_warm_up_left_is_freed_before_the_trace(tmp_path):
    class Ring:
        def __init__(self):
            self.me = self

    rings, left = [], []

    def step():
        torch.zeros(8)
        if len(rings) < trace.WARM_UP:
            rings.append(weakref.ref(Ring()))
        else:
            left.extend(ring() for ring in rings)

    gc.disable()
    try:
        trace.record(step, torch.device("cpu"), tmp_path, STEPS, gzip=False)
    finally:
        gc.enable()
    assert left == [None] * trace.WARM_UP * STEPS


def test_memory_of_a_gpu_counts_from_what_it_held(tmp_path):
    host, kept = {"pid": 1, "tid": 1}, {"Device Type": 1, "Device Id": 0}
    memory = {"ph": "i", "name": "[memory]", **host}
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "forward", "ts": 100, "dur": 50, **host},
        memory | {"ts": 112, "args": {"Bytes": 512, "Total Allocated": 1512, **kept}},
        memory | {"ts": 180, "args": {"Bytes": -512, "Total Allocated": 1000, **kept}},
        memory | {"ts": 190, "args": {"Bytes": 256, "Total Allocated": 1256, **kept}},
        # In between 256 were freed where the profiler does not look.
        memory | {"ts": 195, "args": {"Bytes": 64, "Total Allocated": 1064, **kept}},
    ]
    file = tmp_path / "gpu.pt.trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    memory = trace.memory_of(file)["cuda:0"]
    assert memory.held == [1000, 1512, 1000, 1256, 1064]
    assert memory.times == [0, 12, 80, 90, 95]
    assert (memory.peak, memory.growth) == (512, 64)


def test_the_summary_names_files_and_parts(capsys, tmp_path):
    flags = ["--shape", "1", "1", "60", "8", "--window", "20", "--no-causal", "--forward-only"]
    found = trace.main([*flags, "--problem", "tiny", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "custom: 1 x 1 x 60 x 8" in printed
    assert "look_forward=1" in printed  # what a window that is not causal has by default
    assert str(found.file) in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert re.search(r"^flexlocal::attention +\d", printed, re.M)
    assert re.search(r"^aten::bmm +\d", printed, re.M)
    assert "backward" not in {row.name for row in found.labels}


def test_what_cannot_run_is_said(tmp_path):
    with pytest.raises(SystemExit, match="cannot be traced: .* no backward pass on the CPU"):
        trace.main(["--problem", "tiny", "--backend", "flex", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_trace_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "default_device", lambda: torch.device("cuda", 0))
    flags = ["--shape", "1", "2", "1024", "64", "--window", "128", "--rotary"]
    steps, tensor = 8, 1024 * 2 * 64 * 2  # bytes
    found = trace.main([*flags, "--steps", str(steps), "--out", str(tmp_path)])
    kernels = {row.name: row.calls for row in found.rows}
    for words in ("flex_attention", "flex_attention_backward"):
        assert any(words in name and calls % steps == 0 for name, calls in kernels.items())
    assert not any(name.startswith("aten::") for name in kernels)
    assert {"forward", "backward"} <= {row.name for row in found.labels}
    memory = found.memory["cuda:0"]
    assert memory.peak >= 4 * tensor  # the output and three gradients
    assert memory.peak < steps * tensor  # no step leaves anything
    assert memory.growth <= 3 * tensor  # the last one's gradients: no event after it says more
