"""The rules of docs/structure.md, held against the code."""

import ast
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
RANK = {"protos": 0, "kernels": 0, "kvstore": 1, "replicas": 2, "cluster": 3}
SOURCES = [p for room in RANK if room != "protos" for p in sorted((ROOT / room).rglob("*.py"))]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_point_down():
    wrong = []
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "quire" and len(parts) > 1 and parts[1] != room and RANK[parts[1]] >= RANK[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_no_folders_import_each_other_in_a_circle():
    """Of files below; a folder's own files and those above it (`replicas/request.py`) are no circle."""
    arrows: dict[str, set[str]] = {}
    for path in SOURCES:
        folder = ".".join(("quire", *path.relative_to(ROOT).parent.parts))
        for name in _imports(path):
            home = (
                name
                if (ROOT / name.removeprefix("quire.").replace(".", "/")).is_dir()
                else name.rpartition(".")[0]
            )
            related = home.startswith(f"{folder}.") or f"{folder}.".startswith(f"{home}.")
            if name.startswith("quire.") and not related:
                arrows.setdefault(folder, set()).add(home)
    assert len(arrows) > 10
    TopologicalSorter(arrows).prepare()


def test_the_lower_rooms_do_not_read_protos():
    wrong = [
        p
        for p in SOURCES
        if p.parts[len(ROOT.parts)] in ("kernels", "kvstore")
        for n in _imports(p)
        if "protos" in n
    ]
    assert not wrong


def test_ray_is_known_to_cluster_and_to_one_file_of_each_room_below():
    users = {
        str(p.relative_to(ROOT))
        for p in SOURCES
        if p.relative_to(ROOT).parts[0] != "cluster"
        for name in _imports(p)
        if name.split(".")[0] == "ray"
    }
    assert users <= {"replicas/deployment.py", "kvstore/peers/directory_actor.py"}


def test_only_the_command_line_reads_the_environment():
    readers = {
        str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"\bos\.(environ|getenv)", p.read_text())
    }
    assert readers <= {"cluster/cli/main.py"}


def test_no_private_module_of_torch_is_imported():
    paths = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [p for p in paths for name in _imports(p) if name.split(".")[:2] == ["torch", "_C"]]


def test_only_links_set_a_variable_because_torch_takes_those_no_other_way():
    writers = {str(p.relative_to(ROOT)) for p in SOURCES if "putenv" in p.read_text()}
    assert writers <= {"kvstore/wire/nccl.py"}


def test_nothing_is_pickled_but_the_spec_a_parent_hands_its_child():
    users = {
        str(p.relative_to(ROOT))
        for p in SOURCES
        for n in _imports(p)
        if n.split(".")[0] in ("pickle", "dill")
    }
    assert users <= {"replicas/runner/local_processes.py"}


def test_every_file_says_what_it_owns():
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    assert not [
        path for path, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))
    ]


def test_every_room_has_a_link_and_a_line_in_the_structure_page():
    page = (ROOT / "docs/structure.md").read_text()
    for room in RANK:
        assert (ROOT / "src/quire" / room).resolve() == ROOT / room
        assert f"| `{room}/` |" in page


def test_every_folder_is_named_in_the_structure_page():
    page = (ROOT / "docs/structure.md").read_text()
    data = [p for room in ("benchmarks", "deploy", "docs") for p in (ROOT / room).glob("*/*") if p.is_file()]
    folders = {str(p.parent.relative_to(ROOT)) for p in [*SOURCES, *data] if p.suffix != ".pyc"}
    assert not [folder for folder in folders if f"`{folder}/`" not in page]


def test_the_files_that_the_structure_page_names_exist():
    page = (ROOT / "docs/structure.md").read_text()
    rooms = "|".join((*RANK, "tests", "docs", "deploy", "benchmarks", "scripts"))
    named = set(re.findall(rf"`((?:{rooms})/[\w/.]*)`", page))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    names = {re.split(r"[\[<>=;\s]", d)[0].lower() for d in wanted} - {"quire"}
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.split("==")[0] for line in lines}
    assert not names - pinned
