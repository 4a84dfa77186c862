"""The steps of a recipe from a source to a store. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmc.extract.backbones import parse_spec
from mmc.extract.captions_options import CaptionConfig
from mmc.extract.options import OWN, ExtractConfig
from mmc.extract.prepare_options import PrepareConfig
from mmc.extract.sources import SourceOptions
from mmc.extract.sources.prepared import RECIPE as PREPARED
from mmc.extract.sources.read import check_source
from mmc.extract.sources.state import source_state
from mmc.extract.tuning.options import RECORD as TUNED
from mmc.extract.tuning.options import LoraConfig, OptimConfig, TuneConfig
from mmc.store.chain import (
    ABSENT,
    Node,
    Recipe,
    Result,
    Section,
    Start,
    Step,
    given,
    located,
    path_state,
    store_state,
    text_of,
)
from mmc.store.config import settable
from mmc.store.errors import FingerprintMismatchError, InputError, NotAStoreError
from mmc.store.schema import check_name

NOT_KEYS = ("need_images", "need_merged_labels")
"""Source options that only mmc itself sets."""


@dataclass(frozen=True)
class Source:
    """Where a step's samples come from."""

    spec: str
    options: SourceOptions = field(default_factory=SourceOptions)
    settings: dict[str, Any] = field(default_factory=dict)
    """What was said of it, JSON-able."""
    after: tuple[str, ...] = ()
    """The step that writes it."""
    read_after: tuple[str, ...] = ()
    """Steps that only what reads it has to wait for."""

    def state(self) -> str:
        """As `source_state`; of what is yet to be written, that it is not there."""
        if self.after:
            try:
                check_source(self.spec)
            except InputError:
                return ABSENT
        if _is_store(self.spec):
            return store_state(self.spec, None)
        return source_state(self.spec, self.options)


@dataclass(frozen=True)
class Data:
    """What the steps of a recipe have to do with data."""

    steps: list[Step]
    store: str
    fields: dict[str, tuple[str, ...] | None] | None
    """Backbone that is extracted -> the fields that are asked for, None: its pooled ones. None: the
    recipe extracts nothing."""


def data_steps(recipe: Recipe) -> Data:
    """The steps prepare, caption, tune and extract of a recipe, checked.

    Raises:
        InputError: a key, a value, a name or a source is wrong; with file and line.
    """
    top = recipe.top
    node, nodes = top.node("source"), {key: top.node(key, bare=True) for key in _MAKERS}
    store = top.text("store") or recipe.path("store")
    asked = [key for key in _MAKERS if nodes[key] is not None]
    if node is None:
        for key in asked:
            raise InputError(f"{nodes[key].where}: {key} needs a `source` to read")  # type: ignore[union-attr]
        return Data([], store, None)
    if not asked:
        raise InputError(
            f"{node.where}: nothing reads the source; add `extract` or `prepare`, "
            "or leave `source` out"
        )
    source = read_place(node, "source")
    with located(node.where, "source"):
        check_source(source.spec)
    steps = []
    for key in asked:
        section = Section(nodes[key], key)  # type: ignore[arg-type]
        step, source = _MAKERS[key](recipe, section, source, store)
        section.finish()
        steps.append(step)
    return Data(steps, store, _fields(steps[-1].settings) if "extract" in asked else None)


def _fields(settings: Mapping[str, Any]) -> dict[str, tuple[str, ...] | None]:
    """Alias -> the fields that the settings of an extraction ask for."""
    shared = settings.get("fields")
    asked = {alias: one.get("fields", shared) for alias, one in settings["backbones"].items()}
    return {alias: None if names is None else tuple(names) for alias, names in asked.items()}


def read_place(node: Node, name: str, *, omit: tuple[str, ...] = ()) -> Source:
    """A source as a recipe gives it: its path, or a mapping of `path` and source options.

    The path may be a mapping itself, from split to path.

    Args:
        node: as it stands in the recipe.
        name: of its key, for messages.
        omit: options that do not apply.
    """
    if not isinstance(node.value, dict):
        return Source(text_of(node, name))
    section = Section(node, name)
    path = section.node("path")
    options, values = section.config(SourceOptions, omit=(*NOT_KEYS, *omit))
    section.finish()
    if path is None:
        raise InputError(f"{node.where}: {name} has no `path`")
    if isinstance(path.value, dict):
        parts = [(split, text_of(one, f"{name}.path.{split}")) for split, one in path.value.items()]
        spec = ",".join(f"{split}={part}" for split, part in parts)
    else:
        spec = text_of(path, f"{name}.path")
    return Source(spec, options, given(SourceOptions, values))


