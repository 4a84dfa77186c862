"""Progress lines off a terminal, a bar on one."""

import io

import pytest

from mmc.extract import progress as module
from mmc.extract.progress import Progress


def test_off_a_terminal_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in (0, 100, 220, 230, 600):
            progress("encode", done, 1200)
    assert stream.getvalue().splitlines() == [
        "encode: 220/1,200, 20.0/s, 49 s left",
        "encode: 600/1,200, 20.0/s, 30 s left",
    ]


def test_on_a_terminal_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress("encode", 3, 10)
        assert progress._bars is not None
        progress._bars.refresh()
    assert "encode" in stream.getvalue()
    assert "3/10" in stream.getvalue()


def test_a_stage_that_waits_or_is_through_prints_nothing(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream) as progress:
        for second in range(100):
            now[0] = float(second)
            progress("images", min(second, 40), 40)
            progress("texts", max(0, 10 * (second - 40)), 600)
    assert stream.getvalue().splitlines() == [
        "images: 10/40, 1.0/s, 30 s left",
        "images: 20/40, 1.0/s, 20 s left",
        "images: 30/40, 1.0/s, 10 s left",
        "images: 40/40, 1.0/s, 0 s left",
        "texts: 100/600, 10.0/s, 50 s left",
        "texts: 200/600, 10.0/s, 40 s left",
        "texts: 300/600, 10.0/s, 30 s left",
        "texts: 400/600, 10.0/s, 20 s left",
        "texts: 500/600, 10.0/s, 10 s left",
    ]


def test_without_stderr_nothing_is_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.sys, "stderr", None)
    with Progress() as progress:
        for done in (0, 5, 10):
            progress("encode", done, 10)
