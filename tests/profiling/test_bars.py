"""The pictures of what was measured: what a bar's height says, and where it begins."""

import json
import math
from pathlib import Path

import pytest
from test_report import record as of_bench

from profiling import bars

RESULTS = Path(__file__).parents[2] / "profiling/results"


def rows(**times):
    return [{"implementation": x, "shape": [1, 512], "ms": ms} for x, ms in times.items()]


def of_models():
    models = [{"name": "tiny", "rows": rows(sdpa=4.0, flexlocal=3.0, broken=None)}]
    return {"device": "a GPU", "settings": {"dtype": "torch.bfloat16"}, "models": models}


def of_decoding():
    host = {"flexlocal": [0.3, 9.0, 0.2], "flexlocal, compiled": [0.1] * 3, "by hand": [0.6] * 3}
    return {"device": "a GPU", "settings": {}, "host": host}


def test_ratios_are_to_the_fastest_of_the_others():
    panels = {words: bars.ratios(panel) for words, panel in bars.panels_of(of_bench()).items()}
    forward = {"flexlocal": 1.25, "quick": 1.0, "slow": 12.5}
    assert panels["Forward pass"]["one"] == pytest.approx(forward)
    assert panels["Training step"]["one"] == pytest.approx(
        {"flexlocal": 2 / 3, "quick": 1.0, "slow": 10.0}
    )
    assert list(panels["Training step"]) == ["one"]  # two has nobody else
    models = bars.ratios(bars.panels_of(of_models())["Training step"])
    assert models == {"tiny\n1 x 512": {"sdpa": 1.0, "flexlocal": 0.75}}
    (decoding,) = bars.ratios(bars.panels_of(of_decoding())["Decoding"]).values()
    assert decoding == pytest.approx(
        {"flexlocal": 0.5, "flexlocal, compiled": 1 / 6, "by hand": 1.0}
    )


def test_kernels_are_taken_where_they_wait_for_the_host():
    record = of_bench()
    one = record["problems"][0]["rows"]
    for row in one[:3]:
        row["forward_kernels_ms"] = 0.25
        row["train_kernels_ms"] = row["train_ms"] - 0.01
    panels = bars.panels_of(record)
    assert panels["Forward pass"]["one"] == {"flexlocal": 0.25, "quick": 0.25, "slow": 0.25}
    assert panels["Forward pass"]["two"] == {"flexlocal": 1.0, "large": 123.4}
    assert panels["Training step"]["one"] == {"flexlocal": 2.0, "quick": 3.0, "slow": 30.0}


def test_bars_begin_at_zero_on_a_plain_scale_and_say_their_ratio():
    figure = bars.figure(bars.panels_of(of_bench()), "a GPU")
    for axes in figure.axes:
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        assert all(bar.get_y() == 0 for bar in axes.patches)
        assert max(bar.get_height() for bar in axes.patches) == bars.TALLEST
    forward = figure.axes[0]
    heights = {x.get_label(): [bar.get_height() for bar in x] for x in forward.containers}
    assert heights["quick"] == [1.0] and heights["flexlocal"] == pytest.approx([1.25, 1 / 123.4])
    said = {text.get_text() for text in forward.texts}
    assert {"1.25", "1.00", "12.5 ↑"} <= said
    ticks = [text.get_text() for text in forward.get_xticklabels()]
    assert ticks == ["one\n1 = 0.400 ms", "two\n1 = 123 ms"]
    assert list(heights)[0] == "flexlocal"


def test_bars_of_a_group_do_not_overlap():
    figure = bars.figure(bars.panels_of(of_bench()), "a GPU")
    for axes in figure.axes:
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(edges, edges[1:], strict=False))
        assert all(math.isfinite(x) for edge in edges for x in edge)


@pytest.mark.parametrize("record", [of_bench(), of_models(), of_decoding()])
def test_the_script_draws_what_others_wrote(record, tmp_path):
    file, picture = tmp_path / "x.json", tmp_path / "x.png"
    file.write_text(json.dumps(record))
    assert bars.main([str(file), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_compare_with_is_said(tmp_path):
    lonely = of_models()
    lonely["models"][0]["rows"] = rows(flexlocal=3.0)
    (text,) = bars.figure(bars.panels_of(lonely), "a GPU").texts
    assert text.get_text() == "nothing to compare with"


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"problems": [1]}'])
def test_other_files_are_refused(content, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        bars.main([str(file), str(tmp_path / "x.png")])
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h100", "h200_decoding"])
def test_pictures_stand_beside_what_they_are_drawn_from(name):
    assert bars.panels_of(json.loads((RESULTS / f"{name}.json").read_text()))
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")