def read_input(node: Node, name: str) -> Source:
    """What to predict on: a store, or a source as `read_place` takes it.

    Raises:
        InputError: it is not there.
    """
    source = read_place(node, name, omit=("dedupe",))
    if not _is_store(source.spec):
        with located(node.where, name):
            check_source(source.spec)
    return source


def _is_store(path: str) -> bool:
    from mmc.store import EmbeddingStore

    try:
        EmbeddingStore.open(path)
    except NotAStoreError:
        return False
    return True


def _prepare(recipe: Recipe, section: Section, source: Source, store: str) -> tuple[Step, Source]:
    out = section.text("out") or recipe.path("prepared")
    config, values = section.config(PrepareConfig, omit=("overwrite",), source=source.options)

    def made() -> str | None:
        return path_state(out) if (Path(out) / PREPARED).exists() else None

    def run(start: Start) -> Result:
        from mmc.extract.prepare import prepare

        anew = replace(config, overwrite=start.replace)
        done = prepare(source.spec, out, anew, report=start.report, progress=start.progress)
        return Result(data=asdict(done))

    step = Step(
        name="prepare",
        kind="prepare",
        settings=_read(source) | given(PrepareConfig, values),
        inputs={"the source": source.state},
        run=run,
        made=made,
        owns=out,
    )
    return step, Source(out, after=("prepare",))


def _caption(recipe: Recipe, section: Section, source: Source, store: str) -> tuple[Step, Source]:
    out = section.text("out") or recipe.path("captioned.parquet")
    backbone = section.node("backbone")
    if backbone is None:
        raise InputError(f"{section.where}: caption names no `backbone`")
    spec = text_of(backbone, "caption.backbone")
    with located(backbone.where, "caption.backbone"):
        parse_spec(spec)
    config, values = section.config(
        CaptionConfig, omit=("overwrite",), backbone=spec, source=source.options
    )

    def made() -> str | None:
        return path_state(out) if Path(out).exists() else None

    def run(start: Start) -> Result:
        from mmc.extract.captions import caption

        anew = replace(config, overwrite=start.replace)
        done = caption(source.spec, out, anew, report=start.report, progress=start.progress)
        return Result(data=asdict(done))

    step = Step(
        name="caption",
        kind="caption",
        settings=_read(source) | {"backbone": spec} | given(CaptionConfig, values),
        inputs={"the source": source.state, "the model": lambda: _weights_state(spec)},
        run=run,
        made=made,
        after=source.after,
        owns=out,
    )
    return step, Source(out, after=("caption",))


def _tune(recipe: Recipe, section: Section, source: Source, store: str) -> tuple[Step, Source]:
    out = section.text("out") or recipe.path("tuned")
    backbone = section.node("backbone")
    if backbone is None:
        raise InputError(f"{section.where}: tune names no `backbone`")
    spec = text_of(backbone, "tune.backbone")
    groups: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for name, kind in (("lora", LoraConfig), ("optim", OptimConfig)):
        node = section.node(name)
        inner = Section(node or Node({}, section.where), f"tune.{name}")
        groups[name], values = inner.config(kind)
        inner.finish()
        said |= {name: given(kind, values)} if values else {}
    config, values = section.config(
        TuneConfig, omit=("overwrite",), backbone=spec, source=source.options, **groups
    )

    def made() -> str | None:
        return path_state(out) if (Path(out) / TUNED).exists() else None

    def run(start: Start) -> Result:
        from mmc.extract.tuning.tune import tune

        anew = replace(config, overwrite=start.replace)
        done = tune(source.spec, out, anew, report=start.report, progress=start.progress)
        return Result(data=asdict(done))

    step = Step(
        name="tune",
        kind="tune",
        settings=_read(source) | {"backbone": spec} | given(TuneConfig, values) | said,
        inputs={"the source": source.state, "the model": lambda: _weights_state(spec)},
        run=run,
        made=made,
        after=source.after,
        owns=out,
    )
    return step, replace(source, read_after=("tune",))


