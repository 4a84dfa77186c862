"""Head training on a CPU or GPU, as ratios measured in one run.

    python benchmarks/bench_heads.py            # everything; about half an hour on two cores
    python benchmarks/bench_heads.py --heads linear --parts plain,floor --rows 50000

On synthetic features (two fields of 512, 80 labels; for heads of tokens the shapes in
head_problems.py), `--parts`:

- plain: samples/s of mmc's engine with its defaults and of a plain PyTorch loop (DataLoader over a
  TensorDataset, batch 256, no workers, float32, AdamW at 1e-3), interleaved; a head with stages
  goes through them in mmc, and is trained all at once in the plain loop;
- floor: samples/s at each of `--batches` (heads of tokens: `--token-batch`) and of the floor: the
  step's matrix products alone, into memory that is there already, or a copy of the batch, whichever
  is slower; interleaved;
- quality: training time until the validation mAP of the plain loop's best epoch (linear and mlp);
- sklearn: training time of scikit-learn's one-vs-rest logistic regression (lbfgs, its defaults) and
  SGD (10 epochs) on some of the labels, scaled to all of them, against that of mmc's linear head to
  the same validation mAP of those labels.

On a CPU mmc computes in bf16 where the processor has it, on a GPU always. Figures of several
threads are only worth reading when the effective-core probe is near the number of cores.
"""

import argparse
import statistics
import threading
import time
import warnings

import numpy as np
import torch
from floor import Products, copy_seconds
from head_problems import HEADS_OF_TOKENS, LABELS, Problem, make_views, plain_loop

from mmc.heads import metrics
from mmc.heads.devices import pick_device

POOLED = ("linear", "mlp", "router", "ensemble", "gat", "boost", "fusion")
TOKEN_STEPS = 16
SGD_EPOCHS = 10
PARTS = ("plain", "floor", "quality", "sklearn")
FEW = 64
"""Validation rows where only the steps are timed."""
PLAIN_ROWS = 50_000
FLOOR_ROWS, FLOOR_STEPS = 98_304, 3
"""Of an epoch, at least, where the floor is compared: whole batches only."""
CPU_FLOATS = 1 << 30
"""Numbers of a step, as heads count them; larger batches are left out on a CPU."""


def ratio(label: str, tops: list[float], bottoms: list[float]) -> str:
    """Median and range of the ratios within rounds, so that drift cancels."""
    ratios = sorted(top / bottom for top, bottom in zip(tops, bottoms, strict=True))
    return f"{label} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def against_plain(problem: Problem, rounds: int) -> None:
    """Interleaved rounds of mmc with its default batch and of the plain loop."""
    train, few = problem.train(), problem.val(FEW)
    rows = min(problem.rows, PLAIN_ROWS)
    ours: list[float] = []
    plain: list[float] = []
    for number in range(rounds + 1):
        position = problem.engine(train, few, epochs=2).run()
        seconds, _ = next(plain_loop(problem, rows, 1))
        if number:
            ours.append(position.train_rows / position.train_seconds)
            plain.append(rows / seconds)
    print(
        f"{problem.name:16} batch {problem.batch}: {statistics.median(ours):,.0f} samples/s, plain "
        f"loop {statistics.median(plain):,.0f}; {ratio('mmc ÷ plain loop', ours, plain)}"
    )


def against_floor(problem: Problem, rounds: int) -> None:
    """Interleaved rounds of mmc and of the floor, over the steps of all stages."""
    few = problem.val(FEW)
    products = Products()
    one_batch = products.watch(problem.train(problem.batch))
    with products:
        problem.engine(one_batch, few, epochs=1).run()
    train = problem.train()
    batch = {key: values[: problem.batch] for key, values in train.inputs.items()}
    steps = problem.rows // problem.batch
    ours: list[float] = []
    floor: list[float] = []
    for number in range(rounds + 1):
        copied = copy_seconds(batch, steps, problem.device)
        least = [
            max(copied, products.seconds(stage, steps, problem.device))
            for stage in products.by_stage
        ]
        position = problem.engine(train, few, epochs=1).run()
        # Every stage that ran took the same number of steps.
        stages = list(dict.fromkeys(row["stage"] for row in position.history))
        if number:
            ours.append(position.train_rows / position.train_seconds)
            floor.append(problem.batch * len(stages) / sum(least[: len(stages)]))
    floats = sum(products.floats.values()) / len(products.floats) / problem.batch
    print(
        f"{problem.name:16} batch {problem.batch}: {statistics.median(ours):,.0f} samples/s, floor "
        f"{statistics.median(floor):,.0f} ({floats / 1e6:.2f} MFLOP a sample and stage); "
        f"{ratio('mmc ÷ floor', ours, floor)}",
        flush=True,
    )


