"""The command line: parse, build the configs, call one function, print. No loop, no tensor.

Options that set a field of a config take their name, type and help from it (`_options`). Nothing
here imports torch before a command needs it: ``mmc --help`` answers at once. A command looks first
whether its store and its run are there, and imports torch, which takes seconds, after that.
"""

import dataclasses
import functools
import inspect
import io
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmc.extract.captions_options import CaptionConfig
from mmc.extract.options import ExtractConfig
from mmc.extract.prepare_options import PrepareConfig
from mmc.extract.pretraining.options import PretrainConfig
from mmc.extract.sources import SourceOptions
from mmc.extract.tuning.options import TuneConfig
from mmc.heads.labels.options import LabelsConfig
from mmc.heads.options import PredictConfig, TrainConfig
from mmc.store.config import build, field_docs
from mmc.store.errors import InputError, MmcError
from mmc.store.registry import Entry, entries, lookup

if TYPE_CHECKING:
    from mmc.heads.predict import PredictionReport

app = typer.Typer(
    name="mmc",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# Which fields of the configs are options; the others are set with --set, or from Python.
EXTRACT = """fields batch_size precision device workers max_text_tokens label_template label_names
    compress max_pixels shard_rows strict overwrite retry_failed"""
SOURCE = """image_column text_column label_column id_column split_column image_root label_separator
    split_by text_template task merge_labels missing_labels label_level ties dedupe encoding
    allow_absolute_paths"""
CAPTION = """prompt beams max_tokens min_tokens column batch_size precision device workers
    max_pixels overwrite"""
PREPARE = "to max_side quality shard_samples workers max_pixels overwrite"
TRAIN = """head features loss batch_size epochs lr seed precision device max_memory track sweep
    seeds folds overwrite"""
TUNE = """targets pairs pair_column upsample samples_per_epoch batch_size epochs lr label_template
    seed precision device workers max_pixels merge overwrite"""
PRETRAIN = """upsample samples_per_epoch batch_size epochs lr seed precision device workers
    max_pixels track overwrite"""
PREDICT = "split form scores top_k at_least_one device"
LABELS = "features limit near device"
RENAMED = {"form": "--format"}
COMPLETED = {"head": "heads", "loss": "losses"}
REPEATED = {"label_template", "sweep"}
"""Options that are given once for each value: values that may hold commas."""

TABLES = {
    "backbones": "mmc.extract.backbones",
    "sources": "mmc.extract.sources",
    "heads": "mmc.heads.models",
    "losses": "mmc.heads.losses",
}
"""Where the table of each kind of component is."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of a part; see `mmc list heads NAME`. Repeat."
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A table, a folder, a pattern of files, or train=A,test=B; see `mmc list sources`.",
    ),
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="The store's folder or URL.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]


# The base of what Typer raises for a wrong command line; it has no public name of its own.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]


def _options(config: type, fields: str, into: str) -> Callable[[Any], Any]:
    """Give a command an option per field of ``config``; what was set comes as the dict ``into``."""
    docs, hints, names = field_docs(config), typing.get_type_hints(config), fields.split()
    defaults = {field.name: field.default for field in dataclasses.fields(config)}

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            settings = {name: given.pop(name) for name in names}
            for name in [name for name, value in settings.items() if value == ""]:
                raise InputError(f"--{name.replace('_', '-')} is empty; leave it out")
            given[into] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in settings.items()
                if value is not None and value is not False and value != []
            }
            return command(**given)

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != into]
        added = [_option(name, hints[name], docs[name], defaults[name]) for name in names]
        call.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in own + added}
        return call

    return wrap


def _option(name: str, hint: Any, doc: str, default: Any) -> inspect.Parameter:
    """A keyword parameter that Typer shows as ``--name``; values are converted by the config."""
    inner = hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(inner) is tuple:
        inner = list[str] if name in REPEATED else str  # or a,b,c
    flag = bool(inner is bool)
    option = typer.Option(
        RENAMED.get(name, "--" + name.replace("_", "-")),
        help=_with_default(" ".join(doc.split()), default),
        show_default=False,
        metavar="<text>" if inner == list[str] else None,
        autocompletion=_names(COMPLETED[name]) if name in COMPLETED else None,
    )
    kind = bool if flag else inner | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if flag else None,
        annotation=Annotated[kind, option],
    )


def _with_default(doc: str, default: Any) -> str:
    """The help of an option with its default, where that says something."""
    silent = default is None or default in (False, "", ())
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return doc if silent or "default" in doc.lower() else f"{doc} [default: {shown}]"


def _say(line: str) -> None:
    """News of a running command: stderr, so that stdout holds results only."""
    print(line, file=sys.stderr, flush=True)


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=False, default=str))


def _names(table: str) -> Callable[[str], list[str]]:
    """Shell completion over a table of components."""

    def complete(incomplete: str) -> list[str]:
        return [entry.name for entry in _table(table) if entry.name.startswith(incomplete)]

    return complete


def _table(kind: str) -> tuple[Entry, ...]:
    from importlib import import_module

    return entries(getattr(import_module(TABLES[kind]), kind.upper()), f"mmc.{kind}")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Show versions and devices, and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Classify image + text samples: embed once with a big backbone, train light heads in seconds.

    \b
    Example:
      mmc extract train.csv my.store --backbone open_clip:ViT-B-32/laion2b_s34b_b79k
      mmc train-head my.store my.run --head linear
      mmc predict my.run test.csv --out predictions.csv
    """
    if show_version:
        for name, number in _versions().items():
            print(f"{name:<16} {number}")
        print(f"{'devices':<16} {', '.join(_devices())}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _versions() -> dict[str, str]:
    """Versions of mmc and of the libraries that its results depend on."""
    names = ["mmc", "torch", "torchvision", "open_clip_torch", "transformers", "zarr", "numpy"]
    found = {name: version(name) for name in names}
    # One library, several packages: by platform, and by the user's choice of CUDA.
    faiss = {d.name: d.version for d in distributions() if (d.name or "").startswith("faiss")}
    return {**found, "faiss": ", ".join(f"{number} ({name})" for name, number in faiss.items())}


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


@app.command("extract")
@_options(SourceOptions, SOURCE, into="source_options")
@_options(ExtractConfig, EXTRACT, into="settings")
def extract_command(
    source: Source,
    store: StorePath,
    backbone: Annotated[
        list[str],
        typer.Option(
            help="Backbone to run; see `mmc list backbones`. Repeat for more.",
            autocompletion=_names("backbones"),
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Its name in the store, one for each --backbone; default: the model's, such as "
            "ViT-B-32 or all-MiniLM-L6-v2."
        ),
    ] = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Embed every sample once and keep the result in a store; resumes where it stopped.

    \b
    Example:
      mmc extract train.csv my.store --backbone open_clip:ViT-B-32/laion2b_s34b_b79k --name clip
      mmc extract data/ my.store --backbone hf:sentence-transformers/all-MiniLM-L6-v2 --name minilm
    """
    from mmc.extract.pipeline import extract
    from mmc.extract.progress import Progress

    config = build(
        ExtractConfig,
        settings
        | {
            "backbones": tuple(backbone),
            "names": tuple(name) if name else None,
            "source": build(SourceOptions, source_options, where="the source"),
        },
        where="mmc extract",
    )
    with Progress() as progress:
        report = extract(source, store, config, report=_say, progress=progress)
    if json_output:
        _print_json(asdict(report))


@app.command("prepare")
@_options(SourceOptions, SOURCE, into="source_options")
@_options(PrepareConfig, PREPARE, into="settings")
def prepare_command(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Write a source anew with smaller pictures, as shards or tables that are read fast.

    \b
    Example:
      mmc prepare train.csv shards --to webdataset --max-side 512
    """
    from mmc.extract.prepare import prepare
    from mmc.extract.progress import Progress

    config = build(
        PrepareConfig,
        settings | {"source": build(SourceOptions, source_options, where="the source")},
        where="mmc prepare",
    )
    with Progress() as progress:
        report = prepare(source, out, config, report=_say, progress=progress)
    if json_output:
        _print_json(asdict(report))


@app.command("caption")
@_options(SourceOptions, SOURCE, into="source_options")
@_options(CaptionConfig, CAPTION, into="settings")
def caption_command(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Table to write: .csv or .parquet.")],
    backbone: Annotated[
        str, typer.Option(help="Captioning model: hf:HUB_NAME or hf:FOLDER of a BLIP.")
    ],
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Write a source's table with a column of captions of its pictures; resumes where it stopped.

    \b
    Example:
      mmc caption train.csv captioned.csv --backbone hf:Salesforce/blip-image-captioning-base
      mmc extract captioned.csv my.store --text-template "{text} [SEP] {caption}" --backbone hf:...
    """
    from mmc.extract.captions import caption
    from mmc.extract.progress import Progress

    options = build(SourceOptions, source_options, where="the source")
    config = build(
        CaptionConfig, settings | {"backbone": backbone, "source": options}, where="mmc caption"
    )
    with Progress() as progress:
        report = caption(source, out, config, report=_say, progress=progress)
    if json_output:
        _print_json(asdict(report))


@app.command("train-head")
@_options(TrainConfig, TRAIN, into="settings")
def train_head_command(
    store: StorePath,
    run: RunPath,
    set_: Set = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Train a head on a store; tunes thresholds on val, reports val and test.

    \b
    Example:
      mmc train-head my.store my.run --head linear
      mmc train-head my.store my.run --head mlp --features image=clip/image,text=minilm/text
      mmc train-head my.store my.run --head mlp --set head.hidden=1024 --set loss.pos_weight=auto
      mmc train-head my.store my.run --sweep lr=1e-4,3e-4,1e-3 --sweep loss=bce,asl --folds 5
    """
    from mmc.heads.options import check_names
    from mmc.store import EmbeddingStore

    config = build(TrainConfig, settings | {"settings": tuple(set_ or ())}, where="mmc train-head")
    check_names(config)
    opened = EmbeddingStore.open(store)

    from mmc.extract.progress import Progress
    from mmc.heads.evaluate import format_table
    from mmc.heads.launch import is_main
    from mmc.heads.search.tables import text
    from mmc.heads.trainer import train

    with Progress() as progress:
        report = train(opened, run, config, report=_say, progress=progress)
    if not is_main():  # one of several processes: the main one prints
        return
    if json_output:
        _print_json({key: value for key, value in vars(report).items() if key != "run"})
    else:
        print("\n\n".join(filter(None, [text(report.search), format_table(report.metrics)])))


@app.command("predict")
@_options(SourceOptions, SOURCE.replace("dedupe ", ""), into="source_options")
@_options(PredictConfig, PREDICT, into="settings")
def predict_command(
    run: RunPath,
    input_: Annotated[
        str, typer.Argument(metavar="INPUT", help="A store, or a source like the one trained on.")
    ],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    store: Annotated[
        str | None, typer.Option(help="Keep the embeddings of a source here, for the next time.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File of labels, one a line, to score instead of those trained on (heads that "
            "read label texts)."
        ),
    ] = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Predict labels for a store or for new data, write a CSV file, and check it.

    \b
    Example:
      mmc predict my.run my.store --split test --out predictions.csv --scores
      mmc predict my.run new.csv --out predictions.csv --store new.store
      mmc predict zero.run my.store --labels new_labels.txt --out predictions.csv
    """
    from mmc.extract.progress import Progress

    config = build(PredictConfig, settings, where="mmc predict")
    with Progress() as progress:
        report = _predict(
            run,
            input_,
            out,
            config,
            store=store,
            labels=labels,
            given=source_options,
            report=_say,
            progress=progress,
        )
    if json_output:
        _print_json(asdict(report))
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)


def _predict(
    run: Path,
    input_: str,
    out: Path,
    config: PredictConfig,
    *,
    store: str | None,
    labels: Path | None,
    given: dict[str, Any],
    report: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> "PredictionReport":
    """Predict on a store, or on a source that is embedded first: what joins extract and heads."""
    from mmc.extract.sources.read import check_source
    from mmc.heads.runfiles import check_run

    check_run(run)
    if "://" not in input_ and not (Path(input_) / "zarr.json").exists():
        check_source(input_)

    from mmc.extract.inputs import check_out, open_input
    from mmc.heads.artifact import Run
    from mmc.heads.predict import default_split, predict_csv

    check_out(out, run, input_)
    loaded = Run.load(run)
    if labels is not None:
        from mmc.extract.label_text import embed_labels_like
        from mmc.heads.newlabels import read_labels, text_recipe

        names, recipe = read_labels(labels), text_recipe(loaded)
        loaded = loaded.with_labels(
            names,
            embed_labels_like(recipe.backbone, names, recipe.templates, device=config.device),
        )
    with open_input(
        input_,
        loaded.recipe,
        loaded.source,
        out=out,
        store=store,
        given=given,
        device=config.device,
        report=report,
        progress=progress,
    ) as (opened, rows):
        if rows is not None:
            config = replace(config, split=config.split or default_split(opened, rows))
        if labels is None:
            for line in loaded.compare_labels(opened.label_set, input_):
                report(f"warning: {line}")
        return predict_csv(loaded, opened, out, config, rows=rows, progress=progress)


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY.KEY=VALUE",
            help="Set a key of the recipe for this call, such as heads.linear.lr=0.001. Repeat.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and say what would run, and why.")
    ] = False,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="Run this step though nothing has changed: the name of a run, or prepare, "
            "caption, extract (which embeds all anew), train, compare, evaluate, predict. Repeat.",
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Run the steps of a recipe, from a source to predictions: only what changed since last time.

    \b
    Example:
      mmc run kaggle.yaml
      mmc run kaggle.yaml --dry-run
      mmc run kaggle.yaml --set heads.decoder.epochs=5 --force predict
    """
    from mmc.extract.progress import Progress
    from mmc.extract.steps import data_steps, read_input
    from mmc.heads.steps import Joined, head_steps
    from mmc.store.chain import open_recipe, run_steps

    with open_recipe(recipe, set_ or ()) as opened, Progress() as progress:
        data = data_steps(opened)
        joined = Joined(read_input=read_input, predict=_predict)
        steps = [*data.steps, *head_steps(opened, data.store, data.fields, joined)]
        opened.top.finish()
        outcomes = run_steps(
            opened,
            steps,
            force=force or (),
            dry_run=dry_run,
            report=_say,
            show=(lambda text: None) if json_output else print,
            progress=progress,
        )
    if json_output:
        _print_json([asdict(outcome) for outcome in outcomes])


@app.command("tune")
@_options(SourceOptions, SOURCE, into="source_options")
@_options(TuneConfig, TUNE, into="settings")
def tune_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Where the pairs come from; a::b::c for several; see `mmc list sources`.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the adapter.")],
    backbone: Annotated[
        str, typer.Option(help="The model to tune: open_clip:... or hf:..., of image and text.")
    ],
    head: Annotated[
        str | None,
        typer.Option(
            help="Train this head along, on both embeddings, and keep it in OUT/run.",
            autocompletion=_names("heads"),
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="The head's loss, as for train-head.", autocompletion=_names("losses")),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the adapters, the optimiser or the head, such as lora.rank=16 or "
            "optim.micro_batch=32. Repeat.",
        ),
    ] = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Adapt a backbone to your pairs of pictures and texts (LoRA, contrastive loss); resumes.

    \b
    Example:
      mmc tune my_data/ my.lora --backbone open_clip:ViT-B-32/laion2b_s34b_b79k
      mmc extract my_data/ my.store --backbone "open_clip:ViT-B-32/laion2b_s34b_b79k[lora=my.lora]"
    """
    from mmc.extract.progress import Progress
    from mmc.extract.tuning.options import groups
    from mmc.extract.tuning.tune import tune

    of_head = [pair for pair in set_ or () if pair.startswith(("head.", "loss."))]
    if head is None and (of_head or loss):
        raise InputError(f"{of_head[0] if of_head else '--loss'} is of a head: name it with --head")
    others = [pair for pair in set_ or () if pair not in of_head]
    config = build(
        TuneConfig,
        settings
        | groups([*(["optim.metric=head"] if head else []), *others])
        | {
            "backbone": backbone,
            "source": build(SourceOptions, source_options, where="the source"),
        },
        where="mmc tune",
    )
    trained = _joint_head(source, config, head, loss, of_head) if head else None
    with Progress() as progress:
        report = tune(source, out, config, head=trained, report=_say, progress=progress)
    if json_output:
        _print_json(asdict(report))


def _joint_head(
    source: str, config: TuneConfig, head: str, loss: str | None, settings: list[str]
) -> Any:
    """The head that is trained with a backbone; in the end it becomes a run beside the adapter."""
    from mmc.extract.backbones import parse_spec
    from mmc.extract.pipeline import extract
    from mmc.extract.training.options import MORE
    from mmc.extract.tuning.saving import RUN, STORE
    from mmc.heads.joint import JointTraining
    from mmc.store import EmbeddingStore

    if MORE in source:
        raise InputError(f"--head needs one source: what it is used on is not several ({source})")

    def keep(trained: JointTraining, folder: Path) -> None:
        spec = parse_spec(config.backbone)
        spec.options["lora"] = str(folder)
        extraction = ExtractConfig(
            backbones=(str(spec),), names=("tuned",), device=config.device, source=config.source
        )
        extract(source, str(folder / STORE), extraction, report=_say)
        trained.save(EmbeddingStore.open(str(folder / STORE)), "tuned", folder / RUN)
        _say(f"the head is the run {folder / RUN}; its embeddings are in {folder / STORE}")

    settings_of_head = TrainConfig(head=head, loss=loss, seed=config.seed, settings=tuple(settings))
    return JointTraining(settings_of_head, keep)


@app.command("pretrain")
@_options(SourceOptions, SOURCE, into="source_options")
@_options(PretrainConfig, PRETRAIN, into="settings")
def pretrain_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Where the pairs come from; a::b::c for several; see `mmc list sources`.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the model.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings; flags and --set win over it."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of the text tower, hf:NAME or hf:FOLDER; default: a WordPiece "
            "vocabulary made from the texts of train."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting, such as vision.width=192, text.weights=hf:NAME or mask.patches=0.6. "
            "Repeat.",
        ),
    ] = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
    source_options: dict[str, Any],
) -> None:
    """Pretrain an image and a text tower on your pairs, contrastive and masked losses; resumes.

    \b
    Example:
      mmc pretrain my_data/ my.model --epochs 50
      mmc pretrain my_data/ my.model --config small.yaml --set mask.patches=0.6
      mmc extract my_data/ my.store --backbone hf:my.model
    """
    from mmc.extract.pretraining.pretrain import pretrain
    from mmc.extract.pretraining.reading import read_config
    from mmc.extract.progress import Progress

    pairs = [*(set_ or ()), *([f"text.tokenizer={tokenizer}"] if tokenizer else [])]
    options = build(SourceOptions, source_options, where="the source")
    read = read_config(config, pairs, settings, options)
    with Progress() as progress:
        report = pretrain(source, out, read, report=_say, progress=progress)
    if json_output:
        _print_json(asdict(report))


@app.command("evaluate")
def evaluate_command(
    run: RunPath,
    store: StorePath,
    split: Annotated[
        str, typer.Option(help="Samples of this split; `all` for every labelled one.")
    ] = "test",
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Measure a run on the labelled samples of a store.

    \b
    Example:
      mmc evaluate my.run my.store --split test
    """
    from mmc.heads.runfiles import check_run
    from mmc.store import EmbeddingStore

    check_run(run)
    opened = EmbeddingStore.open(store)

    from mmc.heads.artifact import Run
    from mmc.heads.evaluate import evaluate, format_table

    result = evaluate(Run.load(run), opened, None if split == "all" else split, device=device)
    if json_output:
        _print_json(result)
    else:
        print(format_table(result))


@app.command("report")
def report_command(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    store: Annotated[
        str | None, typer.Option(help="The store; default: the one that the run was trained on.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Samples of this split, or `all`; default: test where it is labelled, else val."
        ),
    ] = None,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Write a page that shows how good a run is, label by label and sample by sample.

    \b
    Example:
      mmc report my.run --out report.html
    """
    from mmc.heads.runfiles import check_run
    from mmc.store import EmbeddingStore

    check_run(run)
    named = None if store is None else EmbeddingStore.open(store)

    from mmc.extract.progress import Progress
    from mmc.extract.thumbnails import Thumbnails
    from mmc.heads.artifact import Run
    from mmc.heads.report.page import trained_store, write_report

    loaded = Run.load(run)
    opened = EmbeddingStore.open(trained_store(loaded, run)) if named is None else named
    with Progress() as progress:
        done = write_report(
            loaded,
            opened,
            out,
            split=split,
            thumbnail=Thumbnails(opened),
            device=device,
            report=_say,
            progress=progress,
        )
    if json_output:
        _print_json(asdict(done))
    else:
        print(done)


@app.command("neighbors")
def neighbors_command(
    store: StorePath,
    query: Annotated[
        str,
        typer.Option(help="An id of the store, a picture file, or a text; the first that fits."),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many neighbours.")] = 10,
    by: Annotated[
        Literal["auto", "id", "image", "text"], typer.Option(help="What the query is.")
    ] = "auto",
    features: Annotated[
        str | None,
        typer.Option(
            help="Feature to search, alias/field; default: pictures, or texts where there are none."
        ),
    ] = None,
    index: Annotated[
        Literal["auto", "flat", "ivf", "hnsw"],
        typer.Option(help="flat: all are compared; ivf, hnsw: an index, kept in the store."),
    ] = "auto",
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Find the samples nearest to a sample, a picture or a text.

    \b
    Example:
      mmc neighbors my.store --query photo.jpg -k 5
      mmc neighbors my.store --query "two dogs on a beach"
    """
    from mmc.store import EmbeddingStore

    opened = EmbeddingStore.open(store)

    from mmc.extract.progress import Progress
    from mmc.extract.queries import embed_query
    from mmc.store.nearest import described, format_neighbors, nearest_samples
    from mmc.store.neighbors import open_index, vector_features

    asked = embed_query(opened, query, kind=by, feature=features, device=device)
    with Progress() as progress:
        searched = open_index(opened, asked.feature, kind=index, report=_say, progress=progress)
    found = nearest_samples(opened, searched, asked.vector, k, row=asked.row)
    # A text or a picture is what was typed, a sample what the store knows of it.
    told = {asked.kind: query} if asked.row is None else described(opened, [asked.row])[0]
    if json_output:
        _print_json({"by": asked.kind, "feature": asked.feature, "query": told, "neighbors": found})
    else:
        if asked.kind == "text" and by == "auto" and len(query.split()) == 1:
            _say(f"{query!r} is the id of no sample and no picture: taken for a text")
        _say(f"nearest by {asked.kind}: {searched}")
        others = [name for name in vector_features(opened) if name != asked.feature]
        if others and features is None:
            _say(f"--features searches others: {', '.join(others)}")
        print(format_neighbors(found, told))


@app.command("labels")
@_options(LabelsConfig, LABELS, into="settings")
def labels_command(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="Folder to write tables, graph and page into.")],
    run: Annotated[
        Path | None,
        typer.Option(
            help="A run on this store: its predictions count, too, where it did not train."
        ),
    ] = None,
    json_output: Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Look at the labels: likely errors, duplicates, near labels, outliers, what to label next.

    \b
    Example:
      mmc labels my.store --out labels
      mmc labels my.store --run my.run --out labels
    """
    from mmc.heads.runfiles import check_run
    from mmc.store import EmbeddingStore

    config = build(LabelsConfig, settings, where="mmc labels")
    if run is not None:
        check_run(run)
    opened = EmbeddingStore.open(store)

    from mmc.extract.progress import Progress
    from mmc.extract.thumbnails import Thumbnails
    from mmc.heads.artifact import Run
    from mmc.heads.labels.analysis import analyse_labels

    loaded = None if run is None else Run.load(run)
    with Progress() as progress:
        found = analyse_labels(
            opened,
            out,
            config,
            run=loaded,
            thumbnail=Thumbnails(opened),
            report=_say,
            progress=progress,
        )
    if json_output:
        _print_json(asdict(found))
    else:
        print(found)


@app.command("compare")
def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, or folders that hold runs.")
    ],
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the table to this file too, all digits.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Measure all runs anew on the same samples of this store, with 95 % intervals of "
            "the differences."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="With --store: samples of this split; `all` for every labelled one.")
    ] = "test",
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Show runs side by side: metrics, size, time; the best of each column is marked.

    \b
    Example:
      mmc compare runs/
      mmc compare linear.run mlp.run --store my.store --csv runs.csv
    """
    from mmc.store import EmbeddingStore

    opened = EmbeddingStore.open(store) if store is not None else None

    from mmc.heads.compare import compare, comparison_csv, format_comparison
    from mmc.heads.runfiles import write_atomic

    found = compare(runs, store=opened, split=split, device=device, report=_say)
    if csv is not None:
        write_atomic(csv, comparison_csv(found))
    if json_output:
        _print_json(found.to_json())
    else:
        print(format_comparison(found))


@app.command("export")
def export_command(
    path: Annotated[
        str, typer.Argument(metavar="RUN|STORE", help="onnx: a run; parquet, npy: a store.")
    ],
    to: Annotated[
        Literal["onnx", "parquet", "npy"],
        typer.Option("--to", help="onnx: a run's head; parquet, npy: a store's samples."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="What to write; default: beside it, my.run gives my.onnx, my.store my.parquet."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Of a store: add the predictions of this run.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Of a store: aliases or alias/field,...; default: all pooled fields."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a store: samples of this split only.")
    ] = None,
    projection: Annotated[
        Literal["pca", "tsne", "none"],
        typer.Option(help="Of a store: two coordinates to draw by, of the first feature."),
    ] = "pca",
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails", help="Of a store: add small pictures.")
    ] = False,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Write a run's head, or a store's samples, in a form that needs no mmc.

    \b
    Example:
      mmc export my.run --to onnx --out my.onnx
      mmc export my.store --to parquet --run my.run --thumbnails
    """
    if to == "onnx":
        given = {"run": run, "features": features, "split": split, "thumbnails": thumbnails}
        for name in (name for name, value in given.items() if value):
            raise InputError(f"--{name} is for --to parquet and npy, not for onnx")
        report = _export_onnx(Path(path), out)
    else:
        report = _export_samples(
            path,
            out,
            to,
            run,
            split=split,
            features=tuple(filter(None, (features or "").split(","))),
            projection=projection,
            thumbnails=thumbnails,
            device=device,
        )
    if json_output:
        _print_json(asdict(report))
    else:
        print(report)


def _export_onnx(run: Path, out: Path | None) -> Any:
    from mmc.heads.runfiles import check_run

    check_run(run)

    from mmc.heads.artifact import Run
    from mmc.heads.export import default_path, export_onnx

    return export_onnx(Run.load(run), out or default_path(run))


def _export_samples(
    store: str, out: Path | None, to: Literal["parquet", "npy"], run: Path | None, **settings: Any
) -> Any:
    from mmc.heads.runfiles import check_run
    from mmc.store import EmbeddingStore

    opened = EmbeddingStore.open(store)
    if run is not None:
        check_run(run)

    from mmc.extract.progress import Progress
    from mmc.extract.thumbnails import Thumbnails
    from mmc.heads.artifact import Run
    from mmc.heads.handover import default_out, export_samples

    with Progress() as progress:
        return export_samples(
            opened,
            out or default_out(store, to),
            to,
            run=Run.load(run) if run is not None else None,
            pictures=Thumbnails(opened),
            progress=progress,
            **settings,
        )


@app.command("info")
def info_command(store: StorePath, json_output: Json = False) -> None:
    """Show what a store holds: features, rows, splits, labels, where it came from.

    \b
    Example:
      mmc info my.store
    """
    from mmc.store import EmbeddingStore
    from mmc.store.showing import format_summary

    info = EmbeddingStore.open(store).info()
    if json_output:
        _print_json(info)
    else:
        print(format_summary(info))


@app.command("verify")
def verify_command(
    store: StorePath,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Mark what is damaged as missing: the next extract fills it again."
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Read every committed byte of a store and compare its checksums.

    \b
    Example:
      mmc verify my.store
      mmc verify my.store --repair
    """
    from mmc.store import EmbeddingStore, conclusion
    from mmc.store import repair as repair_store
    from mmc.store import verify as verify_store

    opened = EmbeddingStore.open(store)
    problems = repair_store(opened) if repair else verify_store(opened)
    if json_output:
        _print_json([asdict(problem) for problem in problems])
    for problem in [] if json_output else problems:
        print(f"{problem.file}: {problem.what}")
    said = conclusion(problems, store, repaired=repair)
    if not json_output:
        print(said)


@app.command("compact")
def compact_command(store: StorePath, json_output: Json = False) -> None:
    """Drop the samples that are gone from their source, and the space they take.

    \b
    Example:
      mmc compact my.store
    """
    from mmc.store import EmbeddingStore, compact

    report = compact(EmbeddingStore.open(store))
    if json_output:
        _print_json(asdict(report))
    else:
        print(report)


@app.command("list")
def list_command(
    kind: Annotated[
        Literal["backbones", "heads", "losses", "sources"] | None,
        typer.Argument(metavar="KIND", help="backbones, heads, losses or sources; none: all."),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="Show the settings of this head or loss.")
    ] = None,
    json_output: Json = False,
) -> None:
    """List the backbones, heads, losses or sources that can be chosen by name.

    \b
    Example:
      mmc list heads
      mmc list heads mlp
    """
    from mmc.heads.listing import as_typed
    from mmc.heads.listing import settings as list_settings

    if kind is None:
        tables = {kind: _table(kind) for kind in TABLES}
        if json_output:
            _print_json({kind: [asdict(entry) for entry in tables[kind]] for kind in tables})
            return
        for title, listed in tables.items():
            print(f"\n{title}")
            _print_entries(listed)
        return
    table = _table(kind)
    if name is not None:
        table = (lookup(table, name, kind=kind.removesuffix("s"), group=f"mmc.{kind}"),)
    component = {"heads": "head", "losses": "loss"}.get(kind)
    settings = list_settings(component, table[0]) if name and component else []
    if json_output:
        _print_json([asdict(entry) for entry in table] + settings)
        return
    _print_entries(table)
    for setting in settings:
        print(f"\n--set {setting['key']}={as_typed(setting['default'])}\n    {setting['help']}")
        if setting["choices"]:
            print(f"    One of: {', '.join(map(str, setting['choices']))}.")


def _print_entries(table: tuple[Entry, ...]) -> None:
    width = max(len(entry.name) for entry in table)
    for entry in table:
        needs = f" ({entry.needs})" if entry.needs else ""
        print(f"{entry.name:<{width}}  {entry.description}{needs}")


@app.command("demo")
def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; about 40 MB.")],
    seed: Annotated[int, typer.Option(help="Another seed makes another set.")] = 0,
) -> None:
    """Run the main job on a set made from handwritten digits: offline, a few minutes on two cores.

    \b
    Example:
      mmc demo demo
    """
    from mmc.extract.demo.run import run_demo

    run_demo(directory, report=print, seed=seed)


def main() -> None:
    """Run the command line; every error that mmc raises on purpose is one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # labels and paths in any script, on any terminal
            stream.reconfigure(errors="backslashreplace")
    # Read once by OpenMP when torch loads it: idle workers sleep instead of spinning, which costs
    # little alone and saves half the rate when something else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, prog_name="mmc", standalone_mode=False) or 0
    except (MmcError, _UsageError) as error:
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        _say(f"error: {error if isinstance(error, MmcError) else error.format_message()}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            if "--debug" in sys.argv[1:]:
                traceback.print_exc()
            where = f"{error.filename}: " if error.filename else ""
            _say(f"error: {where}{error.strerror or error}")
        else:  # `mmc info … | head`: nobody reads what Python would flush at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code == INTERRUPTED:
        _say("stopped")
    sys.exit(code)


if __name__ == "__main__":
    main()
