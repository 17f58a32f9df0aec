"""Attention over quantized pages beside torch's SDPA over contiguous K and V.

    python benchmarks/attention.py [--device cpu|cuda] [--json FILE]

Decoding: 8 sequences of 2048 tokens; SDPA reads bf16 K and V with the query heads of a kv head as its rows,
its best setting. Prefill: a chunk of 512 tokens after 0 and 1536 others; SDPA computes in fp32 as we do on a
CPU, in bf16 on a GPU. Each case is first compared with the reference on its own data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import Row, alternate, median, report, timed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quire.kernels import cpu
from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.decode import decode_attention, plan_batch
from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.kernels.prefill import prefill_attention
from quire.kernels.ref.paged import attend_ref
from quire.kernels.transform import default_transform
from quire.kernels.write import write_kv

POLICIES = ("bf16", "fp8", "int8", "int4", "k8v4", "int4g32")


@dataclass(frozen=True)
class Shape:
    """B sequences of L tokens, the last `rows` of them queries; H kv heads of G query heads, D head_dim."""

    B: int
    L: int
    rows: int
    H: int = 2
    G: int = 4
    D: int = 64
    page_tokens: int = 64

    def __str__(self) -> str:
        return f"B={self.B} L={self.L} rows={self.rows} heads={self.H * self.G}/{self.H} d={self.D}"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.D**-0.5)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The same numbers, contiguous for SDPA and as rows for pages."""

    shape: Shape
    q_TQD: Tensor
    k_BLHD: Tensor
    v_BLHD: Tensor

    @classmethod
    def random(cls, shape: Shape, device: str) -> Inputs:
        torch.manual_seed(0)
        q_TQD = torch.randn(shape.B * shape.rows, shape.H * shape.G, shape.D)
        k_BLHD, v_BLHD = torch.randn(2, shape.B, shape.L, shape.H, shape.D)
        return cls(shape, *(x.bfloat16().to(device) for x in (q_TQD, k_BLHD, v_BLHD)))

    def paged(self, policy: str) -> tuple[LayerCache, PagedBatch]:
        """Pages of the pool in random order."""
        s, device = self.shape, self.q_TQD.device
        (fmt,) = layer_formats(policy, 1)
        layout = PageLayout((fmt,), s.H, s.D, s.page_tokens)
        pages = s.L // s.page_tokens
        pool_NB = torch.zeros(s.B * pages, layout.page_bytes, dtype=torch.uint8, device=device)
        cache = LayerCache(pool_NB, layout, 0, default_transform(fmt.k), default_transform(fmt.v))
        table_SM = torch.randperm(s.B * pages).view(s.B, pages).int().to(device)
        slots_BL = (
            table_SM.long()[..., None] * s.page_tokens + torch.arange(s.page_tokens, device=device)
        ).flatten(1)
        write_kv(cache, self.k_BLHD.flatten(0, 1), self.v_BLHD.flatten(0, 1), slots_BL.flatten())
        starts_S1 = torch.arange(s.B + 1, dtype=torch.int32, device=device) * s.rows
        lengths_S = torch.full((s.B,), s.L, dtype=torch.int32, device=device)
        slots_T = slots_BL[:, -s.rows :].flatten()
        return cache, PagedBatch(starts_S1, lengths_S, table_SM, slots_T, s.rows, s.L)

    def sdpa(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """SDPA in `dtype`, [B, H, ...]: decoding has no mask, prefill a causal one."""
        s = self.shape
        q_BQRD = self.q_TQD.view(s.B, s.rows, s.H * s.G, s.D).transpose(1, 2).to(dtype).contiguous()
        k_BHLD, v_BHLD = (x.transpose(1, 2).to(dtype).contiguous() for x in (self.k_BLHD, self.v_BLHD))
        if s.rows == 1:
            q_BHGD = q_BQRD.view(s.B, s.H, s.G, s.D)
            return lambda: scaled_dot_product_attention(q_BHGD, k_BHLD, v_BHLD)
        if s.rows == s.L:
            return lambda: scaled_dot_product_attention(
                q_BQRD, k_BHLD, v_BHLD, is_causal=True, enable_gqa=True
            )
        mask_RL = torch.ones(s.rows, s.L, dtype=torch.bool, device=q_BQRD.device).tril(s.L - s.rows)
        return lambda: scaled_dot_product_attention(
            q_BQRD, k_BHLD, v_BHLD, attn_mask=mask_RL, enable_gqa=True
        )


def compare(shape: Shape, policies: tuple[str, ...], device: str, rounds: int) -> list[Row]:
    """Our time per policy against SDPA's."""
    inputs = Inputs.random(shape, device)
    decoding = shape.rows == 1
    dtype = torch.bfloat16 if decoding or device == "cuda" else torch.float32
    baseline = f"sdpa {str(dtype).removeprefix('torch.')} contiguous"
    calls = {baseline: inputs.sdpa(dtype)}
    for policy in policies:
        cache, batch = inputs.paged(policy)
        attend = decode_call if decoding else prefill_call
        calls[policy] = attend(cache, inputs.q_TQD, batch, shape.spec)
        check(calls[policy](), attend_ref(cache, inputs.q_TQD, batch, shape.spec))
    for call in calls.values():
        call()
    times = alternate(
        {name: timed(call, device, 20 if device == "cuda" else 1) for name, call in calls.items()}, rounds
    )
    middle = {name: median(seconds) for name, seconds in times.items()}
    kind = "decode" if decoding else "prefill"
    return [
        Row(
            f"{kind} {policy} {shape}",
            "time",
            middle[policy] * 1e3,
            "ms",
            baseline,
            middle[policy] / middle[baseline],
        )
        for policy in policies
    ]


def decode_call(
    cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec
) -> Callable[[], Tensor]:
    """On a GPU the plan is made before, as an engine does once a step."""
    plan = None
    if q_TQD.device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(q_TQD.device).multi_processor_count
        plan = plan_batch(cache, q_TQD.shape[1], batch, spec, multiprocessors)
    return lambda: decode_attention(cache, q_TQD, batch, spec, plan)


def prefill_call(
    cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec
) -> Callable[[], Tensor]:
    return lambda: prefill_attention(cache, q_TQD, batch, spec)


def check(out_TQD: Tensor, expected_TQD: Tensor) -> None:
    """Figures of wrong results are worthless. Raises ArithmeticError beyond bf16's own rounding."""
    error = ((out_TQD.float() - expected_TQD.float()).norm() / expected_TQD.float().norm()).item()
    if not error < 5e-3:
        raise ArithmeticError(
            f"attention is off by {error:.2g} of its norm from the reference; run its tests first"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} threads, {cpu.backend()}"
    )
    print(f"torch {torch.__version__}, {args.device}: {where}")
    rows = compare(Shape(B=8, L=2048, rows=1), POLICIES, args.device, args.rounds)
    for length in (512, 2048):
        rows += compare(
            Shape(B=1, L=length, rows=512), ("bf16", "int8", "int4"), args.device, args.rounds // 2
        )
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
