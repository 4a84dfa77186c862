"""MMHS150K: tweets with a picture, labelled by several annotators each (Gomez et al., WACV 2020).

``MMHS150K_GT.json`` is one object, tweet id -> ``{"labels": [0, 2, 0], "labels_str": [...],
"tweet_text": ..., "img_url": ..., "tweet_url": ...}``. Beside it: ``img_resized/<id>.jpg``,
``splits/{train,val,test}_ids.txt``, and ``img_txt/<id>.json`` with the words seen in some pictures
(column `img_text`; ``text_template "{tweet_text} [SEP] {img_text}"`` joins both).

**Votes.** The label that most annotators gave wins, however many they are. Where several have the
most, there is no majority: ``ties`` says what then. Its default is "unlabelled": the sample stays,
and neither training nor metrics see a label that nobody agreed on; "first" takes the tied label
that was given first, a label's name takes that label, "drop" leaves the sample out.
``merge_labels`` joins labels before the votes are counted: Racist, Sexist, NotHate is a tie, and
2 to 1 for hate once the first two are one label. With ``task`` multilabel a sample has every label
that any annotator gave, and there are no ties.

Ids are text: 19 digits do not fit a float. The order of the labels is that of their numbers.
"""

import json
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from mmc.extract.sources.base import Records, SourceOptions, listed, shown
from mmc.extract.sources.labels import natural_order
from mmc.extract.sources.merge import merging, parse_merge
from mmc.extract.sources.splits import SPLITS
from mmc.store.errors import InputError

TRUTH = "MMHS150K_GT.json"
_HEAD = 1 << 14
_RULES = ("unlabelled", "first", "drop")


class Mmhs:
    """Format `mmhs`."""

    def recognises(self, spec: str) -> bool:
        """A folder with the file of votes, or such a file under any name."""
        if os.path.isdir(spec):
            return os.path.isfile(os.path.join(spec, TRUTH))
        if not spec.lower().endswith(".json") or not os.path.isfile(spec):
            return False
        with open(spec, "rb") as file:
            head = file.read(_HEAD)
        return b'"labels"' in head and b'"tweet_text"' in head

    def read(self, spec: str, options: SourceOptions) -> Records:
        """A record for each tweet.

        Raises:
            InputError: the file of votes is malformed, or ``ties`` names no label.
        """
        path = os.path.abspath(os.path.join(spec, TRUTH) if os.path.isdir(spec) else spec)
        folder, where = os.path.dirname(path), os.path.basename(path)
        entries = _entries(path, where)
        votes = [_votes(entry, f"{where}: {id_}") for id_, entry in entries.items()]
        names = _names(entries, votes)
        rules = parse_merge(options.merge_labels or "")
        merged = merging(rules, names, need_all=options.need_merged_labels)
        votes = [[merged.get(name, name) for name in one] for one in votes]
        label_set = tuple(dict.fromkeys(merged.get(name, name) for name in names))
        notes = _notes(votes, merged, label_set)
        warnings: list[str] = []
        cells, dropped = _cells(votes, label_set, options, notes)
        splits = _splits(folder, entries, warnings)
        _count_orphans(folder, entries, warnings)
        words = _image_words(folder, entries, warnings)
        keep = [at for at in range(len(entries)) if at not in dropped]
        ids = [id_ for at, id_ in enumerate(entries) if at not in dropped]
        root = options.image_root or folder
        image_folder = "img_resized/" if os.path.isdir(os.path.join(root, "img_resized")) else ""
        columns = {
            "id": pa.array(ids, pa.string()),
            "image": pa.array([f"{image_folder}{id_}.jpg" for id_ in ids], pa.string()),
            "tweet_text": pa.array([_text(entries[id_], "tweet_text") for id_ in ids], pa.string()),
            "img_text": pa.array([words.get(id_) for id_ in ids], pa.string()),
            "labels": pa.array([cells[at] for at in keep], pa.string()),
            "votes": pa.array([votes[at] for at in keep], pa.list_(pa.string())),
            "img_url": pa.array([_text(entries[id_], "img_url") for id_ in ids], pa.string()),
            "tweet_url": pa.array([_text(entries[id_], "tweet_url") for id_ in ids], pa.string()),
        }
        roles = {"id": "id", "image": "image", "text": "tweet_text", "labels": "labels"}
        if splits:
            columns["split"] = pa.array([splits.get(id_) for id_ in ids], pa.string())
            roles["split"] = "split"
        return Records(
            where=where,
            folder=folder,
            columns=pa.table(columns),
            lines=np.array(keep, np.int64) + 1,
            description="MMHS150K",
            place=lambda row: f"{where}: {ids[row]}",
            roles=roles,
            label_set=label_set,
            labels_merged=True,
            notes=notes,
            warnings=warnings,
        )


def _entries(path: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file, object_pairs_hook=_unique)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); download it again") from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{where} is no object of tweets by id")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"key {twice!r} is there twice")
    return result


