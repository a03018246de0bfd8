"""What was measured, as a table for a terminal and for docs/."""

import re

from profiling import report


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
    }


def record():
    def entry(name, *rows):
        return {
            "name": name,
            "words": "made up",
            "shape": [1, 2, 3, 4],
            "rule": "sees itself",
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


def test_markdown():
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
    text = report.text(one)
    assert re.search(r"^forward, kernels +ms +ratio +first s error +GB$", text, re.M)
    assert re.search(r"^quick +0\.400 +0\.80x +0\.400 1e-03 +2\.00$", text, re.M)  # of calls
    assert re.search(r"^quick +0\.400 +2\.00x +0\.400 1e-03 +2\.00$", text, re.M)  # of kernels
    assert "kernels" not in report.text(two)


def test_the_text_shows_who_is_absent():
    text = report.text(record()["problems"][0])
    assert re.search(r"^quick +3\.00 +1\.50x", text, re.M)
    assert "large: out of memory: so" in text and "absent: missing: so" in text


def test_ratios_are_of_rounds_and_noise_is_said():
    """Ours slows down together with the peer: the ratio of each round stays what it is."""
    entry = record()["problems"][0]
    ours, quick, slow = entry["rows"][:3]
    ours["rounds"] = {"forward_ms": [0.5, 5.0, 0.5]}
    quick["rounds"] = {"forward_ms": [0.4, 4.1, 0.39]}
    slow["rounds"] = {"forward_ms": [0.5, 5.0, 1.5]}
    text = report.text(entry)
    assert re.search(r"^quick +0\.400 +0\.80x \(0\.79-0\.81\)", text, re.M)
    assert "this machine was too noisy for the forward ratio of slow\n" in text
    assert "0.400 (0.80x, 0.79-0.81)" in report.markdown({**record(), "problems": [entry]})


def test_the_text_fits_a_terminal_of_80(monkeypatch):
    """With the longest names, spreads and a GPU's kernels."""
    entry = record()["problems"][0]
    for line in entry["rows"][:3]:
        line["peer"] = {"slow": "local-attention compiled"}.get(line["peer"], line["peer"])
        kinds = ["forward_ms", "forward_kernels_ms", "train_ms", "train_kernels_ms"]
        line |= dict.fromkeys(kinds, 0.123)
        line["rounds"] = {kind: [0.123, 0.124, 0.125] for kind in kinds}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = report.text(entry).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("local-attention compiled ") for line in lines) == 4
