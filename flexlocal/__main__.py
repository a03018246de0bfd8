"""``python -m flexlocal``; the command line is in ``flexlocal/cli``."""

from .cli.main import program

if __name__ == "__main__":
    program()
