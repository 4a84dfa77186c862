"""The folder that a training writes: its checkpoints, and files that appear whole.

``checkpoints/last.safetensors`` holds the tensors of an unfinished training; its metadata holds the
rest as JSON. One file, written beside and renamed, is never half of two states. No generator state
is in it: everything random follows from the seed, the epoch and the step.
"""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmc.store.atomic import differences
from mmc.store.atomic import write_atomic as write_atomic
from mmc.store.errors import InputError, MmcError

CHECKPOINTS = "checkpoints"
_RECORD = "mmc"


class Checkpoints:
    """The checkpoint of one folder that has a name."""

    def __init__(self, folder: Path, identity: dict[str, Any], name: str = "last") -> None:
        self.path = folder / CHECKPOINTS / f"{name}.safetensors"
        self._identity = json.loads(json.dumps(identity))

    def save(self, parts: Mapping[str, Mapping[str, Tensor]], record: dict[str, Any]) -> None:
        """Replace the checkpoint by tensors, by the part that they are of and by name."""
        plain = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, tensors in parts.items()
            for key, value in tensors.items()
        }
        text = json.dumps({"identity": self._identity, "record": record})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save_tensors(plain, metadata={_RECORD: text}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and record of the checkpoint, or None when there is none.

        Raises:
            InputError: it is of another training (the message says what differs), or damaged.
        """
        if not self.path.exists():
            return None
        tensors, saved = read_checkpoint(self.path, "--overwrite starts again")
        changed = differences(saved["identity"], self._identity)
        if changed:
            raise InputError(
                f"{self.path.parents[1]} holds an unfinished training with other settings "
                f"({'; '.join(changed)}); give the same settings to continue it, or --overwrite "
                "to start again"
            )
        return tensors, saved["record"]

    def remove(self) -> None:
        """Forget it: the training is whole."""
        self.path.unlink(missing_ok=True)


def read_checkpoint(
    path: Path, hint: str, names: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a checkpoint, and its `identity` and `record`.

    Args:
        path: of the file.
        hint: what to do where it is damaged.
        names: how the names of the tensors that are read begin.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved: dict[str, Any] = json.loads(file.metadata()[_RECORD])
            found = [key for key in file.keys() if key.startswith(names)]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in found}, saved
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a checkpoint ({error}); {hint}") from None


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, without the part's name."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextmanager
def claimed(
    folder: Path, ours: Sequence[str], record: str, *, overwrite: bool
) -> Iterator[Callable[[], None]]:
    """Keep other trainings out of a folder that is new, empty or a training's own.

    Gives what removes the training that is overwritten, to be called once all that may be refused
    has been looked at: a typing error costs nobody a finished training.

    Args:
        folder: what is in it but ``ours`` keeps it from being used.
        ours: names of the files and folders of a training.
        record: the one that says that it is finished.
        overwrite: all of ``ours`` is to be removed.

    Raises:
        InputError: it holds something else, or a finished training.
        MmcError: another process is at work there.
    """
    _check(folder, ours)
    checkpoints, made = folder / CHECKPOINTS, not folder.exists()
    checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(checkpoints / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise MmcError(
            f"{folder} is in use by another training; wait for it, or name another folder"
        ) from None
    try:
        if (folder / record).exists() and not overwrite:
            raise InputError(f"{folder} is finished; name another folder, or --overwrite it")
        _sweep(folder, ours)
        yield lambda: _clear(folder, [record, *ours] if overwrite else [])
    finally:
        lock.release()
        (checkpoints / ".lock").unlink(missing_ok=True)
        for empty in (checkpoints, folder) if made else (checkpoints,):
            with contextlib.suppress(OSError):  # it holds something
                empty.rmdir()


def _check(folder: Path, ours: Sequence[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    others = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    others = [name for name in others if name not in ours and not name.endswith(".partial")]
    if others:
        raise InputError(f"{folder} holds other content ({others[0]}); name a new folder")


def _sweep(folder: Path, ours: Sequence[str]) -> None:
    """Remove the halves of files that killed calls were writing; a checkpoint's are large."""
    for path in [*folder.glob("*.partial"), *(folder / CHECKPOINTS).glob("*.partial")]:
        begun = re.fullmatch(r"(.+)\.\d+\.partial", path.name)
        if begun and (begun[1] in ours or path.parent != folder) and path.is_file():
            path.unlink()


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of a training, its record first, so that no half of it looks whole."""
    for name in names:
        path = folder / name
        if name == CHECKPOINTS:
            for file in path.glob("*.safetensors"):
                file.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """history.csv: the keys of all rows as columns."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in history for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write_atomic(path, f"{text}\n".encode())
