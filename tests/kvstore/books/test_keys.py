import subprocess
import sys

import pytest

from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain

_ROOT = {"layout": b"layout", "model": b"model", "transforms": b"transforms", "tenant": "a"}


def root_key(*, layout: bytes, model: bytes, transforms: bytes, tenant: str = "") -> BlockKey:
    return KeySpace(layout, model, transforms).root(tenant)


@pytest.mark.parametrize(
    "change", [{"layout": b"x"}, {"model": b"x"}, {"transforms": b"x"}, {"tenant": "b"}, {"tenant": ""}]
)
def test_everything_that_decides_the_bytes_is_in_the_key(change):
    assert root_key(**_ROOT) != root_key(**(_ROOT | change))


def test_fields_do_not_run_together():
    one, other = ({"layout": b"ab", "model": b"c"}, {"layout": b"a", "model": b"bc"})
    assert root_key(**one, transforms=b"") != root_key(**other, transforms=b"")


def test_a_key_covers_all_tokens_before_it():
    root = root_key(**_ROOT)
    tokens = list(range(96))
    a = extend_chain(root, tokens, 32)
    b = extend_chain(root, [7, *tokens[1:]], 32)
    assert len(a) == 3
    assert all(x != y for x, y in zip(a, b, strict=True))
    assert extend_chain(root, [*tokens[:-1], 7], 32)[:2] == a[:2]


def test_only_full_blocks_have_keys_and_chains_can_be_continued():
    root = root_key(**_ROOT)
    tokens = list(range(50))
    keys = extend_chain(root, tokens, 16)
    assert len(keys) == 3
    assert extend_chain(keys[0], tokens[16:], 16) == keys[1:]
    assert extend_chain(root, tokens[:15], 16) == []


def test_keys_are_the_same_in_every_process():
    code = (
        "from quire.kvstore.books.keys import *;"
        "print(extend_chain(KeySpace(b'l', b'm', b't').root(), range(16), 16)[0].hex())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    root = root_key(layout=b"l", model=b"m", transforms=b"t")
    assert runs == {extend_chain(root, range(16), 16)[0].hex() + "\n"}
