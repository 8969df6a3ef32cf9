"""The table of kernels, and the results that it is made of."""

import json
import re
from pathlib import Path

import pytest

from tests.generators import generator
from tests.matrix.results import KEPT, Result, keep

OLD = Result("6.12.117+deb13-amd64", "libbpf", "9", 250, (), 0, "1000", "0", "0")


def test_generated_files_are_up_to_date() -> None:
    """Whoever records a run of the matrix runs `python config/generate_compatibility.py`."""
    for path, content in generator("generate_compatibility").FILES.items():
        assert path.read_text() == content(), f"run python config/generate_compatibility.py: {path} is out of date"


def test_results_say_when_and_of_what() -> None:
    """Each has a date, a commit, and where it was run; there is one for each kernel and loader."""
    kept = json.loads(KEPT.read_text())
    assert len({(each["kernel"], each["loader"]) for each in kept}) == len(kept) == 10
    for each in kept:
        assert re.fullmatch(r"2\d{3}-\d{2}-\d{2}", each["date"])
        assert re.fullmatch(r"[0-9a-f]{7,}", each["commit"]), "not of a commit as it stands"
        assert each["where"] in ("matrix", "host")


def test_a_newer_result_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """Of the same kernel and loader, whatever its last digits; others stay, in the order of versions."""
    path = tmp_path / "kept.json"
    keep([OLD, Result("5.10.0-46-amd64", "libbpf", "7", 240)], "matrix", "1234567", path)
    newer = Result("6.12.120-amd64", "libbpf", "11", 260, ("lost-fin",), 2, "1200", "0", "1")
    keep([newer, Result("6.12.120-amd64", "bcc", "4", 251)], "host", "89abcde", path)
    found = json.loads(path.read_text())
    assert [(each["kernel"], each["loader"], each["where"]) for each in found] == [
        ("5.10", "libbpf", "matrix"),
        ("6.12", "libbpf", "host"),
        ("6.12", "bcc", "host"),
    ]
    assert [each["commit"] for each in found] == ["1234567", "89abcde", "89abcde"]
    assert (found[1]["release"], found[1]["failed"], found[1]["differences"]) == ("6.12.120", ["lost-fin"], "1")
    assert found[0]["release"] == "5.10.0-46"
    with pytest.raises(FileNotFoundError):
        keep([newer], "host", "89abcde", tmp_path / "nowhere" / "kept.json")
