"""What `mmc predict` reads: a store, or new data that is embedded into one first."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mmc.extract.pipeline import Progress, Say
from mmc.extract.recipe import embed_like, source_options
from mmc.extract.sources.splits import split_named
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, NotAStoreError

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}

Opened = tuple[EmbeddingStore, NDArray[np.int64] | None]


@contextmanager
def open_input(
    input_: str,
    recipes: Callable[[], Sequence[Mapping[str, Any]]],
    trained_on: Mapping[str, Any],
    *,
    out: Path,
    store: str | None,
    given: Mapping[str, Any],
    device: str,
    report: Say,
    progress: Progress,
) -> Iterator[Opened]:
    """The store to predict on, and the rows to predict in order (None: choose them by split).

    Args:
        input_: a store, or a source.
        recipes: of the run's features; asked for only where they are needed.
        trained_on: recipe of the source that the run was trained on.
        out: the predictions' file; a store that is not kept lies beside it meanwhile.
        store: where the embeddings of a source are kept; None: nowhere.
        given: options of the source.
        device: where backbones run.
        report: called with each line for the user.
        progress: called with (stage, done, total).

    Raises:
        InputError: options that do not apply, or what `embed_like` raises.
    """
    if is_store(input_):
        if store or given:
            raise InputError(
                f"{input_} is a store: --store and the options of sources do not apply to it"
            )
        yield EmbeddingStore.open(input_), None
        return
    known = recipes()
    options = source_options(known, trained_on, input_, given)
    place = _kept(store) if store else _scratch(out, report)
    with place as path:

        def say(line: str) -> None:
            if store or not line.startswith(f"new store {path}"):  # nobody will see that one
                report(line)

        yield embed_like(known, input_, path, options, device=device, report=say, progress=progress)


def is_store(path: str) -> bool:
    """Whether ``path`` is a store, however new its format; a source is something else."""
    try:
        EmbeddingStore.open(path)
    except NotAStoreError:
        return False
    return True


def check_out(out: Path, run: Path, input_: str) -> None:
    """Refuse what is no place for predictions, and to write them over what they are made from.

    Raises:
        InputError: ``out`` is no name for a CSV file, is the input or a table of it, or lies in a
            run or a store.
    """
    if out.exists() and not out.is_file():
        what = "a folder" if out.is_dir() else "no ordinary file"
        raise InputError(f"--out {out} is {what}; name a CSV file")
    if out.suffix.lower() in _COMPRESSED:
        raise InputError(f"--out {out}: the CSV file is not compressed; name it {out.stem}")
    target = out.absolute()
    inputs = [Path(piece.rpartition("=")[2]).absolute() for piece in input_.split(",")]
    folders = [path for path in target.parents if (path / "run.json").is_file()]
    folders += [path for path in target.parents if (path / "zarr.json").is_file()]
    is_table = target.parent in inputs and split_named(target.name.partition(".")[0])
    if target in inputs or is_table:
        raise InputError(f"--out {out} is INPUT itself; name another file")
    if folders or target.parent == run.absolute():
        raise InputError(f"--out {out} is inside a run or a store; name a file elsewhere")


@contextmanager
def _kept(store: str) -> Iterator[str]:
    yield store


@contextmanager
def _scratch(out: Path, report: Say) -> Iterator[str]:
    """A store beside the output, for as long as it is needed; removes what killed ones left."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".mmc-predict-*"):
        with suppress(Timeout), FileLock(left / "lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=".mmc-predict-", dir=parent) as folder,
        FileLock(Path(folder) / "lock"),
    ):
        try:
            yield f"{folder}/store"
        except KeyboardInterrupt:
            report("that store was a temporary one; with --store FOLDER it would be kept")
            raise
