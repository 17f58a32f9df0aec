"""The scripts of docs/examples run against a served model, and docs/client.md shows them as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from served_app import Served

DOCS = Path(__file__).parents[2] / "docs"
PROMISED = {
    "chat.py": r"^The pass key is 71432\.$",
    "collect.py": r"^demo is served\n0: .+\n1: .+\n\d+ tokens of prompt, \d+ of output\nTTFT .* s$",
    "many.py": r"^(Long ago, a (cat|fox|hen|owl) named.+\n?){4}$",
    "errors.py": r"\nINVALID_ARGUMENT: token id 1000000 is not",
}


def test_the_page_shows_every_script_as_it_is():
    page = (DOCS / "client.md").read_text()
    shown = dict(re.findall(r"\(examples/(\w+\.py)\)\n\n```python\n(.*?)```", page, re.DOTALL))
    assert shown == {path.name: path.read_text() for path in (DOCS / "examples").glob("*.py")}
    assert set(shown) == set(PROMISED)


@pytest.mark.ray
@pytest.mark.parametrize("name", PROMISED)
def test_a_script_prints_what_it_promises(served: Served, name):
    command = [sys.executable, str(DOCS / "examples" / name), served.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(PROMISED[name], done.stdout.rstrip("\n"), re.DOTALL), done.stdout
