"""The CSV forms of predictions: RFC 4180 quoting, UTF-8, ``\\n`` line ends, one header line.

| form | columns |
|---|---|
| default | ``id,labels``: names joined by the source's separator |
| kaggle | the same, with the header names of the source (``ImageID,Labels``) |
| hateful-memes | ``id,proba,label``: probability of the second class, name of the decided one |
| wide | ``id`` and a column per label, 1 or 0 |
| long | ``id,label,score,rank``: a row per decided label, best first |

With scores, default, kaggle and wide get a ``score:<label>`` column per label. A sample without any
decided label and a sample that failed both keep their row, with empty cells; a failed one has empty
scores too. Scores are written with the digits that give the same float32 back.

Legend: n rows, C labels.
"""

import contextlib
import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run
    from mmc.heads.predict import Predictions

Form = Literal["auto", "default", "kaggle", "hateful-memes", "long", "wide"]
FORMS: tuple[str, ...] = get_args(Form)
# Tried in this order where the source names no separator, or one that occurs in a label.
SEPARATORS = ("|", ";", ",", "\t")
# Cells turned into text at once.
CHUNK_CELLS = 1 << 21
SCORE_PREFIX = "score:"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a predictions file is written, and how it is read back."""

    form: str
    label_set: tuple[str, ...]
    task: str
    id_header: str = "id"
    labels_header: str = "labels"
    separator: str = " "
    scores: bool = False

    @property
    def single(self) -> bool:
        """One label per sample."""
        return self.task != "multilabel"

    @property
    def header(self) -> tuple[str, ...]:
        """Names of all columns."""
        if self.form == "long":
            return (self.id_header, "label", "score", "rank")
        if self.form == "hateful-memes":
            return (self.id_header, "proba", "label")
        middle = self.label_set if self.form == "wide" else (self.labels_header,)
        tail = tuple(f"{SCORE_PREFIX}{label}" for label in self.label_set) if self.scores else ()
        return (self.id_header, *middle, *tail)


def choose(
    form: str,
    run: "Run",
    source: Mapping[str, Any],
    *,
    scores: bool = False,
    top_k: int | None = None,
) -> Layout:
    """The layout for ``form``; auto follows the form of the source that is predicted.

    Args:
        form: one of `FORMS`.
        source: recipe of the predicted source; the run's own fills what it lacks (a test file has
            no label column).

    Raises:
        InputError: no such form, or one that cannot hold this task, these labels or scores.
    """
    if form not in FORMS:
        raise InputError(f"unknown format {form!r}; choose from {', '.join(FORMS)}")
    if form == "auto":
        form = source.get("form") or run.source.get("form") or "default"
        if form not in FORMS or (form == "hateful-memes" and run.task != "binary"):
            form = "default"
    common: dict[str, Any] = {"label_set": run.label_set, "task": run.task}
    if form == "hateful-memes":
        if run.task != "binary":
            raise InputError(f"--format hateful-memes is for binary tasks; this run is {run.task}")
        if top_k is not None and top_k > 1:
            raise InputError("--format hateful-memes has one label per sample; leave --top-k out")
    if scores and form in ("hateful-memes", "long"):
        raise InputError(f"--format {form} has its own score column; leave --scores out")
    if form == "wide" and "id" in run.label_set:
        raise InputError("--format wide has a column per label, and a label is called id too")
    if form in ("hateful-memes", "wide", "long"):
        return Layout(form=form, scores=scores, **common)
    separator = _separator(form, run, source)
    if form == "default":
        return Layout(form=form, separator=separator, scores=scores, **common)
    columns = {**_named(run.source), **_named(source)}
    return Layout(
        form=form,
        separator=separator,
        scores=scores,
        id_header=columns.get("id") or columns.get("image") or "ImageID",
        labels_header=columns.get("labels") or "Labels",
        **common,
    )


def write(blocks: Iterable["Predictions"], path: str | Path, layout: Layout) -> Path:
    """Write predictions block by block; the file appears whole or not at all.

    Raises:
        InputError: the path cannot be written.
        MmcError: the disk is full.
    """
    path = Path(path)
    # A link stays one; a pipe or a device would be replaced by a file.
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(f"cannot write {path}: it is no ordinary file; name one, and read that")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write((",".join(quote_one(name) for name in layout.header) + "\n").encode())
            for block in blocks:
                _write_block(file, block, layout)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    except OSError as error:
        raise MmcError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def quote_one(text: str) -> str:
    """One cell, quoted when it has to be."""
    if any(c in text for c in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


# -- choosing --------------------------------------------------------------------------------------


def _named(source: Mapping[str, Any]) -> dict[str, str]:
    return {role: name for role, name in source.get("columns", {}).items() if name}


def _separator(form: str, run: "Run", source: Mapping[str, Any]) -> str:
    """The source's separator, unless a label holds it: then splitting would give other labels."""
    wished = source.get("label_separator") or run.source.get("label_separator")
    if form == "kaggle":
        wished = wished or " "
        _require_free(wished, run)
        return str(wished)
    for candidate in (wished, *SEPARATORS):
        if candidate and (run.task != "multilabel" or not _holders(candidate, run)):
            return str(candidate)
    raise InputError(
        f"every separator ({' '.join(map(repr, SEPARATORS))}) occurs in a label name; "
        "use --format wide or long"
    )


