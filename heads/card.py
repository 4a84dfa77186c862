"""The model card (README.md) of a run: how good, on what, how to use it, what to beware of."""

import json
import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmc.heads.leakage import described
from mmc.heads.models import GROUP, HEADS
from mmc.heads.search import tables
from mmc.store.registry import load, lookup

if TYPE_CHECKING:
    from mmc.heads.artifact import Run

# Rows of the per-label tables: the best and the worst.
SHOWN = 10
CONFUSION_LABELS = 20
"""Up to so many labels the whole confusion matrix is shown, beyond only the largest confusions."""
PLAIN = "_uncalibrated"
"""Ending of metrics of the probabilities before the temperature."""
_METRICS = {
    "multilabel": (
        ("mAP", "mAP"),
        ("random_mAP", "mAP of a random ranking"),
        ("labels_evaluated", "labels that occur"),
        ("micro_f1", "micro-F1"),
        ("macro_f1", "macro-F1"),
        ("samples_f1", "samples-F1"),
        ("auroc_macro", "AUROC (mean over labels)"),
        ("hamming_loss", "Hamming loss"),
        ("subset_accuracy", "subset accuracy"),
        ("cardinality_true", "labels per sample, true"),
        ("cardinality_predicted", "labels per sample, predicted"),
        ("ece", "calibration error (ECE)"),
        ("ece_uncalibrated", "ECE without the temperature"),
        ("ece_above_0.1", "ECE of probabilities above 0.1"),
        ("ece_above_0.1_uncalibrated", "the same without the temperature"),
        ("log_loss", "log loss"),
        ("log_loss_uncalibrated", "log loss without the temperature"),
        ("brier", "Brier score"),
        ("brier_uncalibrated", "Brier score without the temperature"),
    ),
    "binary": (
        ("positive_label", "positive class"),
        ("positives", "samples of it"),
        ("threshold", "its threshold"),
        ("auroc", "AUROC"),
        ("auroc_interval", "AUROC, 95 % interval"),
        ("ap", "average precision"),
        ("accuracy", "accuracy"),
        ("majority_accuracy", "accuracy of always the larger class"),
        ("macro_f1", "macro-F1"),
        ("f1", "F1 of the positive class"),
        ("log_loss", "log loss"),
        ("log_loss_uncalibrated", "log loss without the temperature"),
        ("ece", "calibration error (ECE)"),
        ("ece_uncalibrated", "ECE without the temperature"),
        ("brier", "Brier score"),
        ("brier_uncalibrated", "Brier score without the temperature"),
    ),
    "multiclass": (
        ("accuracy", "accuracy"),
        ("majority_accuracy", "accuracy of always the largest class"),
        ("top5_accuracy", "top-5 accuracy"),
        ("macro_f1", "macro-F1"),
        ("balanced_accuracy", "balanced accuracy"),
        ("log_loss", "log loss"),
        ("log_loss_uncalibrated", "log loss without the temperature"),
        ("ece", "calibration error (ECE)"),
        ("ece_uncalibrated", "ECE without the temperature"),
        ("brier", "Brier score"),
        ("brier_uncalibrated", "Brier score without the temperature"),
    ),
}


_WAYS = {"default": "0.5", "global": "one for all", "per_label": "one per label"}
"""How thresholds can be made, in the order of `Thresholds.held_out`."""


