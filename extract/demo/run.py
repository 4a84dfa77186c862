"""The demo as a user would live it: data, backbone, then the commands, their output and a table.

Imports no torch by itself: making the set and training the backbone are loaded when needed.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmc.store.errors import InputError, MmcError

Report = Callable[[str], None]

MARKER = "demo.json"
"""Says that a folder is a demo, with which seed, and which parts are made."""
RECIPE = 1
"""Raised when the same seed gives other pictures, captions or weights than before."""
RUNS = (
    ("image-alone", "image alone", "linear", "clip/image"),
    ("text-alone", "text alone", "linear", "clip/text"),
    ("both-linear", "both, linear", "linear", "clip/image,clip/text"),
    ("both-router", "both, router", "router", "clip/image,clip/text"),
)
"""Folder, name in the table, head and features of every training."""
_SHOWN_LINES = 6


def run_demo(directory: str | Path, *, report: Report = print, seed: int = 0) -> None:
    """Make a set and a backbone in ``directory``, run extract, train-head and predict on them.

    Called again on the same folder it keeps the set, the backbone and the embeddings that are
    there and trains the heads anew.

    Args:
        report: told everything, a line at a time.
        seed: of the set and the backbone.

    Raises:
        InputError: the folder holds something else, or a demo with another seed.
        MmcError: a command failed; its output was reported before.
    """
    directory = Path(directory)
    started = time.perf_counter()
    report = _warn_once(report)
    record = _claim(directory, seed)
    seconds: dict[str, float] = {}
    for what, make in (("data-set", _make_dataset), ("backbone", _make_backbone)):
        begun = time.perf_counter()
        if what in record["made"]:
            report(f"{directory / what} is there already")
        else:
            make(directory / what, seed, report)
            record["made"].append(what)
            _write_record(directory, record)
        seconds[what] = time.perf_counter() - begun

    store = str(directory / "demo.store")
    spec = f"open_clip:{directory / 'backbone'}"
    extract = ["extract", str(directory / "data-set"), store, "--backbone", spec, "--name", "clip"]
    seconds["extract"] = _mmc(extract, report)
    for folder, _, head, features in RUNS:
        command = ["train-head", store, str(directory / "runs" / folder), "--head", head]
        command += ["--features", features]
        # A finished run is refused without it; an unfinished one is continued.
        if (directory / "runs" / folder / "run.json").exists():
            command.append("--overwrite")
        seconds[folder] = _mmc(command, report)
    found = {folder: _metrics(directory / "runs" / folder) for folder, *_ in RUNS}
    best = max(("both-linear", "both-router"), key=lambda folder: found[folder]["val"]["mAP"])
    out = directory / "predictions.csv"
    predict = ["predict", str(directory / "runs" / best), store, "--split", "test"]
    seconds["predict"] = _mmc([*predict, "--out", str(out)], report)
    seconds["whole"] = time.perf_counter() - started
    _conclude(directory, found, seconds, best, report)


def _warn_once(report: Report) -> Report:
    """``report`` without the warnings that it was given already: every head gives those of the
    store.
    """
    warned: set[str] = set()

    def tell(line: str) -> None:
        is_warning = line.lstrip().startswith("warning: ")
        if line not in warned:
            report(line)
        if is_warning:
            warned.add(line)

    return tell


def _claim(directory: Path, seed: int) -> dict[str, Any]:
    """The record of the demo in ``directory``; a new one where there is nothing yet."""
    marker = directory / MARKER
    if marker.is_file():
        record: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        if (record["recipe"], record["seed"]) != (RECIPE, seed):
            raise InputError(
                f"{directory} holds a demo of recipe {record['recipe']} with seed "
                f"{record['seed']}, not {RECIPE} with {seed}; name a new folder or delete this one"
            )
        return record
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a folder for the demo")
    if directory.is_dir() and any(directory.iterdir()):
        first = min(path.name for path in directory.iterdir())
        raise InputError(f"{directory} holds other content ({first}); name a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    record = {"recipe": RECIPE, "seed": seed, "made": []}
    _write_record(directory, record)
    return record


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the marker whole or not at all."""
    partial = directory / f"{MARKER}.partial"
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(directory / MARKER)


def _make_dataset(directory: Path, seed: int, report: Report) -> None:
    from mmc.extract.demo.dataset import SIZES, make_dataset

    report(f"Making {sum(SIZES.values()):,} samples in {directory} from scikit-learn's scans of")
    report("handwritten digits. A picture shows one to three digits; its caption names one to")
    report("three others; the labels are all of them, so neither is enough alone.")
    make_dataset(directory, seed=seed)
    sample = (directory / "train.csv").read_text(encoding="utf-8").splitlines()[:4]
    for line in sample:
        report(f"  {line}")


def _make_backbone(directory: Path, seed: int, report: Report) -> None:
    from mmc.extract.demo.backbone import train_backbone

    report("")
    report(f"Training a small open_clip model in {directory}, on pictures of other scans with")
    report("captions that describe them (about a minute; with your own data, take a big")
    report("pretrained model instead: `mmc list backbones`).")
    train_backbone(directory, seed=seed, report=report)


def _mmc(arguments: Sequence[str], report: Report) -> float:
    """Run one command as a user would, report its output, and return the seconds it took."""
    line = shlex.join(("mmc", *arguments))
    report("")
    report(f"$ {line}")
    started = time.perf_counter()
    process = subprocess.Popen(
        (sys.executable, "-m", "mmc.cli", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
    )
    with process:
        assert process.stdout is not None
        for output in process.stdout:
            report(f"  {output.rstrip()}")
    if process.returncode:
        raise MmcError(f"`{line}` failed with exit code {process.returncode}; see its output above")
    return time.perf_counter() - started


def _metrics(run: Path) -> dict[str, dict[str, Any]]:
    """Split -> metrics of a finished run."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    metrics: dict[str, dict[str, Any]] = record["metrics"]
    return metrics


def _conclude(
    directory: Path,
    found: dict[str, dict[str, dict[str, Any]]],
    seconds: dict[str, float],
    best: str,
    report: Report,
) -> None:
    """The table, the first predictions and what to do next."""
    report("")
    report(f"{'on test':<16}{'mAP':>7}{'F1':>7}{'seconds':>9}")
    for folder, name, *_ in RUNS:
        test = found[folder]["test"]
        report(f"{name:<16}{test['mAP']:>7.3f}{test['micro_f1']:>7.3f}{seconds[folder]:>9.1f}")
    steps = ("data-set", "backbone", "extract", "predict", "whole")
    report(", ".join(f"{step} {seconds[step]:.0f} s" for step in steps))
    report("")
    out = directory / "predictions.csv"
    report(f"{out} begins:")
    for line in out.read_text(encoding="utf-8").splitlines()[:_SHOWN_LINES]:
        report(f"  {line}")
    report("")
    report("Next:")
    own = (
        "mmc extract your.csv my.store --backbone open_clip:ViT-B-32/laion2b_s34b_b79k --name clip"
    )
    for what, how in (
        ("the pictures", str(directory / "data-set" / "data")),
        ("label by label", str(directory / "runs" / best / "README.md")),
        ("what a store holds", f"mmc info {shlex.quote(str(directory / 'demo.store'))}"),
        ("your own data", own),
        ("", "mmc train-head my.store my.run --head router"),
        ("", "mmc predict my.run new.csv --out predictions.csv"),
    ):
        report(f"  {what:<20}{how}".rstrip())
