"""A model's tokenizer as the files beside its weights: what gateways get to make prompts with.

They come from the replicas and from nowhere else, so that a prompt is made for the very model that reads it,
also while one model replaces another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from quire.replicas.errors import ConfigError

_ONE_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")
_KINDS = ("*.json", "*.jinja", "*.model", "*.txt")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _ONE_OF)


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """All that a tokenizer may be read from, by file name. Raises ConfigError if there is none."""
    if not has_tokenizer(folder):
        raise ConfigError(
            f"{folder} holds no tokenizer. Gateways need tokenizer.json and tokenizer_config.json beside the "
            "model's weights"
        )
    paths = sorted(path for kind in _KINDS for path in folder.glob(kind))
    return {path.name: path.read_bytes() for path in paths if not path.name.endswith(".index.json")}


def digest_of(files: Mapping[str, bytes]) -> bytes:
    """32 bytes that differ where a name or a content does."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()
