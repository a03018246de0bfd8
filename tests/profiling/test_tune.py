"""The command: what it prints, records and ships, and the table that flexlocal reads."""

import json
import re
from dataclasses import replace

import pytest
import torch
from test_sweep import in_place_of_processes, made_best, timed

from flexlocal import Window
from flexlocal.flex import tuning
from flexlocal.flex.tuning import TABLE
from profiling import tune
from profiling.peers import PEERS
from profiling.sweep import PASSES, Trial
from profiling.tune import FASTEST, FLASHED, OWN, SHIPPED, merged

FEW = ["--tiles", "64", "--warps", "4", "--stages", "2"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """All that the command asks of a GPU, but for its kernels; the table is a copy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune.machine, "device_name", lambda device: "a GPU")
    table = tmp_path / "table.json"
    table.write_text(SHIPPED.read_text())
    monkeypatch.setattr(tune, "SHIPPED", table)

    def work_as(result_of, own=9.0):
        def final(task, tunings):
            slowness = {FASTEST: 1.0, OWN: own, FLASHED: 2.0}
            rounds = {
                name: [s, s * 1.1, s * 1.2] for name, s in slowness.items() if name in tunings
            }
            return {"forward": rounds, "training": rounds}

        in_place_of_processes(monkeypatch, result_of)
        monkeypatch.setattr(tune, "in_the_end", final)
        return table

    return work_as


def entries(table):
    return {entry["reach"]: entry for entry in json.loads(table.read_text())["entries"]}


def test_the_fastest_is_printed_recorded_and_shipped(tmp_path, gpu, capsys):
    table, record = gpu(timed), tmp_path / "sweep.json"
    before = entries(table)
    assert tune.main(["--problem", "slide256", "--json", str(record), "--ship"]) == 0
    options = {**made_best("forward", (64, True)), **made_best("training", (64, True))}
    after = entries(table)
    new = after.pop(257)
    assert after == {reach: entry for reach, entry in before.items() if reach != 257}
    assert new["problem"] == "slide256" and new["dtype"] == "bfloat16"
    assert (new["capability"], new["head_size"], new["flash"]) == ([9, 0], 64, [])
    assert (new["block"], new["one_list"], new["options"]) == (64, True, options)
    assert new["torch"] == torch.__version__ and new["device"] == "a GPU"

    (part,) = json.loads(record.read_text())["problems"]
    assert len(part["outcomes"]) == 2 * (52 + 180)
    assert (part["winner"]["block"], part["winner"]["one_list"]) == (64, True)
    assert part["winner"]["options"] == options
    assert part["rounds"]["forward"][FASTEST] == [1.0, 1.1, 1.2]
    printed = capsys.readouterr().out
    assert f"fastest: blocks of 64 in one list\n{options}" in printed
    assert re.search(r"^fastest +1\.10 +1\.10 0\.11x \(0\.11-0\.11\)", printed, re.M)
    assert printed.count(" BLOCK_M=") == 10
    assert f"written to {table}" in printed


def test_an_entry_of_a_window_without_gaps_serves_others_with_one_list(gpu):
    table = gpu(timed)
    assert tune.main(["--problem", "doc256", *FEW, "--ship"]) == 0
    assert entries(table)[512]["one_list"] is True


def test_a_table_is_left_alone_where_the_own_options_are_faster(gpu, capsys):
    table = gpu(timed, own=0.5)
    assert tune.main([*FEW, "--ship"]) == 0
    assert table.read_text() == SHIPPED.read_text()
    assert "not faster than FlexAttention's own options" in capsys.readouterr().out


def test_without_a_winner_nothing_is_written(gpu, capsys):
    table = gpu(lambda trial: replace(trial, status="wrong", reason="off: the output by nan"))
    assert tune.main([*FEW, "--ship"]) == 1
    assert table.read_text() == SHIPPED.read_text()
    printed = capsys.readouterr().out
    assert "wrong off: the output by nan" in printed
    assert "there is no winner" in printed


@pytest.mark.parametrize("missing", [None, "it is not installed"])
def test_flash_is_timed_where_it_is_installed(gpu, monkeypatch, capsys, missing):
    monkeypatch.setattr(type(PEERS[FLASHED]), "missing", lambda peer: missing)
    gpu(timed)
    assert tune.main(FEW) == 0
    assert (f"\n{FLASHED} " in capsys.readouterr().out) is (missing is None)


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_shape_of_ones_own():
    options = tune.read(["--shape", "2", "3", "1024", "80", "--window", "100", "--ship"])
    (problem,) = options.problems
    assert problem.shape == (2, 3, 1024, 80)
    assert problem.window == Window(100, causal=True, exact=True)


def test_noise_of_the_final_is_said():
    rounds = {kind: {FASTEST: [1.0, 2.0, 3.0], OWN: [2.0, 2.0, 2.0]} for kind in PASSES}
    assert "this machine was too noisy for the ratios of fastest" in tune.report([], rounds)


@pytest.mark.parametrize(
    ("forward", "training", "sliding", "standing"),
    [
        (0.9, 4.9, ["forward", "training"], ["standing"]),
        (1.1, 4.9, ["training"], []),
        (0.9, 5.1, ["forward"], []),
        (None, None, [], []),
    ],
)
def test_flash_must_be_faster(forward, training, sliding, standing):
    rounds = {"forward": {FASTEST: [1.0] * 3}, "training": {FASTEST: [5.0] * 3}}
    if forward is not None:
        rounds["forward"][FLASHED] = [forward] * 3
        rounds["training"][FLASHED] = [training] * 3
    assert tune.for_flash(rounds, Window(64, exact=True)) == sliding
    assert tune.for_flash(rounds, Window(64)) == standing


# The table that flexlocal reads.


def entry(reach=257, flash=(), capability=(9, 0), head_size=64, **more):
    numbers = {"capability": list(capability), "head_size": head_size, "reach": reach}
    options = {"fwd_BLOCK_M": 64, "bwd_num_warps": 4, "bwd_USE_TMA": True}
    return {**numbers, "block": 64, "one_list": True, "flash": [*flash], "options": options, **more}


def test_an_entry_is_added_replaced_and_the_others_stay():
    first, second = entry(257), entry(1025)
    table = merged(merged({"torch": "2.11.0", "entries": []}, first, True), second, True)
    assert table == {"torch": "2.11.0", "entries": [first, second]}
    better = entry(257, block=128)
    assert merged(table, better, True)["entries"] == [better, second]
    assert table["entries"] == [first, second]  # as it was
    for other in (entry(258), entry(capability=(10, 0)), entry(head_size=128)):
        assert merged(table, other, True)["entries"] == [first, second, other]


def test_an_entry_says_what_holds_for_windows_of_both_kinds():
    table = {"entries": [entry(flash=["standing", "forward"])]}
    slides = merged(table, entry(flash=["training"]), slides=True)
    assert slides["entries"] == [entry(flash=["standing", "training"])]
    stands = merged(table, entry(flash=[]), slides=False)
    assert stands["entries"] == [entry(flash=["forward"])]


def test_a_table_is_read_by_flexlocal(tmp_path, monkeypatch):
    new = entry(999, flash=["forward"], capability=(10, 3))
    table = merged(json.loads(SHIPPED.read_text()), new, slides=True)
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    *others, last = tuning._table()
    assert tuple(others) == TABLE
    assert (last.capability, last.head_size, last.reach) == ((10, 3), 64, 999)
    assert last.flash == {"forward"}
    assert last.tuning == Trial("", 64, True, entry()["options"]).tuning


@pytest.mark.gpu
def test_a_short_sweep_on_a_gpu(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    table.write_text(SHIPPED.read_text())
    monkeypatch.setattr(tune, "SHIPPED", table)
    shape = ["--shape", "1", "2", "1024", "64", "--window", "128", "--causal", "--exact"]
    few, record = [*FEW, "--workers", "2", "--seconds", "0.01"], tmp_path / "sweep.json"
    assert tune.main([*shape, *few, "--json", str(record), "--ship"]) == 0
    (part,) = json.loads(record.read_text())["problems"]
    tried = part["outcomes"]
    assert {(t["kind"], t["block"]) for t in tried} == {(k, b) for k in PASSES for b in (64, 128)}
    assert not [t for t in tried if t["status"] == "wrong"], tried
    assert all(t["ms"] > 0 and t["error"] < 2e-2 for t in tried if t["status"] == "measured")
    assert {FASTEST, OWN} <= set(part["rounds"]["training"])
    if f"written to {table}" in capsys.readouterr().out:  # the own options may be faster
        assert entries(table)[129]["options"] == part["winner"]["options"]
