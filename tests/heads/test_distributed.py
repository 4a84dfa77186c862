"""Several processes, started by torchrun, train as one does with the joined batch."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmc.heads import batches, distributed, memory
from mmc.heads.artifact import Run
from mmc.heads.launch import is_main, launched, launched_here
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store.errors import InputError

PLAIN = {"epochs": 20, "precision": "float32", "device": "cpu", "batch_size": 7}
OFTEN = ("optim.checkpoint_seconds=0",)
CASES = {
    # Batches of 7 are not divisible by two, and 27 rows not by 7.
    "linear": {"head": "linear"},
    "accumulated": {"head": "linear", "batch_size": 3, "settings": ("optim.accumulation=3",)},
    "router": {
        "head": "router",
        "settings": ("head.dropout=0", "optim.ema=0.9", "optim.schedule=plateau"),
    },
    "boost": {"head": "boost", "settings": ("head.kind=linear", "head.rounds=2")},
    "sum": {"head": "linear", "settings": ("loss.reduction=sum",)},
    # A batch of one row is in one process only.
    "single": {"head": "linear", "batch_size": 1, "epochs": 3},
    "stopped": {"head": "linear", "settings": OFTEN},
}
STREAMED = {"head": "linear", "max_memory": "1T"}


def small_windows(needs: memory.Needs, budget: int, plan=memory.plan) -> memory.Plan:
    """Windows of a batch each for the case that is to be streamed; there is room for everything."""
    found = plan(needs, budget)
    return replace(found, window_rows=needs.batch_size) if budget == 1 << 40 else found


CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
from mmc.heads import batches, engine, memory, trainer
from mmc.heads.launch import is_main
from mmc.heads.options import TrainConfig
from mmc.store import EmbeddingStore

class Stopped(Exception):
    pass

SMALL_WINDOWS
memory.plan = small_windows
batches.MIN_BLOCK_ROWS = 3
store, out = EmbeddingStore.open(sys.argv[1]), Path(sys.argv[2])
said = []
for name, config in json.loads(sys.argv[3]).items():
    config["settings"] = tuple(config.get("settings", ()))
    config = TrainConfig(**config)
    if name == "stopped":
        save, rounds = engine.Engine._checkpoint, []
        def stop(self, *args):
            save(self, *args)
            rounds.append(self)
            if len(rounds) == 2:
                raise Stopped
        engine.Engine._checkpoint = stop
        try:
            trainer.train(store, out / name, config)
        except Stopped:
            engine.Engine._checkpoint = save
    report = trainer.train(store, out / name, config, report=said.append)
    assert report.resumed == (name == "stopped")
    assert bool(report.metrics) == is_main()
    state = {key: value.tolist() for key, value in report.run.state.items()}
    (out / f"{name}.{'main' if is_main() else 'other'}.json").write_text(json.dumps(state))
assert bool(said) == is_main()

from mmc import cli
sys.argv = ["mmc", "train-head", sys.argv[1], str(out / "printed"), *sys.argv[4:]]
cli.main()
""".replace("SMALL_WINDOWS", inspect.getsource(small_windows))
CLI = ("--head", "mlp", "--epochs", "2", "--device", "cpu", "--json")


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        env={**plain, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_give_the_weights_of_one(make_store: Callable, tmp_path, monkeypatch):
    """In float32 and without dropout, to 1e-5: sums of two parts round unlike one sum.

    Only the main process prints and writes.
    """
    monkeypatch.setattr(batches, "MIN_BLOCK_ROWS", 3)
    monkeypatch.setattr(memory, "plan", small_windows)
    store = make_store()
    cases = {name: {**PLAIN, **case} for name, case in CASES.items()}
    cases["streamed"] = {**PLAIN, **STREAMED}
    sent = json.dumps(cases)
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    (tmp_path / "two").mkdir()
    ended = torchrun(str(child), store.path, str(tmp_path / "two"), sent, *CLI)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"]["test"]
    assert ended.stderr.count("the run is in") == 1
    assert Run.load(tmp_path / "two" / "printed").train_config["processes"] == 2
    for name, case in cases.items():
        said: list[str] = []
        one = train(store, tmp_path / name, TrainConfig(**case), report=said.append).run
        two = Run.load(tmp_path / "two" / name)
        if name == "streamed":
            assert any("7 rows shuffled at a time" in line for line in said)
        for key, value in one.state.items():
            torch.testing.assert_close(two.state[key], value, rtol=1e-5, atol=1e-5, msg=name)
        for a, b in zip(one.history, two.history, strict=True):
            places = [(row["stage"], row["epoch"], str(row["best"])) for row in (a, b)]
            assert places[0] == places[1], name
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), name
        main, other = (
            json.loads((tmp_path / "two" / f"{name}.{who}.json").read_text())
            for who in ("main", "other")
        )
        assert main == other, name


# -- without torchrun ------------------------------------------------------------------------------


def test_one_process_is_the_main_one(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched(), launched_here(), is_main()) == (1, 1, True)
    assert distributed.join(torch.device("cpu")) == distributed.Processes()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "gpus", "says"),
    [("cuda:1", 4, "choose auto or cpu or cuda"), ("cuda", 0, "auto or cpu$"), ("auto", 1, "GPUs")],
)
def test_each_process_takes_its_own_device(monkeypatch, name, gpus, says):
    for key in ("LOCAL_RANK", "RANK"):
        monkeypatch.setenv(key, "0")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launched() == launched_here() == 2
    with pytest.raises(InputError, match=says):
        distributed.own_device(name)
    assert distributed.own_device("cpu") == torch.device("cpu")
