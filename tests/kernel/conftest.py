"""What kernel tests stand on: root, a kernel that takes the probe, and a network namespace of their own."""

from collections.abc import Callable, Iterator

import pytest

from tcpio_otel import privileges
from tcpio_otel.capture.bcc import compile_probe
from tcpio_otel.capture.control import Filters
from tcpio_otel.capture.loaders import Loader
from tcpio_otel.capture.probe import Probe
from tcpio_otel.errors import EnvironmentFault
from tests.kernel import conformance as suite
from tests.kernel.harness import Namespace, new_namespace
from tests.kernel.scenarios import SCENARIOS

_SUMMARY = pytest.StashKey[str]()


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
    with new_namespace() as made:
        yield made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each scenario on each lane where it makes sense, as an agent by each loader tells it."""
    if "loader" in metafunc.fixturenames:
        metafunc.parametrize("loader", list(suite.LOADERS), scope="session", indirect=True)
    if "case" in metafunc.fixturenames:
        cases = [(lane, name) for lane in suite.LANES for name in SCENARIOS if suite.applies(lane, name)]
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases], scope="session")


@pytest.fixture(scope="session")
def conformance(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    lacks_bcc: str,
    record_testsuite_property: Callable[[str, object], None],
) -> suite.Run:
    """What came of all scenarios that were asked for, run at once."""
    asked = [
        item.callspec.params
        for item in request.session.items
        if "conformance" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    ]
    wanted, loaders = (dict.fromkeys(params[name] for params in asked if name in params) for name in ("case", "loader"))
    here = [loader for loader in loaders if loader is Loader.LIBBPF or not lacks_bcc]
    run = suite.run(tmp_path_factory.mktemp("conformance"), list(wanted), here)
    lines = []
    for loader, agent in run.agents.items():
        unseen, differences = run.unseen(loader), run.differences(loader)
        properties = {"hooks": len(agent.hooks), "segments": run.segments, "unseen": unseen, "differences": differences}
        for name, value in properties.items():
            record_testsuite_property(f"{loader}.{name}", value)
        lines.append(
            f"conformance, by {loader}: {run.segments} segments compared with tcpdump's, {differences} differences"
            + (f", {unseen} that it cannot show" if unseen else "")
        )
    request.config.stash[_SUMMARY] = "\n".join(lines)
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many segments were compared, and how many differed."""
    if summary := config.stash.get(_SUMMARY, None):
        terminalreporter.write_line(summary)


@pytest.fixture(scope="session")
def lacks_bcc() -> str:
    """Why nothing can be loaded by BCC here; empty where it can."""
    try:
        compile_probe()
    except EnvironmentFault as fault:
        return str(fault)
    return ""


@pytest.fixture(scope="session")
def loader(request: pytest.FixtureRequest, lacks_bcc: str) -> Loader:
    """What the agent's probe is loaded by: each in turn."""
    if request.param is Loader.BCC and lacks_bcc:
        pytest.skip(lacks_bcc)
    return Loader(request.param)


@pytest.fixture
def outcome(conformance: suite.Run, case: tuple[str, str]) -> suite.Outcome:
    """What came of one of them."""
    found = conformance.outcomes[case]
    if found.skipped:
        pytest.skip(found.skipped)
    return found
