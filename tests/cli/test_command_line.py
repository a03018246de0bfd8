"""The command line: what it prints, its exit statuses, and the parts of the demonstration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexlocal
from flexlocal.cli import demo
from flexlocal.cli.main import main
from flexlocal.cli.progress import Progress


def run(*arguments):
    command = [sys.executable, "-m", "flexlocal", *arguments]
    root = Path(__file__).parents[2]
    # One thread: on a shared machine two wait for each other longer than they work.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)


def rows(text):
    """The table's rows: name -> text."""
    lines = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {name: rest.strip() for name, rest in lines if name}


@pytest.fixture(scope="module")
def short_demo():
    return run("demo", "--steps", "3", "--no-compare", "--device", "cpu", "--window", "32")


def test_demo_reports_what_it_did(short_demo):
    assert short_demo.returncode == 0, short_demo.stderr
    said = rows(short_demo.stdout)
    assert said["device"].startswith("cpu")
    assert said["attention"].startswith("eager: ")
    assert "33 keys" in said["mask"]  # 32 before it and its own
    assert "tokens/s" in said["speed"]
    losses = [float(said[name].split()[0]) for name in ("frequencies", "before", "after")]
    assert all(0 < loss < 16 for loss in losses)
    assert losses[2] < losses[1]  # three steps help already
    assert "\nsample\n\nimport os\n" in short_demo.stdout


def test_progress_is_lines_where_there_is_no_terminal(short_demo):
    assert "\r" not in short_demo.stderr
    lines = short_demo.stderr.splitlines()
    assert [line.split()[0] for line in lines if "%" in line] == ["33%", "67%", "100%"]


