"""Where every cell is in a page.

A page is `[kv head][layer] cell`, a cell `[K codes | K scales | V codes | V scales]`. Sections are aligned
to 16 bytes, a head's run of cells to 128, so that the page of a tensor-parallel shard is a contiguous
byte range of the page of the whole model. Knows numbers, no tensors.

    K codes   [token][d]                    int4: [token][d/2], byte j = element j | element j + d/2 << 4
    V codes   [d][token] (16 bits and more: [token][d]; int4: [d/2][token])
    scales    [group][token]                fp16; int4: (fp16 scale, fp16 integer zero) as one 32-bit word
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from functools import cached_property

from quire.kernels.formats import Codes, FormatError, KVFormat, LayerFormat

LAYOUT_VERSION = 1
"""Part of every block key: raise it when the meaning of a page's bytes changes."""

PAGE_TOKENS = (16, 32, 64)
_SECTION_ALIGN = 16
_HEAD_ALIGN = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """Byte offsets of one layer's sections from the start of a head's run of cells."""

    k_codes: int
    k_scales: int
    v_codes: int
    v_scales: int
    end: int


@dataclass(frozen=True)
class PageLayout:
    """Where everything is in a page of one shard."""

    layers: tuple[LayerFormat, ...]
    kv_heads: int
    """KV heads of this shard."""
    head_dim: int
    page_tokens: int = 64

    def __post_init__(self) -> None:
        if self.page_tokens not in PAGE_TOKENS:
            raise FormatError(f"page_tokens is one of {PAGE_TOKENS}, got {self.page_tokens}")
        if self.head_dim % 16 or self.head_dim <= 0:
            raise FormatError(f"head_dim {self.head_dim} is not a multiple of 16")
        if self.kv_heads <= 0 or not self.layers:
            raise FormatError("a page needs at least one kv head and one layer")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """One cell a layer: offsets are prefix sums, because formats may differ by layer."""
        cells, at = [], 0
        for layer in self.layers:
            k_scales = _aligned(at + self.codes_bytes(layer.k))
            v_codes = _aligned(k_scales + self.scales_bytes(layer.k))
            v_scales = _aligned(v_codes + self.codes_bytes(layer.v))
            end = _aligned(v_scales + self.scales_bytes(layer.v))
            cells.append(Cell(at, k_scales, v_codes, v_scales, end))
            at = end
        return tuple(cells)

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one kv head's cells: the stride between heads."""
        return _aligned(self.cells[-1].end, _HEAD_ALIGN)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, padding included: the stride between pages."""
        return self.kv_heads * self.head_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in this shard's pool, scales and padding included."""
        return self.page_bytes / self.page_tokens

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that differ when a block's bytes would be read differently.

        Independent of `kv_heads`: shards of different tensor-parallel sizes hold slices of one block.
        """
        text = repr((LAYOUT_VERSION, self.head_dim, self.page_tokens, [astuple(f) for f in self.layers]))
        return hashlib.blake2b(text.encode(), digest_size=32).digest()

    def codes_bytes(self, fmt: KVFormat) -> int:
        """Bytes of one side's codes in a cell."""
        return self.page_tokens * self.head_dim * fmt.codes.bits // 8

    def scales_bytes(self, fmt: KVFormat) -> int:
        """Bytes of one side's dynamic scales in a cell."""
        return self.page_tokens * fmt.groups(self.head_dim) * fmt.scale_bytes

    def uses(self, codes: Codes) -> bool:
        """Tell whether any layer and side is stored as `codes`."""
        return any(codes in (layer.k.codes, layer.v.codes) for layer in self.layers)


def _aligned(size: int, to: int = _SECTION_ALIGN) -> int:
    return (size + to - 1) // to * to
