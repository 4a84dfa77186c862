"""docs/own-backbone.md: its example is run exactly as it is printed there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_vision import blocks_of_colour, normalised, settle

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError

PAGE = (Path(__file__).parents[2] / "docs" / "own-backbone.md").read_text(encoding="utf-8")
EXAMPLE, FAMILY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SPEC = "python:small_resnet:SmallResNet[weights=small.safetensors]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's module and its weights."""
    (tmp_path / "small_resnet.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("small_resnet", "small_resnet_family"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import small_resnet

    torch.manual_seed(0)
    network = small_resnet.Network().eval()
    settle(network, normalised(blocks_of_colour(8, (32, 32))))
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    return tmp_path


def load(spec: str, precision: str = "float32") -> Backbone:
    return load_backbone(spec, device="cpu", precision=precision)


def test_the_example_is_short():
    assert len(EXAMPLE.splitlines()) <= 30


def test_mmc_extract_with_the_example(folder: Path):
    rows = ["id,image,labels"]
    for at, picture in enumerate(blocks_of_colour(6, (40, 50))):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{at}.png")
        rows.append(f"{at},{at}.png,{'cat' if at % 2 else 'dog'}")
    (folder / "photos.csv").write_text("\n".join(rows), encoding="utf-8")
    assert f'mmc extract photos.csv photos.store --backbone "{SPEC}"' in PAGE
    code = "import sys; from mmc.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "extract", "photos.csv", "photos.store"]
    command += ["--backbone", SPEC, "--precision", "float32"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    store = EmbeddingStore.open(folder / "photos.store")
    (alias,) = store.aliases
    feature = store[f"{alias}/image"]
    assert feature.shape == (6, 64)
    assert feature.done.all()
    assert feature[:].std(axis=0).max() > 0


@torch.no_grad()
def test_its_numbers_are_the_networks(folder: Path):
    import small_resnet

    backbone = load(SPEC)
    shapes = {name: spec.shape for name, spec in backbone.fields.items()}
    assert shapes == {"image": (64,), "image_tokens": (64, 64)}
    network = small_resnet.Network().eval()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(folder / "small.safetensors"))
    pixels = blocks_of_colour(4, (32, 32), seed=5)
    transform = small_resnet.SmallResNet.transform
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
    wanted = network((pixels / 255 - mean) / std)
    found = backbone.encode_image(pixels, ["image", "image_tokens"])
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)
    assert (wanted["image"] - wanted["image"].mean(0)).norm() > 0.05 * wanted["image"].norm()
    rounded = load(SPEC, "bf16").encode_image(pixels, ["image"])["image"]
    assert torch.cosine_similarity(rounded, wanted["image"]).min() > 0.999
    assert backbone.context["resolved_spec"] == SPEC.replace("=", f"={folder}/")


def test_options_weights_and_identity(folder: Path):
    import small_resnet

    plain = load(SPEC)
    wide = small_resnet.Network(width="8").state_dict()
    torch.save({"state_dict": wide}, folder / "narrow.pth")
    other = load("python:small_resnet:SmallResNet[weights=narrow.pth,width=8]")
    assert other.fields["image"].shape == (32,)
    assert other.identity != plain.identity
    assert load(SPEC, "bf16").identity != plain.identity
    assert load(f"{SPEC[:-1]},pyramid=2]").fields["image_tokens"].shape == (5 * 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"needs its weights: python:small_resnet:SmallResNet\[weights=FILE\]"),
        ("[weights=none.pth]", "no such checkpoint file"),
        ("[weights=small.safetensors,width=8]", r"0\.conv1\.weight is \[16, 3, 3, 3\], the model"),
        ("[weights=small.safetensors,depth=3]", "cannot be built with .*depth"),
    ],
)
def test_what_cannot_be_built(options: str, message: str, folder: Path):
    with pytest.raises(InputError, match=message) as found:
        load(f"python:small_resnet:SmallResNet{options}")
    assert "\n" not in str(found.value)


def test_a_family_of_ones_own(folder: Path):
    """The page's entry point, as an installed package declares it."""
    declared = re.search(
        r"```toml\n\[project\.entry-points\.\"(.*?)\"\]\n(.*?)```", PAGE, re.DOTALL
    )
    assert declared is not None
    group, line = declared[1], declared[2]
    line = re.sub(r'"', "", line)
    (folder / "small_resnet_family.py").write_text(FAMILY, encoding="utf-8")
    info = folder / "small_resnet-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small-resnet\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}")
    backbone = load("small:small.safetensors")
    assert backbone.identity == load(SPEC).identity
