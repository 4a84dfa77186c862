"""The parts of a page on labels among each other: mix-ups, co-occurrence, nearness.

Legend: n rows, C labels.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmc.heads.artifact import Run
from mmc.heads.report.markup import esc, folded, paragraph, row_head, section, table, text_cell
from mmc.heads.report.measured import Measured

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

MOST_CELLS, MOST_ROWS = 30, 120
"""Labels of a heat map, and of the table of near labels, at most."""
DARK = 0.8
"""Share from which a cell's text is white."""


def confusions(run: Run, measured: Measured) -> str:
    """What is taken for what; for several labels per sample also what occurs together."""
    if run.task == "multilabel":
        return _mix_ups(run.label_set, measured)
    counts = (measured.truth == 1).float().T @ measured.decisions.float()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    kept = _most_involved(counts - counts.diag().diag())
    return section(
        "confusions",
        "What is taken for what",
        paragraph("Rows: the true class. Columns: the class that was given.", "soft"),
        _heat("Samples", "true ↓ given →", run.label_set, kept, counts, shares),
        _left_out(run.label_set, kept),
    )


def _mix_ups(names: tuple[str, ...], measured: Measured) -> str:
    shares, wrong = mix_ups(measured)
    kept = _most_involved(wrong)
    yes, known = (measured.truth == 1).float(), (measured.truth >= 0).float()
    together = yes.T @ yes / (yes.T @ known).clamp(min=1)
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


def mix_ups(measured: Measured) -> tuple[Tensor, Tensor]:
    """Of rows with label i and without j, the share and the number that was given j: (C, C) each.

    On the diagonal the share of rows with i that was given i, and 0.
    """
    yes, chosen = (measured.truth == 1).float(), measured.decisions.float()
    without = (measured.truth == 0).float()
    wrong = yes.T @ (chosen * without)
    shares = wrong / (yes.T @ without).clamp(min=1)
    found = (yes * chosen).sum(0) / yes.sum(0).clamp(min=1)
    return shares.fill_diagonal_(0) + found.diag(), wrong.fill_diagonal_(0)


def _most_involved(wrong: Tensor) -> list[int]:
    """Labels that are shown, in the label set's order: all, or those with the most mistakes."""
    involved = wrong.sum(0) + wrong.sum(1)
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
    """A table of ``values`` (C, C), coloured by ``shares`` (C, C) in [0, 1], of the labels kept."""
    body = []
    for i in kept:
        cells = [row_head(esc(names[i]))]
        for j in kept:
            share, value = float(shares[i, j]), f"{float(values[i, j]):,.0f}"
            kind = " ".join(k for k, on in (("hi", share > DARK), ("diag", i == j)) if on)
            shown = "·" if value == "0" else value
            cells.append(f'<td class="num {kind}" style="--v:{share:.2f}">{shown}</td>')
        body.append(cells)
    return table(caption, (corner, *(names[j] for j in kept)), body, css="heat")


def near_labels(run: Run, store: "EmbeddingStore", measured: Measured) -> str:
    """For each label its nearest by text, by occurring together and by being wrongly given."""
    names = run.label_set
    if len(names) < 3:
        return ""
    yes, chosen = (measured.truth == 1).float(), measured.decisions.float()
    ways: list[tuple[str, int, Tensor]] = []
    texts = _label_texts(run, store)
    if texts is not None:
        unit = torch.nn.functional.normalize(texts, dim=1)
        ways.append(("nearest by their texts (cosine)", 2, unit @ unit.T))
    if run.task == "multilabel":
        both = yes.T @ yes
        known = (measured.truth >= 0).float()
        with_i = yes.T @ known  # of the rows that know the other label, too
        union = with_i + with_i.T - both
        ways.append(("occurs with (share of either)", 2, both / union.clamp(min=1)))
    wrong = yes.T @ (chosen * (measured.truth == 0))
    ways.append(("wrongly given to its samples (samples)", 0, wrong))
    shown = yes.sum(0).argsort(descending=True, stable=True)[:MOST_ROWS].tolist()
    body = []
    for i in shown:
        cells = [row_head(esc(names[i]))]
        for _, digits, near in ways:
            values = near[i].index_fill(0, torch.tensor(i), 0.0)
            top = values.argsort(descending=True, stable=True)[:3].tolist()
            nearest = [f"{names[j]} {float(values[j]):.{digits}f}" for j in top if values[j] > 0]
            cells.append(text_cell(", ".join(nearest) or "–"))
        body.append(cells)
    left = len(names) - len(shown)
    header = ("label", *(way[0] for way in ways))
    return section(
        "near",
        "Labels that are near each other",
        table("The three nearest of each label", header, body, css="words"),
        paragraph(f"The {len(shown)} most frequent labels.", "soft") if left else "",
    )


def _label_texts(run: Run, store: "EmbeddingStore") -> Tensor | None:
    """Embeddings of the label names (C, D) from a backbone that the run reads, if there are any."""
    for alias in dict.fromkeys(name.split("/")[0] for name in run.resolve_features(store).values()):
        found = store.label_text(alias)
        if found is not None and set(run.label_set) <= set(found[0]):
            place = {name: i for i, name in enumerate(found[0])}
            return torch.from_numpy(found[1][[place[name] for name in run.label_set]]).float()
    return None
