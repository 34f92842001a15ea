"""SuperViT: token counts, logits and kept tokens against a slow reference, sizes, positions, what it refuses."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyscale as ms
from manyscale.config import Setting, SuperViTConfig, ViTConfig
from manyscale.models import SuperViT, build, compile_settings, recalibrated
from manyscale.models.kin import to_supervit, to_vit
from manyscale.ops.images import resized
from manyscale.plan.count import count
from manyscale.presets import model_config
from tests.conftest import loud
from tests.models.supervit_reference import COUNTS, run

DEIT = SuperViTConfig(
    sizes=(16, 24, 32), keeps=(0.5, 0.7, 1.0), patch=4, width=24, depth=5, heads=3, mlp_width=40, drop_blocks=(1, 2, 4), classes=5
)
LV = replace(DEIT, stem="conv", stem_width=6, skip=2.0, token_head=0.25, qkv_bias=False, norm_eps=1e-5)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(config: SuperViTConfig) -> SuperViT:
    model = loud(build(config)).double().eval()
    for norm in model.sized_norms():
        torch.manual_seed(1)
        norm.mean.normal_(std=0.3)
        norm.variance.uniform_(0.5, 2)
    return model


def test_the_papers_twelve_settings_keep_the_papers_tokens():
    for name in ("supervit_deit_small", "supervit_lvvit_small"):
        config = model_config(name)
        assert {(s.size, s.keep): config.counts(s) for s in config.settings} == COUNTS


def test_counts_of_the_other_rule_and_of_a_schedule():
    config = SuperViTConfig(count_rule="patches")
    assert config.counts(Setting(size=224, keep=0.5)) == (98, 49, 25) and config.counts(Setting(size=128, keep=0.7)) == (45, 32, 23)
    assert config.counts(Setting(size=224, keep=(0.9, 1.0, 0.5))) == (177, 177, 89)
    assert SuperViTConfig().counts(Setting(size=160, tokens=(70, 70, 1))) == (70, 70, 1)
    assert SuperViTConfig().counts(Setting(size=128, keep=0.01)) == (1, 1, 1)


@pytest.mark.parametrize("fields", [{}, {"fuse": True, "registers": 2}, {"count_rule": "patches"}, {"drop_blocks": (0, 3)}], ids=str)
@pytest.mark.parametrize("config", [DEIT, LV], ids=["deit", "lvvit"])
def test_logits_and_kept_tokens_equal_the_slow_reference(config, fields):
    config = replace(config, **fields)
    model = made(config)
    for i, size in enumerate(config.sizes):
        for keep in (0.3, 0.7, 1.0):
            setting, images = Setting(size=size, keep=keep), resized(IMAGES, (size, size), "corners")
            with torch.no_grad():
                logits, seen = model(IMAGES, setting), model.tokens(IMAGES, setting)
            for j, image in enumerate(images):
                expected, kept = run(
                    {name: tensor.numpy() for name, tensor in model.state_dict().items()}, image.numpy(), patch=4, heads=3,
                    drops=dict.fromkeys(config.drop_blocks, keep), rule=config.count_rule, fuse=config.fuse, registers=config.registers,
                    eps=config.norm_eps, skip=config.skip, token_head=config.token_head, table=i,
                )  # fmt: skip
                np.testing.assert_allclose(logits[j].numpy(), expected, rtol=1e-10, atol=1e-11)
                assert [places[j].tolist() for places in seen.kept] == kept
                assert len(kept) == (len(config.drop_blocks) if keep < 1 else 0)


def test_the_official_resizing_by_hand():
    """Bilinear with the corners' centres kept: output pixel i looks at input place i (W - 1) / (w - 1), and nowhere else."""
    image = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    small = resized(image, (5, 4), "corners")
    for row in range(5):
        for column in range(4):
            y, x = row * 8 / 4, column * 8 / 3
            top, left = min(int(y), 7), min(int(x), 7)
            a, b = y - top, x - left
            part = image[0, 0, top : top + 2, left : left + 2]
            weights = torch.tensor([[(1 - a) * (1 - b), (1 - a) * b], [a * (1 - b), a * b]], dtype=torch.float64)
            assert math.isclose(small[0, 0, row, column], (part * weights).sum(), rel_tol=1e-12, abs_tol=1e-14)
    assert resized(image, (9, 9)) is image


