"""Scripts that measure: ``python -m profiling.bench``, and the others that docs/recipes.md lists.

``problems`` says what is computed, ``peers`` by whom, ``clock`` how it is timed and ``machine``
where; ``results`` keeps the figures.
"""
