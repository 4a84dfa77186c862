"""Scoring labels that a run was not trained on, by their texts.

Embedding the new names takes the backbone, which is not the business of heads: `text_recipe` says
which backbone and prompt made the texts of the run's own labels, `with_labels` takes embeddings.
"""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from mmc.heads.artifact import Run
from mmc.heads.thresholds import Thresholds
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """What made the label texts that a run reads."""

    backbone: dict[str, Any]
    """The entry of `Run.recipe`: alias, fingerprint, identity, context."""
    templates: tuple[str, ...]
    """Prompts with ``{label}`` in each; several were averaged."""


def text_recipe(run: Run) -> TextRecipe:
    """What made the label texts of ``run``.

    Raises:
        InputError: its head reads none.
    """
    found = run.train_config.get("label_text")
    if not found:
        raise InputError(
            f"{run.path or 'the run'}: {run.head} was trained without label texts, so it scores "
            "the labels it was trained on and no others; train zero_shot, dm_decoder, or "
            "ml_decoder with head.queries=label_text"
        )
    backbone = next(entry for entry in run.recipe() if entry["alias"] == found["alias"])
    return TextRecipe(backbone=backbone, templates=templates(found["prompt"]))


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels in a text file, one a line; empty lines count for nothing.

    Raises:
        InputError: no such file, it is not text, or a label stands there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"labels {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"labels {path} are not UTF-8 text: {error}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        label = line.strip()
        if label in found:
            raise InputError(
                f"labels {path}, line {number}: {label!r} is there twice, first in line "
                f"{found[label]}; give each name once"
            )
        if label:
            found[label] = number
    return tuple(found)


def templates(prompt: str) -> tuple[str, ...]:
    """The prompts that a store recorded with label texts, without the words filled in."""
    bare = re.sub(r" \(label names [0-9a-f]+\)$", "", prompt)
    if bare.startswith("["):
        return tuple(json.loads(bare))
    return (bare,)


def with_labels(run: Run, labels: Sequence[str], label_text: npt.ArrayLike) -> Run:
    """The run for other labels: those it knows keep their prior and threshold.

    The threshold of a new label is the run's common one: the median where each label has its own.
    Metrics are left out: they were of the labels before.

    Args:
        labels: names, in the order of the outputs; those of the run may be among them.
        label_text: (C', D) float, made as `text_recipe` says.

    Raises:
        InputError: a name twice, texts of another number or width, a binary task, or a head that
            knows its labels by number only.
    """
    texts = torch.as_tensor(label_text, dtype=torch.float32)
    labels = tuple(labels)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not labels:
        what = f"{twice[0]!r} is there twice" if twice else "there are none"
        raise InputError(f"new labels: {what}; give each name once")
    if run.task == "binary":
        raise InputError("new labels: the run tells two classes apart; train a multilabel run")
    place = {label: index for index, label in enumerate(run.label_set)}
    same = torch.tensor([place.get(label, -1) for label in labels])
    head = run.build_head()
    width = head.text_width
    if texts.shape != (len(labels), width) and width is not None:
        raise InputError(
            f"new labels: {len(labels)} labels need texts ({len(labels)}, {width}), got "
            f"{tuple(texts.shape)}; embed them with the backbone and prompt of the run"
        )
    state = head.for_labels(texts, same)
    return replace(
        run,
        label_set=labels,
        state={name: tensor.detach().cpu() for name, tensor in state.items()},
        thresholds=_thresholds(run, same.tolist()),
        metrics={},
        history=[],
        path=None,
    )


def _thresholds(run: Run, same: list[int]) -> Thresholds:
    """Each known label's own, and the common one for the rest."""
    old = run.thresholds
    if not old.values:
        return old
    common = statistics.median(old.values)
    values = tuple(old.values[index] if index >= 0 else common for index in same)
    return replace(old, values=values, held_out={})
