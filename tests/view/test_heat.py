"""Pictures of weights and biases: their pixels read back to the numbers."""

import pytest
import torch
from pictures import at, drawn

from flexlocal import LocalAttention
from flexlocal.masks import Window, bias_map, heat_map, inspect


def test_a_heat_map_is_its_weights():
    layer = LocalAttention(4, causal=True, dropout=0.0)
    q, k = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3)).unbind()
    windowed, dense = layer.attention_map(q, k), layer.attention_map(q, k, dense=True)
    image = drawn(lambda file: heat_map(windowed, layer.window, file))
    again = drawn(lambda file: heat_map(dense, layer.window, file, dense=True))
    assert image.text["Digest"] == again.text["Digest"]

    import matplotlib

    colors = at(image, 12, 12, y=0.4, x=0.4)
    visible = inspect(layer.window, 12).dense()
    scale = dense / dense.max()
    for i in range(12):
        for j in range(12):
            red, green, blue = colors[i][j]
            if visible[i, j]:
                expected = matplotlib.colormaps["viridis"](float(scale[i, j]))[:3]
                apart = max(
                    abs(a - 255 * b) for a, b in zip((red, green, blue), expected, strict=True)
                )
                assert apart < 12, (i, j)
            else:
                assert red == green == blue  # grey


def test_a_bias_is_drawn_over_its_window():
    window = Window(3, causal=True)
    bias = torch.full((3, 6), -2.0)
    bias[1, 4], bias[2, 4] = 1.0, 0.0
    bias[0, 2] = -torch.inf
    colors = at(drawn(lambda file: bias_map(bias, window, file)), 3, 6)
    import matplotlib

    for place in range(3):
        for key in range(6):
            if key > place + 3 or bias[place, key].isinf():  # hidden by the window or the bias
                assert len(set(colors[place][key])) == 1  # grey
                continue
            # white stands for 0, whatever the values
            expected = matplotlib.colormaps["PuOr"](float(bias[place, key]) / 4 + 0.5)[:3]
            for a, b in zip(colors[place][key], expected, strict=True):
                assert abs(a - 255 * b) < 12, (place, key)


def test_long_heat_maps_keep_the_windowed_layout():
    window = Window(8, causal=True)
    weights = torch.rand(2000, 16)
    image = drawn(lambda file: heat_map(weights, window, file))
    assert "by place in the query's windows, means of 4 queries" in image.text["Description"]


@pytest.mark.parametrize(
    ("draw", "shape", "words"),
    [
        (heat_map, (2, 8, 12), ["weights", "(n, 12)", "(2, 8, 12)"]),
        (heat_map, (8, 11), ["weights", "(n, 12)", "(8, 11)"]),
        (bias_map, (2, 4, 12), ["bias", "(4, 12)", "(2, 4, 12)"]),
        (bias_map, (8, 12), ["bias", "(4, 12)", "(8, 12)"]),
    ],
)
def test_errors(draw, shape, words, tmp_path):
    with pytest.raises(ValueError) as raised:
        draw(torch.zeros(shape), Window(4), tmp_path / "x.png")
    for word in words:
        assert word in str(raised.value)
