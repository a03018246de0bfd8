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
