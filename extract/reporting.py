"""What an extraction says at its end."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from mmc.extract.lanes import ABSENT, Lane
from mmc.extract.options import ExtractReport, Failure
from mmc.store import EmbeddingStore
from mmc.store.sync import SyncReport

FAILURES_SHOWN = 5

Say = Callable[[str], None]


def say_sync(sync: SyncReport, report: Say) -> None:
    """What the source changed in the store's table, one line."""
    parts = [
        (sync.added, "new"),
        (sync.changed_images, "with another image"),
        (sync.changed_texts, "with another text"),
        (sync.relabelled, "relabelled"),
        (sync.gone, "gone from the source"),
        (sync.unchanged, "unchanged"),
    ]
    report("samples: " + ", ".join(f"{count:,} {what}" for count, what in parts if count))


def failures(store: EmbeddingStore, lanes: Sequence[Lane]) -> list[Failure]:
    """Rows of this run that could not be embedded, by row; those that lack an image or a text left
    out."""
    now = {lane.label: set(_failed_now(lane)) for lane in lanes}
    found = sorted(
        (row, lane.label, lane.failed[row])
        for lane in lanes
        for row in now[lane.label]
        # A picture that is bad for the image tower is as bad for the fused one: told once.
        if lane.failed[row] not in ABSENT
        and not (lane.tower == "fused" and row in now.get(f"{lane.alias}/image", ()))
    )
    ids = store.column("id").take(pa.array([row for row, _, _ in found], pa.int64()))
    return [
        Failure(row=row, id=name, feature=label, reason=reason)
        for (row, label, reason), name in zip(found, ids.to_pylist(), strict=True)
    ]


def count_absent(lanes: Sequence[Lane], reason: str) -> int:
    """Samples of this run that lack an image, or a text (``reason`` is one of ``ABSENT``)."""
    return len({row for lane in lanes for row in _failed_now(lane) if lane.failed[row] == reason})


def count_embedded(lanes: Sequence[Lane]) -> int:
    """Samples that got at least one new embedding."""
    done = [np.setdiff1d(lane.pending, list(lane.failed)) for lane in lanes]
    return len(np.unique(np.concatenate(done))) if done else 0


def _failed_now(lane: Lane) -> list[int]:
    """Rows that failed in this run, not in an earlier one."""
    rows = np.fromiter(lane.failed, np.int64, len(lane.failed))
    return np.intersect1d(rows, lane.pending).tolist()


def bottleneck(stages: dict[str, float], threads: dict[str, int]) -> str:
    """The stage whose threads were busy for longest; empty when none was."""
    busy = {stage: seconds / threads[stage] for stage, seconds in stages.items()}
    stage = max(busy, key=lambda name: busy[name])
    return stage if busy[stage] > 0 else ""


def _share(outcome: ExtractReport) -> str:
    """How near the run came to the bare forward rate, as far as that can be told."""
    if outcome.efficiency is None or outcome.ceiling is None:
        return "bare forward rate not measured: the run was short"
    if outcome.efficiency > 1:  # what else ran on the machine in either measurement
        return f"as fast as bare forward passes ({outcome.ceiling:,.1f}/s measured after it)"
    return f"{outcome.efficiency:.0%} of the bare forward rate ({outcome.ceiling:,.1f}/s)"


def say_outcome(outcome: ExtractReport, report: Say) -> None:
    """Rate, efficiency, stages and failures, a few lines."""
    absent = outcome.without_image or outcome.without_text
    if not outcome.embedded and not outcome.failed and not absent:
        report(f"nothing to do: {outcome.samples:,} samples are already embedded")
        return
    share = _share(outcome)
    report(
        f"embedded {outcome.embedded:,} samples in {outcome.embed_seconds:,.1f} s: "
        f"{outcome.rate:,.1f} samples/s, {share}"
    )
    stages = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in outcome.stages.items())
    report(
        f"thread time: {stages}; slowest: {outcome.bottleneck}; "
        f"loading the backbone took {outcome.load_seconds:,.1f} s"
    )
    if outcome.without_image:
        report(f"samples without an image: {outcome.without_image:,}")
    if outcome.without_text:
        report(f"samples without a text, which have no fused features: {outcome.without_text:,}")
    if outcome.failed:
        report(f"warning: {outcome.failed:,} of {outcome.samples:,} samples could not be embedded:")
        for failure in outcome.failures:
            report(f"  {failure.id}: {failure.reason} ({failure.feature})")
        if outcome.failed > len(outcome.failures):
            report("  …; all of them are in errors.parquet beside the features")
