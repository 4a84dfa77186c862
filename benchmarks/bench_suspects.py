"""How many flipped labels `mmc labels` finds: python benchmarks/bench_suspects.py STORE [--seeds 5]

Flips one entry of 5 % of the labelled samples (half of them drop a label, half add one; with one
label per sample: another one), and ranks all entries. Precision and recall are of as many entries
as were flipped; of each kind (missing, extra) as many of that kind's own ranking as it has flips.
Beside them the mean of the scores shown for these entries, which should be near the precision. The
store is only read.
"""

import argparse
import time

import numpy as np

from mmc.heads.labels.flips import flip
from mmc.heads.labels.material import Material
from mmc.heads.labels.suspects import Judged, judge
from mmc.store import EmbeddingStore


def ranked(found: Judged) -> np.ndarray:
    """float64 (n, C): scores as `mmc labels` ranks by; doubts break ties."""
    doubt = found.wrong().numpy().astype(np.float64)
    given = found.targets == 1
    out = np.full(doubt.shape, -1.0)
    for kind, scale in found.scales.items():
        inside = ~given if kind == "missing" else given
        out[inside] = scale(doubt[inside])
    return np.where(out >= 0, out + 1e-6 * doubt, out)


def hits(score: np.ndarray, wrong: np.ndarray, count: int) -> tuple[float, float, float]:
    """(precision, recall, mean score) of the ``count`` highest scores."""
    top = np.argsort(-score, axis=None, kind="stable")[:count]
    found = wrong.reshape(-1)[top].sum()
    return found / count, found / wrong.sum(), score.reshape(-1)[top].mean()


def main() -> None:
    """Print a line per seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--features", default="")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    store = EmbeddingStore.open(options.store)
    spec = [part for part in options.features.split(",") if part]
    material = Material(store, spec, device="cpu")
    print(f"{options.store}: {len(material.labelled):,} labelled, {', '.join(material.features)}")
    true = store.labels.multi_hot(material.rows[material.labelled])
    lines = []
    for seed in range(options.seeds):
        given, wrong = flip(true, store.task, np.random.default_rng([seed, 1]))
        start = time.perf_counter()
        found = judge(material, lambda *_: None, targets=given)
        assert found is not None, "too few labelled samples"
        seconds = time.perf_counter() - start
        score = ranked(found)
        if store.task == "multilabel":
            line = [*hits(score, wrong, int(wrong.sum()))]
            for there in (given == 0, given == 1):
                of_kind = wrong & there
                count = max(1, int(of_kind.sum()))
                line += hits(np.where(there, score, -1), of_kind, count)
        else:
            there = wrong & (given == 1)
            line = [*hits(score, there, int(there.sum()))]
        lines.append([*line, seconds])
        print(f"seed {seed}: {_told(lines[-1])}")
    print(f"mean:   {_told(np.mean(lines, 0).tolist())}")


def _told(line: list[float]) -> str:
    *values, seconds = line
    parts = []
    for kind, (precision, recall, mean) in zip(
        ("all", "missing", "extra"), zip(*[iter(values)] * 3, strict=True), strict=False
    ):
        parts.append(f"{kind} precision {precision:.3f} recall {recall:.3f} score {mean:.3f}")
    return f"{', '.join(parts)}, {seconds:.1f} s"


if __name__ == "__main__":
    main()
