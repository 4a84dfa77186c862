"""What a run is now, for whoever must see whether it has changed; and which of several is the best.

Imports no torch until the best is asked for.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mmc.store.errors import InputError

UNSTEADY = ("created", "versions", "training", "search", "recipe_sha256")
"""Keys of run.json that nothing after the run depends on."""


def run_state(folder: str) -> str | None:
    """State of a run: another one where its weights, thresholds or metrics are; None: not whole."""
    try:
        record = json.loads((Path(folder) / "run.json").read_bytes())
        size = (Path(folder) / "head.safetensors").stat().st_size
    except (OSError, ValueError):
        return None
    kept = {key: value for key, value in record.items() if key not in UNSTEADY}
    text = json.dumps([kept, size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def best(runs: Mapping[str, str]) -> str:
    """Folder of the run with the best validation metric: the first of equals.

    Args:
        runs: name -> folder.

    Raises:
        InputError: a run is not there, or none was validated.
    """
    from mmc.heads.metrics import HEADLINE
    from mmc.heads.runfiles import read_record

    found = {}
    for name, folder in runs.items():
        record = read_record(Path(folder))
        value = record["metrics"].get("val", {}).get(HEADLINE[record["task"]])
        if value is not None:
            found[name] = value
    if not found:
        raise InputError("no run was validated, so none is the best; name one")
    return runs[max(found, key=lambda name: found[name])]
