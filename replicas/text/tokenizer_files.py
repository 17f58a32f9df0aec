"""A model's tokenizer as the files beside its weights, which gateways get from replicas.

Gateways get them from nowhere else, so that a prompt is tokenized for the model that computes it, even while
one model replaces another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quire.replicas.errors import ConfigError, ModelNotServable
from quire.replicas.model.checkpoint import read_json

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
"""Usually, any one of them is a tokenizer."""

_COMPANIONS = (
    "tokenizer.*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "config.json",
)
"""Files that transformers reads with a vocabulary; config.json names the tokenizer's class."""

_MAX_BYTES = 60 << 20
"""The most bytes of all files: gateways get them in one message of at most 64 MiB (`service.py`)."""


def has_tokenizer(folder: Path) -> bool:
    return bool(_matching(folder, _VOCABULARIES))


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """Read the files of a tokenizer, by their paths in the folder.

    Raises: ConfigError if there is none or it is too large, ModelNotServable if a file cannot be read.
    """
    if not has_tokenizer(folder):
        raise ConfigError(
            f"{folder} holds no tokenizer. Gateways need tokenizer.json and tokenizer_config.json beside the "
            "model's weights"
        )
    paths = _matching(folder, (*_VOCABULARIES, *_COMPANIONS))
    sizes = {path: path.stat().st_size for path in paths}
    if sum(sizes.values()) > _MAX_BYTES:
        largest = max(paths, key=lambda path: sizes[path])
        raise ConfigError(
            f"the tokenizer in {folder} has {sum(sizes.values()):,} bytes, {sizes[largest]:,} of them in "
            f"{largest.name}; gateways take {_MAX_BYTES:,}. Keep tokenizer.json and tokenizer_config.json, "
            "and remove what the tokenizer does not need"
        )
    try:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        raise ModelNotServable(f"a file of the tokenizer cannot be read: {error}") from error


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Open the tokenizer in a model's folder; None if there is none, as with test models.

    Raises ModelNotServable where it cannot be read or has no `tokenizer.json` form, which text needs.
    """
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower one
        raise ModelNotServable(_damage(folder, error)) from error
    fast_tokenizer(tokenizer)
    return tokenizer


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelNotServable(
            f"{type(tokenizer).__name__} has no tokenizer.json form; convert it with convert_slow_tokenizer"
        )
    return backend


def _damage(folder: Path, error: Exception) -> str:
    """Find the file that caused an error of transformers', which rarely says."""
    paths = _matching(folder, (*_VOCABULARIES, *_COMPANIONS))
    for path in paths:
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix in (".jinja", ".txt"):
                path.read_text(encoding="utf-8")
        except ModelNotServable as damaged:
            return str(damaged)
        except (OSError, UnicodeDecodeError) as damaged:
            return f"{path} is damaged or cannot be read ({damaged}); copy or download it again"
    whole = folder / "tokenizer.json"
    if whole in paths:
        try:
            Tokenizer.from_file(str(whole))
        except Exception as damaged:  # as above
            return f"{whole} is no tokenizer ({damaged}); copy or download it again"
    names = ", ".join(path.relative_to(folder).as_posix() for path in paths)
    return f"transformers cannot make a tokenizer of {names} in {folder}: {error}"


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def digest_of(files: Mapping[str, bytes]) -> bytes:
    """Return 32 bytes that depend on all names and contents."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()
