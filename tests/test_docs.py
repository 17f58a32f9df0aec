"""What the documents show is true: their code runs, their links lead somewhere, their words exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import quire.replicas
from quire.cluster.cli.main import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_script_prints_what_its_comments_say():
    (script,) = _blocks(ROOT / "README.md", "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, "README.md", "exec"), {})
    promised = [c.rstrip(".") for c in re.findall(r"print\(.*\)  # (.*)$", script, re.MULTILINE)]
    lines = printed.getvalue().splitlines()
    assert len(lines) == len(promised) == 2
    assert all(line.startswith(promise) for line, promise in zip(lines, promised, strict=True))


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    (commands, *_) = _blocks(ROOT / "README.md", "sh")
    asked = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    assert asked == ["demo", "test"]
    assert set(asked) <= targets
    assert re.search(r"^make lint test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_the_quire_commands_of_the_readme_are_understood():
    lines = [line for block in _blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("quire ")]
    assert len(commands) >= 3
    for name, *arguments in commands:
        cli.commands[name].make_context(name, arguments)  # parses, runs nothing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in x]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_formats_in_the_readme_are_the_formats_there_are():
    from quire.kernels.formats import layer_formats

    named = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [name for cell in named for name in re.findall(r"`(\w+)`", cell)]
    assert {"bf16", "fp8", "int8", "int4", "k8v4"} <= set(names)
    for name in names:
        layer_formats(name, 2)


def test_the_public_names_are_there():
    assert all(hasattr(quire.replicas, name) for name in quire.replicas.__all__)
