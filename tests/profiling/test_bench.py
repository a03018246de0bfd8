"""The benchmark: what it computes is right, what it says is what it found, and it can fail."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiling import bench, check, report, timing
from profiling.peers import OURS, PEERS, Peer, fused_path
from profiling.problems import PROBLEMS, Task

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = ["--device", "cpu", "--problem", "tiny", "--seconds", "0.005"]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)


def run(tmp_path, *arguments):
    """The exit status, the one problem's part of the record and its rows by peer."""
    file = tmp_path / "results.json"
    status = bench.main([*arguments, "--json", str(file)])
    (entry,) = json.loads(file.read_text())["problems"]
    return status, entry, {row["peer"]: row for row in entry["rows"]}


def add_peer(monkeypatch, attend, **fields):
    """Registers a peer that attends as ``attend(q, k, v)``."""
    peer = Peer("another", lambda problem, device: attend, **fields)
    monkeypatch.setitem(PEERS, peer.name, peer)


def right(q, k, v):
    return OURS.make(PROBLEMS["tiny"], CPU)(q, k, v)


# What is measured and written.


def test_peers_are_checked_timed_and_written(tmp_path, capsys):
    peers = ["flexlocal", "flexlocal eager", "local-attention", "dense SDPA"]
    picture = tmp_path / "bars.png"
    status, entry, rows = run(tmp_path, *TINY, "--plot", str(picture), "--peer", *peers)
    assert status == 0
    assert list(rows) == peers
    for row in rows.values():
        assert row["status"] == "measured" and row["reason"] == ""
        assert 0 <= row["error"] < 1e-5
        for kind in ("forward", "train"):
            assert row[f"{kind}_ms"] > 0 and row[f"first_{kind}_s"] > 0
            rounds = row["rounds"][f"{kind}_ms"]
            assert len(rounds) == 3 and row[f"{kind}_ms"] == sorted(rounds)[1]
        assert row["forward_kernels_ms"] is row["peak_bytes"] is None  # a GPU's
    assert rows["dense SDPA"]["error"] > 0
    assert entry["shape"] == [1, 2, 256, 16]
    assert entry["window"]["size"] == 32
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["dtype"] == "float32"
    assert record["settings"]["views"] is False
    assert picture.read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert report.text(entry) in printed
    assert all(f"\n{name} " in printed for name in peers)


def test_flexlocal_is_always_measured(tmp_path):
    _, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert list(rows) == ["flexlocal", "dense SDPA"]


def test_views_reach_the_peers(tmp_path, monkeypatch):
    seen = set()

    def attend(q, k, v):
        seen.add(tuple(x.is_contiguous() for x in (q, k, v)))
        return right(q, k, v)

    add_peer(monkeypatch, attend)
    assert run(tmp_path, *TINY, "--peer", "another")[0] == 0
    assert seen == {(True, True, True)}
    seen.clear()
    assert run(tmp_path, *TINY, "--views", "--peer", "another")[0] == 0
    assert seen == {(False, False, False)}


def test_upstream_sees_no_padding_on_a_ragged_length_both_ways(tmp_path):
    shape = ["--shape", "2", "2", "90", "8", "--window", "32", "--no-causal"]
    status, entry, rows = run(tmp_path, *TINY, *shape, "--peer", "local-attention")
    assert status == 0
    assert entry["shape"] == [2, 2, 90, 8] and entry["window"]["causal"] is False
    assert rows["local-attention"]["status"] == "measured"


@pytest.mark.skipif(
    fused_path(PROBLEMS["tiny"], torch.float32, CPU) is not None,
    reason=str(fused_path(PROBLEMS["tiny"], torch.float32, CPU)),
)
def test_rotary_before_a_peer_and_in_our_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)  # takes seconds
    shape = ["--shape", "1", "2", "96", "8", "--window", "32", "--no-causal", "--rotary"]
    status, _, rows = run(tmp_path, *TINY, *shape, "--peer", "dense SDPA")
    assert status == 0
    assert rows["dense SDPA"]["status"] == "measured"


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "profiling.bench", *TINY, "--peer", "dense SDPA"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\ndense SDPA " in done.stdout
    assert done.stderr == ""  # no progress where nobody watches


