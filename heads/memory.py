"""How much memory training data may take, and whether it fits."""

import bisect
import ctypes
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import torch

from mmc.heads import batches
from mmc.heads.batches import BLOCK_BYTES, BLOCKS_PER_WINDOW, MOST_READERS, WINDOWS
from mmc.heads.launch import launched_here
from mmc.store.errors import InputError

SHARE = {"cpu": 0.5}
"""Of what is free; the rest is for the page cache, the head and its gradients."""
SHARE_ELSEWHERE = 0.75

VAL_SHARE = 0.25
"""Of what is left, at most, for validation rows where training rows are streamed."""

BUFFERS = 3
"""Batches in memory at most: one that is used, one that waits, one that is being filled."""
BLOCKS_PER_BUDGET = 64
TILES_PER_BUDGET = 128
"""So that what threads read and prepare stays a small part of a small budget."""
LEAST_TILE, LEAST_BLOCK = 128 << 10, 256 << 10
"""Smaller ones cost more in calls than in work."""
TILE_COPIES = 4
"""What preparing takes of memory, in tiles: the fields as stored and as float32, and what is made
of them."""
SCORES = 8
"""What validation takes of memory, in matrices of logits: the logits in blocks and in one piece,
and what the loss and the metrics make of them."""
ORDER_BYTES = 24
"""Of a row whose place in the order is drawn: that, and the row's number."""
ROW_BYTES = 8
"""Of the number of a row."""

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
    return int(free() * SHARE.get(device.type, SHARE_ELSEWHERE)) // launched_here()


def free() -> int:
    """Bytes of memory that this machine, or container, has left."""
    return int(min(psutil.virtual_memory().available, _container_free()))


