"""What tests of scripts share: a clock."""

import pytest

from profiling import timing


@pytest.fixture
def milliseconds(monkeypatch):
    """A clock that takes one call for a measurement, and says 1, 2, 3 ... milliseconds."""
    calls = []

    def count(run, device, seconds):
        run()
        calls.append(run)
        return float(len(calls))

    monkeypatch.setattr(timing, "median_ms", count)
    monkeypatch.setattr(timing, "ROUNDS", 3)
    return calls
