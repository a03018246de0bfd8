"""The gallery shows what its code draws today."""

import os
from pathlib import Path

import pytest
from PIL import Image

from flexlocal.masks.view import gallery

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "masks" / "gallery").glob("*.png"))


def test_the_gallery_is_current(tmp_path, capsys):
    gallery.draw(tmp_path)
    fresh = sorted((tmp_path / "gallery").glob("*.png"))
    assert [x.name for x in fresh] == [x.name for x in COMMITTED] and fresh
    for mine, theirs in zip(fresh, COMMITTED, strict=True):
        with Image.open(mine) as image, Image.open(theirs) as committed:
            said, kept = image.text, committed.text
        for name in ("Title", "Description", "Digest"):
            assert said[name] == kept[name], (
                f"{theirs.name}: python -m flexlocal.masks.view.gallery"
            )


def test_the_gallery_shows_every_picture_and_keeps_them_small():
    text = (ROOT / "masks" / "README.md").read_text()
    for picture in COMMITTED:
        assert f"(gallery/{picture.name})" in text
        assert picture.stat().st_size < 40_000
    assert text.count("![") == len(COMMITTED)


def test_the_gallery_comes_back_to_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "code", lambda: ["raise KeyError"])
    before = os.getcwd()
    with pytest.raises(KeyError):
        gallery.draw(tmp_path)
    assert os.getcwd() == before