def _votes(entry: Any, where: str) -> list[str]:
    """The names of the labels that the annotators gave."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is no object with labels and tweet_text")
    numbers, names = entry.get("labels", []), entry.get("labels_str")
    if not isinstance(numbers, list) or not all(type(one) is int for one in numbers):
        raise InputError(f"{where}: labels must be a list of whole numbers, one for each annotator")
    if names is None:
        return [str(number) for number in numbers]
    good = isinstance(names, list) and all(isinstance(one, str) and one.strip() for one in names)
    if not good or ("labels" in entry and len(names) != len(numbers)):
        raise InputError(
            f"{where}: labels_str must have a name for each of the {len(numbers)} labels"
        )
    return [name.strip() for name in names]


def _names(entries: dict[str, dict[str, Any]], votes: list[list[str]]) -> tuple[str, ...]:
    """All labels, by their numbers.

    Raises:
        InputError: a label has two numbers, or a number two labels.
    """
    number_of: dict[str, int] = {}
    name_of: dict[int, str] = {}
    for (id_, entry), names in zip(entries.items(), votes, strict=True):
        for number, name in zip(entry.get("labels", []), names, strict=False):
            if (
                number_of.setdefault(name, number) != number
                or name_of.setdefault(number, name) != name
            ):
                raise InputError(
                    f"{id_}: label {number} is called {shown(name)} here and"
                    f" {shown(name_of[number])} elsewhere, or {shown(name)} has two numbers"
                )
    unnumbered = {name for one in votes for name in one} - set(number_of)
    return (*sorted(number_of, key=number_of.__getitem__), *natural_order(unnumbered))


def _notes(votes: list[list[str]], merged: dict[str, str], label_set: tuple[str, ...]) -> list[str]:
    numbers = Counter(map(len, votes))
    many = ", ".join(f"{count} with {n}" for n, count in sorted(numbers.items()))
    notes = [f"votes: {many} annotators; labels {listed(label_set)}"]
    if merged:
        notes.append(
            f"labels: {len(merged)} merged before the votes are counted, {len(label_set)} left"
        )
    return notes


def _cells(
    votes: list[list[str]], label_set: tuple[str, ...], options: SourceOptions, notes: list[str]
) -> tuple[list[str | None], set[int]]:
    """The label cell of each tweet, and the tweets to leave out."""
    if options.task == "multilabel":
        notes.append("labels: every one that an annotator gave, as the task is multilabel")
        return [json.dumps(sorted(set(one))) if one else None for one in votes], set()
    rule = _tie_rule(options.ties, label_set)
    cells: list[str | None] = []
    tied = set()
    for at, one in enumerate(votes):
        counts = Counter(one)
        best = [name for name, count in counts.items() if count == max(counts.values())]
        if len(best) > 1:
            tied.add(at)
            cells.append(best[0] if rule == "first" else None if rule in _RULES else rule)
        else:
            cells.append(best[0] if best else None)
    done = {"unlabelled": "unlabelled", "first": "given the first of the tied labels"}
    done |= {"drop": "left out"}
    notes.append(
        f"ties: {len(tied)} of {len(votes)} samples have no majority and are"
        f" {done.get(rule, f'given {rule}')} (--ties {options.ties})"
    )
    return cells, tied if rule == "drop" else set()


def _tie_rule(ties: str, label_set: tuple[str, ...]) -> str:
    """One of the rules, or the label that takes every tie."""
    if ties in _RULES or ties in label_set:
        return ties
    alike = [name for name in label_set if name.casefold() == ties.casefold()]
    if len(alike) == 1:
        return alike[0]
    raise InputError(
        f"unknown ties {ties!r}; choose from {', '.join(_RULES)}, or a label: {listed(label_set)}"
    )


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    return None if value is None else str(value)


def _splits(folder: str, entries: dict[str, Any], warnings: list[str]) -> dict[str, str]:
    """{id: split}; an id that is in several is in the one that is used last: test, val, train."""
    result: dict[str, str] = {}
    unknown, twice = [], []
    for split in SPLITS:
        path = os.path.join(folder, "splits", f"{split}_ids.txt")
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            ids = file.read().split()
        for id_ in dict.fromkeys(ids):
            if id_ not in entries:
                unknown.append(id_)
                continue
            if id_ in result:
                twice.append(id_)
            result[id_] = split
    if unknown:
        warnings.append(
            "ids of the split files without an entry are left out:"
            f" {len(unknown)}, first {shown(unknown[0])}"
        )
    if twice:
        warnings.append(
            f"ids in several split files: {len(twice)}, first {shown(twice[0])}; taken as test"
            " before val before train"
        )
    without = [id_ for id_ in entries if id_ not in result]
    if result and without:
        warnings.append(
            f"entries in no split file: {len(without)}, first {shown(without[0])}; they have no"
            " split and are not used for training"
        )
    return result


def _count_orphans(folder: str, entries: dict[str, Any], warnings: list[str]) -> None:
    images = os.path.join(folder, "img_resized")
    if os.path.isdir(images):
        stems = {os.path.splitext(name)[0] for name in os.listdir(images) if name.endswith(".jpg")}
        left = sorted(stems - entries.keys())
        if left:
            warnings.append(
                f"images without an entry are left out: {len(left)}, first {shown(left[0])}.jpg"
            )


def _image_words(folder: str, entries: dict[str, Any], warnings: list[str]) -> dict[str, str]:
    """{id: the words seen in its picture}, for those that have any."""
    where = os.path.join(folder, "img_txt")
    if not os.path.isdir(where):
        return {}
    result, bad = {}, []
    for name in sorted(os.listdir(where)):
        id_, suffix = os.path.splitext(name)
        if suffix != ".json" or id_ not in entries:
            continue
        try:
            with open(os.path.join(where, name), encoding="utf-8-sig") as file:
                words = json.load(file)["img_text"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            bad.append(name)
            continue
        if isinstance(words, str) and words.strip():
            result[id_] = words
    if bad:
        warnings.append(
            f"{len(bad)} files of img_txt cannot be read and their words are missing, first"
            f" {shown(bad[0])}"
        )
    return result
