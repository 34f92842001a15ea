"""SimMIM's target, loss and net against plain loops in float64, and whole runs of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import manyscale as ms
from manyscale.config import Augment, Input, Optim, Run, Schedule, SimMIM, SwinConfig
from manyscale.heads.pixels import MaskedImages, Pixels, is_masked, load_masked, save_masked
from manyscale.models import build
from manyscale.tasks.simmim import Pretrain, draw_painted, local_norm, mask_unit, masked_l1, on_pixels, paint
from manyscale.train.loop import Stopped, train
from tests.conftest import loud
from tests.train.test_loop import fingerprint, train_in_pieces

TINY = SwinConfig(image_size=16, patch=2, window=4, width=8, depths=(2, 1), heads=(2, 4), mlp_ratio=1.0, classes=0, mask_token=True)


@pytest.fixture
def pretrain(tmp_path) -> Run:
    return Run(
        recipe="pretrain",
        task="simmim",
        model=replace(TINY, drop_path=0.1),
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0),
        augment=Augment(scale=(0.67, 1.0)),
        optim=Optim(lr=2e-3, ema=0.9),
        schedule=Schedule(epochs=2, warmup=0.5),
        simmim=SimMIM(mask_unit=4, target_window=5),
        batch=240,
        accumulate=2,
        precision="float32",
        out=str(tmp_path / "run"),
        log_every=1,
    )


# --- target and loss ---------------------------------------------------------------------------------------------------


def normalised_by_hand(image, window):
    """Plain Python over the pixels of one channel: mean and unbiased variance of those that are in the picture."""
    height, width, half = len(image), len(image[0]), window // 2
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            around = [image[v][u] for v in range(max(0, y - half), min(height, y + half + 1))
                      for u in range(max(0, x - half), min(width, x + half + 1))]  # fmt: skip
            mean = math.fsum(around) / len(around)
            variance = math.fsum((a - mean) ** 2 for a in around) / max(len(around) - 1, 1)
            row.append((image[y][x] - mean) / math.sqrt(variance + 1e-6))
        result.append(row)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(("size", "window"), [((9, 9), 3), ((12, 7), 5), ((8, 8), 47), ((1, 5), 3), ((1, 1), 3), ((3, 2), 7)])
def test_local_norm_is_that_of_a_plain_loop(size, window):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = torch.stack([torch.stack([normalised_by_hand(channel.tolist(), window) for channel in image]) for image in images])
    local = local_norm(images, window)
    torch.testing.assert_close(local.target, by_hand, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(local.target * local.deviation + local.mean, images, rtol=1e-12, atol=1e-12)
    assert (local_norm(images.float(), window).target - by_hand).abs().max() < 2e-4


def test_local_norm_at_its_edges():
    flat = local_norm(torch.full((1, 3, 64, 64), 0.7), 47)
    assert flat.target.isfinite().all() and flat.target.abs().max() < 0.05  # nothing but rounding over the 1e-3 of an empty variance
    raw = torch.randn(1, 3, 4, 4)
    assert local_norm(raw, 0).target is raw
    half = torch.randn(1, 3, 16, 16).to(torch.bfloat16)
    assert local_norm(half, 5).target.dtype == torch.float32


def test_local_norm_golden():
    """Stored values: 47 px on a picture that has corners, edges and a middle; a change of any constant shows."""
    y, x = torch.meshgrid(torch.arange(96.0, dtype=torch.float64), torch.arange(96.0, dtype=torch.float64), indexing="ij")
    image = (torch.sin(x / 7) * torch.cos(y / 11) + 0.01 * x)[None, None].expand(1, 3, 96, 96)
    local = local_norm(image, 47)
    places = [(0, 0), (0, 47), (95, 95), (48, 48), (13, 80)]
    found = torch.stack([torch.stack([t[0, 0, a, b] for t in local]) for a, b in places])
    torch.testing.assert_close(found, torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def loss_by_hand(pixels, target, mask, patch):
    total, count = 0.0, 0
    for b, picture in enumerate(mask.tolist()):
        for h, row in enumerate(picture):
            for w, hidden in enumerate(row):
                if hidden:
                    block = (slice(h * patch, (h + 1) * patch), slice(w * patch, (w + 1) * patch))
                    total += math.fsum((pixels[b, :, *block] - target[b, :, *block]).abs().flatten().tolist())
                    count += patch * patch
    return total / (count + 1e-5) / pixels.shape[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_a_plain_loop(share):
    generator = torch.Generator().manual_seed(1)
    pixels, target = (torch.randn(3, 3, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 6, 4, generator=generator) < share
    found = masked_l1(pixels, target, mask, (2, 2))
    assert found.item() == pytest.approx(loss_by_hand(pixels, target, mask, 2), rel=1e-12, abs=1e-12)
    shown = ~on_pixels(mask, (2, 2)).expand_as(pixels)
    changed = torch.where(shown, pixels + 100, pixels)  # what the net paints over what it saw does not count
    assert masked_l1(changed, target, mask, (2, 2)) == found


def test_the_task_computes_the_papers_loss(pretrain):
    """The whole path once more in float64 by its own parts: mask token, last map, 1 x 1 convolution, pixel shuffle."""
    task = Pretrain(pretrain)
    model = loud(task.model()).double().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.6
    tokens = model.encoder.patch(images)
    tokens = torch.where(mask[..., None], model.encoder.mask_token.token, tokens)
    for stage in model.encoder.stages:
        tokens = stage.merge(stage(tokens))
    tokens = model.encoder.norm(tokens)  # (B, 4, 4, 16)
    weight, bias = model.head.proj.weight[:, :, 0, 0], model.head.proj.bias
    blocks = (tokens @ weight.T + bias).reshape(4, 4, 4, 3, 4, 4)  # (B, h, w, channel, y, x)
    painted = blocks.permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 16, 16)
    torch.testing.assert_close(model(images, mask), painted, rtol=1e-12, atol=1e-12)
    target = torch.stack([torch.stack([normalised_by_hand(c.tolist(), 5) for c in image]) for image in images])
    assert task.loss(model, images, mask).item() == pytest.approx(loss_by_hand(painted, target, mask, 2), rel=1e-6)


def test_halves_of_a_batch_average_to_its_loss(pretrain):
    """What gradient accumulation relies on: every picture hides as much as every other."""
    task = Pretrain(pretrain)
    model = loud(task.model()).eval()
    batch = next(task.train_batches(0, 1, torch.device("cpu")))
    images, mask = task.targets(batch, torch.device("cpu"))
    whole = task.loss(model, images, mask)
    parts = [task.loss(model, i, m) for i, m in zip(images.chunk(2), mask.chunk(2), strict=True)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-5)


# --- the net -----------------------------------------------------------------------------------------------------------


def test_hidden_pixels_do_not_reach_the_net():
    model = loud(MaskedImages(build(TINY))).eval()
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 8, 8) < 0.5
    other = torch.where(on_pixels(mask, (2, 2)), torch.randn_like(images), images)
    assert torch.equal(model(images, mask), model(other, mask))
    assert not torch.equal(model(images, mask), model(images, ~mask))


def test_no_mask_is_the_net_without_a_token():
    with_token = loud(build(TINY)).eval()
    plain = build(replace(TINY, mask_token=False)).eval()
    plain.load_state_dict({k: v for k, v in with_token.state_dict().items() if not k.startswith("mask_token")})
    images = torch.randn(2, 3, 20, 28)
    assert torch.equal(with_token(images), plain(images))
    assert torch.equal(with_token(images, torch.zeros(2, 10, 14, dtype=torch.bool)), plain(images))
    assert torch.allclose(with_token.last_map(images).mean((2, 3)), with_token.features(images).pooled, atol=1e-6)


def test_masks_that_do_not_fit_are_answered():
    model, plain = build(TINY), build(replace(TINY, mask_token=False))
    images, mask = torch.randn(1, 3, 16, 16), torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask_token=True"):
        plain(images, mask)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 4\), the patches \(1, 8, 8\)"):
        model(images, mask[:, ::2, ::2])
    with pytest.raises(ValueError, match="mask_token=True"):
        MaskedImages(plain)
    with pytest.raises(ValueError, match="square patches"):
        MaskedImages(build(replace(TINY, image_size=(4, 16, 16), patch=(2, 2, 2), window=2)))


def test_what_padding_added_is_cut_off():
    model = loud(MaskedImages(build(replace(TINY, image_size=20)))).eval()  # 10 patches: the merging pads nothing, 18 / 2 = 9 does
    for height, width in ((18, 18), (20, 18), (16, 20)):
        mask = torch.zeros(1, height // 2, width // 2, dtype=torch.bool)
        assert model(torch.randn(1, 3, height, width), mask).shape == (1, 3, height, width)


def test_a_token_gives_the_pixels_under_it():
    head = loud(Pixels(4, 3))
    tokens = torch.randn(2, 4, 5, 6)
    changed = tokens.clone()
    changed[:, :, 2, 4] += 1
    moved = (head(tokens) != head(changed)).any(1)
    assert moved[:, 6:9, 12:15].all() and moved.sum() == 2 * 9


def test_parameters_are_initialised_and_belong_to_layers():
    model = MaskedImages(build(TINY))
    token = model.encoder.mask_token.token
    assert 0.005 < token.std() < 0.05 and token.abs().max() <= 2.0
    assert model.layer("encoder.mask_token.token") == model.layer("encoder.patch.proj.weight") == 0
    assert model.layer("encoder.stages.0.blocks.1.mlp.branch.fc1.weight") == 2
    assert model.layer("head.proj.weight") == model.layer("encoder.norm.weight") == model.layers - 1


def test_files_hold_encoder_and_head(tmp_path):
    model = loud(MaskedImages(build(TINY)))
    save_masked(model, tmp_path / "best")
    again = load_masked(tmp_path)
    assert is_masked(tmp_path) and not is_masked(tmp_path / "nowhere")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(ms.load(tmp_path).state_dict()["mask_token.token"], model.encoder.mask_token.token)
    save_masked(MaskedImages(build(replace(TINY, depths=(2, 1, 1), heads=(2, 4, 8)))), tmp_path / "other")
    (tmp_path / "best" / "pixels.safetensors").write_bytes((tmp_path / "other" / "pixels.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"pixels\.safetensors: the head is"):
        load_masked(tmp_path)
    with pytest.raises(ValueError, match="give the folder of a SimMIM run"):
        load_masked(tmp_path / "nowhere")


def test_transfer_gives_and_takes_the_token():
    model = loud(build(TINY))
    without = ms.transfer(model, 16, mask_token=False)
    assert without.mask_token is None and torch.equal(
        without.stages[1].blocks[0].mlp.branch.fc1.weight, model.stages[1].blocks[0].mlp.branch.fc1.weight
    )
    assert ms.transfer(without, 32, 8, mask_token=True).mask_token is not None
    assert torch.equal(ms.transfer(model, 32, 8).mask_token.token, model.mask_token.token)


# --- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_learns_paints_and_hands_its_encoder_on(pretrain, micro):
    longer = replace(pretrain, schedule=replace(pretrain.schedule, epochs=4), optim=Optim(lr=4e-3))
    summary = train(longer)
    history = [json.loads(line) for line in (Path(longer.out) / "metrics.jsonl").read_text().splitlines()]
    errors = [record["l1"] for record in history if "l1" in record]
    assert summary["best"]["l1"] == min(errors) < 0.97 * errors[0]
    assert (Path(longer.out) / "samples.png").stat().st_size > 5000
    tuned = replace(
        micro, init=longer.out, model=replace(micro.model, window=4), schedule=Schedule(epochs=1, warmup=0), out=micro.out + "-tuned"
    )
    train(tuned)
    model = ms.load(tuned.out)
    assert model.mask_token is None and model.config.classes == 10


def test_a_resumed_run_is_bit_exact(pretrain, tmp_path, monkeypatch):
    """Masks too: they follow from the step's seed."""
    train(pretrain)
    pieces = replace(pretrain, out=str(tmp_path / "pieces"))
    assert train_in_pieces(pieces, monkeypatch, 4) >= 2
    assert fingerprint(pieces.out) == fingerprint(pretrain.out)
    heads = [(Path(run.out) / "best" / "pixels.safetensors").read_bytes() for run in (pretrain, pieces)]
    assert heads[0] == heads[1]


