"""Tiny models saved in the real formats, with weights that tell inputs apart.

Fresh towers are nearly flat: residual branches of random initialisation are so small that every
input gives the same output, and then every test passes. So all weight matrices are drawn anew with
a gain that keeps each block's share of the result large.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn


def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Fill ``model`` in place: matrices with 1.3 / sqrt(fan in), norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            embedding = "embed" in name
            fan = 1 if embedding else math.prod(parameter.shape[1:])
            gain = 1.3 if parameter.ndim == 2 else 1.6  # convolutions lose more of their input
            parameter.data = noise * (0.3 if embedding else gain / math.sqrt(fan))
        elif name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.2 * noise
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
"""A CLIP with a ViT of 16 patches; open_clip's own vocabulary, so its tokenizer works."""


def tiny_open_clip(folder: str | Path, config: dict | None = None, seed: int = 0) -> str:
    """Save a small open_clip model as a folder that open_clip loads; its spec string."""
    import open_clip
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config or OPEN_CLIP_CONFIG
    settings = {
        "model_cfg": config,
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = _build_open_clip(config)
    draw_weights(model, seed)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"open_clip:{folder}"


def _build_open_clip(config: dict) -> nn.Module:
    import open_clip

    config = json.loads(json.dumps(config))
    hf_text = "hf_model_name" in config["text_cfg"]
    if hf_text:
        config["text_cfg"]["hf_model_pretrained"] = False
    if config.pop("custom_text", False) or hf_text:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    else:
        kind = open_clip.CLIP
    return kind(**config)


WORDS = (
    *("a", "photo", "picture", "of", "the", "one", "two", "three", "four", "five", "six", "seven"),
    *("eight", "nine", "zero", "red", "green", "blue", "small", "large", "dog", "cat", "horse"),
    *("car", "tree", "house", "runs", "sits", "stands", "under", "over", "on", "in", "and"),
)
"""What the tiny tokenizers know in whole; other words are spelled."""


def tiny_hf_clip(folder: str | Path, seed: int = 0, **text: Any) -> str:
    """Save a small transformers CLIP with its processor and a byte-level BPE tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = {token: at for at, token in enumerate(letters + [f"{c}</w>" for c in letters])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={
            **_SMALL,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 32,
            "pad_token_id": tokenizer.eos_token_id,
            **ends,
            **text,
        },
        vision_config={**_SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return _save_hf(CLIPModel(config), folder, seed)


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_hf_siglip(folder: str | Path, seed: int = 0) -> str:
    """Save a small transformers SigLIP; texts are padded to 16 tokens and pooled at the last."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    tokenizer = _word_tokenizer(["<pad>", "<eos>", "<unk>"], "$A <eos>", [("<eos>", 1)])
    _fast(tokenizer, pad="<pad>", eos="<eos>", unk="<unk>", length=16).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = SiglipConfig(
        text_config={
            **_SMALL,
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "projection_size": 32,
        },
        vision_config={**_SMALL, "image_size": 32, "patch_size": 8},
    )
    return _save_hf(SiglipModel(config), folder, seed)


def tiny_bert(folder: str | Path, seed: int = 0) -> str:
    """Save a small BERT, without a sentence-transformers layer, as hub checkpoints come."""
    from transformers import BertConfig, BertModel

    tokenizer = _bert_tokenizer(length=int(1e30))
    tokenizer.save_pretrained(folder)
    config = BertConfig(**_SMALL, vocab_size=len(tokenizer), max_position_embeddings=40)
    return _save_hf(BertModel(config), folder, seed)


def _bert_tokenizer(*, length: int) -> Any:
    """As BERT's: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then what ``WORDS`` are made of."""
    names = ("pad", "unk", "cls", "sep", "mask")
    specials = {name: f"[{name.upper()}]" for name in names}
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer = _word_tokenizer([*specials.values()], "[CLS] $A [SEP]", ends)
    return _fast(tokenizer, **specials, length=length)


def tiny_blip(folder: str | Path, seed: int = 0) -> str:
    """Save a small BLIP for retrieval; as in the large one, the towers differ in width."""
    from transformers import BlipForImageTextRetrieval

    return _save_hf(BlipForImageTextRetrieval(_blip_config(folder)), folder, seed)


def tiny_blip_captioner(folder: str | Path, seed: int = 0) -> str:
    """Save a small BLIP that writes captions: words of ``WORDS``, and now and then an end."""
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    model = BlipForConditionalGeneration(_blip_config(folder))
    draw_weights(model, seed)
    words = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(WORDS))
    bias = model.text_decoder.cls.predictions.bias.data
    bias.fill_(-50.0)
    bias[words] = 0.0
    bias[3] = 4.0  # [SEP]
    model.save_pretrained(folder)
    return f"hf:{folder}"


