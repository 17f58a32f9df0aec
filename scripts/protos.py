"""Generates the Python code of the protos. Run by `make protos`; a test checks that nothing changes."""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent


def generate(into: Path) -> None:
    """Writes quire/protos/quire/v1/*_pb2{,_grpc}.py and .pyi under `into`."""
    source = ROOT / "src"  # so that the generated code imports itself as quire.protos
    files = sorted((source / "quire/protos").rglob("*.proto"))
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{source}", *outputs, *map(str, files)]) != 0:
        sys.exit(1)


if __name__ == "__main__":
    generate(ROOT / "src")
