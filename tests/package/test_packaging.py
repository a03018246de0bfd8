"""The folders, the package and the imports keep their contracts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flexlocal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders():
    """The folders that hold modules, as packages."""
    tops = {"flexlocal": ROOT / "flexlocal", "flexlocal.masks": ROOT / "masks"}
    found = set()
    for package, top in tops.items():
        for module in top.rglob("*.py"):
            if (top / "masks") not in module.parents:  # the link: it is masks/ itself
                found.add(".".join([package, *module.parent.relative_to(top).parts]))
    return found


def test_every_folder_is_packaged():
    assert folders() == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_is_a_package():
    for package in folders():
        path = package.replace("flexlocal.masks", "masks").replace(".", "/")
        assert (ROOT / path / "__init__.py").is_file()


@pytest.mark.skipif(os.name == "nt", reason="a checkout without links holds a file there")
def test_masks_is_reached_through_a_relative_link():
    link = ROOT / "flexlocal" / "masks"
    assert link.is_symlink() and os.readlink(link) == "../masks"


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


OPTIONAL = ("matplotlib", "tensorboard", "torch_tb_profiler", "flash_attn")
LAYER = {f"flexlocal.{room}" for room in ("layer", "functional", "rotary", "flex", "eager")}
TOOLS = {f"flexlocal.{tool}" for tool in ("__main__", "demo", "doctor", "mask_command")}


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
    statement = "import matplotlib, tensorboard, torch_tb_profiler, flash_attn, flexlocal.demo"
    assert {*OPTIONAL, "flexlocal.demo", "flexlocal.layer"} <= loaded_after(statement, stubs)


PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]|\bfrom torch(\.\w+)* import .*\b_[a-z]")


def test_private_names_of_torch_stay_in_one_file():
    modules = [*(ROOT / "flexlocal").glob("*.py"), *(ROOT / "masks").rglob("*.py")]
    private = {module.name for module in modules if PRIVATE.search(module.read_text())}
    assert private <= {"flex.py"}


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


def test_imports_point_one_way():
    masks = ROOT / "masks"
    for module in masks.rglob("*.py"):
        above = r"\." * (len(module.relative_to(masks).parts) + 1)  # dots that lead out of masks/
        upward = re.compile(rf"^\s*(from {above}|from flexlocal|import flexlocal)", re.MULTILINE)
        assert not upward.search(module.read_text()), module
    tools = re.compile(
        r"^\s*(from \.|from flexlocal|import flexlocal).*\b(demo|doctor|mask_command)\b", re.M
    )
    for module in (ROOT / "flexlocal").glob("*.py"):
        if f"flexlocal.{module.stem}" not in TOOLS:
            assert not tools.search(module.read_text()), module
