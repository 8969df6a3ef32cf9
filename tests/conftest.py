"""What a run of all tests says at its end."""

import pytest

from tests.emitted import EVERYTHING, unseen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names of docs/attributes.md that no agent of this run emitted; some tests alone say nothing about that."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole and (missing := unseen(EVERYTHING)):
        terminalreporter.write_line(f"declared, and emitted by no agent in these tests: {', '.join(missing)}")
