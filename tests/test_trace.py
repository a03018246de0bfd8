"""Traces: the layer's regions in them, memory over time, and what TensorBoard reads from them."""

import csv
import gc
import gzip
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import weakref

import pytest
import torch

from flexlocal import LocalAttention
from flexlocal.regions import labelled, region
from profiling import trace
from profiling.chrome import Trace, part_of

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
    """A model of two blocks, trained for two steps."""
    flags = ["--problem", "tiny", "--model", "--rotary", "--dropout", "0.1", "--gzip"]
    return trace.main([*flags, "--steps", str(STEPS), "--out", str(folder)])


def names(rows, **wanted):
    """Names of the rows that have these attributes."""
    return {row.name for row in rows if all(getattr(row, k) == v for k, v in wanted.items())}


def test_the_layers_steps_are_in_the_trace(traced):
    assert re.fullmatch(r".+_\d+\.\d+\.pt\.trace\.json\.gz", traced.file.name)
    assert traced.file.parent.name == "tiny-model-rotary-dropout"
    labels = [span.name for span in Trace(traced.file).regions]
    blocks = 2
    for step in ("rotary", "dropout", "attention", "attention backward"):
        assert labels.count(f"flexlocal::{step}") == blocks * STEPS


def test_own_times_are_told_by_phase_and_part(traced):
    assert {"forward", "backward", "optimizer"} <= {row.phase for row in traced.rows}
    assert "aten::bmm" in names(traced.rows, phase="forward", part="attention")
    assert "aten::bmm" in names(traced.rows, phase="backward", part="attention backward")
    assert "aten::cos" in names(traced.rows, phase="forward", part="rotary")
    assert "aten::cat" in names(traced.rows, phase="forward", part="rotary")
    assert "_TurnedBackward" in names(traced.rows, phase="backward", part="rotary backward")
    assert "_TiledBackward" in names(traced.rows, phase="backward", part="attention backward")
    assert not names(traced.rows, part="dropout backward")  # its numbers have no gradient
    assert "aten::addmm" in names(traced.rows, phase="forward", part="linear")
    assert not names(traced.rows, phase="forward", part="attention backward")


def test_own_times_add_up_to_the_steps(traced):
    """On a CPU everything happens inside a step, on its thread."""
    assert len(Trace(traced.file).steps) == STEPS
    assert sum(row.own for row in traced.rows) == pytest.approx(traced.wall, rel=1e-3)


def test_memory_ends_where_it_began(traced):
    memory = traced.memory["cpu"]
    assert memory.growth == 0
    logits = 256 * 256 * 4  # bytes; the loss holds them more than once
    assert memory.peak > 2 * logits
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


