"""One loop for every task: what to learn is the task's, when and for how long is decided here.

A run is a pure function of its recipe: the order and augmentation of samples follow from (seed, epoch, sample), the
randomness of a step from (seed, step, part of the batch). So a run that was killed goes on from its last checkpoint to the same
weights, and ranks that share its parts take the same steps as one process. All ranks go through this file together: what decides
the way is agreed on first.
"""

import io
import math
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manyscale.config import Run, seconds, to_dict
from manyscale.ranks import ALONE, Ranks, joined
from manyscale.storage import write, write_json
from manyscale.tasks import open_task
from manyscale.tasks.pictures import Pictures
from manyscale.train.checkpoint import Writer, checkpoints, newest_checkpoint, read_values
from manyscale.train.folder import check_recipe, check_surroundings, check_task, entered
from manyscale.train.log import Log, Silence
from manyscale.train.parts import ASKED, Full, is_full, more_parts, share_out
from manyscale.train.schedule import cooldown_steps, evaluation_steps, planned_steps, rate, total_rate
from manyscale.train.shard import fit
from manyscale.train.signals import Signals
from manyscale.train.spikes import WINDOW, height, past
from manyscale.train.spread import Spread
from manyscale.train.state import State, pick_device, pick_precision
from manyscale.train.step import Step, eager
from manyscale.train.watch import Watch, is_loss

CALIBRATION_STEPS = 15
DRAW_SECONDS = 60.0  # at least, between two drawings
ENDLESS = 10**12  # steps; a time budget may move the end while the loader runs


