"""One weight set for many settings: which are drawn, what each learns from whom, and that a run of it is an ordinary run."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import manyscale as ms
from manyscale.config import Augment, Input, Optim, Parallel, Run, Schedule, Setting, Supernet, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.data.loader import seed_from
from manyscale.data.transforms import preprocess_for
from manyscale.models import build, compile_settings
from manyscale.ops.images import resized
from manyscale.tasks import open_task, supernet
from manyscale.tasks.classify import score
from manyscale.tasks.supernet import (
    LearnMany,
    as_prepared,
    as_whole,
    distillation,
    draw_box,
    draw_passes,
    mask_of,
    mixed,
    own_share,
    scaled,
    score_settings,
    shaded,
)
from manyscale.train import loop
from manyscale.train.loop import Stopped, train
from manyscale.train.optim import decays
from manyscale.train.state import State
from tests.conftest import loud
from tests.train.test_loop import fingerprint, train_in_pieces

NET = SuperViTConfig(
    sizes=(8, 12, 16), keeps=(0.5, 0.7, 1.0), patch=4, width=16, depth=4, heads=2, mlp_width=24, drop_blocks=(1, 2), classes=10
)
LV = replace(NET, stem="conv", stem_width=4, skip=2.0, token_head=0.25, qkv_bias=False)
SMALL, MIDDLE, LARGE = Setting(size=8), Setting(size=12), Setting(size=16)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with everything on that could break a resume."""
    return Run(
        recipe="super",
        task="supernet",
        model=replace(NET, drop_path=0.1),
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0),
        augment=Augment(scale=(0.5, 1.0), mixup=0.4, smoothing=0.1, repeats=3),
        optim=Optim(lr=2e-3, ema=0.9),
        schedule=Schedule(length="10-steps", warmup="2-steps", evaluate_every="5-steps"),
        batch=120,
        accumulate=2,
        precision="float32",
        out=str(tmp_path / "run"),
        log_every=1,
    )


def task_of(run: Run) -> LearnMany:
    return open_task(run)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(count, 10, generator=generator, dtype=torch.float64).softmax(-1)


# --- Which settings ----------------------------------------------------------------------------------------------------------


def passes(sampling: str, step: int, teacher: str = "size", settings: tuple[Setting, ...] = NET.settings) -> list[Setting]:
    return draw_passes(settings, Supernet(sampling=sampling, teacher=teacher), np.random.default_rng(step))


def test_the_papers_passes():
    """(224, 1), (224, r), (s, 1), (s, r') with r, r' and s uniform."""
    drawn = [passes("paper", step) for step in range(600)]
    for first, second, third, fourth in drawn:
        assert first == LARGE and as_whole(second) == LARGE and not second.is_full
        assert third in (SMALL, MIDDLE) and as_whole(fourth) == third and not fourth.is_full
    for place, kinds in ((1, 2), (2, 2), (3, 4)):
        counts = Counter(p[place] for p in drawn)
        assert len(counts) == kinds and all(abs(n / 600 - 1 / kinds) < 0.1 for n in counts.values())
    assert drawn == [passes("paper", step) for step in range(600)]


@pytest.mark.parametrize("teacher", ["size", "largest", "average"])
def test_sandwich_has_the_largest_the_cheapest_and_two_more(teacher):
    seen = set()
    for step in range(200):
        drawn = passes("sandwich", step, teacher)
        assert drawn[0] == LARGE and Setting(size=8, keep=0.5) in drawn and len(set(drawn)) == len(drawn)
        if teacher == "size":  # whoever drops tokens comes behind who teaches it
            assert all(as_whole(s) in drawn[: drawn.index(s)] for s in drawn if not s.is_full)
        else:
            assert len(drawn) == 4
        seen |= set(drawn)
    assert seen == set(NET.settings)


def test_all_settings_and_single_ones():
    drawn = passes("all", 0)
    assert sorted(map(str, drawn)) == sorted(map(str, NET.settings)) and drawn[0] == LARGE
    assert all(as_whole(s) in drawn[: drawn.index(s)] for s in drawn if not s.is_full)
    assert passes("paper", 0, settings=replace(NET, sizes=(16,), keeps=(1.0,)).settings) == [LARGE]
    assert len(passes("paper", 0, settings=replace(NET, keeps=(1.0,)).settings)) == 2
    assert [s.keep for s in passes("paper", 0, settings=replace(NET, sizes=(16,), keeps=(0.5,)).settings)] == [1.0, 0.5]