def test_memory_is_written_beside_the_trace(traced):
    table, picture = trace.write_memory(traced)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    held = [int(row["bytes"]) for row in rows if row["device"] == "cpu"]
    assert held == traced.memory["cpu"].held
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_summary_names_files_and_parts(capsys, tmp_path):
    flags = ["--shape", "1", "1", "60", "8", "--window", "20", "--no-causal", "--forward-only"]
    found = trace.main([*flags, "--problem", "tiny", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "custom: 1 x 1 x 60 x 8" in printed
    assert "look_forward=1" in printed  # what a window that is not causal has by default
    assert str(found.file) in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert re.search(r"forward +attention +aten::bmm", printed)
    assert {row.phase for row in found.rows} == {"forward", ""}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "flex"], "no backward pass on the CPU"),
        (["--window", "0"], "window_size"),
        (["--causal", "--look-forward", "1"], "look_forward"),
    ],
)
def test_what_cannot_run_is_said(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        trace.main(["--problem", "tiny", *flags, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kernel", "around", "part"),
    [
        ("triton_tem_fused_flex_attention_0", None, "attention"),
        ("triton_tem_fused_flex_attention_flex_attention_backward_2", None, "attention backward"),
        ("triton_poi_fused__to_copy_add_arange_cat_cos_mul_sin_sub_1", "attention", "rotary"),
        ("triton_poi_fused__to_copy_add_as_strided_cat_mul_neg_split_3", None, "rotary"),
        ("triton_poi_fused_add_arange_clamp_floor_divide_3", "attention", "block mask"),
        ("triton_poi_fused_add_4", "attention", "attention"),
        ("void at::native::elementwise_kernel<128, 2>", "rotary", "rotary"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", None, "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", "attention", "attention"),
        ("using_a_cosy_name", None, "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel, around, part):
    assert part_of(kernel, around) == part


def gpu_trace(tmp_path):
    """A trace as a GPU gives it: kernels on a stream, launched from two threads of the host."""
    host, stream = {"pid": 1, "tid": 1}, {"pid": 0, "tid": 7}

    def span(category, name, start, duration, where, **facts):
        return {
            "ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, **where,
            "args": facts,
        }  # fmt: skip

    engine = {"pid": 1, "tid": 2}  # the thread that runs backward passes
    memory = {"ph": "i", "name": "[memory]", **host}
    kept = {"Device Type": 1, "Device Id": 0}
    events = [
        span("user_annotation", "forward", 100, 50, host),
        span("user_annotation", "flexlocal::attention", 110, 20, host),
        span("user_annotation", "backward", 160, 50, host),
        span("user_annotation", "flexlocal::rotary", 165, 20, host),
        span("cuda_driver", "cuLaunchKernel", 115, 5, host, correlation=1),
        span("cuda_runtime", "cudaLaunchKernel", 170, 5, engine, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 175, 5, engine, correlation=4),
        span("cuda_runtime", "cudaMemcpyAsync", 300, 5, host, correlation=3),
        span("kernel", "elementwise", 150, 30, stream, correlation=1),
        span(
            "kernel", "triton_tem_fused_flex_attention_backward_0", 190, 90, stream, correlation=2
        ),
        span("kernel", "elementwise", 280, 5, stream, correlation=4),
        span("gpu_memcpy", "Memcpy DtoH", 310, 10, stream, correlation=3),
        memory | {"ts": 112, "args": {"Bytes": 512, "Total Allocated": 1512, **kept}},
        memory | {"ts": 180, "args": {"Bytes": -512, "Total Allocated": 1000, **kept}},
    ]
    file = tmp_path / "gpu.pt.trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    return Trace(file)


def test_kernels_belong_to_what_launched_them(tmp_path):
    rows = [(row.phase, row.part, row.own) for row in gpu_trace(tmp_path).own_times()]
    assert rows == [
        ("backward", "attention backward", 90),
        ("forward", "attention", 30),
        ("", "copy", 10),
        ("backward", "other", 5),  # the label around it at the time is another thread's
    ]


def test_memory_of_a_gpu_counts_from_what_it_held(tmp_path):
    memory = gpu_trace(tmp_path).memory()["cuda:0"]
    assert memory.held == [1000, 1512, 1000]
    assert memory.times == [0, 12, 80]
    assert (memory.peak, memory.growth) == (512, 0)


@pytest.mark.gpu
def test_a_trace_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "default_device", lambda: torch.device("cuda", 0))
    flags = ["--shape", "1", "2", "1024", "64", "--window", "128", "--rotary"]
    steps, tensor = 4, 1024 * 2 * 64 * 2  # bytes
    found = trace.main([*flags, "--steps", str(steps), "--out", str(tmp_path)])
    for phase, part in (("forward", "attention"), ("backward", "attention backward")):
        rows = [row for row in found.rows if (row.phase, row.part) == (phase, part)]
        assert any("flex_attention" in row.name for row in rows)
        assert all(row.calls % steps == 0 for row in rows)
    # What the first step under the profiler returned, its three gradients, may stay.
    assert found.memory["cuda:0"].growth < steps * tensor
    assert found.memory["cuda:0"].peak >= 4 * tensor  # the output and three gradients


def test_no_region_in_a_compiled_graph():
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = torch.compile(LocalAttention(4, dim=4, dropout=0.0), fullgraph=True, backend=look)
    q = torch.randn(1, 1, 8, 4)
    with labelled():
        layer(q, q, q)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("softmax" in target for target in called)
    assert not any("record_function" in target for target in called)
    layer(q, q, q)
    assert len(graphs) == 1  # whether labels are wanted is none of the graph's business


def labels_of(profiler):
    return [event.name for event in profiler.events() if event.name.startswith("flexlocal::")]


def test_regions_are_labelled_where_that_is_asked_for():
    layer = LocalAttention(4, dim=4, dropout=0.0, backend="eager")
    q, mask = torch.randn(1, 1, 8, 4), torch.ones(1, 8, dtype=torch.bool)
    with torch.profiler.profile() as without:
        layer(q, q, q, mask=mask)
    assert labels_of(without) == []
    with torch.profiler.profile() as profiler:
        with labelled(), pytest.raises(KeyError), region("outer"):
            layer(q, q, q, mask=mask)
            raise KeyError
        with region("later"):
            pass
    steps = ("outer", "key mask", "rotary", "attention")
    assert labels_of(profiler) == [f"flexlocal::{step}" for step in steps]


# TensorBoard


@pytest.fixture(scope="module")
def board(traced, folder):
    """Reads a route of the profiler plugin, in a TensorBoard that has loaded the trace."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("torch_tb_profiler", reason="torch-tb-profiler is not installed")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    log = folder / "tensorboard.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--load_fast", "false"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        address = wait(
            lambda: re.search(r"http://[\w.]+:\d+", log.read_text()), server, log
        ).group()

        def read(route, **query):
            query = urllib.parse.urlencode(query)
            url = f"{address}/data/plugin/pytorch_profiler/{route}?{query}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read()
                packed = answer.headers.get("Content-Encoding") == "gzip"
            return json.loads(gzip.decompress(content) if packed else content)

        def loaded():
            found = read("runs")
            return found["runs"] and not found["loading"]

        wait(loaded, server, log)
        yield read
    finally:
        server.terminate()
        server.wait(30)


def wait(ready, server, log, seconds=60):
    """What ``ready`` returns, once that is anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        found = ready()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not come up:\n{log.read_text()}")


@pytest.fixture(scope="module")
def query(board, traced):
    """The query that names the traced run, from what the plugin says there is."""
    (run,) = board("runs")["runs"]
    assert run == traced.file.parent.name
    (worker,) = board("workers", run=run, view="Overview")
    (span,) = board("spans", run=run, worker=worker)
    assert traced.file.name.startswith(f"{worker}.")
    return {"run": run, "worker": worker, "span": span}


def test_tensorboard_has_the_views(board, query):
    assert {"Overview", "Operator", "Trace", "Memory"} <= set(board("views", run=query["run"]))


def test_tensorboard_counts_the_steps(board, query):
    steps = board("overview", **query, view="Overview")["steps"]["rows"]
    assert [row[0] for row in steps] == [str(step) for step in range(STEPS)]


def test_tensorboard_lists_the_operators(board, query, traced):
    table = board("operation/table", **query, view="Operator", group_by="Operation")
    calls = {row["name"]: row["calls"] for row in table["data"]}
    for name in ("aten::bmm", "aten::_softmax", "_Tiled"):
        assert calls[name] == sum(row.calls for row in traced.rows if row.name == name) > 0


def test_tensorboard_draws_memory(board, query, traced):
    curve = board("memory_curve", **query, view="Memory", memory_metric="B")
    assert max(row[1] for row in curve["rows"]["CPU"]) == traced.memory["cpu"].peak


def test_tensorboard_shows_the_regions(board, query):
    events = board("trace", **query, view="Trace")["traceEvents"]
    labels = {event["name"] for event in events}
    assert {"forward", "backward", "optimizer"} <= labels
    assert {"flexlocal::rotary", "flexlocal::attention", "flexlocal::attention backward"} <= labels
