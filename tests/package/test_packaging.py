"""The folders, the package and the imports keep their contracts."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flexlocal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules():
    """The package's modules by name; a checkout without links has no flexlocal/masks."""
    tops = {"flexlocal": ROOT / "flexlocal"}
    if not (ROOT / "flexlocal" / "masks").is_dir():
        tops["flexlocal.masks"] = ROOT / "masks"
    found = {}
    for package, top in tops.items():
        for folder, _, names in os.walk(top, followlinks=True):
            inside = Path(folder).relative_to(top).parts
            for name in names:
                if name.endswith(".py"):
                    module = ".".join([package, *inside, name.removesuffix(".py")])
                    found[module.removesuffix(".__init__")] = Path(folder, name)
    return found


def folders():
    """The folders that hold modules, as packages."""
    return {
        name if path.name == "__init__.py" else name.rpartition(".")[0]
        for name, path in modules().items()
    }


def test_every_folder_is_packaged():
    assert folders() == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_is_a_package():
    assert {"flexlocal", "flexlocal.masks"} <= folders() <= modules().keys()


@pytest.mark.skipif(os.name == "nt", reason="a checkout without links holds a file there")
def test_masks_is_reached_through_a_relative_link():
    if not (ROOT / ".git").exists():
        pytest.skip("an sdist has a folder there")
    link = ROOT / "flexlocal" / "masks"
    assert link.is_symlink() and os.readlink(link) == "../masks"


def test_an_editable_install_is_a_path_that_type_checkers_read():
    for installed in importlib.metadata.distributions(name="flexlocal"):  # egg-info stands here too
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and origin["url"] == ROOT.as_uri():
            break
    else:
        pytest.skip("not installed from here with -e")
    (path,) = (installed.locate_file(file) for file in installed.files if file.suffix == ".pth")
    path = path.read_text().strip()
    assert path == str(ROOT), "a hook: run pip install -e . again"


BUILD = """
from setuptools import build_meta
build_meta.build_sdist("out")
build_meta.build_wheel("out")
"""