def test_without_a_setting_images_are_taken_as_they_come():
    model = made(DEIT)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), model(IMAGES, Setting(size=32)))
        small = IMAGES[..., :24, :24]
        assert torch.equal(model(small, Setting(keep=0.5)), model(small, Setting(size=24, keep=0.5)))
        with pytest.raises(ValueError, match=r"\(20, 20\) has no position table; there are tables for 16, 24, 32.*interpolated"):
            model(IMAGES[..., :20, :20])


def test_sizes_that_are_not_square_and_positions_for_any():
    model = made(replace(DEIT, sizes=((16, 24), 32)))
    with torch.no_grad():
        features = model.features(IMAGES, Setting(size=(16, 24), keep=0.5))
    assert features.stages[0].shape == (3, 24, 4, 6)
    model = made(replace(DEIT, positions="interpolated"))
    assert len(model.positions) == 1 and model.positions[0].shape == (65, 24)
    with torch.no_grad():
        assert model(IMAGES, Setting(size=(20, 36), keep=0.7)).shape == (3, 5)


@pytest.mark.parametrize("fuse", [False, True])
def test_what_is_dropped_stands_in_the_map_as_it_was(fuse):
    """A fused token may be dropped later; it has no place, and is in no map."""
    model = made(replace(DEIT, registers=1, fuse=fuse))
    setting = Setting(size=32, keep=0.5)
    with torch.no_grad():
        seen, features = model.tokens(IMAGES, setting), model.features(IMAGES, setting)
    cells = features.stages[0].flatten(2).mT  # (B, h·w, C)
    for j in range(3):
        everyone = []
        for places, tokens in [(seen.places[j], seen.tokens[j, 2:]), *((gone.places[j], model.norm(gone.tokens[j])) for gone in seen.left)]:
            has = places >= 0
            assert torch.equal(cells[j, places[has]], tokens[has]) and (fuse or has.all())
            everyone += places[has].tolist()
        assert sorted(everyone) == list(range(64))
    assert torch.equal(features.pooled, seen.tokens[:, 0])


def test_nothing_leaves_at_keep_one_and_then_no_score_is_computed(monkeypatch):
    model = made(DEIT)
    monkeypatch.setattr("manyscale.layers.attention.first_row", None)
    assert model(IMAGES, Setting(size=24)).shape == (3, 5)
    with pytest.raises(TypeError):
        model(IMAGES, Setting(size=24, keep=0.9))


@pytest.mark.parametrize("config", [replace(DEIT, registers=2), replace(LV, stem_statistics="per-size"), replace(DEIT, fuse=True)])
def test_every_parameter_learns(config):
    model = loud(build(config)).train()
    total = sum(model(IMAGES.float(), setting).square().sum() for setting in config.settings)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_fresh_parameters_are_all_set():
    for config in (replace(DEIT, registers=2), replace(LV, stem_statistics="per-size")):
        with torch.device("meta"):
            model = build(config)
        model = model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(math.nan)
        model.initialise()
        assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
        assert {model.layer(name) for name, _ in model.named_parameters()} == set(range(model.layers))


def test_mixed_patches_come_from_the_other_end_of_the_batch():
    model = made(DEIT)
    with torch.no_grad():
        whole = model(IMAGES, Setting(size=16), mirrored=torch.ones(4, 4, dtype=torch.bool))
        torch.testing.assert_close(whole, model(IMAGES.flip(0), Setting(size=16)))
        part = IMAGES.clone()
        part[:, :, 8:24, 16:32] = IMAGES.flip(0)[:, :, 8:24, 16:32]
        mirrored = torch.zeros(8, 8, dtype=torch.bool)
        mirrored[2:6, 4:8] = True
        torch.testing.assert_close(model(IMAGES, mirrored=mirrored), model(part))


def test_the_picture_in_the_middle_of_an_odd_batch_stays_itself():
    model, mirrored = made(DEIT), torch.zeros(8, 8, dtype=torch.bool)
    mirrored[:3, :5] = True
    with torch.no_grad():
        mixed, plain = model(IMAGES, mirrored=mirrored), model(IMAGES)
    torch.testing.assert_close(mixed[1], plain[1])
    assert not torch.isclose(mixed[[0, 2]], plain[[0, 2]]).any()


@pytest.mark.parametrize("config", [replace(DEIT, fuse=True), replace(LV, fuse=True)], ids=["deit", "lvvit"])
def test_in_half_precision(config):
    """Scores are taken in float32; answers and gradients come close to those of float32."""
    model = made(config).float()
    setting, found = Setting(size=32, keep=0.5), []
    for precision in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(IMAGES.float(), setting)
        logits.float().square().mean().backward()
        found.append((logits.detach().float(), model.patch.weight.grad.clone()))
    for exact, near in zip(*found, strict=True):
        assert (near - exact).norm() < 0.2 * exact.norm()


