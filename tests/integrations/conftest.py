"""flexlocal is registered for each test, and nothing was warned of before."""

import pytest

from flexlocal import dispatch
from flexlocal.integrations import transformers as integration


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    integration.register()
    yield
    integration.unregister()
