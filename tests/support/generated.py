"""The script that generates what is watched, for tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def observability() -> ModuleType:
    spec = importlib.util.spec_from_file_location("observability", ROOT / "scripts" / "observability.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