def test_a_loss_that_is_not_finite_names_its_module(pretrain, monkeypatch):
    real = Pretrain.model

    def poisoned(self):
        model = real(self)
        torch.nn.init.constant_(model.encoder.stages[0].blocks[1].mlp.branch.fc2.weight, float("inf"))
        torch.nn.init.ones_(model.encoder.stages[0].blocks[1].mlp.norm_out.weight)
        return model

    monkeypatch.setattr(Pretrain, "model", poisoned)
    with pytest.raises(Stopped, match=r"the loss is not finite, first in module encoder\.stages\.0\.blocks\.1\.mlp") as stopped:
        train(pretrain)
    assert stopped.value.diverged


def test_an_init_brings_every_weight_but_the_head(pretrain, micro):
    from manyscale.tasks.classify import Classify

    encoder = loud(build(TINY))
    ms.save(encoder, pretrain.out)
    tuned = Classify(replace(micro, init=pretrain.out)).model().state_dict()
    ours = {name: tensor for name, tensor in encoder.state_dict().items() if name != "mask_token.token"}
    assert set(tuned) - set(ours) == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in ours.items())
    back = Pretrain(replace(pretrain, init=pretrain.out)).model().state_dict()
    assert all(torch.equal(tensor, back[f"encoder.{name}"]) for name, tensor in encoder.state_dict().items())


