"""One writer at a time per store and alias: a kernel lock, which goes with its owner's death.

Object stores have no locks: there it is up to the caller that only one process writes an alias.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import filelock

from mmc.store.errors import StoreLockedError
from mmc.store.files import Files, LocalFiles

SAMPLES_LOCK = ".lock"
"""Held while samples.parquet is replaced, and for a moment while a writer opens."""

WAIT_SECONDS = 10.0
"""How long to wait for the samples lock, which is held only briefly."""


def alias_lock(alias: str) -> str:
    """Name of an alias's lock."""
    return f".lock-{alias}"


@contextlib.contextmanager
def held(files: Files, name: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock of the store.

    Raises:
        StoreLockedError: another process (or writer of this one) holds it.
    """
    if not isinstance(files, LocalFiles):
        yield
        return
    lock = filelock.FileLock(files.path(name), thread_local=False)
    owner = files.path(name.replace(".lock", ".owner", 1))
    try:
        lock.acquire(timeout=wait, poll_interval=0.02)
    except filelock.Timeout:
        raise StoreLockedError(
            f"{files.where(name)} is held by {_owner(owner)}; wait until it is done, or end it"
        ) from None
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: os.PathLike[str]) -> str:
    try:
        with open(path) as file:
            data = json.load(file)
        return f"process {data['pid']} on {data['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def exclusive(files: Files) -> Iterator[None]:
    """Hold the samples lock and the lock of every alias: nobody else writes anything.

    A writer opens under the samples lock, so no alias can get a writer in the meantime.

    Raises:
        StoreLockedError: somebody writes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(files, SAMPLES_LOCK, wait=WAIT_SECONDS))
        if isinstance(files, LocalFiles):
            for name in files.names(""):
                if name.startswith(f"{SAMPLES_LOCK}-"):
                    stack.enter_context(held(files, name))
        yield
