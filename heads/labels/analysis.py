"""`mmc labels`: what a store's labels and neighbours tell, as files in one folder."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from mmc.heads.labels import duplicates, nearest, outliers, persample, suspects, tolabel
from mmc.heads.labels.around import around, shares
from mmc.heads.labels.graphfiles import graph_json, graphml, label_graph
from mmc.heads.labels.material import Material, Progress
from mmc.heads.labels.options import LabelsConfig
from mmc.heads.labels.page import GROUP_SAMPLES, GROUPS, Findings, Thumbnail, page
from mmc.heads.labels.size import check_size
from mmc.heads.labels.tables import separator, write_table
from mmc.heads.labels.unseen import RunView
from mmc.heads.runfiles import write_atomic
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run
    from mmc.store import EmbeddingStore

FILES = (
    "nearest_labels.csv",
    "samples.csv",
    "suspects.csv",
    "duplicates.csv",
    "to_label.csv",
    "outliers.csv",
    "label_graph.graphml",
    "label_graph.json",
    "index.html",
)
PARTIAL, LOCK = ".partial", ".lock"
"""Ending of the folder that is filled first, and what its owner holds in it."""
LEFT_BY_VIEWERS = ("Thumbs.db", "desktop.ini")
"""Besides hidden files and those that begin with ~: what looking into a folder may leave there."""


@dataclass(frozen=True, kw_only=True)
class LabelsReport:
    """What was found and written."""

    out: Path
    samples: int
    left_out: str
    """Which others have embeddings that are not finite; empty: none."""
    labelled: int
    labels: int
    features: list[str]
    suspects: dict[str, int]
    """missing, extra, wrong -> how many are listed."""
    likely: int
    """How many of those have a score of 0.5 or more."""
    evidence: dict[str, int]
    """What labels were judged by -> labelled samples; see suspects.csv."""
    disagreeing_labels: list[str]
    """Labels whose views have no near label in common."""
    duplicates: dict[str, dict[str, Any]]
    """Kind -> groups, samples, leaking groups, threshold (None: exact)."""
    to_label: int
    known_in_part: int
    """Samples of which some labels are known and others not; to_label.csv has none of them."""
    outliers: int
    graph: dict[str, int]
    """labels, edges."""
    files: list[str]

    def __str__(self) -> str:
        """A line per finding."""
        listed = [f"{count:,} {kind}" for kind, count in self.suspects.items() if count]
        likely = f" listed, {self.likely:,} with a score of 0.5 or more" if listed else ""
        judged = ", ".join(f"{kind} of {count:,}" for kind, count in self.evidence.items())
        by = f"; by {judged} samples" if judged else ""
        lines = [
            f"samples     {self.samples:,}, {self.labelled:,} labelled, by "
            f"{' + '.join(self.features)}",
            f"suspects    {', '.join(listed) or 'none'}{likely}{by}",
        ]
        for kind, found in self.duplicates.items():
            near = f", cosine {found['threshold']:.4f} or more" if found["threshold"] else ""
            lines.append(
                f"duplicates  {kind}: {found['groups']:,} groups of {found['samples']:,} samples, "
                f"{found['leaking']:,} across train and another split{near}"
            )
        if self.disagreeing_labels:
            shown = ", ".join(self.disagreeing_labels[:5])
            more = " ..." if len(self.disagreeing_labels) > 5 else ""
            lines.append(
                f"labels      {len(self.disagreeing_labels):,} of {self.labels:,} whose nearest "
                f"labels differ by view: {shown}{more}"
            )
        lines += [
            f"outliers    {self.outliers:,}",
            f"to label    {self.to_label:,}{self._partly()}",
            f"label graph {self.graph['labels']:,} labels, {self.graph['edges']:,} edges",
            f"written     {self.out}/index.html and {len(self.files) - 1} more files",
        ]
        return "\n".join(lines)

    def _partly(self) -> str:
        if not self.known_in_part:
            return ""
        return f", besides {self.known_in_part:,} samples of which single labels are not known"


def analyse_labels(
    store: "EmbeddingStore",
    out: str | Path,
    config: LabelsConfig | None = None,
    *,
    run: "Run | None" = None,
    thumbnail: Thumbnail | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> LabelsReport:
    """Write the tables, the label graph and the page into the folder ``out``.

    All files are made in a folder beside it first, and appear there together in the end.

    Args:
        thumbnail: small JPEG of a row of the store; None: no pictures on the page.

    Raises:
        InputError: features or a run that do not go with the store, or ``out`` holds other files.
        MmcError: it cannot be written.
    """
    config = config or LabelsConfig()
    folder = _folder(out)
    joined = separator(store.label_set)
    material = Material(store, config.features, run=run, device=config.device)
    check_size(material, with_run=run is not None, report=report)
    if material.left_out:
        report(f"warning: {material.left_out}")
    with _appearing(folder) as beside:
        view = None if run is None else RunView(run, material, progress)
        near = around(material, progress, report)
        views = nearest.label_views(material, progress)
        judged = suspects.judge(material, progress, view)
        doubtful = (
            []
            if judged is None
            else suspects.suspects(
                material,
                judged,
                config.limit,
                votes=lambda places: shares(material, [by.of(places) for by in near]),
                view=view,
            )
        )
        groups = [duplicates.exact_groups(material, content) for content in ("image", "text")]
        groups += [duplicates.near_groups(material, by, config.near) for by in near]
        by_label = nearest.nearest_labels(material, views)
        next_ones = tolabel.to_label(material, judged, view, config.limit, progress)
        far = outliers.outliers(material, config.limit, progress)
        made = label_graph(material, views, run)
        tables = {
            "nearest_labels.csv": (nearest.COLUMNS, by_label),
            "samples.csv": (
                persample.COLUMNS,
                persample.samples(material, near, views, view, progress),
            ),
            "suspects.csv": (suspects.COLUMNS, doubtful),
            "duplicates.csv": (
                duplicates.COLUMNS,
                duplicates.duplicate_rows(material, groups),
            ),
            "to_label.csv": (tolabel.COLUMNS, next_ones),
            "outliers.csv": (outliers.COLUMNS, far),
        }
        for name, (columns, rows) in tables.items():
            write_table(beside / name, columns, rows, joined)
        write_atomic(beside / "label_graph.graphml", graphml(made))
        write_atomic(beside / "label_graph.json", graph_json(made))
        found = LabelsReport(
            out=folder,
            samples=len(material),
            left_out=material.left_out,
            labelled=len(material.labelled),
            labels=len(store.label_set),
            features=list(material.features),
            suspects={kind: sum(r["kind"] == kind for r in doubtful) for kind in suspects.KINDS},
            likely=sum(row["score"] >= 0.5 for row in doubtful),
            evidence=_evidence(judged),
            disagreeing_labels=list(dict.fromkeys(r["label"] for r in by_label if r["disagree"])),
            duplicates={group.kind: _told(material, group) for group in groups},
            to_label=len(next_ones),
            known_in_part=int(np.count_nonzero(np.diff(material.labels.unknown_indptr))),
            outliers=sum(row["score"] >= outliers.FLOOR for row in far),
            graph={"labels": made.number_of_nodes(), "edges": made.number_of_edges()},
            files=list(FILES),
        )
        findings = Findings(
            report=found,
            nearest=by_label,
            suspects=doubtful,
            duplicates=_shown(duplicates.duplicate_rows(material, groups)),
            to_label=next_ones,
            outliers=far,
            views=views,
        )
        text = page(material, findings, thumbnail)
        write_atomic(beside / "index.html", text.encode("utf-8", "backslashreplace"))
    return found


def _shown(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first samples of the first groups."""
    groups = itertools.groupby(rows, lambda row: row["group"])
    return [
        row
        for _, members in itertools.islice(groups, GROUPS)
        for row in itertools.islice(members, GROUP_SAMPLES)
    ]


