"""Pairs of pictures and texts from sources, in batches, for training and for measuring.

Every source is indexed once (tars by their headers), and pictures are read from where they lie, so
an order is one of all pairs, not of a buffer's. What is random follows from the seed and the epoch.

Legend: n pairs, b pairs of this process in a batch.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmc.extract.backbones.base import TokenBatch
from mmc.extract.content import Content
from mmc.extract.images import ImageError, decode
from mmc.extract.keys import add_keys, drop_duplicates
from mmc.extract.plan import Rows
from mmc.extract.settings import usable_cores
from mmc.extract.sources import Samples, SourceOptions, read_source
from mmc.extract.training.distributed import World
from mmc.extract.training.options import MORE
from mmc.extract.training.seeds import Use
from mmc.extract.transforms import ImageTransform
from mmc.store.errors import InputError
from mmc.store.holdout import held_out, names_of
from mmc.store.samples import UNKNOWN

Say = Callable[[str], None]

_AHEAD = 2
"""Batches that are decoded while another is trained on."""
_LEAST = 2
"""Pairs that each split needs: one alone has no negative."""
_YES, _NO = {"1", "1.0", "true", "yes", "y"}, {"0", "0.0", "false", "no", "n", ""}


class Reader(Protocol):
    """How pictures and texts become what two towers take; backbones do it."""

    @property
    def image_transform(self) -> ImageTransform | None:
        """How a picture is brought to its size; not None."""

    def tokenize(self, texts: list[str]) -> TokenBatch:
        """Token ids of ``texts``."""


@dataclass(frozen=True)
class Batch:
    """Pairs, decoded and tokenized."""

    rows: Rows
    """(b,) of the set."""
    pixels: Tensor
    """uint8 (b, 3, H, W); zeros where ``valid`` is False."""
    tokens: TokenBatch
    valid: Tensor
    """(b,) bool: the picture could be used."""


@dataclass
class PairSet:
    """The samples of one or more sources."""

    ids: pa.ChunkedArray
    content: Content
    splits: dict[str, Rows]
    """Rows of train and val that have a picture and a text that belong together."""
    source: NDArray[np.int64]
    """(n,) which source a row is from."""
    images: NDArray[np.int64]
    """(n,) the same number for rows of the same picture, -1 = none. Of the same content where val
    was held out, for which pictures are read; otherwise of the same place."""
    texts: NDArray[np.int64]
    """(n,) the same number for rows of the same text, -1 = none."""
    labels: list[list[int] | None]
    """n rows; None = unlabelled."""
    label_set: tuple[str, ...]
    task: str
    """Of all sources; `mixed` where they differ."""
    groups: NDArray[np.int64]
    """(n,) the same number for rows of the same labels, -1 = unlabelled."""
    digest: str
    """Hash of all that decides a training on these rows."""
    notes: list[str] = field(default_factory=list)

    def labels_of(self, rows: Rows) -> list[list[int] | None]:
        """The labels of ``rows``; None = unlabelled."""
        return [self.labels[row] for row in rows]

    def contents_of(self, rows: Rows) -> Tensor:
        """Picture and text of each row, as numbers: int64 (len(rows), 2)."""
        return torch.from_numpy(np.stack([self.images[rows], self.texts[rows]], 1))

    def groups_of(self, rows: Rows) -> Tensor:
        """The class of each row, int64 (len(rows),), -1 = none."""
        return torch.from_numpy(self.groups[rows])


def read_pairs(
    spec: str, options: SourceOptions, pair_column: str | None, *, workers: int | None, report: Say
) -> PairSet:
    """The pairs of a source, or of several with ``::`` between them.

    Raises:
        InputError: a source cannot be read, has no pairs, or its mask is not one of 1 and 0.
    """
    pieces = [piece.strip() for piece in spec.split(MORE)]
    if not all(pieces):
        raise InputError(f"SOURCE {spec!r}: write a source on both sides of each {MORE}")
    read = []
    for piece in pieces:
        samples = read_source(piece, options)
        for line in (*samples.notes, *(f"warning: {line}" for line in samples.warnings)):
            report(line)
        if samples.unsplit and not samples.label_set:
            report("pairs train without labels, too: all rows are train")
            train = pa.repeat("train", len(samples.table))
            at = samples.table.column_names.index("split")
            samples.table = samples.table.set_column(at, "split", train)
        if options.dedupe:
            drop_duplicates(samples, workers=workers or usable_cores(), report=report)
        if UNKNOWN.name in samples.table.column_names:
            count = len(samples.table) - samples.table[UNKNOWN.name].null_count
            report(f"labels: {count:,} samples with unknown labels count as unlabelled in tuning")
        read.append(samples)
    label_set = tuple(dict.fromkeys(name for samples in read for name in samples.label_set))
    labels = [row for samples in read for row in _labels(samples, label_set)]
    table = pa.concat_tables(
        [_core(samples.table, at) for at, samples in enumerate(read)], promote_options="permissive"
    )
    sources = [samples.source for samples in read]
    together = [
        _together(samples.table, pair_column, piece)
        for samples, piece in zip(read, pieces, strict=True)
    ]
    texts, places = _codes(_blank_to_null(table["text"])), _places(table)
    images = _codes(places)
    usable = (images >= 0) & (texts >= 0)
    valid = usable & np.concatenate(together)
    splits = _splits(table, valid)
    notes: list[str] = []
    divide = not len(splits["val"]) and len(splits["train"]) > 0
    if divide:
        keys = pa.chunked_array(
            add_keys(samples, None, workers=workers or usable_cores())["image_key"].combine_chunks()
            for samples in read
        )
        splits, notes = _hold_out(table["id"], keys, splits["train"])
        images = _codes(pc.coalesce(keys, places))
        _check_division(spec, splits, images)
    _explain(spec, usable, valid, splits, pair_column)
    for what, numbers in (("picture", images), ("text", texts)):
        if len(np.unique(numbers[splits["train"]])) == 1:
            notes.append(f"warning: all pairs of train have one {what}: nothing tells them apart")
    if pair_column is not None:
        apart = int((usable & ~valid).sum())
        notes.append(
            f"{pair_column}: {apart:,} of {int(usable.sum()):,} pairs do not belong together"
        )
    tasks = {samples.task for samples in read}
    groups = _groups(labels, "multilabel" in tasks)
    return PairSet(
        ids=table["id"],
        content=Content(table, sources),
        splits=splits,
        source=table["_source"].to_numpy().astype(np.int64),
        images=images,
        texts=texts,
        labels=labels,
        label_set=label_set,
        task=tasks.pop() if len(tasks) == 1 else "mixed",
        groups=groups,
        digest=_digest(table, labels, label_set, splits),
        notes=notes,
    )


def _core(table: pa.Table, source: int) -> pa.Table:
    """The columns that training reads, and which source it is."""
    size = table["size"] if "size" in table.column_names else pa.nulls(len(table), pa.int64())
    core = table.select(["id", "split", "text", "image", "image_offset"])
    core = core.append_column("size", size)
    return core.append_column("_source", pa.array(np.full(len(table), source, np.int16)))


def _labels(samples: Samples, label_set: Sequence[str]) -> list[list[int] | None]:
    """Labels of each row as places in the label set of all sources.

    A sample with unknown labels counts as unlabelled: pairs go by whole sets of labels.
    """
    at = {name: place for place, name in enumerate(label_set)}
    moved = [at[name] for name in samples.label_set]
    rows = samples.table["labels"].to_pylist()
    if UNKNOWN.name in samples.table.column_names:
        lacking = samples.table[UNKNOWN.name].is_valid().to_pylist()
        rows = [None if lacks else row for row, lacks in zip(rows, lacking, strict=True)]
    return [None if row is None else sorted(moved[label] for label in row) for row in rows]


def _together(table: pa.Table, column: str | None, where: str) -> NDArray[np.bool_]:
    """(n,) what the column of the mask says; all True without one."""
    if column is None:
        return np.ones(len(table), np.bool_)
    if column not in table.column_names:
        raise InputError(
            f"{where} has no column {column!r} for --pair-column; its columns are "
            f"{', '.join(table.column_names)}"
        )
    cells = table[column].combine_chunks().cast(pa.string()).fill_null("").dictionary_encode()
    words = [cell.strip().lower() for cell in cells.dictionary.to_pylist()]
    for place, word in enumerate(words):
        if word not in _YES | _NO:
            row = int(np.flatnonzero(cells.indices.to_numpy() == place)[0])
            raise InputError(
                f"{where}: sample {table['id'][row].as_py()}: {column} is {word!r}; a mask of "
                "pairs holds 1 and 0"
            )
    answers = np.array([word in _YES for word in words], np.bool_)
    return answers[cells.indices.to_numpy()]


def _blank_to_null(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.if_else(pc.fill_null(blank, True), pa.scalar(None, pa.string()), texts)


def _places(table: pa.Table) -> pa.ChunkedArray:
    """(n,) where each picture lies, as one string; null = none."""
    offsets = table["image_offset"].cast(pa.string()).fill_null("")
    source = table["_source"].cast(pa.string())
    return pc.binary_join_element_wise(source, table["image"], offsets, "\n")


def _codes(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """(n,) a number for each value, the same for the same; -1 for null."""
    indices = values.combine_chunks().dictionary_encode().indices
    codes: NDArray[np.int64] = pc.fill_null(indices, -1).to_numpy().astype(np.int64)
    return codes


def _splits(table: pa.Table, valid: NDArray[np.bool_]) -> dict[str, Rows]:
    """Rows of train and val."""
    names = np.array(table["split"].to_pylist(), object)
    return {name: np.flatnonzero(valid & (names == name)) for name in ("train", "val")}


def _hold_out(
    ids: pa.ChunkedArray, pictures: pa.ChunkedArray, train: Rows
) -> tuple[dict[str, Rows], list[str]]:
    """A tenth of ``train`` as val, as train-head holds out; all captions of a picture together.

    Of few pictures more are held out than train-head does, those among them.
    """
    held = held_out(names_of(ids, pictures, train), _LEAST)
    found = {"train": train[~held], "val": train[held]}
    return found, [f"no val split: {len(found['val']):,} of {len(train):,} train pairs held out"]


def _explain(
    spec: str,
    usable: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    splits: dict[str, Rows],
    pair_column: str | None,
) -> None:
    """Raises InputError where there is nothing to train on or to measure by."""
    if not usable.any():
        raise InputError(
            f"{spec} has no sample with both a picture and a text, as tuning and pretraining need; "
            "name the columns with --image-column and --text-column"
        )
    if not valid.any():
        raise InputError(f"{spec}: by {pair_column} no picture and text belong together")
    for name, rows in splits.items():
        if len(rows) < _LEAST:
            raise InputError(
                f"{spec} has {len(rows)} pairs in {name}, at least 2 are needed; see "
                "--split-column and --split-by"
            )


def _check_division(spec: str, splits: dict[str, Rows], images: NDArray[np.int64]) -> None:
    """Raises InputError where there were too few pictures to hold some out."""
    different = [len(np.unique(images[rows])) for rows in splits.values()]
    if min(different) < _LEAST:
        total = len(np.unique(images[np.concatenate([*splits.values()])]))
        raise InputError(
            f"{spec} has no val split, and too few different pictures in its pairs ({total}): at "
            f"least {2 * _LEAST} are needed, {_LEAST} to train on and {_LEAST} to measure by; see "
            "--split-column and --split-by"
        )


def _groups(labels: Sequence[list[int] | None], multilabel: bool) -> NDArray[np.int64]:
    """(n,) a number for each set of labels; of several labels, none is no class of its own."""
    seen: dict[tuple[int, ...], int] = {}
    codes = np.full(len(labels), -1, np.int64)
    for row, some in enumerate(labels):
        if some is not None and (some or not multilabel):
            codes[row] = seen.setdefault(tuple(some), len(seen))
    return codes


def _digest(
    table: pa.Table,
    labels: Sequence[Any],
    label_set: Sequence[str],
    splits: dict[str, Rows],
) -> str:
    digest = hashlib.sha256(repr(label_set).encode())
    for name in ("id", "text", "image"):
        digest.update("\0".join(value or "" for value in table[name].to_pylist()).encode())
    digest.update(repr(list(labels)).encode())
    for rows in splits.values():
        digest.update(rows.astype(np.int64).tobytes())
    return digest.hexdigest()


class Sampler:
    """Which pairs an epoch has, in which order."""

    def __init__(
        self,
        pairs: PairSet,
        *,
        factors: Sequence[float] = (),
        samples: int | None = None,
        seed: int,
    ) -> None:
        """
        Args:
            factors: how often a pair of each source is drawn; () = as often as any other.
            samples: pairs drawn with replacement; None: each once, unless there are factors.

        Raises:
            InputError: not as many factors as sources.
        """
        self._rows, self._seed = pairs.splits["train"], seed
        sources = int(pairs.source.max()) + 1
        if factors and len(factors) != sources:
            raise InputError(f"--upsample has {len(factors)} factors for {sources} sources")
        self.replaces = samples is not None or bool(factors)
        self.length = samples or len(self._rows)
        shares = np.asarray(factors or [1.0] * sources)
        weights = (shares / shares.max())[pairs.source[self._rows]]  # huge ones stay finite in sum
        self._cumulated = np.cumsum(weights)

    def epoch(self, epoch: int) -> Rows:
        """(length,) rows."""
        if self.replaces:
            random = np.random.default_rng([self._seed, Use.DRAW, epoch])
            drawn = random.random(self.length) * self._cumulated[-1]
            places = np.searchsorted(self._cumulated, drawn, side="right")
            return self._rows[np.minimum(places, len(self._rows) - 1)]  # rounded up to the total
        return np.random.default_rng([self._seed, Use.ORDER, epoch]).permutation(self._rows)


class Loader:
    """Reads, decodes and tokenizes batches of a set a little ahead of their use."""

    def __init__(
        self, pairs: PairSet, reader: Reader, world: World, *, workers: int, max_pixels: int
    ) -> None:
        self._pairs, self._reader, self.world = pairs, reader, world
        self._workers, self._max_pixels = workers, max_pixels
        self.failed: dict[int, str] = {}
        """Rows whose picture could not be used, and why."""

    def batches(self, rows: Rows, size: int) -> Iterator[Batch]:
        """This process's share of batches of ``size`` rows; a tail that fills none is left out."""
        return self._load(
            rows[start : start + size][self.world.slice(size)]
            for start in range(0, len(rows) - size + 1, size)
        )

    def share(self, rows: Rows, size: int) -> Iterator[Batch]:
        """This process's share of ``rows`` in batches of at most ``size``."""
        mine = rows[self.world.slice(len(rows))]
        return self._load(mine[start : start + size] for start in range(0, len(mine), size))

    def _load(self, batches: Iterator[Rows]) -> Iterator[Batch]:
        waiting: deque[tuple[Rows, list[Future[Tensor | ImageError]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, "mmc-decode")
        try:
            while True:
                while len(waiting) <= _AHEAD and (rows := next(batches, None)) is not None:
                    waiting.append((rows, [pool.submit(self._decode, int(row)) for row in rows]))
                if not waiting:
                    return
                rows, pictures = waiting.popleft()
                yield self._batch(rows, [picture.result() for picture in pictures])
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, row: int) -> Tensor | ImageError:
        transform = self._reader.image_transform
        assert transform is not None
        try:
            data = self._pairs.content.image_bytes(row)
            return decode(data, transform, max_pixels=self._max_pixels)
        except ImageError as error:
            return error

    def _batch(self, rows: Rows, pictures: Sequence[Tensor | ImageError]) -> Batch:
        transform = self._reader.image_transform
        assert transform is not None
        pixels = torch.zeros((len(rows), *transform.shape), dtype=torch.uint8)
        valid = torch.ones(len(rows), dtype=torch.bool)
        for place, picture in enumerate(pictures):
            if isinstance(picture, Tensor):
                pixels[place] = picture
            else:
                valid[place] = False
                self.failed[int(rows[place])] = str(picture)
        tokens = self._reader.tokenize(self._pairs.content.texts(rows))
        if self.world.device.type == "cuda":
            pixels = pixels.pin_memory()
        return Batch(rows, pixels, tokens, valid)