def _require_free(separator: str, run: "Run") -> None:
    holders = _holders(separator, run)
    if holders and run.task == "multilabel":
        raise InputError(
            f"label {holders[0]!r} contains the separator {separator!r}; "
            "use --format default, wide or long"
        )


def _holders(separator: str, run: "Run") -> list[str]:
    return [label for label in run.label_set if separator in label]


# -- writing ---------------------------------------------------------------------------------------


def _write_block(file: BinaryIO, block: "Predictions", layout: Layout) -> None:
    step = max(1, CHUNK_CELLS // len(layout.label_set))
    names = pa.array([quote_one(label) for label in layout.label_set], pa.string())
    for i in range(0, len(block.ok), step):
        part = slice(i, i + step)
        ids = _quoted(block.ids[part])
        p = block.probabilities[part].numpy()
        chosen, ok = block.decisions[part].numpy(), block.ok[part].numpy()
        if layout.form == "long":
            columns = _long_columns(ids, names, block.logits[part].numpy(), p, chosen)
        else:
            columns = [ids, *_columns(names, p, chosen, ok, layout)]
        _write_lines(file, columns)


def _columns(
    names: pa.Array, p: npt.NDArray[np.float32], chosen: Bools, ok: Bools, layout: Layout
) -> list[pa.Array]:
    """Columns after the id, one row per sample."""
    if layout.form == "hateful-memes":
        return [_numbers(p[:, 1], ok), _pick(names, chosen, ok)]
    if layout.form == "wide":
        ones = chosen.astype(np.int8)
        columns = [pc.cast(pa.array(c, mask=~ok), pa.string()) for c in ones.T]
    elif layout.single and (chosen.sum(1) <= 1).all():
        columns = [_pick(names, chosen, ok)]
    else:
        plain = pa.array(layout.label_set, pa.string())
        columns = [_quoted(_joined(plain, chosen, layout.separator))]
    if layout.scores:
        columns += [_numbers(column, ok) for column in p.T]
    return columns


def _long_columns(
    ids: pa.Array,
    names: pa.Array,
    logits: npt.NDArray[np.float32],
    p: npt.NDArray[np.float32],
    chosen: Bools,
) -> list[pa.Array]:
    """id, label, score, rank: a row per decided label; an empty row for a sample with none."""
    counts = chosen.sum(1)
    sample, label = chosen.nonzero()
    # By sample, then best first; equal logits in the label set's order.
    order = np.lexsort((label, -logits[sample, label], sample))
    sample, label = sample[order], label[order]
    first = np.concatenate([[0], counts.cumsum()[:-1]])
    rank = np.arange(len(sample)) - first[sample] + 1
    empty = (counts == 0).nonzero()[0]
    place = np.argsort(np.concatenate([sample, empty]), kind="stable")

    def padded(values: pa.Array) -> pa.Array:
        filled = pa.concat_arrays([values, pa.nulls(len(empty), pa.string())])
        return filled.take(pa.array(place))

    return [
        ids.take(pa.array(np.concatenate([sample, empty])[place])),
        padded(names.take(pa.array(label))),
        padded(_numbers(p[sample, label], np.ones(len(sample), bool))),
        padded(pc.cast(pa.array(rank), pa.string())),
    ]


def _pick(names: pa.Array, chosen: Bools, ok: Bools) -> pa.Array:
    """The (first) decided label of each row; null where there is none."""
    has = ok & chosen.any(1)
    return names.take(pa.array(chosen.argmax(1), mask=~has))


def _joined(names: pa.Array, chosen: Bools, separator: str) -> pa.Array:
    """Names of the decided labels of each row, in the label set's order, joined."""
    offsets = np.concatenate([[0], chosen.sum(1).cumsum()]).astype(np.int32)
    lists = pa.ListArray.from_arrays(offsets, names.take(pa.array(chosen.nonzero()[1])))
    return pc.binary_join(lists, separator)


def _numbers(values: npt.NDArray[np.float32], ok: Bools) -> pa.Array:
    """Shortest text that reads back as the same float32; null where not ok or not a number."""
    missing = ~ok | np.isnan(values)
    return pc.cast(pa.array(np.ascontiguousarray(values), mask=missing), pa.string())


def _quoted(values: pa.Array) -> pa.Array:
    """Cells quoted where they have to be."""
    needs = pc.match_substring_regex(values, r'[",\r\n]')
    if not pc.any(needs).as_py():
        return values
    escaped = pc.replace_substring(values, '"', '""')
    wrapped = pc.binary_join_element_wise('"', escaped, '"', "")
    return pc.if_else(needs, wrapped, values)


def _write_lines(file: BinaryIO, columns: list[pa.Array]) -> None:
    """Columns of text to lines; null is an empty cell."""
    filled = [pc.fill_null(column, "") for column in columns]
    filled[-1] = pc.binary_join_element_wise(filled[-1], "\n", "")
    lines = pc.binary_join_element_wise(*filled, ",")
    if not len(lines):
        return
    if isinstance(lines, pa.ChunkedArray):
        lines = lines.combine_chunks()
    _, offsets, data = lines.buffers()
    bounds = np.frombuffer(offsets, np.int32)[lines.offset : lines.offset + len(lines) + 1]
    file.write(memoryview(data)[bounds[0] : bounds[-1]])


def read_header(path: str | Path) -> list[str]:
    """The column names of a CSV file."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
