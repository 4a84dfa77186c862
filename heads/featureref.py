"""One feature that a run reads: what it was made with, and finding the same in another store."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mmc.store.errors import FingerprintMismatchError, InputError
from mmc.store.schema import difference

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

ARRAYS = {"source": "arrays"}
"""Identity of features that were given as arrays: nothing is known of how they were made."""
ARRAYS_ALIAS = "arrays"
"""Alias of arrays that were given without one."""
NO_BACKBONE = (
    "the run was trained on arrays, not on features of a store; predict on arrays: "
    "mmc.heads.HeadClassifier.load(RUN).predict(X)"
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
    dtype: str = ""
    """As it is stored; not known of older runs."""

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
            dtype=str(stored.dtype),
        )

    @property
    def given_name(self) -> str:
        """What an array was called when it was given."""
        return self.feature.removeprefix(f"{ARRAYS_ALIAS}/")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "FeatureRef":
        """One feature of ``run.json``; keys of later versions are passed over."""
        known = {f.name for f in fields(cls)}
        taken = {key: value for key, value in record.items() if key in known}
        return cls(**{**taken, "shape": tuple(record["shape"])})

    def find(self, store: "EmbeddingStore") -> str:
        """The feature ("alias/field") of ``store`` that is this one; the alias may differ.

        Raises:
            InputError: the store has no such feature.
            FingerprintMismatchError: it has one of that name, made differently.
        """
        identities = [store.provenance(alias).identity for alias in store.aliases]
        if self.identity == ARRAYS and ARRAYS not in identities:
            raise InputError(NO_BACKBONE)
        same: list[str] = [
            name
            for name in store.features
            if name.split("/", 1)[1] == self.field and store[name].fingerprint == self.fingerprint
        ]
        if same:
            return self.feature if self.feature in same else same[0]
        spec = self.context.get("spec", "...")
        if self.feature not in store.features:
            has = ", ".join(store.features) or "no features yet"
            raise InputError(
                f"{store.path} has no {self.feature}, which the run was trained on (it has: "
                f"{has}); extract it with --backbone {spec} --name {self.alias}"
            )
        now = store.provenance(self.alias).identity
        lines = difference(now, self.identity) or [
            "  the identities agree, the fingerprints do not"
        ]
        raise FingerprintMismatchError(
            f"{self.feature} of {store.path} was made differently from what the run was trained "
            "on:\n"
            + "\n".join(lines)
            + f"\nextract again with the run's backbone (--backbone {spec}) under another --name, "
            "or train on this store"
        )
