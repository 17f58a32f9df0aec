"""The store that process groups are built on."""

import psutil

from quire.kvstore.wire.groups import host_store

HOST = "127.0.0.1"


def test_the_store_listens_nowhere_but_at_its_host():
    store = host_store(HOST, 5)
    at = {
        c.laddr.ip
        for c in psutil.Process().net_connections()
        if c.status == "LISTEN" and c.laddr.port == store.port
    }
    assert at == {HOST}