def test_a_table_goes_to_fine_tuning_geometrically(pretrain, micro):
    """As the official SimMIM fine-tuning resizes it, where other transfers are bicubic."""
    from manyscale.tasks.classify import Classify

    table = replace(TINY, bias="table", similarity="dot", norm="pre")
    encoder = loud(build(table))
    ms.save(encoder, pretrain.out)
    larger = replace(micro, init=pretrain.out, model=replace(micro.model, image_size=32, window=8))
    name = "stages.0.blocks.0.attention.branch.bias.table"
    found = Classify(larger).model().state_dict()[name]
    expected = ms.transfer(encoder, 32, 8, table="geometric").state_dict()[name]
    assert torch.equal(found, expected) and not torch.allclose(expected, ms.transfer(encoder, 32, 8).state_dict()[name])


def test_evaluation_is_the_same_every_time_and_leaves_randomness_alone(pretrain):
    task = Pretrain(pretrain)
    model = loud(task.model())
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def evaluate():
        return task.evaluate(model, torch.device("cpu"), torch.float32, lambda path, reason: None)

    first = evaluate()
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert evaluate() == first and first["pictures"] == 359


def test_unlabelled_folders_in_any_shape(tmp_path, pretrain):
    for number in range(40):
        path = tmp_path / "mine" / ("a" if number % 2 else "b/c") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 20), 80).save(path)
    (tmp_path / "mine" / "loose.png").write_bytes((tmp_path / "mine" / "a" / "1.png").read_bytes())
    run = replace(pretrain, input=replace(pretrain.input, data=str(tmp_path / "mine")), batch=16)
    task = Pretrain(run)
    assert (len(task.splits.train), len(task.splits.val), task.labels) == (37, 4, ())
    assert task.describe() == "37 pictures, 4 held out"
    names = {source.name(i) for source in (task.splits.train, task.splits.val) for i in range(len(source))}
    assert len(names) == 41 and "loose.png" in names
    flat = tmp_path / "flat"
    flat.mkdir()
    (tmp_path / "mine" / "loose.png").rename(flat / "1.png")
    with pytest.raises(ValueError, match="holds a single image"):
        Pretrain(replace(run, input=replace(run.input, data=str(flat))))
    (flat / "1.png").unlink()
    with pytest.raises(ValueError, match="no images at all"):
        Pretrain(replace(run, input=replace(run.input, data=str(flat))))


