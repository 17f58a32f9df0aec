"""Runs the modules that compare kernels in a process of their own, under Triton's interpreter.

Triton decides at import whether kernels are compiled or interpreted, so one process cannot do both: the
modules in INTERPRETED become one test each, which runs pytest on that module with TRITON_INTERPRET=1. To
work on one of them: `TRITON_INTERPRET=1 pytest tests/kernels/test_decode.py -k int4`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = {
    "test_write.py",
    "test_decode.py",
    "test_prefill.py",
    "test_dequantize.py",
    "test_prefill_library.py",
    "test_page_copy.py",
}
assert all((Path(__file__).parent / name).exists() for name in INTERPRETED), "a module was renamed"
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if _INTERPRETING:
    import interpreter
    import torch

    interpreter.repair()
    torch.set_num_threads(1)


class InterpretedModule(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield InterpreterRun.from_parent(self, name="interpreted")


class InterpreterRun(pytest.Item):
    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        run = subprocess.run(
            command,
            cwd=self.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} in the interpreter"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        return str(excinfo.value)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    if module_path.name in INTERPRETED and not _INTERPRETING:
        return InterpretedModule.from_parent(parent, path=module_path)
    return None
