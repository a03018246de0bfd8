"""The script that compares the time of a call with an argument and without."""

import json
import re

import pytest
import torch

from profiling import argument_costs


@pytest.fixture
def milliseconds(milliseconds, monkeypatch):
    """The clock, on the CPU."""
    monkeypatch.setattr(argument_costs.machine, "default_device", lambda: torch.device("cpu"))
    return milliseconds


def test_each_call_is_compared_with_its_base_in_turns(milliseconds, tmp_path, capsys):
    file = tmp_path / "costs.json"
    command = ["--problem", "tiny", "--only", "rotary", "xpos", "shared_qk, q", "--json"]
    assert argument_costs.main([*command, str(file)]) == 0
    record = json.loads(file.read_text())
    rounds = {name: row["rounds"] for name, row in record["rows"].items()}
    # Five calls take turns: forward in 3 rounds, then training.
    assert rounds["plain"] == {"forward_ms": [1, 6, 11], "train_ms": [16, 21, 26]}
    assert rounds["xpos"] == {"forward_ms": [3, 8, 13], "train_ms": [18, 23, 28]}
    assert record["rows"]["xpos"]["forward_ms"] == 8
    assert len(milliseconds) == 2 * 3 * len(rounds)
    printed = capsys.readouterr().out
    # 2, 7, 12 over 1, 6, 11, and 3, 8, 13 over those of rotary.
    assert re.search(r"^rotary +7\.00 1\.17x \(1\.13-1\.58\) .* plain$", printed, re.M)
    assert re.search(r"^xpos +8\.00 1\.14x \(1\.11-1\.32\) .* rotary$", printed, re.M)
    assert re.search(r"^shared_qk, q is k .+ q is k$", printed, re.M)
    table = argument_costs.markdown(record).splitlines()
    assert table[0] == "| | forward ms | training step ms | compared with |"
    assert table[2].startswith("| plain | 6.00 (1.00x, 1.00-1.00) | 21.0 (1.00x, 1.00-1.00) |")
    assert table[4].startswith("| xpos | 8.00 (1.14x, 1.11-1.32) | ")
    assert len(table) == 2 + len(rounds)


def test_old_records_have_ratios_of_medians():
    rows = {
        "plain": {"forward_ms": 2.0, "train_ms": 4.0},
        "bias": {"forward_ms": 3.0, "train_ms": 5.0},
    }
    table = argument_costs.markdown({"rows": rows}).splitlines()
    assert table[3] == "| bias | 3.00 (1.50x) | 5.00 (1.25x) | plain |"


def test_noise_is_said():
    def row(*times):
        return {"forward_ms": sorted(times)[1], "rounds": {"forward_ms": list(times)}}

    rows = {"plain": row(1.0, 1.0, 1.0), "rotary": row(1.5, 1.51, 1.52)}
    assert "noisy" not in argument_costs.text(rows)
    text = argument_costs.text({**rows, "bias": row(0.5, 1.0, 2.0)})
    assert text.endswith("this machine was too noisy for these ratios: bias (forward)")


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


def test_a_wrong_result_is_not_timed(milliseconds, monkeypatch):
    right = argument_costs.local_attention

    def wrong(backend="auto", **more):
        out = right(backend=backend, **more)
        return out * 1.01 if "attn_bias" in more and backend == "auto" else out

    monkeypatch.setattr(argument_costs, "local_attention", wrong)
    with pytest.raises(SystemExit, match="not timed, bias is wrong: off: the output by 1.0e-02"):
        argument_costs.main(["--problem", "tiny"])
    assert not milliseconds


def test_the_gradient_of_a_learned_bias_is_checked(milliseconds, monkeypatch):
    right = argument_costs.local_attention

    def wrong(backend="auto", attn_bias=None, **more):
        if attn_bias is not None and backend == "auto":
            attn_bias = attn_bias.detach() + 1.01 * (attn_bias - attn_bias.detach())
        return right(backend=backend, attn_bias=attn_bias, **more)

    monkeypatch.setattr(argument_costs, "local_attention", wrong)
    with pytest.raises(SystemExit, match="learned is wrong: off: the gradient of attn_bias by 1"):
        argument_costs.main(["--problem", "tiny"])
