"""The command line: ``python -m flexlocal demo``, ``doctor`` and ``mask``."""