# --- What is learnt from whom ------------------------------------------------------------------------------------------------


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The mean over the batch of sum p (log p - log q), by hand."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def test_the_papers_objective_by_hand(run):
    task = task_of(replace(run, model=NET))
    model = loud(build(NET)).double().eval()
    images, targets = batch()
    for step in range(4):
        found = list(task.losses(model, images, targets, step))
        first, second, third, fourth = draw_passes(NET.settings, run.supernet, np.random.default_rng(seed_from(run.seed, step)))
        with torch.no_grad():
            whole, small = model(images, first), model(images, third)
            expected = [
                -(targets * whole.log_softmax(-1)).sum(-1).mean(), kl(whole, model(images, second)),
                -(targets * small.log_softmax(-1)).sum(-1).mean(), kl(small, model(images, fourth)),
            ]  # fmt: skip
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)  # losses are taken in float32


def test_teachers_get_no_gradient(run):
    task = task_of(replace(run, model=NET))
    model = loud(build(NET)).eval()
    images, targets = (t.float() for t in batch())
    losses = task.losses(model, images, targets, 0)
    next(losses)
    distilled = next(losses)
    setting = draw_passes(NET.settings, run.supernet, np.random.default_rng(seed_from(0, 0)))[1]
    distilled.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    kl(model(images).detach(), model(images, setting)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


def test_one_step_adds_up_the_gradients_of_all_passes(run, monkeypatch):
    """Whether a batch is passed whole or in parts, what reaches the optimiser is the sum over passes of the mean over the batch."""
    plain = replace(
        run, model=NET, augment=Augment(crop="none", flip=0.0), optim=Optim(clip=0.0), schedule=replace(run.schedule, length="1-steps")
    )
    steps = {}
    for parts in (1, 2, 4):
        out = replace(plain, accumulate=parts, out=f"{run.out}{parts}")
        train(out)
        steps[parts] = torch.cat([p.flatten() for p in ms.load(out.out).parameters()])
    for a, b in combinations(steps, 2):
        torch.testing.assert_close(steps[a], steps[b], rtol=1e-4, atol=2e-6)


def test_the_largest_and_the_average_as_teachers(run):
    images, targets = (t.float() for t in batch())
    model, average = loud(build(NET)).eval(), loud(build(NET), seed=1).train()
    learns = Supernet(teacher="largest", sampling="all", label_share=0.25, temperature=2.0)
    found = list(task_of(replace(run, model=NET, supernet=learns)).losses(model, images, targets, 0, average))
    order = draw_passes(NET.settings, learns, np.random.default_rng(0))
    with torch.no_grad():
        whole = model(images)
        for setting, loss in zip(order, found, strict=True):
            logits = model(images, setting)
            label, soft = -(targets * logits.log_softmax(-1)).sum(-1).mean(), 4 * kl(whole / 2, logits / 2)
            expected = label if setting == LARGE else 0.25 * label + 0.75 * soft if setting.is_full else soft
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        learns = replace(learns, teacher="average", temperature=1.0)
        found = list(task_of(replace(run, model=NET, supernet=learns)).losses(model, images, targets, 0, average))
        assert not average.training
        said = average(images)
        for setting, loss in zip(order, found, strict=True):
            logits = model(images, setting)
            label, soft = -(targets * logits.log_softmax(-1)).sum(-1).mean(), kl(said, logits)
            torch.testing.assert_close(loss, 0.25 * label + 0.75 * soft if setting.is_full else soft, rtol=1e-4, atol=1e-6)


def test_another_net_as_teacher(run, tmp_path):
    teacher = loud(build(SwinConfig(image_size=24, patch=4, window=3, width=16, depths=(1, 1), heads=(2, 2), classes=10)), seed=2).eval()
    task = task_of(replace(run, model=NET))
    own = task.preprocess
    teacher.preprocess = replace(own, image_size=(24, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    teacher.labels = task.labels
    ms.save(teacher, tmp_path / "teacher")
    learns = Supernet(teacher="other", teacher_run=str(tmp_path / "teacher"), mix_token=1.0)
    task = task_of(replace(run, model=NET, augment=Augment(), supernet=learns))
    model = loud(build(NET)).eval()
    images, targets = (t.float() for t in batch())
    found = list(task.losses(model, images, targets, 3))
    generator = np.random.default_rng(seed_from(run.seed, 3))
    order, box = draw_passes(NET.settings, learns, generator), draw_box((4, 4), 1.0, generator)
    share = own_share(box, (4, 4))
    assert 0 < share < 1, "another step, for a box that mixes"
    with torch.no_grad():
        pixels = images * torch.tensor(own.std)[:, None, None] + torch.tensor(own.mean)[:, None, None]
        theirs = (pixels - torch.tensor((0.1, 0.2, 0.3))[:, None, None]) / torch.tensor((0.4, 0.5, 0.6))[:, None, None]
        said = teacher(resized(theirs, (24, 24))).softmax(-1)
        said = share * said + (1 - share) * said.flip(0)
        targets = share * targets + (1 - share) * targets.flip(0)
        for setting, loss in zip(order, found, strict=True):
            logits = model(images, setting, mirrored=mask_of(box, (4, 4), NET.grid_of(setting.size), torch.device("cpu")))
            expected = -(targets * logits.log_softmax(-1)).sum(-1).mean() if setting.is_full else kl(said.log(), logits)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("token_labels", ["picture", "teacher"])
def test_every_patch_learns_its_own_label(run, tmp_path, token_labels):
    """The head on patches sees, inside the box, the label of the picture the patch came from; the class token a mixture."""
    more = {}
    if token_labels == "teacher":
        dense = ViTConfig(image_size=16, patch=4, width=16, depth=1, heads=2, mlp_width=16, classes=10, pool="gap")
        teacher = loud(build(dense), seed=3).eval()
        teacher.preprocess, teacher.labels = task_of(replace(run, model=NET)).preprocess, task_of(replace(run, model=NET)).labels
        ms.save(teacher, tmp_path / "teacher")
        more = {"teacher_run": str(tmp_path / "teacher")}
    learns = Supernet(mix_token=1.0, token_labels=token_labels, token_weight=0.5, **more)
    task = task_of(replace(run, model=LV, augment=Augment(), supernet=learns))
    model = loud(build(LV)).eval()
    images, targets = (t.float() for t in batch())
    first = next(task.losses(model, images, targets, 3))
    generator = np.random.default_rng(seed_from(run.seed, 3))
    draw_passes(LV.settings, learns, generator)
    top, left, bottom, right = box = draw_box((4, 4), 1.0, generator)
    with torch.no_grad():
        whole, patches = model(images, LARGE, mirrored=mask_of(box, (4, 4), (4, 4), torch.device("cpu")), both=True)
        share = 1 - (bottom - top) * (right - left) / 16
        if token_labels == "teacher":
            maps = teacher.last_map(images)
            words = [[teacher.head(maps[:, :, y, x]).softmax(-1) for x in range(4)] for y in range(4)]
        else:
            words = [[targets] * 4 for _ in range(4)]
        total = -((share * targets + (1 - share) * targets.flip(0)) * whole.log_softmax(-1)).sum(-1).mean()
        for y in range(4):
            for x in range(4):
                word = words[y][x].flip(0) if top <= y < bottom and left <= x < right else words[y][x]
                total = total - 0.5 / 16 * (word * patches[:, 4 * y + x].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(first, total, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.2, 3), st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20))
def test_boxes_lie_in_their_grid(h, w, alpha, seed, small_h, small_w):
    top, left, bottom, right = box = draw_box((h, w), alpha, np.random.default_rng(seed))
    assert 0 <= top <= bottom <= h and 0 <= left <= right <= w and 0 <= own_share(box, (h, w)) <= 1
    mask = mask_of(box, (h, w), (small_h, small_w), torch.device("cpu"))
    assert mask.shape == (small_h, small_w) and mask_of(None, (h, w), (h, w), torch.device("cpu")) is None
    top, left, bottom, right = scaled(box, (h, w), (small_h, small_w))
    assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)
    assert 0 <= top <= bottom <= small_h and 0 <= left <= right <= small_w
    assert scaled(box, (h, w), (h, w)) == box


def test_boxes_take_the_share_that_beta_says():
    """Away from the edges: side sqrt(1 - lambda), lambda uniform for alpha 1; averaged over boxes that the edges cut."""
    shares = [own_share(draw_box((64, 64), 1.0, np.random.default_rng(seed)), (64, 64)) for seed in range(2000)]
    places = np.random.default_rng(0).random((20_000, 3))
    side = np.sqrt(1 - places[:, 0])
    spans = [np.minimum(c + side / 2, 1) - np.maximum(c - side / 2, 0) for c in places[:, 1:].T]
    assert abs(np.mean(shares) - np.mean(1 - spans[0] * spans[1])) < 0.02


def test_small_functions():
    targets = torch.eye(3)
    assert mixed(targets, None, (4, 4)) is targets
    assert torch.allclose(mixed(targets, (0, 0, 2, 4), (4, 4))[0], torch.tensor([0.5, 0.0, 0.5]))
    assert scaled((1, 2, 4, 4), (4, 4), (3, 3)) == (0, 1, 3, 3)
    logits = torch.randn(4, 5)
    assert distillation(logits, logits + 3).abs() < 1e-6
    run_preprocess = preprocess_for(Input(data="digits", statistics="half"), (16, 16), None)
    images = torch.randn(2, 3, 16, 16)
    assert as_prepared(images, run_preprocess, run_preprocess) is images


# --- As a run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deit", "lvvit", "swin"])
def test_a_run_resumes_bit_by_bit(run, kind, tmp_path, monkeypatch):
    if kind == "lvvit":
        run = replace(
            run, model=replace(LV, stem_statistics="per-size"), augment=Augment(), supernet=Supernet(mix_token=1.0, sampling="sandwich")
        )
    if kind == "swin":
        swin = SwinConfig(image_size=16, patch=2, window=4, width=8, depths=(1, 1), heads=(2, 2))
        run = replace(run, model=swin, supernet=Supernet(settings=("8/window=2", "16/window=4"), teacher="average", label_share=0.5))
    whole = train(run)
    count = 2 if kind == "swin" else 9
    each = [value for name, value in whole["last"].items() if name.startswith("accuracy ")]
    assert whole["steps"] == 10 and len(each) == count and whole["last"]["mean_accuracy"] == pytest.approx(sum(each) / count)
    assert (Path(run.out) / "samples.png").stat().st_size > 0
    pieces = replace(run, out=str(tmp_path / "pieces"))
    assert train_in_pieces(pieces, monkeypatch, 4) >= 3
    assert fingerprint(pieces.out) == fingerprint(run.out)


@pytest.mark.parametrize("mix_token", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_compiled_settings_train_as_eager_ones(run, monkeypatch, mix_token):
    """And boxes of MixToken, which differ from step to step, make no new graphs; nor do whole passes that are no setting."""
    made, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(supernet, "compile_settings", lambda *args: made.append(compile_settings(*args, backend=backend)) or made[0])
    net = replace(NET, sizes=(8, 16), keeps=(0.5,) if mix_token else (0.5, 1.0))
    augment = Augment() if mix_token else run.augment
    schedule = replace(run.schedule, length="4-steps")
    run = replace(run, model=net, optim=Optim(), schedule=schedule, augment=augment, supernet=Supernet(mix_token=mix_token))
    compiled = replace(run, compile=True, out=run.out + "c")
    train(run), train(compiled)
    losses = [[json.loads(line).get("loss") for line in (Path(r.out) / "metrics.jsonl").read_text().splitlines()] for r in (run, compiled)]
    assert len(made[0]) == 4 and len(graphs) == 4
    assert [x for x in losses[0] if x] == pytest.approx([x for x in losses[1] if x], rel=1e-4)


def test_a_loss_of_a_later_pass_that_is_not_finite_is_blamed(run, monkeypatch):
    """Positions of a small size are not touched by the first two passes."""
    real = loop._Training._step

    def poison(self, batch, lr):
        with torch.no_grad():
            self.state.model.positions[0][0, 0], self.state.model.positions[1][0, 0] = math.nan, math.nan
        return real(self, batch, lr)

    monkeypatch.setattr(loop._Training, "_step", poison)
    with pytest.raises(Stopped, match=r"step 1: the loss is not finite, first in module blocks\.0\.norm1"):
        train(replace(run, nonfinite=0))


def test_scores_of_all_settings_are_those_of_each(run):
    task = task_of(run)
    model = loud(build(NET)).train()
    found = score_settings(model, task.eval_batches(), NET.settings, torch.device("cpu"), torch.float32, print)
    assert model.training

    class At(torch.nn.Module):
        def __init__(self, setting):
            super().__init__()
            self.model, self.setting = model, setting

        def forward(self, x):
            return self.model(x, self.setting)

    for setting in NET.settings:
        alone = score(At(setting), task.eval_batches(), torch.device("cpu"), torch.float32, print)
        assert found[f"accuracy {setting}"] == alone["accuracy"]
    assert found["val_loss"] == pytest.approx(alone["val_loss"]) and found["accuracy"] == alone["accuracy"]
    corners = task_of(replace(run, supernet=Supernet(watch="corners"))).evaluate(model, torch.device("cpu"), torch.float32, print)
    assert [name for name in corners if name.startswith("accuracy ")] == ["accuracy 8/0.5", "accuracy 16/1"]


@pytest.mark.parametrize("fuse", [False, True])
def test_what_stays_is_shown_as_it_is_and_the_rest_under_grey(fuse):
    model = loud(build(replace(NET, fuse=fuse))).eval()
    images = torch.rand(2, 3, 16, 16)
    seen = model.tokens(images, Setting(size=16, keep=0.5))
    shown = shaded(images, seen, 4)
    for j in range(2):
        alpha = dict.fromkeys(range(16), 1.0)
        alpha |= {place: 0.08 + 0.3 * number for number, gone in enumerate(seen.left) for place in gone.places[j].tolist() if place >= 0}
        assert sorted(place for place, a in alpha.items() if a == 1) == sorted(place for place in seen.places[j].tolist() if place >= 0)
        for place, a in alpha.items():
            rows, columns = slice(place // 4 * 4, place // 4 * 4 + 4), slice(place % 4 * 4, place % 4 * 4 + 4)
            torch.testing.assert_close(shown[j, :, rows, columns], a * images[j, :, rows, columns] + (1 - a) * 0.75)


def test_starts_from_a_vit(run, tmp_path):
    vit = loud(build(ViTConfig(image_size=16, patch=4, width=16, depth=4, heads=2, mlp_width=24, classes=7, pool="token", gelu="exact")))
    ms.save(vit, tmp_path / "vit")
    model = task_of(replace(run, init=str(tmp_path / "vit"))).model()
    assert model.config == replace(run.model, classes=10)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.branch.fc1.weight) and model.head.weight.shape == (10, 16)
    again = replace(run, init=str(tmp_path / "super"), model=replace(NET, sizes=(16, 20)))
    ms.save(model, tmp_path / "super")
    assert torch.equal(task_of(again).model().positions[0], model.positions[2])


def test_goes_on_with_the_net_it_started_from(run, tmp_path):
    """Its heads, patches and blocks are those of `init`, whatever the recipe says; sizes and keep rates are the recipe's."""
    begun = loud(build(replace(LV, keeps=(0.7, 1.0), drop_blocks=(0, 2))))
    begun.preprocess = task_of(run).preprocess
    ms.save(begun, tmp_path / "begun")
    tuned = replace(run, init=str(tmp_path / "begun"), model=replace(NET, sizes=(8, 16)), schedule=replace(run.schedule, length="2-steps"))
    found = train(tuned)["last"]
    assert [name for name in found if name.startswith("accuracy ")] == [f"accuracy {s}/{k}" for s in (8, 16) for k in ("0.5", "0.7", "1")]
    config = ms.load(run.out).config
    assert (config.sizes, config.keeps, config.drop_blocks, config.token_head) == ((8, 16), NET.keeps, (0, 2), 0.25)


def test_the_average_has_averaged_statistics(run):
    state = State(loud(build(LV)), Optim(ema=0.9))
    start = state.model.stem.norm1.mean.clone()
    state.ema.update_parameters(state.model)
    state.model.stem.norm1.mean += 1.0
    state.ema.update_parameters(state.model)
    torch.testing.assert_close(state.final.stem.norm1.mean, start + 0.1)


def test_positions_and_registers_are_not_decayed(run):
    found = decays(build(replace(LV, registers=2)), Optim(weight_decay=0.1, head_decay=0.3))
    assert {name for name, decay in found.items() if not decay} >= {"positions.0", "positions.2", "registers", "token"}
    assert found["head.weight"] == found["token_head.weight"] == 0.3 and found["blocks.0.attention.qkv.weight"] == 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": ViTConfig(image_size=16, patch=4, width=16, depth=2, heads=2, mlp_width=16)},
            "field `task`: supernet trains a SuperViT",
        ),
        ({"model": SwinConfig(image_size=16, patch=2, window=4, width=8, depths=(1, 1), heads=(2, 2))}, "say which a Swin learns"),
        ({"supernet": Supernet(teacher="average"), "optim": Optim()}, "field `teacher`.*give --ema"),
        ({"supernet": Supernet(mix_token=1.0)}, "field `mix_token`.*turn off"),
        ({"task": "simmim"}, "a SuperViT has no mask token"),
        ({"loss": "sigmoid"}, "field `loss`.*give softmax"),
        ({"supernet": Supernet(settings=("8/0.3",))}, "field `settings`: a SuperViT has sizes and keep rates"),
    ],
)
def test_what_a_run_refuses(run, fields, message):
    with pytest.raises(ValueError, match=message):
        open_task(replace(run, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "other"}, "teacher_run"),
        ({"token_labels": "teacher"}, "teacher_run"),
        ({"teacher_run": "runs/x"}, "teacher_run"),
        ({"temperature": 0.0}, "temperature"),
        ({"label_share": 1.1}, "label_share"),
        ({"mix_token": -1.0}, "mix_token"),
        ({"token_weight": math.nan}, "token_weight"),
        ({"settings": ("16/2",)}, "keep"),
    ],
)
def test_what_the_settings_refuse(fields, message):
    with pytest.raises(ValueError, match=f"field `{message}`"):
        Supernet(**fields)


