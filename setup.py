"""Where the packages lie; all else about the package stands in pyproject.toml.

masks/ lies at the top of the repository and is imported as flexlocal.masks, which the link
flexlocal/masks points to. With the link every package is a folder under this one, so that an
editable install is this folder's name in a .pth file, which type checkers read as well. With a
mapping in its place setuptools installs a hook, which they do not. Checkouts without links
(git's core.symlinks=false) need the mapping.
"""

from pathlib import Path

from setuptools import setup

linked = Path(__file__).with_name("flexlocal").joinpath("masks").is_dir()
setup(package_dir={"": "."} if linked else {"flexlocal.masks": "masks"})
