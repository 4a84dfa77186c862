"""A sweep against the same trainings one after another, as ratios measured in one run.

    python benchmarks/bench_sweep.py            # some minutes on two cores
    python benchmarks/bench_sweep.py --rows 20000 --settings 4 --heads linear

On synthetic features (two fields of 512, 80 labels) in a store of its own, for each head:

- steps: the training steps alone over resident data, learning rates of one grid; side by side as
  `mmc train-head --sweep` trains them, and one after another;
- whole: `train` with the sweep, and `train` once for each setting, with all that belongs to it
  (reading, validation, thresholds, figures, the run's files).

Contenders alternate, ratios are taken within a round. Two-thread figures are only worth reading
when the effective-core probe is near the number of cores.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from bench_heads import effective_cores
from head_problems import LABELS, VIEWS, WIDTH, make_views

from mmc.heads.engine import Engine
from mmc.heads.options import TrainConfig
from mmc.heads.search.stacked import Stack
from mmc.heads.trainer import train
from mmc.heads.training import Setup
from mmc.store import EmbeddingStore, FieldSpec

ROUNDS = 3


def make_store(folder: Path, rows: int, val_rows: int, labels: int) -> EmbeddingStore:
    """The benchmark's features in a store; as many test as validation rows."""
    views, targets = make_views(rows + 2 * val_rows)
    n = len(targets)
    splits = ["train"] * rows + ["val"] * val_rows + ["test"] * val_rows
    truth = targets[:, :labels].numpy()
    table = pa.table(
        {
            "id": [f"s{i}" for i in range(n)],
            "split": splits,
            "labels": pa.array([np.flatnonzero(row) for row in truth], pa.list_(pa.int32())),
            "text_key": [f"t{i}" for i in range(n)],
            "image_key": [f"k{i}" for i in range(n)],
        }
    )
    store = EmbeddingStore.create(
        folder,
        table,
        label_set=[f"l{i}" for i in range(labels)],
        task="multilabel",
        source={"spec": "bench"},
    )
    fields = [FieldSpec(name=t, shape=(WIDTH,), dtype="float16", tower=t) for t in views]
    with store.writer("x", fields=fields, identity={"backbone": "none"}, context={}) as writer:
        for tower, values in views.items():
            for shard in range(writer.num_shards):
                at = np.arange(*writer.bounds(shard))
                part = {tower: values[at].numpy().astype(np.float16)}
                writer.commit(shard, tower, at, part, failed={})
    return EmbeddingStore.open(folder)


class Problem:
    """A sweep of learning rates of one head."""

    def __init__(self, store: EmbeddingStore, head: str, settings: int, epochs: int) -> None:
        self.store, self.head, self.epochs = store, head, epochs
        base = Setup(store, TrainConfig(head=head)).lr
        self.rates = [float(f"{base * 2 ** (i / 2 - settings / 4):.3g}") for i in range(settings)]
        self.configs = [TrainConfig(head=head, lr=lr, epochs=epochs) for lr in self.rates]

    def engines(self) -> list[Engine]:
        """What trains each setting, over one reading of the data; one validation, at the end."""
        first = Setup(self.store, self.configs[0])
        found = []
        for config in self.configs:
            setup = Setup(self.store, config, first.material)
            head, loss = setup.build()
            place = setup.place(head)
            data = setup.load(head, place)
            engine = setup.engine(head, loss, data, place, lambda *args: None)
            engine.epochs_per_round = self.epochs
            found.append(engine)
        return found

    def steps(self) -> dict[str, float]:
        """Seconds of the steps alone."""
        stacked, alone = self.engines(), self.engines()
        Stack(stacked).run(lambda place, error: None)
        for engine in alone:
            engine.run()
        return {
            "together": sum(engine.position.train_seconds for engine in stacked),
            "one after another": sum(engine.position.train_seconds for engine in alone),
        }

    def whole(self) -> dict[str, float]:
        """Seconds of everything."""
        rates = ",".join(map(str, self.rates))
        swept = TrainConfig(head=self.head, epochs=self.epochs, sweep=(f"lr={rates}",))
        return {
            "together": self._seconds([swept]),
            "one after another": self._seconds(self.configs),
        }

    def _seconds(self, configs: list[TrainConfig]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            for index, config in enumerate(configs):
                train(self.store, Path(folder) / str(index), config)
            return time.perf_counter() - started


def compare(what: str, measure: Callable[[], dict[str, float]], rounds: int) -> None:
    """Print the seconds and their ratio over some rounds, after one to warm up."""
    measure()
    found = [measure() for _ in range(rounds)]
    ratios = sorted(r["together"] / r["one after another"] for r in found)
    middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
    seconds = ", ".join(f"{key} {value:.2f} s" for key, value in middle.items())
    ratio = f"{statistics.median(ratios):.2f}  [{ratios[0]:.2f}-{ratios[-1]:.2f}]"
    print(f"{what:32} {ratio}   ({seconds})", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--val-rows", type=int, default=10_000)
    parser.add_argument("--labels", type=int, default=LABELS, help=f"at most {LABELS}")
    parser.add_argument("--settings", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--heads", default="linear,mlp")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{args.rows:,} x {len(VIEWS) * WIDTH}, {args.labels} labels, {args.epochs} epochs")
    print(f"effective cores before: {effective_cores():.2f}")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "s", args.rows, args.val_rows, args.labels)
        for head in args.heads.split(","):
            problem = Problem(store, head, args.settings, args.epochs)
            name = f"{head}, {args.settings} settings"
            if head == "linear":
                compare(f"{name}, steps", problem.steps, args.rounds)
            compare(f"{name}, whole", problem.whole, args.rounds)
    print(f"effective cores after: {effective_cores():.2f}")


if __name__ == "__main__":
    main()