def test_statistics_are_kept_for_each_size():
    model = made(replace(LV, stem_statistics="per-size")).train()
    before = [norm.mean.clone() for norm in model.sized_norms()]
    model(IMAGES, Setting(size=24))
    for norm, mean in zip(model.sized_norms(), before, strict=True):
        assert torch.equal(norm.mean[[0, 2]], mean[[0, 2]]) and not torch.equal(norm.mean[1], mean[1])


def test_recalibrated_on_pictures_by_hand():
    """The first norm's statistics are those of the first convolution's outputs at each size, averaged over batches."""
    model = made(LV)
    batches = [IMAGES, IMAGES.flip(0) * 2 + 1]
    new = recalibrated(model, batches)
    assert new.config == replace(LV, stem_statistics="per-size") and not new.training
    for i, size in enumerate(LV.sizes):
        outs = [model.stem.conv1(resized(images, (size, size), "corners")).detach() for images in batches]
        torch.testing.assert_close(new.stem.norm1.mean[i], sum(out.mean((0, 2, 3)) for out in outs) / 2)
        torch.testing.assert_close(new.stem.norm1.variance[i], sum(out.transpose(0, 1).flatten(1).var(1) for out in outs) / 2)
    with torch.no_grad():  # one batch that is the measured one: as the net in training sees it
        once = recalibrated(model, [IMAGES])
        seen = once.stem(resized(IMAGES, (24, 24), "corners"), 1)
        model.stem.train()
        torch.testing.assert_close(seen, model.stem(resized(IMAGES, (24, 24), "corners"), 0), rtol=0.05, atol=0.02)  # n - 1 for n
    assert recalibrated(new, batches[:1]).stem.norm2.mean.shape == (3, 6)
    for other in (made(DEIT), build(vit())):
        with pytest.raises(ValueError, match="no conv stem"):
            recalibrated(other, batches)
    with pytest.raises(ValueError, match="no picture"):
        recalibrated(model, [])


def test_both_heads_for_training():
    model = made(LV)
    with torch.no_grad():
        answers = model(IMAGES, Setting(size=24, keep=0.5), both=True)
        expected = answers.whole + 0.25 * answers.patches.amax(1)
        assert answers.patches.shape == (3, 6, 5) and torch.equal(model(IMAGES, Setting(size=24, keep=0.5)), expected)
        assert made(DEIT)(IMAGES, both=True).patches is None


# --- What is the same net in other clothes ---------------------------------------------------------------------------------


def vit(**fields) -> ViTConfig:
    return ViTConfig(image_size=32, patch=4, width=24, depth=5, heads=3, mlp_width=40, classes=5, pool="token", **fields)


