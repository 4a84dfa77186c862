"""What lies at a path: a store, something else, or room for a new store; and names near a name."""

import difflib
import re
from collections.abc import Sequence

from mmc.store.aliases import FEATURES
from mmc.store.errors import DamagedStoreError, InputError
from mmc.store.files import Files, LocalFiles
from mmc.store.samples import ROOT, SAMPLES, SamplesFile

_LEFTOVER = re.compile(r"\.(lock|owner).*|\..*\.tmp")
"""Files that a killed process of ours may leave beside a store's own."""


def not_a_store(files: Files) -> str:
    """What there is instead of a store, and what to do about it: a line for an error."""
    if not files.exists():
        return f"no store at {files.url}; `mmc extract SOURCE {files.url}` makes one"
    names = files.names("")
    if "run.json" in names:
        return f"{files.url} is a run, not a store; the store it was trained on is in its run.json"
    if isinstance(files, LocalFiles) and files.root.is_file():
        return f"{files.url} is a file, not a store; `mmc extract {files.url} STORE` makes one"
    return f"{files.url} is not a store: it has no zarr.json; `mmc extract` makes one in a new path"


def check_free(files: Files) -> None:
    """Refuse a path that holds anything but what a killed ``create`` left.

    Raises:
        InputError: something is there.
    """
    if isinstance(files, LocalFiles) and files.root.is_file():
        raise InputError(f"{files.url} is a file; choose another path for the store")
    names = _own_names(files, "")
    if ROOT in names:
        raise InputError(f"{files.url} holds a zarr node already; open it, or choose another path")
    half_made = set(names) <= {FEATURES, SAMPLES} and set(_own_names(files, FEATURES)) <= {ROOT}
    if half_made and SAMPLES in names:
        try:
            SamplesFile(files)
        except DamagedStoreError:
            half_made = False
    if names and not half_made:
        raise InputError(
            f"{files.url} holds other files ({', '.join(names[:3])}); choose an empty or new path"
        )


def _own_names(files: Files, key: str) -> list[str]:
    return [name for name in files.names(key) if not _LEFTOVER.fullmatch(name)]


def nearest(name: str, known: Sequence[str]) -> str:
    """What a misspelt name may have meant, or all there is: the end of an error's line."""
    if not known:
        return "it has none yet: run `mmc extract`"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