def give_back() -> None:
    """Return to the system what was freed and is kept for later: tables of samples are read once.

    pyarrow keeps all of it; glibc what it took in pieces of up to 32 MiB.
    """
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training reads and makes of it, in rows and bytes."""

    train_rows: int
    """0: nothing is trained."""
    val_rows: int
    batch_size: int
    stored: int
    """Of a row of all fields, as they are stored."""
    prepared: int
    """Of a prepared training row."""
    val_prepared: int
    """Of a prepared validation row."""
    target: int
    """Of the targets of a row in a batch."""
    labels: int
    """Of the labels and targets of all rows, which are in memory in any case."""
    score: int
    """Of the logits of a validation row."""
    tile: int
    """Of what is best prepared at a time, as float32."""
    processes: int = 1
    """That share the training rows."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of the training data is in memory."""

    needs: Needs
    budget: int
    """Bytes that it may take."""
    resident: int
    """Bytes that it would take with all rows in memory."""
    window_rows: int = 0
    """Training rows in a window; 0: all rows are in memory at once, prepared."""
    val_streamed: bool = False
    """Whether the validation rows are read again for each validation."""
    buffers: int = 1
    """Batches: one that is used, and those that are prepared meanwhile, where rows are streamed."""
    tile: int
    """Bytes that are prepared at a time, as float32."""
    block: int
    """Bytes that a thread reads at a time, as they are stored."""

    @property
    def parts(self) -> dict[str, int]:
        """What takes how many bytes, at most."""
        needs = self.needs
        rows = -(-needs.train_rows // needs.processes)
        block = max(self.block, batches.MIN_BLOCK_ROWS * needs.stored)
        if self.window_rows:
            window = -(-max(self.window_rows, batches.MIN_BLOCK_ROWS) // needs.processes)
            if needs.processes > 1:  # of each block it may have a row more than the others
                window += BLOCKS_PER_WINDOW
            windows = 1 if self.window_rows >= needs.train_rows else WINDOWS
            train = windows * min(window, needs.train_rows) * needs.stored
            order = ORDER_BYTES * self.window_rows
        else:
            train, order = rows * needs.prepared, ORDER_BYTES * needs.train_rows
        val = needs.val_rows * needs.val_prepared
        if self.val_streamed:
            val = (MOST_READERS + 2) * block * needs.val_prepared // max(needs.stored, 1)
        batch = min(needs.batch_size, needs.train_rows)
        return {
            "labels": needs.labels + ROW_BYTES * (needs.train_rows + needs.val_rows),
            "training rows": train + order,
            "batches": self.buffers * batch * (needs.prepared + needs.target),
            "validation rows": val,
            "scores of validation rows": SCORES * needs.val_rows * needs.score,
            "reading": MOST_READERS * block,
            # A row is prepared whole; as float32 it may be twice as large as it is stored.
            "preparing": MOST_READERS * TILE_COPIES * max(self.tile, 2 * needs.stored),
        }

    @property
    def streamed(self) -> bool:
        """Whether rows are read again while training."""
        return self.window_rows > 0 or self.val_streamed

    @property
    def bytes(self) -> int:
        """Of everything that is planned."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.bytes <= self.budget


def plan(needs: Needs, budget: int) -> Plan:
    """Keep everything in memory if it fits, else stream what does not; see ``Plan.fits``."""
    tile = min(needs.tile, max(budget // TILES_PER_BUDGET, LEAST_TILE))
    block = min(BLOCK_BYTES, max(budget // BLOCKS_PER_BUDGET, LEAST_BLOCK))
    block = min(block, max(needs.train_rows, needs.val_rows) * needs.stored)
    whole = Plan(needs=needs, budget=budget, resident=0, tile=tile, block=block)
    whole = replace(whole, resident=whole.bytes)
    if whole.fits:
        return whole
    fewest = min(needs.batch_size, needs.train_rows)
    # As they are stored all rows may fit: then they are read once.
    tries = [(needs.train_rows, count) for count in (BUFFERS, 2)]
    tries += [(size * fewest, count) for size, count in ((3, BUFFERS), (2, 2), (1, 2), (1, 1))]
    least = min(tile, LEAST_TILE), min(block, LEAST_BLOCK)
    smaller = max(tile // 4, least[0]), max(block // 4, least[1])
    for sizes in ((tile, block), smaller, least):
        small = replace(whole, window_rows=fewest, tile=sizes[0], block=sizes[1])
        small = replace(small, val_streamed=_streams_val(small))
        for window, count in tries:
            window = min(window, needs.train_rows)
            found = replace(small, window_rows=window, buffers=count)
            if found.fits:
                return _widest(found)
    here = replace(small, val_streamed=False)
    return min(here, replace(here, val_streamed=True), key=lambda place: place.bytes)


def _streams_val(small: Plan) -> bool:
    """Whether validation rows are read anew each time, given the least for training rows."""
    here = small.parts["validation rows"]
    anew = replace(small, val_streamed=True).parts["validation rows"]
    left = small.budget - small.bytes + here
    return anew < here > left * VAL_SHARE


def _widest(found: Plan) -> Plan:
    """With the largest window that fits, where one rows does."""
    sizes = range(found.window_rows, found.needs.train_rows)
    fitting = bisect.bisect_right(
        sizes, found.budget, key=lambda rows: replace(found, window_rows=rows).bytes
    )
    return replace(found, window_rows=sizes[fitting - 1]) if fitting else found


def continued(place: Plan, record: Mapping[str, Any] | None) -> Plan:
    """The plan, with the windows and blocks that a training began with: its order of rows.

    Args:
        record: of its checkpoint; None: it begins now.
    """
    if record is None:
        return place
    block = record.get("block") or place.block
    return replace(place, window_rows=record["window_rows"], block=block)


def check(place: Plan) -> Plan:
    """The plan, if it keeps to a budget that the user has set.

    Raises:
        InputError: nothing keeps to it.
    """
    if place.fits:
        return place
    largest = sorted(place.parts.items(), key=lambda part: -part[1])[:3]
    told = ", ".join(f"{shown(size)} for {name}" for name, size in largest)
    raise InputError(
        f"--max-memory {shown(place.budget)} is too small: this training takes "
        f"{shown(place.bytes)} or more ({told}); allow that much"
        + (", or lower --batch-size" if largest[0][0] in ("batches", "training rows") else "")
    )


def describe(place: Plan) -> str:
    """A line for the user."""
    needs = place.needs
    said = (
        f"the data needs {shown(place.resident)} and may take {shown(place.budget)} "
        "(--max-memory): it is streamed"
    )
    if place.window_rows:
        said += f", {min(place.window_rows, needs.train_rows):,} rows shuffled at a time"
    if not place.fits:
        said += f"; that takes {shown(place.bytes)} all the same"
    return said
