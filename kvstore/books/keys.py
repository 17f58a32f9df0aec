"""The names of blocks: a chained 256-bit hash over everything that decides a block's bytes.

A key depends on the layout, the model, the static transforms, the tenant and all tokens up to the block's
end; not on the process, a seed or the tensor-parallel size. Two blocks with one key hold the same KV.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np

BlockKey = NewType("BlockKey", bytes)

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeySpace:
    """The fingerprints that all blocks of one model share; blocks of different key spaces never mix."""

    layout: bytes
    """Fingerprint of the page layout (`PageLayout.fingerprint`)."""
    model: bytes
    """Fingerprint of the weights and their config."""
    transforms: bytes
    """Fingerprint of the static transforms and their calibration."""

    @property
    def fingerprint(self) -> bytes:
        """Return 32 bytes that identify the key space: equal prompts have equal KV and answers in it."""
        return self.root()

    def root(self, tenant: str = "") -> BlockKey:
        """Return the parent of a tenant's first blocks. Length prefixes keep fields apart."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"quire-root")
        for part in (self.layout, self.model, self.transforms, tenant.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return BlockKey(digest.digest())


def extend_chain(parent: BlockKey, tokens: Sequence[int], page_tokens: int) -> list[BlockKey]:
    """Return the keys of the full blocks of `tokens`, which follow `parent`; a partial block has none."""
    words = np.asarray(tokens, dtype="<u4")
    keys = []
    for start in range(0, len(words) - page_tokens + 1, page_tokens):
        digest = hashlib.blake2b(parent, digest_size=KEY_BYTES, person=b"quire-block")
        digest.update(words[start : start + page_tokens].tobytes())
        parent = BlockKey(digest.digest())
        keys.append(parent)
    return keys
