"""A run: the directory of one trained head.

    head.safetensors   parameters and buffers
    run.json           everything else that is needed to use it; written last, so its presence
                       means that the run is whole
    history.csv        one row per epoch
    README.md          model card
    checkpoints/       the trainer's

Nothing in it is code: the head's name is looked up in our table of heads, its settings are checked
by the head's own config.
"""

import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmc.heads.metrics import HEADLINE
from mmc.heads.models import GROUP, HEADS
from mmc.heads.models.base import Head
from mmc.heads.thresholds import Thresholds
from mmc.store.config import build
from mmc.store.errors import FingerprintMismatchError, FormatVersionError, InputError, MmcError
from mmc.store.registry import load, lookup
from mmc.store.schema import difference

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

FORMAT = 1
WEIGHTS, RECORD, HISTORY, CARD, CHECKPOINTS = (
    "head.safetensors",
    "run.json",
    "history.csv",
    "README.md",
    "checkpoints",
)


@dataclass(frozen=True, kw_only=True)
class FeatureRef:
    """One feature that a run reads, and what it was made with."""

    feature: str
    """``alias/field`` in the store that the run was trained on."""
    alias: str
    field: str
    fingerprint: str
    identity: dict[str, Any]
    """What the fingerprint is the hash of: backbone, weights, preprocessing, precision ..."""
    context: dict[str, Any]
    """How it was made, not hashed: the spec as typed, library versions, device."""
    shape: tuple[int, ...]
    """Per sample."""

    @classmethod
    def of(cls, store: "EmbeddingStore", feature: str) -> "FeatureRef":
        """The record of ``feature`` ("alias/field") as it is in ``store``."""
        stored = store[feature]
        provenance = store.provenance(stored.alias)
        return cls(
            feature=feature,
            alias=stored.alias,
            field=feature.split("/", 1)[1],
            fingerprint=stored.fingerprint,
            identity=dict(provenance.identity),
            context=dict(provenance.context),
            shape=tuple(int(n) for n in stored.shape[1:]),
        )


