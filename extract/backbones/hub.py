"""Whether the hub of model weights can be reached, asked once and quickly.

The hub's client tries again for most of a minute before it gives up, for every file. Where its host
takes no connection at all, weights are looked for on this machine alone; a host that answers
slowly, or breaks off, is left to the client.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

FAMILIES = ("hf", "open_clip", "timm")
"""Backbone families whose weights may come from the hub."""
SECONDS = 4.0
"""For finding the host's address and connecting to it."""
_PORTS = {"http": 80, "https": 443}

UNREACHABLE: ContextVar[str] = ContextVar("UNREACHABLE", default="")
"""The hub's host while it is known not to answer."""


@contextmanager
def quick_when_offline(name: str) -> Iterator[None]:
    """While loading ``name``: do without the hub where its host cannot be reached.

    Args:
        name: what follows the family in a backbone spec; nothing is asked for one that is a path.
    """
    if constants.HF_HUB_OFFLINE or _is_local(name) or reachable(constants.ENDPOINT):
        yield
        return
    token = UNREACHABLE.set(_server(constants.ENDPOINT).hostname or constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        UNREACHABLE.reset(token)


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether the host of ``url``, or the proxy on the way, takes a connection."""
    found: list[bool] = []
    # In a thread: looking up a name has no timeout of its own.
    thread = threading.Thread(target=lambda: found.append(_connects(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found == [True]


def _connects(url: str, seconds: float) -> bool:
    server = _server(url)
    port = server.port or _PORTS.get(server.scheme, 443)
    try:
        addresses = socket.getaddrinfo(server.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    by_kind = {kind: address for kind, _, _, _, address in reversed(addresses)}
    for kind, address in by_kind.items():
        with socket.socket(kind, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds / len(by_kind))
            if connection.connect_ex(address) == 0:
                return True
    return False


def _server(url: str) -> SplitResult:
    """Where a request for ``url`` goes first: its proxy, else its host."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.hostname or ""):
        return parts
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _is_local(name: str) -> bool:
    """Whether a spec's name is a path: ``FOLDER``, or ``MODEL/CHECKPOINT``."""
    paths = (name, name.partition("/")[2])
    return any(path and Path(path).expanduser().exists() for path in paths)
