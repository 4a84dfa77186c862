"""Logging a training of a backbone to TensorBoard, through Accelerate's tracker."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmc.store.errors import InputError

TENSORBOARD = "tensorboard"
"""Folder of the event files."""

Log = Callable[[Mapping[str, Any]], None]
"""Takes a row of the history."""


@contextmanager
def logging(
    track: Sequence[str],
    folder: Path,
    parameters: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    report: Callable[[str], None],
) -> Iterator[Log]:
    """Log rows by their epoch, from those of ``history`` on; the log of a part before is replaced.

    Args:
        track: nothing, or ``tensorboard``.
        folder: of the training.
        parameters: settings by name.
        history: rows so far.
        report: called with each line for the user.

    Raises:
        InputError: a package is missing.
    """
    if not track:
        yield lambda row: None
        return
    if find_spec("tensorboard") is None:
        raise InputError(
            "--track tensorboard needs a package that is not installed: pip install 'mmc[tracking]'"
        )
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState()  # the tracker needs one
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    tracker = TensorBoardTracker(TENSORBOARD, folder)
    tracker.start()
    tracker.store_init_configuration(dict(parameters))
    report(f"logging; see it with: tensorboard --logdir {folder / TENSORBOARD}")

    def log(row: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in row.items() if value is not None}
        tracker.log(values, step=int(row["epoch"]))

    try:
        for row in history:
            log(row)
        yield log
    finally:
        tracker.finish()
