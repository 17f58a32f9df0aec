"""Random paged caches and batches for comparing operations on pages with their references.

Everything unwritten is poison: a slot that no token was written to holds 0xFF bytes, which read as NaN in
every float and scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from side_formats import SIDES
from torch import Tensor

from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.formats import KVFormat, LayerFormat, Scales
from quire.kernels.layout import PageLayout
from quire.kernels.ref.paged import attend_ref, write_kv_ref
from quire.kernels.transform import SideTransform, default_transform


@dataclass(frozen=True)
class Case:
    """`fields` of a comparison: formats by name, or spelled out; lengths of the sequences after the step."""

    k: str | KVFormat
    v: str | KVFormat
    kv_tokens: Sequence[int]
    query_tokens: Sequence[int]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_tokens: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    layer: int = 1
    seed: int = 0

    def __str__(self) -> str:
        sides = "-".join(f if isinstance(f, str) else f"{f.codes}g{f.group}" for f in (self.k, self.v))
        extra = f"-w{self.window}" * bool(self.window) + f"-cap{self.softcap}" * bool(self.softcap)
        return f"{sides}-d{self.head_dim}-p{self.page_tokens}-g{self.group}-q{max(self.query_tokens)}{extra}"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)


@dataclass(frozen=True)
class Step:
    """A cache that holds every token of its sequences, and the step's inputs."""

    cache: LayerCache
    batch: PagedBatch
    spec: AttentionSpec
    q_TQD: Tensor
    k_LHD: Tensor
    """All tokens written, of all sequences, with `slots_L` of where."""
    v_LHD: Tensor
    slots_L: Tensor

    def expected(self) -> Tensor:
        """The attention of the reference in fp64, [T, Q, D]."""
        return attend_ref(self.cache, self.q_TQD, self.batch, self.spec, torch.float64)

    def to(self, device: str) -> Step:
        cache, batch = self.cache, self.batch
        return replace(
            self,
            cache=replace(
                cache,
                pool_NB=cache.pool_NB.to(device),
                k_transform=cache.k_transform.of_heads(slice(None), torch.device(device)),
                v_transform=cache.v_transform.of_heads(slice(None), torch.device(device)),
            ),
            batch=replace(
                batch,
                query_start_S1=batch.query_start_S1.to(device),
                kv_tokens_S=batch.kv_tokens_S.to(device),
                page_table_SM=batch.page_table_SM.to(device),
                slots_T=batch.slots_T.to(device),
            ),
            q_TQD=self.q_TQD.to(device),
            k_LHD=self.k_LHD.to(device),
            v_LHD=self.v_LHD.to(device),
            slots_L=self.slots_L.to(device),
        )


def make_step(case: Case, *, written: bool = True) -> Step:
    """A poisoned pool, random pages in random order; K with outlier channels, as models have."""
    torch.manual_seed(case.seed)
    k_format, v_format = (SIDES[f] if isinstance(f, str) else f for f in (case.k, case.v))
    layers = (LayerFormat(SIDES["int8"], SIDES["int4"]), LayerFormat(k_format, v_format))
    layout = PageLayout(layers, case.kv_heads, case.head_dim, case.page_tokens)
    pages_S = [-(-n // case.page_tokens) for n in case.kv_tokens]
    pool_NB = torch.full((sum(pages_S) + 2, layout.page_bytes), 0xFF, dtype=torch.uint8)
    order = torch.randperm(len(pool_NB))[: sum(pages_S)].split(pages_S)
    table_SM = torch.full((len(pages_S), max(pages_S) + 1), 2**30, dtype=torch.int32)
    for s, pages in enumerate(order):
        table_SM[s, : len(pages)] = pages
    slots = [
        (pages[:, None] * case.page_tokens + torch.arange(case.page_tokens)).flatten()[:n]
        for pages, n in zip(order, case.kv_tokens, strict=True)
    ]
    total = sum(case.kv_tokens)
    outliers_HD = 1 + 4 * torch.rand(case.kv_heads, case.head_dim) ** 4
    k_LHD = (torch.randn(total, case.kv_heads, case.head_dim) * outliers_HD + 0.3).to(case.dtype)
    v_LHD = torch.randn(total, case.kv_heads, case.head_dim).to(case.dtype)
    cache = LayerCache(
        pool_NB, layout, case.layer, _transform(k_format, k_LHD, case), _transform(v_format, v_LHD, case)
    )
    batch = PagedBatch(
        query_start_S1=torch.tensor([0, *case.query_tokens]).cumsum(0).int(),
        kv_tokens_S=torch.tensor(case.kv_tokens, dtype=torch.int32),
        page_table_SM=table_SM,
        slots_T=torch.cat([s[len(s) - n :] for s, n in zip(slots, case.query_tokens, strict=True)]),
        max_query_tokens=max(case.query_tokens),
        max_kv_tokens=max(case.kv_tokens),
    )
    q_TQD = torch.randn(sum(case.query_tokens), case.kv_heads * case.group, case.head_dim).to(case.dtype)
    if written:
        write_kv_ref(cache, k_LHD, v_LHD, torch.cat(slots))
    return Step(cache, batch, case.spec, q_TQD, k_LHD, v_LHD, torch.cat(slots))


def make_scaled_step(case: Case, *, written: bool = True) -> Step:
    """Keys beyond fp16 and tiny values, each head of its own magnitude, with static scales that undo it."""
    step = make_step(case, written=False)
    head_HD = torch.arange(case.kv_heads, dtype=torch.float32)[:, None].expand(-1, case.head_dim)
    k_HD, v_HD = 2.0 ** (16 - 4 * head_HD), 2.0 ** (4 * head_HD - 20)
    cache = replace(
        step.cache,
        k_transform=replace(step.cache.k_transform, scale_HD=k_HD),
        v_transform=replace(step.cache.v_transform, scale_HD=v_HD),
    )
    k_LHD, v_LHD = (step.k_LHD * k_HD).to(case.dtype), (step.v_LHD * v_HD).to(case.dtype)
    q_TQD = (step.q_TQD / k_HD.repeat_interleave(case.group, 0)).to(case.dtype)
    if written:
        write_kv_ref(cache, k_LHD, v_LHD, step.slots_L)
    return replace(step, cache=cache, q_TQD=q_TQD, k_LHD=k_LHD, v_LHD=v_LHD)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """|out - expected| / |expected|, NaN if any number is."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return ((out - expected).norm() / expected.norm()).item()


def _transform(fmt: KVFormat, x_LHD: Tensor, case: Case) -> SideTransform:
    """The default transform; static scales are calibrated on the numbers. No shift under a soft-cap."""
    if fmt.scales is not Scales.STATIC or fmt.codes.value == "fp8":
        return default_transform(fmt)
    x = x_LHD.float()
    shift_HD = None if case.softcap else x.mean(0)
    top = 127 if fmt.codes.value == "int8" else 7
    spread_HD = (x if shift_HD is None else x - shift_HD).abs().amax(0)
    return SideTransform(shift_HD=shift_HD, scale_HD=spread_HD / top)
