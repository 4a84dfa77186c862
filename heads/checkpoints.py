"""The state of an unfinished training in one file, so that it continues exactly.

``checkpoints/last.safetensors`` holds the tensors; its metadata holds the rest as JSON. One file,
written beside and renamed, is never half of two states. No generator state is in it: everything
random in an epoch follows from (seed, stage, epoch).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmc.heads.runfiles import CHECKPOINTS, FILES, TENSORBOARD, write_atomic
from mmc.store.atomic import differences as differences
from mmc.store.errors import InputError, MmcError

FILE = "last.safetensors"
SEARCH = "search.json"
"""Beside it: what an unfinished search consists of (`mmc.heads.search.trials`)."""
_RECORD = "mmc"


class Checkpoints:
    """The checkpoint of one run's folder."""

    def __init__(self, run: Path, identity: dict[str, Any]) -> None:
        self.path = run / CHECKPOINTS / FILE
        self.identity = json.loads(json.dumps(identity))

    def save(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps({"identity": self.identity, "record": record})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save_tensors(plain, metadata={_RECORD: text}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and record of the checkpoint, or None when there is none.

        Raises:
            InputError: it is of another training (the message says what differs), or damaged.
        """
        if not self.path.exists():
            if (self.path.parent / SEARCH).exists():
                raise InputError(
                    f"{self.path.parents[1]} holds an unfinished search of several trainings; give "
                    "the same --sweep, --seeds or --folds to continue it, or --overwrite to start "
                    "again"
                )
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                saved = json.loads(file.metadata()[_RECORD])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path} is not a checkpoint ({error}); --overwrite starts again"
            ) from None
        changed = differences(saved["identity"], self.identity)
        if changed:
            raise InputError(
                f"{self.path.parents[1]} holds an unfinished training with other settings "
                f"({'; '.join(changed)}); give the same settings to continue it, or --overwrite "
                "to start again"
            )
        return tensors, saved["record"]

    def remove(self) -> None:
        """Forget the checkpoint (the run is whole, or starts again)."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder; leaves no trace where nothing was saved.

    Raises:
        MmcError: one is at work there.
    """
    folder, made = run / CHECKPOINTS, not run.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise MmcError(
            f"{run} is being trained by another process; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        for empty in (folder, run) if made else (folder,):
            with suppress(OSError):  # it holds something
                empty.rmdir()


def clear_run(folder: Path) -> None:
    """Remove what a run consists of, its record first so that no half of it looks whole, and its
    weights last: without them a card looks like someone's own."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and step counts by ``<index>.<name>``."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Give the optimiser the state that `pack_optimizer` took from one of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in packed.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