def test_every_pause_says_what_it_is_for(short_demo):
    lines = [line.strip() for line in short_demo.stderr.splitlines() if "%" not in line]
    assert lines == [
        "reading Python's standard library",
        "measuring the loss before training",
        "a first step, not counted",
        "measuring the loss after training",
        "writing a sample",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """Make stderr a terminal of so many columns."""

    def of(columns):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr("flexlocal.cli.progress.os.get_terminal_size", lambda fd: size)
        return Progress(sys.stderr)

    return of


@pytest.mark.parametrize(("columns", "width"), [(40, 39), (79, 78), (80, 79), (300, 79), (0, 79)])
def test_the_bar_is_one_line_as_wide_as_the_terminal_up_to_80_columns(
    capsys, terminal, columns, width
):
    progress = terminal(columns)
    progress.show(0.5, "half")
    progress.show(1.0, "all")
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and written.endswith("\n")
    _, half, all_ = written.replace("\033[K", "").rstrip("\n").split("\r")
    assert len(half) == len(all_) == width  # one column is left free: filled, a line may wrap
    assert re.fullmatch(r"\[(#+)(\.+)\]  50%  half", half)
    assert re.fullmatch(r"\[#+\] 100%  all", all_)
    begun = half.count("#") / (half.count("#") + half.count("."))
    assert begun == pytest.approx(0.5, abs=0.05)


def test_a_narrow_terminal_cuts_the_words(capsys, terminal):
    terminal(20).show(0.5, "more words than fit into it")
    assert len(capsys.readouterr().err.strip("\r").removesuffix("\033[K")) == 19


def test_a_pause_is_taken_away_on_a_terminal(capsys, terminal):
    with terminal(80).doing("counting"):
        assert capsys.readouterr().err == "\rcounting ...\033[K"
    assert capsys.readouterr().err == "\r\033[K"


def test_the_demo_fits_80_columns_and_leaves_no_pause_behind(capsys, terminal, monkeypatch):
    for name, value in (("HELD_OUT_TOKENS", 512), ("SAMPLE", 32), ("TOKENS", 512)):
        monkeypatch.setattr(demo, name, value)
    terminal(80)
    assert main(["demo", "--steps", "2", "--device", "cpu", "--window", "32", "--no-compare"]) == 0
    shown = [part.split("\033[K") for part in capsys.readouterr().err.split("\r")[1:]]
    assert shown[0] == ["loading torch ...", ""]
    assert all(len(line) <= 79 for line, _ in shown)
    assert [line for line, _ in shown if line.endswith("...")]
    for (before, _), (after, _) in zip(shown, shown[1:], strict=False):
        assert not before.endswith("...") or after == ""


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"flexlocal {flexlocal.__version__}\n"


@pytest.mark.parametrize(("learns", "steps", "status"), [(1, 5, 0), (0, 5, 1), (0, 4, 0)])
def test_full_training_must_beat_the_byte_frequencies(monkeypatch, learns, steps, status):
    monkeypatch.setattr(demo, "STEPS", 5)
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(demo, "SAMPLE", 32)
    monkeypatch.setattr(demo, "TOKENS", 512)
    monkeypatch.setattr(demo, "frequency_loss", lambda *_: 16.0 if learns else 0.0)
    assert demo.run(steps=steps, device="cpu", window=32, compare=False) == status


def test_a_context_longer_than_the_text_is_refused():
    with pytest.raises(demo.CannotRun, match="are too few for a context of 1,000,000,000 tokens"):
        demo.run(steps=1, device="cpu", window=10**9)


def test_the_parts_of_the_text_share_no_file(tmp_path):
    for name in range(200):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("")
    training, held_out = demo.source_files(tmp_path)
    assert (training, held_out) == demo.source_files(tmp_path)
    assert len({*training, *held_out}) == len(training) + len(held_out) == 200
    assert 5 <= len(held_out) <= 40


def test_frequency_loss_of_two_equal_bytes_is_one_bit():
    training = torch.tensor([65, 66] * 500_000, dtype=torch.uint8)
    held_out = torch.tensor([[65, 66, 66, 65]])
    assert demo.frequency_loss(training, held_out) == pytest.approx(1.0, abs=1e-3)


def test_losses_are_in_bits():
    class Uniform(torch.nn.Module):
        def forward(self, bytes_bn):
            return torch.zeros(*bytes_bn.shape, 256)

    rows_bn = torch.randint(256, (3, 11))
    assert demo.losses(Uniform(), rows_bn).item() == pytest.approx(8.0)
    assert demo.held_out_loss(Uniform(), rows_bn, batch=2) == pytest.approx(8.0)


def test_doctor_reports_every_part(capsys):
    assert main(["doctor"]) == 0
    said = rows(capsys.readouterr().out)
    assert said["torch"].startswith(torch.__version__)
    assert said["eager"].startswith("yes")
    for name in ("flex on CPU", "flex on CUDA"):
        assert said[name].startswith(("yes", "no: "))
    if not torch.cuda.is_available():
        assert said["flex on CUDA"].startswith("no: ") and said["GPU"].startswith("none")
    assert {"python", "triton", "C++ compiler", "matplotlib", "tensorboard"} <= said.keys()


@pytest.mark.parametrize(
    ("device", "here", "remedy"),
    [
        ("cpu", {"compiler": None}, "apt install g++"),
        ("cuda", {"gpu": False, "build": None}, "https://pytorch.org/get-started"),
        ("cuda", {"gpu": False, "build": "13.0"}, "nvidia-smi"),
        ("cuda", {"gpu": True, "triton": None}, "pip install triton"),
    ],
)
def test_what_is_missing_comes_with_its_remedy(device, here, remedy, monkeypatch):
    from flexlocal.torch_limits import kernels

    monkeypatch.setattr(kernels.shutil, "which", lambda name: here["compiler"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["gpu"])
    monkeypatch.setattr(torch.version, "cuda", here.get("build"))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: here[name])
    assert remedy in kernels._missing.__wrapped__(device)


def test_a_reader_may_leave_early():
    command = [sys.executable, "-m", "flexlocal", "mask", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_doctor_tries_the_paths_that_should_work(capsys, monkeypatch):
    from flexlocal.cli import doctor

    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "trials", lambda: [("eager", cpu)])
    assert main(["doctor", "--run"]) == 0
    assert "works: forward and backward" in capsys.readouterr().out


def test_doctor_says_when_a_path_is_wrong(capsys, monkeypatch):
    from flexlocal import dispatch
    from flexlocal.cli import doctor

    monkeypatch.setattr(dispatch, "_PREPARED", {})
    right = dispatch.eager.attend

    def wrong(spec, inputs):
        out = right(spec, inputs)
        return out if inputs.q.dtype == torch.float64 else out + 0.1

    monkeypatch.setattr(dispatch.eager, "attend", wrong)
    monkeypatch.setattr(doctor, "trials", lambda: [("eager", torch.device("cpu"))])
    assert main(["doctor", "--run"]) == 1
    assert "FAILED: RuntimeError: its result is off by 1.0e-01" in capsys.readouterr().out


def test_doctor_fails_when_a_path_does(capsys, monkeypatch):
    from flexlocal.cli import doctor

    def broken(backend, device):
        raise RuntimeError("a reason\nand more")

    monkeypatch.setattr(doctor, "attempt", broken)
    assert main(["doctor", "--run"]) == 1
    assert "FAILED: RuntimeError: a reason\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
        (["demo", "--seconds", "nan"], "--seconds"),
        (["demo", "--window", "0"], "--window"),
        (["demo", "--backend", "magic"], "--backend"),
        (["demo", "--device", "abacus"], "--device"),
        (["demo", "--device", "cuda:99"], "--device"),
        (["demo", "--step", "3"], "--step"),  # no abbreviations
        (["doctor", "--loud"], "--loud"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(capsys, arguments, names):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    known = arguments[:1] if arguments[:1] in (["demo"], ["doctor"]) else []
    program = " ".join(["python -m flexlocal", *known])
    assert captured.err.startswith(f"{program}: error: ") and names in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for flex where it cannot train")
def test_a_backend_that_cannot_train_here_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--backend", "flex", "--steps", "3"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m flexlocal demo: error: ") and said.count("\n") == 1
