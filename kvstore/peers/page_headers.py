"""The header that travels behind each page: which block it holds, in which layout, and its checksum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quire.kvstore.books.keys import KEY_BYTES, BlockKey

PageHeaders = npt.NDArray[np.int64]
"""[pages, words]: the words of one header per page, see `_HEADER`."""

_HEADER = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("layout", "V32"),
        ("first_head", "<u2"),
        ("heads", "<u2"),
        ("version", "<u4"),
        ("generation", "<u8"),
        ("checksum", "<i8"),
        ("unused", "<u8"),
    ]
)
HEADER_BYTES = _HEADER.itemsize
_WORD = 8
CHECKSUM_WORD = _HEADER.fields["checksum"][1] // _WORD  # type: ignore[index]
_VERSION = 3


def page_headers(
    keys: tuple[BlockKey, ...], layout: bytes, heads: tuple[int, int], generations: tuple[int, ...]
) -> PageHeaders:
    """Build the headers of these pages, with all checksums 0. `heads`: the first head and how many."""
    headers = np.zeros(len(keys), dtype=_HEADER)
    headers["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
    headers["layout"] = np.void(layout)
    headers["first_head"], headers["heads"] = heads
    headers["version"] = _VERSION
    headers["generation"] = generations
    return headers.view(np.int64).reshape(len(keys), HEADER_BYTES // _WORD)


def header_part(word: int) -> str:
    """Name the field of a header that this word belongs to."""
    assert _HEADER.names is not None
    assert _HEADER.fields is not None
    starts = {name: _HEADER.fields[name][1] // _WORD for name in _HEADER.names}
    if word == starts["first_head"]:
        return "head range or version"
    return [name for name, start in starts.items() if start <= word][-1]
