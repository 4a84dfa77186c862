"""Each family of backbones at its real size: the pipeline against the bare forward pass.

    python benchmarks/bench_families.py [--only open_clip,blip] [--rounds 3] [--scale 1.0]

Weights are random and saved here in the families' own formats; pictures are JPEGs of 500 x 375.
Every contender runs in a process of its own, so that its peak memory is its own: the bare forward
pass on ready tensors (as many threads as cores), `mmc extract` from files to store, a plain loop
(Pillow, then the same network), and a DataLoader with a worker per core feeding the same network.
All use the same batch size and precision. Loading is not counted; rounds are interleaved.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from bench_extract import bare, make_set
from PIL import Image
from torch import Tensor

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone, default_precision
from mmc.extract.settings import usable_cores
from mmc.extract.transforms import ImageTransform, OriginalSize

RESNET_101 = (3, 4, 23, 3)
CONTENDERS = ("bare", "extract", "loop", "loader")
FAMILIES: dict[str, tuple[int, int]] = {
    "open_clip": (128, 16),
    "open_clip_pyramid": (32, 4),
    "dinov2": (64, 8),
    "blip": (24, 4),
    "resnet50": (128, 16),
    "fasterrcnn": (8, 2),
    "fasterrcnn_vg": (8, 2),
}
"""Pictures and batch size."""


def make(family: str, folder: Path) -> str:
    """Save a network with random weights; its spec."""
    torch.manual_seed(0)
    if family.startswith("open_clip"):
        import open_clip

        path = folder / "open_clip.pt"
        torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), path)
        return f"open_clip:ViT-B-32/{path}" + ("[pyramid=2]" if "pyramid" in family else "")
    if family in ("resnet50", "fasterrcnn", "fasterrcnn_vg"):
        return _save_torchvision(family, folder / f"{family}.pth")
    return _save_hf(family, folder / family)


def _save_torchvision(family: str, path: Path) -> str:
    from torchvision.models import resnet50
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    if family == "resnet50":
        torch.save(resnet50(weights=None).state_dict(), path)
        return f"torchvision:resnet50/{path}"
    if family == "fasterrcnn":
        model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        torch.save(model.state_dict(), path)
        return f"fasterrcnn:{path}"
    from mmc.extract.backbones.fasterrcnn_vg_model import VisualGenomeDetector

    torch.save({"model": VisualGenomeDetector(RESNET_101, 1601).state_dict()}, path)
    return f"fasterrcnn_vg:{path}"


def _save_hf(family: str, folder: Path) -> str:
    import transformers as t

    size = {"height": 384, "width": 384}
    if family == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(image_size=518))
        processor = t.BitImageProcessor(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
        )
    else:
        text = {"encoder_hidden_size": 768, "num_attention_heads": 12}
        model = t.BlipForImageTextRetrieval(
            t.BlipConfig(text_config=text, vision_config={"initializer_range": 0.02})
        )
        processor = t.BlipImageProcessor(size=size)
        _tokenizer(model.config.text_config.vocab_size).save_pretrained(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"hf:{folder}"


def _tokenizer(size: int) -> Any:
    """BERT's, with words nobody uses."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def by_pillow(path: Path, transform: ImageTransform) -> Tensor:
    """uint8 (3, H, W) as one gets it from Pillow."""
    image = Image.open(path).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    if isinstance(transform, OriginalSize):
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
    height, width = transform.resized(image.height, image.width)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (
        transform.crop_start(side, wanted)
        for side, wanted in zip((height, width), transform.size, strict=True)
    )
    image = image.crop((left, top, left + transform.size[1], top + transform.size[0]))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(*transform.size, 3).permute(2, 0, 1).contiguous()


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a DataLoader reads."""

    def __init__(self, folder: Path, count: int, transform: ImageTransform) -> None:
        self.folder, self.count, self.transform = folder, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        return by_pillow(self.folder / f"{number}.jpg", self.transform)


def contend(name: str, spec: str, folder: Path, count: int, batch: int) -> dict[str, float]:
    """Pictures per second of one contender, and its peak memory in MB."""
    backbone = load_backbone(spec, device="cpu", precision=default_precision("cpu"))
    fields = [f for f in backbone.default_fields if backbone.fields[f].tower == "image"]
    if "image_places" in backbone.fields:  # a pyramid's pooled vector is that of the picture alone
        fields = ["image_tokens"]
    works: dict[str, Callable[[], float]] = {
        "bare": lambda: _bare(backbone, fields, folder, count, batch),
        "extract": lambda: _extract(backbone, spec, fields, folder, count, batch),
        "loop": lambda: _loop(backbone, fields, _batches(backbone, folder, count, batch), count),
        "loader": lambda: _loop(backbone, fields, _loader(backbone, folder, count, batch), count),
    }
    rate = works[name]()
    return {"rate": rate, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _bare(backbone: Backbone, fields: list[str], folder: Path, count: int, batch: int) -> float:
    pixels = next(iter(_batches(backbone, folder, batch, batch)))
    work = [lambda: backbone.encode_image(pixels, fields)] * -(-count // batch)
    with torch.no_grad():
        backbone.encode_image(pixels, fields)
    return batch * bare(work, usable_cores())


def _extract(
    backbone: Backbone, spec: str, fields: list[str], folder: Path, count: int, batch: int
) -> float:
    from mmc.extract import pipeline
    from mmc.extract.options import ExtractConfig
    from mmc.extract.sources import SourceOptions

    pipeline.load_backbone = lambda *_, **__: backbone  # loaded and warm, as for the others
    table = folder / f"first-{count}.csv"
    table.write_text("id,image\n" + "".join(f"{n},{n}.jpg\n" for n in range(count)))
    with torch.no_grad():
        backbone.encode_image(next(iter(_batches(backbone, folder, batch, batch))), fields)
    with tempfile.TemporaryDirectory(dir=folder) as store:
        report = pipeline.extract(
            str(table),
            f"{store}/store",
            ExtractConfig(
                backbones=(spec,),
                names=("a",),
                fields=tuple(fields),
                batch_size=batch,
                device="cpu",
                source=SourceOptions(label_column="-"),
            ),
            report=lambda line: None,
        )
    return count / (report.seconds - report.load_seconds)


def _batches(backbone: Backbone, folder: Path, count: int, batch: int) -> Iterator[object]:
    transform = backbone.image_transform
    base = getattr(transform, "base", transform)
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        pictures = [by_pillow(folder / f"{number}.jpg", base) for number in numbers]
        yield _shaped(backbone, pictures)


def _shaped(backbone: Backbone, pictures: list[Tensor]) -> object:
    """As the network takes them; the tiles of a pyramid are all the same picture here."""
    shape = backbone.image_transform.shape if backbone.image_transform else None
    if shape is None:
        return pictures
    pixels = torch.stack(pictures)
    return pixels[:, None].expand(-1, shape[0], -1, -1, -1) if len(shape) == 4 else pixels


def _loader(backbone: Backbone, folder: Path, count: int, batch: int) -> Iterator[object]:
    base = getattr(backbone.image_transform, "base", backbone.image_transform)
    loader = torch.utils.data.DataLoader(
        Pictures(folder, count, base),
        batch,
        num_workers=usable_cores(),
        collate_fn=lambda pictures: pictures,
    )
    return (_shaped(backbone, pictures) for pictures in loader)


def _loop(backbone: Backbone, fields: list[str], batches: Iterator[object], count: int) -> float:
    torch.set_num_threads(usable_cores())
    start = time.perf_counter()
    features = []
    with torch.no_grad():
        for pixels in batches:
            features.append(backbone.encode_image(pixels, fields))
    return count / (time.perf_counter() - start)


def main() -> None:
    """Run the benchmark, or (called by itself) one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of pictures")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, spec, folder, count, batch = args.one
        print(json.dumps(contend(name, spec, Path(folder), int(count), int(batch))))
        return
    families = args.only.split(",")
    with tempfile.TemporaryDirectory(prefix="mmc-bench-") as root:
        folder = Path(root)
        counts = {
            name: max(FAMILIES[name][1], int(FAMILIES[name][0] * args.scale)) for name in families
        }
        make_set(folder, max(counts.values()))
        print(f"{'':18}{'bare/s':>8}" + "".join(f"{c + ' ÷ bare':>18}" for c in CONTENDERS[1:]))
        for family in families:
            bench(family, make(family, folder), folder, counts[family], args)


def bench(family: str, spec: str, folder: Path, count: int, args: argparse.Namespace) -> None:
    """Interleaved rounds of one family, and its line of the table."""
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.rounds):
        batch = FAMILIES[family][1]
        found = {}
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--one", name, spec, folder, count, batch]
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{family} {name}: {done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(found)
    line = f"{family:18}{statistics.median(r['bare']['rate'] for r in rounds):8.1f}"
    for name in CONTENDERS[1:]:
        ratios = sorted(r[name]["rate"] / r["bare"]["rate"] for r in rounds)
        line += f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})".rjust(18)
    peaks = (f"{name} {max(r[name]['peak'] for r in rounds):,.0f}" for name in CONTENDERS)
    print(line)
    print(f"{'':18}peak memory in MB: {', '.join(peaks)}", flush=True)


if __name__ == "__main__":
    main()
