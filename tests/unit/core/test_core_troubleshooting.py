"""docs/troubleshooting.md against the messages in the code."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.core.test_core_cli import called

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "tcpio_otel"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FAULTS = {"EnvironmentFault", "InputError", "_FaultError"}
LOGGED = {"warning", "error", "exception"}
CONSEQUENCES = {"WITHOUT", "WITHOUT_TYPES", "UNKNOWN_HOLDERS"}
SOMETHING = "…"


def template(node: ast.expr) -> str:
    """A message with `…` for what varies; of two ways to end, the longer one."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sd]", SOMETHING, text)
        case ast.JoinedStr(values=values):
            found = "".join(template(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = template(left) + template(right)
        case ast.IfExp(body=body, orelse=orelse):
            found = max(template(body), template(orelse), key=len)
        case _:
            return SOMETHING
    return re.sub(f"{SOMETHING}+", SOMETHING, found)


def name_of(function: ast.expr) -> str:
    """What is called."""
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def consequences(tree: ast.Module) -> Iterator[str]:
    """What a loader does without: the values of its tables, and what is added to `missing`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if name_of(target) in CONSEQUENCES and isinstance(node.value, ast.Dict):
                yield from (template(value) for value in node.value.values)
            elif name_of(target) in CONSEQUENCES or (
                isinstance(target, ast.Subscript) and name_of(target.value) == "missing"
            ):
                yield template(node.value)
        elif isinstance(node, ast.Call) and name_of(node.func) == "setdefault":
            yield template(node.args[1])


def of_check(tree: ast.Module) -> Iterator[str]:
    """What `check` says where all is well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and name_of(node.returns or node.args) == "str":
            yield from (template(each.value) for each in ast.walk(node) if isinstance(each, ast.Return) and each.value)
        elif isinstance(node, ast.Call) and name_of(node.func) == "Finding":
            yield template(node.args[2])
        elif isinstance(node, ast.Assign) and any(name_of(each) == "by" for each in ast.walk(node.targets[0])):  # type: ignore[arg-type]
            last = node.value.elts[-1] if isinstance(node.value, ast.Tuple) else node.value
            yield template(last)


def messages() -> Iterator[tuple[str, str]]:
    """Every message of the agent, and where it stands: faults, warnings, what a loader lacks, what `check` says."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, found = ast.parse(path.read_text()), []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                logged = name_of(node.func) in LOGGED and "log" in ast.unparse(node.func)
                if name_of(node.func) in FAULTS or logged:
                    found.append(template(node.args[0]))
        if path.name == "loaders.py":
            found += consequences(tree)
        if path.name == "check.py":
            found += of_check(tree)
        yield from ((text, str(path.relative_to(ROOT))) for text in found if re.search(r"[a-z]{2}", text))


def quoted() -> set[str]:
    """What the tables say is said: code in columns under `said` or `says`."""
    found: set[str] = set()
    column = None
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            column = None
        elif column is None:
            column = next((at for at, cell in enumerate(cells) if cell in ("said", "says")), len(cells))
        elif column < len(cells):
            found |= set(re.findall(r"`([^`]+)`", cells[column]))
    return {text for text in found if re.search(r"[a-z]{2}", text)}


def test_every_message_is_there() -> None:
    """Whoever adds one says there what it means and what to do."""
    told = set(re.findall(r"`([^`]+)`", PAGE))
    assert [(text, where) for text, where in messages() if text not in told] == []


def test_nothing_is_quoted_that_nobody_says() -> None:
    """A message that changes, or goes, takes its entry along."""
    assert quoted() - {text for text, _ in messages()} == set()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: without, check tries no loader")
def test_every_line_of_check_is_there() -> None:
    """By the name that it begins with."""
    _, stdout, _ = called("check", "--otlp-endpoint", "http://127.0.0.1:9")
    lines = {line[4:18].strip() for line in stdout.splitlines()}
    assert len(lines) > 9
    table = PAGE.partition("## What `check` says")[2].partition("\n## ")[0]
    assert {name for name in lines if f"`{name}`" not in table} == set()


def test_every_reason_of_the_ledger_is_there() -> None:
    """Those for which packets are dropped, as far as they stand in the code as words."""
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    said = re.findall(r"(?:dropped\(|reason=|Refused\(|dropped=\{)(?:[a-z_.]+, )*\"([a-z_]+)\"", code)
    assert {"ring_full", "queue_full", "too_large", "shutdown"} <= set(said)
    assert {reason for reason in said if f"`{reason}`" not in PAGE} == set()
