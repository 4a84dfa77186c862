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
