"""The trainings of a search, and where those that are through wait for the others.

``checkpoints/search.json`` says what is searched; ``checkpoints/trials/<name>/`` holds of each
training its ``result.json``, written last, with ``head.safetensors`` and, for a fold, the logits of
the samples held out. The record has the hashes of these files, or says that they were dropped. All
of it goes when the run is written.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmc.heads.checkpoints import FILE, SEARCH, Checkpoints, differences
from mmc.heads.engine import Position
from mmc.heads.runfiles import CHECKPOINTS, WEIGHTS, write_atomic
from mmc.heads.search.grid import Setting
from mmc.heads.splits import Rows
from mmc.heads.training import Setup
from mmc.store.errors import InputError

RESULT, LOGITS = "result.json", "logits.safetensors"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a search."""

    setting: Setting
    kind: str
    """"" (the only one of its setting), "seed" or "fold"."""
    repeat: int
    """The seed, or the fold from 0."""
    setup: Setup
    held_out: Rows | None = None
    """Rows of the fold, which it neither trains nor validates on."""

    @property
    def name(self) -> str:
        """Unique within the search; the name of a folder."""
        return f"{self.setting.number:04d}" + (f"-{self.kind}{self.repeat}" if self.kind else "")

    @property
    def described(self) -> str:
        """For people: "setting 3 (lr=0.1) seed 2"."""
        words = []
        if self.setting.values:
            words.append(f"setting {self.setting.number} ({self.setting})")
        if self.kind:
            words.append(f"{self.kind} {self.repeat + 1 if self.kind == 'fold' else self.repeat}")
        return ", ".join(words) or "the head"

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides its outcome."""
        text = json.dumps(self.setup.identity(), sort_keys=True).encode()
        rows = b"" if self.held_out is None else self.held_out.tobytes()
        return hashlib.sha256(text + rows).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a trial; JSON-able."""

    metric: float | None
    """On the validation rows, the one that training goes by; None: undefined, or it failed."""
    held_out: float | None = None
    """The same on the rows held out."""
    position: dict[str, Any] = field(default_factory=dict)
    """Of the engine at its end."""
    error: str = ""
    """Why it failed."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dictionary for each validation."""
        rows: list[dict[str, Any]] = self.position.get("history", [])
        return rows

    @property
    def score(self) -> float:
        """What trials are compared by, larger is better; NaN: undefined."""
        value = self.metric if self.held_out is None else self.held_out
        return math.nan if value is None else value


class Shelf:
    """The finished trials of one run's folder.

    Raises:
        InputError: an unfinished search or training of another kind is in the folder.
    """

    def __init__(self, run: Path, identity: dict[str, Any]) -> None:
        self.folder = run / CHECKPOINTS
        self._results: dict[str, Result] = {}
        self._dropped: set[str] = set()
        self.damaged: dict[str, Path] = {}
        """Name of each trial that was through -> its file that is not what was written."""
        identity = json.loads(json.dumps(identity))
        record = self.folder / SEARCH
        if (self.folder / FILE).exists():
            raise InputError(
                f"{run} holds an unfinished training of a single head; finish it without --sweep, "
                "--seeds and --folds, or --overwrite to start again"
            )
        if record.exists():
            try:
                saved = json.loads(record.read_bytes())
            except ValueError as error:
                raise InputError(
                    f"{record} is damaged ({error}); --overwrite starts again"
                ) from None
            changed = differences(saved, identity)
            if changed:
                raise InputError(
                    f"{run} holds an unfinished search with other settings "
                    f"({'; '.join(changed)}); give the same settings to continue it, or "
                    "--overwrite to start again"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps(identity).encode())

    def result(self, trial: Trial) -> Result | None:
        """What came out of it, or None while it is not through."""
        if trial.name not in self._results:
            try:
                record = json.loads((self._place(trial) / RESULT).read_bytes())
                if record.pop("identity") != trial.identity:
                    return None
                files: dict[str, str] | None = record.pop("files")
                result = Result(**record)
                damaged = self._damaged(trial, files or {})
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
            ):  # none, or half: again
                return None
            if damaged:
                self.damaged[trial.name] = damaged
                return None
            if files is None:
                self._dropped.add(trial.name)
            self._results[trial.name] = result
        return self._results[trial.name]

    def put(
        self,
        trial: Trial,
        result: Result,
        state: dict[str, Tensor],
        logits: Tensor | None = None,
    ) -> None:
        """Keep what came out of a trial; its checkpoint goes."""
        place = self._place(trial)
        place.mkdir(parents=True, exist_ok=True)
        contents = {}
        if state:
            plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            contents[WEIGHTS] = save_tensors(plain)
        if logits is not None:
            contents[LOGITS] = save_tensors({"logits": logits.cpu().contiguous()})
        for name, content in contents.items():
            write_atomic(place / name, content)
        self._record(trial, result, {name: _hash(data) for name, data in contents.items()})
        self._results[trial.name] = result
        self._dropped.discard(trial.name)
        self.checkpoints(trial).remove()

    def checkpoints(self, trial: Trial) -> Checkpoints:
        """The checkpoint of a trial that is under way."""
        return Checkpoints(self._place(trial), trial.setup.identity())

    def state(self, trial: Trial) -> dict[str, Tensor]:
        """The trained head's."""
        return load_tensors((self._place(trial) / WEIGHTS).read_bytes())

    def logits(self, trial: Trial) -> Tensor:
        """Of the rows held out, float32 (n, C)."""
        return load_tensors((self._place(trial) / LOGITS).read_bytes())["logits"]

    def position(self, trial: Trial) -> Position:
        """How its training ended."""
        return Position(**self._results[trial.name].position)

    def drop(self, trial: Trial) -> None:
        """Forget its parameters and logits: it has lost."""
        if self.dropped(trial):
            return
        self._record(trial, self._results[trial.name], None)
        self._dropped.add(trial.name)
        for name in (WEIGHTS, LOGITS):
            (self._place(trial) / name).unlink(missing_ok=True)

    def dropped(self, trial: Trial) -> bool:
        """Whether it is through, and its parameters were forgotten."""
        return trial.name in self._dropped

    def forget(self, trial: Trial) -> None:
        """It is to be trained again."""
        (self._place(trial) / RESULT).unlink(missing_ok=True)
        self._results.pop(trial.name, None)
        self._dropped.discard(trial.name)

    def remove(self) -> None:
        """Forget everything."""
        (self.folder / SEARCH).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "trials", ignore_errors=True)

    def _record(self, trial: Trial, result: Result, files: dict[str, str] | None) -> None:
        """Write a result, with the hashes of its files; None: they were dropped."""
        record = {"identity": trial.identity, "files": files, **asdict(result)}
        write_atomic(self._place(trial) / RESULT, json.dumps(record).encode())

    def _damaged(self, trial: Trial, files: dict[str, str]) -> Path | None:
        """The first file that is gone, or not what was written."""
        for name, written in files.items():
            path = self._place(trial) / name
            try:
                found = _hash(path.read_bytes())
            except OSError:
                return path
            if found != written:
                return path
        return None

    def _place(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.name


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
