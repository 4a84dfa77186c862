"""Small files of a training that appear whole, and what differs between two records."""

import contextlib
import os
from pathlib import Path
from typing import Any

from mmc.store.errors import MmcError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all: beside it, synced, then renamed.

    Raises:
        MmcError: the disk is full or not ours to write.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise MmcError(f"cannot write {path}: {reason}; make room or rights, then go on") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """``key: before -> now`` of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            line
            for key in keys
            for line in differences(
                before.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if before == now else [f"{name}: {before} -> {now}"]
