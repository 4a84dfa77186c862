"""Members of a tar without unpacking it: names, offsets, sizes, from the headers alone.

Headers are read by seeking, so a tar of any size costs one small read per picture: what follows a
picture (caption, metadata, the next header) lies in the same few kilobytes. Python's `tarfile`
reads the same formats (v7, ustar, GNU, PAX) with an object of thirty fields for each member and
took seven times as long.

A name in a tar is data. It is never joined to a path.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from mmc.store.errors import InputError

Member = tuple[str, int, int]
"""Name, first byte of the content, bytes of the content."""

_BLOCK = 512
_WINDOW = 4096
_MOST_EXTENDED = 1 << 20
"""Bytes of a long name or a PAX header; more is damage."""

_FILES = frozenset(b"\x007" + b"0")
_WITHOUT_CONTENT = frozenset(b"123456")
_LINKS = frozenset(b"12")
_FOLDER, _SPARSE = ord("5"), ord("S")
_ABOUT_THE_NEXT = frozenset(b"LKxXg")
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip -k"),
    (b"BZh", "bzip2", "bunzip2 -k"),
    (b"\xfd7zXZ", "xz", "unxz -k"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)


class Tar:
    """One tar, open for reading; use it in a ``with``.

    ``skipped`` counts, by kind, the members that are no plain files. ``problem`` says in a few
    words why reading ended early, if it did.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.skipped: Counter[str] = Counter()
        self.problem: str | None = None
        self._window = b""
        self._start = 0

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None
        self._bytes = os.fstat(self._file).st_size
        if hasattr(os, "posix_fadvise"):  # the kernel would read ahead into every picture
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from ``offset``; fewer where the file ends."""
        at = offset - self._start
        if at < 0 or at + size > len(self._window):
            self._window, self._start, at = self._fetch(offset, max(size, _WINDOW)), offset, 0
        return self._window[at : at + size]

    def _fetch(self, offset: int, size: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self._file, size, offset)
            os.lseek(self._file, offset, os.SEEK_SET)
            return os.read(self._file, size)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None

    def members(self) -> Iterator[Member]:
        """The plain files, in order; stops at the end mark or at damage.

        Raises:
            InputError: the file is empty, packed or no tar at all.
        """
        self._check_start()
        offset, extended = 0, _NOTHING
        while True:
            header = self.read(offset, _BLOCK)
            if len(header) < _BLOCK:
                self._say_cut(f"its end mark is missing at byte {offset:,}")
                return
            if header[0] == 0 and not header.strip(b"\x00"):
                self._check_end(offset)
                return
            try:
                size = _number(header[124:136])
                if header[257:262] != b"ustar":
                    _check_old(header)
                kind, offset = header[156], offset + _BLOCK
                if kind in _ABOUT_THE_NEXT:
                    text = self.read(offset, size) if size <= _MOST_EXTENDED else b""
                    if len(text) < size:
                        self._say_cut(f"a name is missing at byte {offset:,}")
                        return
                    offset += _padded(size)
                    extended = extended.with_header(kind, text)
                    continue
                size = size if extended.size is None else extended.size
            except ValueError:
                self.problem = f"it is damaged at byte {offset:,}"
                return
            name, before = extended.name or _name(header), extended
            extended = extended.for_the_next
            if kind == _SPARSE or before.sparse:
                self.skipped["sparse file"] += 1
                offset = self._after_map(header, offset)
            elif kind not in _FILES or name[-1:] == "/":
                if kind in _LINKS:
                    self.skipped["link"] += 1
                elif kind != _FOLDER and name[-1:] != "/":
                    self.skipped["special file"] += 1
            elif offset + size > self._bytes:
                self._say_cut(f"member {name!r} is not whole")
                return
            else:
                yield name, offset, size
            if kind not in _WITHOUT_CONTENT:
                offset += _padded(size)

    def _check_start(self) -> None:
        start = self.read(0, _BLOCK)
        if not start:
            raise InputError(f"{self.path} is an empty file, not a tar")
        for mark, kind, command in _PACKED:
            if start.startswith(mark):
                raise InputError(
                    f"{self.path} is packed with {kind}, and samples cannot be read from the middle"
                    f" of that; unpack it first ({command}) and give the .tar"
                )
        try:
            if len(start) < _BLOCK:
                raise ValueError
            if start.strip(b"\x00"):
                _number(start[124:136])
                if start[257:262] != b"ustar":
                    _check_old(start)
        except ValueError:
            raise InputError(
                f"{self.path} is not a tar (it begins with {start[:16]!r}); download it again"
            ) from None

    def _check_end(self, offset: int) -> None:
        """Say so when another tar was put behind this one's end mark."""
        after = self.read(offset, 64 * _BLOCK).lstrip(b"\x00")
        if b"ustar" in after[:_BLOCK]:
            self.problem = f"more follows its end mark at byte {offset:,} (two tars in one file?)"

    def _after_map(self, header: bytes, offset: int) -> int:
        """Where the content of a GNU sparse file begins, behind the blocks of its map."""
        more = header[156] == _SPARSE and header[482] == 1
        while more:
            block = self.read(offset, _BLOCK)
            more = len(block) == _BLOCK and block[504] == 1
            offset += _BLOCK
        return offset

    def _say_cut(self, what: str) -> None:
        self.problem = f"it is cut off after {self._bytes:,} bytes: {what}"


