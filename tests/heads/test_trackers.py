"""TensorBoard and MLflow: what they hold is what the run's history holds."""

import csv
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mmc.heads import trackers
from mmc.heads.artifact import Run
from mmc.heads.options import TrainConfig
from mmc.heads.runfiles import read_history
from mmc.heads.trackers import flat
from mmc.heads.trainer import train
from mmc.store.errors import InputError, MmcError

SERIES = {"loss", "lr", "val_loss"}


@pytest.fixture(autouse=True)
def quiet_mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    # Undone after the test: the tracker sets it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def config(*names: str, head: str = "router", **changes) -> TrainConfig:
    values = {"epochs": 30, "batch_size": 8, "device": "cpu", "precision": "float32", **changes}
    return TrainConfig(head=head, track=names, **values)


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The series that history.csv holds, by the epochs of all stages together."""
    series: dict[str, list[tuple[int, float]]] = {}
    stage, before, step = "", 0, 0
    for row in read_history(folder / "history.csv"):
        if row["stage"] != stage:
            stage, before = row["stage"], step
        step = before + row["epoch"]
        for key in row:
            if key in SERIES or key.startswith("val_"):
                series.setdefault(key, []).append((step, row[key]))
    return series


def assert_same_series(found: dict[str, list[tuple[int, float]]], folder: Path) -> None:
    wanted = expected(folder)
    assert {key for key in found if not key.startswith("final/")} == wanted.keys() >= SERIES
    for key, points in wanted.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        assert [v for _, v in found[key]] == pytest.approx([v for _, v in points], rel=1e-6), key


# -- TensorBoard -----------------------------------------------------------------------------------


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str], list]:
    """Scalars, texts and files of the event files right in ``folder``."""
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = tensorboard.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
    texts = {
        t: events.Tensors(t)[0].tensor_proto.string_val[0].decode()
        for t in tags["tensors"]
        if t.endswith("/text_summary")
    }
    return scalars, texts, list(folder.glob("events.*"))


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_tensorboard_holds_the_history(make_store: Callable, tmp_path, task):
    said: list[str] = []
    train(make_store(task), tmp_path / "run", config("tensorboard"), report=said.append)
    scalars, texts, _ = read_events(tmp_path / "run" / "tensorboard")
    assert_same_series(scalars, tmp_path / "run")
    run = Run.load(tmp_path / "run")
    headline = {"multilabel": "mAP", "multiclass": "macro_f1"}[task]
    assert scalars[f"final/test/{headline}"][0][1] == pytest.approx(run.metrics["test"][headline])
    tables = {key for key in texts if key.startswith("confusion")}
    if task == "multilabel":
        assert not tables
    else:
        assert tables == {"confusion_val/text_summary", "confusion_test/text_summary"}
        rows = [f"|{n}|" for n in run.label_set]
        assert all(row in texts["confusion_test/text_summary"] for row in rows)
        counts = run.metrics["test"]["confusion"][0]
        assert f"|cat|{'|'.join(map(str, counts))}|" in texts["confusion_test/text_summary"]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()  # with folders it shows empty runs
    assert b"head.router_hidden" in events.read_bytes()
    assert any("tensorboard --logdir" in line for line in said)


class Stopped(Exception):
    pass


def test_a_continued_training_has_one_whole_log(make_store: Callable, tmp_path):
    store = make_store()
    often = config("tensorboard", settings=("optim.checkpoint_seconds=0",))
    seen = []

    def stop(*args):
        seen.append(args)
        if len(seen) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(store, tmp_path / "run", often, progress=stop)
    # Where it is logged is not what is trained.
    more = config("tensorboard", "mlflow", settings=("optim.checkpoint_seconds=0",))
    assert train(store, tmp_path / "run", more).resumed
    scalars, _, files = read_events(tmp_path / "run" / "tensorboard")
    assert_same_series(scalars, tmp_path / "run")
    assert len(files) == 1
    train(store, tmp_path / "run", config(overwrite=True))
    assert not (tmp_path / "run" / "tensorboard").exists()


# -- MLflow ----------------------------------------------------------------------------------------


def client_of(folder: Path):
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=folder.as_uri())


@pytest.mark.parametrize("place", ["beside the run", "MLFLOW_TRACKING_URI"])
def test_mlflow_holds_the_history(make_store: Callable, tmp_path, monkeypatch, place):
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path / "mlruns"
    if place != "beside the run":
        folder = tmp_path / "server"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
    train(make_store("binary"), tmp_path / "run", config("mlflow"))
    assert mlflow.active_run() is None
    assert mlflow.is_tracking_uri_set() == (place != "beside the run")
    client = client_of(folder)
    (experiment,) = client.search_experiments(filter_string="name = 'mmc'")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("run", "FINISHED")
    series = {
        key: [(m.step, m.value) for m in client.get_metric_history(logged.info.run_id, key)]
        for key in logged.data.metrics
    }
    assert_same_series(series, tmp_path / "run")
    run = Run.load(tmp_path / "run")
    assert series["final/test/auroc"][0][1] == pytest.approx(run.metrics["test"]["auroc"])
    assert logged.data.params["head.router_hidden"] == "64"
    assert logged.data.params["batch_size"] == "8"
    assert logged.data.params["seed"] == "0"
    path = client.download_artifacts(logged.info.run_id, "confusion_val.csv", str(tmp_path))
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true / predicted", "0", "1"]
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == run.metrics["val"]["confusion"]


def test_a_failed_training_is_a_failed_run_of_mlflow(make_store: Callable, tmp_path):
    def stop(*args):
        raise Stopped

    with pytest.raises(Stopped):
        train(make_store(), tmp_path / "run", config("mlflow"), progress=stop)
    client = client_of(tmp_path / "mlruns")
    (experiment,) = client.search_experiments(filter_string="name = 'mmc'")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FAILED"


# -- what can go wrong -----------------------------------------------------------------------------


def test_unknown_trackers_are_said():
    with pytest.raises(InputError, match="--track wandb: choose from tensorboard, mlflow"):
        config("wandb")


def test_a_missing_package_is_said_before_training(make_store: Callable, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "mlflow", (trackers.MLflow, "no_such_package"))
    with pytest.raises(InputError, match=r"--track mlflow .*pip install 'mmc\[tracking\]'"):
        train(make_store(), tmp_path / "run", config("mlflow"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_is_said(make_store: Callable, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "file" / "mlruns").as_uri())
    with pytest.raises(MmcError, match="--track mlflow: "):
        train(make_store(), tmp_path / "run", config("mlflow"))


def test_a_server_that_is_not_there_is_said_at_once(make_store: Callable, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        # Were it asked, MLflow would try for minutes.
        monkeypatch.setattr(trackers.MLflow, "__init__", lambda *_: pytest.fail("it was asked"))
        said: list[str] = []
        with pytest.raises(MmcError) as caught:
            train(make_store(), tmp_path / "run", config("mlflow"), report=said.append)
    assert str(caught.value).startswith(
        f"--track mlflow: no server answers at http://127.0.0.1:{port} (Connection refused); "
    )
    assert said[-1] == f"logging to MLflow at http://127.0.0.1:{port}"
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 401 No\r\n\r\n", b""])
def test_a_server_that_answers_anything_is_there(answer, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert trackers._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") == ""
        thread.join()


def test_a_tracker_that_fails_later_is_left(make_store: Callable, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(trackers.TensorBoard, "log", fail)
    said: list[str] = []
    train(make_store(), tmp_path / "run", config("tensorboard"), report=said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings == ["warning: no more logging to tensorboard: disk full"]
    assert Run.load(tmp_path / "run").metrics["test"]


def test_settings_become_parameters():
    nested = {
        "seed": 1,
        "settings": {"head": {"hidden": 4, "dropout": 0.1}},
        "track": (),
        "x": None,
    }
    assert flat(nested | {"features": ["a", "b"], "long": "x" * 900}) == {
        "seed": 1,
        "head.hidden": 4,
        "head.dropout": 0.1,
        "track": "",
        "x": "None",
        "features": "a, b",
        "long": "x" * 900,
    }
