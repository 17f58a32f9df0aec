"""Page headers say what a page holds, and tell which part of it is wrong."""

from __future__ import annotations

import pytest

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.page_headers import CHECKSUM_WORD, HEADER_BYTES, header_part, page_headers

KEYS = (BlockKey(bytes(range(32))), BlockKey(b"\0" * 32))


def test_headers_are_small_and_every_word_of_them_has_a_name():
    headers = page_headers(KEYS, b"\2" * 32, (2, 4), (8, 9))
    assert headers.nbytes == 2 * HEADER_BYTES == 192
    assert headers[0, :4].tobytes() == KEYS[0]
    assert headers[:, CHECKSUM_WORD].tolist() == [0, 0]
    for word, part in ((0, "key"), (3, "key"), (4, "layout"), (9, "generation"), (10, "checksum")):
        assert header_part(word) == part


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"keys": KEYS[::-1]}, "key"),
        ({"layout": b"\3" * 32}, "layout"),
        ({"heads": (3, 4)}, "head range or version"),
        ({"heads": (2, 5)}, "head range or version"),
        ({"generations": (8, 10)}, "generation"),
    ],
)
def test_headers_differ_where_what_they_say_differs(other, part):
    said = {"keys": KEYS, "layout": b"\2" * 32, "heads": (2, 4), "generations": (8, 9)}
    different = page_headers(**said) != page_headers(**{**said, **other})
    assert {header_part(word) for word in different.nonzero()[1]} == {part}
