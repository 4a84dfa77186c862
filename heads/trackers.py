"""Logging a training to TensorBoard and MLflow, through Accelerate's trackers.

Logged: the settings as parameters; after every validation what `history.csv` holds, by the epochs
of all stages together; in the end the metrics of val and test, and for one label per sample their
confusion matrices.

A continued training starts its log anew, with the rows of its history so far. A tracker that fails
while training goes on is told of and left.
"""

import csv
import io
import os
import shutil
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from mmc.heads.runfiles import TENSORBOARD
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run
    from mmc.heads.training import Report, Setup

MLRUNS = "mlruns"
"""MLflow's folder, beside the run, where no server or folder is set."""
EXPERIMENT = "mmc"
"""MLflow's experiment, unless MLFLOW_EXPERIMENT_NAME names another."""
LONGEST = 500
"""Characters of a parameter; MLflow takes up to 6,000 and shows few."""
ANSWER = 5.0
"""Seconds that a server has to take a connection."""

Values = Mapping[str, float]
Row = Mapping[str, Any]


class Tracker:
    """One place to log to: what Accelerate's trackers have in common, and texts."""

    name: str
    where: str
    """What to tell the user."""

    def __init__(self, backend: Any, parameters: Mapping[str, Any]) -> None:
        from accelerate import PartialState

        PartialState()  # its trackers and its log need one
        self._backend = backend
        backend.start()
        self._store(dict(parameters))

    def _store(self, parameters: dict[str, Any]) -> None:
        """Log what the training is told."""
        self._backend.store_init_configuration(parameters)

    @classmethod
    def check(cls, report: "Report") -> None:
        """Say where it will log where that may take time, and find out whether it can.

        Raises:
            MmcError: nothing is there.
        """

    def log(self, values: Values, step: int) -> None:
        """Add a value to each series."""
        self._backend.log(dict(values), step=step)

    def table(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Add a table, its first row the head."""
        raise NotImplementedError

    def end(self, ok: bool) -> None:
        """Close it; the training ended well, or did not."""
        self._backend.finish()


class TensorBoard(Tracker):
    """Event files in ``RUN/tensorboard``."""

    name = "tensorboard"

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        from accelerate.tracking import TensorBoardTracker

        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        self.where = f"tensorboard --logdir {folder / TENSORBOARD}"
        super().__init__(TensorBoardTracker(TENSORBOARD, folder), parameters)

    def _store(self, parameters: dict[str, Any]) -> None:
        # Among the values: Accelerate makes two more folders for them, called by the time, and
        # TensorBoard shows these as runs without any value.
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(parameters, {}):
            self._backend.writer.file_writer.add_summary(summary)
        self._backend.writer.flush()

    def table(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """See :class:`Tracker`; Markdown on the page of texts."""
        head, *body = [
            "|" + "|".join(cell.replace("|", "\\|") for cell in row) + "|" for row in rows
        ]
        rule = "|" + "---|" * len(rows[0])
        self._backend.writer.add_text(name, "\n".join([head, rule, *body]))
        self._backend.writer.flush()


class MLflow(Tracker):
    """A run of MLflow."""

    name = "mlflow"

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        self._mlflow, self._placed = mlflow, not mlflow.is_tracking_uri_set()
        self.where = f"MLflow at {_shown(mlflow.get_tracking_uri())}" if not self._placed else ""
        if self._placed:
            # New versions write such folders only when told to. Unlike a database it needs nothing
            # installed besides.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            place = folder.absolute().parent / MLRUNS
            mlflow.set_tracking_uri(place.as_uri())
            self.where = (
                f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {place} (set "
                "MLFLOW_TRACKING_URI to log elsewhere)"
            )
        try:
            backend = MLflowTracker(EXPERIMENT, run_name=folder.absolute().name)
            super().__init__(backend, parameters)
        except BaseException:
            self._leave()
            raise

    @classmethod
    def check(cls, report: "Report") -> None:
        """See :class:`Tracker`; MLflow itself tries a server that is not there for minutes."""
        import mlflow

        address = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else ""
        if urlsplit(address).scheme not in ("http", "https"):
            return
        report(f"logging to MLflow at {_shown(address)}")
        reason = _unreachable(_shown(address))
        if reason:
            raise MmcError(
                f"no server answers at {_shown(address)} ({reason}); start it, set "
                "MLFLOW_TRACKING_URI to another, or leave out --track mlflow"
            )

    def table(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """See :class:`Tracker`; a CSV file among the artifacts."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._mlflow.log_text(text.getvalue(), f"{name}.csv")

    def end(self, ok: bool) -> None:
        """See :class:`Tracker`."""
        try:
            self._mlflow.end_run("FINISHED" if ok else "FAILED")
        finally:
            self._leave()

    def _leave(self) -> None:
        """Let the next training choose its own place."""
        if self._placed:
            self._mlflow.set_tracking_uri(None)


KINDS: dict[str, tuple[type[Any], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
}
"""Name -> class, and the package that it needs."""


class Trackers:
    """All that a training logs to."""

    def __init__(self, report: "Report") -> None:
        self._report = report
        self._open: list[Tracker] = []
        self._stage, self._before, self._step = "", 0, 0

    def start(self, names: Iterable[str], folder: Path, parameters: Mapping[str, Any]) -> None:
        """Open the trackers called ``names``.

        Raises:
            InputError: a package is missing.
            MmcError: there is no logging to one of them.
        """
        for name in dict.fromkeys(names):
            kind, package = KINDS[name]
            if find_spec(package) is None:
                raise InputError(
                    f"--track {name} needs a package that is not installed: "
                    "pip install 'mmc[tracking]'"
                )
            try:
                kind.check(self._report)
                tracker = kind(folder, parameters)
            except Exception as error:  # whatever a server, a disk or a plug-in of theirs raises
                raise MmcError(f"--track {name}: {_reason(error)}") from error
            self._open.append(tracker)
            self._report(f"logging; see it with: {tracker.where}")

    def row(self, row: Row) -> None:
        """Log a row of the history."""
        if row["stage"] != self._stage:
            self._stage, self._before = row["stage"], self._step
        self._step = self._before + row["epoch"]
        names = ["loss", "lr", *(key for key in row if key.startswith("val_"))]
        values = {name: float(row[name]) for name in names if row[name] is not None}
        self._each("log", values, self._step)

    def finish(self, run: "Run") -> None:
        """Log what a finished run reached."""
        for split, found in run.metrics.items():
            values = {
                f"final/{split}/{name}": float(value)
                for name, value in found.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self._each("log", values, self._step)
            if "confusion" in found:
                names = list(run.label_set)
                rows = [
                    [name, *map(str, counts)]
                    for name, counts in zip(names, found["confusion"], strict=True)
                ]
                self._each("table", f"confusion_{split}", [["true / predicted", *names], *rows])
            if "largest_confusions" in found:
                pairs = found["largest_confusions"]
                rows = [[*map(str, row)] for row in zip(*pairs.values(), strict=True)]
                self._each("table", f"largest_confusions_{split}", [[*pairs], *rows])

    def end(self, ok: bool) -> None:
        """Close them all."""
        self._each("end", ok)
        self._open.clear()

    def _each(self, method: str, *args: Any) -> None:
        for tracker in list(self._open):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:  # a log is not worth a training
                self._open.remove(tracker)
                self._report(f"warning: no more logging to {tracker.name}: {_reason(error)}")


@contextmanager
def tracking(
    setup: "Setup", folder: Path, history: Sequence[Row], report: "Report"
) -> Iterator[Trackers]:
    """Log a training, from the rows of its history so far on, to what its config names.

    Raises:
        InputError: a package is missing.
        MmcError: there is no logging to one of them.
    """
    trackers = Trackers(report)
    ok = False
    try:
        if setup.config.track and setup.processes.main:
            trackers.start(setup.config.track, folder, flat(setup.identity()["config"]))
            for row in history:
                trackers.row(row)
            setup.on_round = trackers.row
        yield trackers
        ok = True
    finally:
        trackers.end(ok)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings one level deep, as ``head.hidden``: what a tracker takes as parameters."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found[prefix + key] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return {key.removeprefix("settings."): value for key, value in found.items()}


def _shown(address: str) -> str:
    """An address without the name and password in it."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _unreachable(address: str) -> str:
    """Why there is no connection to a server; empty where something answers, whatever it says."""
    try:
        # By way of the proxies of the environment, as MLflow goes.
        with urlopen(Request(address, method="HEAD"), timeout=ANSWER):
            return ""
    except HTTPError as answer:
        answer.close()
        return ""
    except URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # MLflow has settings of its own for these
            return ""
        return getattr(error.reason, "strerror", None) or str(error.reason)
    except (OSError, HTTPException):  # connected, and no or another answer: MLflow's to judge
        return ""


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