def _evidence(judged: suspects.Judged | None) -> dict[str, int]:
    if judged is None:
        return {}
    kinds, counts = np.unique(judged.evidence, return_counts=True)
    return dict(zip(kinds.tolist(), counts.tolist(), strict=True))


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, whose files move there in the end; gone if that fails.

    It is made at once, so that a place that cannot be written is known before any work. What calls
    that were killed left there goes first.
    """
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not by the number of the process: in a container that is the same each time.
        parent, name = folder.resolve().parent, f"{folder.resolve().name}."
        _clear(parent, name)
        beside = Path(tempfile.mkdtemp(PARTIAL, name, parent))
        with FileLock(beside / LOCK):
            yield beside
            folder.mkdir(exist_ok=True)
            for name in FILES:
                (beside / name).replace(folder / name)
    except OSError as error:
        raise MmcError(
            f"cannot write {folder}: {error.strerror or error}; make room or rights, then go on"
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _clear(parent: Path, name: str) -> None:
    """Remove such folders as `_appearing` makes whose owner is dead, which its lock tells."""
    for left in parent.iterdir():
        ours = left.name.startswith(name) and left.name.endswith(PARTIAL)
        if ours and (left / LOCK).exists():
            # It is held (a Timeout), or not ours to remove.
            with suppress(Timeout, OSError), FileLock(left / LOCK, timeout=0):
                shutil.rmtree(left, ignore_errors=True)


def _told(material: Material, groups: duplicates.Groups) -> dict[str, Any]:
    return {
        "groups": len(groups.members),
        "samples": sum(len(members) for members in groups.members),
        "leaking": sum(duplicates.leaks(material, members) for members in groups.members),
        "threshold": groups.threshold,
    }


def _folder(out: str | Path) -> Path:
    """``out``, new, empty, or holding what an earlier call wrote."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with --out")
    others = (
        sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.exists() else []
    )
    others = [n for n in others if not (n.startswith((".", "~")) or n in LEFT_BY_VIEWERS)]
    if others:
        raise InputError(
            f"{folder} holds other content ({others[0]}); name a new folder with --out"
        )
    return folder
