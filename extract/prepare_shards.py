"""Writing prepared samples: tars for WebDataset, folders of images for tables.

A shard appears under its name when it is complete. Names in it are numbers made
here, never ids: an id may hold slashes, dots or anything else, and stands in the metadata.
"""

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmc.extract.sources.prepared import MARK
from mmc.extract.sources.tar import Tar
from mmc.store.errors import MmcError
from mmc.store.files import LocalFiles, rename, sync_folder


@dataclass(frozen=True, kw_only=True)
class Ready:
    """One sample, ready to be written."""

    key: str
    image: bytes | None
    text: str | None
    metadata: dict[str, Any]


def key_of(row: int) -> str:
    """The name of a sample: its place in the source, so that readers can restore the order."""
    return f"{row:09d}"


class TarShards:
    """Shards `<folder>/00000.tar` for WebDataset."""

    def __init__(self, out: Path) -> None:
        self._files = LocalFiles(out)

    def name(self, folder: str, number: int) -> str:
        """Of a shard, below the output."""
        return f"{folder}/{number:05d}.tar"

    def write(self, name: str, samples: Iterator[Ready]) -> None:
        """Write one shard.

        Raises:
            MmcError: the disk is full or not ours to write; nothing is left under the name.
        """

        def fill(file: BinaryIO) -> None:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    for kind, content in _members(sample):
                        # No time, no owner: the same samples make the same bytes.
                        member = tarfile.TarInfo(f"{sample.key}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

        self._files.write_stream(name, fill)

    def contents(self, name: str) -> dict[str, tuple[int | None, int | None]]:
        """{key: (offset, size) of its picture, or Nones} of a finished shard."""
        found: dict[str, tuple[int | None, int | None]] = {}
        with Tar(str(self._files.path(name))) as tar:
            for member, offset, size in tar.members():
                key, _, kind = member.partition(".")
                if kind == "jpg":
                    found[key] = (offset, size)
                else:
                    found.setdefault(key, (None, None))
            if tar.problem:
                raise MmcError(f"{tar.path}: {tar.problem}; delete it and prepare again")
        return found


def _members(sample: Ready) -> Iterator[tuple[str, bytes]]:
    if sample.image is not None:
        yield "jpg", sample.image
    yield "json", json.dumps({**sample.metadata, MARK: 1}, ensure_ascii=False).encode()
    if sample.text is not None:
        # Readers drop a byte order mark; a text that begins with one keeps it.
        yield "txt", sample.text.encode("utf-8-sig" if sample.text[:1] == "\ufeff" else "utf-8")


class ImageFolders:
    """Shards `images/00000`, folders of pictures; the texts and the rest are in tables."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def name(self, folder: str, number: int) -> str:
        """Of a shard, below the output; splits are told apart by the tables."""
        return f"images/{number:05d}"

    def write(self, name: str, samples: Iterator[Ready]) -> None:
        """Write one shard; a folder whose name begins with a dot until it is complete.

        Raises:
            MmcError: the disk is full or not ours to write; nothing is left under the name.
        """
        target = self._out / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            for sample in samples:
                if sample.image is not None:
                    (temporary / f"{sample.key}.jpg").write_bytes(sample.image)
            sync_folder(temporary)
            rename(temporary, target)
            sync_folder(target.parent)
        except OSError as error:
            raise MmcError(
                f"cannot write {target}: {error.strerror or error}; make room or rights, then run"
                " it again"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)

    def contents(self, name: str) -> dict[str, tuple[int | None, int | None]]:
        """{key: (None, size)} of the pictures in a finished shard."""
        with os.scandir(self._out / name) as found:
            return {entry.name.partition(".")[0]: (None, entry.stat().st_size) for entry in found}
