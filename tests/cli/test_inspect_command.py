"""``python -m flexlocal mask``: what it prints and writes, and its errors."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from flexlocal.cli import mask as mask_command
from flexlocal.cli.main import main, parser
from flexlocal.masks import PRESETS, Window, inspect

ROOT = Path(__file__).parents[2]


def said(capsys, line):
    assert main(["mask", *shlex.split(line)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_token_picture_and_its_numbers(capsys):
    picture = inspect(Window(5, causal=True), 20)
    out = said(capsys, "--window 5 --causal --len 20")
    assert out == f"{picture.text(color=False)}\n\n{picture.describe().numbers()}\n"
    assert "\033" not in out


@pytest.mark.parametrize(
    ("flags", "window", "n"),
    [
        ("--window 5", Window(5), 20),  # four windows by default
        ("--window 5 --causal --exact", Window(5, causal=True, exact=True), 20),
        ("--window 4 --look-backward 2 --look-forward 3", Window(4, False, 2, 3), 16),
        ("--window 4 --look-backward 0 --causal", Window(4, True, 0), 16),
        ("--window 4 --len 9 --autopad", Window(4), 9),
    ],
)
def test_every_argument_of_the_layer_is_a_flag(capsys, flags, window, n):
    assert said(capsys, flags).startswith(inspect(window, n).text(color=False))


def test_hidden_keys(capsys):
    keep = torch.ones(20, dtype=torch.bool)
    keep[[3, 8, 9, 10]] = False
    picture = inspect(Window(5), 20, key_mask=keep)
    assert said(capsys, "--window 5 --hide 3,8-10").startswith(picture.text(color=False))


def test_blocks(capsys):
    blocks = inspect(Window(16, causal=True), 256, block_size=64).blocks
    out = said(capsys, "--window 16 --causal --len 256 --blocks 64")
    assert out.startswith(blocks.text(color=False))
    assert "64 x 64 tokens" in out


def test_one_query(capsys):
    out = said(capsys, "--window 5 --causal --len 40 --query 37")
    assert out == inspect(Window(5, causal=True), 40).query(37) + "\n"
    assert out.startswith("query 37 sees 8 keys: 30 to 37, the query's own included\n")


def test_presets(capsys):
    out = said(capsys, "--preset gpt-oss --len 1000")
    gpt_oss = PRESETS["gpt-oss"]
    assert out.startswith(f"{gpt_oss}\n\n{inspect(gpt_oss.window, 1000).text(color=False)}")
    said(capsys, "--preset llama-4")


def test_the_answer_about_one_query_of_a_preset_stands_alone(capsys):
    out = said(capsys, "--preset gpt-oss --len 1000 --query 999")
    assert out == f"{inspect(PRESETS['gpt-oss'].window, 1000).query(999)}\n"
    assert out.startswith("query 999 sees 128 keys: 872 to 999")


def test_the_list_has_every_preset_and_source(capsys):
    out = said(capsys, "--list")
    for preset in PRESETS.values():
        assert re.search(rf"^{preset.name}: ", out, re.MULTILINE)
        assert all(source in out for source in preset.sources)


def test_files(capsys, tmp_path):
    png, html = tmp_path / "mask.png", tmp_path / "mask.html"
    out = said(capsys, f"--window 5 --causal --png {png} --html {html}")
    picture = inspect(Window(5, causal=True), 20)
    assert out.endswith(f"wrote {png}\nwrote {html}\n")
    assert html.read_text(encoding="utf-8") == picture.html()
    with Image.open(png) as image:
        assert image.text["Title"] == picture.words
    said(capsys, f"--window 5 --causal --blocks 4 --png {png}")
    with Image.open(png) as image:
        assert "not the mask" in image.text["Title"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--window"),
        ("--window 0", "--window"),
        ("--window five", "--window"),
        ("--window 5 --preset gpt-oss", "--preset"),
        ("--window 5 --len 0", "--len"),
        ("--window 5 --len 21", "argument --len: must be a multiple of --window 5"),
        ("--window 5 --causal --look-forward 1", "look_forward must be 0"),
        ("--window 5 --look-backward -1", "--look-backward"),
        ("--window 5 --blocks 0", "--blocks"),
        ("--window 5 --query 20", "argument --query: must be below --len 20, got 20"),
        ("--window 5 --query -1", "--query"),
        ("--window 5 --hide 3,x", "argument --hide: must be keys below 20, as 3,8-11, got 'x'"),
        ("--window 5 --hide 20", "--hide"),
        ("--window 5 --hide 9-3", "--hide"),
        ("--preset magic", "preset must be one of documented-default"),
        ("--preset gpt-oss --causal", "argument --preset: brings its own window"),
        ("--preset gpt-oss --look-backward 2", "argument --preset: brings its own window"),
        ("--win 5", "--win"),  # no abbreviations
        ("--window 5 --png /no/such/folder/x.png", "cannot write /no/such/folder/x.png"),
        ("--window 5 --html /no/such/folder/x.html", "cannot write /no/such/folder/x.html"),
        ("--window 5 --png mask.jpeg/", "cannot write mask.jpeg/"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        main(["mask", *flags.split()])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("python -m flexlocal mask: error: ") and words in captured.err


def test_what_is_too_large_for_memory_ends_with_one_line(capsys, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a stack")

    monkeypatch.setattr(mask_command, "inspect", refuse)
    with pytest.raises(SystemExit) as end:
        main(["mask", "--window", "5"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "too large for memory: DefaultCPUAllocator: can't allocate memory" in captured.err


@pytest.mark.usefixtures("no_matplotlib")
def test_a_missing_matplotlib_ends_with_what_to_install(capsys):
    with pytest.raises(SystemExit) as end:
        main(["mask", "--window", "5", "--png", "x.png"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert 'pip install "flexlocal[inspect]"' in captured.err


def commands():
    text = (ROOT / "masks" / "README.md").read_text()
    return re.findall(r"^\$ python -m flexlocal (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_page_run(capsys, monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert parser().parse_args(words).command == "mask"
    assert main(words) == 0