def floors(heads: list[str], batches: list[int], rounds: int, device: torch.device) -> None:
    """Every head at every batch."""
    most = max(batches)
    data = make_views(max(FLOOR_ROWS, most * FLOOR_STEPS) + FEW)
    for name in heads:
        for batch in batches:
            rows = batch * max(FLOOR_STEPS, FLOOR_ROWS // batch)
            problem = Problem(name, rows, FEW, device, batch=batch, data=data)
            if device.type == "cpu" and problem.floats > CPU_FLOATS:
                print(f"{name:16} batch {batch}: left out, it takes too much memory on a CPU")
                continue
            against_floor(problem, rounds)


def time_to_quality(problem: Problem, plain_epochs: int) -> None:
    """Seconds of training until the validation mAP of the plain loop's best epoch."""
    epochs = plain_loop(problem, problem.rows, plain_epochs)
    curve = [(seconds, problem.mean_ap(head)) for seconds, head in epochs]
    best = max(value for _, value in curve)
    history = problem.engine(problem.train(), problem.val()).run().history
    ours = [(row["seconds"], row["val_mAP"]) for row in history]
    print(
        f"{problem.name:16} best val mAP: plain loop {best:.4f} in {plain_epochs} epochs, "
        f"mmc {max(value for _, value in ours):.4f} in {len(ours)}"
    )
    for share in (0.98, 1.0):
        plain, mmc = (_first(points, share * best) for points in (curve, ours))
        times = f"{plain / mmc:.1f} x" if plain and mmc else "not reached"
        shown = ", ".join(f"{x:.2f} s" if x else "never" for x in (plain, mmc))
        print(f"{'':16} to {share:.2f} of the plain loop's best (plain, mmc): {shown}: {times}")


def _first(points: list[tuple[float, float]], target: float) -> float | None:
    return next((seconds for seconds, value in points if value >= target), None)


def against_sklearn(problem: Problem, labels: int) -> None:
    """Seconds of one-vs-rest on ``labels`` labels, scaled to all; mmc to the same mAP of those."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, SGDClassifier

    chosen = torch.arange(0, LABELS, LABELS // labels)[:labels]
    x = problem.inputs["inputs"].cpu().numpy()
    targets = problem.targets.cpu()
    train, val = slice(problem.rows), slice(problem.rows, None)
    curves: dict[int, list[tuple[float, float]]] = {}
    sgd = SGDClassifier(loss="log_loss", max_iter=SGD_EPOCHS, tol=None, random_state=0)
    for model in (LogisticRegression(), sgd):
        logits = torch.zeros(len(targets) - problem.rows, LABELS)
        seconds = 0.0
        for label in chosen.tolist():
            y = targets[train, label].numpy()
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x[train], y)
            seconds += time.perf_counter() - started
            logits[:, label] = torch.from_numpy(np.asarray(model.decision_function(x[val])))
        known = problem.val(labels=chosen)
        reached = metrics.score(logits, known.targets.cpu(), "multilabel")
        if not curves:
            history = problem.engine(problem.train(), known).run().history
            curves[0] = [(row["seconds"], row["val_mAP"]) for row in history]
        scaled = seconds * LABELS / len(chosen)
        ours = _first(curves[0], reached)
        best = max(value for _, value in curves[0])
        print(
            f"{type(model).__name__}: {seconds:.1f} s for {len(chosen)} labels, {scaled:.0f} s "
            f"scaled to {LABELS}; val mAP of those {reached:.4f}, mmc's linear head {best:.4f}; "
            + (
                f"it had {reached:.4f} after {ours:.2f} s: {scaled / ours:.0f} x"
                if ours
                else "never"
            )
        )


def effective_cores() -> float:
    """How many threads' worth of work the machine does at once right now."""

    def work() -> None:
        a = torch.randn(600, 600)
        for _ in range(40):
            a = torch.mm(a, a).clamp(-1, 1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work()
    started = time.perf_counter()
    work()
    alone = time.perf_counter() - started
    team = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for member in team:
        member.start()
    for member in team:
        member.join()
    together = time.perf_counter() - started
    torch.set_num_threads(threads)
    return threads * alone / together


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--val-rows", type=int, default=20_000)
    parser.add_argument("--heads", default=",".join((*POOLED, *HEADS_OF_TOKENS)))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--batches", default="16384,65536", help="where the floor is compared")
    parser.add_argument("--token-batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sklearn-labels", type=int, default=4, help=f"labels that scikit-learn fits, of {LABELS}"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    heads, parts = args.heads.split(","), args.parts.split(",")
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"effective cores before: {effective_cores():.2f}")
    if "floor" in parts:
        pooled = [name for name in heads if name in POOLED]
        if pooled:
            floors(pooled, list(map(int, args.batches.split(","))), args.rounds, device)
        for name in heads:
            if name in HEADS_OF_TOKENS:
                batch = args.token_batch
                problem = Problem(name, batch * TOKEN_STEPS, FEW, device, batch=batch)
                against_floor(problem, args.rounds)
        print(f"effective cores between: {effective_cores():.2f}")
    heads = [name for name in heads if name in POOLED and name != "fusion"]
    views = make_views(args.rows + args.val_rows)
    for name in heads if {"plain", "quality", "sklearn"} & set(parts) else ():
        problem = Problem(name, args.rows, args.val_rows, device, data=views)
        if "plain" in parts:
            against_plain(problem, args.rounds)
        if "quality" in parts and name in ("linear", "mlp"):
            time_to_quality(problem, plain_epochs=8 if name == "linear" else 4)
        if "sklearn" in parts and name == "linear":
            against_sklearn(problem, args.sklearn_labels)
    print(f"effective cores after: {effective_cores():.2f}")


if __name__ == "__main__":
    main()
