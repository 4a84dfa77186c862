"""Captions: the library's own, in a table that `extract` reads, whatever happens on the way."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from tiny_models import tiny_bert, tiny_blip, tiny_blip_captioner, tiny_vit

from mmc.extract.backbones import hf_captioner
from mmc.extract.captions import CaptionConfig, CaptionReport, caption
from mmc.extract.images import decode
from mmc.extract.pipeline import ExtractConfig, extract
from mmc.extract.sources import SourceOptions, read_source
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError

HEADER = ("id", "image", "text", "labels", "split", "year")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_blip_captioner(tmp_path_factory.mktemp("models") / "captioner")


def picture(seed: int) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(cells).resize((57 + seed, 70), 3).save(file, "JPEG")
    return file.getvalue()


class Case:
    """A folder with a table and pictures, and what was said."""

    def __init__(self, folder: Path, model: str, count: int = 14) -> None:
        self.folder, self.model = folder, model
        self.said: list[str] = []
        self.rows = [
            {
                "id": f"s{number}",
                "image": f"{number}.jpg",
                "text": f"the {number}th, with a comma",
                "labels": ("red|blue", "red", "", "blue, or so")[number % 4],
                "split": ("train", "train", "val")[number % 3],
                "year": str(1990 + number),
            }
            for number in range(count)
        ]
        (folder / "images").mkdir(parents=True)
        for number in range(count):
            (folder / "images" / f"{number}.jpg").write_bytes(picture(number))

    @property
    def table(self) -> Path:
        path = self.folder / "samples.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, HEADER)
            writer.writeheader()
            writer.writerows(self.rows)
        return path

    def caption(self, out: str = "out.csv", source: str | None = None, **settings: Any) -> Any:
        progress = settings.pop("progress", lambda *_: None)
        self.said.clear()
        return caption(
            source or str(self.table),
            str(self.folder / out),
            config(self.model, **settings),
            report=self.said.append,
            progress=progress,
        )

    def read(self, out: str = "out.csv") -> list[dict[str, str]]:
        with (self.folder / out).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def config(model: str, **settings: Any) -> CaptionConfig:
    if "options" in settings:
        settings["source"] = settings.pop("options")
    defaults = {"device": "cpu", "precision": "float32", "batch_size": 4}
    defaults |= {"max_tokens": 10, "min_tokens": 1}  # the tiny model is often content with none
    return CaptionConfig(backbone=model, **{**defaults, **settings})


@pytest.fixture
def case(tmp_path: Path, model: str) -> Case:
    return Case(tmp_path / "set", model)


def reference(model: str, files: list[bytes], prompt: str, **settings: Any) -> list[str]:
    """What the library's own `generate` and tokenizer give for these pictures as one batch."""
    folder = model.partition(":")[2]
    network = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(data)) for data in files]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    given: dict[str, Any] = {}
    if prompt:
        given = dict(tokenizer([prompt] * len(files), return_tensors="pt"))
        given.pop("token_type_ids", None)
    with torch.no_grad():
        ids = network.generate(pixels, **given, **settings)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.removeprefix(prompt).strip() for text in texts]


@pytest.mark.parametrize(
    ("prompt", "beams", "least"), [("a picture of", 3, 0), ("", 3, 0), ("the red dog", 1, 6)]
)
def test_captions_are_those_of_the_library(model: str, prompt: str, beams: int, least: int):
    files = [picture(seed) for seed in range(6)]
    wanted = reference(
        model,
        files,
        prompt,
        num_beams=beams,
        max_new_tokens=10,
        min_new_tokens=least,
        do_sample=False,
    )
    decoding = hf_captioner.Decoding(prompt=prompt, beams=beams, max_tokens=10, min_tokens=least)
    captioner = hf_captioner.load_captioner(model, decoding, device="cpu", precision="float32")
    pixels = torch.stack([decode(data, captioner.image_transform) for data in files])
    kept = pixels.clone()
    found = captioner(pixels)
    assert found == wanted
    assert len(set(found)) > 3
    assert captioner(pixels) == found
    assert torch.equal(pixels, kept)
    for row in (0, 3):
        assert captioner(pixels[[row]]) == [found[row]]


