"""A run's head as an ONNX file that needs neither mmc nor torch, checked against torch.

Inputs are called after the head's roles and take rows as a store gives them, floats as float32;
the first axis, ``batch``, is free. Outputs are ``logits`` and ``probabilities``, (batch, C) each.
What else a user needs (labels, thresholds, which features) is JSON in the model's metadata, under
the key ``mmc``.
"""

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc.heads.artifact import Run, library_versions
from mmc.heads.models.base import Batch, Head
from mmc.heads.runfiles import write_atomic
from mmc.heads.temperature import probabilities
from mmc.store.errors import InputError, MmcError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("logits", "probabilities")
METADATA = "mmc"
CHECKED = (1, 2, 7, 33)
"""Batch sizes that are compared with torch."""
TOLERANCE = 1e-4
"""Largest difference from torch, of logits relative to the largest one where that is above 1."""
LARGEST = 2**31 - 1
"""Bytes of one ONNX file: a limit of its encoding."""
# Fields whose type is not float, for runs that did not record it.
_DTYPES = {"region_classes": "int16", "image_places": "int16", "text_ids": "int64"}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export_onnx` wrote."""

    path: Path
    bytes: int
    opset: int
    inputs: dict[str, dict[str, Any]]
    """Role -> feature, dtype and shape (per sample) of what it takes."""
    max_difference: dict[str, float]
    """Output -> largest absolute difference from torch."""
    rows: int
    """Made-up rows that were compared."""

    def __str__(self) -> str:
        """What was written, what it takes, and how near it is to torch."""
        lines = [f"{self.path}: {self.bytes:,} bytes, opset {self.opset}"]
        for role, taken in self.inputs.items():
            shape = ", ".join(map(str, ("batch", *taken["shape"])))
            lines.append(f"  {role}: {taken['dtype']} ({shape}), {taken['feature']}")
        near = ", ".join(f"{name} {value:.2g}" for name, value in self.max_difference.items())
        lines.append(f"largest difference from torch on {self.rows} random rows: {near}")
        return "\n".join(lines)


def default_path(run: Path) -> Path:
    """Where a run is exported to when nobody says: beside its folder, ``my.run`` -> ``my.onnx``."""
    run = run.resolve() if run.name in ("", "..") else run
    return run.with_name(f"{run.name.removesuffix('.run')}.onnx")


def export_onnx(run: Run, out: str | Path) -> ExportReport:
    """Write the head of ``run`` to the ONNX file ``out``, whole or not at all.

    The file is written only after onnxruntime gave the same numbers as torch for batches of 1, 2, 7
    and 33 random rows.

    Raises:
        InputError: ``out`` is a folder or not a place for a file.
        MmcError: the packages are missing, the head cannot be exported, or the numbers differ.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MmcError(
            f"exporting to ONNX needs {', '.join(missing)}: install with pip install 'mmc[onnx]'"
        )
    out = Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise InputError(
            f"--out {out} {what}; name a file such as {default_path(Path('my.run')).name}"
        )
    head = run.build_head().requires_grad_(False)
    taken = {role: _taken(run, role) for role in head.inputs}
    model = _convert(run, head, taken)
    metadata = json.dumps(_metadata(run, taken), ensure_ascii=False, allow_nan=False)
    model.metadata_props.add(key=METADATA, value=metadata)
    if model.ByteSize() > LARGEST:
        raise MmcError(
            f"{run.head} takes {model.ByteSize():,} bytes, and an ONNX file holds {LARGEST:,}; use "
            "the run itself"
        )
    data = model.SerializeToString()
    found = _check(run, head, taken, data)
    write_atomic(out, data)
    return ExportReport(
        path=out,
        bytes=len(data),
        opset=next(o.version for o in model.opset_import if o.domain == ""),
        inputs=taken,
        max_difference=found,
        rows=sum(CHECKED),
    )


class _Exported(nn.Module):
    """Fields in the order of the head's roles -> logits and probabilities."""

    def __init__(self, head: Head, task: str, temperature: float) -> None:
        super().__init__()
        self.head, self.task, self.temperature = head, task, temperature

    def forward(self, *fields: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(dict(zip(self.head.inputs, fields, strict=True)))
        scaled = logits / self.temperature
        return logits, scaled.sigmoid() if self.task == "multilabel" else scaled.softmax(1)


def _convert(run: Run, head: Head, taken: dict[str, dict[str, Any]]) -> Any:
    """The model as an ``onnx.ModelProto``."""
    module = _Exported(head, run.task, run.temperature).eval()
    fields = tuple(random_rows(taken, 3, seed=0).values())
    free = tuple({0: torch.export.Dim("batch")} for _ in fields)
    try:
        # With gradients heads take all rows at once; without, as many as there is memory for.
        with _quiet(), torch.enable_grad():
            program = torch.export.export(module, fields, dynamic_shapes=(free,), strict=False)
            found = torch.onnx.export(
                program,
                fields,
                dynamo=True,
                input_names=list(head.inputs),
                output_names=list(OUTPUTS),
                verbose=False,
            )
    except Exception as error:
        # Anything can fail in a head that somebody wrote; the reason is in the chain (--debug).
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise MmcError(
            f"{run.head} cannot be exported to ONNX: {type(error).__name__}: {reason.strip()}"
        ) from error
    assert found is not None
    model = found.model_proto
    _name_batch_axis(model)
    return model


def _name_batch_axis(model: Any) -> None:
    """Call the free axis ``batch``: torch names it s31 or so, here and in what follows from it."""
    own = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(own)}\b", "batch", dim.dim_param)


def _check(run: Run, head: Head, taken: dict[str, dict[str, Any]], data: bytes) -> dict[str, float]:
    """Largest difference of each output from torch on random rows.

    Raises:
        MmcError: it is too large, or onnxruntime does not take the model.
    """
    import onnxruntime

    found = dict.fromkeys(OUTPUTS, 0.0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        for seed, rows in enumerate(CHECKED):
            batch = random_rows(taken, rows, seed=seed)
            with torch.inference_mode():
                logits = head(batch)
            wanted = (logits, probabilities(logits, run.task, run.temperature))
            given = {role: values.numpy() for role, values in batch.items() if role in names}
            largest = max(1.0, float(logits.abs().max()))
            got = session.run(list(OUTPUTS), given)
            for name, ours, theirs, unit in zip(OUTPUTS, wanted, got, (largest, 1.0), strict=True):
                difference = float(np.abs(ours.numpy() - theirs).max())
                if not difference <= TOLERANCE * unit:
                    raise MmcError(
                        f"the ONNX model of {run.head} gives other {name} than torch (largest "
                        f"difference {difference:.2g} in a batch of {rows}); nothing was written"
                    )
                found[name] = max(found[name], difference)
    except MmcError:
        raise
    except Exception as error:  # its classes share no base
        reason = " ".join(str(error).split())
        raise MmcError(f"onnxruntime cannot run the model of {run.head}: {reason}") from error
    return found


def random_rows(taken: dict[str, dict[str, Any]], rows: int, *, seed: int) -> Batch:
    """Made-up values of every input, (rows, ...) each; the first row has nothing in its masks."""
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for role, what in taken.items():
        shape, field = (rows, *what["shape"]), role.rpartition(".")[2]
        dtype = getattr(torch, what["dtype"])
        if dtype == torch.bool:
            values = torch.rand(shape, generator=generator) < 0.7
            values[0] = False
        elif field == "boxes":
            values = torch.rand(shape, generator=generator)
        elif dtype.is_floating_point:
            values = torch.randn(shape, generator=generator)
        else:
            values = torch.randint(4, shape, generator=generator)
        batch[role] = values.to(dtype)
    return batch


def _taken(run: Run, role: str) -> dict[str, Any]:
    """What an input takes."""
    ref = run.features[role]
    dtype = ref.dtype or _DTYPES.get(ref.field, "bool" if ref.field.endswith("_mask") else "float")
    return {
        "feature": ref.feature,
        "fingerprint": ref.fingerprint,
        "dtype": "float32" if dtype.startswith("float") else dtype,
        "shape": list(ref.shape),
    }


def _metadata(run: Run, taken: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a user of the model needs besides."""
    specs = {ref.feature: ref.context.get("spec") for ref in run.features.values()}
    return {
        "head": run.head,
        "task": run.task,
        "label_set": list(run.label_set),
        "thresholds": list(run.thresholds.values),
        "temperature": run.temperature,
        "inputs": {role: {**what, "spec": specs[what["feature"]]} for role, what in taken.items()},
        "run": run.path.name if run.path else None,
        "created": run.created,
        "versions": {name: library_versions()[name] for name in ("mmc", "torch")},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on how it works."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
