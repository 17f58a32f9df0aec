"""Words that the glossary of CONTRIBUTING.md rules out occur nowhere a user or a contributor reads."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "kvstore", "replicas", "cluster", "benchmarks", "deploy")


def _ruled_out() -> list[str]:
    (table,) = re.findall(r"^\| word \|.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text() + "\n", re.M | re.S)
    rows = [line.split("|")[1:-1] for line in table.strip().splitlines()[2:]]
    return [word.strip() for *_, column in rows for word in column.split(",") if word.strip()]


def _pattern(words: list[str]) -> re.Pattern[str]:
    phrases = [re.sub(" ", r"\\s+(?:(?:#|//)\\s*)?", word) for word in words]  # lines may end within them
    return re.compile(rf"(?<![\w-])(?:{'|'.join(phrases)})(?![\w-])", re.I)


RULED_OUT = _pattern(_ruled_out())


def _prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and messages with their lines: strings without a space are names."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    if path.suffix == ".py":
        yield from _prose_of_python(text)
    elif path.name == "CONTRIBUTING.md":
        yield 1, text.split("\n## Words\n")[0]
    else:
        yield 1, text


def _pages() -> list[Path]:
    """Everything that is read, but for what was written down at its time."""
    sources = [p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".yaml", ".cpp")]
    others = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("protos/quire/v1/*.proto")]
    return sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("docs/examples/*"), *sources, *others})


def _offences(path: Path) -> Iterator[str]:
    for line, text in _prose(path):
        plain = re.sub(r"`[^`\n]*`", lambda code: "_" * len(code[0]), text)  # names are no prose
        for word in RULED_OUT.finditer(plain):
            yield f"{path}:{line + plain.count(chr(10), 0, word.start())}: {word[0]}"


@pytest.mark.parametrize("room", ["README.md", "CONTRIBUTING.md", "docs", "protos", *ROOMS])
def test_ruled_out_words_occur_nowhere(room):
    pages = [p for p in _pages() if p.relative_to(ROOT).parts[0] == room]
    found = [offence for page in pages for offence in _offences(page)]
    assert not found, "\n".join(found)


def test_they_are_found_in_docstrings_comments_and_messages_but_not_in_names(tmp_path):
    page = tmp_path / "page.py"
    page.write_text('"""As so\nmany `sooner` are."""\nx = "sooner"\n# quicker\nraise E(f"{x} is sooner")\n')
    assert list(_offences(page)) == [f"{page}:4: quicker", f"{page}:1: so\nmany", f"{page}:5: sooner"]
