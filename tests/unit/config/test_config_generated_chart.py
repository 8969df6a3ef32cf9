"""The chart's files that are generated, and what it repeats of the agent."""

from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tcpio_otel import __version__
from tcpio_otel.config import LEAVES, default
from tcpio_otel.config_values import show
from tests.generators import generator

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "tcpio-otel"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator."""
    return generator("generate_chart")


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    """Whoever changes a value or a key runs `python config/generate_chart.py`."""
    for path, content in generate.FILES.items():
        assert path.read_text() == content(), f"run python config/generate_chart.py: {path} is out of date"


def test_a_value_without_a_comment(generate: ModuleType) -> None:
    """It is an error that says where; a mapping with a comment and none inside is a value."""
    text = "# labels\nlabels:\n  a: b\nsection:\n  # known\n  one: 1\n  two: 2\n"
    rows = generate.rows(yaml.compose(text), text.splitlines())
    assert [next(rows), next(rows)] == [("labels", '`{"a": "b"}`', "labels"), ("section.one", "`1`", "known")]
    with pytest.raises(ValueError, match=r"values.yaml:7: section.two has no comment"):
        next(rows)


def test_version() -> None:
    """The chart's appVersion is the agent's version."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_defaults() -> None:
    """Values of `config` are the agent's defaults, but for those that a pod has otherwise."""
    config = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
    given = {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
    others = {path for path, value in given.items() if value != show(default(LEAVES[path]))}
    of_a_pod = {"capture.cgroup", "correlation.published_contexts", "kubernetes.enabled", "kubernetes.cache"}
    of_a_pod.add("kubernetes.peers")
    assert others == of_a_pod | {"capture.queue_memory"}
