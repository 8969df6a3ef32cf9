"""What a run of the tests says at its end."""

import pytest

from tests.emitted import EVERYTHING, Emitted, unseen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names of docs/attributes.md that no agent of this run emitted."""
    if Emitted() != EVERYTHING and (missing := unseen(EVERYTHING)):
        terminalreporter.write_line(f"declared, and emitted by no agent in these tests: {', '.join(missing)}")