def test_train_and_val_folders_without_labels(tmp_path, pretrain):
    for split, count in (("train", 20), ("val", 6)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in range(count):
            Image.effect_noise((16, 16), 80).save(tmp_path / "set" / split / f"{number}.png")
    task = Pretrain(replace(pretrain, input=replace(pretrain.input, data=str(tmp_path / "set")), batch=4))
    assert (len(task.splits.train), len(task.splits.val)) == (20, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_unit": 3}, r"field `mask_unit`: 3 pixels are not whole patches of \(2, 2\)"),
        ({"mask_unit": 6}, r"field `mask_unit`: 6 pixels do not divide the image of \(16, 16\)"),
    ],
)
def test_a_unit_that_does_not_fit(pretrain, settings, message):
    with pytest.raises(ValueError, match=message):
        Pretrain(replace(pretrain, simmim=replace(pretrain.simmim, **settings)))
    assert mask_unit(SimMIM(mask_unit=8), (16, 24), (2, 4)) == (4, 2)


@pytest.mark.parametrize(
    "fields", [{"mask_ratio": 0.0}, {"mask_ratio": 1.5}, {"target_window": 46}, {"target_window": 1}, {"mask_unit": 0}]
)
def test_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=f"field `{next(iter(fields))}`"):
        SimMIM(**fields)


def test_painting_keeps_what_was_shown_and_undoes_the_norm(tmp_path, pretrain):
    """A net whose pixels are the target itself paints the picture itself."""
    task = Pretrain(pretrain)
    images = torch.rand(2, 3, 16, 16) * 2 - 1

    class Perfect(torch.nn.Module):
        config = TINY

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, mask):
            return local_norm(x, 5).target

    painted = paint(Perfect(), images, pretrain.simmim, task.preprocess)
    torch.testing.assert_close(painted.inputs, images / 2 + 0.5)
    torch.testing.assert_close(painted.painted, painted.inputs, rtol=1e-4, atol=1e-4)
    assert max(painted.errors) == 0.0
    hidden = (painted.seen == 0.5).all(1).float().mean((1, 2))
    assert hidden.tolist() == [10 / 16] * 2  # ceil(0.6 x 16) blocks
    draw_painted([painted], tmp_path / "sheet.png", ["one", "two"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 250


# where, then target, mean and deviation; from this file's own plain loop
GOLDEN = [
    [-0.9584896837114264, 0.35010257667785294, 0.3652648355297883],
    [0.8392630152602546, 0.45913054284030663, 0.5108532504923171],
    [-0.9351466345120996, 0.7622233957690155, 0.43560532357026244],
    [-0.35496097493402495, 0.4846772261330585, 0.5358914394040795],
    [-0.6184183038257904, 0.7648019560899056, 0.4997354631498409],
]
