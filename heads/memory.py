"""How much memory training data may take, and whether it fits."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mmc.heads.launch import launched_here
from mmc.store.errors import InputError

SHARE = {"cpu": 0.5}
"""Of what is free; the rest is for the page cache, the head and its gradients."""
SHARE_ELSEWHERE = 0.75

VAL_SHARE = 0.25
"""Of the budget, at most, for validation rows where training rows are streamed."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.I)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of ``8G``, ``500 MB`` or ``1073741824`` (units of 1,024).

    Raises:
        InputError: not a size, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * 1024 ** _UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size of memory; write it as 8G or 500M")
    return size


def shown(size: float) -> str:
    """Bytes for people."""
    power = min(int(math.log(max(size, 1), 1024)), 4)
    digits = 1 if power else 0
    return f"{size / 1024**power:.{digits}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def allowed(device: torch.device) -> int:
    """Bytes that training data may take on ``device`` unless the user says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_ELSEWHERE)
    free = min(psutil.virtual_memory().available, _container_free())
    return int(free * SHARE.get(device.type, SHARE_ELSEWHERE)) // launched_here()


def _container_free() -> float:
    """What is left of the memory that a container may use; infinite outside of one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cache = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        ).get("file", "0")
    except (OSError, ValueError):
        return float("inf")
    return limit - used + int(cache)


@dataclass(frozen=True)
class Plan:
    """What of the training data is in memory."""

    window_rows: int
    """Training rows in a window; 0: all rows are in memory at once."""
    val_rows: int
    """Validation rows in memory; fewer than there are: all are read again for each validation."""
    needed: int
    """Bytes that everything would take."""
    budget: int
    """Bytes that it may take."""


def plan(
    *,
    train: tuple[int, int],
    val: tuple[int, int],
    targets: int,
    budget: int,
    batch_size: int,
    windows: float,
) -> Plan:
    """Keep everything in memory if it fits, else stream the training rows.

    Args:
        train, val: rows, and bytes of a prepared row.
        targets: bytes of a row's targets, which are in memory in any case.
        budget: bytes for all of them.
        batch_size: a window is never smaller.
        windows: how many windows' worth of rows is in memory at a time.
    """
    rows = train[0] + val[0]
    needed = train[0] * train[1] + val[0] * val[1] + rows * targets
    if needed <= budget:
        return Plan(0, val[0], needed, budget)
    left = max(budget - rows * targets, 0)
    val_rows = min(val[0], int(left * VAL_SHARE) // max(val[1], 1))
    room = left - val_rows * val[1]
    window = max(int(room / (windows * max(train[1] + targets, 1))), batch_size)
    return Plan(min(window, train[0]), val_rows, needed, budget)


def describe(place: Plan) -> str:
    """A line for the user."""
    return (
        f"the data needs {shown(place.needed)} and may take {shown(place.budget)} (--max-memory): "
        f"it is streamed, {place.window_rows:,} rows shuffled at a time"
    )