class Stopped(RuntimeError):
    """The run ended early but in good order; `exit_code` is what the process should leave with."""

    def __init__(self, message: str, exit_code: int, *, diverged: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.diverged = exit_code, diverged


def train(run: Run, *, until: int = 0, task: Pictures | None = None) -> dict[str, Any]:
    """Train a run, or go on with it where its folder holds one.

    Args:
        until: save and return after this step, if the run is longer; 0: never.
        task: of a run on the same data, whose opened pictures serve this one too.

    Returns:
        The summary, also in `summary.json`: best metrics, steps, seconds, files left out; empty for a run that goes on.

    Raises:
        ValueError: a recipe, folder or data set that cannot be used.
        Stopped: SIGTERM or Ctrl-C (a checkpoint was written), or a non-finite loss (the last good one is kept).
    """
    began, folder = time.monotonic(), Path(run.folder)
    with joined(run.device, run.parallel.timeout) as ranks, entered(folder, ranks), Watch(ranks, folder) as watch:
        check_task(folder, run)
        try:
            return _Training(folder, task.of(run) if task else open_task(run), began, ranks, watch, until or ENDLESS).go()
        except RuntimeError as error:
            if is_full(error):
                raise Stopped(f"out of memory: {str(error).splitlines()[0]}; see `manyscale plan memory`", 1) from None
            if not is_loss(error):
                raise
            who = f"rank {ranks.rank}, step {watch.step}: {watch.missing()}"
            raise Stopped(f"{who}; see {folder}/stacks ({str(error).splitlines()[0]})", 1) from error


class _Training:
    """One sitting of a run."""

    def __init__(
        self, folder: Path, task: Any, began: float, ranks: Ranks = ALONE, watch: Watch | None = None, until: int = ENDLESS
    ) -> None:
        self.folder, self.task, self.ranks, self.watch, self.until = folder, task, ranks, watch or Watch(ranks, folder), until
        task.share(ranks)
        self.device = pick_device(task.run.device)
        self.precision = pick_precision(task.run.precision, self.device)
        options = {"device": self.device, "precision": self.precision, "passes_many": task.passes_many}
        spread = Spread(task.run.parallel, ranks, **options)
        torch.manual_seed(task.run.seed)
        model = spread.made(task.model, fresh=not task.run.init)
        self.run: Run = replace(task.run, model=model.config)
        self.state = State(fit(model, self.run.memory), self.run.optim, spread)
        self.step = Step(self.run, task, self.state, ranks, self.device, self.precision)
        if task.run.compile:
            if ranks.count > 1 and task.passes_many:
                raise ValueError("field `compile`: a net of many settings is compiled in one process alone; give --no-compile")
            task.compile(self.state.model)
        self.began, self.saved, self.drawn = began, time.monotonic(), time.monotonic()  # opening the data counts towards a time budget

    def go(self) -> dict[str, Any]:
        notes: list[str] = []
        found = newest_checkpoint(self.folder, notes.append, self.ranks)
        if found:
            check_recipe(self.folder, self.run)
            self.state.restore(found, self.ranks)
            notes.append(f"going on from step {self.state.clock.step} of {self.state.clock.steps}")
        elif self.ranks.tell((self.folder / "summary.json").exists() or any(self.folder.glob("damaged_*"))):
            raise ValueError(f"{self.folder}: a run stood here, but no checkpoint of it is whole; give another --out")
        self.clock = self.state.clock
        check_surroundings(self.folder, self.clock, self.task.fingerprint(), self.precision, self.ranks)
        self._share_out(notes)
        if self.ranks.leads:
            write_json(self.folder / "recipe.json", to_dict(self.run))
        self.before, self.writer = self.clock.seconds, Writer(self.ranks, beside=self.run.schedule.save_beside)
        speaker = Log if self.ranks.leads else Silence
        with (
            speaker(self.folder, self.run.recipe or self.run.task, step=self.clock.step, tensorboard=self.run.tensorboard) as self.log,
            Signals() as self.signals,
        ):
            for note in notes:
                self.log.note(note)
            if not self.clock.steps:
                self.clock.steps = planned_steps(self.run, self.task.steps_per_epoch)
                if self.run.schedule.time:
                    self._calibrate()
            cooldown_steps(self.run, self.clock.steps, self.task.steps_per_epoch)  # refuses one that is longer than the run
            self._introduce()
            try:
                self._steps()
                self.writer.wait()
            except Stopped:  # other errors leave no ranks that could finish it together
                self.writer.wait()
                raise
            finally:
                self.log.curves()
            return self._finish() if self.clock.step >= self.clock.steps else {}

    def _share_out(self, notes: list[str]) -> None:
        """Decide into how many parts a batch falls."""
        clock, before = self.clock, self.clock.parts
        clock.parts = self.ranks.tell(share_out(self.run, self.ranks, before, self.device, self.precision))
        if before and before != clock.parts:
            notes.append(
                f"a batch falls into {clock.parts} parts now, not {before}: what is drawn at random within one is another from here on"
            )

    # -- steps ----------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        """All steps to the end, in one go but for jumps: past samples that are left out, or back to a checkpoint and past a spike."""
        while True:
            self.clock.step = past(self.clock.step, (*self.run.without, *self.clock.passed))
            if self._evaluation_due():
                self._evaluate()
            if self.clock.step >= min(self.clock.steps, self.until):
                return
            self._steps_on()

    def _steps_on(self) -> None:
        """Steps up to the end or the next jump."""
        clock, budget = self.clock, seconds(self.run.schedule.time)
        seen, since, losses = 0, time.monotonic(), []
        for batch in self.task.train_batches(clock.step, ENDLESS, self.device):
            lr = rate(self.run, clock.step, clock.steps, self.task.steps_per_epoch)
            self.watch.step = clock.step + 1
            loss = self._step(batch, lr)
            if math.isfinite(loss):
                losses.append(loss)
                seen += self.run.batch
            clock.step += 1
            clock.seconds = self.before + time.monotonic() - self.began
            asked, over, save = self._agree(batch, clock.seconds >= budget)
            if over and clock.step < clock.steps:
                self.log.note(f"{self.run.schedule.time} are over {clock.steps - clock.step} steps before the planned end")
                clock.steps = clock.step
            done = clock.step >= min(clock.steps, self.until)
            if losses and (clock.step % self.run.log_every == 0 or done):
                spent = max(time.monotonic() - since, 1e-9)
                left = (clock.steps - clock.step) * spent / len(losses)
                mean = math.fsum(losses) / len(losses)
                self.log.step(clock.step, clock.steps, loss=mean, lr=lr, speed=seen / spent, left=left)
                epoch = clock.step / self.task.steps_per_epoch
                self.log.record({"step": clock.step, "epoch": epoch, "loss": mean, "lr": lr, "images_per_second": seen / spent})
                seen, since, losses = 0, time.monotonic(), []
            if asked:
                self._save()
                self.writer.wait()
                name = signal.Signals(asked).name
                again = "the same command goes on from here"
                raise Stopped(f"{name}: saved step {clock.step} of {clock.steps} in {self.folder}; {again}", 128 + asked)
            if self._jumped(loss):
                break
            if self._evaluation_due():
                self._evaluate()
                since, seen, losses = time.monotonic(), 0, []
            elif save:
                self._save()
            if clock.step >= min(clock.steps, self.until):
                break
        if clock.step < clock.steps:
            self._save()

    def _jumped(self, loss: float) -> bool:
        """Whether the run is not where its batches go on: back at its last checkpoint, past a spike of the loss; or before a gap."""
        clock, limit = self.clock, self.run.spike
        if limit and height(clock.recent, loss) > limit:
            self.writer.wait()
            path = newest_checkpoint(self.folder, self.log.note, self.ranks)
            if path:
                spiked, since = clock.step, read_values(path)["step"]
                self.log.note(f"step {spiked}: the loss jumped to {loss:.4f}; back to the weights of step {since}, past the samples since")
                self.state.restore(path, self.ranks)
                self.clock = self.state.clock
                self.clock.passed.append([since, spiked])
                self.clock.step, self.clock.seconds = spiked, clock.seconds
                self.log.record({"step": spiked, "spike": loss, "back_to": since})
                return True
        clock.recent = [*clock.recent, loss][-WINDOW:] if limit and math.isfinite(loss) else clock.recent
        return past(clock.step, (*self.run.without, *clock.passed)) != clock.step

    def _agree(self, batch: Any, over: bool) -> tuple[int, bool, bool]:
        """What the ranks do after a step: leave for a signal that one got; end, or save, because the leader's clock says so."""
        told = self.ranks.gather([self.signals.number, over, self._checkpoint_due(), len(batch.bad)])
        if told[:, 3].any():
            for files in self.ranks.collect([list(bad) for bad in batch.bad]):
                for path, reason in files:
                    self.log.bad_file(path, reason)
        return int(told[:, 0].max()), bool(told[0, 1]), bool(told[0, 2])

    def _step(self, batch: Any, lr: float) -> float:
        """One optimiser step at learning rate `lr`; its loss, or NaN where it was left out. Too many of those in a row end the run."""
        clock = self.clock
        try:
            loss, fault = self.step.take(batch, lr, clock.step, clock.parts)
        except Full as full:
            self._into_more_parts(full)
            return self._step(batch, lr)
        if not fault:
            clock.left_out = 0
            return loss
        clock.left_out += 1
        samples = [name for own in self.ranks.collect(list(batch.ids)) for name in own]
        if clock.left_out > self.run.nonfinite:
            where = "" if math.isfinite(loss) else f", {self.step.culprit(batch, clock.step, clock.parts)}"
            self._stop_bad(fault + where, samples)
        self.log.record({"step": clock.step + 1, "left_out": fault, "samples": samples})
        self.log.note(f"step {clock.step + 1}: {fault}; left out, {clock.left_out} in a row")
        return math.nan

    def _into_more_parts(self, full: Full) -> None:
        """After memory ran out, take the same batch in more parts, where the run leaves it to us how many.

        Several ranks cannot: the others wait in the midst of the step. They end, and those that are started in their place know better.
        """
        clock, more = self.clock, more_parts(self.clock.parts, self.run.batch, self.ranks)
        if self.run.accumulate or not more:
            advice = "--accumulate 0 takes as many parts as fit" if more else "not even a single image fits"
            raise Stopped(f"out of memory: {full}; {advice}", 1) from None
        if self.ranks.count > 1:
            write_json(self.folder / ASKED, {"parts": more})
            raise Stopped(
                f"rank {self.ranks.rank}: out of memory: {full}; started again, ranks take the batch in {more} parts", 1
            ) from None
        self.log.note(f"step {clock.step + 1}: out of memory with {clock.parts} parts of a batch; it is taken in {more}")
        clock.parts = more
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stop_bad(self, what: str, samples: Sequence[str]) -> None:
        self.log.record({"step": self.clock.step, "stopped": what, "samples": list(samples)})
        kept = f"; the last good checkpoint is kept in {self.folder}" if checkpoints(self.folder) else ""
        advice = "a lower --lr with another --out, or --precision float32, may help"
        raise Stopped(f"step {self.clock.step + 1}: {what}{kept}; {advice}", 1, diverged=True)

    # -- how long ---------------------------------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Plan the number of steps from the measured speed of a few, on weights that are put back afterwards."""
        kept = {name: tensor.clone() for name, tensor in self.state.weights().items()}
        times = []
        start = time.monotonic()
        for batch in self.task.train_batches(0, CALIBRATION_STEPS, self.device):
            self._step(batch, self.run.optim.warmup_lr)
            self.clock.step += 1  # steps of a supernet differ in what they pass
            times.append(time.monotonic() - start)
            start = time.monotonic()
        with eager(self.run):
            self.task.evaluate(self.state.final, self.device, self.precision, lambda path, reason: None)
        evaluation = time.monotonic() - start
        self.clock.step = self.clock.left_out = 0
        self.state.start_again(kept)
        self.clock.seconds = time.monotonic() - self.began
        per_step = statistics.median(times) + evaluation / evaluation_steps(self.run, self.clock.steps, self.task.steps_per_epoch)
        self.clock.steps = self.ranks.tell(max(int((seconds(self.run.schedule.time) - self.clock.seconds) / per_step), 1))

    def _replan(self) -> None:
        """With a time budget: fit the steps that are left to the time that is left, at the speed so far; not near the end."""
        clock, budget = self.clock, seconds(self.run.schedule.time)
        clock.seconds = self.ranks.tell(self.before + time.monotonic() - self.began)
        if math.isinf(budget) or clock.step >= 0.9 * clock.steps:
            return
        per_step = clock.seconds / clock.step
        steps = max(clock.step + int((budget - clock.seconds) / per_step), clock.step)
        if abs(steps - clock.steps) > 0.02 * clock.steps:
            self.log.note(f"planned {steps} steps instead of {clock.steps}, to end after {self.run.schedule.time}")
            clock.steps = steps

    # -- what is kept -----------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        clock, every = self.clock, evaluation_steps(self.run, self.clock.steps, self.task.steps_per_epoch)
        made = bool(clock.history) and clock.history[-1]["step"] == clock.step
        return clock.step > 0 and not made and (clock.step % every == 0 or clock.step >= clock.steps)

    def _evaluate(self) -> None:
        """Evaluate, keep the weights if they are the best, decide how to go on, and save."""
        self.writer.wait()  # loader workers are forked now, which other threads should not see
        clock, model = self.clock, self.state.final
        with eager(self.run):
            metrics = self.task.evaluate(model, self.device, self.precision, self.log.bad_file)
            if (len(clock.history) + 1) % self.run.fewshot.probe_every == 0 or clock.step >= clock.steps:
                metrics |= self.task.probed(model, self.device, self.precision, self.log.bad_file, self.log.note)
        if not all(map(math.isfinite, metrics.values())):
            self._stop_bad("the evaluation's loss is not finite", ())
        value = metrics[self.task.metric]
        record = {"step": clock.step, "epoch": clock.step / self.task.steps_per_epoch, **metrics}
        clock.history.append(record)
        self.log.record(record)
        better = clock.best is None or (value != clock.best and self.task.better(value, clock.best) == value)
        clock.stale = 0 if better else clock.stale + 1
        if better:
            clock.best, clock.best_step = value, clock.step
            best, numbers = self.folder / "best", self.state.spread.whole(model)
            if self.ranks.leads:
                self.task.save(numbers, best)
                write_json(best / "recipe.json", to_dict(self.run))
                write_json(best / "metrics.json", record)
        told = [name for name in metrics if name != "pictures" and not name.startswith("accuracy ")]  # one for every setting of a supernet
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in told)
        self.log.note(f"{self.log.name}  step {clock.step}  {shown}{'  best' if better else ''}")
        if 0 < self.run.schedule.patience <= clock.stale and clock.step < clock.steps:
            self.log.note(f"no better evaluation in {clock.stale}: stopped early")
            clock.steps = clock.step
        if self.ranks.tell(time.monotonic() - self.drawn > DRAW_SECONDS) and clock.step < clock.steps:  # at the end the best is drawn
            self._draw(model)
        self._replan()
        self._save()

    def _draw(self, model: nn.Module) -> None:
        with eager(self.run):
            if self.ranks.leads:
                write(self.folder / "samples.png", lambda path: self.task.draw(model, path))
            elif self.state.spread.sharded:  # all ranks pass it, or none can
                self.task.draw(model, io.BytesIO())
        self.drawn = time.monotonic()

    def _checkpoint_due(self) -> bool:
        schedule = self.run.schedule
        by_steps = schedule.save_steps and self.clock.step % schedule.save_steps == 0
        return bool(by_steps) or time.monotonic() - self.saved > 60 * (schedule.save_minutes or math.inf)

    def _save(self) -> None:
        schedule, clock = self.run.schedule, self.clock
        tidied = {"keep": schedule.keep, "every": schedule.keep_every, "best": clock.best_step if schedule.keep_best else 0}
        self.writer.save(self.folder, clock.step, self.state.tensors(), self.state.values(), **tidied)
        self.saved = time.monotonic()

    def _introduce(self) -> None:
        count = sum(p.numel() for p in self.state.model.parameters())
        precision = str(self.precision).removeprefix("torch.")
        self.log.note(
            f"{self.log.name}: {count / 1e6:.2f}M parameters, {self.task.describe()}, "
            f"{self.clock.steps:,} steps of {self.run.batch} ({self.clock.steps / self.task.steps_per_epoch:.1f} epochs), "
            f"{precision} on {self.device}"
        )
        optim, total = self.run.optim, total_rate(self.run, self.clock.steps, self.task.steps_per_epoch)
        head = "" if optim.head_decay is None else f", {total * optim.head_decay:.2g} of the head"
        if optim.weight_decay or head:
            self.log.note(f"{self.log.name}: sum of rate x weight decay over the run: {total * optim.weight_decay:.2g}{head}")
        for sentence in self.run.model.clipped:
            self.log.note(sentence)
        for path in self.task.splits.ignored:
            self.log.bad_file(path, "its name ends in no picture format known here")

    def _finish(self) -> dict[str, Any]:
        clock = self.clock
        best = next(record for record in clock.history if record["step"] == clock.best_step)
        bad, epochs = len(self.log.bad_files), clock.step / self.task.steps_per_epoch
        summary = {"recipe": self.run.recipe, "task": self.run.task, "best": best, "last": clock.history[-1]}
        summary |= {"steps": clock.step, "epochs": epochs, "seconds": clock.seconds, "bad_files": bad}
        if self.ranks.leads:
            net = self.task.load(self.folder / "best").to(self.device)
            with eager(self.run):
                write(self.folder / "samples.png", lambda path: self.task.draw(net, path))
            write_json(self.folder / "summary.json", summary)
        left_out = f"; {bad} files were left out, see {self.folder}/bad_files.jsonl" if bad else ""
        self.log.note(
            f"{self.log.name}: best {self.task.metric} {clock.best:.4f} at step {clock.best_step}, {clock.seconds:.0f} s{left_out}"
        )
        self.log.note(f"wrote {self.folder}/best, curves.png, samples.png, summary.json")
        return summary
