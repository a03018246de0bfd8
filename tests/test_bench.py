"""The benchmark: what it computes is right, what it says is what it found, and it can fail."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flexlocal import Window
from profiling import bench, check, conditions, measure, report
from profiling.peers import OURS, PEERS, Peer
from profiling.problems import PROBLEMS, Problem
from profiling.windowed import FlashAttention2

ROOT = Path(__file__).parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = ["--device", "cpu", "--problem", "tiny", "--seconds", "0.005"]


def run(tmp_path, *arguments):
    """The exit status, the one problem's part of the record and its rows by peer."""
    file = tmp_path / "results.json"
    status = bench.main([*arguments, "--json", str(file)])
    (entry,) = json.loads(file.read_text())["problems"]
    return status, entry, {row["peer"]: row for row in entry["rows"]}


def add_peer(monkeypatch, attend, **fields):
    """Registers a peer that attends as ``attend(q, k, v)``."""
    peer = Peer("another", "made by a test", lambda problem, device: attend, **fields)
    monkeypatch.setitem(PEERS, peer.name, peer)


def right(q, k, v):
    return OURS.make(PROBLEMS["tiny"], CPU)(q, k, v)


# What is measured and written.


def test_peers_are_checked_timed_and_written(tmp_path, capsys):
    peers = ["flexlocal", "flexlocal eager", "local-attention", "dense SDPA"]
    picture = tmp_path / "bars.png"
    status, entry, rows = run(tmp_path, *TINY, "--host", "--plot", str(picture), "--peer", *peers)
    assert status == 0
    assert list(rows) == peers
    for row in rows.values():
        assert row["status"] == "measured" and row["reason"] == ""
        assert 0 <= row["error"] < 1e-5
        for kind in ("forward", "train"):
            assert row[f"{kind}_ms"] > 0 and row[f"first_{kind}_s"] > 0
        assert row["host_us"] > 0
        assert row["forward_kernels_ms"] is row["peak_bytes"] is None  # a GPU's
    assert rows["dense SDPA"]["error"] > 0
    assert entry["shape"] == [1, 2, 256, 16]
    assert entry["window"]["size"] == 32
    for kind in ("forward", "train"):
        assert all(floor > 0 for floor in entry["floors"][kind].values())
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["dtype"] == "float32"
    assert record["settings"]["views"] is False
    assert picture.read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert report.table(entry) in printed
    assert all(f"\n{name} " in printed for name in peers)


def test_flexlocal_is_always_measured(tmp_path):
    _, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert list(rows) == ["flexlocal", "dense SDPA"]


