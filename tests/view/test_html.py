"""Pictures as HTML, read back to the mask that they show."""

import torch
from hypothesis import given, settings
from pictures import drawing, kinds_of, masks, outer_drawing, read_html, shares_of
from strategies import EXAMPLES

from flexlocal.masks import Window, inspect
from flexlocal.masks.view.symbols import SHADES, TOKENS, shade


@settings(max_examples=2 * EXAMPLES)
@given(masks())
def test_html_is_the_mask(mask):
    window, n, key_mask, seen, struck = mask
    picture = inspect(window, n, key_mask=key_mask)
    page, element = picture.html(), picture._repr_html_()
    assert element in page  # up to 64 tokens
    assert torch.equal(read_html(page, TOKENS), kinds_of(seen, struck))
    tips = [x.text for x in drawing(page, "tokens").iter("title")]
    assert tips == [picture.query(i) for i in range(n)]


def test_the_names_of_axes_have_room_beside_one_block():
    """Letters of 14 pixels are 7 wide, and stand in the middle of their axis."""
    shown = outer_drawing(inspect(Window(1), 1, block_size=1).blocks.html(), "blocks")
    wide, high = (float(shown.get(side)) for side in ("width", "height"))
    down, across = (x for x in shown.iter("text") if x.get("class") == "axis")
    assert (down.text, across.text) == ("query block", "key block")
    for middle, length, name in (
        (float(down.get("y")), high, down.text),
        (float(across.get("x")), wide, across.text),
    ):
        assert 3.5 * len(name) <= middle <= length - 3.5 * len(name)


@given(masks(longest=60))
def test_html_of_long_masks_is_shaded(mask):
    window, n, key_mask, seen, _ = mask
    picture = inspect(window, n, key_mask=key_mask)
    step = picture.step(10)
    if step > 1:
        expected = [[shade(x) for x in row] for row in shares_of(seen, step).tolist()]
        assert read_html(picture.html(cells=10), SHADES).tolist() == expected
