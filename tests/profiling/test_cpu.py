"""The script that compares with others on a processor, size by size."""

import json
import re
from dataclasses import replace

import pytest
import torch

from profiling import cpu, tables
from profiling.peers import OURS, PEERS

SMALL = ["--lengths", "40", "64", "--windows", "8", "--head-sizes", "16"]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "COMPILED", replace(OURS, name="compiled"))


def test_every_size_is_timed_in_turns_and_kept(milliseconds, tmp_path, capsys):
    file = tmp_path / "run.json"
    threads = str(torch.get_num_threads())
    command = [*SMALL, "--dtypes", "fp32", "--peers", "SDPA", "--threads", threads]
    assert cpu.main([*command, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [cell["n"] for cell in record["cells"]] == [40, 64]
    # Three calls take turns: forward in 3 rounds, then training; then the next size.
    rounds = [cell["rows"]["dense SDPA"]["rounds"] for cell in record["cells"]]
    assert rounds[0] == {"forward_ms": [3, 6, 9], "train_ms": [12, 15, 18]}
    assert rounds[1] == {"forward_ms": [21, 24, 27], "train_ms": [30, 33, 36]}
    printed = capsys.readouterr().out
    # 2, 5, 8 and 3, 6, 9 over 1, 4, 7.
    assert re.search(r"^40 8 1 16 +4\.00 1\.25 ±0\.21 1\.50 ±0\.43$", printed, re.M)
    assert f"threads, torch {torch.__version__}" in printed
    tables.main([str(file)])
    assert capsys.readouterr().out == f"```text\n{cpu.text(record['cells'])}\n```\n"


def cell(n, ours, compiled, **others):
    """A size whose calls took so many milliseconds, forward."""
    times = {OURS.name: ours, cpu.COMPILED.name: compiled, **others}
    rows = {
        name: {"peer": name, "status": "measured", "reason": "", "forward_ms": ms, "train_ms": None}
        for name, ms in times.items()
    }
    return {"n": n, "window": 8, "batch": 1, "d": 16, "dtype": "fp32", "rows": rows}


def test_the_means_are_of_the_fastest_other():
    cells = [
        cell(512, 1.0, 2.0, **{"dense SDPA": 2.0, "local-attention": 4.0}),
        cell(2048, 1.0, 2.0, **{"dense SDPA": 9.0, "local-attention": 8.0}),
        cell(8192, 1.0, 4.0, **{"local-attention": 0.5}),
    ]
    printed = cpu.text(cells)
    # (2 * 8 * 0.5) ** (1/3), and over (2 * 2 * 4) ** (1/3).
    assert "mean of 3: the fastest other takes 2.00x, 0.79x of flexlocal compiled" in printed
    named = re.findall(r"^below 0\.95: (.*)$", printed, re.M)
    assert named == ["n=8192 W=8 b=1 d=16: local-attn takes 0.50x"]
    assert re.search(r"^8192 +8 1 16 +1\.00 +4\.00 +0\.50 +-$", printed, re.M)
    assert "fp32, training\n\n" in printed and printed.endswith("no other was measured")


def test_a_table_fits_80_columns():
    rounds = {"forward_ms": [1.0, 2.0, 3.0], "train_ms": [1.0, 2.0, 3.0]}
    full = cell(32768, 1000.0, 1.0, **{peer.name: 17.5 for peer in cpu.OTHERS.values()})
    full |= {"window": 512, "d": 128}
    for row in full["rows"].values():
        row["rounds"] = rounds
    lines = cpu.text([full]).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(title in line for line in lines) for title in cpu.OTHERS)


def test_a_wrong_result_is_not_timed(milliseconds, monkeypatch, capsys):
    wrong = replace(PEERS["dense SDPA"], make=lambda *_: lambda q, k, v: v)
    monkeypatch.setitem(cpu.OTHERS, "SDPA", wrong)
    command = ["--lengths", "40", "--windows", "8", "--dtypes", "fp32", "--peers", "SDPA"]
    assert cpu.main(command) == 1
    assert "dense SDPA: wrong: off: the output by" in capsys.readouterr().out
    assert len(milliseconds) == 2 * 2 * 3  # flexlocal's two calls, in two passes