@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
def test_a_vit_becomes_a_supervit_and_back(position):
    old = loud(build(vit(position=position, gelu="tanh"))).double().eval()
    model = to_supervit(old, sizes=(16, 32), drop_blocks=(1, 2, 4))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES, Setting(size=32)), old(IMAGES), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(to_vit(model)(IMAGES), old(IMAGES), rtol=1e-12, atol=1e-12)
        small = IMAGES[..., :16, :16]
        if position == "learned":
            torch.testing.assert_close(model(small), ms.transfer(old, image_size=16)(small), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(to_vit(model, 16)(small), model(small), rtol=1e-12, atol=1e-12)
    assert model(IMAGES, Setting(size=16, keep=0.5)).shape == (3, 5)
    anywhere = to_supervit(old, sizes=(16, 32), drop_blocks=(1, 2, 4), positions="interpolated")
    with torch.no_grad():
        torch.testing.assert_close(to_vit(anywhere, 24)(IMAGES[..., :24, :24]), anywhere(IMAGES[..., :24, :24]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [({"pool": "gap"}, "pool=gap"), ({"pool": "map"}, "pool=map"), ({"pre_logits": 8}, "pre_logits=8")],
)
def test_a_vit_without_a_class_token_cannot(fields, message):
    with pytest.raises(ValueError, match=message):
        to_supervit(build(replace(vit(), **fields)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="width=48, the ViT's is 24"):
        to_supervit(build(vit()), replace(DEIT, width=48))
    with pytest.raises(ValueError, match="stem=conv"):
        to_supervit(build(vit()), LV)
    with pytest.raises(ValueError, match=r"a ViT has no .*token_head=0.25"):
        to_vit(build(LV))


def test_saved_and_loaded(tmp_path):
    model = made(replace(LV, registers=2, stem_statistics="per-size"))
    ms.save(model, tmp_path)
    again = ms.load(tmp_path)
    setting = ms.Setting(size=24, keep=0.5)
    with torch.no_grad():
        assert again.config == model.config and torch.equal(again(IMAGES, setting), model(IMAGES, setting))


def test_transferred_to_other_sizes_and_classes():
    model = made(replace(LV, stem_statistics="per-size"))
    other = ms.transfer(model, sizes=(24, 40), classes=7)
    with torch.no_grad():
        seen, old = other.tokens(IMAGES, Setting(size=24, keep=0.5)), model.tokens(IMAGES, Setting(size=24, keep=0.5))
        assert torch.equal(seen.tokens, old.tokens) and other(IMAGES, Setting(size=40)).shape == (3, 7)
    for fields, message in (({"image_size": 40}, "give `sizes`"), ({"window": 4}, "give `sizes`"), ({"mask_token": True}, "has none")):
        with pytest.raises(ValueError, match=message):
            ms.transfer(model, **fields)
    with pytest.raises(ValueError, match="only a SuperViT has several"):
        ms.transfer(build(vit()), sizes=(16, 32))


@pytest.mark.slow
def test_a_graph_for_each_setting_past_any_limit():
    """Twelve settings under a limit of 8, each one graph; torch's own way stops at the ninth."""
    model = loud(build(replace(DEIT, keeps=(0.4, 0.6, 0.8, 1.0), depth=2, drop_blocks=(0,)))).eval()
    compiled = compile_settings(model, model.config.settings, fullgraph=True, backend="eager")
    images = IMAGES.float()
    assert len(compiled) == 12
    with torch.no_grad():
        for setting, run_compiled in compiled.items():
            assert torch.equal(run_compiled(images), model(images, setting))
            assert torch.equal(run_compiled(images, both=True).whole, model(images, setting))


def test_freezing_is_of_a_call_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda images: torch._inductor.config.freezing)
    for freeze in (False, True):
        (run,) = compile_settings(build(DEIT), [Setting()], freeze=freeze).values()
        assert run(IMAGES) is freeze
    assert not torch._inductor.config.freezing


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_frozen_graph_keeps_its_weights():
    model, setting = loud(build(replace(DEIT, depth=1, drop_blocks=()))).eval(), Setting(size=24)
    images = IMAGES.float()
    compiled = compile_settings(model, [setting], freeze=True)[setting]
    with torch.no_grad():
        expected = model(images, setting)
        torch.testing.assert_close(compiled(images), expected)
        model.head.weight.zero_()
        assert not torch.allclose(model(images, setting), expected)
        torch.testing.assert_close(compiled(images), expected)  # what freezing is, and what its docstring says


def test_exported_for_one_setting():
    model, setting = made(DEIT).float(), Setting(size=24, keep=0.6)
    program = torch.export.export(model, (IMAGES.float(),), {"setting": setting})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES.float(), setting=setting), model(IMAGES.float(), setting))


def test_swin_at_a_setting_is_the_swin_transferred():
    model = loud(ms.create_model("swinv2_tiny", width=24, depths=(2, 2), heads=(2, 4), classes=5, image_size=32, window=4)).double().eval()
    images = resized(IMAGES, (48, 48))
    for setting in (Setting(size=48, window=6), Setting(window=(6, 3), size=48), Setting(size=48)):
        moved = ms.transfer(model, image_size=48, window=setting.window or 4)
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES, setting=setting), moved(images), rtol=1e-12, atol=1e-12)
    for setting, message in ((Setting(keep=0.5), "keeps every token"), (Setting(window=(3, 3, 3)), "fits neither")):
        with pytest.raises(ValueError, match=message):
            model(IMAGES, setting=setting)
    table = build(replace(model.config, bias="table")).double()
    with pytest.raises(ValueError, match="table for its own window"):
        table(IMAGES, setting=Setting(window=2))


