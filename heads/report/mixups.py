"""The parts of a page on labels among each other: mix-ups, co-occurrence, nearness.

Legend: n rows, C labels, k of them that are shown.
"""

from typing import Any

import torch
from torch import Tensor

from mmc.heads.artifact import Run
from mmc.heads.labels.nearest import VIEWS
from mmc.heads.report.markup import esc, folded, paragraph, row_head, section, table, text_cell
from mmc.heads.report.measured import Measured

MOST_CELLS, MOST_ROWS = 30, 120
"""Labels of a heat map, and of the table of near labels, at most."""
BLOCK_ENTRIES = 1 << 20
NEAREST = 3
"""Near labels of each that are shown."""
TITLES = {"text": "by text", "centroid": "by samples", "cooccurrence": "by occurring together"}
DARK = 0.83
"""Share above which a cell's text is white: there its contrast is the larger one, 4.6 at least."""


def confusions(run: Run, measured: Measured) -> str:
    """What is taken for what; for several labels per sample also what occurs together."""
    if run.task == "multilabel":
        return _mix_ups(run.label_set, measured)
    yes, chosen = measured.truth == 1, measured.decisions
    kept = _most_involved(mistakes(measured))
    counts = _together(yes[:, kept], chosen[:, kept])
    shares = counts / yes[:, kept].sum(0).clamp(min=1)[:, None]
    return section(
        "confusions",
        "What is taken for what",
        paragraph("Rows: the true class. Columns: the class that was given.", "soft"),
        _heat("Samples", "true ↓ given →", run.label_set, kept, counts, shares),
        _left_out(run.label_set, kept),
    )


def _mix_ups(names: tuple[str, ...], measured: Measured) -> str:
    kept = _most_involved(mistakes(measured))
    shares = mix_ups(measured, kept)
    yes, known = measured.truth[:, kept] == 1, measured.truth[:, kept] >= 0
    together = _together(yes, yes) / _together(yes, known).clamp(min=1)
    return section(
        "confusions",
        "What is mixed up",
        paragraph(
            "Of the samples that have the label of the row and lack that of the column, the "
            "share in per cent that was given the column's all the same. On the diagonal, framed: "
            "the share of the row's samples that was found.",
            "soft",
        ),
        _heat("Wrongly given labels, per cent", "has ↓ given →", names, kept, shares * 100, shares),
        _left_out(names, kept),
        folded(
            "Which labels occur together",
            paragraph(
                "Of the samples that have the label of the row, the share in per cent that also "
                "has the column's.",
                "soft",
            ),
            _heat(
                "Labels together, per cent", "has ↓ also →", names, kept, together * 100, together
            ),
        ),
    )


def mix_ups(measured: Measured, labels: list[int]) -> Tensor:
    """Of rows with label i and without j, the share that was given j: float64 (k, k) of k labels.

    On the diagonal the share of rows with i that was given i.
    """
    truth, chosen = measured.truth[:, labels], measured.decisions[:, labels]
    yes, without = truth == 1, truth == 0
    shares = _together(yes, chosen & without) / _together(yes, without).clamp(min=1)
    found = (yes & chosen).sum(0) / yes.sum(0).clamp(min=1)
    return shares.fill_diagonal_(0) + found.diag()


def mistakes(measured: Measured) -> Tensor:
    """In how many mix-ups each label takes part, as what is true or as what was given: (C,).

    The sums of rows and columns of their table (C, C), which is never made: of 10,000 labels it
    would take 400 MB.
    """
    yes, wrong = measured.truth == 1, measured.decisions & (measured.truth == 0)
    given, has = wrong.sum(1, keepdim=True), yes.sum(1, keepdim=True)
    return _together(yes, given)[:, 0] + _together(wrong, has)[:, 0]


