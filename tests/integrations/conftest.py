"""The integration is tested where Transformers is installed."""

import pytest

pytest.importorskip("transformers", reason="the integration is with Transformers")

from flexlocal import dispatch  # noqa: E402
from flexlocal.integrations import transformers as integration  # noqa: E402


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Under its name, with its default, and nothing was warned of before."""
    monkeypatch.setattr(dispatch, "_SAID", set())
    integration.register()
    yield
    integration.unregister()
