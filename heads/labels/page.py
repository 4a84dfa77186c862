"""`index.html`: what `mmc labels` found, on one page that needs no network and no script."""

import base64
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmc.heads.labels.flips import SHARE
from mmc.heads.labels.material import Material
from mmc.heads.labels.nearest import VIEWS, Views, lift, present
from mmc.heads.labels.outliers import FLOOR
from mmc.heads.labels.suspects import WORTH_A_LOOK
from mmc.heads.report.markup import esc
from mmc.store.errors import MmcError

if TYPE_CHECKING:
    from mmc.heads.labels.analysis import LabelsReport

Thumbnail = Callable[[int], bytes]
"""Row of the store -> a small JPEG; raises MmcError with a reason where there is none."""

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

SCORE = (
    "Score: how likely the label is wrong, if of 100 samples "
    f"{100 * SHARE:.0f} have a wrong label, or as many fewer as are seen; measured by flipping "
    "labels on purpose. It is rather too high than too low."
)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #565d66; --mark: #b45309; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
  overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; }
.wide { overflow-x: auto; overflow-wrap: normal; } .soft { color: var(--soft); }
p { max-width: 46rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.wide:focus-visible, a:focus-visible { outline: 3px solid #2563eb; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.id { overflow-wrap: anywhere; } .sample { min-width: 13rem; }
img { display: block; max-width: 96px; max-height: 96px; }
.differ { color: var(--mark); font-weight: 600; }
.heat td { min-width: 2.2rem; padding: .2rem; text-align: center; color: CanvasText; }
.heat thead th { writing-mode: vertical-rl; padding: .4rem .2rem; }
.group { display: flex; flex-wrap: wrap; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .6rem 0; }
.group > div { max-width: 15rem; } .group p { margin: .1rem 0; font-size: .85rem; }
@media (prefers-color-scheme: dark) { :root { --mark: #fbbf24; --soft: #a5adb6; } }
@media print { :root { color-scheme: light; --soft: #565d66; --mark: #b45309; }
  nav { display: none; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the page shows: the rows of the tables."""

    report: "LabelsReport"
    nearest: list[dict[str, Any]]
    suspects: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    """The first of the first groups."""
    to_label: list[dict[str, Any]]
    outliers: list[dict[str, Any]]
    views: Views


class _Pictures:
    """Thumbnails as long as there are any left to spend."""

    def __init__(self, thumbnail: Thumbnail | None) -> None:
        self._thumbnail, self._left = thumbnail, PICTURES

    def html(self, row: Mapping[str, Any]) -> str:
        if self._thumbnail is None or self._left <= 0 or not row["image"]:
            return ""
        try:
            data = self._thumbnail(row["_row"])
        except MmcError as error:
            return f'<span class="soft">no picture: {esc(str(error))}</span>'
        self._left -= 1
        shown = base64.b64encode(data).decode()
        alt = f"Picture of sample {row['id']}"
        return f'<img src="data:image/jpeg;base64,{shown}" alt="{esc(alt)}">'


def page(material: Material, found: Findings, thumbnail: Thumbnail | None = None) -> str:
    """The page as HTML."""
    pictures = _Pictures(thumbnail)
    sections = [
        ("suspects", "Labels that may be wrong", _suspects(found.suspects, pictures)),
        ("nearest", "Nearest labels", _nearest(found.nearest)),
        ("together", "Labels that occur together", _heat(material, found.views)),
        ("duplicates", "Duplicates", _duplicates(found, pictures)),
        ("to-label", "What to label next", _next(found, pictures)),
        ("outliers", "Outliers", _outliers(found.outliers, pictures)),
        ("files", "Files", _files(found.report.files)),
    ]
    where = esc(material.store.path.rstrip("/").rsplit("/", 1)[-1])
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
    features = ", ".join(map(esc, report.features))
    return (
        f"{report.samples:,} samples, {report.labelled:,} of them labelled, {report.labels:,} "
        f"labels; compared by {features}."
        + (f" Warning: {esc(report.left_out)}." if report.left_out else "")
    )


def _suspects(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>None: either no label looks wrong, or there are too few labelled samples.</p>"
    shown = [row for row in rows if row["score"] >= WORTH_A_LOOK]
    if not shown:
        return (
            f"<p>None that is worth a look: of the {len(rows):,} labels that are doubted none has "
            f"a score of {WORTH_A_LOOK} or more. {SCORE} All are in suspects.csv.</p>"
        )
    words = {"missing": "add", "extra": "remove", "wrong": "change"}
    lines = []
    for row in shown[:SUSPECTS]:
        advice = f"{words[row['kind']]} <b>{esc(row['label'])}</b>"
        if row["suggested"]:
            advice += f" to <b>{esc(row['suggested'])}</b>"
        lines.append(
            [
                pictures.html(row),
                _sample(row),
                advice,
                _number(row["score"]),
                _number(row["probability"]),
                _number(row["neighbors"]),
                _number(row["run"]),
                _labels(row["labels"]),
                esc(row["evidence"]),
            ]
        )
    heads = [
        *("Picture", "Sample", "Consider", "Score", "Probability", "Neighbours", "Run"),
        *("Labels given", "Judged by"),
    ]
    note = (
        f"The likeliest first, down to a score of {WORTH_A_LOOK}. {SCORE} Probability: of the "
        "label itself. Neighbours: share of the nearest samples that have it. Run: its probability "
        "by the run, where that did not train on the sample. "
        f"All {len(rows):,} are in suspects.csv."
    )
    return _table("Labels that may be wrong", note, heads, lines, numbers={3, 4, 5, 6})


def _nearest(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>There are no labels to compare.</p>"
    by_label: dict[str, dict[str, list[str]]] = {}
    differ = {row["label"] for row in rows if row["disagree"]}
    for row in rows:
        near = f"{esc(row['nearest'])} {row['value']:.2f}"
        by_label.setdefault(row["label"], {}).setdefault(row["view"], []).append(near)
    lines = [
        [
            esc(label),
            *("<br>".join(views.get(view, [])) for view in VIEWS),
            '<span class="differ">differ</span>' if label in differ else "",
        ]
        for label, views in list(by_label.items())[:NEAREST_LABELS]
    ]
    note = (
        "By the cosine of the label texts, by the cosine of the mean of their samples, and by the "
        "probability of another label given this one. Marked where no label is near in every view."
    )
    if len(by_label) > NEAREST_LABELS:
        note += (
            f" The first {NEAREST_LABELS} of {len(by_label):,} labels; all are in "
            "nearest_labels.csv."
        )
    heads = ["Label", "By text", "By samples", "By occurring together", "Views"]
    return _table("Nearest labels", note, heads, lines, first_is_header=True)


def _heat(material: Material, views: Views) -> str:
    if material.store.task != "multilabel" or not len(views.counts) or not views.counts.any():
        return "<p>Only samples with several labels have labels that occur together.</p>"
    shown = (-views.counts).argsort(kind="stable")[:HEAT_LABELS]
    shown = shown[views.counts[shown] > 0]
    names = [esc(material.label_set[label]) for label in shown]
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
        '<p class="soft">Of 100 samples with the label of the row, how many have that of the '
        f"column, too. The {len(shown)} most frequent labels.</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Labels that occur together">'
        '<table class="heat"><caption class="hidden">Labels that occur together</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "</div>"
    )


def _duplicates(found: Findings, pictures: _Pictures) -> str:
    if not found.duplicates:
        return "<p>No sample is the same as another, or nearly.</p>"
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in found.duplicates:
        groups.setdefault(row["group"], []).append(row)
    count = sum(told["groups"] for told in found.report.duplicates.values())
    parts = [
        f"<p>Groups across train and another split first. All {count:,} are in duplicates.csv.</p>"
    ]
    for members in groups.values():
        first = members[0]
        notes = [f"{first['size']} samples, same {esc(first['kind'])}"]
        if first["kind"].startswith("near"):
            notes = [f"{first['size']} samples, {esc(first['kind'])}"]
        notes += ['<span class="differ">leak</span>'] if first["leak"] else []
        notes += ['<span class="differ">labels differ</span>'] if first["labels_differ"] else []
        cells = "".join(
            f"<div>{pictures.html(row)}{_sample(row)}<p>{esc(row['split'])}: "
            f"{_labels(row['labels'])}</p></div>"
            for row in members
        )
        parts.append(f'<div class="group"><div><p>{"<br>".join(notes)}</p></div>{cells}</div>')
    return "".join(parts)


def _next(found: Findings, pictures: _Pictures) -> str:
    text, partly = _to_label(found.to_label, pictures), found.report.known_in_part
    if partly:
        text += f"<p>Besides there are {partly:,} samples of which single labels are not known.</p>"
    return text


def _to_label(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>Every sample has labels.</p>"
    lines = [
        [
            pictures.html(row),
            _sample(row),
            _number(row["uncertainty"]),
            _number(row["distance"]),
            esc(row["likely"] or ""),
            _number(row["probability"]),
        ]
        for row in rows[:OTHERS]
    ]
    heads = ["Picture", "Sample", "Uncertainty", "Distance", "Likeliest", "Probability"]
    note = (
        "In this order: unsure ones that are unlike those labelled and those before. The first "
        f"{len(rows):,} are in to_label.csv."
    )
    return _table("What to label next", note, heads, lines, numbers={2, 3, 5})


def _outliers(rows: list[dict[str, Any]], pictures: _Pictures) -> str:
    if not rows:
        return "<p>There are too few samples to compare.</p>"
    lines = [
        [
            pictures.html(row),
            _sample(row),
            esc(row["label"]) or "any",
            _number(row["score"]),
            _number(row["cosine"]),
            _number(row["usual"]),
        ]
        for row in rows[:OTHERS]
    ]
    heads = ["Picture", "Sample", "Label", "Score", "Cosine", "Usual cosine"]
    note = (
        "The mean cosine to the nearest tenth of the label's samples, and how many deviations "
        f"(score) it is below what is usual there; {FLOOR:.0f} and more is an outlier. All "
        f"{len(rows):,} are in outliers.csv."
    )
    return _table("Outliers", note, heads, lines, numbers={3, 4, 5})


def _files(names: Iterable[str]) -> str:
    links = "".join(
        f'<li><a href="{name}">{name}</a></li>' for name in names if name != "index.html"
    )
    return f"<ul>{links}</ul>"


def _table(
    title: str,
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
        f'<p class="soft">{note}</p>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}"><table>'
        f'<caption class="hidden">{title}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _sample(row: Mapping[str, Any]) -> str:
    text = " ".join(row["text"].split())
    text = text if len(text) <= TEXT else text[: TEXT - 1] + "…"
    return f'<div class="sample"><span class="id">{esc(row["id"])}</span><br>{esc(text)}</div>'


def _labels(names: list[str] | None) -> str:
    if names is None:
        return "not labelled"
    return esc(", ".join(names)) or "none"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
