import hashlib
import itertools
import json
import os
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyscale as ms
from manyscale.config import Run, from_dict
from manyscale.tasks.classify import Classify
from manyscale.train import loop
from manyscale.train.checkpoint import checkpoints, load_checkpoint
from manyscale.train.folder import only_one
from manyscale.train.loop import Stopped, train
from manyscale.train.spikes import height, past
from tests.conftest import shorter

COMPILE = torch.nn.Module.compile


def fingerprint(folder: str) -> dict[str, str]:
    """The last state's tensors and the best weights, hashed."""
    tensors, _ = load_checkpoint(Path(folder), print)
    state = hashlib.sha256(
        b"".join(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()
    return {"state": state, "best": hashlib.sha256((Path(folder) / "best" / "model.safetensors").read_bytes()).hexdigest()}


def interrupt(monkeypatch, at: int) -> None:
    """SIGTERM itself after `at` steps of this sitting."""
    real, left = loop._Training._step, [at]

    def step(self, *args):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(loop._Training, "_step", step)


def train_in_pieces(run: Run, monkeypatch, at: int) -> int:
    sittings = 0
    while True:
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            sittings += 1
            try:
                train(run)
                return sittings
            except Stopped as stopped:
                assert stopped.exit_code == 143 and "the same command goes on" in str(stopped)


def test_resume_is_bit_exact_wherever_it_stops_and_for_any_number_of_workers(micro, tmp_path, monkeypatch):
    whole = train(micro)
    for at, workers in ((3, 0), (4, 2)):
        run = replace(micro, out=str(tmp_path / f"{at}_{workers}"), input=replace(micro.input, workers=workers))
        assert train_in_pieces(run, monkeypatch, at) >= 2
        assert fingerprint(run.out) == fingerprint(micro.out)
        summary = json.loads((Path(run.out) / "summary.json").read_text())
        assert summary["best"] == whole["best"] and summary["steps"] == whole["steps"] == 10
        losses = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in losses if "loss" in r] == list(range(1, 11))  # once each, none lost


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_learns_as_the_eager_one_and_resumes_bit_by_bit(backend, micro, tmp_path, monkeypatch):
    """In float32, without what draws random numbers inside the net: compiled code draws others."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self) or COMPILE(self, backend=backend))
    micro = replace(micro, model=replace(micro.model, drop_path=0.0), accumulate=1)
    eager, compiled = train(micro), replace(micro, compile=True, out=str(tmp_path / "compiled"))
    assert train(compiled)["last"]["val_loss"] == pytest.approx(eager["last"]["val_loss"], rel=1e-4)
    pieces = replace(compiled, out=str(tmp_path / "pieces"))
    assert train_in_pieces(pieces, monkeypatch, 6) >= 2
    assert fingerprint(pieces.out) == fingerprint(compiled.out) and len(asked) >= 3


def test_a_run_leaves_what_it_promises(micro):
    micro = replace(micro, tensorboard=True)
    train(micro)
    folder = Path(micro.out)
    names = {p.name for p in folder.iterdir()}
    assert names >= {"metrics.jsonl", "curves.png", "samples.png", "recipe.json", "summary.json", "best", "step_00000010", "tensorboard"}
    assert not any(name.startswith(".step") for name in names)
    assert {p.name for p in (folder / "best").iterdir()} == {"model.safetensors", "config.json", "recipe.json", "metrics.json"}
    stored = from_dict(Run, json.loads((folder / "recipe.json").read_text()))
    assert stored == replace(micro, model=replace(micro.model, classes=10))
    model = ms.load(folder)
    assert model.labels == tuple("0123456789") and model.preprocess.image_size == (16, 16)
    again = train(micro)  # finished: nothing is trained, the summary stands
    assert again["steps"] == 10
    assert not any(p.suffix in (".pkl", ".pt", ".pth") for p in folder.rglob("*"))


def test_the_best_weights_are_the_moving_average_that_was_evaluated(micro):
    train(micro)
    tensors, _ = load_checkpoint(Path(micro.out), print)
    best, metrics = ms.load(micro.out), json.loads((Path(micro.out) / "best" / "metrics.json").read_text())
    if metrics["step"] == 10:
        for name, tensor in best.state_dict().items():
            assert torch.equal(tensor, tensors[f"ema.module.{name}"])
            assert not torch.equal(tensor, tensors[f"model.{name}"]) or name == "bias"


def test_a_non_finite_loss_stops_names_the_module_and_keeps_the_last_good_checkpoint(micro, monkeypatch):
    run = replace(shorter(micro, save_steps=2), nonfinite=0)
    real = loop._Training._step

    def poison(self, batch, lr):
        if self.clock.step == 5:
            with torch.no_grad():
                self.state.model.stages[0].blocks[1].mlp.branch.fc1.weight[0, 0] = float("nan")
        return real(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_step", poison)
        with pytest.raises(
            Stopped, match=r"step 6: the loss is not finite, first in module stages\.0\.blocks\.1\.mlp\.branch\.fc1;"
        ) as caught:
            train(run)
    assert caught.value.exit_code == 1
    tensors, values = load_checkpoint(Path(run.out), print)
    assert values["step"] in (4, 5) and all(t.isfinite().all() for t in tensors.values())
    assert json.loads((Path(run.out) / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    train(run)  # and it goes on from there


def test_a_step_that_is_not_finite_is_left_out_and_changes_nothing(micro, monkeypatch):
    """The run goes on as if it had not been; its samples are written down, and a resumed run knows how many there were in a row."""
    real, states = loop._Training._step, {}

    def poison(self, batch, lr):
        hook = None
        if self.clock.step in (3, 4):
            hook = self.state.model.head.register_forward_hook(lambda layer, given, found: found * float("nan"))
        before = {name: tensor.clone() for name, tensor in self.state.tensors().items()}
        loss = real(self, batch, lr)
        if hook:
            hook.remove()
            assert loss != loss and all(torch.equal(tensor, before[name]) for name, tensor in self.state.tensors().items())
            states[self.clock.step] = (batch.ids, self.clock.left_out)
        return loss

    monkeypatch.setattr(loop._Training, "_step", poison)
    train(micro)
    assert {step: count for step, (_, count) in states.items()} == {3: 1, 4: 2}
    lines = [json.loads(line) for line in (Path(micro.out) / "metrics.jsonl").read_text().splitlines()]
    left_out = {line["step"]: line for line in lines if "left_out" in line}
    assert {step: line["left_out"] for step, line in left_out.items()} == {4: "the loss is not finite", 5: "the loss is not finite"}
    assert all(line["samples"] == list(states[step - 1][0]) and len(line["samples"]) == 240 for step, line in left_out.items())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 6, 7, 8, 9, 10]
    assert load_checkpoint(Path(micro.out), print)[1]["left_out"] == 0


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(micro, monkeypatch):
    monkeypatch.setattr(loop._Training, "_evaluate", lambda self: None)
    real = loop._Training._step

    def poison(self, batch, lr):
        if self.clock.step == 2:
            self.state.model.head.register_forward_hook(lambda layer, given, found: found * float("nan"))
        return real(self, batch, lr)

    monkeypatch.setattr(loop._Training, "_step", poison)
    with pytest.raises(Stopped, match=r"step 5: the loss is not finite, first in module head;"):
        train(replace(micro, nonfinite=2))


def test_a_non_finite_gradient_stops_before_the_update(micro, monkeypatch):
    training = []
    real = loop._Training._step

    def poison(self, batch, lr):
        training[:] = [self]
        self.state.model.head.weight.register_hook(lambda grad: grad * float("inf"))
        return real(self, batch, lr)

    monkeypatch.setattr(loop._Training, "_step", poison)
    with pytest.raises(Stopped, match=r"step 1: the gradient of head\.weight is not finite"):
        train(replace(micro, nonfinite=0))
    assert all(p.isfinite().all() for p in training[0].state.model.parameters())


def test_another_recipe_or_task_in_the_same_folder_is_refused_and_named(micro):
    train(shorter(micro, epochs=1))
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*schedule\.epochs: 1 there, 2 now"):
        train(micro)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.002 there, 0\.5 now"):
        train(shorter(replace(micro, optim=replace(micro.optim, lr=0.5)), epochs=1))
    recipe = Path(micro.out) / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"task": "classify"', '"task": "simmim"'))
    with pytest.raises(ValueError, match=r"holds a run of another task, simmim; give --out another folder"):
        train(shorter(micro, epochs=1))
    recipe.write_text(recipe.read_text().replace('"task": "simmim"', '"task": "paint"'))
    with pytest.raises(ValueError, match=r"recipe\.json: field `task`: expected classify or simmim or supernet, found 'paint'"):
        train(shorter(micro, epochs=1))


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """Else a killed run could not be started again until its loader workers had noticed."""
    ear, mouth = os.pipe()
    with only_one(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(mouth, b"born")
            time.sleep(30)
            os._exit(0)
        assert os.read(ear, 4) == b"born"
    try:
        with only_one(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_process_trains_in_a_folder(micro):
    with only_one(Path(micro.out).parent), pytest.raises(ValueError, match="another process is training"):
        train(replace(micro, out=str(Path(micro.out).parent)))


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(micro, capsys, monkeypatch):
    train(micro)
    good = fingerprint(micro.out)
    newest = next(checkpoints(Path(micro.out))[-1].glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(micro)
    assert "step_00000010 is damaged" in capsys.readouterr().out
    assert fingerprint(micro.out) == good


def test_patience_ends_a_run_that_stands_still(micro):
    run = shorter(replace(micro, optim=replace(micro.optim, lr=1e-12, min_lr=0.0, warmup_lr=0.0, ema=0.0)), epochs=9, patience=2)
    assert train(run)["steps"] == 15  # best at the first evaluation, then two no better


def test_a_time_budget_plans_the_steps_and_is_kept(micro, monkeypatch):
    """On a clock that moves a tenth of a second whenever it is read, so that a busy machine changes nothing."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    run = shorter(micro, epochs=10**6, time="12s")
    summary = train(run)
    assert 6 < summary["seconds"] < 13
    records = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in records if "lr" in r]
    assert len(rates) > 5 and rates[-1] < 0.35 * max(rates)  # the cosine came down


