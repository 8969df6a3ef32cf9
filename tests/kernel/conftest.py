"""What kernel tests stand on: root, a kernel that takes the probe, and a network namespace of their own."""

import subprocess
import uuid
from collections.abc import Iterator

import pytest

from tcpio_otel import privileges
from tcpio_otel.capture.control import Filters
from tcpio_otel.capture.probe import Probe
from tcpio_otel.errors import EnvironmentFault
from tests.kernel.harness import Namespace


@pytest.fixture(scope="session", autouse=True)
def _kernel_takes_the_probe() -> None:
    if missing := privileges.missing_to_load():
        pytest.skip(f"needs {', '.join(f'CAP_{name.name}' for name in missing)}: run the tests as root")
    try:
        with Probe(filters=Filters(), memory_bytes=1 << 20):
            pass
    except EnvironmentFault as fault:
        pytest.skip(f"this kernel does not take the probe: {fault}")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace whose only device is its loopback, up."""
    name = f"tcpio-test-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Namespace(name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
