"""What a call costs the host: who is asked, what is left out, and what a table says."""

import re

import pytest
import torch

from flexlocal import Window
from profiling import bench, host
from profiling.problems import Problem

SMALL = Problem("host", 1, 3, 64, 16, Window(8, causal=True, exact=True))


@pytest.fixture
def on_the_cpu(monkeypatch):
    """All but FlexAttention, by the eager path, and a result that is wrong."""
    monkeypatch.setattr(host, "HOST", SMALL)
    monkeypatch.setattr(host, "_IN_A_ROW", 1)
    every = host.ours(SMALL, torch.device("cpu"))
    made = {name: lambda backend, of=of: of("eager") for name, of in every.items()}
    times = {"auto": 1, "eager": 2}
    wrong = {"wrong": lambda backend: lambda q, k, v: times[backend] * (q + k + v)}
    monkeypatch.setattr(host, "ours", lambda problem, device: {**made, **wrong})
    monkeypatch.setitem(host.PEERS, host.BARE, host.PEERS["flexlocal eager"])


def test_what_is_right_is_timed_in_turns(on_the_cpu):
    rows = {row["call"]: row for row in host.measure(torch.device("cpu"), 0.001)}
    assert list(rows) == [
        "FlexAttention, stock", "FlashAttention 4", "local_attention", "LocalAttention",
        "with rotary embeddings", "with a key mask", "with a bias",
        "backend='flex'", "backend='flex', rotary", "backend='flex', key mask", "wrong",
    ]  # fmt: skip
    timed = {name for name, row in rows.items() if "step" in row}
    assert timed == set(rows) - {"FlashAttention 4", "wrong"}
    assert all(len(rows[name][kind]) == 7 for name in timed for kind in ("forward", "step"))
    assert "the output" in rows["wrong"]["reason"]
    assert "flash-attn-4 is not installed" in rows["FlashAttention 4"]["reason"]


def test_a_table_holds_medians_ratios_and_reasons():
    rows = [
        {"call": host.BARE, "reason": "", "forward": [0.1] * 7, "step": [0.4] * 7},
        {"call": "FlashAttention 4", "reason": "it is not installed"},
        {"call": "ours", "reason": "", "forward": [0.15] * 7, "step": [0.2, 0.6] * 3 + [0.4]},
    ]
    said = host.text(rows)
    assert re.search(r"^ours +150 1\.50x \(1\.50-1\.50\) +400 1\.00x \(0\.50-1\.50\)$", said, re.M)
    assert "FlashAttention 4: it is not installed" in said
    assert "too noisy for the step of ours" in said


def test_a_table_by_size_says_what_each_row_is_of():
    rounds = {"all pairs": [0.05] * 7, "flex": [0.1] * 7}
    of = {"size": "1 x 8 x 256 x 64", "window": "128 back", "pass": "step", "of": "host"}
    words = r"^1 x 8 x 256 x 64 +128 back +step +host +50\.0 +100 +0\.50x \(0\.50-0\.50\)$"
    said = host.text_by_size([of | {"rounds": rounds}])
    assert re.search(words, said, re.M)
    assert all(len(line) <= 80 for line in said.splitlines())


def test_without_a_gpu_there_is_nothing_to_time(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--host", "--device", "cpu"])
    assert "argument --host: must be on a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_calls_on_a_gpu(capsys):
    assert bench.main(["--host", "--seconds", "0.01"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\d", said, re.M) for name in host.ours(SMALL, "cuda"))
