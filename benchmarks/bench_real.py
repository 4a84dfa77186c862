"""Heads at their defaults on a real store, beside TF-IDF and logistic regression on its texts.

    python benchmarks/bench_real.py STORE [--heads linear=minilm/text,fusion=minilm ...] [--seed 0]

STORE is multilabel, has texts, and the splits train, val and test. The baseline is scikit-learn's
(word 1- and 2-grams without stop words, one balanced classifier per label, C chosen on val); the
interval is that of the difference in test mAP on the same rows, by a paired bootstrap of them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor

from mmc.heads import metrics, splits
from mmc.heads.bootstrap import interval, resampled
from mmc.heads.options import TrainConfig
from mmc.heads.predict import Predictor
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import tune
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore


def baseline(store: EmbeddingStore) -> tuple[dict[str, Tensor], float]:
    """Logits of val and test, (n, C) each, and the seconds that all took."""
    started = time.perf_counter()
    rows = {split: store.rows(split=split) for split in SPLITS}
    truth = {split: splits.targets(store, r) for split, r in rows.items()}
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, stop_words="english")
    words.fit(store.column("text").take(rows["train"]).to_pylist())
    x = {s: words.transform(store.column("text").take(r).to_pylist()) for s, r in rows.items()}
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})
    for c in (0.3, 1, 3, 10):
        model = OneVsRestClassifier(
            LogisticRegression(C=c, class_weight="balanced", solver="liblinear")
        )
        model.fit(x["train"], truth["train"].numpy())
        found = {
            split: torch.from_numpy(model.decision_function(x[split])).float()
            for split in ("val", "test")
        }
        score = metrics.score(found["val"], truth["val"], store.task)
        best = max(best, (score, found), key=lambda pair: pair[0])
    return best[1], time.perf_counter() - started


SPLITS = ("train", "val", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--heads", nargs="+", default=["linear=", "mlp="], metavar="HEAD=FEATURES")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    store = EmbeddingStore.open(args.store)
    rows = store.rows(split="test")
    truth = splits.targets(store, rows)
    found, seconds = baseline(store)
    val_truth = splits.targets(store, store.rows(split="val"))
    cuts = tune(probabilities(found["val"], store.task), val_truth, store.task)
    told = metrics.evaluate(
        found["test"], truth, store.task, label_set=store.label_set, thresholds=cuts
    )
    base = resampled(found["test"], truth, store.task, seed=0)
    print("| head | reads | test mAP | to TF-IDF + LR (95 %) | micro-F1 | macro-F1 | seconds |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| TF-IDF + LR | | {told['mAP']:.4f} | | {told['micro_f1']:.3f} | "
        f"{told['macro_f1']:.3f} | {seconds:.0f} |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(args.heads):
            name, _, features = item.partition("=")
            config = TrainConfig(
                head=name, features=tuple(filter(None, features.split("+"))), seed=args.seed
            )
            report = train(store, Path(folder) / f"{number}.run", config)
            logits = Predictor(report.run, store).logits(rows)
            told = report.metrics["test"]
            low, high = interval(resampled(logits, truth, store.task, seed=0) - base)
            read = ", ".join(report.features.values())
            print(
                f"| {name} | {read} | {told['mAP']:.4f} | {low:+.3f} to {high:+.3f} | "
                f"{told['micro_f1']:.3f} | {told['macro_f1']:.3f} | {report.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
