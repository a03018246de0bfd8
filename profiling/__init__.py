"""Scripts that measure: ``python -m profiling.bench``, and the others that docs/recipes.md lists.

``problems`` says what is computed, ``peers`` by whom, ``check`` what is right, ``timing`` how it
is timed and ``machine`` where; ``terminal`` shows it, and ``results`` keeps the figures.
"""
