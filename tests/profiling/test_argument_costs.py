"""The script that compares the time of a call with an argument and without."""

import json
import re

import pytest
import torch

from profiling import argument_costs


@pytest.fixture
def milliseconds(monkeypatch):
    """A clock that takes one call for a measurement, and says 1, 2, 3 ... milliseconds."""
    calls = []

    def count(run, device):
        run()
        calls.append(run)
        return float(len(calls))

    monkeypatch.setattr(argument_costs, "median_ms", count)
    monkeypatch.setattr(argument_costs.machine, "default_device", lambda: torch.device("cpu"))
    return calls


def test_each_call_is_compared_with_its_base(milliseconds, tmp_path, capsys):
    file = tmp_path / "costs.json"
    assert argument_costs.main(["--problem", "tiny", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    times = {name: (row["forward_ms"], row["train_ms"]) for name, row in record["rows"].items()}
    assert times["plain"] == (1, 2)
    assert times["rotary"] == (3, 4)
    assert times["xpos"] == (5, 6)
    assert len(milliseconds) == 2 * len(times)
    printed = capsys.readouterr().out
    assert re.search(r"^rotary +3\.000 ms +3\.00x +4\.000 ms +2\.00x +over plain$", printed, re.M)
    assert re.search(r"^xpos +5\.000 ms +1\.67x +6\.000 ms +1\.50x +over rotary$", printed, re.M)
    assert re.search(r"^shared_qk, q is k .+ over q is k$", printed, re.M)
    table = argument_costs.markdown(record).splitlines()
    assert table[0] == "| | forward ms | training step ms | compared with |"
    assert table[2] == "| plain | 1.00 (1.00x) | 2.00 (1.00x) | plain |"
    assert table[4] == "| xpos | 5.00 (1.67x) | 6.00 (1.50x) | rotary |"
    assert len(table) == 2 + len(times)


def test_some_calls_come_with_what_they_are_compared_with(milliseconds, tmp_path):
    file = tmp_path / "costs.json"
    command = ["--problem", "tiny", "--only", "xpos", "shared_qk, q", "--json", str(file)]
    assert argument_costs.main(command) == 0
    names = list(json.loads(file.read_text())["rows"])
    assert names == ["plain", "rotary", "xpos", "q is k", "shared_qk, q is k"]


def test_calls_that_there_are_none_of_are_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        argument_costs.main(["--problem", "tiny", "--only", "bias", "masks"])
    assert exit.value.code == 2
    assert re.search("--only must begin as one of plain; .*, got 'masks'", capsys.readouterr().err)


def test_a_wrong_result_is_not_timed(milliseconds, monkeypatch, capsys):
    right = argument_costs.local_attention

    def wrong(backend="auto", **more):
        out = right(backend=backend, **more)
        return out * 1.01 if "attn_bias" in more and backend == "auto" else out

    monkeypatch.setattr(argument_costs, "local_attention", wrong)
    with pytest.raises(SystemExit, match="not timed, bias is wrong: off: the output by 1.0e-02"):
        argument_costs.main(["--problem", "tiny"])
    printed = capsys.readouterr().out
    assert "key mask, rotary" in printed and not re.search("^bias", printed, re.M)


def test_the_gradient_of_a_learned_bias_is_checked(milliseconds, monkeypatch):
    right = argument_costs.local_attention

    def wrong(backend="auto", attn_bias=None, **more):
        if attn_bias is not None and backend == "auto":
            attn_bias = attn_bias.detach() + 1.01 * (attn_bias - attn_bias.detach())
        return right(backend=backend, attn_bias=attn_bias, **more)

    monkeypatch.setattr(argument_costs, "local_attention", wrong)
    with pytest.raises(SystemExit, match="learned is wrong: off: the gradient of attn_bias by 1"):
        argument_costs.main(["--problem", "tiny"])
