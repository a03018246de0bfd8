"""The command: what it prints, records and writes, its errors, and the table it makes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_candidates import BLOCKS
from test_sweep import in_place_of_processes, made_best, timed

from flexlocal import Window
from flexlocal.flex import tuning
from flexlocal.flex.tuning import TABLE
from profiling import sweep, tune
from profiling.candidates import PASSES, Outcome, Winner
from profiling.peers import PEERS
from profiling.problems import PROBLEMS
from profiling.tune import SHIPPED, merged, old_flash, read_table

ROOT = Path(__file__).parents[2]


# The command.


@pytest.fixture
def gpu(monkeypatch):
    """All that the command asks of a GPU, but for its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune.machine, "device_name", lambda device: "a GPU")

    def work_as(outcome_of, own=9.0):
        def final(one):
            """Its own options are the slowest, and FlashAttention 4 not among them."""
            slowness = {"fastest": 1.0, "to pass": 1.5, "own options": own}
            rounds = {n: [s, s * 1.1, s * 1.2] for n, s in slowness.items() if n in one.tunings}
            return {"forward": rounds, "training": rounds}

        monkeypatch.setattr(sweep, "in_processes", in_place_of_processes(outcome_of, []))
        monkeypatch.setattr(tune, "in_processes", in_place_of_processes(final, []))
        monkeypatch.setattr(tune, "most_workers", lambda problems, options: 4)

    return work_as


def test_the_fastest_is_printed_recorded_and_merged(tmp_path, gpu, capsys):
    gpu(timed)
    record, table = tmp_path / "sweep.json", tmp_path / "table.json"
    table.write_text(json.dumps(merged(None, entry(257, flash=True))))
    asked = ["--problem", "slide256", "--json", str(record), "--table", str(table)]
    assert tune.main(asked) == 0

    options, at_128 = (
        dict(made_best("forward", layout).options + made_best("training", layout).options)
        for layout in ((64, True), (128, False))
    )
    assert options != at_128
    (new,) = json.loads(table.read_text())["entries"]
    assert new["problem"] == "slide256" and new["dtype"] == "bfloat16"
    assert (new["capability"], new["head_size"], new["reach"]) == ([9, 0], 64, 257)
    assert (new["block"], new["one_list"], new["options"]) == (64, True, options)
    assert new["torch"] == torch.__version__ and new["device"] == "a GPU"
    if PEERS["FlashAttention 4"].missing() is not None:
        assert new["flash"] is True  # as it was

    (part,) = json.loads(record.read_text())["problems"]
    assert len(part["outcomes"]) >= 2 * (52 + 180) + 2
    assert (part["winner"]["block"], part["winner"]["one_list"]) == (64, True)
    assert part["winner"]["options"] == options
    assert part["winner"]["forward_ms"] == 1.0 and part["winner"]["training_ms"] == 2.0
    shown = {(o["kind"], o["block"], len(o["options"])) for o in part["outcomes"]}
    assert ("forward", 64, 4) in shown and ("training", 128, 6) in shown

    printed = capsys.readouterr().out
    assert f"fastest: blocks of 64 in one list\n{options}" in printed
    assert re.search(r"^fastest +1\.10 +0\.11x \(0\.11-0\.11\)", printed, re.M)
    assert re.search(r"^to pass +1\.65 +0\.17x \(0\.17-0\.17\)", printed, re.M)
    assert f"to pass, in blocks of 128:\nkernel_options={at_128}" in printed
    assert printed.count(" BLOCK_M=") == 10
    assert part["rounds"]["forward"]["fastest"] == [1.0, 1.1, 1.2]
    assert f"written to {table}" in printed


def test_an_entry_of_a_window_without_gaps_serves_others_with_one_list(tmp_path, gpu, capsys):
    gpu(timed)
    table = tmp_path / "table.json"
    assert tune.main(["--problem", "doc256", "--limit", "4", "--table", str(table)]) == 0
    (new,) = json.loads(table.read_text())["entries"]
    assert (new["reach"], new["one_list"]) == (512, True)