@dataclass(kw_only=True)
class Run:
    """A trained head with all that is needed to use it again."""

    head: str
    """Name in the table of heads."""
    head_config: dict[str, Any]
    loss: str
    loss_config: dict[str, Any]
    features: dict[str, FeatureRef]
    """By role: what the head calls its input -> the feature that feeds it."""
    label_set: tuple[str, ...]
    task: str
    state: dict[str, Tensor]
    """The head's ``state_dict``."""
    thresholds: Thresholds
    source: dict[str, Any] = field(default_factory=dict)
    """Recipe of the source of the training store (header names, label separator ...)."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Split -> what `mmc.heads.metrics.evaluate` gave."""
    seed: int = 0
    train_config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dictionary per epoch; the same keys in each, None where there is no value."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    path: Path | None = None
    """Where it was loaded from or saved to."""

    @property
    def label_set_hash(self) -> str:
        """sha256 of the ordered label names."""
        return label_set_hash(self.label_set)

    @property
    def parameters(self) -> int:
        """Numbers in the head's state."""
        return sum(tensor.numel() for tensor in self.state.values())

    def save(self, path: str | Path) -> "Run":
        """Write the run into ``path``; each file whole or not at all, ``run.json`` last.

        Raises:
            InputError: the path is a file, or a folder with other content.
        """
        from mmc.heads.card import render

        self.path = check_output(path)
        state = {name: t.detach().cpu().contiguous() for name, t in self.state.items()}
        weights = save_tensors(state, metadata={"format": "pt"})
        record = self._record() | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        # Everything is made before anything is written, and the record is written last.
        files = {
            WEIGHTS: weights,
            HISTORY: _history_csv(self.history),
            CARD: render(self).encode(),
            RECORD: (text + "\n").encode(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(self.path / name, data)
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """The run in ``path``.

        Raises:
            InputError: not a run, or its record is not readable.
            FormatVersionError: written by a newer mmc.
            MmcError: the weights are missing or not those of the record.
        """
        folder = Path(path)
        record = _read_record(folder)
        try:
            weights = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise MmcError(f"{folder / WEIGHTS}: {error.strerror}; train the head again") from None
        if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
            raise MmcError(
                f"{folder / WEIGHTS} is not the file that {RECORD} was written with (damaged, or "
                "saving was interrupted); train the head again"
            )
        try:
            state = load_tensors(weights)
        except SafetensorError as error:
            raise MmcError(f"{folder / WEIGHTS} is damaged ({error})") from None
        taken = {key: record[key] for key in _PLAIN_KEYS}
        try:
            return cls(
                **taken,
                features={role: _feature(ref) for role, ref in record["features"].items()},
                label_set=tuple(record["label_set"]),
                thresholds=Thresholds.from_json(record["thresholds"]),
                state=state,
                history=_read_history(folder / HISTORY),
                path=folder,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{folder / RECORD} is damaged ({detail}); train the head again"
            ) from None

    def build_head(self, device: str | torch.device = "cpu") -> Head:
        """The head with its parameters, in evaluation mode on ``device``.

        Raises:
            InputError: the head is not known here, or its settings are not.
            MmcError: the parameters do not fit the head.
        """
        cls: type[Head] = load(lookup(HEADS, self.head, kind="head", group=GROUP))
        config: Any = build(cls.Config, self.head_config, where=f"head {self.head}")
        inputs = {role: ref.shape for role, ref in self.features.items()}
        head = cls(inputs, len(self.label_set), config, label_text=None)
        try:
            head.load_state_dict(self.state)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise MmcError(f"{self.path or 'run'}: weights do not fit the head: {detail}") from None
        return head.to(device).eval()

    def resolve_features(self, store: "EmbeddingStore") -> dict[str, str]:
        """Role -> the feature of ``store`` that is the one this run was trained on.

        The alias may differ: what counts is the fingerprint.

        Raises:
            InputError: the store has no such feature.
            FingerprintMismatchError: it has one of that name, made differently.
        """
        return {role: _resolve(ref, store) for role, ref in self.features.items()}

    def check_features(self, store: "EmbeddingStore") -> None:
        """Raise as `resolve_features` does unless ``store`` has what this run reads."""
        self.resolve_features(store)

    def check_labels(self, label_set: Sequence[str], where: str) -> None:
        """Raise InputError unless every label of ``label_set`` is one of this run's."""
        known = set(self.label_set)
        strange = [label for label in label_set if label not in known]
        if strange:
            shown = ", ".join(repr(label) for label in strange[:5])
            more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
            raise InputError(
                f"{where}: the label set does not match the run's: {shown}{more} not among its "
                f"{len(self.label_set)} labels; train on this store, or fix the labels"
            )

    def recipe(self) -> list[dict[str, Any]]:
        """What to extract before predicting on a raw source: one dictionary per alias.

        Keys: alias, fields (of that backbone), fingerprint, identity, context.
        """
        by_alias: dict[str, dict[str, Any]] = {}
        for ref in self.features.values():
            entry = by_alias.setdefault(
                ref.alias,
                {
                    "alias": ref.alias,
                    "fields": [],
                    "fingerprint": ref.fingerprint,
                    "identity": ref.identity,
                    "context": ref.context,
                },
            )
            if ref.field not in entry["fields"]:
                entry["fields"].append(ref.field)
        return list(by_alias.values())

    def _record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **{key: getattr(self, key) for key in _PLAIN_KEYS},
            "features": {role: asdict(ref) for role, ref in self.features.items()},
            "label_set": list(self.label_set),
            "label_set_hash": self.label_set_hash,
            "thresholds": self.thresholds.to_json(),
        }


_PLAIN_KEYS = (
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
_KINDS = {"features": dict, "label_set": list, "thresholds": dict, "head": str, "task": str}
"""What ``run.json`` holds under some keys, never empty."""
_REQUIRED = {
    *_PLAIN_KEYS,
    "features",
    "label_set",
    "label_set_hash",
    "thresholds",
    "weights_sha256",
}


def label_set_hash(label_set: Sequence[str]) -> str:
    """sha256 (hex) of the ordered label names."""
    return hashlib.sha256(json.dumps(list(label_set)).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = ("mmc", "torch", "numpy", "safetensors", "zarr")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def check_output(path: str | Path) -> Path:
    """``path`` as a folder that a run may be written into: new, empty, or a run's own.

    Raises:
        InputError: it is a file, or a folder with other content.
    """
    folder = Path(path)
    if folder.is_dir():
        ours = {WEIGHTS, RECORD, HISTORY, CARD, CHECKPOINTS}
        others = sorted(p.name for p in folder.iterdir() if p.name not in ours)
        others = [name for name in others if not name.endswith(".partial")]
        # A README.md alone is someone's project, not a run.
        if others or ((folder / CARD).exists() and not (folder / WEIGHTS).exists()):
            raise InputError(
                f"{folder} holds other content ({(others or [CARD])[0]}); name a new folder"
            )
    elif folder.exists():
        raise InputError(f"{folder} is a file; name a folder for the run")
    return folder


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all: beside it, synced, then renamed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except OSError:
        kind = "is not a run: it has no run.json" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {kind} (a run is what `mmc train-head` writes)") from None
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
    if record["task"] not in HEADLINE:
        raise InputError(f"{folder / RECORD}: unknown task {record['task']!r}")
    if label_set_hash(record["label_set"]) != record["label_set_hash"]:
        raise InputError(
            f"{folder / RECORD}: the label set was edited (its hash differs); its order is that of "
            "the head's outputs, so train the head again"
        )
    return record


def _feature(record: Mapping[str, Any]) -> FeatureRef:
    """One feature of ``run.json``; keys of later versions are passed over."""
    known = {f.name for f in fields(FeatureRef)}
    taken = {key: value for key, value in record.items() if key in known}
    return FeatureRef(**{**taken, "shape": tuple(record["shape"])})


def _resolve(ref: FeatureRef, store: "EmbeddingStore") -> str:
    same: list[str] = [
        name
        for name in store.features
        if name.split("/", 1)[1] == ref.field and store[name].fingerprint == ref.fingerprint
    ]
    if same:
        return ref.feature if ref.feature in same else same[0]
    if ref.feature not in store.features:
        has = ", ".join(store.features) or "no features yet"
        raise InputError(
            f"{store.path} has no {ref.feature}, which the run was trained on (it has: {has}); "
            f"extract it with --backbone {ref.context.get('spec', '...')} --name {ref.alias}"
        )
    now = store.provenance(ref.alias).identity
    lines = difference(now, ref.identity) or ["  the identities agree, the fingerprints do not"]
    raise FingerprintMismatchError(
        f"{ref.feature} of {store.path} was made differently from what the run was trained on:\n"
        + "\n".join(lines)
        + f"\nextract again with the run's backbone (--backbone {ref.context.get('spec', '...')}) "
        "under another --name, or train on this store"
    )


def _history_csv(history: Sequence[Mapping[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if columns:
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue().encode()


def _read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of history.csv, numbers as numbers; none when the file is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
