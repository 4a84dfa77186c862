"""A recipe's file, the folder where its relative paths start, and the one that it writes to."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmc.store.chain.document import override, parse
from mmc.store.chain.record import FILE
from mmc.store.chain.section import Section
from mmc.store.errors import InputError, MmcError, StoreLockedError
from mmc.store.files import LocalFiles
from mmc.store.locks import held


@dataclass(frozen=True)
class Recipe:
    """An open recipe."""

    name: str
    """Of its file."""
    top: Section
    """Its keys."""
    out: Path
    """Folder that it writes to."""
    kept: str
    """Its text as it is kept in a run."""

    def path(self, name: str) -> str:
        """A path below ``out``."""
        return str(self.out / name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other `mmc run` out of ``out``; leaves no folder where nothing was made.

        Raises:
            MmcError: another one is at work there.
        """
        made = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self.name}: cannot make the folder {self.out}: {reason}") from None
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(held(LocalFiles(self.out), ".lock"))
                except StoreLockedError as error:
                    raise MmcError(
                        f"another `mmc run` is at work on {self.name}: {error}"
                    ) from None
                yield
        finally:
            if made and not (self.out / FILE).exists():
                with contextlib.suppress(OSError):
                    (self.out / ".lock").unlink(missing_ok=True)
                    self.out.rmdir()


@contextlib.contextmanager
def open_recipe(path: str | os.PathLike[str], pairs: Sequence[str] = ()) -> Iterator[Recipe]:
    """Read a recipe. Inside, its folder is the working directory, where relative paths start.

    Args:
        path: of the YAML file.
        pairs: ``key.key=value`` to set on top of it.

    Raises:
        InputError: it cannot be read, is not YAML, or a pair cannot be set.
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"recipe {path}: {error.strerror or error}") from None
    root = override(parse(text, file.name), pairs)
    with contextlib.chdir(file.parent):
        top = Section(root, file.name)
        place = top.text("out") or file.stem
        if "://" in place:
            raise InputError(f"{file.name}: `out` is a folder of this machine, not {place}")
        out = Path(os.path.expanduser(place))
        yield Recipe(file.name, top, out, _as_run(text, file, pairs))


def _as_run(text: str, file: Path, pairs: Sequence[str]) -> str:
    """The recipe with what was set on top of it, as comments."""
    if not pairs:
        return text
    command = shlex.join(["mmc", "run", file.name, *(f"--set={pair}" for pair in pairs)])
    return "# as run: " + command.replace("\n", "\n# ") + f"\n{text}"
