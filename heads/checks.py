"""Checks of a predictions file, read back from disk: is it what it claims to be?

Seven questions: no null predictions, valid labels, probabilities in [0, 1], no null probabilities,
the rows match, the class distribution is reasonable, better than random where the truth is known;
and two on the file's shape (header) and on whether the scores vary.

Legend: n rows, C labels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmc.heads.formats import Layout
from mmc.heads.readback import Block, FileShapeError, bools, read_blocks

Truth = Callable[[int, int], npt.NDArray[np.int8]]

# Below this many rows with a known truth, chance explains anything.
ENOUGH_ROWS = 50
# Standard deviations above what shuffled predictions reach.
BETTER, INFORMATIVE = 2.0, 6.0
SHARE_SATURATED = 0.5
NO_SCORES = "the file holds none (--scores adds them)"


@dataclass(frozen=True)
class Check:
    """The answer to one question."""

    name: str
    ok: bool
    detail: str
    warning: bool = False
    """It passed, but somebody should look."""
    asked: bool = True
    """Whether there was something to answer."""

    def __str__(self) -> str:
        mark = "FAIL" if not self.ok else "warn" if self.warning else "ok" if self.asked else "-"
        return f"{mark:<4}  {self.name}: {self.detail}"


def check_file(
    path: str | Path,
    layout: Layout,
    *,
    ids: pa.Array,
    failed: npt.NDArray[np.bool_] | None = None,
    truth: Truth | None = None,
    reference: Mapping[str, Any] | None = None,
    top_k: int | None = None,
) -> list[Check]:
    """Read ``path`` from disk and answer the questions.

    Args:
        layout: how the file should look.
        ids: the samples that should be in it, in order.
        failed: bool (n,), the samples that may be empty because their features are not there.
        truth: ``truth(start, stop)`` gives int8 (stop - start, C) in {-1, 0, 1} for that range of
            the samples; None when it is not known.
        reference: metrics of validation data, for the share of each label.
        top_k: labels per sample that were asked for instead of thresholds.
    """
    try:
        tally = _Tally(layout, ids, failed, truth)
        for block in read_blocks(path, layout):
            tally.add(block)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, FileShapeError) as error:
        return [Check("readable", False, " ".join(str(error).split()))]
    return [
        tally.no_null_predictions(top_k),
        tally.valid_labels(top_k),
        tally.probabilities_in_range(),
        tally.no_null_probabilities(),
        tally.rows_match(),
        tally.distribution(reference, top_k),
        tally.better_than_random(),
        *tally.scores_vary(),
    ]


# -- judging ---------------------------------------------------------------------------------------


@dataclass
class _Chance:
    """How the decisions compare with the same decisions shuffled over the samples."""

    rows: int = 0
    """Samples of which a label is known."""
    hits: float = 0.0
    known: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    predicted: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    true: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, decisions: npt.NDArray[np.bool_], truth: npt.NDArray[np.int8]) -> None:
        """Add samples: bool (n, C) and int8 (n, C); unknown entries are left out."""
        known, yes = truth >= 0, truth == 1
        decisions = decisions & known
        if not len(self.known):
            self.known, self.predicted, self.true = np.zeros((3, yes.shape[1]))
        self.rows += int(known.any(1).sum())
        self.known += known.sum(0)
        self.hits += float((decisions & yes).sum())
        self.predicted += decisions.sum(0)
        self.true += yes.sum(0)

    def deviations(self) -> tuple[float, float, float]:
        """Hits expected by chance; hits, and the most hits possible, in deviations above it.

        A label's hits are hypergeometric under shuffling; labels are taken as independent.
        """
        n = np.maximum(self.known, 2)
        expected = float((self.predicted * self.true / n).sum())
        spread = self.predicted * self.true * (n - self.predicted) * (n - self.true)
        deviation = math.sqrt(float((spread / (n * n * (n - 1))).sum()))
        if deviation == 0:
            return expected, 0.0, 0.0
        best = float(np.minimum(self.predicted, self.true).sum())
        return expected, (self.hits - expected) / deviation, (best - expected) / deviation


def _cardinality(reference: Mapping[str, Any]) -> float:
    """Labels predicted per sample, if all were known; 0: nothing is known of it."""
    found = reference.get("cardinality_predicted") or 0.0
    # Metrics count labels only where they are known; of the samples of a file all are counted.
    cells = reference.get("samples", 0) * reference.get("labels", 0)
    known = cells - reference.get("unknown_entries", 0)
    return float(found * cells / known) if known > 0 else float(found)


class _Tally:
    """What is counted while the file goes by; one method per question."""

    def __init__(
        self,
        layout: Layout,
        ids: pa.Array,
        failed: npt.NDArray[np.bool_] | None,
        truth: Truth | None,
    ) -> None:
        num_labels = len(layout.label_set)
        self.layout, self.ids, self.truth = layout, ids, truth
        self.failed = np.zeros(len(ids), dtype=bool) if failed is None else failed
        self.rows = self.nulls = self.unlabelled = self.extra_labels = 0
        self.out_of_order: tuple[int, str, str] | None = None
        self.seen: list[pa.Array] = []
        self.strange: list[str] = []
        self.score_nulls = self.score_cells = self.saturated = 0
        self.low, self.high, self.sum_error = math.inf, -math.inf, 0.0
        self.predicted = np.zeros(num_labels)
        self.first: npt.NDArray[np.bool_] | None = None
        self.same = True
        self.column_low: npt.NDArray[np.float32] | None = None
        self.column_high: npt.NDArray[np.float32] | None = None
        self.first_scores: npt.NDArray[np.float32] | None = None
        self.same_scores = True
        self.chance = _Chance()

    def add(self, block: Block) -> None:
        """Count one block of samples."""
        n, start = len(block.decisions), self.rows
        self._add_ids(block.ids, start)
        self.rows += n
        failed = self.failed[start : start + n]
        failed = np.append(failed, np.zeros(n - len(failed), dtype=bool))
        done = ~failed
        self.nulls += int((block.empty & done).sum())
        counts = block.decisions.sum(1)
        self.unlabelled += int((counts[done] == 0).sum())
        self.extra_labels += int((counts > 1).sum())
        self.strange += block.strange[: 3 - len(self.strange)] if len(self.strange) < 3 else []
        self.predicted += block.decisions[done].sum(0)
        if done.any():
            self.first = block.decisions[done][0] if self.first is None else self.first
            self.same = self.same and bool((block.decisions[done] == self.first).all())
        if block.scores is not None:
            self._add_scores(block.scores[done])
        if block.listed_scores is not None:
            self._add_range(block.listed_scores)
        stop = min(start + n, len(self.ids))
        if self.truth is not None and stop > start:
            usable = done[: stop - start]
            # Both classes of a binary task say the same thing.
            first = 1 if self.layout.task == "binary" else 0
            truth = self.truth(start, stop)[usable, first:]
            self.chance.add(block.decisions[: stop - start][usable, first:], truth)

    def _add_ids(self, ids: pa.Array, start: int) -> None:
        self.seen.append(ids)
        wanted = self.ids[start : start + len(ids)]
        if self.out_of_order is None:
            same = bools(pc.equal(ids[: len(wanted)], wanted))
            if not same.all():
                i = int((~same).argmax())
                self.out_of_order = (start + i, ids[i].as_py(), wanted[i].as_py())

    def _add_scores(self, scores: npt.NDArray[np.float32]) -> None:
        """Scores (n, S) of samples that did not fail."""
        self._add_range(scores)
        if not len(scores):
            return
        if self.layout.single and scores.shape[1] > 1:
            error = np.abs(scores.sum(1, dtype=np.float64) - 1)
            self.sum_error = max(self.sum_error, float(np.nan_to_num(error).max()))
        low, high = np.fmin.reduce(scores), np.fmax.reduce(scores)
        if self.column_low is None or self.column_high is None:
            self.column_low, self.column_high = low, high
            self.first_scores = scores[0].copy()
        self.column_low = np.fmin(self.column_low, low)
        self.column_high = np.fmax(self.column_high, high)
        self.same_scores = self.same_scores and bool((scores == self.first_scores).all())

    def _add_range(self, scores: npt.NDArray[np.float32]) -> None:
        self.score_cells += scores.size
        self.score_nulls += int(np.isnan(scores).sum())
        if scores.size:
            self.low = float(np.fmin(self.low, np.fmin.reduce(scores, axis=None)))
            self.high = float(np.fmax(self.high, np.fmax.reduce(scores, axis=None)))
            self.saturated += int(((scores == 0) | (scores == 1)).sum())

    # The questions ---------------------------------------------------------------------------

    def no_null_predictions(self, top_k: int | None) -> Check:
        name = "no null predictions"
        failed = int(self.failed.sum())
        lost = f"; {failed} samples failed and are empty" if failed else ""
        # An empty cell is an answer where a sample may have no label at all.
        may_be_empty = self.layout.form != "wide" and not self.layout.single and top_k is None
        if self.nulls and not may_be_empty:
            return Check(name, False, f"{self.nulls} of {self.rows} samples are empty{lost}")
        none = ""
        if self.unlabelled:
            none = (
                f"; {self.unlabelled} have no label above its threshold (--at-least-one gives "
                "them their best)"
            )
        return Check(name, True, f"{self.rows - failed} samples{none}{lost}", warning=failed > 0)

    def valid_labels(self, top_k: int | None) -> Check:
        name = "valid labels"
        if self.strange:
            return Check(name, False, f"not in the label set: {', '.join(self.strange)}")
        if self.extra_labels and self.layout.single and top_k is None:
            return Check(name, False, f"{self.extra_labels} samples have more than one label")
        return Check(name, True, f"all among the {len(self.layout.label_set)} labels")

    def probabilities_in_range(self) -> Check:
        name = "probabilities in [0, 1]"
        if not self.score_cells:
            return Check(name, True, NO_SCORES, asked=False)
        if self.low < 0 or self.high > 1:
            return Check(name, False, f"{self.low:.4g} to {self.high:.4g}: logits, not chances?")
        if self.sum_error > 1e-4:
            return Check(name, False, f"rows sum to 1 only within {self.sum_error:.2g}")
        return Check(name, True, f"{self.low:.4g} to {self.high:.4g}")

    def no_null_probabilities(self) -> Check:
        name = "no null probabilities"
        if not self.score_cells:
            return Check(name, True, NO_SCORES, asked=False)
        detail = f"{self.score_nulls} of {self.score_cells} are empty or not a number"
        return Check(name, not self.score_nulls, detail if self.score_nulls else "none")

    def rows_match(self) -> Check:
        name = "count matches"
        if self.rows != len(self.ids):
            return Check(name, False, f"{self.rows} samples, should be {len(self.ids)}")
        twice = self.rows - len(pa.chunked_array(self.seen, pa.string()).unique())
        if twice:
            return Check(name, False, f"{twice} ids occur twice")
        if self.out_of_order is not None:
            row, got, wanted = self.out_of_order
            return Check(name, False, f"sample {row + 1} is {got!r}, should be {wanted!r}")
        return Check(name, True, f"{self.rows} samples, ids in order")

    def distribution(self, reference: Mapping[str, Any] | None, top_k: int | None) -> Check:
        name = "class distribution reasonable"
        n = self.rows - int(self.failed.sum())
        if not n:
            return Check(name, False, "every sample failed")
        cardinality = float(self.predicted.sum()) / n
        detail = f"{cardinality:.2f} labels per sample"
        if self.layout.single:
            top = int(self.predicted.argmax())
            share = self.predicted[top] / n
            detail = f"{share:.0%} are {self.layout.label_set[top]!r}, the most frequent"
        if self.same and n > 1:
            return self._constant(name, n, reference)
        if top_k is not None:
            return Check(name, True, f"{detail}, as asked")
        if reference is None or self.layout.single:
            return Check(name, True, detail)
        wanted = _cardinality(reference)
        off = wanted > 0 and not wanted / 3 <= cardinality <= wanted * 3
        return Check(name, True, f"{detail}, {wanted:.2f} on validation data", warning=off)

    def _constant(self, name: str, n: int, reference: Mapping[str, Any] | None) -> Check:
        """Every sample has the same labels: wrong, unless few or nearly all should."""
        assert self.first is not None
        labels = [self.layout.label_set[i] for i in self.first.nonzero()[0]]
        detail = f"all {n} samples get {', '.join(labels[:5]) or 'no label'}"
        expected = 0.0
        if reference is not None and self.layout.single and reference["samples"]:
            expected = max(reference["per_label"]["positives"]) / reference["samples"]
        fine = n < ENOUGH_ROWS or expected > 0.9
        return Check(name, fine, detail, warning=True)

    def better_than_random(self) -> Check:
        name = "better than random"
        chance = self.chance
        if not chance.rows:
            return Check(
                name, True, "not compared: no labels of the run to compare with", asked=False
            )
        expected, reached, best = chance.deviations()
        detail = (
            f"{chance.hits:.0f} of {chance.true.sum():.0f} labels found, {expected:.1f} by chance, "
            f"on {chance.rows} samples"
        )
        if reached > BETTER:
            return Check(name, True, detail)
        if chance.rows < ENOUGH_ROWS or best < INFORMATIVE:
            return Check(name, True, f"{detail}: too few to tell", warning=True)
        return Check(name, False, detail)

    def scores_vary(self) -> list[Check]:
        if self.column_low is None or self.column_high is None:
            return []
        name, n = "scores vary", self.rows - int(self.failed.sum())
        if self.same_scores and n > 1:
            return [Check(name, False, f"all {n} samples have the same scores")]
        constant = (self.column_low == self.column_high).nonzero()[0] if n > 1 else []
        if len(constant):
            shown = ", ".join(self.layout.label_set[i] for i in constant[:5])
            detail = f"{len(constant)} labels have one score for all: {shown}"
            return [Check(name, True, detail, warning=True)]
        share = self.saturated / self.score_cells
        detail = f"{share:.0%} are exactly 0 or 1"
        return [Check(name, True, detail, warning=share >= SHARE_SATURATED)]
