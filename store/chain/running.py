"""Which steps of a recipe run, and running them in order.

A step runs where it never did, where its settings or the state of an input are not what they were,
where what it made is not there as it left it, or where the user says so. States are compared, not
times: a step that ran and made the same as before changes nothing for those after it.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmc.store.chain.recipe import Recipe
from mmc.store.chain.record import Made, Record
from mmc.store.chain.step import Progress, Say, Start, Step
from mmc.store.config import nearest
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one step."""

    step: str
    kind: str
    state: str
    """unchanged, ran, would run, or waits: whether it will run depends on steps before it."""
    reason: str
    """Why it runs."""
    seconds: float = 0.0
    result: Any = None
    """What it gave, JSON-able."""


def run_steps(
    recipe: Recipe,
    steps: Sequence[Step],
    *,
    force: Collection[str] = (),
    dry_run: bool = False,
    report: Say,
    show: Say,
    progress: Progress = lambda stage, done, total: None,
) -> list[Outcome]:
    """Run the steps that have something to do, one after another.

    Args:
        recipe: what they are of.
        steps: in order; each reads only what those before it make.
        force: names or kinds of steps to run though nothing has changed.
        dry_run: only say what would run.
        report: called with each line of news.
        show: called with what a step gives for people to read.
        progress: called with (stage, done, total).

    Raises:
        InputError: ``force`` names no step, or a step found fault with what it was given.
        MmcError: a step failed, or another process runs the recipe; what was finished is kept.
    """
    _check_force(steps, force)
    if dry_run:
        return _dry(Record(recipe.out, recipe.name), steps, force, report)
    with recipe.locked():
        record = Record(recipe.out, recipe.name)
        for step in steps:
            _check_ours(step, record)
        return [_run(step, record, force, report, show, progress) for step in steps]


def _check_force(steps: Sequence[Step], force: Collection[str]) -> None:
    known = list(dict.fromkeys(name for step in steps for name in (step.name, step.kind)))
    for name in force:
        if name not in known:
            raise InputError(f"--force {name}: there is no such step; {nearest(name, known)}")


def _check_ours(step: Step, record: Record) -> None:
    """Raises InputError where a step would write over what this recipe has not made."""
    if step.owns is None or record.owns(step.owns):
        return
    empty = os.path.isdir(step.owns) and not os.listdir(step.owns)
    if os.path.exists(step.owns) and not empty:
        raise InputError(
            f"{step.owns} is there, and this recipe has not made it: move it away, or give "
            f"{step.name} another place"
        )


def _run(
    step: Step,
    record: Record,
    force: Collection[str],
    report: Say,
    show: Say,
    progress: Progress,
) -> Outcome:
    inputs = {name: state() for name, state in step.inputs.items()}
    before, there = record.of(step.name), step.made()
    forced = step.name in force or step.kind in force
    reason = "forced" if forced else _reason(step, inputs, before, there)
    if reason is None:
        report(f"{step.name}: unchanged")
        return Outcome(step=step.name, kind=step.kind, state="unchanged", reason="")
    report(f"{step.name}: {reason}")
    asked = Made(settings=step.settings, inputs=inputs, owns=step.owns)
    same = before is not None and not _changes(step.settings, inputs, before)
    started = time.perf_counter()
    # What was started with the same goes on; whatever else is there makes way.
    unfinished = before is None or (same and before.output is None)
    goes_on = unfinished and there is None
    replace = forced or not goes_on
    record.start(step.name, asked)
    result = step.run(Start(replace=replace, forced=forced, report=report, progress=progress))
    seconds = time.perf_counter() - started
    record.end(step.name, step.made(), seconds)
    if result.text:
        show(result.text)
    return Outcome(
        step=step.name,
        kind=step.kind,
        state="ran",
        reason=reason,
        seconds=round(seconds, 3),
        result=result.data,
    )


def _dry(
    record: Record, steps: Sequence[Step], force: Collection[str], report: Say
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    moving: set[str] = set()
    for step in steps:
        _check_ours(step, record)
        inputs = {name: state() for name, state in step.inputs.items()}
        forced = step.name in force or step.kind in force
        reason = "forced" if forced else _reason(step, inputs, record.of(step.name), step.made())
        waits = [name for name in step.after if name in moving]
        state = "would run" if reason else "waits" if waits else "unchanged"
        if state != "unchanged":
            moving.add(step.name)
        if state == "waits":
            reason = f"if {' or '.join(waits)} makes something else than before"
        said = {"would run": f"would run: {reason}", "waits": f"would run {reason}"}
        report(f"{step.name}: {said.get(state, state)}")
        outcomes.append(Outcome(step=step.name, kind=step.kind, state=state, reason=reason or ""))
    return outcomes


def _reason(
    step: Step, inputs: Mapping[str, str], before: Made | None, there: str | None
) -> str | None:
    """Why a step runs; None where it need not."""
    if before is None:
        return "new"
    changes = _changes(step.settings, inputs, before)
    if changes:
        return f"changed ({', '.join(changes)})"
    if before.output is None:
        return "going on where it stopped"
    if there is None:
        return "what it made is gone"
    return None if there == before.output else "what it made was changed"


def _changes(settings: Mapping[str, Any], inputs: Mapping[str, str], before: Made) -> list[str]:
    """What differs from the last time, in words."""
    lines = _differences(before.settings, settings)
    names = dict.fromkeys([*before.inputs, *inputs])
    return lines + [name for name in names if before.inputs.get(name) != inputs.get(name)]


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """``key before -> now`` of each setting that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in _differences(
                before.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if before == now else [f"{name} {_shown(before)} -> {_shown(now)}"]


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
