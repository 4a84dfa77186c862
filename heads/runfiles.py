"""The files of a run's folder: writing them whole, and reading back what was written.

head.safetensors   parameters and buffers
run.json           everything else that is needed to use it; written last, so its presence
                   means that the run is whole
history.csv        one row per epoch
README.md          model card
recipe.yaml        the recipe that trained it, where `mmc run` did
checkpoints/       the trainer's
tensorboard/       with --track tensorboard

and after a search (`mmc.heads.search`):

sweep.csv          one row per setting
seeds.csv          one row per seed of the setting that was kept
folds.csv          one row per fold of the setting that was kept
histories.csv      one row per epoch of every training
out_of_fold.parquet   what heads that had not seen them said of the train and val samples

Imports no torch: what is wrong with a path is said at once.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc.store.atomic import write_atomic as write_atomic
from mmc.store.errors import FormatVersionError, InputError
from mmc.store.samples import TASKS

FORMAT = 1
WEIGHTS, RECORD, HISTORY, CARD, CHECKPOINTS, RECIPE, TENSORBOARD = (
    "head.safetensors",
    "run.json",
    "history.csv",
    "README.md",
    "checkpoints",
    "recipe.yaml",
    "tensorboard",
)
SWEEP, SEEDS, FOLDS, HISTORIES = "sweep.csv", "seeds.csv", "folds.csv", "histories.csv"
OUT_OF_FOLD = "out_of_fold.parquet"
FILES = (
    RECORD,
    CARD,
    RECIPE,
    HISTORY,
    SWEEP,
    SEEDS,
    FOLDS,
    HISTORIES,
    OUT_OF_FOLD,
    WEIGHTS,
)
"""All files of a run, in the order in which they are removed."""

PLAIN_KEYS = (
    "head",
    "head_config",
    "loss",
    "loss_config",
    "task",
    "source",
    "metrics",
    "seed",
    "train_config",
    "versions",
    "created",
)
"""Keys of ``run.json`` that are fields of a run as they are."""
OPTIONAL_KEYS: dict[str, Any] = {"temperature": 1.0, "training": {}, "search": {}}
"""Keys that runs of this format may lack -> what is then meant."""
_KINDS = {"features": dict, "label_set": list, "thresholds": dict, "head": str, "task": str}
"""What ``run.json`` holds under some keys, never empty."""
_REQUIRED = {
    *PLAIN_KEYS,
    "features",
    "label_set",
    "label_set_hash",
    "thresholds",
    "weights_sha256",
}


def label_set_hash(label_set: Sequence[str]) -> str:
    """sha256 (hex) of the ordered label names."""
    return hashlib.sha256(json.dumps(list(label_set)).encode()).hexdigest()


def check_output(path: str | Path) -> Path:
    """``path`` as a folder that a run may be written into: new, empty, or a run's own.

    Raises:
        InputError: it is a file, or a folder with other content.
    """
    folder = Path(path)
    if folder.is_dir():
        ours = {*FILES, CHECKPOINTS, TENSORBOARD}
        others = sorted(p.name for p in folder.iterdir() if p.name not in ours)
        others = [name for name in others if not name.endswith(".partial")]
        # A README.md alone is someone's project, not a run.
        alone = not ((folder / WEIGHTS).exists() or (folder / RECORD).exists())
        if others or ((folder / CARD).exists() and alone):
            raise InputError(
                f"{folder} holds other content ({(others or [CARD])[0]}); name a new folder"
            )
    elif folder.exists():
        raise InputError(f"{folder} is a file; name a folder for the run")
    return folder


def check_run(folder: Path) -> None:
    """Look whether there is a run, before anything that takes long.

    Raises:
        InputError: there is none.
    """
    if not (folder / RECORD).is_file():
        raise _not_a_run(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json``, with every key that a run needs.

    Raises:
        InputError: there is none, or it is damaged or was edited.
        FormatVersionError: written by a newer mmc.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except OSError:
        raise _not_a_run(folder) from None
    except ValueError as error:
        raise InputError(f"{folder / RECORD} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise InputError(f"{folder / RECORD} is not the record of a run: it has no format number")
    if record["format"] > FORMAT:
        raise FormatVersionError(
            f"{folder} has run format {record['format']}; this mmc reads up to {FORMAT}: "
            "upgrade mmc"
        )
    missing = sorted(_REQUIRED - record.keys())
    if missing:
        raise InputError(f"{folder / RECORD} lacks {', '.join(missing)}; train the head again")
    for name, expected in _KINDS.items():
        if not isinstance(record[name], expected) or not record[name]:
            raise InputError(f"{folder / RECORD} is damaged at {name!r}; train the head again")
    tables = {name: record.get(name, {}) for name in ("metrics", "training")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{folder / RECORD} is damaged at {name!r}; train the head again")
    if not all(isinstance(found, dict) for found in tables["metrics"].values()):
        raise InputError(f"{folder / RECORD} is damaged at 'metrics'; train the head again")
    if not _positive(record.get("temperature", 1.0)):
        raise InputError(f"{folder / RECORD} is damaged at 'temperature'; train the head again")
    if record["task"] not in TASKS or record["task"] == "unlabelled":
        raise InputError(f"{folder / RECORD}: unknown task {record['task']!r}")
    if label_set_hash(record["label_set"]) != record["label_set_hash"]:
        raise InputError(
            f"{folder / RECORD}: the label set was edited (its hash differs); its order is that of "
            "the head's outputs, so train the head again"
        )
    return record


def _not_a_run(folder: Path) -> InputError:
    if (folder / CHECKPOINTS).is_dir():
        return InputError(
            f"{folder} holds an unfinished training; the same `mmc train-head` goes on with it"
        )
    kind = "is not a run: it has no run.json" if folder.exists() else "does not exist"
    return InputError(f"{folder} {kind} (a run is what `mmc train-head` writes)")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def history_csv(history: Sequence[Mapping[str, Any]]) -> bytes:
    """history.csv: the keys of all rows as columns."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if columns:
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue().encode()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of history.csv, numbers as numbers; none when the file is not there.

    Raises:
        InputError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        return [{key: _number(text) for key, text in row.items()} for row in rows]
    except (OSError, ValueError, TypeError, csv.Error):
        raise InputError(f"{path} is damaged; delete it, for predictions do not need it") from None


def read_recipe(path: Path) -> str | None:
    """The recipe that is kept in a run; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise InputError(f"{path} is damaged; delete it, for predictions do not need it") from None


def _number(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
