"""The store: opening, looking, syncing samples; ``writer`` and ``Feature`` do the rest."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmc.store.aliases import (
    FEATURES,
    Status,
    alias_names,
    current_failures,
    find_alias,
    read_failures,
    read_status,
)
from mmc.store.errors import DamagedStoreError, InputError, MmcError, NotAStoreError
from mmc.store.feature import Feature
from mmc.store.files import Files, open_files
from mmc.store.labeltext import read_label_text
from mmc.store.places import check_free, nearest, not_a_store
from mmc.store.samples import (
    ROOT,
    SAMPLES,
    UNKNOWN,
    Labels,
    Rows,
    SamplesFile,
    StoreMeta,
    canonical,
    check_meta,
    settled,
    with_internal,
    write_root,
    write_samples,
)
from mmc.store.schema import (
    DONE,
    FAILED,
    PARTLY,
    AliasRecord,
    Compression,
    FieldSpec,
    Provenance,
    dump,
    group_json,
    mmc_attributes,
)
from mmc.store.summary import summary
from mmc.store.sync import SyncReport, merged_tree, sync_files
from mmc.store.writer import Writer, open_writer


class EmbeddingStore:
    """A store of samples and their embeddings; ``open`` or ``create`` one.

    It shows the samples as they were when it was opened (or last synced through this object).
    Features and statuses are looked up when they are asked for.
    """

    def __init__(self, files: Files, samples: SamplesFile) -> None:
        self._files = files
        self._load(samples)

    def _load(self, samples: SamplesFile) -> None:
        self._samples = samples
        self._labels: Labels | None = None
        self._live: npt.NDArray[np.bool_] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the store at a local path or an fsspec URL.

        Raises:
            NotAStoreError: there is none.
            FormatVersionError: it was written by a newer mmc.
            DamagedStoreError: its table of samples is missing or damaged.
        """
        files = open_files(path)
        raw = files.read(ROOT)
        # Lost, if embeddings were ever committed: it is written before them.
        lost = raw is None and files.size(SAMPLES) is not None and bool(alias_names(files))
        if raw is None and not lost:
            raise NotAStoreError(not_a_store(files))
        try:
            ours = raw is None or mmc_attributes(raw, files.where(ROOT), PARTLY) is not None
        except DamagedStoreError:
            # A copy of what samples.parquet says, which the next writer and `repair` put back.
            if files.size(SAMPLES) is None:
                raise
            ours = True
        if not ours:
            raise NotAStoreError(
                f"{files.url} is a zarr node that mmc did not make; `mmc extract` makes stores"
            )
        return cls(files, SamplesFile(files))

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        samples: pa.Table,
        *,
        label_set: Sequence[str],
        task: str,
        source: Mapping[str, Any],
    ) -> Self:
        """Make a new store of ``samples``, without features yet.

        Args:
            path: local path or fsspec URL; nothing may be there, or an empty folder.
            samples: one row per sample, columns as in ``samples.COLUMNS`` and any others.
            label_set: the label names; ``labels`` holds indices into it.
            task: multilabel, multiclass, binary or unlabelled.
            source: the recipe the samples come from, JSON-able, with at least ``spec``.

        Raises:
            InputError: the path is taken, or the table does not fit (see ``samples.canonical``).
        """
        meta = check_meta(label_set, task, dict(source))
        table = canonical(samples, meta)
        files = open_files(path)
        check_free(files)
        count = len(table)
        table = with_internal(table, np.zeros(count, np.int16), np.zeros(count, bool))
        table, meta = settled(table, meta)
        files.write(f"{FEATURES}/{ROOT}", [dump(group_json({}))])
        write_samples(files, table, meta)
        # Last: without it the path is no store, and create() may try again.
        write_root(files, meta)
        return cls(files, SamplesFile(files))

    def __len__(self) -> int:
        return self._samples.num_rows

    def __repr__(self) -> str:
        return f"EmbeddingStore({self.path!r}, rows={len(self)}, features={self.features})"

    @property
    def path(self) -> str:
        """The path or URL it was opened with."""
        return self._files.url

    @property
    def files(self) -> Files:
        """Access to the store's files, for the tools of this package."""
        return self._files

    @property
    def meta(self) -> StoreMeta:
        """Label set, task, sources and row order."""
        return self._samples.meta

    @property
    def task(self) -> str:
        """multilabel, multiclass, binary or unlabelled."""
        return self.meta.task

    @property
    def label_set(self) -> tuple[str, ...]:
        """The label names, in order."""
        return self.meta.label_set

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The recipe of each source that was synced; ``_source`` of a row points into it."""
        return list(self.meta.sources)

    @property
    def label_tree(self) -> dict[str, list[str]]:
        """Parent label -> its children, of all sources that know a tree; empty when none does."""
        return merged_tree(self.meta.sources)

    @property
    def samples(self) -> pa.Table:
        """All columns of all rows, read anew."""
        return self._samples.read()

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the samples, (N,).

        Raises:
            InputError: no such column.
        """
        return self._samples.read([name]).column(0)

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """(N,) rows that are not gone from their source."""
        if self._live is None:
            self._live = ~self.column("_gone").to_numpy()
        return self._live

    @property
    def labels(self) -> Labels:
        """Labels of all rows."""
        if self._labels is None:
            unknown = self.column(UNKNOWN.name) if self._samples.partly else None
            self._labels = Labels.of(
                self.column("labels"), ~self.live, len(self.label_set), unknown
            )
        return self._labels

    def rows(
        self,
        split: str | None = None,
        features: Sequence[str] | None = None,
        labelled: bool | None = None,
    ) -> Rows:
        """Rows that are not gone and fit, ascending.

        Args:
            split: only rows of this split ("" for those without).
            features: only rows that are done in all of these.
            labelled: only rows of which labels are known (True) or none is (False).

        Raises:
            InputError: no such feature.
        """
        wanted = self.live.copy()
        if split is not None:
            wanted &= pc.equal(self.column("split"), split).to_numpy()
        if labelled is not None:
            wanted &= self.labels.known == labelled
        for alias, tower in dict.fromkeys(self._tower_of(name) for name in features or ()):
            wanted &= self.status(alias, tower) == DONE
        return np.flatnonzero(wanted)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Names of the backbones that have features here."""
        return tuple(alias_names(self._files))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of all features, ``alias/field``."""
        return tuple(
            f"{alias}/{field}" for alias in self.aliases for field in self.record(alias).fields
        )

    def __getitem__(self, name: str) -> Feature:
        """The feature ``alias/field``, as it is now.

        Raises:
            InputError: no such feature.
        """
        alias, tower = self._tower_of(name)
        prefix, record = self._found(alias)
        status = self.status(alias, tower)
        return Feature(self._files, prefix, alias, record, name.partition("/")[2], status)

    def __contains__(self, name: object) -> bool:
        return name in self.features

    def status(self, alias: str, tower: str) -> Status:
        """(N,) uint8 of one tower: 0 missing, 1 done, 2 failed.

        Raises:
            InputError: no such alias or tower.
            DamagedStoreError: a status file is damaged.
        """
        prefix, record = self._found(alias)
        if tower not in record.towers:
            raise InputError(f"{alias} has no {tower!r} tower; it has {', '.join(record.towers)}")
        return read_status(self._files, prefix, tower, len(self), record.shard_rows)

    def errors(self, alias: str) -> pa.Table:
        """row, id, tower and reason of every row that failed.

        Raises:
            InputError: no such alias.
        """
        prefix, record = self._found(alias)
        failed = {tower: self.status(alias, tower) == FAILED for tower in record.towers}
        return current_failures(read_failures(self._files, prefix), failed)

    def provenance(self, alias: str) -> Provenance:
        """What made the features of ``alias``.

        Raises:
            InputError: no such alias.
        """
        return self.record(alias).provenance

    def record(self, alias: str) -> AliasRecord:
        """Fields, shards and provenance of ``alias``.

        Raises:
            InputError: no such alias.
        """
        return self._found(alias)[1]

    def label_text(self, alias: str) -> tuple[tuple[str, ...], npt.NDArray[np.float32]] | None:
        """Label names and the (C, D) embeddings of their prompts; None when there are none.

        Raises:
            InputError: no such alias.
        """
        found = read_label_text(self._files, self._found(alias)[0])
        return None if found is None else found[:2]

    def label_prompt(self, alias: str) -> str | None:
        """The prompt that ``label_text`` was made with.

        Raises:
            InputError: no such alias.
        """
        found = read_label_text(self._files, self._found(alias)[0])
        return None if found is None else found[2]

    def info(self) -> dict[str, Any]:
        """What there is, as plain JSON: rows, splits, labels, features, provenance, bytes."""
        return summary(self)

    def sync(
        self,
        samples: pa.Table,
        *,
        label_set: Sequence[str],
        task: str,
        source: Mapping[str, Any],
        replaces: str | None = None,
    ) -> SyncReport:
        """Merge a source's table by id; this object then shows the result.

        New ids are appended. Rows whose image or text content differs lose the status of the
        towers that read it. Labels, splits and other columns are taken over. Rows of the same
        source (``source["spec"]``) that are not in the table any more are marked as gone.

        Args:
            samples: the source's table, columns as in ``samples.COLUMNS`` and any others.
            label_set: its label names; ``labels`` holds indices into it.
            task: multilabel, multiclass, binary or unlabelled.
            source: its recipe, JSON-able, with at least ``spec``.
            replaces: spec of the store's source that this one is, under another spec.

        Raises:
            InputError: the table does not fit (see ``samples.canonical``).
            StoreLockedError: somebody writes.
        """
        asked = check_meta(label_set, task, dict(source))
        table = canonical(samples, asked)
        report = sync_files(self._files, table, asked, replaces)
        self._load(SamplesFile(self._files))
        return report

    def writer(
        self,
        alias: str,
        fields: Sequence[FieldSpec],
        identity: Mapping[str, Any],
        context: Mapping[str, Any],
        shard_rows: int | None = None,
        compress: Compression = None,
        overwrite: bool = False,
    ) -> AbstractContextManager[Writer]:
        """Lock ``alias`` for writing; a context manager that gives a :class:`Writer`.

        A new alias is created; one with the same identity is continued, and gets the towers of
        ``fields`` that it lacks.

        Args:
            alias: name of the features' folder.
            fields: arrays to write, at least one; all of a tower at once.
            identity: everything that decides the numbers, JSON-able; hashed to the fingerprint.
            context: what is good to know besides: versions, device, the spec as typed.
            shard_rows: rows of a shard of a new alias; None chooses (a power of two is best).
            compress: "zstd", or None for as it is (a new alias: uncompressed).
            overwrite: remove what the alias holds first.

        Raises:
            FingerprintMismatchError: the alias was made with another identity.
            InputError: a tower has other fields already, or another shard size or compression.
            StoreLockedError: another writer is at work on the alias.
            MmcError: the samples were synced or compacted since this object read them.
        """
        return open_writer(
            self._files,
            self._samples,
            alias,
            fields,
            identity,
            context,
            shard_rows=shard_rows,
            compress=compress,
            overwrite=overwrite,
        )

    def _found(self, alias: str) -> tuple[str, AliasRecord]:
        found = self._find(alias)
        if found is None:
            raise InputError(
                f"{self.path} has no backbone {alias!r}; {nearest(alias, self.aliases)}"
            )
        return found

    def _find(self, alias: str) -> tuple[str, AliasRecord] | None:
        if not alias:
            return None
        try:
            return find_alias(self._files, alias, self.meta.generation)
        except DamagedStoreError:
            if SamplesFile(self._files).meta.generation != self.meta.generation:
                raise MmcError(
                    f"{self.path} was compacted since it was opened; open it again"
                ) from None
            raise

    def _tower_of(self, name: str) -> tuple[str, str]:
        alias, _, field = name.partition("/")
        found = self._find(alias) if field else None
        if found is None or field not in found[1].fields:
            raise InputError(f"{self.path} has no feature {name!r}; {nearest(name, self.features)}")
        return alias, found[1].fields[field].tower
