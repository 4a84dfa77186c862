"""A run: one trained head with all that is needed to use it; `runfiles` lists its files.

Nothing in it is code: the head's name is looked up in our table of heads, its settings are checked
by the head's own config.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmc.heads.featureref import ARRAYS, NO_BACKBONE, FeatureRef
from mmc.heads.models import GROUP, HEADS
from mmc.heads.models.base import Head
from mmc.heads.runfiles import (
    CARD,
    FORMAT,
    HISTORY,
    OPTIONAL_KEYS,
    PLAIN_KEYS,
    RECIPE,
    RECORD,
    WEIGHTS,
    check_output,
    history_csv,
    label_set_hash,
    read_history,
    read_recipe,
    read_record,
    write_atomic,
)
from mmc.heads.thresholds import Thresholds
from mmc.store.config import build
from mmc.store.errors import InputError, MmcError
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.heads.search.outoffold import OutOfFold
    from mmc.store import EmbeddingStore


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
    """On the probabilities at ``temperature``."""
    temperature: float = 1.0
    """Logits are divided by it before they become probabilities; fitted on validation rows."""
    source: dict[str, Any] = field(default_factory=dict)
    """Recipe of the source of the training store (header names, label separator ...)."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Split -> what `mmc.heads.metrics.evaluate` gave."""
    seed: int = 0
    train_config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """What it took: seconds (all, of the last session where it was resumed), train_seconds (the
    steps), rows and epochs that the steps went over, rate (rows per second of the steps),
    batch_size, lr, device, notes (lines that were said of what was kept and of what does better);
    and the store (absolute path or URL). Empty for older runs."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dictionary per epoch; the same keys in each, None where there is no value."""
    search: dict[str, Any] = field(default_factory=dict)
    """What other trainings it was chosen from or measured by (sweep, seeds, folds); JSON-able."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    recipe_text: str | None = None
    """The recipe that trained it; None: `mmc run` did not."""
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

    @property
    def from_arrays(self) -> bool:
        """Whether it was trained on arrays in memory, of which nobody knows how they were made."""
        return any(ref.identity == ARRAYS for ref in self.features.values())

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
            HISTORY: history_csv(self.history),
            CARD: render(self).encode(),
        }
        if self.recipe_text is not None:
            files[RECIPE] = self.recipe_text.encode()
        files[RECORD] = (text + "\n").encode()
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
        record = read_record(folder)
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
        taken = {key: record[key] for key in PLAIN_KEYS}
        taken |= {key: record.get(key, copy(default)) for key, default in OPTIONAL_KEYS.items()}
        try:
            thresholds = Thresholds.from_json(record["thresholds"])
            thresholds.check(record["task"], len(record["label_set"]))
            return cls(
                **taken,
                features={
                    role: FeatureRef.from_json(ref) for role, ref in record["features"].items()
                },
                label_set=tuple(record["label_set"]),
                thresholds=thresholds,
                state=state,
                history=read_history(folder / HISTORY),
                recipe_text=read_recipe(folder / RECIPE),
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
        return {role: ref.find(store) for role, ref in self.features.items()}

    def out_of_fold(self) -> "OutOfFold":
        """What heads that had not seen them said of the train and val samples (``--folds``).

        Raises:
            InputError: the run was trained without folds.
            MmcError: the file is damaged.
        """
        from mmc.heads.search.outoffold import OutOfFold

        return OutOfFold.load(self)

    def with_labels(self, labels: Sequence[str], label_text: npt.ArrayLike) -> "Run":
        """This run for other labels, by their texts (C', D): see `newlabels.with_labels`."""
        from mmc.heads.newlabels import with_labels

        return with_labels(self, labels, label_text)

    def check_labels(self, label_set: Sequence[str], where: str) -> None:
        """Raise InputError unless every label of ``label_set``, a store's, is one of this run's."""
        self._refuse_arrays()
        known = set(self.label_set)
        strange = [label for label in label_set if label not in known]
        if strange:
            shown = ", ".join(repr(label) for label in strange[:5])
            more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
            raise InputError(
                f"{where}: the label set does not match the run's: {shown}{more} not among its "
                f"{len(self.label_set)} labels; train on this store, or fix the labels"
            )

    def compare_labels(self, label_set: Sequence[str], where: str) -> list[str]:
        """What to say before predicting on data that has the labels ``label_set``, or none.

        Raises:
            InputError: it has labels, and none of them is one of this run's; or the run was trained
                on arrays.
        """
        self._refuse_arrays()
        try:
            self.check_labels(label_set, where)
        except InputError as error:
            if not set(label_set) & set(self.label_set):
                raise InputError(
                    f"{where} has other labels ({', '.join(map(repr, label_set[:3]))} ...) than "
                    f"the run ({', '.join(map(repr, self.label_set[:3]))} ...): it was trained on "
                    "other data; give samples without labels to predict all the same"
                ) from None
            return [f"{error}; predicting all the same, without comparing"]
        return []

    def recipe(self) -> list[dict[str, Any]]:
        """What to extract before predicting on a raw source: one dictionary per alias.

        Keys: alias, fields (of that backbone), fingerprint, identity, context.

        Raises:
            InputError: it was trained on arrays.
        """
        self._refuse_arrays()
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

    def _refuse_arrays(self) -> None:
        """Raise InputError where no store or source can have what the run reads."""
        if self.from_arrays:
            raise InputError(NO_BACKBONE)

    def _record(self) -> dict[str, Any]:
        text = self.recipe_text
        recipe = None if text is None else hashlib.sha256(text.encode()).hexdigest()
        return {
            "format": FORMAT,
            **{key: getattr(self, key) for key in (*PLAIN_KEYS, *OPTIONAL_KEYS)},
            **({"recipe_sha256": recipe} if recipe else {}),
            "features": {role: asdict(ref) for role, ref in self.features.items()},
            "label_set": list(self.label_set),
            "label_set_hash": self.label_set_hash,
            "thresholds": self.thresholds.to_json(),
        }


def library_versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = ("mmc", "torch", "numpy", "safetensors", "zarr")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }
