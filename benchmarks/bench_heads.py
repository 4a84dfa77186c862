"""Head training on a CPU or GPU, as ratios measured in one run.

    python benchmarks/bench_heads.py            # about two minutes on two cores
    python benchmarks/bench_heads.py --rows 50000 --heads linear

For each head, on synthetic features (two fields of 512, 80 labels):

- samples/s of mmc's engine (its defaults, resident batches) and of a plain PyTorch loop (DataLoader
  over a TensorDataset, batch 256, no workers, float32, AdamW at 1e-3), interleaved;
- the floor: the step's matrix products alone, in the precision and batch size that mmc uses;
- training time until the validation mAP reaches 0.98 of, and all of, the plain loop's best.

Two-thread figures are only worth reading when the effective-core probe is near the number of cores.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mmc.heads import metrics
from mmc.heads.batches import ResidentData
from mmc.heads.devices import pick_device, training_dtype
from mmc.heads.engine import Engine, score_all
from mmc.heads.losses.bce import BCE
from mmc.heads.models import HEADS
from mmc.heads.models.base import Head
from mmc.heads.models.dropout import Dropout
from mmc.heads.options import OptimConfig
from mmc.heads.training import default_batch, default_lr
from mmc.store.registry import load, lookup

FIELDS, WIDTH, LABELS, LATENT = 2, 512, 80, 64
PLAIN_BATCH, PLAIN_LR = 256, 1e-3
ROUNDS = 3


def make_data(rows: int, val_rows: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Two noisy views (n, 512) of a common cause, and labels (n, 80) that depend on it.

    Half of a label's evidence is linear in the cause and half is a product of two of its parts;
    20 % to 0.5 % of the rows have it.
    """
    g = torch.Generator().manual_seed(seed)
    n = rows + val_rows
    cause = torch.randn(n, LATENT, generator=g)
    evidence = cause @ torch.randn(LATENT, LABELS, generator=g) / LATENT**0.5
    first, second = (torch.randint(LATENT, (LABELS,), generator=g) for _ in range(2))
    evidence += 0.7 * cause[:, first] * cause[:, second]
    evidence += 0.5 * torch.randn(n, LABELS, generator=g)
    share = torch.logspace(-0.7, -2.3, LABELS)
    cuts = torch.stack(
        [evidence[:, i].kthvalue(int(n * (1 - float(share[i])))).values for i in range(LABELS)]
    )
    views = {}
    for name in ("image", "text"):
        mix = torch.randn(LATENT, WIDTH, generator=g) / LATENT**0.5
        seen = (torch.rand(LATENT, 1, generator=g) < 0.75).float()
        common = torch.randn(WIDTH, generator=g)
        views[name] = cause @ (mix * seen) + 0.7 * torch.randn(n, WIDTH, generator=g) + common
    return views, (evidence > cuts).to(torch.int8)


class Problem:
    """One head on the data: what both contenders start from."""

    def __init__(self, name: str, rows: int, val_rows: int, device: torch.device) -> None:
        views, targets = make_data(rows, val_rows)
        self.name, self.device = name, device
        self.dtype = training_dtype("auto", device)
        self.batch = default_batch(rows, device)
        cls: type[Head] = load(lookup(HEADS, name, kind="head", group="mmc.heads"))
        self.make = lambda: cls(dict.fromkeys(views, (WIDTH,)), LABELS, cls.Config()).to(device)
        scale = self.make()
        self.lr = default_lr(scale.learning_rate, self.batch, rows)
        train = {key: values[:rows].to(device) for key, values in views.items()}
        scale.fit_inputs([train])
        self.state = scale.state_dict()
        self.targets = targets.to(device)
        with torch.no_grad():
            self.inputs = scale.prepare({key: values.to(device) for key, values in views.items()})
        self.rows = rows
        self.resident = {key: values[:rows].to(self.dtype) for key, values in self.inputs.items()}
        self.val = ResidentData(
            inputs={key: values[rows:] for key, values in self.inputs.items()},
            targets=self.targets[rows:],
        )
        counts = self.targets[:rows].sum(0).double()
        self.loss = BCE(BCE.Config(), counts, torch.full_like(counts, rows)).to(device)

    def head(self) -> Head:
        """A fresh head that knows the scale of its inputs."""
        torch.manual_seed(0)
        head: Head = self.make()
        scale = {key: value for key, value in self.state.items() if key.startswith("normalize")}
        head.load_state_dict(scale, strict=False)
        return head

    def engine(self, epochs: int | None, *, validate: bool) -> Engine:
        """mmc's engine with its defaults."""
        head = self.head()
        head.set_prior(self.loss.prior())
        val = (
            self.val
            if validate
            else ResidentData(
                inputs={key: values[:64] for key, values in self.val.inputs.items()},
                targets=self.val.targets[:64],
            )
        )
        return Engine(
            head,
            self.loss,
            train=ResidentData(inputs=self.resident, targets=self.targets[: self.rows]),
            val=val,
            task="multilabel",
            batch_size=self.batch,
            epochs=epochs,
            lr=self.lr,
            optim=OptimConfig(),
            seed=0,
            dtype=self.dtype,
        )

    def plain(self, rows: int, epochs: int) -> Iterator[tuple[float, Head]]:
        """The plain loop; seconds of training so far and the head, after every epoch."""
        head = _with_torch_dropout(self.head()).train()
        keys = list(self.inputs)
        parts = [self.inputs[key][:rows].cpu() for key in keys]
        data = TensorDataset(*parts, self.targets[:rows].cpu().float())
        loader = DataLoader(data, PLAIN_BATCH, shuffle=True)
        optimizer = torch.optim.AdamW(head.parameters(), lr=PLAIN_LR)
        seconds = 0.0
        for _ in range(epochs):
            started = time.perf_counter()
            for *values, targets in loader:
                batch = {k: v.to(self.device) for k, v in zip(keys, values, strict=True)}
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    head.score(batch), targets.to(self.device)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.wait()
            seconds += time.perf_counter() - started
            yield seconds, head

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mean_ap(self, head: Head) -> float:
        """Validation mAP."""
        head.eval()
        with torch.no_grad():
            logits = score_all(head.score, self.val.blocks())
        head.train()
        return metrics.score(logits, self.val.targets, "multilabel")

    def floor(self) -> Callable[[], None]:
        """One step's matrix products alone: every linear layer forward, and its gradients."""
        head = self.head()
        layers = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
        first = (
            {id(layers[0])}
            if self.name in ("linear", "mlp")
            else {id(m) for m in layers if m.in_features in (WIDTH, FIELDS * WIDTH)}
        )
        products = []
        for layer in layers:
            shape = (self.batch, layer.in_features)
            x = torch.randn(shape, device=self.device).to(self.dtype)
            w = layer.weight.detach().to(self.dtype)
            g = torch.randn(self.batch, layer.out_features, device=self.device).to(self.dtype)
            products.append((x, w, g, id(layer) not in first))

        def step() -> None:
            for x, w, g, needs_input_gradient in products:
                torch.nn.functional.linear(x, w)
                g.t() @ x
                if needs_input_gradient:
                    g @ w

        return step


def _with_torch_dropout(head: Head) -> Head:
    """The head as a plain loop would have it: mmc's own dropout is part of what is compared."""
    for module in head.modules():
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, torch.nn.Dropout(child.share))
    return head


def rate_of_floor(problem: Problem) -> float:
    step = problem.floor()
    steps = problem.rows // problem.batch
    for _ in range(5):
        step()
    problem.wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    problem.wait()
    return steps * problem.batch / (time.perf_counter() - started)


def rate_of_mmc(problem: Problem) -> float:
    position = problem.engine(2, validate=False).run()
    return position.train_rows / position.train_seconds


def rate_of_plain(problem: Problem) -> float:
    rows = min(problem.rows, 50_000)
    seconds, _ = next(problem.plain(rows, 1))
    return rows / seconds


def speed(problem: Problem) -> None:
    """Interleaved rounds; ratios within a round, so that drift cancels."""
    contenders = {"floor": rate_of_floor, "mmc": rate_of_mmc, "plain": rate_of_plain}
    for contender in contenders.values():
        contender(problem)
    rounds = [{k: f(problem) for k, f in contenders.items()} for _ in range(ROUNDS)]
    median = {k: statistics.median(r[k] for r in rounds) for k in contenders}
    print(
        f"{problem.name:8} batch {problem.batch}, {str(problem.dtype).removeprefix('torch.')}: "
        + ", ".join(f"{k} {v:,.0f}/s" for k, v in median.items())
    )
    for label, top, bottom in (
        ("mmc / plain loop", "mmc", "plain"),
        ("mmc / floor", "mmc", "floor"),
    ):
        ratios = sorted(r[top] / r[bottom] for r in rounds)
        middle = statistics.median(ratios)
        print(f"{'':8} {label:18} {middle:6.2f}  [{ratios[0]:.2f}-{ratios[-1]:.2f}]")


def time_to_quality(problem: Problem, plain_epochs: int) -> None:
    """Seconds of training until the validation mAP of the plain loop's best epoch."""
    curve = [(s, problem.mean_ap(h)) for s, h in problem.plain(problem.rows, plain_epochs)]
    best = max(value for _, value in curve)
    history = problem.engine(None, validate=True).run().history
    ours = [(row["seconds"], row["val_mAP"]) for row in history]
    print(
        f"{problem.name:8} best val mAP: plain loop {best:.4f} in {plain_epochs} epochs, "
        f"mmc {max(v for _, v in ours):.4f} in {len(ours)}"
    )
    for share in (0.98, 1.0):
        plain, mmc = (_first(points, share * best) for points in (curve, ours))
        ratio = f"{plain / mmc:.1f} x" if plain and mmc else "not reached"
        shown = ", ".join(f"{x:.2f} s" if x else "never" for x in (plain, mmc))
        print(f"{'':8} to {share:.2f} of the plain loop's best (plain, mmc): {shown}: {ratio}")


def _first(points: list[tuple[float, float]], target: float) -> float | None:
    return next((seconds for seconds, value in points if value >= target), None)


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
    parser.add_argument("--heads", default="linear,mlp")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip-quality", action="store_true", help="speed only")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"effective cores before: {effective_cores():.2f}")
    for name in args.heads.split(","):
        problem = Problem(name, args.rows, args.val_rows, device)
        speed(problem)
        if not args.skip_quality:
            time_to_quality(problem, plain_epochs=8 if name == "linear" else 4)
    print(f"effective cores after: {effective_cores():.2f}")


if __name__ == "__main__":
    main()
