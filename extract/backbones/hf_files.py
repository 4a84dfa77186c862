"""Reading transformers repositories, from a folder or the hub, with errors that say what to do."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import cached_file

from mmc.extract.backbones.base import offline_hint, one_line
from mmc.extract.transforms import ImageTransform, Interpolation, Resize
from mmc.store.errors import InputError

_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Files:
    """A folder or a hub repository."""

    name: str

    @cached_property
    def source(self) -> str:
        """What transformers is given: the folder where there is one, else the hub name.

        Raises:
            InputError: ``name`` is a path and there is no such folder.
        """
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise InputError(f"hf:{self.name}: the folder holds no config.json")
            return str(folder)
        if folder.exists():
            raise InputError(f"hf:{self.name}: give the folder, not a file in it")
        if self.name.startswith(("/", "./", "../", "~")) or self.name.count("/") > 1:
            raise InputError(f"hf:{self.name}: no such folder")
        return self.name

    @property
    def is_folder(self) -> bool:
        """Whether this is a folder on this machine, not a hub repository."""
        return Path(self.source).is_dir()

    def json(self, path: str) -> Any:
        """A JSON file of the repository; None where it has none."""
        found = cached_file(
            self.source,
            path,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


@contextmanager
def _explained(files: Files, what: str) -> Iterator[None]:
    """Turn what transformers raises on a missing or broken file into one line."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"hf:{files.name}: {what} needs a package that is not installed: {one_line(error)}"
        ) from None
    except Exception as error:  # a library's loaders on files of any kind: no type can be named
        text = one_line(error)
        if files.is_folder:
            raise InputError(f"hf:{files.name}: {what} cannot be read: {text}") from error
        raise InputError(
            f"hf:{files.name}: {what} is not on this machine and cannot be fetched"
            f"{offline_hint()}; check the name, go online once, or give a local folder: {text}"
        ) from error


def load_config(files: Files) -> Any:
    """The model's config."""
    with _explained(files, "config.json"), quiet():
        return transformers.AutoConfig.from_pretrained(files.source)


def architecture(config: Any) -> dict[str, Any]:
    """The config without what does not change a number."""
    noise = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in noise}
        return value

    kept: dict[str, Any] = clean(config.to_dict())
    return kept


