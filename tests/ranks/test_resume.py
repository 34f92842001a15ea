"""What one number of ranks saved, another goes on with; exactly, where that is asked for."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyscale.config import SuperViTConfig
from manyscale.train.checkpoint import checkpoints, load_checkpoint
from tests.conftest import shorter
from tests.ranks.jobs import losses, spread, train_all, train_some, train_with_other_data, twenty_steps
from tests.ranks.team import together
from tests.ranks.test_parity import CLOSE

pytestmark = pytest.mark.distributed


def digest(folder: str) -> str:
    tensors, _ = load_checkpoint(Path(folder), print)
    whole = b"".join(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(whole).hexdigest()


def sittings(folder: Path, run, plan: list[tuple[int, int, str]]) -> None:
    """Train in one folder: for each of the plan so many ranks, up to a step, sharded so."""
    for number, (count, until, shard) in enumerate(plan):
        together(folder / f"sitting_{number}", count, train_some, spread(run, Path(run.out).name, shard=shard), until)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_where_another_stopped(alone, micro, tmp_path):
    pieces = spread(twenty_steps(micro), "pieces")
    sittings(tmp_path, pieces, [(2, 4, "zero3"), (1, 7, "ddp"), (2, 10, "zero1"), (2, 15, "zero2"), (4, 20, "hsdp")])
    expected = losses(alone.out)
    assert losses(pieces.out) == pytest.approx(expected, rel=CLOSE) and len(expected) == 20
    a, b = (load_checkpoint(Path(one.out), print)[0] for one in (alone, pieces))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_exact_is_exact_on_any_number_of_ranks(micro, tmp_path):
    """Bit by bit, in one go and from sitting to sitting."""
    run = twenty_steps(micro)
    run = replace(shorter(run, length="12-steps", evaluate_every="6-steps"), optim=replace(run.optim, clip=0.1))
    whole = [spread(run, f"{count}", elastic="exact", shard=shard) for count, shard in ((1, "ddp"), (2, "zero1"), (4, "ddp"))]
    for count, one in zip((1, 2, 4), whole, strict=True):
        together(tmp_path / f"ranks_{count}", count, train_all, [one])
    pieces = spread(run, "pieces", elastic="exact")
    for number, (count, until) in enumerate([(1, 3), (2, 6), (4, 9), (1, 12)]):
        together(tmp_path / f"sitting_{number}", count, train_some, pieces, until)
    first = whole[0]
    for one in (*whole[1:], pieces):
        assert digest(one.out) == digest(first.out), one.out
        assert losses(one.out) == losses(first.out)
        assert (Path(one.out) / "best" / "model.safetensors").read_bytes() == (Path(first.out) / "best" / "model.safetensors").read_bytes()
    plain = spread(run, "plain")
    together(tmp_path / "plain_ranks", 4, train_all, [plain])
    assert digest(plain.out) != digest(first.out)  # else there would be nothing to prove


@pytest.mark.slow
def test_ranks_that_cannot_share_a_batch_say_so_before_they_begin(micro, tmp_path):
    run = twenty_steps(micro)
    for name, change, how, message in (
        ("odd", {"batch": 30, "accumulate": 1}, {}, "field `accumulate`: 4 ranks do not share 4 parts of a batch of 30 evenly"),
        ("three", {"accumulate": 6, "batch": 48}, {}, "field `accumulate`: 4 ranks do not share 6 parts of a batch of 48 evenly"),
        ("groups", {}, {"shard": "hsdp", "shard_group": 3}, "field `shard_group`: 4 ranks do not fill groups of 3"),
    ):
        with pytest.raises(AssertionError) as caught:
            together(tmp_path / name, 4, train_all, [spread(replace(run, **change), name, **how)])
        assert str(caught.value).count(message) == 4, caught.value
        assert not checkpoints(tmp_path / name)


def test_ranks_with_other_data_say_so(micro, tmp_path):
    with pytest.raises(AssertionError) as caught:
        together(tmp_path / "ranks", 2, train_with_other_data, spread(twenty_steps(micro), "run"))
    assert "field `data`: rank 1 finds other classes or files than rank 0; give all ranks one set" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "shard"), [("simmim", "zero3"), ("supernet", "zero3"), ("supervit", "ddp")])
def test_other_tasks_are_shared_too(task, shard, micro, tmp_path):
    """SimMIM, whose masks are drawn by the part, and a net of many settings, of which a pass leaves parameters untouched; with probes."""
    run = twenty_steps(micro)
    if task == "simmim":
        run = replace(run, task="simmim", augment=replace(run.augment, mixup=0.0, cutmix=0.0), simmim=replace(run.simmim, mask_unit=4))
        run = replace(run, fewshot=replace(run.fewshot, probe=("digits",), shots=(1, 5), draws=1))
    elif task == "supervit":  # a size's positions are touched by its own passes alone
        model = SuperViTConfig(sizes=(16, 32), keeps=(0.5, 1.0), patch=8, width=16, depth=2, heads=2, mlp_width=32, drop_blocks=(0,))
        run = replace(run, task="supernet", model=model)
    else:
        run = replace(run, task="supernet", supernet=replace(run.supernet, settings=("16/window=4", "32/window=8")))
    run = shorter(run, length="8-steps", warmup="2-steps", evaluate_every="4-steps")
    alone, two = spread(run, "alone"), spread(run, "two", shard=shard)
    (summary,) = together(tmp_path / "1", 1, train_all, [alone])
    for (found,) in together(tmp_path / "2", 2, train_all, [two], True):
        assert found["last"] == pytest.approx(summary[0]["last"], rel=1e-4, abs=1e-2)
    assert losses(two.out) == pytest.approx(losses(alone.out), rel=CLOSE)
    assert (Path(two.out) / "samples.png").stat().st_size > 1000


@pytest.mark.slow
def test_small_states_are_sharded_too(micro, tmp_path):
    methods, shards = {"adafactor": 1e-3, "sgd": 0.1, "adamw": 1e-3}, ("zero1", "zero3")
    run = shorter(twenty_steps(micro), length="6-steps", warmup="1-steps", evaluate_every="6-steps")
    runs = {how: replace(run, optim=replace(run.optim, method=how, momentum="bfloat16", lr=lr)) for how, lr in methods.items()}
    alone = {how: spread(run, f"{how}_alone") for how, run in runs.items()}
    two = {(how, shard): spread(run, f"{how}_{shard}", shard=shard) for how, run in runs.items() for shard in shards}
    together(tmp_path / "1", 1, train_all, list(alone.values()))
    together(tmp_path / "2", 2, train_all, list(two.values()))
    for (how, _), one in two.items():
        assert losses(one.out) == pytest.approx(losses(alone[how].out), rel=1e-5), one.out
    for how in methods:
        there, here = (load_checkpoint(Path(one.out), print)[0] for one in (two[how, "zero3"], alone[how]))
        assert {name: (t.shape, t.dtype) for name, t in there.items()} == {name: (t.shape, t.dtype) for name, t in here.items()}