def test_forward_only(tmp_path):
    status, _, rows = run(tmp_path, *TINY, "--forward-only", "--peer", "dense SDPA")
    assert status == 0
    for row in rows.values():
        assert row["forward_ms"] > 0
        assert row["train_ms"] is None and row["first_train_s"] is None
        assert row["reason"] == ""


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
    conditions.fused_path(PROBLEMS["tiny"], torch.float32, CPU) is not None,
    reason=str(conditions.fused_path(PROBLEMS["tiny"], torch.float32, CPU)),
)
def test_rotary_before_a_peer_and_in_our_layer(tmp_path):
    shape = ["--shape", "1", "2", "96", "8", "--window", "32", "--no-causal", "--rotary"]
    status, _, rows = run(tmp_path, *TINY, *shape, "--forward-only", "--peer", "dense SDPA")
    assert status == 0
    assert rows["dense SDPA"]["status"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problem", "nothing"], "invalid choice: 'nothing'"),
        (["--peer", "nobody"], "invalid choice: 'nobody'"),
        (["--problem", "tiny", "--window", "0"], "--window must be"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "profiling.bench", *TINY, "--peer", "dense SDPA"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\ndense SDPA " in done.stdout
    assert done.stderr == ""  # no progress where nobody watches


def test_a_terminal_sees_the_progress(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = bench.Progress(4)
    progress.done = 1
    progress.show("at work")
    assert sys.stderr.getvalue().endswith("[#####...............] 2/4 at work")
    progress.clear()
    assert sys.stderr.getvalue().endswith("\r\x1b[K")


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
    monkeypatch.setattr(measure, "OURS", wrong)
    monkeypatch.setattr(bench, "OURS", wrong)
    status, _, rows = run(tmp_path, *TINY, "--peer", "dense SDPA")
    assert status == 1
    assert rows["flexlocal"]["status"] == "wrong"
    assert rows["flexlocal"]["reason"].startswith("on a short sequence off: the output")
    assert rows["dense SDPA"]["status"] == "measured"


def test_without_a_right_reference_nothing_is_measured(tmp_path, monkeypatch):
    wrong = replace(OURS, make=lambda problem, device: lambda q, k, v: v + 0 * (q + k))
    monkeypatch.setattr(measure, "REFERENCE", wrong)
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
    refusal, half = PEERS[name].refusal, torch.bfloat16
    slide = PROBLEMS["slide256"]
    assert refusal(slide, half, GPU) is None
    assert "GPU" in refusal(slide, half, CPU)
    assert "slide" in refusal(PROBLEMS["doc256"], half, GPU)
    assert "float32" in refusal(slide, torch.float32, GPU)
    assert "20" in refusal(replace(slide, d=20), half, GPU)


def test_what_the_others_refuse():
    dense = PEERS["dense SDPA"].refusal
    assert dense(PROBLEMS["encoder64"], torch.bfloat16, GPU) is None
    assert "16384 x 16384" in dense(PROBLEMS["slide256"], torch.bfloat16, GPU)
    assert "itself" in PEERS["flexlocal flex"].refusal(PROBLEMS["tiny"], torch.bfloat16, GPU)
    for name in ("flexlocal flex", "FlexAttention, stock"):
        assert "float64" in PEERS[name].refusal(PROBLEMS["tiny"], torch.float64, CPU)
        assert "backward" in PEERS[name].inference_only(CPU)
        assert PEERS[name].inference_only(GPU) is None
    assert PEERS["local-attention"].inference_only(CPU) is None


def test_flash_attentions_operators_take_what_we_give():
    q, k, v = (
        torch.empty(1, 32, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(3)
    )
    out = FlashAttention2.apply(q, k, v, 8, 0)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in grads] == [q.shape] * 3


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


# The truth and the sizes, against the oracle.


@given(windows(), st.integers(1, 60))
def test_visible_keys(window, n):
    rule = Window(**vars(window))
    found = check.visible(rule, torch.arange(n), n)
    assert torch.equal(found, window.mask(n))


@given(windows(), st.integers(1, 60), st.booleans())
def test_the_truth(window, n, rotary):
    problem = Problem("drawn", 1, 2, n, 6, Window(**vars(window)), rotary=rotary)
    tensors = [x.detach().requires_grad_() for x in problem.tensors(torch.float64, CPU)]
    *leaves, grad = tensors
    found = check.truth(problem, tensors)
    true = oracle.attend(
        *leaves,
        window.size,
        causal=window.causal,
        look_backward=window.look_backward,
        look_forward=window.look_forward,
        exact=window.exact,
        rotary=rotary,
    )
    expected = [true, *torch.autograd.grad(true, leaves, grad)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_truth_adds_up_its_rows(monkeypatch):
    problem = PROBLEMS["tiny"]
    tensors = problem.tensors(torch.float64, CPU)
    whole = check.truth(problem, tensors)
    monkeypatch.setattr(check, "_ROWS", 100)
    for one, other in zip(check.truth(problem, tensors), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_shortened_problem_is_of_the_same_kind(name):
    problem = replace(PROBLEMS[name], n=PROBLEMS[name].n + 17)
    short = check.shortened(problem)
    assert short.window == problem.window and short.d == problem.d
    assert short.n % 128 == problem.n % 128
    assert short.n > problem.window.most_seen  # the window moves
    assert check.shortened(replace(problem, n=20)).n == 20


@given(windows(), st.integers(1, 60), st.integers(1, 3), st.integers(1, 3))
def test_pairs_and_operations(window, n, batch, heads):
    problem = Problem("drawn", batch, heads, n, 7, Window(**vars(window)))
    pairs = batch * heads * int(window.mask(n).sum())
    assert problem.pairs == pairs
    # A product takes a multiplication and an addition for each of a head's 7 numbers.
    scores_and_output = 2 * (pairs * 7 * 2)
    assert problem.flops(train=False) == scores_and_output
    # Backward: scores again, and the gradients of the weights, q, k and v.
    assert problem.flops(train=True) == scores_and_output + 5 * (pairs * 7 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype):
    problem = PROBLEMS["tiny"]
    q, k, v, grad = problem.tensors(dtype, CPU)
    out = right(q.float(), k.float(), v.float()).to(dtype)
    forward = sum(x.nbytes for x in (q, k, v, out))
    assert problem.traffic(dtype, train=False) == forward
    read_again, written = (q, k, v, out, grad), (q, k, v)
    backward = sum(x.nbytes for x in (*read_again, *written))
    assert problem.traffic(dtype, train=True) == forward + backward


def test_views_hold_the_same_layout_as_a_projection():
    for x in PROBLEMS["tiny"].tensors(torch.float32, CPU, views=True):
        assert x.shape == PROBLEMS["tiny"].shape
        assert x.transpose(1, 2).is_contiguous() and not x.is_contiguous()


# What is printed.


def row(peer, status="measured", forward=None, train=None, peak=None):
    return {
        "peer": peer,
        "status": status,
        "reason": "" if status == "measured" else "so",
        "error": 1e-3,
        "forward_ms": forward,
        "train_ms": train,
        "first_forward_s": forward,
        "first_train_s": train,
        "peak_bytes": peak,
        "host_us": None,
    }


def record():
    def entry(name, *rows):
        return {
            "name": name,
            "words": "made up",
            "shape": [1, 2, 3, 4],
            "rule": "sees itself",
            "floors": {
                kind: {"memory_ms": 0.1, "arithmetic_ms": 0.2} for kind in ("forward", "train")
            },
            "rows": list(rows),
        }

    return {
        "device": "a GPU",
        "device_type": "cuda",
        "versions": {"torch": "2.11", "triton": "3.6"},
        "settings": {"dtype": "bfloat16", "rotary": False, "views": False},
        "problems": [
            entry(
                "one",
                row("flexlocal", forward=0.5, train=2.0, peak=10**9),
                row("quick", forward=0.4, train=3.0, peak=2 * 10**9),
                row("slow", forward=5.0, train=30.0, peak=10**9),
                row("large", "out of memory"),
                row("absent", "missing"),
            ),
            entry(
                "two",
                row("flexlocal", forward=1.0, train=4.0, peak=10**9),
                row("quick", "refused"),
                row("large", forward=123.4, peak=None),
                row("absent", "missing"),
            ),
        ],
    }


def test_markdown(tmp_path, capsys):
    expected = """\
a GPU (torch 2.11, triton 3.6), bfloat16. Milliseconds of a forward pass / of a training step \
(forward and backward), in brackets how many times flexlocal's time; then the most memory that \
the step holds:

- one (made up): 1 x 2 x 3 x 4, sees itself
- two (made up): 1 x 2 x 3 x 4, sees itself

| | one | two |
|---|---|---|
| flexlocal | 0.500 (1.00x) / 2.00 (1.00x), 1.00 GB | 1.00 (1.00x) / 4.00 (1.00x), 1.00 GB |
| quick | 0.400 (0.80x) / 3.00 (1.50x), 2.00 GB | - |
| slow | 5.00 (10.0x) / 30.0 (15.0x), 1.00 GB | - |
| large | out of memory | 123 (123.4x) / - |"""
    assert report.markdown(record()) == expected
    file = tmp_path / "results.json"
    file.write_text(json.dumps(record()))
    report.main([str(file)])
    assert capsys.readouterr().out == expected + "\n"


def test_times_of_a_processor_are_no_figures_to_quote():
    table = report.markdown({**record(), "device_type": "cpu"})
    assert "| quick | 0.80x / 1.50x, 2.00 GB | - |" in table
    assert "illiseconds" not in table


def test_kernels_that_wait_for_the_host_are_told_apart():
    paced = record()
    one, two = paced["problems"]
    kernels = {"flexlocal": (0.2, 1.9), "quick": (0.4, 2.9), "slow": (4.9, None)}
    for line in one["rows"]:
        line["forward_kernels_ms"], line["train_kernels_ms"] = kernels.get(line["peer"], [None] * 2)
    table = report.markdown(paced)
    assert "flexlocal's time, and of its kernels where some take less than 90% of it; then" in table
    first = "0.400 (0.80x), kernels 0.400 (2.00x) / 3.00 (1.50x), 2.00 GB"  # training takes longer
    assert f"| quick | {first} | - |" in table
    assert "| slow | 5.00 (10.0x), kernels 4.90 (24.5x) / 30.0 (15.0x), 1.00 GB | - |" in table
    assert "| 1.00 (1.00x) / 4.00 (1.00x), 1.00 GB |" in table  # nothing is known of two's
    text = report.table(one)
    heads, ours = (re.split(r"  +", line.strip()) for line in text.splitlines()[1:3])
    assert heads[:4] == ["forward ms", "ours/it", "its kernels", "ours/it"]
    assert ours[:9] == [
        "flexlocal",
        "0.500",
        "1.00",
        "0.200",
        "1.00",
        "2.00",
        "1.00",
        "1.90",
        "1.00",
    ]
    assert "1.25 x the best peer, quick (kernels 0.50 x its kernels); 5.00 x the" in text
    assert "its kernels" not in report.table(two)


def test_the_text_compares_ours():
    text = report.table(record()["problems"][0])
    assert "flexlocal forward: 1.25 x the best peer, quick" in text
    assert "flexlocal train: 0.67 x the best peer, quick" in text
    assert "5.00 x the memory floor of 0.100 ms; 2.50 x the arithmetic floor of 0.200 ms" in text
    assert "large: out of memory: so" in text and "absent: missing: so" in text