def load_tokenizer(files: Files) -> Any:
    """The model's tokenizer, the fast one where there is one."""
    with _explained(files, "the tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(files.source)


def load_model(files: Files, kind: Any = transformers.AutoModel) -> Any:
    """The model in float32 on the CPU, every weight of it from the files.

    A pooler on top of an encoder is dropped: nothing here uses it, and where a checkpoint has none
    it would be random.

    Args:
        files: where the weights are.
        kind: the class of transformers; the bare model when not given.

    Raises:
        InputError: weights are missing or do not fit.
    """
    model, _ = load_partly(files, kind, ("pooler.",))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def load_partly(
    files: Files, kind: Any, parts: tuple[str, ...], **arguments: Any
) -> tuple[Any, tuple[str, ...]]:
    """A model in float32 on the CPU, and those of ``parts`` that the files lack: they are drawn.

    Args:
        files: where the weights are.
        kind: the class of transformers.
        parts: how names of weights begin that may be missing.
        arguments: more for the class.

    Raises:
        InputError: other weights are missing, or some do not fit.
    """
    with _explained(files, "the weights"), quiet():
        model, report = kind.from_pretrained(
            files.source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below with their sizes
            **arguments,
        )
    faults = [
        f"{key} is {list(found)}, the model has {list(wanted)}"
        for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    missing = sorted(report["missing_keys"])
    faults += [f"{key} is missing" for key in missing if not key.startswith(parts)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"hf:{files.name}: the weights do not fit the model: {'; '.join(faults[:3])}{more}"
        )
    lacking = tuple(part for part in parts if any(key.startswith(part) for key in missing))
    return model, lacking


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, no remarks on configs or unused weights on the terminal."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@dataclass(frozen=True)
class SentencePooling:
    """What a sentence-transformers repository says about turning tokens into one vector."""

    mode: str
    max_length: int | None = None
    lower: bool = False


def sentence_pooling(files: Files, wanted: str | None) -> SentencePooling:
    """Pooling of a text encoder: ``wanted``, else what its files say, else the mean.

    A normalising module is not applied: features are stored as the model gives them.

    Raises:
        InputError: a kind of pooling, or a module after it, that is not implemented.
    """
    limits = files.json("sentence_bert_config.json") or {}
    length, lower = limits.get("max_seq_length"), bool(limits.get("do_lower_case"))
    if wanted is not None:
        return SentencePooling(wanted, length, lower)
    modules = [module["type"].rsplit(".", 1)[-1] for module in files.json("modules.json") or []]
    others = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise InputError(
            f"hf:{files.name}: its {', '.join(others)} module after pooling is not applied here; "
            f"write hf:{files.name}[pooling=mean] to use the pooled states without it"
        )
    said = files.json("1_Pooling/config.json") or {"pooling_mode_mean_tokens": True}
    modes = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
    }
    chosen = [modes.get(key, key) for key, on in said.items() if on is True and "_mode_" in key]
    if "pooling_mode" in said:
        chosen = [said["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in modes.values():
        raise InputError(
            f"hf:{files.name}: pooling {' + '.join(chosen) or 'none'} is not supported; "
            f"choose mean, cls or max: hf:{files.name}[pooling=mean]"
        )
    return SentencePooling(chosen[0], length, lower)


def check_image_size(files: Files, transform: ImageTransform, image_size: Any) -> None:
    """Raises InputError where pictures come in another size than positions were learned for."""
    if image_size is None:
        return
    wanted = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if transform.size != wanted:
        raise InputError(
            f"hf:{files.name}: its image processor gives {transform.size[0]} x {transform.size[1]} "
            f"pixels, the model takes {wanted[0]} x {wanted[1]}; correct preprocessor_config.json"
        )


def image_transform(files: Files) -> ImageTransform:
    """The image processor of a model as numbers.

    Raises:
        InputError: the processor does something that gives no fixed size.
    """
    return transform_of(load_processor(files), files.name)


def load_processor(files: Files) -> Any:
    """The model's image processor."""
    with _explained(files, "the image processor"):
        return transformers.AutoImageProcessor.from_pretrained(files.source)


def transform_of(processor: Any, name: str) -> ImageTransform:
    """An image processor of transformers as numbers.

    Args:
        processor: any that resizes to a fixed size.
        name: of the model, for messages.

    Raises:
        InputError: it does something that gives no fixed size.
    """
    size = _sides(processor.size)
    crop = _sides(processor.crop_size) if processor.do_center_crop else {}
    resize: Resize
    if size.keys() == {"height", "width"}:
        resize, resize_to = "squash", (size["height"], size["width"])
    elif size.keys() == {"shortest_edge"} and crop:
        resize, resize_to = "shortest", (size["shortest_edge"], size["shortest_edge"])
    else:
        raise InputError(f"hf:{name}: its image processor gives no fixed size ({size})")
    if not processor.do_resize or int(processor.resample) not in _RESAMPLING:
        raise InputError(
            f"hf:{name}: its image processor must resize with bilinear or bicubic resampling"
        )
    normalises = processor.do_normalize
    return ImageTransform(
        size=(crop["height"], crop["width"]) if crop else resize_to,
        resize=resize,
        resize_to=resize_to,
        crop="floor",
        resampler="torchvision",
        interpolation=_RESAMPLING[int(processor.resample)],
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if normalises else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalises else (1.0, 1.0, 1.0),
    )


def _sides(size: Any) -> dict[str, int]:
    """A processor's size, whatever class holds it, without what is not set."""
    items = size if isinstance(size, dict) else {} if size is None else dict(vars(size))
    return {key: int(value) for key, value in items.items() if value}