def test_teachers_that_cannot_teach(run, tmp_path):
    token = loud(build(ViTConfig(image_size=16, patch=4, width=16, depth=1, heads=2, mlp_width=16, classes=10, pool="token")))
    token.preprocess = task_of(replace(run, model=NET)).preprocess
    ms.save(token, tmp_path / "token")
    learns = Supernet(token_labels="teacher", teacher_run=str(tmp_path / "token"))
    with pytest.raises(ValueError, match="says nothing of single patches"):
        task_of(replace(run, model=LV, supernet=learns))
    with pytest.raises(ValueError, match="no head on its patches"):
        task_of(replace(run, supernet=learns))
    ms.save(ms.transfer(token, classes=3), tmp_path / "three")
    with pytest.raises(ValueError, match="was not trained on these 10 classes"):
        task_of(replace(run, supernet=Supernet(teacher="other", teacher_run=str(tmp_path / "three"))))


def test_cross_entropy_on_patches_is_the_mean_over_them():
    logits, words = torch.randn(3, 4, 5), torch.rand(3, 4, 5).softmax(-1)
    assert torch.allclose(F.cross_entropy(logits.mT, words.mT, reduction="none").mean(), -(words * logits.log_softmax(-1)).sum(-1).mean())


def test_batch_norms_of_sizes_cannot_be_exact(run):
    """They look at the pictures of one part: their averages depend on how many ranks there are."""
    with pytest.raises(ValueError, match="field `elastic`: batch norms look at the pictures of one rank"):
        train(replace(run, model=LV, augment=Augment(), parallel=Parallel(elastic="exact")))
