"""What an interrupted captioning has done: a file beside the table, removed when that is written.

The first line says from what and how the captions were made; each further line is one picture:
``{"key": …, "caption": …}`` or ``{"key": …, "failed": reason}``. Lines are appended batch by batch
and synced; what a killed run left half written at the end is cut off.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from mmc.store.errors import InputError, MmcError

SUFFIX = ".journal"


class Journal:
    """The captions of pictures by content key; see :func:`open_journal`."""

    def __init__(
        self, path: Path, file: BinaryIO, captions: dict[str, str], failed: dict[str, str]
    ) -> None:
        self._path = path
        self._file = file
        self.captions = captions
        self.failed = failed
        """Reasons of pictures that cannot be used."""

    def add(self, captions: dict[str, str], failed: dict[str, str]) -> None:
        """Take the results of one batch, and have them on disk."""
        lines = [{"key": key, "caption": caption} for key, caption in captions.items()]
        lines += [{"key": key, "failed": reason} for key, reason in failed.items()]
        _append(self._file, lines)
        self.captions |= captions
        self.failed |= failed

    def remove(self) -> None:
        """Its captions are in the table now."""
        self._file.close()
        self._path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self.captions or key in self.failed


@contextmanager
def open_journal(path: Path, made_by: dict[str, Any], *, overwrite: bool) -> Iterator[Journal]:
    """The journal at ``path``, continued where it was made by the same, else begun.

    Args:
        path: of the file; a lock lies beside it while it is open.
        made_by: JSON-able; all that decides the captions.
        overwrite: begin anew where it was made otherwise.

    Raises:
        InputError: it was made otherwise, or is no journal.
        MmcError: another process holds it.
    """
    lock = filelock.FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise MmcError(f"{path} is being written by another process; wait until it ends") from None
    try:
        good, captions, failed = _read(path, made_by, overwrite=overwrite)
        with open(path, "r+b" if good else "w+b") as file:
            file.truncate(good)
            file.seek(good)
            if not good:
                _append(file, [{"made_by": made_by}])
            yield Journal(path, file, captions, failed)
    finally:
        # Before it is let go: nobody can hold the file that is removed.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _append(file: BinaryIO, lines: Iterable[dict[str, Any]]) -> None:
    file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def _read(
    path: Path, made_by: dict[str, Any], *, overwrite: bool
) -> tuple[int, dict[str, str], dict[str, str]]:
    """Bytes that are whole lines (0 = begin anew), captions and reasons by key."""
    captions: dict[str, str] = {}
    failed: dict[str, str] = {}
    good = 0
    if not path.exists():
        return good, captions, failed
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        entry = _entry(line)
        if entry is None:
            break
        if number == 0:
            before = entry.get("made_by")
            if before != made_by:
                if overwrite:
                    return 0, {}, {}
                raise InputError(
                    f"{path} was made otherwise ({_differing(before, made_by)}): the same settings "
                    "as before continue it, --overwrite begins anew"
                )
        elif "caption" in entry:
            captions[entry["key"]] = entry["caption"]
        else:
            failed[entry["key"]] = entry["failed"]
        good += len(line)
    return good, captions, failed


def _entry(line: bytes) -> dict[str, Any] | None:
    """A whole line; None for one that is not."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and ("made_by" in entry or "key" in entry)
    return entry if known else None


def _differing(before: Any, now: dict[str, Any], prefix: str = "") -> str:
    """The names of what differs."""
    if not isinstance(before, dict):
        return "it is no journal of captions"
    names = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict) and one != other:
            names.append(_differing(one, other, f"{prefix}{key}."))
        elif one != other:
            names.append(f"{prefix}{key}")
    return ", ".join(names)
