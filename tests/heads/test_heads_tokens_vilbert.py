"""ViLBERT against its equations in float64, its official names, wrappings and order."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmc.heads.models.vilbert import Vilbert, VilbertConfig, with_global
from mmc.heads.models.vilbert_trunk import OFFICIAL, Sizes, Trunk, official_tensors, shapes
from mmc.heads.needs import mask_of
from mmc.store.errors import InputError

TINY = Sizes(
    vocabulary=30,
    start=2,
    positions=9,
    text_layers=4,
    text_width=12,
    text_heads=3,
    text_feedforward=20,
    region_features=10,
    region_layers=2,
    region_width=16,
    region_heads=4,
    region_feedforward=14,
    joint=8,
    joint_heads=2,
)
TEXT, REGIONS = 6, 5


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("mmc.heads.models.vilbert.OFFICIAL", TINY)
    return TINY


def vilbert(*, ids: bool = True, width: int = 12, random: bool = True, **settings) -> Vilbert:
    torch.manual_seed(0)
    text = {"text_ids": (TEXT,)} if ids else {"text_tokens": (TEXT, width)}
    inputs = {
        "regions": (REGIONS, 10),
        "boxes": (REGIONS, 5),
        "region_mask": (REGIONS,),
        **text,
        "text_mask": (TEXT,),
    }
    head = Vilbert(inputs, 3, VilbertConfig(**{"size": "official", **settings})).eval()
    if random:
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                around = 1.0 if re.search(r"LayerNorm\d?.weight", name) else 0.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return head


def batch(rows: int = 3, *, ids: bool = True, width: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    text_mask = torch.ones(rows, TEXT, dtype=torch.bool)
    region_mask = torch.ones(rows, REGIONS, dtype=torch.bool)
    text_mask[0, 4:], region_mask[0, 3:], region_mask[1:2, 1:] = False, False, False
    text = {"text_ids": torch.randint(30, (rows, TEXT), generator=g)}
    if not ids:
        text = {"text_tokens": torch.randn(rows, TEXT, width, generator=g)}
    return {
        "regions": torch.randn(rows, REGIONS, 10, generator=g),
        "boxes": torch.rand(rows, REGIONS, 5, generator=g),
        "region_mask": region_mask,
        "text_mask": text_mask,
        **text,
    }


# -- the equations, in numpy -----------------------------------------------------------------------


class Reference:
    """Sections 1 to 8 of the computation, one sample at a time; ``s`` maps names to arrays."""

    def __init__(self, state, sizes: Sizes) -> None:
        self.s = {name: tensor.double().numpy() for name, tensor in state.items()}
        self.sizes = sizes
        self.order: list[str] = []

    def linear(self, x, name):
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def norm(self, x, name):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-12) * self.s[f"{name}.weight"] + self.s[
            f"{name}.bias"
        ]

    @staticmethod
    def gelu(x):
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    @staticmethod
    def attend(q, k, v, mask, heads):
        out = np.zeros((len(q), v.shape[1]))
        size = q.shape[1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size) + (1 - mask) * -10000.0
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        return out

    def feedforward(self, x, before, after):
        hidden = self.gelu(self.linear(x, f"{before}.dense"))
        return self.norm(self.linear(hidden, f"{after}.dense") + x, f"{after}.LayerNorm")

    def layer(self, x, mask, name, heads):
        self.order.append(("V" if "v_layer" in name else "T") + name.rsplit(".", 1)[1])
        q, k, v = (self.linear(x, f"{name}.attention.self.{n}") for n in ("query", "key", "value"))
        read = self.attend(q, k, v, mask, heads)
        out = f"{name}.attention.output"
        x = self.norm(self.linear(read, f"{out}.dense") + x, f"{out}.LayerNorm")
        return self.feedforward(x, f"{name}.intermediate", f"{name}.output")

    def exchange(self, t, t_mask, v, v_mask, j):
        self.order.append(f"C{j}")
        name, heads = f"encoder.c_layer.{j}", self.sizes.joint_heads
        q1, k1, v1 = (self.linear(v, f"{name}.biattention.{n}1") for n in ("query", "key", "value"))
        q2, k2, v2 = (self.linear(t, f"{name}.biattention.{n}2") for n in ("query", "key", "value"))
        by_text = self.attend(q2, k1, v1, v_mask, heads)
        by_vision = self.attend(q1, k2, v2, t_mask, heads)
        out = f"{name}.biOutput"
        v = self.norm(self.linear(by_vision, f"{out}.dense1") + v, f"{out}.LayerNorm1")
        t = self.norm(self.linear(by_text, f"{out}.dense2") + t, f"{out}.LayerNorm2")
        v = self.feedforward(v, f"{name}.v_intermediate", f"{name}.v_output")
        t = self.feedforward(t, f"{name}.t_intermediate", f"{name}.t_output")
        return t, v

    def pooled(self, ids, t_mask, regions, boxes, v_mask):
        """Follows the rule of the order: up to ``biattention_id - 1`` before each exchange."""
        s, sizes = self.s, self.sizes
        e = "embeddings."
        words = (
            s[f"{e}word_embeddings.weight"][ids] + s[f"{e}position_embeddings.weight"][: len(ids)]
        )
        t = self.norm(words + s[f"{e}token_type_embeddings.weight"][0], f"{e}LayerNorm")
        v = "v_embeddings."
        seen = self.linear(regions, f"{v}image_embeddings")
        v = self.norm(seen + self.linear(boxes, f"{v}image_location_embeddings"), f"{v}LayerNorm")
        done_t = done_v = 0
        exchanges = sizes.region_layers
        for j in range(exchanges):
            while done_t < sizes.text_layers - exchanges + j:
                t = self.layer(t, t_mask, f"encoder.layer.{done_t}", sizes.text_heads)
                done_t += 1
            while done_v < j:
                v = self.layer(v, v_mask, f"encoder.v_layer.{done_v}", sizes.region_heads)
                done_v += 1
            t, v = self.exchange(t, t_mask, v, v_mask, j)
        for i in range(done_v, sizes.region_layers):
            v = self.layer(v, v_mask, f"encoder.v_layer.{i}", sizes.region_heads)
        for i in range(done_t, sizes.text_layers):
            t = self.layer(t, t_mask, f"encoder.layer.{i}", sizes.text_heads)
        return tuple(
            np.maximum(self.linear(x[0], f"{name}.dense"), 0)
            for x, name in ((t, "t_pooler"), (v, "v_pooler"))
        )


@pytest.mark.parametrize("whole", [True, False])
def test_pooled_vectors_are_those_of_the_equations(tiny, whole):
    head = vilbert(global_region=whole)
    x = batch()
    text, regions = head.pooled(head.prepare(x))
    assert text.std(0).max() > 0.1  # the samples differ, so the comparison is sharp
    assert regions.std(0).max() > 0.1
    double = head.double()
    exact_text, exact_regions = double.pooled(
        {k: v.double() if v.is_floating_point() else v for k, v in double.prepare(x).items()}
    )
    reference = Reference(double.trunk.state_dict(), TINY)
    for b in range(3):
        mask = x["region_mask"][b].numpy()
        seen, boxes = x["regions"][b].double().numpy(), x["boxes"][b].double().numpy()
        if whole:
            seen = np.concatenate([seen[mask].mean(0)[None], seen])
            boxes = np.concatenate([[[0, 0, 1, 1, 1]], boxes])
            mask = np.concatenate([[True], mask])
        expected = reference.pooled(
            x["text_ids"][b].numpy(), x["text_mask"][b].numpy(), seen, boxes, mask
        )
        for mine, exact, theirs in zip(
            (text[b], regions[b]), (exact_text[b], exact_regions[b]), expected, strict=True
        ):
            np.testing.assert_allclose(exact.detach().numpy(), theirs, atol=1e-10)
            np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=1e-5)
            assert (theirs > 0).any()


def test_the_layers_run_in_the_official_order(monkeypatch):
    """Traced in the network and in the rewrite; 24 layers."""
    sizes = Sizes(
        **{
            **{name: getattr(TINY, name) for name in TINY.__dataclass_fields__},
            "text_layers": 12,
            "region_layers": 6,
        }
    )
    trunk = Trunk(sizes, 10, 0.0, words=True).eval()
    order: list[str] = []
    for kind, modules in (("T", "layer"), ("V", "v_layer"), ("C", "c_layer")):
        for i, module in enumerate(getattr(trunk.encoder, modules)):
            name = f"{kind}{i}"
            module.register_forward_pre_hook(lambda m, args, name=name: order.append(name))
    x = batch(1)
    trunk(trunk.words(x["text_ids"]), x["text_mask"], x["regions"], x["boxes"], x["region_mask"])
    expected = ["T0", "T1", "T2", "T3", "T4", "T5", "C0"]
    for j in range(5):
        expected += [f"T{6 + j}", f"V{j}", f"C{j + 1}"]
    assert order == [*expected, "T11", "V5"]
    reference = Reference(trunk.state_dict(), sizes)
    reference.pooled(
        *(x[k][0].numpy() for k in ("text_ids", "text_mask", "regions", "boxes", "region_mask"))
    )
    assert sorted(reference.order[-2:]) == ["T11", "V5"]  # these two do not see each other


def test_the_names_are_those_of_the_network():
    trunk = Trunk(TINY, TINY.region_features, 0.0, words=True)
    own = {name: tuple(tensor.shape) for name, tensor in trunk.state_dict().items()}
    assert own == {name: s for name, s in shapes(TINY).items() if "q_dense" not in name}


def test_the_official_trunk_has_519_tensors():
    wanted = shapes(OFFICIAL)
    assert len(wanted) == 519
    assert sum(math.prod(shape) for shape in wanted.values()) == 246_726_656
    dead = [math.prod(shape) for name, shape in wanted.items() if "q_dense" in name]
    assert (len(dead), sum(dead)) == (24, 11_020_800)
    assert wanted["embeddings.word_embeddings.weight"] == (30522, 768)
    assert wanted["encoder.layer.11.attention.self.query.weight"] == (768, 768)
    assert wanted["encoder.v_layer.5.intermediate.dense.weight"] == (1024, 1024)
    assert wanted["encoder.c_layer.0.biattention.key2.weight"] == (1024, 768)
    assert wanted["encoder.c_layer.5.biOutput.q_dense2.weight"] == (768, 1024)
    assert wanted["encoder.c_layer.5.t_output.LayerNorm.bias"] == (768,)
    assert wanted["v_embeddings.image_location_embeddings.weight"] == (1024, 5)
    assert wanted["t_pooler.dense.weight"] == (1024, 768)


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoint(sizes: Sizes, prefix: str = "bert.") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    state = {
        f"{prefix}{name}": 0.3 * torch.randn(shape, generator=g)
        for name, shape in shapes(sizes).items()
    }
    state["cls.predictions.bias"] = torch.ones(30)
    state[f"{prefix}embeddings.position_ids"] = torch.arange(9)
    return state


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("bert.", None),
        ("module.bert.", None),
        ("model.bert.", "model"),
        ("bert.bert.", "model_state_dict"),
        ("", "state_dict"),
    ],
)
def test_every_known_wrapping_loads_by_name(tiny, tmp_path, prefix, wrap):
    state = checkpoint(TINY, prefix)
    torch.save({wrap: state} if wrap else state, tmp_path / "pytorch_model.bin")
    head = vilbert(weights=str(tmp_path / "pytorch_model.bin"))
    head.load_weights()
    for name, tensor in head.trunk.state_dict().items():
        assert torch.equal(tensor, state[f"{prefix}{name}"]), name
    assert len(shapes(TINY)) == len(head.trunk.state_dict()) + 4 * TINY.exchanges  # q_dense
    assert head.learning_rate == 1e-5


def test_every_tensor_of_the_checkpoint_decides_the_logits(tmp_path, monkeypatch):
    """From token ids, with as many layers as the official network: all but the 24 of no use."""
    layers = {"text_layers": 12, "region_layers": 6}
    sizes = replace(TINY, **layers)
    monkeypatch.setattr("mmc.heads.models.vilbert.OFFICIAL", sizes)
    assert shapes(sizes).keys() == shapes(OFFICIAL).keys()
    save_file(checkpoint(sizes), tmp_path / "m.safetensors")
    head = vilbert(weights=str(tmp_path / "m.safetensors"))
    head.load_weights()
    x = batch()
    x["text_ids"][:, 0] = sizes.start
    head(x).square().sum().backward()
    reached = {n for n, p in head.trunk.named_parameters() if p.grad.abs().max() > 0}
    dead = {name for name in shapes(OFFICIAL) if "q_dense" in name}
    assert reached == shapes(OFFICIAL).keys() - dead
    assert (len(reached), len(dead)) == (495, 24)


def test_ids_of_another_vocabulary_are_refused_in_one_line(tiny, tmp_path):
    save_file(checkpoint(TINY), tmp_path / "m.safetensors")
    x = batch()
    x["text_ids"][:] = 5
    x["text_mask"][2] = False  # a sample without a text
    with pytest.raises(InputError, match=r"text_ids are not ids of uncased BERT's .*\[CLS\], 2"):
        vilbert(weights=str(tmp_path / "m.safetensors")).prepare(x)
    vilbert().prepare(x)  # a network of one's own takes any
    x["text_ids"][:2, 0] = 2
    vilbert(weights=str(tmp_path / "m.safetensors")).prepare(x)
    x["text_ids"][1, 0] = 30
    with pytest.raises(InputError, match="largest is 29"):
        vilbert().prepare(x)


def test_all_519_names_are_required():
    """At the official names and shapes, without their memory."""
    one = torch.zeros(())
    state = {f"bert.{n}": one.expand(s) for n, s in shapes(OFFICIAL).items()}
    assert len(official_tensors(state, OFFICIAL, "file")) == 519
    for name in ("bert.t_pooler.dense.bias", "bert.encoder.c_layer.2.biOutput.q_dense1.weight"):
        fewer = {n: t for n, t in state.items() if n != name}
        with pytest.raises(InputError, match=r"1 of 519 tensors are missing, such as "):
            official_tensors(fewer, OFFICIAL, "file")
    state["bert.t_pooler.dense.bias"] = torch.empty(7)
    with pytest.raises(
        InputError, match=r"t_pooler.dense.bias of file is \(7,\) and not \(1024,\)"
    ):
        official_tensors(state, OFFICIAL, "file")


def test_old_names_of_norms_are_understood(tiny, tmp_path):
    state = checkpoint(TINY)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in state.items()
    }
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "model.safetensors")
    head = vilbert(weights=str(tmp_path / "model.safetensors"))
    head.load_weights()
    assert torch.equal(
        head.trunk.embeddings.LayerNorm.weight, state["bert.embeddings.LayerNorm.weight"]
    )


def test_other_region_features_are_refused(tiny, tmp_path):
    save_file(checkpoint(TINY), tmp_path / "m.safetensors")
    inputs = {**vilbert().inputs, "regions": (REGIONS, 7)}
    config = VilbertConfig(weights=str(tmp_path / "m.safetensors"))
    with pytest.raises(InputError, match=r"image_embeddings.weight is \(16, 10\)"):
        Vilbert(inputs, 3, config).load_weights()


# -- inputs ----------------------------------------------------------------------------------------


def test_regions_may_be_in_any_order_but_the_first_counts(tiny):
    head = vilbert(global_region=False)
    x = batch()
    x["region_mask"][:] = True
    order = torch.tensor([0, 3, 1, 4, 2])
    moved = {
        k: v[:, order] if k in ("regions", "boxes", "region_mask") else v for k, v in x.items()
    }
    expected = head.pooled(head.prepare(x))
    torch.testing.assert_close(head.pooled(head.prepare(moved)), expected, atol=1e-5, rtol=1e-4)
    order = torch.tensor([3, 0, 1, 4, 2])
    moved = {
        k: v[:, order] if k in ("regions", "boxes", "region_mask") else v for k, v in x.items()
    }
    assert not torch.allclose(head.pooled(head.prepare(moved))[1], expected[1], atol=1e-2)


@pytest.mark.parametrize("ids", [True, False])
def test_what_is_masked_changes_nothing(tiny, ids):
    head = vilbert(ids=ids)
    x = batch(ids=ids)
    noisy = {role: values.clone() for role, values in x.items()}
    for role, values in noisy.items():
        mask = {"boxes": "region_mask"}.get(role, mask_of(role))
        if mask in x and role != mask:
            values[~x[mask]] = 7 if role == "text_ids" else 1e6
    torch.testing.assert_close(head(noisy), head(x), atol=1e-6, rtol=0)


def test_the_global_region_is_the_mean_at_the_whole_picture(tiny):
    x = batch()
    regions, boxes, mask = with_global(x["regions"], x["boxes"], x["region_mask"])
    torch.testing.assert_close(regions[0, 0], x["regions"][0, :3].mean(0))
    torch.testing.assert_close(regions[1, 0], x["regions"][1, 0])
    assert boxes[:, 0].tolist() == [[0, 0, 1, 1, 1]] * 3
    assert mask[:, 0].all()
    assert torch.equal(regions[:, 1:], x["regions"])


def test_states_of_a_backbone_stand_for_words(tiny):
    """Of equal width they enter as they are: with word embeddings as states, the logits agree."""
    by_ids, by_states = vilbert(), vilbert(ids=False, random=False)
    state = {k: v for k, v in by_ids.state_dict().items() if "word_embeddings" not in k}
    missing, unexpected = by_states.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("project.", "tokens.")) for name in missing)
    x = batch()
    with_states = {k: v for k, v in x.items() if k != "text_ids"}
    with_states["text_tokens"] = by_ids.trunk.words(x["text_ids"]).detach()
    torch.testing.assert_close(by_states(with_states), by_ids(x), atol=1e-5, rtol=1e-4)


def test_fusion_by_sum(tiny):
    head, x = vilbert(fusion="sum"), batch()
    text, regions = head.pooled(head.prepare(x))
    torch.testing.assert_close(head(x), head.classifier(text + regions))
    head = vilbert()
    torch.testing.assert_close(head(x), head.classifier(text * regions))


def test_too_long_texts_and_bad_settings_are_refused(tiny):
    inputs = {**vilbert().inputs, "text_ids": (10,), "text_mask": (10,)}
    with pytest.raises(InputError, match="up to 9 tokens of text and there are 10"):
        Vilbert(inputs, 3, VilbertConfig(size="official"))
    with pytest.raises(InputError, match=r"leave head\.size out"):
        VilbertConfig(weights="x", size="small")
    with pytest.raises(InputError, match="dropout"):
        VilbertConfig(dropout=1.0)
