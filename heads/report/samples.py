"""The parts of a page that show samples: best and worst answers, and labels that may be wrong."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmc.heads.artifact import Run
from mmc.heads.labels.brief import Brief
from mmc.heads.labels.page import SCORE, Thumbnail
from mmc.heads.labels.suspects import WORTH_A_LOOK
from mmc.heads.report.markup import esc, folded, number, paragraph, section
from mmc.heads.report.measured import Measured, losses
from mmc.store.errors import MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

SHOWN = 12
"""Samples of each kind."""
TEXT, TAGS = 280, 6
"""Characters of a text, and labels of a sample, that are shown."""


@dataclass(frozen=True)
class Album:
    """What is known of samples besides numbers."""

    columns: Mapping[str, pa.ChunkedArray]
    """id, text and image of all rows of the store."""
    picture: Callable[[int], bytes | str] | None
    """Row -> a small JPEG, or why there is none; None: no pictures wanted."""

    def card(self, row: int, tags: str, note: str, below: str = "") -> str:
        """A sample as an item of a list; ``tags`` and ``below`` are markup."""
        sample = {name: column[row].as_py() for name, column in self.columns.items()}
        picture, kind = "", ' class="textonly"'
        if self.picture is not None and sample["image"] is not None:
            found, kind = self.picture(row), ""
            if isinstance(found, bytes):
                data = base64.b64encode(found).decode()
                picture = (
                    f'<img loading="lazy" alt="Picture of sample {esc(sample["id"])}" '
                    f'src="data:image/jpeg;base64,{data}">'
                )
            else:
                picture = f'<div class="none">no picture: {esc(found)}</div>'
        text = " ".join((sample["text"] or "").split())
        text = text if len(text) <= TEXT else text[: TEXT - 1] + "…"
        said = f'<p class="text">{esc(text)}</p>' if text else ""
        return (
            f"<li{kind}>{picture}<div><b>{esc(sample['id'])}</b>"
            f'<p class="soft">{esc(note)}</p>{tags}</div>{below}{said}</li>'
        )


def best_and_worst(run: Run, measured: Measured, album: Album) -> str:
    """The samples with the largest and the least loss."""
    loss = losses(measured, run)
    order = loss.argsort(descending=True, stable=True)
    worst = order[:SHOWN].tolist()
    labelled = (measured.truth == 1).any(1)
    best = [i for i in order.flip(0).tolist() if labelled[i]][:SHOWN]
    best = [i for i in best if i not in set(worst)]

    def cards(places: list[int]) -> str:
        return "".join(
            album.card(
                int(measured.rows[i]), answer(run, measured, i), f"loss {number(float(loss[i]))}"
            )
            for i in places
        )

    return section(
        "samples",
        "Worst and best samples",
        paragraph(
            "By the loss, which grows with how sure the run is of what is wrong. ✓ right, "
            "✗ given though the sample does not have it, ○ missed, ? given and not known.",
            "soft",
        ),
        f'<h3>Worst</h3><ul class="samples">{cards(worst)}</ul>',
        folded("Best", f'<ul class="samples">{cards(best)}</ul>'),
    )


def answer(run: Run, measured: Measured, place: int) -> str:
    """True and given labels of a sample, with their probabilities."""
    yes, chosen = measured.truth[place] == 1, measured.decisions[place]
    p = measured.probabilities[place]
    known = measured.truth[place] >= 0
    either = (yes | chosen).nonzero()[:, 0]
    shown = either[p[either].argsort(descending=True, stable=True)].tolist()
    tags = []
    for label in shown[:TAGS]:
        kind = "ok" if yes[label] and chosen[label] else "missed" if yes[label] else "extra"
        kind = kind if known[label] else "open"
        tags.append(_tag(kind, run.label_set[label], float(p[label])))
    if len(shown) > TAGS:
        tags.append(f"<li>and {len(shown) - TAGS} more</li>")
    if not shown:
        tags.append("<li>no label, and none given</li>")
    return f'<ul class="tags">{"".join(tags)}</ul>'


_TAGS = {
    "ok": ("✓", "right"),
    "extra": ("✗", "wrongly given"),
    "missed": ("○", "missed"),
    "open": ("?", "given, the truth is not known"),
}


def _tag(kind: str, label: str, p: float) -> str:
    sign, word = _TAGS[kind]
    return (
        f'<li class="{kind}"><span aria-hidden="true">{sign} </span><span class="hidden">{word}: '
        f"</span>{esc(label)} {p:.2f}</li>"
    )


def suspects(found: Brief, album: Album) -> str:
    """Labels of the data that are likely wrong or missing, as `mmc labels` finds them."""
    kinds = (
        ("missing", "Labels that may be missing", "add {label}?"),
        ("extra", "Labels that may be wrong", "remove {label}?"),
        ("wrong", "", "rather {suggested} than {label}?"),
    )
    warning = [paragraph(f"Warning: {found.left_out}.")] if found.left_out else []
    blocks = []
    for kind, title, question in kinds:
        rows = [row for row in found.suspects if row["kind"] == kind]
        rows = [row for row in rows if row["score"] >= WORTH_A_LOOK][:SHOWN]
        if rows:
            cards = "".join(_suspect(row, question.format(**row), album) for row in rows)
            head = f"<h3>{title}</h3>" if title else ""
            blocks.append(f'{head}<ul class="samples">{cards}</ul>')
    if not blocks:
        why = found.without or "No label is doubted, or too few samples are labelled."
        if found.suspects:
            top = max(row["score"] for row in found.suspects)
            why = (
                "None is worth a look: the likeliest of the labels that are doubted has a score of "
                f"{top:.2f}, and from {WORTH_A_LOOK} on they are shown. {SCORE}"
            )
        return section("suspects", "Labels to look at again", paragraph(why), *warning)
    return section(
        "suspects",
        "Labels to look at again",
        paragraph(
            "As mmc labels finds them among all labelled samples, those of training too. The "
            "probability of a label is by the other samples (leave-one-out), and by the run where "
            f"it had not seen the sample (run, out-of-fold) if that adds anything. {SCORE} "
            f"Shown from {WORTH_A_LOOK} on.",
            "soft",
        ),
        *warning,
        *blocks,
    )


def _suspect(row: Mapping[str, Any], question: str, album: Album) -> str:
    told = [f"probability {row['probability']:.2f} ({row['evidence']})"]
    if row["neighbors"] is not None:
        told.append(f"by the nearest samples {row['neighbors']:.2f}")
    if row["run"] is not None:
        told.append(f"by the run {row['run']:.2f}")
    names = row["labels"] or []
    given = ", ".join(names[:TAGS]) or "none"
    more = f" and {len(names) - TAGS} more" if len(names) > TAGS else ""
    tags = (
        f'<p class="extra">{esc(question)}</p>'
        f'<p><span class="soft">score:</span> {row["score"]:.2f}</p>'
    )
    below = (
        f'<p class="below"><span class="soft">labels:</span> {esc(given + more)}<br>'
        f'<span class="soft">{esc(row["label"])}:</span> {esc(", ".join(told))}</p>'
    )
    return album.card(row["_row"], tags, row["split"] or "no split", below)


def album(store: "EmbeddingStore", thumbnail: Thumbnail | None) -> Album:
    """An album that reads each picture once."""
    known: dict[int, bytes | str] = {}

    def picture(row: int) -> bytes | str:
        if row not in known:
            assert thumbnail is not None
            try:
                known[row] = thumbnail(row)
            except MmcError as error:
                known[row] = str(error)
        return known[row]

    columns = {name: store.column(name) for name in ("id", "text", "image")}
    return Album(columns, None if thumbnail is None else picture)
