"""Positions, documents, softcap, sinks and log-sum-exps of the eager path, against the oracle."""

import placed
from hypothesis import given, settings
from strategies import EXAMPLES


@settings(max_examples=3 * EXAMPLES)
@given(placed.placed())
def test_results_and_gradients(case):
    placed.check(case, backend="eager")
