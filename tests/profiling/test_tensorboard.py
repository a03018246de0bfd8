"""What TensorBoard's profiler plugin reads from a trace, over the routes that its pages ask."""

import gzip
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import torch

from profiling import timing, trace

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def traced(folder):
    """The file and rows of the layer, trained for two steps."""
    flags = ["--problem", "tiny", "--rotary"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "default_device", lambda: torch.device("cpu"))
        return trace.main([*flags, "--steps", str(STEPS), "--out", str(folder)])


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
    file, _ = traced
    (run,) = board("runs")["runs"]
    assert run == file.parent.name
    (worker,) = board("workers", run=run, view="Overview")
    (span,) = board("spans", run=run, worker=worker)
    assert file.name.startswith(f"{worker}.")
    return {"run": run, "worker": worker, "span": span}


def test_it_has_the_views(board, query):
    assert {"Overview", "Operator", "Trace", "Memory"} <= set(board("views", run=query["run"]))


def test_it_counts_the_steps(board, query):
    steps = board("overview", **query, view="Overview")["steps"]["rows"]
    assert [row[0] for row in steps] == [str(step) for step in range(STEPS)]


def test_it_lists_the_operators(board, query, traced):
    table = board("operation/table", **query, view="Operator", group_by="Operation")
    calls = {row["name"]: row["calls"] for row in table["data"]}
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for name in (kernel, f"{kernel}_backward", "_Fused"):
        assert calls[name] == sum(row.count for row in traced[1] if row.key == name) > 0


def test_it_draws_memory(board, query, traced):
    curve = board("memory_curve", **query, view="Memory", memory_metric="B")
    held = timing.memory_of(traced[0])["cpu"]
    assert max(row[1] for row in curve["rows"]["CPU"]) == max(held) - held[0]


def test_it_shows_the_regions(board, query):
    events = board("trace", **query, view="Trace")["traceEvents"]
    labels = {event["name"] for event in events}
    assert {"flexlocal::rotary", "flexlocal::attention", "flexlocal::attention backward"} <= labels