def test_a_table_is_left_alone_where_the_own_options_are_faster(tmp_path, gpu, capsys):
    gpu(timed, own=0.5)
    table = tmp_path / "table.json"
    assert tune.main(["--limit", "2", "--table", str(table)]) == 0
    assert not table.exists()
    assert "FlexAttention's own options are faster" in capsys.readouterr().out


def test_without_a_winner_nothing_is_written(tmp_path, gpu, capsys):
    gpu(lambda one: Outcome(one.candidate, "wrong", "off: the output by nan", ms=None))
    table = tmp_path / "table.json"
    assert tune.main(["--limit", "2", "--table", str(table)]) == 1
    assert not table.exists()
    printed = capsys.readouterr().out
    assert "wrong (off: the output by nan)" in printed
    assert "there is no winner" in printed


def test_the_list_says_how_many_and_which(capsys):
    assert tune.main(["--list", "--problem", "slide256", "slide1k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "candidates" in line] == [
        "forward: 104 candidates",
        "training: 360 candidates",
        "forward: 208 candidates",
        "training: 720 candidates",
    ]
    assert lines[0] == PROBLEMS["slide256"].label
    assert "  blocks of 64: BLOCK_M=32 BLOCK_N=64 num_warps=8 num_stages=3" in lines
    assert sum(line.startswith("  blocks of ") for line in lines) == 2 * (52 + 180 + 104 + 360)
    assert tune.main(["--list", "--limit", "3"]) == 0
    assert capsys.readouterr().out.count("\n  blocks of ") == 6
    part = ["--blocks", "64", "--tiles", "16", "64", "--warps", "2", "--stages", "1", "4"]
    assert tune.main(["--list", "--problem", "doc256", *part]) == 0
    listed = capsys.readouterr().out
    assert "forward: 8 candidates" in listed and "training: 18 candidates" in listed
    assert "  blocks of 64: BLOCK_M=16 BLOCK_N=64 num_warps=2 num_stages=4" in listed


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and "--list" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problem", "nothing"], "invalid choice: 'nothing'"),
        (["--limit", "0"], "must be 1 or more, got 0"),
        (["--stages", "2", "0"], "must be 1 or more, got 0"),
        (["--blocks", "64", "96"], "must divide 128, got 96"),
        (["--dtype", "fp32", "--ship"], "16-bit tensors, got fp32"),
        (["--table", "t.json", "--ship"], "not allowed with"),
        (["--table", "no/such/folder/t.json"], "must be in a folder that exists"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        tune.main(arguments)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_a_shape_of_ones_own():
    options = tune.read(["--shape", "2", "3", "1024", "80", "--window", "100", "--ship"])
    (problem,) = options.problems
    assert problem.shape == (2, 3, 1024, 80)
    assert problem.window == Window(100, causal=True, exact=True)
    assert options.table == ROOT / "flexlocal" / "flex" / "tuned.json"


def test_noise_of_the_final_is_said():
    rounds = {kind: {"fastest": [1.0, 2.0, 3.0], "own options": [2.0, 2.0, 2.0]} for kind in PASSES}
    text = tune.report([], Winner((64, False), (), 1.0, 2.0), rounds)
    assert "this machine was too noisy for the ratios of fastest" in text


@pytest.mark.parametrize(
    ("forward", "training", "faster"),
    [(0.9, 4.9, True), (1.1, 4.9, False), (0.9, 5.1, False), (None, None, False)],
)
def test_flash_must_be_faster_in_both_passes(forward, training, faster):
    rounds = {"forward": {"fastest": [1.0] * 3}, "training": {"fastest": [5.0] * 3}}
    if forward is not None:
        rounds["forward"][tune.FLASHED] = [forward] * 3
        rounds["training"][tune.FLASHED] = [training] * 3
    assert tune.faster(rounds, tune.FLASHED, tune.FASTEST) is faster


# The table that flexlocal reads.


def entry(reach=257, flash=False, capability=(9, 0), head_size=64, **more):
    numbers = {"capability": list(capability), "head_size": head_size, "reach": reach}
    options = {"fwd_BLOCK_M": 64, "bwd_num_warps": 4, "bwd_USE_TMA": True}
    where = {"device": "a GPU", "torch": "2.11.0"}
    return {
        "problem": "p",
        **numbers,
        "block": 64,
        "one_list": True,
        "flash": flash,
        **where,
        "options": options,
    } | more


def test_an_entry_is_added_replaced_and_the_others_stay():
    first, second = entry(257), entry(1025)
    table = merged(merged(None, first), second)
    assert table["entries"] == [first, second]
    assert (table["device"], table["torch"]) == ("a GPU", "2.11.0")
    better = entry(257, block=128, device="another GPU")
    again = merged(table, better)
    assert again["entries"] == [better, second]
    assert again["device"] == "a GPU"
    assert table["entries"] == [first, second]  # as it was
    for other in (entry(258), entry(capability=(10, 0)), entry(head_size=128)):
        assert merged(table, other)["entries"] == [first, second, other]


def test_a_table_is_read_by_flexlocal(tmp_path, monkeypatch):
    table = merged(read_table(SHIPPED), entry(999, flash=True, capability=(10, 3)))
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    *others, last = tuning._table()
    assert tuple(others) == TABLE
    assert (last.capability, last.head_size, last.reach, last.flash) == ((10, 3), 64, 999, True)
    assert (last.tuning.block, last.tuning.one_list) == (64, True)
    assert last.tuning.options == (("bwd_USE_TMA", True), ("bwd_num_warps", 4), ("fwd_BLOCK_M", 64))


def test_what_a_table_knew_of_flash():
    table = merged(merged(None, entry(257, flash=True)), entry(1025))
    assert old_flash(table, entry(257)) is True
    assert old_flash(table, entry(1025)) is False
    assert old_flash(table, entry(4097)) is False
    assert old_flash(None, entry(257)) is False


def test_a_missing_file_is_no_table(tmp_path):
    assert read_table(tmp_path / "none.json") is None


@pytest.mark.gpu
def test_a_short_sweep_on_a_gpu(tmp_path):
    shape = ["--shape", "1", "2", "1024", "64", "--window", "128", "--causal", "--exact"]
    few = ["--limit", "2", "--workers", "2", "--seconds", "0.01"]
    record, table = tmp_path / "sweep.json", tmp_path / "table.json"
    files = ["--json", str(record), "--table", str(table)]
    command = [sys.executable, "-m", "profiling.tune", *shape, *few, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(record.read_text())["problems"]
    outcomes = part["outcomes"]
    own = [o for o in outcomes if not o["options"]]
    assert [o["status"] for o in own] == ["measured"] * 2, own
    tried = [o for o in outcomes if o["options"] and "BACKEND" not in o["options"]]
    assert {(o["kind"], o["block"]) for o in tried} == {(k, b) for k in PASSES for b in BLOCKS}
    right = [o for o in tried if o["status"] == "measured"]
    assert len(right) >= 2 and all(o["ms"] > 0 and o["error"] < 2e-2 for o in right), tried
    assert not [o for o in tried if o["status"] == "wrong"], tried
    assert part["winner"]["block"] in BLOCKS
    if table.exists():  # FlexAttention's own options may be faster than two candidates
        (entry,) = json.loads(table.read_text())["entries"]
        assert entry["reach"] == 129 and entry["options"] == part["winner"]["options"]
    own_layout = part["winner"]["block"], part["winner"]["one_list"]
    assert "kernel_options=" in done.stdout or own_layout != (128, False)
