"""Pictures load when they are asked for, and import each other one way."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VIEW = ROOT / "masks" / "view"

STAGES = """
import sys
def said():
    tops = ("matplotlib", "PIL")
    print(*(x for x in sys.modules if x.startswith("flexlocal.masks.view") or x in tops))
import flexlocal.masks as m
from flexlocal import LocalAttention
LocalAttention(4), m.Window(4), dir(m)
said()
p = m.inspect(m.Window(4), 8)
str(p), p.html(), str(p.blocks), str(p.describe()), p.query(1)
said()
import io
p.png(io.BytesIO())
said()
"""


@pytest.fixture(scope="module")
def loaded():
    """What is loaded after three stages: the layer is made, a mask is shown, a PNG is drawn."""
    done = subprocess.run(
        [sys.executable, "-c", STAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_layer_and_the_rules_load_no_picture(loaded):
    assert loaded[0] == set()


def test_no_png_no_matplotlib(loaded):
    assert not loaded[1] & {"matplotlib", "PIL"}


def test_these_two_can_fail(loaded):
    assert {"flexlocal.masks.view", "flexlocal.masks.view.picture"} <= loaded[1]
    assert {"matplotlib", "PIL"} <= loaded[2]


def test_every_public_name_is_there():
    from flexlocal import masks

    for name in masks.__all__:
        assert name in dir(masks) and getattr(masks, name).__doc__
    with pytest.raises(AttributeError, match="'flexlocal.masks' has no attribute 'pictures'"):
        masks.pictures  # noqa: B018


def imports(source, names):
    """Those of ``names`` that a module beside them imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            found |= {*parts, *(alias.name for alias in node.names)} if node.level == 1 else set()
            found |= set(parts[parts.index("view") + 1 :]) if "view" in parts else set()
    return found & names


def circle(sources):
    """A circle of imports among modules, given as texts by name; None where there is none."""
    graph = {name: imports(source, sources.keys()) for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_pictures_import_each_other_in_no_circle():
    sources = {module.stem: module.read_text() for module in VIEW.glob("*.py")}
    assert imports(sources["picture"], sources.keys()) >= {"block_map", "drawing", "text"}
    assert circle(sources) is None


@pytest.mark.parametrize(
    "back",
    [
        "from .picture import MaskPicture",
        "from . import picture",
        "from flexlocal.masks.view.picture import MaskPicture",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .picture import MaskPicture",
        "def late():\n    from .picture import MaskPicture",
    ],
)
def test_a_circle_is_found(back):
    assert circle({"picture": "from .text import text", "text": back, "png": ""}) is not None
    assert circle({"picture": "from .text import text", "text": "from ..rule import Rule"}) is None
