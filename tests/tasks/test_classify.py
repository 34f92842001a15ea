"""The losses of classification, and a ViT trained with all that the ViT paper adds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyscale.config import Augment, Input, Optim, Probe, Run, Schedule, SimMIM, ViTConfig
from manyscale.data.sources import open_splits
from manyscale.heads.pixels import load_masked
from manyscale.tasks.classify import LOSSES
from manyscale.tasks.fewshot import probes
from manyscale.train.loop import train
from tests.train.test_loop import fingerprint, train_in_pieces

VIT = ViTConfig(image_size=16, patch=4, width=16, depth=2, heads=2, mlp_width=32, pool="map", drop_path=0.1, head_bias=-2.2)


@pytest.fixture
def vit(tmp_path) -> Run:
    """A run with everything on that could break a resume."""
    return Run(
        recipe="vit",
        model=VIT,
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0),
        augment=Augment(scale=(0.5, 1.0), mixup=0.4),
        optim=Optim(method="adafactor", momentum="bfloat16-jax", lr=3e-3, warmup_lr=0.0, head_decay=3.0, ema=0.9, clip=1.0),
        schedule=Schedule(length="12-steps", warmup="2-steps", curve="rsqrt", cooldown="4-steps", evaluate_every="6-steps"),
        fewshot=Probe(probe=("digits",), shots=(1, 5), draws=2, l2=16.0),
        loss="sigmoid",
        batch=120,
        accumulate=2,
        precision="float32",
        out=str(tmp_path / "run"),
        log_every=1,
    )


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    p = logits.sigmoid()
    assert torch.allclose(LOSSES["sigmoid"](logits, targets), -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1))
    targets = targets / targets.sum(1, keepdim=True)
    assert torch.allclose(LOSSES["softmax"](logits, targets), -(targets * logits.softmax(1).log()).sum(1))


def test_a_vit_run_resumes_bit_by_bit_and_is_probed(vit, tmp_path, monkeypatch):
    whole = train(vit)
    assert whole["steps"] == 12
    # at the start the loss is that of the prior: ten classes at a bias of -2.2
    first = json.loads((Path(vit.out) / "metrics.jsonl").read_text().splitlines()[0])
    prior = torch.tensor(-2.2)
    assert first["loss"] == pytest.approx(float(10 * torch.nn.functional.softplus(prior) - prior), abs=0.2)
    for record in (whole["last"], whole["best"]):
        assert 0.05 < record["digits 1shot"] <= record["digits 5shot"] <= 1
    pieces = replace(vit, out=str(tmp_path / "pieces"))
    assert train_in_pieces(pieces, monkeypatch, 5) >= 3
    assert fingerprint(pieces.out) == fingerprint(vit.out)
    assert json.loads((tmp_path / "pieces" / "summary.json").read_text())["last"] == whole["last"]


def test_probes_come_when_asked(vit):
    train(replace(vit, fewshot=replace(vit.fewshot, probe_every=5)))  # more than there are evaluations: at the end
    records = [json.loads(line) for line in (Path(vit.out) / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "val_loss" in record]
    assert ["digits 5shot" in record for record in evaluated] == [False, True]


def test_features_that_say_nothing_end_no_run(vit, monkeypatch, capsys):
    def refuse(*arguments):
        raise ValueError("all 50 train pictures have the same features")

    monkeypatch.setattr("manyscale.tasks.fewshot.FewShot.__call__", refuse)
    assert "digits 1shot" not in train(vit)["last"]
    assert "few-shot evaluation on digits left out: all 50" in capsys.readouterr().out


def test_too_few_pictures_are_found_before_training(vit, tmp_path):
    with pytest.raises(ValueError, match=r"field `shots`: class . has .* not 500"):
        train(replace(vit, fewshot=replace(vit.fewshot, shots=(500,))))
    assert not (Path(vit.out) / "recipe.json").exists()
    with pytest.raises(ValueError, match="nowhere"):
        probes(replace(vit, fewshot=Probe(probe=(str(tmp_path / "nowhere"),))))
    with pytest.raises(ValueError, match="field `probe`: two sets are called digits"):
        probes(replace(vit, fewshot=Probe(probe=("digits", "digits"))))


def test_a_probe_on_the_runs_own_set_is_split_as_the_run_splits_it(vit):
    run = replace(vit, seed=3, input=replace(vit.input, holdout=0.3))
    (found,) = probes(run).values()
    trained = open_splits(run.input, run.seed).train
    assert {found.train.name(i) for i in range(len(found.train))} == {trained.name(i) for i in range(len(trained))}
    assert not {found.test.name(i) for i in range(len(found.test))} & {trained.name(i) for i in range(len(trained))}


def test_a_vit_learns_without_labels_and_is_fine_tuned(vit, tmp_path):
    optim = replace(vit.optim, head_decay=None)
    pretrain = replace(
        vit, task="simmim", simmim=SimMIM(mask_unit=8, target_window=5), loss="softmax", optim=optim, out=str(tmp_path / "simmim")
    )
    summary = train(pretrain)
    assert summary["last"]["l1"] > 0 and summary["last"]["digits 5shot"] > 0.1
    assert load_masked(tmp_path / "simmim" / "best").encoder.config.mask_token
    tuned = replace(
        vit, init=str(tmp_path / "simmim" / "best"), model=replace(VIT, image_size=24), optim=replace(vit.optim, layer_decay=0.8)
    )
    assert train(tuned)["steps"] == 12
