"""The page: rows are chosen and measured, its parts put together, the file written whole."""

import base64
import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmc.heads import splits
from mmc.heads.artifact import Run
from mmc.heads.labels.brief import Brief, brief
from mmc.heads.labels.material import Progress
from mmc.heads.labels.page import Thumbnail
from mmc.heads.metrics import HEADLINE
from mmc.heads.models import GROUP, HEADS
from mmc.heads.predict import select_rows
from mmc.heads.report import figures, fitting, mixups, origin, samples
from mmc.heads.report.markup import esc, number, paragraph
from mmc.heads.report.measured import Measured, intervals, measure
from mmc.heads.report.samples import SHOWN
from mmc.heads.runfiles import write_atomic
from mmc.store.errors import InputError, MmcError
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class PageReport:
    """What `write_report` wrote."""

    path: Path
    bytes: int
    split: str
    samples: int
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    """95 %; None where the metric is not defined."""

    def __str__(self) -> str:
        """The file, and the headline figure."""
        text = (
            f"{self.path}: {self.bytes:,} bytes; {self.metric} {number(self.value, 4)} on "
            f"{self.samples:,} samples of {self.split}"
        )
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text}, 95 % interval {number(low, 4)} to {number(high, 4)}"


def trained_store(run: Run, where: str | Path) -> str:
    """Path of the store that a run was trained on, as the run recorded it.

    Raises:
        InputError: it did not, or nothing is there any more.
    """
    place = run.training.get("store")
    if not place:
        raise InputError(f"{where} does not record its store; name it with --store")
    if "://" not in place and not Path(place).exists():
        raise InputError(
            f"{where} was trained on {place}, which is not there any more; name the store with "
            "--store"
        )
    return str(place)