@dataclass(frozen=True)
class _Extended:
    """What the headers before a member say of it: GNU long names, PAX records."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    for_all: str | None = None
    """A name that a PAX header gave for all members."""

    def with_header(self, kind: int, text: bytes) -> "_Extended":
        """With one header more. Raises ValueError for records that are none."""
        if kind == ord("L"):
            return replace(self, name=_text(text.partition(b"\x00")[0]))
        if kind == ord("K"):  # the target of a link is of no use here
            return self
        records = _records(text)
        if kind == ord("g"):
            path = records.get("path", self.for_all)
            return replace(self, name=self.name or path, for_all=path)
        return replace(
            self,
            name=records.get("path", self.name),
            size=_whole(records["size"].encode()) if "size" in records else self.size,
            sparse=self.sparse or any(key.startswith("GNU.sparse.") for key in records),
        )

    @property
    def for_the_next(self) -> "_Extended":
        """What stays for the member after this one."""
        return _NOTHING if self.for_all is None else _Extended(self.for_all, for_all=self.for_all)


_NOTHING = _Extended()


def _records(text: bytes) -> dict[str, str]:
    """PAX records: `length key=value\\n`, the length counting itself."""
    result = {}
    while text:
        digits = text.partition(b" ")[0]
        length = _whole(digits)
        key, equals, value = text[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or text[length - 1 : length] != b"\n":
            raise ValueError
        result[_text(key)] = _text(value)
        text = text[length:]
    return result


def _whole(digits: bytes) -> int:
    """A decimal number; a negative one would send the reader back and round for ever."""
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError
    return int(digits)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\x00")[0]
    if header[257:263] == b"ustar\x00" and header[345]:
        name = header[345:500].partition(b"\x00")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8 are shown as \\xff, for a table cannot hold them."""
    return name.decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    """An octal number, or GNU's binary one."""
    if field[0] >= 0x80:
        if field[0] == 0xFF:
            raise ValueError  # negative
        return int.from_bytes(bytes((field[0] & 0x7F, *field[1:])), "big")
    digits = field.strip(b" \x00")
    number = int(digits, 8) if digits else 0
    if number < 0:
        raise ValueError
    return number


def _check_old(header: bytes) -> None:
    """Raises ValueError unless this is a header of v7, whose checksum is its only mark."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if total != _number(header[148:156]):
        raise ValueError


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
