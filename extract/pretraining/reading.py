"""A pretraining's config, from a YAML file, ``--set`` and flags. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc.extract.pretraining.options import GROUPS, PretrainConfig
from mmc.extract.sources import SourceOptions
from mmc.store.chain import Node, Section
from mmc.store.chain.document import override, parse
from mmc.store.errors import InputError

_NAME = "mmc pretrain"


def read_config(
    file: str | os.PathLike[str] | None,
    pairs: Sequence[str],
    flags: Mapping[str, Any],
    source: SourceOptions,
) -> PretrainConfig:
    """Flags win over ``--set``, and that over the file; what none of them says has its default.

    Args:
        file: YAML, with the settings of `PretrainConfig` and of its groups as keys.
        pairs: ``group.key=value``.
        flags: field -> value.
        source: how the sources are read.

    Raises:
        InputError: the file cannot be read, a key is unknown or a value is wrong; with its file and
            line.
    """
    root = Node({}, _NAME) if file is None else _read(file)
    root = override(root, pairs, example="vision.width=384")
    overwrite = bool(flags.get("overwrite", False))
    nodes = {key: Node(value, f"--{key.replace('_', '-')}") for key, value in flags.items()}
    nodes.pop("overwrite", None)
    if not isinstance(root.value, dict):
        raise InputError(f"{root.where}: keys and values are expected, such as `epochs: 30`")
    top = Section(Node({**root.value, **nodes}, root.where), _NAME)
    groups: dict[str, Any] = {}
    for name, kind in GROUPS.items():
        node = top.node(name)
        section = Section(Node({}, root.where) if node is None else node, name)
        groups[name], _ = section.config(kind)
        section.finish()
    config, _ = top.config(
        PretrainConfig,
        omit=("overwrite", "source", *groups),
        **groups,
        source=source,
        overwrite=overwrite,
    )
    top.finish()
    return config


def _read(file: str | os.PathLike[str]) -> Node:
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    return parse(text, path.name)
