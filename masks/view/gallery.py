"""Draws the gallery again: ``python -m flexlocal.masks.view.gallery``.

The gallery is the page ``masks/README.md``. Its blocks of Python draw the pictures that it shows;
the command runs them in order, in the page's folder.
"""

import os
import re
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""The folder of the page."""


def code() -> list[str]:
    """The README's blocks of Python."""
    text = (HOME / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def draw(folder: Path) -> None:
    """Draws every picture into ``folder / "gallery"``."""
    (folder / "gallery").mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        names: dict[str, object] = {}
        for block in code():
            exec(compile(block, "README.md", "exec"), names)
    finally:
        os.chdir(before)


if __name__ == "__main__":
    if not (HOME / "README.md").is_file():
        sys.exit(f"the gallery is drawn in a checkout: there is no {HOME / 'README.md'}")
    draw(HOME)
    print(f"drawn in {HOME / 'gallery'}: {len(list((HOME / 'gallery').glob('*.png')))} pictures")
