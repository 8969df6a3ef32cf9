"""Tests here need a Collector; where none can be built, they say so."""

import pytest

from tests.integration.collector import build


@pytest.fixture(scope="session", autouse=True)
def _collector_is_built() -> None:
    try:
        build()
    except LookupError as reason:
        pytest.skip(str(reason))
