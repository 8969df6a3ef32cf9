"""The scripts beside the configuration that make files from the code, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def generator(name: str) -> ModuleType:
    """The script of that name in config/."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "config" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
