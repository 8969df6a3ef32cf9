"""Tests here need a Collector; where none can be built, they say so."""

import pytest

from tests.integration.collector import build
from tests.peers.go import or_skip


@pytest.fixture(scope="session", autouse=True)
def _collector_is_built() -> None:
    or_skip(build)
