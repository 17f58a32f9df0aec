"""Decode attention: bandwidth against the device's copy, time against the fastest library on bf16.

    python -m benchmarks.gpu attention --date 2026-01-31

torch's SDPA on contiguous K and V is always there; `baselines.py` adds others at two of the shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.baselines import optional_seconds
from benchmarks.gpu.cases import Paged, Shape
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import graph_seconds
from benchmarks.rows import Row

ALL = ("bf16", "fp8", "int8", "int4", "k8v4")
MAIN = ("bf16", "int8", "int4")
CASES: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    (Shape(B=32, L=8192), ALL),
    (Shape(B=1, L=131072), ALL),
    (Shape(B=1, L=8192), MAIN),
    (Shape(B=8, L=32768), MAIN),
    (Shape(B=64, L=8192), MAIN),
    (Shape(B=128, L=1024), MAIN),
    (Shape(B=32, L=1024), MAIN),
    (Shape(B=32, L=8192, ragged=True), MAIN),
    (Shape(B=32, L=8192, rows=4), MAIN),
    (Shape(B=32, L=8192, rows=8), MAIN),
    (Shape(B=32, L=8192, H=32, G=1), MAIN),
    (Shape(B=32, L=8192, H=8, G=8), MAIN),
    (Shape(B=32, L=8192, H=2, G=8, D=64), MAIN),
    (Shape(B=32, L=8192, page_tokens=32), MAIN),
)
_BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
}


def measure(ceilings: Ceilings) -> list[Row]:
    rows: list[Row] = []
    for shape, policies in CASES:
        libraries = sdpa_seconds(shape) | optional_seconds(shape)
        library, library_s = min(
            (item for item in libraries.items() if item[0].endswith("bf16")), key=lambda item: item[1]
        )
        print(
            f"library {shape}: " + ", ".join(f"{n} {s * 1e6:.1f} us" for n, s in libraries.items()),
            flush=True,
        )
        rows += [
            Row(f"library {name} {shape}", "time", seconds * 1e3, "ms", library, seconds / library_s)
            for name, seconds in libraries.items()
        ]
        bf16_s = 0.0
        for policy in policies:
            seconds = decode_seconds(shape, policy)
            bf16_s = seconds if policy == "bf16" else bf16_s
            rate = shape.kv_bytes(policy) / seconds
            case = f"decode {policy} {shape}"
            share = rate / ceilings.copy_bytes_s
            rows += [
                Row(case, "bandwidth", rate / 1e9, "GB/s", "device copy", share),
                Row(case, "time", seconds * 1e3, "ms", library, seconds / library_s),
                Row(case, "speedup", bf16_s / seconds, "x", "our bf16", bf16_s / seconds),
            ]
            print(
                f"{case}: {seconds * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, {share:.0%} of copy, "
                f"{library_s / seconds:.2f} x {library}, {bf16_s / seconds:.2f} x our bf16",
                flush=True,
            )
    return rows


def decode_seconds(shape: Shape, policy: str) -> float:
    paged = Paged.random(shape, policy, shape.layers(policy))
    return graph_seconds(paged.decode_calls())


def sdpa_seconds(shape: Shape) -> dict[str, float]:
    """SDPA's backends on contiguous bf16 K and V of equal lengths, a GQA group as its rows.

    Several query rows are computed without their causal mask, which spares the library work.
    """
    shape = Shape(shape.B, shape.L, shape.rows, shape.H, shape.G, shape.D)
    layers = shape.layers("bf16")
    q_BHRD = torch.randn(shape.B, shape.H, shape.rows * shape.G, shape.D, device="cuda").bfloat16()
    kv = [
        torch.randn(2, shape.B, shape.H, shape.L, shape.D, dtype=torch.bfloat16, device="cuda")
        for _ in range(layers)
    ]
    params = SDPAParams(q_BHRD, *kv[0], None, 0.0, False, False)  # type: ignore[call-arg]
    times = {}
    for name, (backend, usable) in _BACKENDS.items():
        if usable(params):
            with sdpa_kernel(backend):
                times[f"sdpa {name} bf16"] = graph_seconds([_sdpa(q_BHRD, *pair) for pair in kv])
    return times


def _sdpa(q_BHRD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Callable[[], Tensor]:
    return lambda: scaled_dot_product_attention(q_BHRD, k_BHLD, v_BHLD)
