"""What a recipe has made of what: a small JSON file beside its outputs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmc.store.errors import InputError
from mmc.store.files import LocalFiles

FILE = ".mmc-recipe.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Made:
    """One step as it ran last."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    owns: str | None
    output: str | None = None
    """State of what it made; None: it was started, and did not end."""
    seconds: float | None = None


class Record:
    """The record in a folder; each change is on the disk when the call returns."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self._files, self._recipe = LocalFiles(folder), recipe
        self._steps = self._read()

    def _read(self) -> dict[str, Made]:
        data = self._files.read(FILE)
        if data is None:
            return {}
        where = self._files.where(FILE)
        try:
            found = json.loads(data)
            recipe, number = found["recipe"], int(found["format"])
            steps = {name: Made(**made) for name, made in found["steps"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(
                f"{where} is damaged; remove it and what this recipe made beside it, or give the "
                "recipe another `out`"
            ) from None
        if number > FORMAT:
            raise InputError(f"{where} was written by a newer mmc: upgrade")
        if recipe != self._recipe:
            raise InputError(
                f"{self._files.url} holds what {recipe} made; give {self._recipe} an `out` of its "
                "own"
            )
        return steps

    def of(self, name: str) -> Made | None:
        """The step of that name as it ran last; None: it never did."""
        return self._steps.get(name)

    def owns(self, place: str) -> bool:
        """Whether a step of this recipe has made this file or folder."""
        return any(made.owns == place for made in self._steps.values())

    def start(self, name: str, made: Made) -> None:
        """A step begins."""
        self._steps[name] = made
        self._write()

    def end(self, name: str, output: str | None, seconds: float) -> None:
        """It is finished."""
        self._steps[name] = replace(self._steps[name], output=output, seconds=round(seconds, 3))
        self._write()

    def _write(self) -> None:
        steps = {name: asdict(made) for name, made in self._steps.items()}
        record = {"format": FORMAT, "recipe": self._recipe, "steps": steps}
        text = json.dumps(record, ensure_ascii=False, indent=1)
        self._files.write(FILE, [text.encode(), b"\n"])