@pytest.mark.parametrize("linked", [True, False])
def test_a_wheel_and_an_sdist_hold_the_package_and_are_built_without_a_warning(tmp_path, linked):
    copy = tmp_path / "copy"
    generated = shutil.ignore_patterns(
        ".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "out"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=generated)
    link = copy / "flexlocal" / "masks"
    if not linked and not link.is_symlink():
        pytest.skip("an sdist has a folder there")
    if not linked:  # what git makes of it where core.symlinks is false
        link.unlink()
        link.write_text("../masks")
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # it would warn of that one
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=copy,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert not re.search("warn|deprecat", done.stdout, re.IGNORECASE), done.stdout

    with zipfile.ZipFile(next((copy / "out").glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {name.replace(".", "/") for name in modules()}
    code = {name.removesuffix("/__init__.py").removesuffix(".py") for name in names}
    assert code - files == {"flexlocal/py.typed", "flexlocal/flex/tuned.json"} and files <= code

    with tarfile.open(next((copy / "out").glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = [*ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("profiling/*.py")]
    wanted += [*ROOT.glob("profiling/results/*"), *ROOT.glob("masks/**/*.png")]
    others = ("masks/README.md", "setup.py", "constraints.txt", ".ci/run")
    wanted += [ROOT / name for name in others]
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= held
    assert names <= held if linked else "masks/window.py" in held


def test_the_version_is_one():
    assert flexlocal.__version__ == PROJECT["project"]["version"]


def test_constraints_pin_what_the_extras_ask_for():
    def names(lines):
        found = (re.match(r"[\w.-]+", line) for line in lines)
        return {match.group().lower().replace("_", "-") for match in found if match}

    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = names([*project["dependencies"], *extras["test"], *extras["dev"]])
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert wanted <= names(constraints)
    assert all("==" in line for line in constraints if line and not line.startswith("#"))


def loaded_after(statement, stubs):
    """Modules in memory after ``statement``, in an interpreter that finds ``stubs`` first."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    path = os.pathsep.join([str(stubs), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=stubs,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.split())


OPTIONAL = ("matplotlib", "tensorboard", "torch_tb_profiler", "flash_attn", "transformers")
LAYER = {f"flexlocal.{room}" for room in ("layer", "functional", "rotary", "flex", "eager", "mods")}
TOOLS = {name for name in modules() if name.startswith(("flexlocal.cli", "flexlocal.__main__"))}


@pytest.fixture
def stubs(tmp_path):
    """Importable stand-ins, so that an import cannot go unseen where the real one is missing."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text("")
    return tmp_path


def test_the_package_loads_neither_optional_packages_nor_tools(stubs):
    loaded = loaded_after("import flexlocal; flexlocal.LocalAttention", stubs)
    assert "flexlocal.layer" in loaded
    assert not loaded & {*OPTIONAL, *TOOLS}
    assert "torch._dynamo" not in loaded  # the compiler takes seconds to import


def test_the_masks_load_no_layer(stubs):
    loaded = loaded_after("import flexlocal.masks; flexlocal.masks.Window(4)", stubs)
    assert "flexlocal.masks.window" in loaded
    assert not loaded & {*OPTIONAL, *TOOLS, *LAYER}


def test_these_tests_can_fail(stubs):
    statement = f"import {', '.join(OPTIONAL)}, flexlocal.cli.demo"
    assert {*OPTIONAL, "flexlocal.cli.demo", "flexlocal.layer"} <= loaded_after(statement, stubs)


PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]|\bfrom torch(\.\w+)* import .*\b_[a-z]")


def test_private_names_of_torch_stay_in_one_room():
    private = {name for name, path in modules().items() if PRIVATE.search(path.read_text())}
    assert {room_of(name) for name in private} == {"torch_limits"}


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("from torch._inductor import config", True),
        ("torch._dynamo.reset()", True),
        ("from torch.nn.attention._x import y", True),
        ("from torch import _dynamo", True),
        ("import torch.nn.functional as F", False),
        ("self._torch = torch.ones(1)", False),
    ],
)
def test_private_names_are_recognised(line, private):
    assert bool(PRIVATE.search(line)) is private


def imports(name, path):
    """Modules of flexlocal that a module imports, wherever it does; also what they may hold."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (one for one in found if one.split(".")[0] == "flexlocal")


FLOORS = (
    {"torch_limits"},
    {"masks", "angles"},
    {"masks.view", "rotation", "xpos", "autocast", "regions", "mods", "merge", "cache"},
    {"rotary"},
    {"spec"},
    {"shapes", "positions"},
    {"checks", "eager", "flex", "step"},  # which know nothing of each other
    {"dispatch"},
    {"decoding", "varlen"},
    {"functional", "distributed"},
    {"layer"},
    {"mha"},
    {"cli", "integrations"},
    {"__main__"},
)
"""Rooms of the package from the ground up: a room imports from those below it alone."""


def room_of(name):
    """The longest name of a room that a module's name begins with; None for the package."""
    rest = name.removeprefix("flexlocal").lstrip(".")
    fits = [room for floor in FLOORS for room in floor if f"{rest}.".startswith(f"{room}.")]
    return max(fits, key=len, default=None)


def floor_of(room):
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def upward(name, imported):
    """Whether an import leads anywhere but down, or within its own room."""
    room, other = room_of(name), room_of(imported)
    if room is None or other is None or room == other:
        return False
    return floor_of(other) >= floor_of(room)


def test_every_module_stands_on_a_floor():
    homeless = {name for name in modules() if room_of(name) is None}
    assert homeless == {"flexlocal"}


def test_imports_point_one_way():
    for name, path in modules().items():
        if name in ("flexlocal", "flexlocal.masks"):  # which name what others hold
            continue
        for imported in imports(name, path):
            assert not upward(name, imported), f"{name} imports {imported}"


def test_an_import_that_points_up_is_seen():
    assert upward("flexlocal.masks.rule", "flexlocal.mods.bias")
    assert upward("flexlocal.eager.attend", "flexlocal.flex.tuning")
    assert upward("flexlocal.flex.kernel", "flexlocal.dispatch.Choice")
    assert upward("flexlocal.masks.window", "flexlocal.masks.view.picture")
    assert not upward("flexlocal.dispatch", "flexlocal.eager.attend.attend")
    assert not upward("flexlocal.eager.attend", "flexlocal.eager.tiles.Sizes")


def circle(graph):
    """Modules that import each other in a circle, or None."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return None


def test_no_modules_import_each_other_in_a_circle():
    """Imports of types alone count as well."""
    every = modules()
    files = {name: path for name, path in every.items() if path.name != "__init__.py"}
    graph = {
        name: {
            known
            for imported in imports(name, path)
            for known in (imported, imported.rpartition(".")[0])
            if known in files and known != name
        }
        for name, path in files.items()
    }
    assert sum(map(len, graph.values())) > 100, "the imports are not seen"
    assert circle(graph) is None


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from .. import flex", ["flexlocal.flex"]),
        ("from ..cli.demo import run", ["flexlocal.cli.demo.run"]),
        ("from .window import Window", ["flexlocal.masks.window.Window"]),
        ("from . import keys", ["flexlocal.masks.keys"]),
        ("import flexlocal.cli, torch", ["flexlocal.cli"]),
        ("def f():\n    from flexlocal import flex", ["flexlocal.flex"]),
        ("from torch import nn", []),
    ],
)
def test_imports_are_recognised(line, found, tmp_path):
    path = tmp_path / "rule.py"
    path.write_text(line)
    assert list(imports("flexlocal.masks.rule", path)) == found
