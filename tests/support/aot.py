"""Compiles kernels for a GPU that is not there, and reads the machine code.

Needs a process without TRITON_INTERPRET; the compiler and disassembler come with Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

_TOOLS = Path(nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became. Bytes are per thread for the stack and spills, per block for shared memory."""

    spill_bytes: int
    registers: int
    shared_bytes: int
    all: Counter[str]
    """Instructions by opcode with its modifiers."""
    loop: Counter[str]
    """Of the loop with the most matrix instructions; empty if there is none."""

    def count(self, *prefixes: str) -> int:
        return sum(n for op, n in self.loop.items() if op.startswith(prefixes))


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], *, capability: int, warps: int, stages: int = 2
) -> Compiled:
    """`arguments`: a type such as "*u8:16" or "i32:16" (:16 divisible by 16) for every runtime argument, a
    value for every constexpr."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if kernel.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", arguments[name]
        else:
            signature[name], _, divisor = arguments[name].partition(":")
            if divisor:
                attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        sass = _run(_TOOLS / "cuobjdump", "-sass", cubin).stdout
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
        assert arch
        ptxas = get_ptxas(capability).path
        log = _run(ptxas, "-v", f"--gpu-name={arch[1]}", ptx, "-o", Path(folder, "again.cubin")).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills
    assert registers
    return Compiled(
        spill_bytes=int(spills[1]) + int(spills[2]),
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        all=Counter(m[2] for m in _INSTRUCTION.finditer(sass)),
        loop=_hottest_loop(sass),
    )


def _hottest_loop(sass: str) -> Counter[str]:
    code = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(sass)]
    bodies: list[list[str]] = [[]]
    for at, op, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            bodies.append([o for a, o, _ in code if int(target[1], 16) <= a <= at])
    return Counter(max(bodies, key=lambda body: (sum("MMA" in o for o in body), len(body))))


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
