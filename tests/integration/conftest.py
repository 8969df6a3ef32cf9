"""Tests here need a Collector; where none can be built, they say so."""

from collections.abc import Iterator

import pytest

from tcpio_otel import privileges
from tests.integration.backends import Backends, backends
from tests.integration.captured import Story, record
from tests.integration.collector import build
from tests.peers import collector_contrib, kubernetes
from tests.peers.go import or_skip


@pytest.fixture(scope="session", autouse=True)
def _collector_is_built() -> None:
    or_skip(build)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """What happened to pods on a wire that loses packets, as the agent recorded it."""
    if missing := privileges.missing_to_load():
        pytest.skip(f"needs {', '.join(f'CAP_{name.name}' for name in missing)}: run the tests as root")
    or_skip(kubernetes.build)
    return record(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="session")
def filled(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    """Every backend that can be had, with the story in it."""
    or_skip(collector_contrib.build)
    with backends(tmp_path_factory.mktemp("backends"), story) as made:
        yield made