def summary_rows(task: str, by_split: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the headline table: (metric name, value per split ...), undefined ones left out."""
    rows: list[tuple[str, ...]] = [
        ("samples", *(str(metrics["samples"]) for metrics in by_split.values()))
    ]
    for key, name in _METRICS[task]:
        values = [metrics.get(key) for metrics in by_split.values()]
        if key.endswith(PLAIN) and values == [
            metrics.get(key.removesuffix(PLAIN)) for metrics in by_split.values()
        ]:
            continue  # the temperature is 1
        if any(value is not None for value in values):
            rows.append((name, *map(shown, values)))
    return rows


def shown(value: Any) -> str:
    """A metric as text: four digits, an interval as "low to high", "-" when undefined."""
    if isinstance(value, list):
        return " to ".join(shown(item) for item in value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def ranked_labels(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per-label rows of a metrics dictionary, best first (by AP, or F1 where there is no AP)."""
    table = metrics["per_label"]
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    key = "ap" if "ap" in table else "f1"
    defined = [row for row in rows if row["positives"] > 0]
    return sorted(defined, key=lambda row: (-(row[key] or 0.0), row["label"]))


def render(run: "Run") -> str:
    """The card as Markdown."""
    parts = [
        _head(run),
        _quality(run),
        tables.card(run.search, _table),
        _per_label(run),
        _confusion(run),
        _data(run),
        _use(run),
        _decisions(run),
        _limits(run),
        _made_with(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(run: "Run") -> str:
    name = run.path.name if run.path else "run"
    inputs = ", ".join(
        f"`{ref.feature}`" if role == ref.field else f"`{ref.feature}` as {role}"
        for role, ref in run.features.items()
    )
    how = f"loss `{run.loss}`, " if run.history else ""
    return (
        f"# {name}\n\n"
        f"A `{run.head}` head for a {run.task} task with {len(run.label_set)} labels, on "
        f"features: {inputs}. {run.parameters:,} parameters, {how}seed {run.seed}.{_about(run)}"
    )


def _about(run: "Run") -> str:
    """What the head says of itself."""
    head: Any = load(lookup(HEADS, run.head, kind="head", group=GROUP))
    return f" {head.card}" if head.card else ""


def _quality(run: "Run") -> str:
    if not run.metrics:
        return "## How good\n\nNot measured: there were no labelled validation or test rows."
    rows = summary_rows(run.task, run.metrics)
    chosen = ["thresholds", "the best epoch"]
    if "folds" in run.search:
        chosen = chosen[1:]  # and the setting of a sweep was chosen out of fold
    elif "sweep" in run.search:
        chosen.append("the setting of the sweep")
    if "seeds" in run.search:
        chosen.append("the seed")
    what = f"{', '.join(chosen[:-1])} and {chosen[-1]} were" if chosen[1:] else f"{chosen[0]} was"
    note = f"{what[0].upper()}{what[1:]} chosen on `val`, so " + (
        "its figures are optimistic; nothing was chosen on `test`."
        if "test" in run.metrics
        else "these figures are optimistic."
    )
    return f"## How good\n\n{_table(('metric', *run.metrics), rows)}\n\n{note}"


def _per_label(run: "Run") -> str:
    split = "test" if "test" in run.metrics else "val"
    if split not in run.metrics:
        return ""
    rows = ranked_labels(run.metrics[split])
    wanted = ("label", "positives", "known", "ap", "f1", "precision", "recall", "threshold")
    columns = [c for c in wanted if rows and c in rows[0]]
    best, worst = rows[:SHOWN], rows[SHOWN:][-SHOWN:]
    text = f"### Labels on `{split}`, best first\n\n{_label_table(best, columns)}"
    hidden = len(rows) - len(best) - len(worst)
    if worst:
        between = f"{hidden} more between these and the lowest" if hidden else "The lowest"
        text += f"\n\n{between}:\n\n{_label_table(worst, columns)}"
    without = len(run.label_set) - len(rows)
    return text + (f"\n\nWithout any sample in `{split}`: {without}." if without else "")


def _confusion(run: "Run") -> str:
    """What is taken for what, of a task with one label per sample."""
    split = "test" if "test" in run.metrics else "val"
    found = run.metrics.get(split, {})
    table, largest = found.get("confusion", []), found.get("largest_confusions", {})
    if not table and not largest:
        return ""
    labels = run.label_set
    title = f"### What is taken for what on `{split}`"
    if table and len(labels) <= CONFUSION_LABELS:
        rows = [(name, *map(str, counts)) for name, counts in zip(labels, table, strict=True)]
        header = ("true, predicted as →", *labels)
        return f"{title}\n\nSamples by true and predicted class.\n\n{_table(header, rows)}"
    if table:
        pairs = [
            (labels[true], labels[predicted], count, sum(counts))
            for true, counts in enumerate(table)
            for predicted, count in enumerate(counts)
            if count and true != predicted
        ]
        pairs.sort(key=lambda pair: (-pair[2], pair[3]))
    else:
        total = dict(zip(labels, found["per_label"]["positives"], strict=True))
        pairs = [
            (true, predicted, count, total[true])
            for true, predicted, count in zip(*largest.values(), strict=True)
        ]
    if not pairs:
        return ""
    rows = [
        (true, predicted, str(count), f"{count / of:.0%}")
        for true, predicted, count, of in pairs[:SHOWN]
    ]
    header = ("true", "predicted", "samples", "of the true class")
    return f"{title}\n\nThe most frequent confusions.\n\n{_table(header, rows)}"


def _label_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    return _table(tuple(columns), [tuple(shown(row[c]) for c in columns) for row in rows])


def _data(run: "Run") -> str:
    lines = ["## On what", ""]
    if run.source.get("spec"):
        lines.append(f"- source: `{run.source['spec']}`")
    if run.source.get("format"):
        lines.append(f"- format: {run.source['format']}")
    counts = run.source.get("counts", {})
    if "samples" in counts:
        by_size = sorted(counts["splits"].items(), key=lambda split: -split[1])
        splits = ", ".join(f"{name or 'no split'} {n:,}" for name, n in by_size)
        lines.append(
            f"- {counts['samples']:,} samples ({splits}); {counts['images']:,} with an image, "
            f"{counts['texts']:,} with a text, {counts['labelled']:,} labelled"
        )
    for split, metrics in run.metrics.items():
        lines.append(f"- measured on {split}: {metrics['samples']:,} labelled samples")
    if run.from_arrays:
        return "\n".join([*lines, "- features: arrays, of which nothing more is known"])
    for entry in run.recipe():
        spec = entry["context"].get("spec", "unknown backbone")
        fields = ", ".join(f"`{entry['alias']}/{name}`" for name in entry["fields"])
        lines.append(f"- {fields}: `{spec}`, fingerprint `{entry['fingerprint']}`")
    return "\n".join(lines)


def _use(run: "Run") -> str:
    if run.from_arrays:
        return _use_arrays(run)
    path = shlex.quote(run.path.name) if run.path else "RUN"
    scores = "" if run.source.get("form") == "hateful-memes" else " --scores"
    measured = list(run.metrics)[-1] if run.metrics else "val"
    return f"""## How to use it

From the folder that holds this one, with `my.store` for the store that it was trained on:

```sh
mmc predict {path} new_samples.csv --out predictions.csv   # images and texts: extracts first
mmc predict {path} my.store --out predictions.csv{scores}
mmc evaluate {path} my.store --split {measured}
```

```python
from mmc.heads.artifact import Run
from mmc.heads.predict import predict
from mmc.store import EmbeddingStore

run = Run.load({json.dumps(run.path.name if run.path else "RUN")})
store = EmbeddingStore.open("my.store")
predictions = predict(run, store)   # .ids, .probabilities (n, labels), .decisions; run.label_set
```"""


def _use_arrays(run: "Run") -> str:
    shapes = {ref.given_name: ("n", *ref.shape) for ref in run.features.values()}
    inputs = ", ".join(f"`{name}` ({', '.join(map(str, s))})" for name, s in shapes.items())
    return f"""## How to use it

```python
from mmc.heads import HeadClassifier

classifier = HeadClassifier.load({json.dumps(run.path.name if run.path else "RUN")})
y = classifier.predict(X)   # also predict_proba, decision_function
```

X is what it was fitted on: {inputs}."""


def _decisions(run: "Run") -> str:
    thresholds = run.thresholds
    if thresholds.mode == "argmax":
        text = "## Decisions\n\nThe class with the highest probability."
        return f"{text}{_temperature(run)}"
    low, high = min(thresholds.values), max(thresholds.values)
    span = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    what = {
        "default": "0.5",
        "global": f"{span}, the same for every label",
        "per_label": f"the label's own threshold ({span})",
    }[thresholds.mode]
    given = "A label is given when its probability"
    if run.task == "binary":
        what = span
        given = f"`{run.label_set[1]}` is given when its probability"
    text = f"## Decisions\n\n{given} reaches {what}."
    if thresholds.objective:
        values = ", ".join(
            f"{_WAYS[mode]} {value:.4f}" for mode, value in thresholds.held_out.items()
        )
        on = _tuned_on(run)
        text += (
            f" Chosen on {on} by the {thresholds.objective}-F1 on rows that the thresholds were "
            f"not fitted on: {values}."
        )
        if len(set(thresholds.held_out.values())) == 1:
            text += f" They do not differ: {on} gave no reason to move from 0.5, or too little."
    return f"{text}{_temperature(run)}"


def _tuned_on(run: "Run") -> str:
    """What thresholds and temperature were found on."""
    return "the predictions out of fold" if "folds" in run.search else "`val`"


def _temperature(run: "Run") -> str:
    """How logits become probabilities, where that is not plain."""
    on = _tuned_on(run)
    if run.temperature == 1:
        tried = "temperature" in run.metrics.get("val", {})
        return (
            f"\n\nProbabilities are as the head gives them: no temperature fits {on} better, or "
            "there are too few decisions to tell (fewer than 10 of a kind)."
            if tried
            else ""
        )
    how = "sigmoid" if run.task == "multilabel" else "softmax"
    return (
        f"\n\nProbabilities are the {how} of the logits divided by {run.temperature:.4g}, the "
        f"temperature that fits {on} best (Guo et al. 2017)."
    )


def _limits(run: "Run") -> str:
    reads = (
        "- It cannot tell whether arrays were made as those that it was trained on."
        if run.from_arrays
        else "- It reads only features with the fingerprints above, and refuses others."
    )
    lines = [
        "## Limits",
        "",
        reads,
        "- It knows only the labels of its label set, in the sense that the training data gave "
        "them; data from elsewhere can look different, and the figures above do not cover that.",
    ]
    split = run.metrics.get("test") or run.metrics.get("val") or {}
    if (split.get("samples") or math.inf) < 1000:
        lines.append(
            f"- The figures rest on {split['samples']} samples; differences of a few points are "
            "within chance."
        )
    seen = described(split.get("also_in_train", {}))
    if seen:
        lines.append(
            f"- Of the {split['samples']} samples {seen}: on new samples it may do worse than the "
            "figures say."
        )
    ece = split.get("ece_above_0.1", split.get("ece"))
    if ece is not None and ece > 0.05:
        lines.append(
            f"- Probabilities are off by {ece:.2f} on average; rank with them rather than "
            "reading them as chances."
        )
    return "\n".join(lines)


def _made_with(run: "Run") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    settings = json.dumps(run.train_config, sort_keys=True, default=str)
    head = json.dumps(run.head_config, sort_keys=True, default=str)
    return (
        f"## Made with\n\n{run.created}; {versions}.\n\n"
        f"Head settings: `{head}`\n\nTraining settings: `{settings}`"
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first column is text, the others right-aligned."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