def test_a_column_is_added_to_all_samples(case: Case):
    case.rows[3]["image"] = ""
    before = list(case.rows)
    report = case.caption()
    assert isinstance(report, CaptionReport)
    rows = case.read()
    assert list(rows[0]) == ["id", "split", "labels", "text", "image", "caption", "year"]
    for name in ("id", "split", "text", "year"):
        assert [row[name] for row in rows] == [row[name] for row in before]
    assert [row["caption"] != "" for row in rows] == [n != 3 for n in range(14)]
    assert len({row["caption"] for row in rows}) > 8
    counts = (report.samples, report.captioned, report.without_image, report.failed, report.reused)
    assert counts == (14, 13, 1, 0, 0)
    assert report.written == 13
    assert report.rate > 0
    assert not any("warning: " + str(case.folder / "out.csv") in line for line in case.said)
    left = sorted(path.name for path in case.folder.iterdir())
    assert left == ["images", "out.csv", "samples.csv"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_extract_reads_the_table_as_it_is(form: str, case: Case, tmp_path: Path):
    """From the captions to a store, with no option but the template."""
    bert, vit = tiny_bert(tmp_path / "bert"), tiny_vit(tmp_path / "vit")
    case.rows[5]["image"] = ""
    case.caption(f"out.{form}")
    before = read_source(str(case.table))
    said: list[str] = []
    options = SourceOptions(text_template="{text} [SEP] {caption}")
    extract(
        str(case.folder / f"out.{form}"),
        str(tmp_path / "store"),
        ExtractConfig(
            backbones=(bert, vit),
            names=("words", "eyes"),
            device="cpu",
            precision="float32",
            source=options,
        ),
        report=said.append,
    )
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.label_set == before.label_set
    assert store.task == before.task == "multilabel"
    table = store.samples
    for name in ("id", "split", "labels"):
        assert table[name].to_pylist() == before.table[name].to_pylist(), name
    texts = table["text"].to_pylist()
    for row, text in zip(case.rows, texts, strict=True):
        assert text.startswith(f"{row['text']} [SEP] ")
    assert len(texts[0]) > len(case.rows[0]["text"] + " [SEP] ")
    assert store["words/text"].done.all()
    assert store["eyes/image"].done.tolist() == [n != 5 for n in range(14)]
    assert any("13 found" in line for line in said)


def test_unlabelled_is_not_none_of_the_labels(case: Case):
    """In a Parquet table, and in a CSV file of several labels, both can be said."""
    lines = [
        {"id": f"s{n}", "image": f"{n}.jpg", "labels": labels, "text": "x"}
        for n, labels in enumerate([["red", "blue"], [], None, ["red"]])
    ]
    source = case.folder / "samples.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    before = read_source(str(source))
    assert before.table["labels"].to_pylist() == [[0, 1], [], None, [1]]
    for out in ("out.csv", "out.parquet"):
        case.caption(out, source=str(source))
        back = read_source(str(case.folder / out))
        assert back.table["labels"].to_pylist() == before.table["labels"].to_pylist()
        assert not any("warning" in line and out in line for line in case.said)


@pytest.mark.parametrize("labels", [("yes", "no"), ("cat", "dog", "bird"), ("0", "1")])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_one_label_each(labels: tuple[str, ...], form: str, case: Case):
    for number, row in enumerate(case.rows):
        row["labels"] = labels[number % len(labels)]
    case.caption(f"out.{form}")
    before, back = read_source(str(case.table)), read_source(str(case.folder / f"out.{form}"))
    assert (back.task, back.label_set) == (before.task, before.label_set)
    assert back.table["labels"].to_pylist() == before.table["labels"].to_pylist()


def test_what_a_table_cannot_hold_is_said(case: Case):
    """One label each, with a bar in some names: a table of text reads these as several labels."""
    lines = [{**row, "labels": [["a|b", "c", "d"][n % 3]]} for n, row in enumerate(case.rows)]
    source = case.folder / "odd.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    case.caption(source=str(source), options=SourceOptions(task="multiclass"))
    said = [line for line in case.said if line.startswith(f"warning: {case.folder / 'out.csv'}")]
    assert any("it reads as multilabel; give --task multiclass" in line for line in said)
    assert any("samples have other labels when it is read" in line for line in said)


def test_each_distinct_picture_is_captioned_once(case: Case, monkeypatch: Any):
    seen: list[int] = []
    call = hf_captioner.Captioner.__call__

    def counted(self: Any, pixels: Any) -> list[str]:
        seen.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(hf_captioner.Captioner, "__call__", counted)
    (case.folder / "images" / "copy.jpg").write_bytes(picture(2))
    case.rows[7]["image"] = "copy.jpg"  # another name of the same bytes
    case.rows[9]["image"] = "2.jpg"
    report = case.caption()
    assert seen == [4, 4, 4]
    assert (report.written, report.captioned) == (12, 14)
    rows = case.read()
    assert rows[2]["caption"] == rows[7]["caption"] == rows[9]["caption"] != ""


def test_duplicates_are_dropped_when_asked(case: Case):
    for row in case.rows[1:4]:
        row |= {"image": case.rows[0]["image"], "text": case.rows[0]["text"]}
    case.rows[3]["text"] = "another"
    result = case.caption(options=SourceOptions(dedupe=True))
    rows = case.read()
    assert [row["id"] for row in rows] == ["s2", *(f"s{n}" for n in range(3, len(case.rows)))]
    assert result.samples == len(rows)
    assert any("2 samples have the image and the text of another" in line for line in case.said)


def test_pictures_that_cannot_be_used(case: Case):
    undisturbed = case.caption("whole.csv") and case.read("whole.csv")
    (case.folder / "images" / "1.jpg").write_bytes(b"<html>gone</html>")
    (case.folder / "images" / "6.jpg").unlink()
    (case.folder / "images" / "6.jpg").symlink_to("nowhere.jpg")
    (case.folder / "images" / "8.jpg").write_bytes(picture(8)[:300])
    report = case.caption()
    rows = case.read()
    assert report.failed == 3
    assert report.captioned == 11
    assert {row["id"] for row in rows if not row["caption"]} == {"s1", "s6", "s8"}
    assert [line.partition(": ")[0] for line in report.failures] == ["s1", "s6", "s8"]
    assert "HTML" in report.failures[0]
    assert any("3 samples have a picture that cannot be used" in line for line in case.said)
    # Places in a batch are kept, so the batch of picture 1 has the captions that it had.
    for row in (0, 2, 3):
        assert rows[row]["caption"] == undisturbed[row]["caption"]


def test_a_batch_of_nothing_but_bad_pictures(case: Case):
    for number in range(4):
        (case.folder / "images" / f"{number}.jpg").write_bytes(f"bad {number}".encode())
    report = case.caption()
    assert (report.failed, report.captioned) == (4, 10)


class Interrupt:
    """A progress that stops the run after some batches."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "captions" and done >= self.pictures:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(case: Case, monkeypatch: Any):
    case.caption("whole.csv")
    with pytest.raises(KeyboardInterrupt):
        case.caption(progress=Interrupt(8))
    assert any("the same command goes on" in line for line in case.said)
    assert not (case.folder / "out.csv").exists()
    journal = case.folder / "out.csv.journal"
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 1 + 8
    calls = count_calls(monkeypatch)
    report = case.caption()
    assert (report.reused, report.written) == (8, 6)
    assert calls == [4, 2]
    assert any("8 pictures were captioned before" in line for line in case.said)
    assert (case.folder / "out.csv").read_bytes() == (case.folder / "whole.csv").read_bytes()
    assert not journal.exists()


def count_calls(monkeypatch: Any) -> list[int]:
    calls: list[int] = []
    call = hf_captioner.Captioner.__call__

    def counted(self: Any, pixels: Any) -> list[str]:
        calls.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(hf_captioner.Captioner, "__call__", counted)
    return calls


def test_a_torn_journal_is_used_as_far_as_it_is_whole(case: Case, monkeypatch: Any):
    case.caption("whole.csv")
    with pytest.raises(KeyboardInterrupt):
        case.caption(progress=Interrupt(8))
    journal = case.folder / "out.csv.journal"
    journal.write_bytes(journal.read_bytes()[:-7])  # in the middle of picture 8's line
    calls = count_calls(monkeypatch)
    report = case.caption()
    # Its batch is computed whole, so that the caption is the same.
    assert (report.reused, report.written, calls) == (7, 7, [4, 4, 2])
    assert (case.folder / "out.csv").read_bytes() == (case.folder / "whole.csv").read_bytes()


def test_a_killed_run_goes_on(case: Case):
    """SIGKILL while it writes captions; then the same command."""
    case.caption("whole.csv")
    code = textwrap.dedent(
        f"""
        import time
        from mmc.extract.backbones import hf_captioner
        from mmc.extract.captions import CaptionConfig, caption

        call = hf_captioner.Captioner.__call__

        def slow(self, pixels):
            found = call(self, pixels)
            time.sleep(0.5)
            return found

        hf_captioner.Captioner.__call__ = slow
        config = CaptionConfig(backbone={case.model!r}, device="cpu", precision="float32",
                               batch_size=4, max_tokens=10, min_tokens=1)
        caption({str(case.table)!r}, {str(case.folder / "out.csv")!r}, config)
        """
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = case.folder / "out.csv.journal"
    try:
        for _ in range(1200):
            if journal.exists() and journal.read_bytes().count(b"\n") > 4:
                break
            assert running.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert not (case.folder / "out.csv").exists()
    report = case.caption()
    assert report.reused >= 4
    assert (case.folder / "out.csv").read_bytes() == (case.folder / "whole.csv").read_bytes()
    assert sorted(path.name for path in case.folder.iterdir()) == [
        *("images", "out.csv", "samples.csv", "whole.csv")
    ]


def test_a_journal_of_other_settings(case: Case):
    with pytest.raises(KeyboardInterrupt):
        case.caption(progress=Interrupt(4))
    with pytest.raises(InputError, match=r"made otherwise \(decoding.beams\)") as found:
        case.caption(beams=2)
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=r"batch_size, decoding.prompt"):
        case.caption(batch_size=3, prompt="the")
    report = case.caption(beams=2, overwrite=True)
    assert report.reused == 0
    assert report.written == 14


def test_one_process_at_a_time(case: Case):
    with (
        filelock.FileLock(case.folder / "out.csv.journal.lock"),
        pytest.raises(MmcError, match="written by another process"),
    ):
        case.caption()


def test_a_finished_table_is_not_written_over(case: Case):
    case.caption()
    with pytest.raises(InputError, match=r"out\.csv exists; name another OUT, or replace it"):
        case.caption()
    before = (case.folder / "out.csv").read_bytes()
    case.caption(overwrite=True, prompt="the")
    assert (case.folder / "out.csv").read_bytes() != before


def test_a_grown_source_keeps_what_was_captioned(case: Case):
    rows = list(case.rows)
    case.rows = rows[:9]
    with pytest.raises(KeyboardInterrupt):
        case.caption(progress=Interrupt(8))
    case.rows = rows
    assert case.caption().reused == 8


def test_pictures_elsewhere_are_reached_through_a_link(case: Case, tmp_path: Path):
    (tmp_path / "results").mkdir()
    out = "../results/out.csv"
    case.caption(out)
    link = tmp_path / "results" / "out.images"
    assert link.is_symlink()
    assert any(f"through the link {link}" in line for line in case.said)
    rows = case.read(out)
    assert rows[4]["image"] == "out.images/4.jpg"
    back = read_source(str(tmp_path / "results" / "out.csv"))
    assert back.source["counts"]["missing_images"] == 0
    assert back.source["image_root"] == str(tmp_path / "results")
    case.caption(out, overwrite=True)  # the link is there already
    link.unlink()
    for make in (lambda: link.mkdir(), lambda: link.rmdir() or link.symlink_to(tmp_path)):
        make()
        with pytest.raises(InputError, match=r"in the way of a link to .*images; move it away"):
            case.caption(out, overwrite=True)


def write_tar(path: Path, count: int = 5) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            parts = {
                "jpg": picture(number),
                "txt": f"text {number}".encode(),
                "cls": str(number % 2).encode(),
            }
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, count: int = 5) -> None:
    table = pa.table(
        {
            "image": [picture(number) for number in range(count)],
            "text": [f"text {number}" for number in range(count)],
            "label": [str(number % 2) for number in range(count)],
        }
    )
    pq.write_table(table, path)


@pytest.mark.parametrize("name", ["train-000.tar", "inner/data.parquet"])
def test_pictures_in_other_files(name: str, case: Case, tmp_path: Path):
    """Their place in them is kept, which needs a Parquet table."""
    source = case.folder / name
    source.parent.mkdir(exist_ok=True)
    (write_tar if source.suffix == ".tar" else write_parquet)(source)
    with pytest.raises(InputError, match=r"lie inside other files.* a Parquet file: .*out\.p"):
        case.caption(source=str(source))
    case.caption("out.parquet", source=str(source))
    assert not any(str(case.folder / "out.parquet") in line for line in case.said[:-1])
    table = pq.read_table(case.folder / "out.parquet")
    assert table["image_offset"].null_count == 0
    settings = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 1}
    wanted = reference(case.model, [picture(n) for n in range(4)], "a picture of", **settings)
    assert table["caption"].to_pylist()[:4] == wanted
    config = ExtractConfig(
        backbones=(tiny_vit(tmp_path / "vit"),),
        names=("eyes",),
        device="cpu",
        precision="float32",
        fields=("image",),
    )
    arrays = []
    for at in (source, case.folder / "out.parquet"):
        store = tmp_path / f"{at.name}.store"
        extract(str(at), str(store), config, report=lambda _: None)
        arrays.append(EmbeddingStore.open(store)["eyes/image"][:])
    np.testing.assert_array_equal(*arrays)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "out.txt"}, r"name a file that ends in \.csv or \.parquet"),
        ({"out": "samples.csv", "overwrite": True}, "is the source itself"),
        ({"column": "text"}, "has a column 'text' already"),
        ({"column": "year"}, "has a column 'year' already; name another with --column"),
        ({"max_tokens": 60}, "writes .* tokens at most behind that prompt, and 60 are asked for"),
    ],
)
def test_what_cannot_be_written(settings: dict[str, Any], message: str, case: Case):
    with pytest.raises(InputError, match=message) as found:
        case.caption(**settings)
    assert "\n" not in str(found.value)
    assert not list(case.folder.glob("out*"))


def test_a_table_within_its_source(case: Case):
    """It would change what the folder is: pictures alone, or tables for each split."""
    pictures = case.folder / "images" / "red"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(picture(1))
    with pytest.raises(InputError, match=r"would become part of the source .*; name a file"):
        case.caption("images/out.csv", source=str(case.folder / "images"))
    case.caption("out.csv", source=f"train={case.table}")
    assert case.read()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "--beams must be 1 or more"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"min_tokens": 11, "max_tokens": 10}, r"--min-tokens must be 0 to --max-tokens \(10\)"),
        ({"column": " "}, "--column must be a name"),
        ({"backbone": "nonsense"}, "not of the form family:name"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        CaptionConfig(**{"backbone": "hf:x", "max_tokens": 10, **settings})


def test_models_that_write_no_captions(case: Case, tmp_path: Path):
    cases = {
        tiny_blip(tmp_path / "blip"): "is a BlipForImageTextRetrieval, which writes no captions",
        tiny_bert(tmp_path / "bert"): "models of type 'bert' write no captions",
        "open_clip:ViT-B-32/openai": "writes no captions here",
        f"{case.model}[enc_token=enc]": "has no setting 'enc_token'",
        "hf:/no/such": "no such folder",
    }
    for spec, message in cases.items():
        with pytest.raises(InputError, match=message) as found:
            caption(str(case.table), str(case.folder / "out.csv"), config(spec))
        assert "\n" not in str(found.value)


def test_a_source_without_pictures(case: Case):
    source = case.folder / "words.csv"
    source.write_text("text,label\none,a\ntwo,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no pictures to caption"):
        case.caption(source=str(source))


def test_bf16_and_greedy(case: Case):
    report = case.caption(precision="bf16", beams=1)
    assert report.captioned == 14


def test_an_adapter_is_part_of_what_made_a_caption(case: Case, tmp_path: Path):
    from safetensors.torch import save_file

    module = "vision_model.encoder.layers.0.mlp.fc1"
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(4, 48, generator=draw),
        f"base_model.model.{module}.lora_B.weight": torch.randn(64, 4, generator=draw),
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    case.caption("plain.csv")
    with pytest.raises(KeyboardInterrupt):
        case.caption(progress=Interrupt(4))
    case.model += f"[lora={tmp_path / 'adapter'}]"
    with pytest.raises(InputError, match=r"made otherwise \(adapter\)"):
        case.caption()
    case.caption(overwrite=True)
    texts = [[row["caption"] for row in case.read(name)] for name in ("plain.csv", "out.csv")]
    assert texts[0] != texts[1]


def test_options_need_no_torch():
    code = "import mmc.extract.captions_options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