def test_fine_tuning_starts_from_weights_at_a_new_size_with_a_new_head(micro, tmp_path):
    train(shorter(micro, epochs=1))
    old = ms.load(micro.out)
    run = replace(
        micro,
        init=micro.out,
        out=str(tmp_path / "tuned"),
        model=replace(micro.model, image_size=32, window=8),
        optim=replace(micro.optim, lr=1e-9, min_lr=0.0, warmup_lr=0.0),
    )
    train(shorter(run, epochs=1))
    tuned = ms.load(run.out)
    assert tuned.config.window == 8 and tuned.config.pretrained_windows == old.config.windows
    torch.testing.assert_close(tuned.head.weight, old.head.weight, atol=1e-6, rtol=0)
    train(shorter(run, epochs=1))  # the same command again finds its own folder


def test_data_own_a_bad_file_is_skipped_counted_and_named(micro, tmp_path):
    from PIL import Image

    data = tmp_path / "pictures"
    for split, count in (("train", 12), ("val", 3)):
        for label, shade in (("dark", 40), ("light", 200)):
            (data / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 30), (shade, shade + i, shade)).save(data / split / label / f"{i}.png")
    (data / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (data / "val" / "light" / "empty.jpg").touch()
    run = replace(micro, input=replace(micro.input, data=str(data)), batch=5, accumulate=1)
    summary = train(run)
    assert summary["bad_files"] == 2
    listed = [json.loads(line) for line in (Path(run.out) / "bad_files.jsonl").read_text().splitlines()]
    assert {Path(bad["path"]).name for bad in listed} == {"broken.png", "empty.jpg"}
    stop = replace(run, input=replace(run.input, bad_files="stop"), out=str(tmp_path / "stop"))
    with pytest.raises(ValueError, match=r"(broken\.png|empty\.jpg)"):
        train(stop)


def full_above(monkeypatch, images: int) -> None:
    """Memory runs out wherever more than so many images are passed with gradients."""
    real = Classify.loss

    def loss(self, model, x, targets):
        if len(x) > images:
            model(x).sum().backward()  # some of it was there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, model, x, targets)

    monkeypatch.setattr(Classify, "loss", loss)


def test_a_batch_that_does_not_fit_is_taken_in_more_parts_with_the_same_result(micro, tmp_path, monkeypatch, capsys):
    expected = replace(shorter(micro, epochs=1), accumulate=4, out=str(tmp_path / "four"))
    train(expected)
    full_above(monkeypatch, 60)
    run = replace(expected, accumulate=0, out=str(tmp_path / "auto"))
    train(run)
    assert (
        "step 1: out of memory with 1 parts of a batch; it is taken in 2" in (said := capsys.readouterr().out)
        and "it is taken in 4" in said
    )
    assert fingerprint(run.out)["best"] == fingerprint(expected.out)["best"]
    train_in_pieces(replace(run, out=str(tmp_path / "pieces")), monkeypatch, 2)
    assert fingerprint(str(tmp_path / "pieces"))["best"] == fingerprint(expected.out)["best"]
    with pytest.raises(Stopped, match=r"out of memory: CUDA out of memory.*; --accumulate 0 takes as many parts as fit"):
        train(replace(expected, accumulate=2, out=str(tmp_path / "two")))
    full_above(monkeypatch, 0)
    with pytest.raises(Stopped, match="not even a single image fits"):
        train(replace(expected, accumulate=0, batch=4, out=str(tmp_path / "none")))


def test_after_a_spike_the_run_goes_on_without_its_samples(micro, tmp_path, monkeypatch, capsys):
    """As a run does that was told to leave them out."""
    real = loop._Training._step

    def jump(self, batch, lr):
        loss = real(self, batch, lr)
        return loss + 100 if self.clock.step == 27 and not self.clock.passed else loss

    run = replace(shorter(micro, length="32-steps", evaluate_every="32-steps", save_steps=6), spike=8.0, batch=32, accumulate=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_step", jump)
        train(run)
    assert "step 28: the loss jumped to 1" in (said := capsys.readouterr().out) and "back to the weights of step 24" in said
    told = replace(run, spike=0.0, without=((24, 28),), out=str(tmp_path / "told"))
    train(told)
    assert fingerprint(told.out)["best"] == fingerprint(run.out)["best"]
    assert load_checkpoint(Path(run.out), print)[1]["passed"] == [[24, 28]]
    plain = replace(run, spike=0.0, out=str(tmp_path / "plain"))
    train(plain)
    assert fingerprint(plain.out)["best"] != fingerprint(run.out)["best"]


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=20, max_size=100), st.floats(0.1, 10), st.floats(0.01, 100))
def test_a_spike_is_as_high_in_any_unit(recent, loss, unit):
    found, scaled = height(recent, loss), height([unit * one for one in recent], unit * loss)
    assert scaled == pytest.approx(found, rel=1e-6, abs=1e-6)
    assert height(recent[:19], loss) == 0 and (found > 0) == (loss > statistics.median(recent))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair)))), st.integers(0, 40))
def test_past_is_the_next_step_outside_of_all_ranges(ranges, step):
    outside = (one for one in range(step, 100) if not any(first <= one < end for first, end in ranges))
    assert past(step, ranges) == next(outside)