def write_report(
    run: Run,
    store: "EmbeddingStore",
    out: str | Path,
    *,
    split: str | None = None,
    thumbnail: Thumbnail | None = None,
    device: str = "auto",
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> PageReport:
    """Write the page of ``run`` to the file ``out``, whole or not at all.

    Args:
        split: labelled samples that are shown; ``all``: every one; None: test where there is any,
            else the validation samples of the training.
        thumbnail: small JPEG of a row; None: no pictures.
        seed: of the bootstrap.
        report: told what is being done.
        progress: told (stage, done, total).

    Raises:
        InputError: no labelled samples there, or the store has other labels or features.
    """
    path = Path(out)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    _check_place(path)
    main = _measured(run, store, split, device, report)
    report(f"drawing samples anew for the intervals ({len(main):,} samples)")
    found = intervals(main, run.task, seed=seed)
    looked = brief(store, run, SHOWN, device=device, progress=progress)
    text = render(run, store, main, looked, found, thumbnail=thumbnail, device=device)
    data = text.encode("utf-8", "backslashreplace")
    write_atomic(path, data)
    name = HEADLINE[run.task]
    return PageReport(
        path=path,
        bytes=len(data),
        split=main.split,
        samples=len(main),
        metric=name,
        value=main.metrics[name],
        interval=None if math.isnan(found[name][0]) else found[name],
    )


def _check_place(path: Path) -> None:
    """Make the folder of ``path``, and a file there, so that no work is done for nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MmcError(
            f"cannot write {path}: {error.strerror or error}; name another file with --out"
        ) from error


def _measured(
    run: Run, store: "EmbeddingStore", split: str | None, device: str, report: Callable[[str], None]
) -> Measured:
    """The rows that the page is about."""
    if run.task != store.task:
        raise InputError(f"{store.path} is {store.task} and the run {run.task}")
    run.check_labels(store.label_set, store.path)
    names = list(run.resolve_features(store).values())
    chosen: dict[str, splits.Rows] = {}
    if split is None:
        divided = splits.choose(store, names, trains=False)
        chosen = {name: getattr(divided, name) for name in ("test", "val")}
    else:
        rows = select_rows(store, None, None if split == "all" else split)
        known = np.asarray(store.labels.known)[rows]
        done = np.logical_and.reduce([store[name].done[rows] for name in names])
        chosen = {"all splits" if split == "all" else split: rows[known & done]}
    for name, rows in chosen.items():
        if len(rows):
            report(f"measuring {len(rows):,} samples of {name}")
            measured = measure(run, store, rows, name, device)
            if len(measured):
                return measured
    where = f"split {split}" if split else "its test and val splits"
    raise InputError(f"{store.path} has no labelled samples with features in {where}")


def render(
    run: Run,
    store: "EmbeddingStore",
    main: Measured,
    looked: Brief,
    found: dict[str, tuple[float, float]],
    *,
    thumbnail: Thumbnail | None,
    device: str,
) -> str:
    """The page as text: on ``main``, and what was ``looked`` at besides."""
    name = run.path.resolve().name if run.path else "run"
    shown = samples.album(store, thumbnail)
    body = [
        figures.quality(run, main, found),
        figures.labels(run, main),
        mixups.confusions(run, main),
        fitting.calibration(run, main),
        fitting.fields(run, store, main, device),
        samples.best_and_worst(run, main, shown),
        samples.suspects(looked, shown),
        mixups.near_labels(run, main, looked.nearest),
        fitting.learning(run),
        origin.reproduce(run, store, main.split),
    ]
    body = [part for part in body if part]
    titles = map(_title, body)
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name in titles)
    script = _resource("script.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is ever fetched, and no script runs but this one, whatever the data hold.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{esc(name)}: report</title>
<link rel="icon" href="data:,">
<style>
{_resource("style.css")}</style>
</head>
<body>
<a class="skip" href="#quality">Skip to the figures</a>
<header>
<h1>{esc(name)}</h1>
{paragraph(_lead(run, main, found), "lead")}
{"".join(paragraph(note, "note") for note in _notes(run, main))}
<nav aria-label="Parts of this page"><ul>{links}</ul></nav>
</header>
<main>
{chr(10).join(body)}
</main>
<footer>Written by mmc; the run was trained {esc(run.created)} with mmc
{esc(run.versions.get("mmc", "of unknown version"))}. This page loads nothing from elsewhere.
</footer>
<script>{script}</script>
</body>
</html>
"""


def _title(part: str) -> tuple[str, str]:
    """Key and heading of a section, as `section` wrote them."""
    key = part.split('id="', 1)[1].split('"', 1)[0]
    return key, part.split("</h2>", 1)[0].rsplit(">", 1)[1]


def _lead(run: Run, main: Measured, found: dict[str, tuple[float, float]]) -> str:
    kind = {
        "multilabel": f"any of {len(run.label_set):,} labels",
        "binary": f"{run.label_set[0]} or {run.label_set[1]}",
        "multiclass": f"one of {len(run.label_set):,} classes",
    }[run.task]
    reads = " and ".join(ref.feature for ref in run.features.values())
    head: Any = load(lookup(HEADS, run.head, kind="head", group=GROUP))
    about = f" {head.card}" if head.card else ""
    name, article = HEADLINE[run.task], "An" if run.head[0] in "aeiou" else "A"
    low, high = found[name]
    value = "not defined"
    if main.metrics[name] is not None:
        span = f" (95 % interval {number(low)} to {number(high)})"
        value = number(main.metrics[name]) + ("" if math.isnan(low) else span)
    return (
        f"{article} {run.head} head that reads {reads} and gives a sample {kind}.{about} On "
        f"{len(main):,} labelled samples of {main.split} its {figures.NAMES[name]} is {value}."
    )


def _notes(run: Run, main: Measured) -> list[str]:
    notes = []
    if main.split == "val":
        notes.append(
            "Thresholds and the best epoch were chosen on these samples, so the figures are "
            "optimistic."
        )
    recorded = run.metrics.get(main.split, {}).get("rows_digest")
    if recorded and recorded != main.metrics["rows_digest"]:
        notes.append(
            "The samples or their labels have changed since the training: everything here was "
            "measured anew, and differs from the figures in the run."
        )
    if main.split in ("train", "all splits"):
        notes.append("The run was trained on some or all of these samples: they flatter it.")
    return notes


def _resource(name: str) -> str:
    return files("mmc.heads.report").joinpath(name).read_text(encoding="utf-8")
