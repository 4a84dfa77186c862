"""The parts of a page that show samples: best and worst answers, and labels that may be wrong."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from mmc.heads.artifact import Run
from mmc.heads.report.markup import esc, folded, number, paragraph, section
from mmc.heads.report.measured import Measured, losses
from mmc.store.errors import MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Thumbnail = Callable[[int], bytes]
"""Row of the store -> a small JPEG; raises MmcError with a reason where there is none."""

Suspect = tuple[float, int, int, int]
"""Doubt, which part, place in it, label."""

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

    def card(self, row: int, tags: str, note: str) -> str:
        """A sample as an item of a list; ``tags`` is markup."""
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
            f'<p class="soft">{esc(note)}</p></div><div>{tags}</div>{said}</li>'
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


def suspects(run: Run, parts: Sequence[Measured], album: Album) -> str:
    """Labels of the data that the run contradicts most, on rows that it was not trained on."""
    missing: list[Suspect] = []
    extra: list[Suspect] = []
    for part, measured in enumerate(parts):
        p, yes = measured.probabilities, measured.truth == 1
        chosen, no = measured.decisions, measured.truth == 0
        for found, wrong, doubt in (
            (missing, chosen & no, p),
            (extra, yes & ~chosen, 1 - p),
        ):
            places = wrong.nonzero()
            doubts = doubt[wrong]
            top = doubts.argsort(descending=True, stable=True)[: 4 * SHOWN]
            for k in top.tolist():
                place, label = places[k].tolist()
                found.append((float(doubts[k]), part, place, label))
    if run.task != "multilabel":
        # One label per sample: what is missing is what is wrong, said once.
        return _suspects_of_classes(run, parts, album, missing)
    kinds = (
        ("Labels that may be missing", missing, "missing?"),
        ("Labels that may be wrong", extra, "wrong?"),
    )
    blocks = []
    for title, found, word in kinds:
        cards = []
        for _, part, place, label in sorted(found, key=lambda item: (-item[0], item[1:]))[:SHOWN]:
            measured = parts[part]
            given = float(measured.probabilities[place, label])
            question = f"{word} {run.label_set[label]} {given:.2f}"
            cards.append(_suspect(run, measured, place, album, question))
        if cards:
            blocks.append(f'<h3>{title}</h3><ul class="samples">{"".join(cards)}</ul>')
    return _suspect_section(parts, blocks)


def _suspects_of_classes(
    run: Run, parts: Sequence[Measured], album: Album, found: list[Suspect]
) -> str:
    cards = []
    for _, part, place, label in sorted(found, key=lambda item: (-item[0], item[1:]))[:SHOWN]:
        measured = parts[part]
        p = float(measured.probabilities[place, label])
        question = f"rather {run.label_set[label]} {p:.2f}?"
        cards.append(_suspect(run, measured, place, album, question))
    return _suspect_section(parts, [f'<ul class="samples">{"".join(cards)}</ul>'] if cards else [])


def _suspect(run: Run, measured: Measured, place: int, album: Album, question: str) -> str:
    yes = (measured.truth[place] == 1).nonzero()[:, 0].tolist()
    likely = measured.probabilities[place].topk(min(3, len(run.label_set)))
    nearest = ", ".join(
        f"{run.label_set[label]} {float(p):.2f}"
        for p, label in zip(likely.values, likely.indices.tolist(), strict=True)
    )
    given = ", ".join(run.label_set[label] for label in yes[:TAGS]) or "none"
    more = f" and {len(yes) - TAGS} more" if len(yes) > TAGS else ""
    tags = (
        f'<p class="extra">{esc(question)}</p>'
        f'<p><span class="soft">labels:</span> {esc(given + more)}</p>'
        f'<p><span class="soft">nearest:</span> {esc(nearest)}</p>'
    )
    return album.card(int(measured.rows[place]), tags, measured.split)


def _suspect_section(parts: Sequence[Measured], blocks: list[str]) -> str:
    where = " and ".join(measured.split for measured in parts)
    unseen = all(measured.split in ("test", "val") for measured in parts)
    whose = f"the run, which was not trained on {where}," if unseen else f"the run (on {where})"
    return section(
        "suspects",
        "Labels to look at again",
        paragraph(
            f"Where {whose} is surest that the data say something else: a mistake of the run or "
            "of the labels. Nearest: its most probable labels.",
            "soft",
        ),
        *(blocks or [paragraph("The run contradicts no label here.")]),
    )


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
