"""What the kernel knows of the store's threads."""

import os
import threading

import pytest

from quire.kvstore.wire.threads import use_batch_scheduling

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="scheduling policies are Linux's")


def test_a_thread_gives_way_with_those_that_it_starts_and_no_other():
    seen = []

    def work():
        use_batch_scheduling()
        below = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        below.start()
        below.join()
        seen.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [os.SCHED_BATCH, os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_where_it_cannot_be_said_the_thread_goes_on(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    use_batch_scheduling()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
