"""What is generated from the catalogue is what is checked in."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_generating_again_changes_nothing(tmp_path):
    spec = importlib.util.spec_from_file_location("observability", ROOT / "scripts" / "observability.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.generate(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert Path("docs/metrics.md") in made
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"run `make observability`: {path}"
