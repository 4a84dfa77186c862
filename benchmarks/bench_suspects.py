"""How many flipped labels `mmc labels` finds: python benchmarks/bench_suspects.py STORE [--seeds 5]

Flips one entry of 5 % of the labelled samples (half of them drop a label, half add one; with one
label per sample: another one), and ranks all entries. Precision and recall are of as many entries
as were flipped; of each kind (missing, extra) as many of that kind's own ranking as it has flips.
The store is only read.
"""

import argparse
import time

import numpy as np
import torch

from mmc.heads.labels.material import Material
from mmc.heads.labels.suspects import Judged, judge
from mmc.store import EmbeddingStore

SHARE = 0.05


class Flipped(Material):
    """A material whose labels are partly wrong."""

    def flip(self, seed: int) -> np.ndarray:
        """Flip labels; bool (n, C) of the entries that are wrong now."""
        random = np.random.default_rng(seed)
        places = self.labelled
        true = self.store.labels.multi_hot(self.rows[places])
        wrong = np.zeros(true.shape, bool)
        single = self.store.task != "multilabel"
        for row in random.choice(len(places), round(SHARE * len(places)), replace=False):
            has, lacks = np.flatnonzero(true[row]), np.flatnonzero(true[row] == 0)
            drop = random.random() < 0.5 and len(has) > 1
            if single or not drop:
                wrong[row, random.choice(lacks)] = True
            if single or drop:
                wrong[row, random.choice(has)] = True
        self.given = np.where(wrong, 1 - true, true).astype(np.int8)
        return wrong


def shares(score: torch.Tensor, wrong: np.ndarray, count: int) -> tuple[float, float]:
    """(precision, recall) of the ``count`` highest scores."""
    top = score.reshape(-1).topk(count).indices.numpy()
    hits = wrong.reshape(-1)[top].sum()
    return hits / count, hits / wrong.sum()


def main() -> None:
    """Print a line per seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--features", default="")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    store = EmbeddingStore.open(options.store)
    spec = [part for part in options.features.split(",") if part]
    material = Flipped(store, spec, device="cpu")
    print(f"{options.store}: {len(material.labelled):,} labelled, {', '.join(material.features)}")
    lines = []
    for seed in range(options.seeds):
        wrong = material.flip(seed)
        start = time.perf_counter()
        found = judge(material, lambda *_: None, targets=material.given)
        assert isinstance(found, Judged)
        seconds = time.perf_counter() - start
        score = found.wrong()
        given = torch.from_numpy(material.given) == 1
        if store.task == "multilabel":
            line = [*shares(score, wrong, int(wrong.sum()))]
            for mask in (~given, given):
                there = wrong & mask.numpy()
                line += shares(score.masked_fill(~mask, -1), there, max(1, int(there.sum())))
        else:
            there = (wrong & (material.given == 1)).any(1)
            own = score.masked_fill(~given, 0).sum(1)
            line = [*shares(own, there, int(there.sum()))]
        lines.append([*line, seconds])
        print(f"seed {seed}: {_told(lines[-1])}")
    print(f"mean:   {_told(np.mean(lines, 0).tolist())}")


def _told(line: list[float]) -> str:
    names = ["precision", "recall", "missing precision", "recall", "extra precision", "recall"]
    *values, seconds = line
    pairs = [f"{name} {value:.3f}" for name, value in zip(names, values, strict=False)]
    return f"{', '.join(pairs)}, {seconds:.1f} s"


if __name__ == "__main__":
    main()
