"""From a file to its text: decompression and character encoding, never a silent wrong guess."""

import codecs
import gzip
import io
import os
import zlib

from mmc.store.errors import InputError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 1 << 22


class TextFile:
    """The bytes of one file and how to read them as text.

    UTF-8, or UTF-16 where the file starts with its byte order mark. Bytes that are not UTF-8 are
    read as cp1252 (Windows' superset of Latin-1; its five unassigned bytes as Latin-1) and
    ``warning`` says so, unless the encoding was given: then they are an error.
    """

    def __init__(self, path: str, encoding: str | None = None) -> None:
        self.name = os.path.basename(path)
        self.warning: str | None = None
        self._data = _read_bytes(path)
        if not self._data.strip():
            raise InputError(f"{path} is empty")
        if encoding is not None and codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"
        self.encoding = encoding or self._recognise()
        if encoding is not None and (bad := _first_bad_line(self._data, encoding)):
            raise InputError(f"{self.name}:{bad} is not {encoding}; give the file's own --encoding")

    def stream(self) -> io.TextIOWrapper:
        """The text from its start, line ends untouched."""
        return io.TextIOWrapper(
            io.BytesIO(self._data), self.encoding, errors=_ERRORS.get(self.encoding), newline=""
        )

    def text(self) -> str:
        """The whole text."""
        return self.stream().read()

    def _recognise(self) -> str:
        for mark, encoding in _MARKS:
            if self._data.startswith(mark):
                if bad := _first_bad_line(self._data, encoding):
                    raise InputError(
                        f"{self.name}:{bad} is not {encoding}, though its first bytes say so;"
                        " save it again as UTF-8"
                    )
                return encoding
        if self._data[:400].count(0) > len(self._data[:400]) // 4:
            raise InputError(
                f"{self.name} looks like UTF-16 without a byte order mark; say so with"
                " --encoding utf-16-le (or utf-16-be)"
            )
        bad = _first_bad_line(self._data, "utf-8")
        if not bad:
            return "utf-8"
        self.warning = (
            f"{self.name} is not UTF-8 (first at line {bad}): read as cp1252 (Windows, Latin-1);"
            " give --encoding if accented letters look wrong"
        )
        return "cp1252"


def _cp1252_gaps(error: UnicodeError) -> tuple[str, int]:
    """Decode the bytes that cp1252 leaves open as Latin-1 does."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("mmc.latin-1", _cp1252_gaps)
_ERRORS = {"cp1252": "mmc.latin-1"}


def decode_text(data: bytes, encoding: str | None = None) -> tuple[str, bool]:
    """A short text, and whether its encoding had to be guessed: it is not UTF-8, or not the given.

    What is not UTF-8 is read as cp1252; where ``encoding`` does not fit, U+FFFD stands.
    """
    try:
        return data.decode("utf-8-sig" if encoding is None else encoding), False
    except UnicodeError:
        if encoding is not None:
            return data.decode(encoding, "replace"), True
        return data.decode("cp1252", _ERRORS["cp1252"]), True


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); download it again") from None


def _first_bad_line(data: bytes, encoding: str) -> int:
    """Line (from 1) of the first bytes that ``encoding`` cannot decode; 0 when all can be."""
    errors = _ERRORS.get(encoding, "strict")
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    lines = 1
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        try:
            text = decoder.decode(block, final=start + _BLOCK >= len(data))
        except UnicodeError as error:
            end = error.start if isinstance(error, UnicodeDecodeError) else 0
            before = block[:end]
            return lines + max(before.count(b"\n"), before.count(b"\r"))
        lines += max(text.count("\n"), text.count("\r"))
    return 0