# The check can fail.


def test_a_wrong_output_is_reported_and_not_timed(tmp_path, monkeypatch, capsys):
    add_peer(monkeypatch, lambda q, k, v: 1.01 * right(q, k, v))
    status, _, rows = run(tmp_path, *TINY, "--peer", "another")
    assert status == 1
    assert rows["another"]["status"] == "wrong"
    assert "the output by 1.0e-02" in rows["another"]["reason"]
    assert rows["another"]["forward_ms"] is None and rows["another"]["train_ms"] is None
    assert rows["flexlocal"]["status"] == "measured"
    assert "another: wrong: off: the output by 1.0e-02" in capsys.readouterr().out


def test_a_wrong_gradient_is_reported(tmp_path, monkeypatch):
    add_peer(monkeypatch, lambda q, k, v: right(q, 2 * k - k.detach(), v))
    status, _, rows = run(tmp_path, *TINY, "--peer", "another")
    assert status == 1
    reason = rows["another"]["reason"]
    assert "the gradient of k by 1.0e+00" in reason
    assert "the output" not in reason and "gradient of q" not in reason


def test_nan_is_wrong():
    nan, one = [torch.tensor([float("nan")])], [torch.ones(1)]
    assert check.complaint(check.errors(nan, one), torch.float32)
    assert check.complaint(check.errors(one, one), torch.float32) is None
    assert check.complaint(check.errors([torch.ones(2)], one), torch.float32)


def test_our_own_result_is_held_against_the_truth(tmp_path, monkeypatch):
    wrong = replace(OURS, make=lambda problem, device: lambda q, k, v: v + 0 * (q + k))
    monkeypatch.setitem(PEERS, "flexlocal", wrong)
    monkeypatch.setattr(bench, "OURS", wrong)
    status, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert status == 1
    assert rows["flexlocal"]["status"] == "wrong"
    assert rows["flexlocal"]["reason"].startswith("off: the output")
    assert rows["dense SDPA"]["status"] == "measured"


def test_without_a_right_reference_nothing_is_measured(tmp_path, monkeypatch):
    wrong = replace(OURS, make=lambda problem, device: lambda q, k, v: v + 0 * (q + k))
    monkeypatch.setattr(bench, "REFERENCE", wrong)
    status, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert status == 1
    for row in rows.values():
        assert row["status"] == "wrong" and row["forward_ms"] is None
        assert row["reason"].startswith("nothing to compare with")


def raising(error, only_training=False):
    def attend(q, k, v):
        if torch.is_grad_enabled() or not only_training:
            raise error
        return right(q, k, v)

    return attend


def test_out_of_memory_and_failures_are_reported(tmp_path, monkeypatch, capsys):
    add_peer(monkeypatch, raising(torch.OutOfMemoryError("no room\nfor it")))
    status, _, rows = run(tmp_path, *TINY, "--peer", "another")
    assert status == 0
    assert (rows["another"]["status"], rows["another"]["reason"]) == ("out of memory", "no room")
    assert "another: out of memory: no room" in capsys.readouterr().out

    add_peer(monkeypatch, raising(TypeError("not so")))
    status, _, rows = run(tmp_path, *TINY, "--peer", "another")
    assert status == 0
    assert (rows["another"]["status"], rows["another"]["reason"]) == ("failed", "TypeError: not so")


def test_without_memory_for_training_the_forward_pass_is_timed(tmp_path, monkeypatch):
    add_peer(monkeypatch, raising(torch.OutOfMemoryError("no room"), only_training=True))
    status, _, rows = run(tmp_path, *TINY, "--peer", "another")
    assert status == 0
    assert rows["another"]["forward_ms"] > 0 and rows["another"]["train_ms"] is None
    assert rows["another"]["reason"] == "training: out of memory: no room"


