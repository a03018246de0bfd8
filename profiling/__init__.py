"""Scripts that measure: ``python -m profiling.bench``, and ``trace``, ``scale``, ``compiles``.

``problems`` says what is computed, ``peers`` by whom, ``clock`` how it is timed and ``machine``
where.
"""
