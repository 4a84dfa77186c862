"""Bytes in and out, for a local folder or an fsspec URL: every write of the store is here.

A local write is: temporary file beside the target, sync, rename, sync of the folder. The four
functions at the top do just these steps, so that tests can stop a writer between any two of them.
An object store's put is atomic by itself.
"""

import contextlib
import errno
import io
import itertools
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy.typing as npt
import pyarrow as pa

from mmc.store.errors import InputError, MmcError

Buffer = bytes | npt.NDArray[Any]

_counter = itertools.count()

_ONE_SLASH = re.compile(r"(file|local|memory|s3|gs|gcs|https?|hdfs|abfss?):/?(?!/)")
"""A protocol without its ``//``: a folder of that name would be made in its place."""


def write_temporary(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Write a new file and bring its bytes to the disk."""
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target``, whatever is there."""
    os.replace(source, target)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove one file."""
    os.unlink(path)


class Files(ABC):
    """The files of one store, by key: a path with ``/`` relative to the store."""

    def __init__(self, url: str) -> None:
        self.url = url

    def where(self, key: str) -> str:
        """Full path or URL of a key, for messages."""
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Replace ``key`` by the buffers, one after another, at once or not at all.

        Raises:
            MmcError: the disk is full, read-only or not ours to write.
        """

        def fill(file: BinaryIO) -> None:
            for buffer in buffers:
                file.write(buffer)  # type: ignore[arg-type]  # an array is a buffer

        self.write_stream(key, fill)

    @abstractmethod
    def write_stream(self, key: str, fill: Callable[[BinaryIO], None]) -> None:
        """Like :meth:`write`, with a function that writes into the open file."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """All bytes of ``key``; None when there is no such file."""

    @abstractmethod
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes ``start`` to ``stop`` for each range; shorter where the file ends.

        Raises:
            FileNotFoundError: no such file.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of ``key``; None when there is no such file."""

    @abstractmethod
    def signature(self, key: str) -> Hashable:
        """Changes when the file is replaced; None when there is no such file."""

    @abstractmethod
    def names(self, key: str) -> list[str]:
        """Names directly under a folder, sorted; none when it does not exist."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether anything is at the store's path."""

    @abstractmethod
    def open(self, key: str) -> Any:
        """A file for Arrow to read; what it shows stays the same when ``key`` is replaced.

        Raises:
            FileNotFoundError: no such file.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_tree(self, key: str, *, tombstone: bytes | None = None) -> None:
        """Remove a folder; what is half removed is no zarr node any more: its zarr.json goes first.

        With ``tombstone`` that takes the place of the zarr.json, and goes last.
        """

    @abstractmethod
    def move_tree(self, source: str, target: str) -> None:
        """Move a folder to a free place, its zarr.json last."""

    @abstractmethod
    def clean(self, key: str, *, deep: bool) -> None:
        """Remove temporary files that a killed writer left in a folder (``deep``: and below)."""

    @abstractmethod
    def tree_bytes(self, key: str) -> int:
        """Bytes of all files under a folder."""


def open_files(path: str | os.PathLike[str]) -> Files:
    """The files under a local path (``~`` is the home folder) or an fsspec URL.

    Raises:
        InputError: an empty path, one that is not UTF-8, or a URL whose protocol fsspec does not
            know or cannot load.
    """
    url = os.fspath(path)
    if not url.strip():
        raise InputError("the path of the store is empty")
    try:
        url.encode()
    except UnicodeEncodeError:
        raise InputError(f"the path of the store, {url!r}, is not UTF-8; rename it") from None
    typed = _ONE_SLASH.match(url)
    if typed:
        right = f"{typed[1]}://{url[typed.end(1) + 1 :]}".replace(":///", "://")
        right = right.replace("://", ":///") if typed[1] in ("file", "local") else right
        raise InputError(f"{url} looks like a URL with a slash too few; write {right}")
    if "://" not in url:
        return LocalFiles(Path(os.path.expanduser(url)))
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url}: {error}") from None
    if url.startswith(("file://", "local://")):
        return LocalFiles(Path(root))
    return RemoteFiles(url, filesystem, root)


def _failure(verb: str, where: str, error: OSError) -> MmcError:
    reason = error.strerror or str(error)
    return MmcError(f"cannot {verb} {where}: {reason}; make room or rights, then run it again")


class LocalFiles(Files):
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root
        # Joining strings: a pathlib join costs as much as the system call that follows it.
        self._prefix = f"{root}{os.sep}"

    def path(self, key: str) -> Path:
        """Where a key lies."""
        return self.root / key

    def write_stream(self, key: str, fill: Callable[[BinaryIO], None]) -> None:
        target = self.path(key)
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{next(_counter)}.tmp")
        try:
            self._make_folder(target.parent)
            write_temporary(temporary, fill)
            rename(temporary, target)
            sync_folder(target.parent)
        except (OSError, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _failure("write", str(target), error) from error
            raise

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder")
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)

    def read(self, key: str) -> bytes | None:
        try:
            with open(self._prefix + key, "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failure("read", self.where(key), error) from error

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with open(self.path(key), "rb", buffering=0) as file:
            parts = []
            for start, stop in ranges:
                file.seek(start)
                parts.append(file.read(stop - start))
            return parts

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def signature(self, key: str) -> Hashable:
        try:
            return stat_signature(os.stat(self._prefix + key))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, key: str) -> list[str]:
        try:
            return sorted(os.listdir(self.path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self) -> bool:
        return self.root.exists()

    def open(self, key: str) -> Any:
        return pa.OSFile(str(self.path(key)))

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove(self.path(key))

    def remove_tree(self, key: str, *, tombstone: bytes | None = None) -> None:
        folder = self.path(key)
        if folder.is_dir():
            # The name goes at once: nobody meets a folder that is half there, tombstone or not.
            doomed = folder.with_name(f".{folder.name}.{os.getpid()}-{next(_counter)}.tmp")
            rename(folder, doomed)
            shutil.rmtree(doomed)

    def move_tree(self, source: str, target: str) -> None:
        self._make_folder(self.path(target).parent)
        rename(self.path(source), self.path(target))
        sync_folder(self.path(target).parent)

    def clean(self, key: str, *, deep: bool) -> None:
        folder = self.path(key)
        pattern = "**/.*.tmp" if deep else ".*.tmp"
        for leftover in list(folder.glob(pattern)):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.exists():
                remove(leftover)

    def tree_bytes(self, key: str) -> int:
        total = 0
        for folder, _, names in os.walk(self.path(key)):
            for name in names:
                # A writer's temporary file may be gone by now.
                with contextlib.suppress(FileNotFoundError):
                    total += os.path.getsize(os.path.join(folder, name))
        return total


def stat_signature(stat: os.stat_result) -> Hashable:
    """What changes when a file is replaced or written."""
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


class RemoteFiles(Files):
    """A prefix of an fsspec file system whose put is atomic (object stores, ``memory://``)."""

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        super().__init__(url)
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def _full(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def write_stream(self, key: str, fill: Callable[[BinaryIO], None]) -> None:
        buffer = io.BytesIO()
        fill(buffer)
        try:
            self.filesystem.pipe_file(self._full(key), buffer.getvalue())
        except OSError as error:
            raise _failure("write", self.where(key), error) from error

    def read(self, key: str) -> bytes | None:
        try:
            return bytes(self.filesystem.cat_file(self._full(key)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise _failure("read", self.where(key), error) from error

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        paths = [self._full(key)] * len(ranges)
        parts = self.filesystem.cat_ranges(paths, starts, stops, on_error="raise")
        return [bytes(part) for part in parts]

    def size(self, key: str) -> int | None:
        info = self._info(key)
        return None if info is None else int(info["size"])

    def signature(self, key: str) -> Hashable:
        info = self._info(key)
        if info is None:
            return None
        changing = ("etag", "ETag", "generation", "mtime", "LastModified", "created", "size")
        return tuple(str(info.get(name)) for name in changing)

    def _info(self, key: str) -> dict[str, Any] | None:
        self.filesystem.invalidate_cache()
        try:
            info: dict[str, Any] = self.filesystem.info(self._full(key))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def names(self, key: str) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            paths = self.filesystem.ls(self._full(key), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in paths})

    def exists(self) -> bool:
        self.filesystem.invalidate_cache()
        return bool(self.filesystem.exists(self.root))

    def open(self, key: str) -> Any:
        return self.filesystem.open(self._full(key), "rb")

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._full(key))

    def remove_tree(self, key: str, *, tombstone: bytes | None = None) -> None:
        node = f"{key}/zarr.json"
        paths = [path for path in self._find(key) if path != self._full(node)]
        if tombstone is None:
            self.remove(node)
        elif paths:
            self.write(node, [tombstone])
        for path in paths:
            self.filesystem.rm_file(path)
        self.remove(node)

    def move_tree(self, source: str, target: str) -> None:
        prefix = self._full(source)
        paths = self._find(source)
        # The group's own zarr.json last: until it is there, readers take the source.
        for path in sorted(paths, key=lambda path: path == f"{prefix}/zarr.json"):
            self.filesystem.cp_file(path, self._full(target) + path[len(prefix) :])
        self.remove_tree(source)

    def _find(self, key: str) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            return list(self.filesystem.find(self._full(key)))
        except FileNotFoundError:
            return []

    def clean(self, key: str, *, deep: bool) -> None:
        """A put is atomic: nothing can be left behind."""

    def tree_bytes(self, key: str) -> int:
        self.filesystem.invalidate_cache()
        try:
            return int(self.filesystem.du(self._full(key)))
        except FileNotFoundError:
            return 0
