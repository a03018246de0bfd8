"""Traces: the layer's steps in them, times of operators, memory over time."""

import gc
import json
import re
import weakref

import pytest
import torch

from profiling import timing, trace

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
    """The file and rows of the layer, trained for two steps."""
    flags = ["--problem", "tiny", "--rotary", "--dropout", "0.1"]
    return trace.main([*flags, "--steps", str(STEPS), "--out", str(folder)])


def test_the_layers_steps_are_in_the_trace(traced):
    file, rows = traced
    assert re.fullmatch(r".+_\d+\.\d+\.pt\.trace\.json", file.name)
    assert file.parent.name == "tiny-rotary-dropout"
    calls = {row.key: row.count for row in rows}
    for step in ("rotary", "dropout", "attention", "attention backward"):
        assert calls[f"flexlocal::{step}"] == STEPS


def test_own_times_add_up_to_the_steps(traced):
    """On a CPU everything happens inside a step, on its thread."""
    _, rows = traced
    assert {"aten::bmm", "aten::cos", "_TiledBackward"} <= {row.key for row in rows}
    (wall,) = (row.cpu_time_total for row in rows if row.key.startswith("ProfilerStep"))
    times = [trace.own_time(row) for row in rows]
    assert sum(times) == pytest.approx(wall, rel=1e-2)
    assert times == sorted(times, reverse=True)


def test_memory_ends_where_it_began(traced):
    held = timing.memory_of(traced[0])["cpu"]
    assert held[-1] == held[0]
    tensor = 2 * 256 * 16 * 4  # bytes; three gradients are there at the end of a step
    assert max(held) - held[0] > 3 * tensor


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
        trace.record(step, torch.device("cpu"), tmp_path, STEPS)
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
    assert timing.memory_of(file)["cuda:0"] == [1000, 1512, 1000, 1256, 1064]


def test_the_summary_names_files_and_parts(capsys, tmp_path):
    flags = ["--shape", "1", "1", "60", "8", "--window", "20", "--no-causal", "--forward-only"]
    file, _ = trace.main([*flags, "--problem", "tiny", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "custom: 1 x 1 x 60 x 8" in printed
    assert "look_forward=1" in printed  # what a window that is not causal has by default
    assert str(file) in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert re.search(r"^aten::_scaled_dot_product_flash_attention_for_cpu +\d", printed, re.M)
    assert "memory on cpu: at most 0.0" in printed
    assert "_for_cpu_backward" not in printed and "attention backward" not in printed


def test_what_cannot_run_is_said(tmp_path):
    with pytest.raises(SystemExit, match="cannot be traced: .* no backward pass on the CPU"):
        trace.main(["--problem", "tiny", "--backend", "flex", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_trace_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "default_device", lambda: torch.device("cuda", 0))
    flags = ["--shape", "1", "2", "2048", "64", "--window", "128", "--rotary"]
    steps, tensor = 8, 2048 * 2 * 64 * 2  # bytes
    file, rows = trace.main([*flags, "--steps", str(steps), "--out", str(tmp_path)])
    kernels = {row.key: row.count for row in rows}
    for words in ("flex_attention", "flex_attention_backward"):
        assert any(words in name and calls % steps == 0 for name, calls in kernels.items())
    assert not any(name.startswith("aten::") for name in kernels)
    held = timing.memory_of(file)["cuda:0"]
    # The output and three gradients, and no step leaves anything.
    assert 4 * tensor <= max(held) - held[0] < steps * tensor
    assert held[-1] - held[0] <= 3 * tensor  # the last one's gradients: no event after says more
