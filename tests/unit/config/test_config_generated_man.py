"""The manual page, as man finds and shows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tcpio_otel.errors import TcpioError
from tests.generators import generator
from tests.parsers import commands

VENV = Path(sys.executable).parent.parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator."""
    return generator("generate_man")


def needed(program: str, package: str) -> str:
    """A program; skips without."""
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian, Ubuntu: apt install {package})")
    return program


def man(*arguments: str, **environment: str) -> str:
    """What man shows on a terminal of 80 columns; it must not complain."""
    run = subprocess.run(
        [needed("man", "man-db"), *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MAN_KEEP_FORMATTING": "", **environment},
    )  # fmt: skip
    assert run.stderr == ""
    return run.stdout


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    """Whoever changes the command line runs `python config/generate_man.py`."""
    for path, content in generate.FILES.items():
        assert path.read_text() == content(), f"run python config/generate_man.py: {path} is out of date"


def test_the_page_changes_its_date_with_its_text(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with the day on which somebody generates it."""
    old = re.sub(r"(?m)^(\.TH \S+ 1) \S+", r"\1 2001-02-03", generate.PAGE.read_text())
    monkeypatch.setattr(generate, "PAGE", tmp_path / "page.1")
    generate.PAGE.write_text(old)
    assert generate.page() == old
    generate.PAGE.write_text(old + "more\n")
    assert " 2001-02-03 " not in generate.page()


def test_checkers_find_nothing(generate: ModuleType) -> None:
    """Neither mandoc, style included, nor groff."""
    lint = [needed("mandoc", "mandoc"), "-T", "lint", "-W", "all", str(generate.PAGE)]
    assert subprocess.run(lint, capture_output=True, text=True, check=True).stdout == ""
    assert man("--warnings=w", "-l", str(generate.PAGE))


def test_the_page_tells_what_the_parser_knows(generate: ModuleType) -> None:
    """Every command, option, example and exit code."""
    shown = man("-l", str(generate.PAGE))
    for name, command in commands().items():
        assert re.search(rf"(?m)^       tcpio-otel {name} ", shown)
        for action in command._actions:
            for option in action.option_strings:
                assert re.search(rf"(?m)^ +(.+, )?{option}\b", shown)
        for line in (command.epilog or "examples:").splitlines()[1:]:
            assert f"     {line}\n" in shown
    for error in TcpioError.__subclasses__():
        assert re.search(rf"(?m)^       {error.exit_code} ", shown)


def test_it_is_installed_where_man_looks() -> None:
    """Beside the command, whose directory is in PATH."""
    assert man("-w", "tcpio-otel", PATH=f"{VENV}/bin:/usr/bin:/bin").strip() == f"{VENV}/share/man/man1/tcpio-otel.1"
    assert man("-M", f"{VENV}/share/man", "tcpio-otel").startswith("TCPIO-OTEL(1)")
