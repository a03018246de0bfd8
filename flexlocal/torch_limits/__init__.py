"""What torch's compiler and FlexAttention's kernels cannot do, and the ways around it.

A workaround says which versions of torch need it and what goes wrong without it; one that a single
line of a path needs stands at that line. ``tests/package/test_workarounds.py`` lists them all, with
the tests that make a fault again and fail when torch has mended it. These are also the only files
that know private names of torch. They import torch only, so that any other may use them.
"""
