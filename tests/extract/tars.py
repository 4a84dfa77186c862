"""Tars for tests, made member by member."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    """A picture of its own colours, width and height as given."""
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str | dict | list | int]) -> Path:
    """Write a tar; objects become JSON, numbers their digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes | str | dict | list | int) -> None:
    """Append one member."""
    if isinstance(content, dict | list):
        content = json.dumps(content)
    data = content if isinstance(content, bytes) else str(content).encode()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def sample(key: str, seed: int, **metadata: object) -> dict[str, bytes | str | dict]:
    """Picture, caption and metadata under one key."""
    return {f"{key}.jpg": jpeg(seed), f"{key}.txt": f"caption {key}", f"{key}.json": metadata}
