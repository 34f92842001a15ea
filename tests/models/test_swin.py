"""The whole net: its presets, switches, start, features and errors."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from manyscale.layers.block import Residual
from manyscale.models.build import build, create_model
from manyscale.models.paths import set_attention
from manyscale.models.swin import Swin
from manyscale.ops.windows import enter
from manyscale.presets import list_models, model_config

# To the digit: Swin V1's and V2's T, S, B and L as timm and (without its dead biases) torchvision build them.
PARAMETERS = {
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_large": 196_532_476,
    "swinv2_tiny": 28_347_154,
    "swinv2_small": 49_728_418,
    "swinv2_base": 87_918_816,
    "swinv2_large": 196_739_932,
    "swinv2_huge": 658_036_370,  # the paper's 658M; the backbone 655M
    "swinv2_giant": 3_001_940_680,
    "swinv2_simmim_1b": 1_064_561_996,  # the zoo's 1.06B
}
DOT, NORMS, BIASES = ("dot", "cosine"), ("pre", "post", "sandwich", "res-post"), ("table", "linear-cpb", "log-cpb")


def parameters(name, **fields):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **fields).parameters())


def images(*size, batch=2, channels=3, dtype=torch.float32):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_every_preset_is_counted():
    assert sorted(PARAMETERS) == list_models("swin*")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert parameters(name) == PARAMETERS[name]


def test_parameters_of_variants():
    assert parameters("swinv2_giant", depths=(2, 2, 42, 2)) / 1e6 == pytest.approx(2599.0, abs=0.1)  # the paper's first version
    assert parameters("swinv2_base", classes=21841) / 1e6 == pytest.approx(109.28, abs=0.005)
    assert parameters("swinv2_large", classes=21841) / 1e6 == pytest.approx(228.77, abs=0.01)
    assert parameters("swinv2_simmim_1b", classes=0) / 1e6 == pytest.approx(1060.98, abs=0.01)
    assert parameters("swinv2_huge", classes=0, extra_norm_every=0) / 1e6 == pytest.approx(655.21, abs=0.01)
    assert parameters("swinv2_tiny", window=16) == PARAMETERS["swinv2_tiny"]  # a continuous bias has no window
    assert parameters("swin_tiny", window=14, image_size=448) > PARAMETERS["swin_tiny"]  # a table has


def extra_norms(model):
    blocks = [block for stage in model.stages for block in stage.blocks]
    return [i + 1 for i, block in enumerate(blocks) if isinstance(block.extra_norm, nn.LayerNorm)]


def test_extra_norms_are_counted_by_stage_or_by_model(micro):
    assert extra_norms(micro(depths=(3, 5))) == []
    assert extra_norms(micro(depths=(3, 5), extra_norm_every=2)) == [2, 5, 7]
    assert extra_norms(micro(depths=(3, 5), extra_norm_every=2, extra_norm_scope="model")) == [2, 4, 6, 8]
    with torch.device("meta"):
        assert len(extra_norms(create_model("swinv2_giant"))) == 7
        assert len(extra_norms(create_model("swinv2_huge", extra_norm_scope="model"))) == 4


@pytest.mark.parametrize("fields", [{}, {"similarity": "dot", "norm": "pre", "bias": "table", "level_norms": True}, {"norm": "sandwich"}])
def test_initialise_reaches_every_parameter(micro, fields):
    with torch.device("meta"):
        model = Swin(micro(**fields, extra_norm_every=1, width=32, classes=100).config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, math.nan)
    model.initialise()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if p.dim() == 1 and name.endswith("weight"):
            zero = "norm_out" in name and "merge" not in name and fields.get("norm") != "pre"
            assert (p == (0 if zero else 1)).all(), name
        elif name.endswith("logit_scale"):
            torch.testing.assert_close(p.detach(), torch.full_like(p, math.log(10)))
        elif name.endswith("bias") and name != "patch.proj.bias":
            assert not p.any(), name
        elif p.dim() == 2:  # linear layers and bias tables
            assert p.std().item() == pytest.approx(0.02, rel=0.25), name
            assert abs(p.mean().item()) < 0.005, name


def test_a_table_and_the_patches_start_as_in_the_official_code(micro):
    model = micro(fresh=True, bias="table", width=96, patch=4)
    limit = (3 * 4 * 4) ** -0.5  # PyTorch's own start of a convolution: uniform up to fan-in^-1/2
    weight = model.patch.proj.weight
    assert weight.abs().max() <= limit and weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    assert model.stages[0].blocks[0].attention.branch.bias.table.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("norm", ["res-post", "sandwich"])
def test_fresh_blocks_are_the_identity(micro, norm):
    model, x = micro(fresh=True, norm=norm), images(32, 32)
    tokens = model.patch(x)
    expected = model.norm(model.stages[0].merge(tokens)).flatten(1, 2).mean(dim=1)
    assert torch.equal(model.features(x).pooled, expected)
    plain = micro(fresh=True, norm=norm, zero_init=False)
    assert not torch.equal(plain.features(x).stages[0], plain.patch(x).movedim(-1, 1))


@pytest.mark.parametrize(("similarity", "norm", "bias"), list(itertools.product(DOT, NORMS, BIASES)))
def test_every_switch_trains(micro, similarity, norm, bias):
    """Each of the 24 combinations sends a finite gradient to every parameter, from a picture that needs padding."""
    model = micro(similarity=similarity, norm=norm, bias=bias, extra_norm_every=2, drop_path=0.1, dropout=0.1).train()
    logits = model(images(37, 30))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_switches_change_the_function(micro):
    x, seen = images(32, 32), []
    for fields in ({}, {"norm": "pre"}, {"similarity": "dot"}, {"bias": "linear-cpb"}, {"merge_norm": "before"}, {"pretrained_window": 8}):
        seen.append(micro(**fields)(x))
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(seen, 2))


def test_features(micro):
    model = micro(depths=(2, 2, 2), heads=(1, 2, 4), window=4)
    features = model.features(images(32, 40))
    assert [tuple(stage.shape) for stage in features.stages] == [(2, 8, 16, 20), (2, 16, 8, 10), (2, 32, 4, 5)]
    pooled = model.norm(features.stages[-1].movedim(1, -1)).mean(dim=(1, 2))
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(model(images(32, 40)), model.head(features.pooled))


def test_features_are_taken_before_the_merging(micro):
    model, x = micro(), images(32, 32)
    features = model.features(x)
    torch.testing.assert_close(features.stages[0].movedim(1, -1), model.stages[0](model.patch(x)))
    torch.testing.assert_close(features.stages[1].movedim(1, -1), model.stages[1](model.stages[0].merge(model.stages[0](model.patch(x)))))


def test_level_norms_change_the_pyramid_alone(micro):
    plain, normed = micro(), micro(level_norms=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    for norm in normed.level_norms:
        nn.init.normal_(norm.weight)
    a, b = (model.features(images(32, 32)) for model in (plain, normed))
    torch.testing.assert_close(a.pooled, b.pooled)
    for norm, level, own in zip(normed.level_norms, a.stages, b.stages, strict=True):
        torch.testing.assert_close(norm(level.movedim(1, -1)).movedim(-1, 1), own)


def test_no_classes_no_head(micro):
    model = micro(classes=0)
    assert torch.equal(model(images(32, 32)), model.features(images(32, 32)).pooled)
    assert not any(name.startswith("head") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ((3, 32, 32), {}),
        ((2, 1, 32, 32), {}),
        ((2, 32, 32, 3), {}),
        ((2, 3, 4, 32, 32), {}),
        ((2, 3, 32, 32), {"image_size": (4, 32, 32), "window": 4}),
    ],
)
def test_wrong_shapes_are_named(micro, shape, fields):
    with pytest.raises(ValueError, match=r"takes a batch of shape \(B, 3, (T, )?H, W\), not "):
        micro(**fields)(torch.zeros(shape))


def test_samples_do_not_meet(micro):
    model, x = micro(), images(37, 30, batch=3)
    torch.testing.assert_close(model(x), torch.cat([model(sample[None]) for sample in x]))


def test_evaluation_repeats_and_training_does_not(micro):
    model, x = micro(dropout=0.2, drop_path=0.2), images(32, 32)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), micro()(x))  # nothing is dropped, nothing is scaled
    model.train()
    assert not torch.equal(model(x), model(x))


def test_drop_path_grows_with_depth(micro):
    model = micro(depths=(2, 3), drop_path=0.4)
    rates = [block.attention.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all(m.drop_path.p == pytest.approx(0.4) for m in model.stages[1].blocks[2].modules() if isinstance(m, Residual))


def test_copies_are_independent(micro):
    model, x = micro(), images(32, 32)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and twin.config == model.config
    nn.init.zeros_(twin.head.weight)
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("fields", [{}, {"norm": "pre", "similarity": "dot", "bias": "table", "merge_norm": "before"}])
def test_attention_paths_agree(micro, fields):
    model, x = micro(**fields).double(), images(37, 30, dtype=torch.float64)
    results = []
    for path in ("reference", "fused"):
        for stage in model.stages:
            for block in stage.blocks:
                block.attention.branch.attention_path = path
        results.append(model(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("size", [(32, 32), (37, 30)])
def test_a_batch_in_parts_is_the_whole(micro, size, monkeypatch):
    """In evaluation on a CPU pictures go through a stage some after others; with gradients all at once."""
    model, x = micro(), images(*size, batch=5)
    blocks = len(model.stages[0].blocks)
    whole = model(x)
    monkeypatch.setattr("manyscale.models.swin.TOKENS", 2 * math.prod(-(-s // p) for s, p in zip(size, model.config.patches, strict=True)))
    seen = []
    monkeypatch.setattr("manyscale.layers.attention.enter", lambda x, layout: seen.append(len(x)) or enter(x, layout))
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole)
    assert seen[: 3 * blocks] == [2] * 2 * blocks + [1] * blocks


@pytest.mark.parametrize("part", ["attention.branch", "attention.branch.proj", "mlp.branch", "mlp.branch.fc1", "mlp.branch.act"])
@torch.no_grad()
def test_who_watches_sees_whole_batches_once(micro, part, monkeypatch):
    """As with gradients; and what a hook does to a result it does once."""
    monkeypatch.setattr("manyscale.models.swin.TOKENS", 1)
    monkeypatch.setattr("manyscale.layers.block.ROWS", 1)
    model, x, found = micro(), images(32, 32, batch=3), []
    watched = model.stages[0].blocks[0].get_submodule(part)
    for grad in (True, False):
        seen = []
        handle = watched.register_forward_hook(lambda layer, given, out, seen=seen: seen.append(out.shape) or out.square())
        with torch.set_grad_enabled(grad):
            found.append((model(x), seen))
        handle.remove()
    (expected, whole), (logits, parts) = found
    assert len(whole) == 1 and parts == whole
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("path", ["auto", "reference", "fused", "sequential"])
@pytest.mark.parametrize("size", [(32, 32), (37, 30)])
def test_no_pictures_have_no_logits(micro, size, path):
    model = set_attention(micro(), path)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits = model(images(*size, batch=0))
            assert logits.shape == (0, model.config.classes)
            if grad:
                logits.sum().backward()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor", "ignore:Iterating over a tensor")
def test_a_traced_net_takes_other_batches(micro):
    """torch.jit.trace, which some converters still start from."""
    model = micro()
    traced = torch.jit.trace(model, images(32, 32, batch=2))
    for batch in (1, 3):
        torch.testing.assert_close(traced(images(32, 32, batch=batch)), model(images(32, 32, batch=batch)))


def test_weights_alone_make_the_function(micro):
    """No buffer: everything that is not a parameter follows from the configuration."""
    model = micro()
    assert list(model.buffers()) == []
    twin = build(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images(32, 32)), model(images(32, 32)))


def test_create_model_takes_any_field():
    model = create_model("swinv2_tiny", width=8, depths=[1, 1], heads=[1, 2], classes=3, image_size=32)
    assert model.config == model_config("swinv2_tiny", width=8, depths=(1, 1), heads=(1, 2), classes=3, image_size=32)
    with pytest.raises(ValueError, match="did you mean `swinv2_tiny`"):
        create_model("swinv2_tinny")


@pytest.mark.parametrize("size", [(32, 32), (37, 30)])
def test_export(micro, size):
    model, x = micro(), images(*size)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@torch.no_grad()
def test_a_net_compiled_as_torch_does_by_default_takes_any_size_and_batch(micro):
    """torch would trace a second size with symbols, for more than ten minutes; here each size is a graph, which all batches share."""
    torch._dynamo.reset()
    model, graphs = micro(depths=(2,), heads=(2,), window=((4, 4),)), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def answers_as_well(size, batch):
        x = images(size, size, batch=batch)
        assert torch.equal(compiled(x), model(x))

    for size, batch in ((32, 2), (48, 2), (32, 3), (48, 3)):
        answers_as_well(size, batch)
    made = len(graphs)
    for size, batch in ((32, 4), (48, 5)):
        answers_as_well(size, batch)
    assert len(graphs) == made


@torch.no_grad()
@pytest.mark.parametrize("bias", ["table", "log-cpb"])
def test_what_follows_from_sizes_alone_a_compiled_graph_holds_ready(micro, bias):
    """Inductor folds no constant that begins with arange: position biases of frozen weights would be made for every batch."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(micro(bias=bias), backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled(images(32, 32))
    (graph,) = graphs
    assert not [node for node in graph.graph.nodes if node.target in (torch.arange, torch.zeros)]
