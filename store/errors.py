"""Errors that mmc raises on purpose, grouped by what a handler would do.

MmcError                      exit code 1: a run that failed
├── InputError                exit code 2: the user gave something wrong; fix it and call again
│   ├── NotAStoreError        the path is not an mmc store
│   ├── FormatVersionError    written by a newer mmc: upgrade
│   └── FingerprintMismatchError  features were made differently from what is asked
├── StoreLockedError          another process is writing: wait
├── DamagedStoreError         bytes on disk are not what was committed: `mmc verify --repair`
└── RowsNotDoneError          rows were asked for that hold no embedding

Every message is one line (a fingerprint mismatch adds the difference, a line per key) and says
what is wrong, where, and what to do.
"""


class MmcError(Exception):
    """Base of every error that mmc raises on purpose."""

    exit_code = 1


class InputError(MmcError, ValueError):
    """The user gave something wrong: a path, a name, a value, a table."""

    exit_code = 2


class NotAStoreError(InputError):
    """The path does not hold an mmc store."""


class FormatVersionError(InputError):
    """The store or run was written by a newer format than this mmc reads."""


class FingerprintMismatchError(InputError):
    """Features in the store were made differently from what is asked for."""


class StoreLockedError(MmcError):
    """Another live process holds the write lock."""


class DamagedStoreError(MmcError):
    """Bytes on disk are missing or are not what was committed."""


class RowsNotDoneError(MmcError, LookupError):
    """Rows were asked for that hold no embedding (missing or failed)."""
