"""What the scripts' command lines refuse, before anything is measured."""

import pytest
import torch

from profiling import argument_costs, bench, compiles, scale, trace, tune

COUNT = "must be 1 or more, got 0"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        *((script, ["--window", "0"], f"--window: {COUNT}") for script in (
            argument_costs, bench, scale, trace, tune
        )),
        *((script, ["--shape", "1", "0", "64", "16"], f"--shape: {COUNT}") for script in (
            argument_costs, bench, trace, tune
        )),
        *((compiles, [flag, "0"], f"{flag}: {COUNT}") for flag in (
            "--layers", "--windows", "--lengths"
        )),
        (scale, ["--heads", "0"], f"--heads: {COUNT}"),
        *((scale, ["--least", least, "--most", most],
            f"--most must be --least ({least}) or more, up to 32, got {most}")
            for least, most in (("3", "2"), ("3", "50"))),
        (trace, ["--out", "README.md"], "--out: must be a folder, got the file README.md"),
        (trace, ["--steps", "0"], f"--steps: {COUNT}"),
        (argument_costs, ["--shape", "1", "2", "64", "15"], "dim must be even"),
        *((script, ["--causal", "--look-forward", "1"], "look_forward must be 0 or None")
            for script in (argument_costs, bench, scale, trace)),
        *((script, ["--dropout", "1"], "dropout must be at least 0 and below 1")
            for script in (scale, trace)),
        (tune, ["--json", "."], "--json: must be a file in a folder that exists"),
        (bench, ["--shape", "1", "2", "64", "15", "--rotary"], "dim must be even"),
        (bench, ["--problem", "nothing"], "invalid choice: 'nothing'"),
        (tune, ["--problem", "nothing"], "invalid choice: 'nothing'"),
        (tune, ["--stages", "2", "0"], COUNT),
        (tune, ["--blocks", "64", "96"], "--blocks: must divide 128, got 96"),
        (tune, ["--dtype", "fp32", "--ship"], "16-bit tensors, got fp32"),
        (bench, ["--peer", "nobody"], "invalid choice: 'nobody'"),
        (bench, ["--seconds", "nan"], "--seconds: must be above 0 and finite, got nan"),
        (bench, ["--seconds", "0"], "--seconds: must be above 0 and finite, got 0"),
        (bench, ["--json", "no/such/x.json"], "--json: must be a file in a folder that exists"),
        (bench, ["--plot", "no/such/x.png"], "--plot: must be a file in a folder that exists"),
        (bench, ["--device", "cuda"], "--device: torch finds no GPU, got cuda"),
    ],
)  # fmt: skip
def test_wrong_arguments(script, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        script.main(arguments)
    assert exit.value.code == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"python -m {script.__name__}: error: ")
    assert words in said
