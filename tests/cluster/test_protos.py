"""The generated code is what the protos give, and every field says what it is."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))


def test_generating_again_changes_nothing(tmp_path):
    spec = importlib.util.spec_from_file_location("generate_protos", ROOT / "scripts" / "protos.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.generate(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.py*"))
    assert len(made) == 3 * len(PROTOS)
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / "src" / path).read_text(), (
            f"run `make protos`: {path}"
        )


def test_fields_are_documented_unless_their_name_is_all_there_is_to_say():
    plain = {
        "token_ids", "prompt_tokens", "output_tokens", "token_id", "call", "sampling", "model", "delta",
        "submit", "hello", "step", "events", "k", "v", "stats", "requests_finished", "requests_failed",
        "requests_cancelled",
    }  # fmt: skip
    missing = []
    for path in PROTOS:
        before = ""
        for line in path.read_text().splitlines():
            found = re.match(r"\s+(?:repeated |optional )?(?:map<\w+, \w+>|[\w.]+) (\w+) = \d+;", line)
            if found and found[1] not in plain and "//" not in before + line:
                missing.append(f"{path.name}: {found[1]}")
            before = line
    assert not missing