def _extract(recipe: Recipe, section: Section, source: Source, store: str) -> tuple[Step, Source]:
    source = _reread(section, source)
    specs, own = _backbones(section)
    aliases = tuple(specs)
    config, values = section.config(
        ExtractConfig,
        omit=("overwrite",),
        whole=("label_template",),
        backbones=tuple(specs.values()),
        names=aliases,
        source=source.options,
    )

    def made() -> str | None:
        from mmc.store import EmbeddingStore

        try:
            there = EmbeddingStore.open(store).aliases
        except NotAStoreError:
            return None
        return store_state(store, aliases) if set(aliases) <= set(there) else None

    def run(start: Start) -> Result:
        from mmc.extract.pipeline import extract

        # Embeddings took hours: what made them is never changed unseen, as `extract` itself says.
        anew = replace(config, overwrite=start.forced)
        try:
            done = extract(
                source.spec, store, anew, own=own, report=start.report, progress=start.progress
            )
        except FingerprintMismatchError as error:
            raise FingerprintMismatchError(
                f"{error}\n(in a recipe: another name, or `--force extract` to embed all anew)"
            ) from None
        return Result(data=asdict(done))

    models = {f"the model of {alias}": _state_of(spec) for alias, spec in specs.items()}
    names = config.label_names
    words = {"the label names": lambda: path_state(names)} if names else {}
    backbones = {
        alias: {"spec": spec, **given(ExtractConfig, own[alias])} for alias, spec in specs.items()
    }
    step = Step(
        name="extract",
        kind="extract",
        settings=_read(source)
        | {"store": store, "backbones": backbones}
        | given(ExtractConfig, values),
        inputs={"the source": source.state, **models, **words},
        run=run,
        made=made,
        after=(*source.after, *source.read_after),
    )
    return step, source


_MAKERS = {"prepare": _prepare, "caption": _caption, "tune": _tune, "extract": _extract}


def _read(source: Source) -> dict[str, Any]:
    """What a step's settings say of its source."""
    return {"source": {"path": source.spec, **source.settings}}


def _reread(section: Section, source: Source) -> Source:
    """The source, with the options that `extract.source` has for what a step before has written."""
    node = section.node("source")
    if node is None:
        return source
    if not source.after:
        raise InputError(
            f"{node.where}: extract.source says how to read what `prepare` or `caption` wrote, and "
            "there is neither; put it under the recipe's `source`"
        )
    options = Section(node, "extract.source")
    config, values = options.config(SourceOptions, omit=NOT_KEYS)
    options.finish()
    return replace(source, options=config, settings=given(SourceOptions, values))


def _backbones(section: Section) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Alias -> spec of each backbone, and alias -> what it has for itself."""
    node = section.node("backbones")
    if node is None:
        raise InputError(f"{section.where}: extract names no `backbones`")
    specs: dict[str, str] = {}
    own: dict[str, dict[str, Any]] = {}
    for alias, one in Section(node, "extract.backbones").entries():
        name = f"extract.backbones.{alias}"
        place, own[alias] = one, {}
        if isinstance(one.value, dict):
            inner = Section(one, name)
            place = inner.node("spec") or Node(None, one.where)
            name = f"{name}.spec"
        specs[alias] = text_of(place, name)
        with located(place.where, name):
            check_name(alias, "backbone name")
            parse_spec(specs[alias])
        if isinstance(one.value, dict):
            shared = set(settable(ExtractConfig)) - set(OWN)
            _, own[alias] = inner.config(
                ExtractConfig, omit=shared - {"backbones"}, backbones=(specs[alias],)
            )
            inner.finish()
    if not specs:
        raise InputError(f"{node.where}: extract.backbones is empty")
    return specs, own


def _state_of(spec: str) -> Callable[[], str]:
    return lambda: _weights_state(spec)


def _weights_state(spec: str) -> str:
    """State of the files on this machine that a backbone's spec names."""
    parsed = parse_spec(spec)
    named = [parsed.name, parsed.name.partition("/")[2], *parsed.options.values()]
    states = {name: path_state(name) for name in named if name}
    return " ".join(f"{name}: {state}" for name, state in states.items() if state != ABSENT)
