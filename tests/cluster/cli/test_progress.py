"""What is shown of a start that takes long: a line that moves on a terminal, few plain lines elsewhere."""

import io

import pytest

from quire.cluster.cli.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_plain_lines_come_with_a_new_phase_and_now_and_then(clock):
    out = io.StringIO()
    progress = Progress(out, clock)
    progress("starting Ray")
    clock.now_s += 4
    for done in range(9):
        progress(f"loading weights: {done}/9 tensors")
    clock.now_s += 14
    progress.draw()
    clock.now_s += 1
    progress.draw()
    progress.say("serving demo")
    progress.draw()
    assert out.getvalue().splitlines() == [
        "   0 s  starting Ray",
        "   4 s  loading weights: 0/9 tensors",
        "  19 s  loading weights: 8/9 tensors",
        "serving demo",
    ]


def test_a_terminals_line_is_redrawn_with_the_seconds_and_leaves_no_trace(clock):
    out = Terminal()
    progress = Progress(out, clock)
    progress("starting Ray")
    clock.now_s += 1
    progress.draw()
    progress.say("serving demo")
    drawn = out.getvalue().split("\r\x1b[K")[1:]
    assert drawn == ["   0 s  starting Ray", "   1 s  starting Ray", "serving demo\n"]


def test_a_line_never_wraps_for_then_it_could_not_be_cleared(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    Progress(out, clock)("Deployment 'Replica' waits for resources " * 9)
    assert max(map(len, out.getvalue().split("\r\x1b[K"))) == 39


def test_it_moves_by_itself_until_the_end():
    """Nobody but its own thread draws here, again and again."""
    out = Terminal()
    clock = Clock()
    with Progress(out, clock) as progress:
        progress("starting Ray")
        drawn = out.getvalue().count("starting Ray")
        while out.getvalue().count("starting Ray") == drawn:
            clock.now_s += 1
    assert out.getvalue().endswith("\r\x1b[K")