def _together(one: Tensor, other: Tensor) -> Tensor:
    """``one.T @ other`` of flags or counts (n, a) and (n, b), float64 (a, b), by blocks of rows."""
    step = max(1, BLOCK_ENTRIES // max(one.shape[1], other.shape[1], 1))
    total = torch.zeros(one.shape[1], other.shape[1], dtype=torch.float64)
    for start in range(0, len(one), step):
        block = slice(start, start + step)
        total += one[block].double().T @ other[block].double()
    return total


def _most_involved(involved: Tensor) -> list[int]:
    """Labels that are shown, in the label set's order: all, or those with the most mistakes."""
    return sorted(involved.argsort(descending=True, stable=True)[:MOST_CELLS].tolist())


def _left_out(names: tuple[str, ...], kept: list[int]) -> str:
    if len(kept) == len(names):
        return ""
    return paragraph(f"The {len(kept)} of {len(names):,} labels with the most mistakes.", "soft")


def _heat(
    caption: str,
    corner: str,
    names: tuple[str, ...],
    kept: list[int],
    values: Tensor,
    shares: Tensor,
) -> str:
    """A table of ``values`` (k, k), coloured by ``shares`` (k, k) in [0, 1], of the labels kept."""
    body = []
    for i, label in enumerate(kept):
        cells = [row_head(esc(names[label]))]
        for j in range(len(kept)):
            share, value = float(shares[i, j]), f"{float(values[i, j]):,.0f}"
            kind = " ".join(k for k, on in (("hi", share > DARK), ("diag", i == j)) if on)
            shown = "·" if value == "0" else value
            cells.append(f'<td class="num {kind}" style="--v:{share:.2f}">{shown}</td>')
        body.append(cells)
    return table(caption, (corner, *(names[j] for j in kept)), body, css="heat")


def near_labels(run: Run, measured: Measured, nearest: list[dict[str, Any]]) -> str:
    """For each label the nearest, as `mmc labels` finds them, and those wrongly given instead.

    Args:
        nearest: rows of nearest_labels.csv.
    """
    names = run.label_set
    views = [view for view in VIEWS if any(row["view"] == view for row in nearest)]
    if not views:
        return ""
    by_label: dict[str, dict[str, list[str]]] = {}
    for row in nearest:
        if row["rank"] <= NEAREST:
            near = by_label.setdefault(row["label"], {}).setdefault(row["view"], [])
            near.append(f"{row['nearest']} {row['value']:.2f}")
    differ = {row["label"] for row in nearest if row["disagree"]}
    yes = measured.truth == 1
    shown = yes.sum(0).argsort(descending=True, stable=True)[:MOST_ROWS].tolist()
    wrong = _together(yes[:, shown], measured.decisions & (measured.truth == 0))
    body = []
    for place, i in enumerate(shown):
        found = by_label.get(names[i], {})
        cells = [row_head(esc(names[i]))]
        cells += [text_cell(", ".join(found.get(view, [])) or "–") for view in views]
        top = wrong[place].argsort(descending=True, stable=True)[:NEAREST].tolist()
        given = [f"{names[j]} {wrong[place, j]:.0f}" for j in top if wrong[place, j] > 0]
        cells.append(text_cell(", ".join(given) or "–"))
        if differ:
            cells.append(text_cell("differ" if names[i] in differ else ""))
        body.append(cells)
    differing = ("views",) if differ else ()
    header = ("label", *(TITLES[view] for view in views), "wrongly given (samples)", *differing)
    left = len(names) - len(shown)
    return section(
        "near",
        "Labels that are near each other",
        paragraph(
            "As mmc labels finds them: by the cosine of their texts, by the cosine of the mean "
            "of their training samples, and by the probability of another label given this one. "
            "They differ where no label is near by all of them. Wrongly given: what the run gave "
            f"to samples of {measured.split} that have the label, and lack what was given.",
            "soft",
        ),
        table(f"The {NEAREST} nearest of each label", header, body, css="words"),
        paragraph(f"The {len(shown)} most frequent labels.", "soft") if left else "",
    )