# --- Settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"keep": 0}, r"keep.*must be in \(0, 1\]"),
        ({"keep": 1.1}, r"keep.*must be in \(0, 1\]"),
        ({"keep": math.nan}, r"keep.*must be in \(0, 1\]"),
        ({"keep": ()}, r"keep.*must be in \(0, 1\]"),
        ({"keep": (0.5, -1.0)}, r"keep.*must be in \(0, 1\]"),
        ({"size": 0}, "size.*give one number"),
        ({"size": (16, 16, 16)}, "size.*give one number"),
        ({"tokens": (3, 0)}, "tokens.*at least one"),
        ({"tokens": (3, 4)}, "tokens.*must not grow"),
        ({"tokens": (4, 3), "keep": 0.5}, "give one of the two"),
        ({"window": 0}, "window.*at least 1"),
        ({"window": 4, "keep": 0.5}, "window.*drops no tokens"),
        ({"window": 4, "tokens": (4, 3)}, "window.*drops no tokens"),
        ({"size": "160"}, "field `size`: '160' must be whole numbers"),
        ({"size": [160, 160]}, "field `size`: .160, 160. must be whole numbers: one, or a tuple"),
        ({"size": 160.0}, "field `size`: 160.0 must be whole numbers"),
        ({"keep": None}, "field `keep`: None must be numbers"),
        ({"keep": True}, "field `keep`: True must be numbers"),
        ({"tokens": (10.5, 3)}, r"field `tokens`: \(10.5, 3\) must be whole"),
        ({"tokens": [5, 4]}, "field `tokens`: .5, 4. must be whole numbers: one, or a tuple"),
        ({"tokens": 5}, "field `tokens`: 5 must be a tuple"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Setting(**fields)


@pytest.mark.parametrize(
    "setting, message",
    [
        (Setting(size=30), "30 must be a multiple of the patch 4, such as 28"),
        (Setting(size=2), "2 must be a multiple of the patch 4, such as 4"),
        (Setting(size=20), "20 has no position table"),
        (Setting(keep=(0.5, 0.5)), "one number per dropping block, 3"),
        (Setting(tokens=(9, 9)), "one number per dropping block, 3"),
        (Setting(size=16, tokens=(17, 9, 9)), "block 1 has 16 patches, it cannot keep 17"),
        (Setting(window=4), "a SuperViT has no windows"),
    ],
)
def test_settings_that_do_not_fit_the_net(setting, message):
    with pytest.raises(ValueError, match=message):
        build(DEIT)(IMAGES.float(), setting)
    with pytest.raises(ValueError, match=message):  # and so says who only counts
        count(DEIT, setting)


@pytest.mark.parametrize("fields", [{"sizes": ()}, {"sizes": (16, (16, 16))}, {"sizes": (18,)}, {"keeps": (0.0,)}, {"drop_blocks": (5,)},
                                    {"drop_blocks": (2, 1)}, {"heads": 5}, {"skip": 0.0}, {"patch": 0}, {"registers": -1},
                                    {"keeps": (0.5, 0.5, 1.0)}, {"token_head": math.nan}, {"token_head": -1.0}])  # fmt: skip
def test_nets_that_are_refused(fields):
    with pytest.raises(ValueError, match=f"field `{next(iter(fields))}`|field `size`"):
        replace(DEIT, **fields)


def test_a_net_that_would_leave_out_pixels_of_a_conv_stem_is_refused():
    with pytest.raises(ValueError, match="even number"):
        replace(LV, patch=3, sizes=(24,))


KEEPS = st.floats(0, 1, exclude_min=True)
SIZES = st.one_of(st.none(), st.integers(1, 999), st.tuples(st.integers(1, 999), st.integers(1, 999)))


@given(
    st.one_of(
        st.builds(Setting, size=SIZES, keep=st.one_of(KEEPS, st.lists(KEEPS, min_size=2, max_size=4).map(tuple))),
        st.builds(Setting, size=SIZES, tokens=st.lists(st.integers(1, 99), min_size=2).map(lambda n: tuple(sorted(n, reverse=True)))),
        st.builds(Setting, size=SIZES, window=st.one_of(st.integers(1, 64), st.tuples(st.integers(1, 64), st.integers(1, 64)))),
    )
)
def test_settings_are_read_back_from_their_text(setting):
    assert Setting.read(str(setting)) == setting


@pytest.mark.parametrize("text", ["", "a", "224/x", "224/b=3", "224/window=a", "1.5/0.5"])
def test_text_that_says_no_setting(text):
    with pytest.raises(ValueError, match="write size/keep"):
        Setting.read(text)


@given(st.integers(1, 40), st.integers(1, 40), KEEPS, st.sampled_from(["supervit", "patches"]), st.booleans())
def test_counts_fall_and_leave_one(height, width, keep, rule, fuse):
    config = replace(DEIT, positions="interpolated", count_rule=rule, fuse=fuse)
    counts = config.counts(Setting(size=(4 * height, 4 * width), keep=keep))
    assert height * width >= counts[0] and min(counts) >= 1
    assert all(later <= earlier + fuse for earlier, later in pairwise(counts))
    if keep == 1:
        assert counts == (height * width,) * 3