def _blip_config(folder: str | Path) -> Any:
    """A config, with its tokenizer and image processor saved. [DEC] and [ENC] end the vocabulary.

    The library's own initial vision weights (1e-10) would give every picture the same output, and
    its default of 8 heads is that of no checkpoint.
    """
    from transformers import BlipConfig, BlipImageProcessor

    words = _bert_tokenizer(length=512)
    words.save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    special = {"pad_token_id": 0, "sep_token_id": 3, "bos_token_id": len(words)}
    return BlipConfig(
        text_config={
            **_SMALL,
            **special,
            "vocab_size": len(words) + 2,
            "max_position_embeddings": 64,
        },
        vision_config={
            **_SMALL,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        image_text_hidden_size=16,
    )


def tiny_vit(folder: str | Path, seed: int = 0) -> str:
    """Save a small ViT as most are published: a classifier."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = ViTConfig(**_SMALL, image_size=32, patch_size=8, num_labels=5)
    return _save_hf(ViTForImageClassification(config), folder, seed)


def tiny_dinov2(folder: str | Path, seed: int = 0, registers: int = 0) -> str:
    """Save a small DINOv2, used at another size than its positions were trained for."""
    import transformers

    transformers.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind, more = (
        ("Dinov2WithRegisters", {"num_register_tokens": registers})
        if registers
        else (
            "Dinov2",
            {},
        )
    )
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, image_size=48, patch_size=8)
    return _save_hf(getattr(transformers, f"{kind}Model")(config), folder, seed)


def tiny_vision_text(folder: str | Path, vision: str = "vit", text: str = "bert") -> str:
    """Save a small VisionTextDualEncoder of two towers of these kinds."""
    import transformers

    tokenizer = _bert_tokenizer(length=24)
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    sizes = {"image_size": 32, "patch_size": 8}
    visions = {
        "vit": lambda: transformers.ViTConfig(**_SMALL, **sizes),
        "clip": lambda: transformers.CLIPVisionConfig(**_SMALL, **sizes),
        "siglip": lambda: transformers.SiglipVisionConfig(**_SMALL, **sizes),
    }
    texts = {
        "bert": lambda: transformers.BertConfig(
            **_SMALL, vocab_size=len(tokenizer), max_position_embeddings=24
        ),
        "roberta": lambda: transformers.RobertaConfig(
            **_SMALL, vocab_size=len(tokenizer), max_position_embeddings=25, pad_token_id=0
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            dim=32, n_heads=2, n_layers=1, hidden_dim=64, vocab_size=len(tokenizer)
        ),
    }
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        visions[vision](), texts[text](), projection_dim=16
    )
    return _save_hf(transformers.VisionTextDualEncoderModel(config), folder, 0)


def _word_tokenizer(specials: list[str], template: str, ends: list[tuple[str, int]]) -> Any:
    """A WordPiece tokenizer that knows ``WORDS`` and letters."""
    import string

    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = list(
        dict.fromkeys([*specials, *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    )
    unknown = next(special for special in specials if "unk" in special.lower())
    tokenizer = Tokenizer(
        WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token=unknown)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return tokenizer


def _fast(tokenizer: Any, *, length: int, **specials: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    named = {f"{name}_token": token for name, token in specials.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **named)


def _save_hf(model: Any, folder: str | Path, seed: int) -> str:
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return f"hf:{folder}"