def test_ours_must_run(tmp_path, monkeypatch):
    broken = replace(OURS, make=lambda problem, device: raising(TypeError("not so")))
    monkeypatch.setitem(PEERS, "flexlocal", broken)
    monkeypatch.setattr(bench, "OURS", broken)
    status, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert status == 1
    assert rows["flexlocal"]["status"] == "failed"


# Who cannot take part.


def test_the_missing_and_the_refusing_are_listed(tmp_path, monkeypatch, capsys):
    add_peer(monkeypatch, right, module="no_such_module.inside", package="no-such-package")
    asked = ["another", "FlashAttention 2"]
    status, _, rows = run(tmp_path, *TINY, "--peer", *asked)
    assert status == 0
    assert rows["another"]["status"] == "missing"
    assert rows["FlashAttention 2"]["status"] == "refused"
    printed = capsys.readouterr().out
    assert "another: missing: the package no-such-package is not installed" in printed
    assert "FlashAttention 2: refused: runs on NVIDIA GPUs only" in printed


@pytest.mark.parametrize("name", ["FlashAttention 2", "cuDNN", "FlashAttention 4"])
def test_what_windowed_kernels_refuse(name):
    refusal, half = PEERS[name].obstacle, torch.bfloat16
    slide = PROBLEMS["slide256"]
    assert refusal(slide, half, GPU) is None
    assert "GPU" in refusal(slide, half, CPU)
    assert "slide" in refusal(PROBLEMS["doc256"], half, GPU)
    assert "float32" in refusal(slide, torch.float32, GPU)
    assert "20" in refusal(replace(slide, d=20), half, GPU)


def test_what_the_others_refuse():
    dense = PEERS["dense SDPA"].obstacle
    assert dense(PROBLEMS["encoder64"], torch.bfloat16, GPU) is None
    assert "16384 x 16384" in dense(PROBLEMS["slide256"], torch.bfloat16, GPU)
    for name in ("flexlocal flex", "FlexAttention, stock"):
        assert "float64" in PEERS[name].obstacle(PROBLEMS["tiny"], torch.float64, CPU)
        assert "backward" in PEERS[name].no_training_on_cpu
    assert PEERS["local-attention"].no_training_on_cpu is None


def test_flash_attention_2_gets_sequences_in_a_row_and_both_sides(monkeypatch):
    """The operator has no CPU kernel: another stands in, which says what it was given."""
    given = {}

    def varlen_attn(q, k, v, starts, *more, window_size):
        given.update(
            starts=starts.tolist(), more=more[1:], sides=window_size, lies=q.is_contiguous()
        )
        return v

    monkeypatch.setattr("profiling.peers.varlen_attn", varlen_attn)
    problem = replace(PROBLEMS["tiny"], batch=2, window=replace(PROBLEMS["encoder64"].window))
    attend = PEERS["FlashAttention 2"].make(problem, CPU)
    q, k, v, _ = Task(problem, torch.float32, CPU, views=True).tensors()
    assert torch.equal(attend(q, k, v), v)
    assert given == {"starts": [0, 256, 512], "more": (256, 256), "sides": (64, 64), "lies": True}


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [["--causal"], ["--no-causal"]], ids=["causal", "both ways"])
@pytest.mark.parametrize("layout", [[], ["--views"]], ids=["contiguous", "views"])
def test_every_peer_is_right_on_a_gpu(tmp_path, rule, layout):
    shape = ["--shape", "2", "3", "1024", "64", "--window", "128", "--exact"]
    few = ["--seconds", "0.01", "--problem", "slide256"]
    status, _, rows = run(tmp_path, *few, *shape, *rule, *layout)
    assert status == 0
    assert set(rows) == set(PEERS)
    for row in rows.values():
        assert row["status"] in ("measured", "missing", "refused"), row
        if row["status"] == "measured":
            assert row["peak_bytes"] > 0
            assert 0 < row["forward_kernels_ms"] < row["train_kernels_ms"]
    assert rows["FlashAttention 2"]["status"] == "measured"
