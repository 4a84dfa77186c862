"""The hub of weights: asked once whether it can be reached, and never waited for when it cannot."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_models import tiny_bert

from mmc.extract.backbones import hub, load_backbone
from mmc.extract.backbones.base import offline_hint
from mmc.store.errors import InputError


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_host_that_takes_connections_is_reachable(listening, closed):
    assert hub.reachable(f"http://127.0.0.1:{listening}/models")
    assert not hub.reachable(f"http://127.0.0.1:{closed}")


def test_the_proxy_is_asked_where_there_is_one(listening, closed, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listening}")
    assert hub.reachable("https://hub.invalid")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not hub.reachable(f"https://127.0.0.1:{closed}")
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{closed}")
    assert not hub.reachable("https://hub.invalid")


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch):
    ended = threading.Event()

    def look_up(*args: object, **kw: object) -> list[object]:
        ended.wait(60)
        return []  # to a thread that nobody waits for any more

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert not hub.reachable("https://hub.invalid", seconds=0.1)
    ended.set()


def test_offline_for_as_long_as_a_backbone_loads(closed, listening, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    with hub.quick_when_offline("someone/model"):
        assert constants.HF_HUB_OFFLINE
        assert offline_hint() == " (127.0.0.1 cannot be reached)"
    assert not constants.HF_HUB_OFFLINE
    assert offline_hint() == ""
    with hub.quick_when_offline("ViT-B-32//"):  # a folder that is there
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    with hub.quick_when_offline("someone/model"):
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "spec", ["hf:someone/nothing", "open_clip:ViT-B-32/laion2b_s34b_b79k", "timm:resnet18.a1_in1k"]
)
def test_weights_that_are_nowhere(spec, closed, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be fetched \(127.0.0.1 cannot be reached\)"):
        load_backbone(spec, device="cpu", precision="float32")


def test_weights_in_the_cache_load_without_the_hub(closed, tmp_path):
    repository = tmp_path / "cache/models--someone--bert"
    snapshot = repository / "snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    tiny_bert(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    code = """
from mmc.extract.backbones import load_backbone
backbone = load_backbone("hf:someone/bert", device="cpu", precision="float32")
print(sorted(backbone.fields))
"""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{closed}",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "'text'" in done.stdout, done.stderr
    assert "Retrying" not in done.stderr
