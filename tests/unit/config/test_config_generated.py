"""The files that are generated from the configuration's dataclasses."""

from pathlib import Path
from types import ModuleType

import pytest

from tcpio_otel.config import LEAVES, VARIABLES, Config, load
from tests.generators import generator

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator."""
    return generator("generate")


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    """Whoever changes a key runs `python config/generate.py`."""
    for path, content in generate.FILES.items():
        assert path.read_text() == content(), f"run python config/generate.py: {path} is out of date"


def test_the_example_holds_every_key_and_changes_nothing() -> None:
    """It can be copied and edited; as it stands it is the default."""
    path = ROOT / "config" / "tcpio-otel.yaml"
    assert load(path, {}, {})[0] == Config()
    names = [
        line.strip().partition(":")[0] for line in path.read_text().splitlines() if not line.strip().startswith("#")
    ]
    assert [name for name in names if name in {leaf.rpartition(".")[2] for leaf in LEAVES}] != []
    for leaf in LEAVES:
        assert leaf.rpartition(".")[2] in names


def test_the_page_names_every_variable() -> None:
    """Both kinds; those of single signals by their pattern."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    for variable in VARIABLES:
        for signal in ("LOGS", "TRACES", "METRICS"):
            variable = variable.replace(f"EXPORT_{signal}_", "EXPORT_SIGNAL_")
        assert f"`{variable}`" in page
