"""`index.html`: what `mmc labels` found, on one page that needs no network and no script."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from mmc.heads.labels.material import Material
from mmc.heads.labels.nearest import VIEWS, Views, lift, present
from mmc.heads.labels.thumbnails import Thumbnails

if TYPE_CHECKING:
    from mmc.heads.labels.analysis import LabelsReport

PICTURES = 60
"""Embedded in the page at most."""
SUSPECTS, GROUPS, OTHERS = 24, 10, 12
"""Shown of each list; the tables have all."""
GROUP_SAMPLES = 4
HEAT_LABELS = 30
"""The most frequent labels, in the heat map."""
NEAREST_LABELS = 200
TEXT = 160
"""Characters of a text that are shown."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #b45309; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding: .4rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.id { overflow-wrap: anywhere; }
img { display: block; max-width: 96px; max-height: 96px; }
.differ { color: var(--mark); font-weight: 600; }
.heat td { min-width: 2.2rem; padding: .2rem; text-align: center; color: CanvasText; }
.heat thead th { writing-mode: vertical-rl; padding: .4rem .2rem; }
.group { display: flex; flex-wrap: wrap; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .6rem 0; }
.group > div { max-width: 15rem; } .group p { margin: .1rem 0; font-size: .85rem; }
@media (prefers-color-scheme: dark) { :root { --mark: #fbbf24; } }
@media print { nav { display: none; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the page shows: the rows of the tables."""

    report: "LabelsReport"
    nearest: list[dict[str, Any]]
    suspects: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    to_label: list[dict[str, Any]]
    outliers: list[dict[str, Any]]
    views: Views


class _Pictures:
    """Thumbnails as long as there are any left to spend."""

    def __init__(self, material: Material) -> None:
        self._thumbnails, self._rows, self._left = (
            Thumbnails(material.store),
            material.rows,
            PICTURES,
        )

    def html(self, row: Mapping[str, Any]) -> str:
        if self._left <= 0:
            return ""
        data = self._thumbnails.of(int(self._rows[row["_place"]]))
        if data is None:
            return ""
        self._left -= 1
        return f'<img src="{data}" alt="picture of {escape(row["id"], quote=True)}">'


def page(material: Material, found: Findings) -> str:
    """The page as HTML."""
    pictures = _Pictures(material)
    sections = [
        ("suspects", "Labels that may be wrong", _suspects(found.suspects, pictures)),
        ("nearest", "Nearest labels", _nearest(found.nearest)),
        ("together", "Labels that occur together", _heat(material, found.views)),
        ("duplicates", "Duplicates", _duplicates(found.duplicates, pictures)),
        ("to-label", "What to label next", _to_label(found.to_label, pictures)),
        ("outliers", "Outliers", _outliers(found.outliers, pictures)),
        ("files", "Files", _files(found.report.files)),
    ]
    where = escape(material.store.path.rstrip("/").rsplit("/", 1)[-1])
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{content}</section>'
        for key, title, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>Labels of {where}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Labels of {where}</h1><p>{_summary(found.report)}</p></header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main></body></html>\n'
    )


def _summary(report: "LabelsReport") -> str:
    features = ", ".join(map(escape, report.features))
    return (
        f"{report.samples:,} samples, {report.labelled:,} of them labelled, {report.labels:,} "
        f"labels; compared by {features}."
    )


def _suspects(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>None: either no label looks wrong, or there are too few labelled samples.</p>"
    words = {"missing": "add", "extra": "remove", "wrong": "change"}
    lines = []
    for row in rows[:SUSPECTS]:
        advice = f"{words[row['kind']]} <b>{escape(row['label'])}</b>"
        if row["suggested"]:
            advice += f" to <b>{escape(row['suggested'])}</b>"
        lines.append(
            [
                pictures.html(row),
                _sample(row),
                advice,
                _number(row["score"]),
                _number(row["neighbors"]),
                _number(row["run"]),
                _labels(row["labels"]),
            ]
        )
    heads = ["Picture", "Sample", "Consider", "Score", "Neighbours", "Run", "Labels given"]
    note = (
        "The likeliest first. Score: probability that the label is not as given. Neighbours: share "
        "of the nearest samples that have the label. Run: its probability, where it did not train "
        f"on the sample. All {len(rows):,} are in suspects.csv."
    )
    return _table(note, heads, lines, numbers={3, 4, 5})


def _nearest(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>There are no labels to compare.</p>"
    by_label: dict[str, dict[str, list[str]]] = {}
    differ = {row["label"] for row in rows if row["disagree"]}
    for row in rows:
        near = f"{escape(row['nearest'])} {row['value']:.2f}"
        by_label.setdefault(row["label"], {}).setdefault(row["view"], []).append(near)
    lines = [
        [
            escape(label),
            *("<br>".join(views.get(view, [])) for view in VIEWS),
            '<span class="differ">differ</span>' if label in differ else "",
        ]
        for label, views in list(by_label.items())[:NEAREST_LABELS]
    ]
    note = (
        "By the cosine of the label texts, by the cosine of the mean of their samples, and by the "
        "probability of another label given this one. Marked where no label is near in every view."
    )
    heads = ["Label", "By text", "By samples", "By occurring together", "Views"]
    return _table(note, heads, lines, first_is_header=True)


def _heat(material: Material, views: Views) -> str:
    if material.store.task != "multilabel" or not len(views.counts) or not views.counts.any():
        return "<p>Only samples with several labels have labels that occur together.</p>"
    shown = (-views.counts).argsort(kind="stable")[:HEAT_LABELS]
    shown = shown[views.counts[shown] > 0]
    names = [escape(material.label_set[label]) for label in shown]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = []
    for label, name in zip(shown, names, strict=True):
        cells = []
        for other in shown:
            if label == other:
                cells.append("<td>–</td>")
                continue
            there = present(views, int(label), int(other))
            p = float(views.pairs[label, other]) / max(there, 1)
            times = lift(views, int(label), int(other)) or 0.0
            told = f"{p:.0%} of {name}; {times:.1f} times as often as by chance"
            cells.append(
                f'<td style="background:rgba(37,99,235,{0.75 * p:.2f})" title="{told}">'
                f"{100 * p:.0f}</td>"
            )
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide"><table class="heat"><caption>Of 100 samples with the label of the row, '
        f"how many have that of the column, too. The {len(shown)} most frequent labels."
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "</div>"
    )


def _duplicates(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>No sample is the same as another, or nearly.</p>"
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    parts = [
        f"<p>Groups across train and another split first. All {len(groups):,} are in "
        "duplicates.csv.</p>"
    ]
    for members in list(groups.values())[:GROUPS]:
        first = members[0]
        notes = [f"{first['size']} samples, same {escape(first['kind'])}"]
        if first["kind"].startswith("near"):
            notes = [f"{first['size']} samples, {escape(first['kind'])}"]
        notes += ['<span class="differ">leak</span>'] if first["leak"] else []
        notes += ['<span class="differ">labels differ</span>'] if first["labels_differ"] else []
        cells = "".join(
            f"<div>{pictures.html(row)}{_sample(row)}<p>{escape(row['split'])}: "
            f"{_labels(row['labels'])}</p></div>"
            for row in members[:GROUP_SAMPLES]
        )
        parts.append(f'<div class="group"><div><p>{"<br>".join(notes)}</p></div>{cells}</div>')
    return "".join(parts)


def _to_label(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>Every sample is labelled.</p>"
    lines = [
        [
            pictures.html(row),
            _sample(row),
            _number(row["uncertainty"]),
            _number(row["distance"]),
            escape(row["likely"] or ""),
            _number(row["probability"]),
        ]
        for row in rows[:OTHERS]
    ]
    heads = ["Picture", "Sample", "Uncertainty", "Distance", "Likeliest", "Probability"]
    note = (
        "In this order: unsure ones that are unlike those labelled and those before. The first "
        f"{len(rows):,} are in to_label.csv."
    )
    return _table(note, heads, lines, numbers={2, 3, 5})


def _outliers(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>No sample is far from all others of its label.</p>"
    lines = [
        [
            pictures.html(row),
            _sample(row),
            escape(row["label"]) or "any",
            _number(row["score"]),
            _number(row["cosine"]),
            _number(row["usual"]),
        ]
        for row in rows[:OTHERS]
    ]
    heads = ["Picture", "Sample", "Label", "Score", "Cosine", "Usual cosine"]
    note = (
        "The cosine to the nearest other sample of the label, and how many deviations it is below "
        f"what is usual there. All {len(rows):,} are in outliers.csv."
    )
    return _table(note, heads, lines, numbers={3, 4, 5})


def _files(names: Iterable[str]) -> str:
    links = "".join(
        f'<li><a href="{name}">{name}</a></li>' for name in names if name != "index.html"
    )
    return f"<ul>{links}</ul>"


def _table(
    note: str,
    heads: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    first_is_header: bool = False,
) -> str:
    kinds = [' class="number"' if place in numbers else "" for place in range(len(heads))]
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(heads, kinds, strict=True)
    )
    body = []
    for line in lines:
        cells = [f"<td{kind}>{value}</td>" for value, kind in zip(line, kinds, strict=True)]
        if first_is_header:
            cells[0] = f'<th scope="row">{line[0]}</th>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><caption>{note}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _sample(row: Mapping[str, Any]) -> str:
    text = " ".join(row["text"].split())
    text = text if len(text) <= TEXT else text[: TEXT - 1] + "…"
    return f'<span class="id">{escape(row["id"])}</span><br>{escape(text)}'


def _labels(names: list[str] | None) -> str:
    if names is None:
        return "not labelled"
    return escape(", ".join(names)) or "none"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
