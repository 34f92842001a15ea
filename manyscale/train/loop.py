"""One loop for every task: what to learn is the task's, when and for how long is decided here.

A run is a pure function of its recipe: the order and augmentation of samples follow from (seed, epoch, sample), the
randomness of a step from (seed, step). So a run that was killed goes on from its last checkpoint to the same weights.
"""

import math
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manyscale.config import Run, seconds, to_dict
from manyscale.data.loader import seed_from
from manyscale.storage import write, write_json
from manyscale.tasks import open_task
from manyscale.tasks.pictures import Pictures
from manyscale.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint, tidy
from manyscale.train.folder import check_recipe, check_task, only_one
from manyscale.train.log import Log
from manyscale.train.optim import set_rate
from manyscale.train.schedule import cooldown_steps, evaluation_steps, planned_steps, rate, total_rate
from manyscale.train.shard import fit
from manyscale.train.state import State, pick_device, pick_precision

CALIBRATION_STEPS = 15
DRAW_SECONDS = 60.0  # at least, between two drawings of samples
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
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        check_task(folder, run)
        try:
            return _Training(folder, task.of(run) if task else open_task(run), began, until or ENDLESS).go()
        except torch.OutOfMemoryError as error:
            advice = "the same batch in parts takes less: --accumulate 2, 4, ..."
            raise Stopped(f"out of memory: {str(error).splitlines()[0]}; {advice}", 1) from None


class _Training:
    """One sitting of a run."""

    def __init__(self, folder: Path, task: Any, began: float, until: int = ENDLESS) -> None:
        self.folder, self.task, self.until = folder, task, until
        self.device = pick_device(task.run.device)
        self.precision = pick_precision(task.run.precision, self.device)
        torch.manual_seed(task.run.seed)
        model = task.model()
        self.run: Run = replace(task.run, model=model.config)
        self.state = State(fit(model.to(self.device), self.run.memory), self.run.optim)
        if task.run.compile:
            task.compile(self.state.model)
        self.signal = 0
        self.began, self.saved, self.drawn = began, time.monotonic(), time.monotonic()  # opening the data counts towards a time budget

    def go(self) -> dict[str, Any]:
        notes: list[str] = []
        found = load_checkpoint(self.folder, notes.append)
        if found:
            check_recipe(self.folder, self.run)
            self.state.restore(*found)
            notes.append(f"going on from step {self.state.clock.step} of {self.state.clock.steps}")
        elif (self.folder / "summary.json").exists() or any(self.folder.glob("damaged_*")):
            raise ValueError(f"{self.folder}: a run stood here, but no checkpoint of it is whole; give another --out")
        self.clock = self.state.clock
        self._check_surroundings()
        write_json(self.folder / "recipe.json", to_dict(self.run))
        self.before = self.clock.seconds
        with (
            Log(self.folder, self.run.recipe or self.run.task, step=self.clock.step, tensorboard=self.run.tensorboard) as self.log,
            self._signals(),
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
            finally:
                self.log.curves()
            return self._finish() if self.clock.step >= self.clock.steps else {}

    # -- steps ----------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        clock, budget = self.clock, seconds(self.run.schedule.time)
        if self._evaluation_due():  # it was, when a signal came
            self._evaluate()
        if clock.step >= min(clock.steps, self.until):
            return
        seen, since, losses = 0, time.monotonic(), []
        for batch in self.task.train_batches(clock.step, ENDLESS, self.device):
            for bad in batch.bad:
                self.log.bad_file(bad.path, bad.reason)
            lr = rate(self.run, clock.step, clock.steps, self.task.steps_per_epoch)
            if len(batch.labels):  # else every picture of it was bad
                losses.append(self._step(batch, lr))
                seen += len(batch.labels)
            clock.step += 1
            clock.seconds = self.before + time.monotonic() - self.began
            if clock.seconds >= budget and clock.step < clock.steps:
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
            if self.signal:
                self._save()
                name = signal.Signals(self.signal).name
                again = "the same command goes on from here"
                raise Stopped(f"{name}: saved step {clock.step} of {clock.steps} in {self.folder}; {again}", 128 + self.signal)
            if self._evaluation_due():
                self._evaluate()
                since, seen, losses = time.monotonic(), 0, []
            elif self._checkpoint_due():
                self._save()
            if clock.step >= min(clock.steps, self.until):
                break
        if clock.step < clock.steps:
            self._save()

    def _step(self, batch: Any, lr: float) -> float:
        """One optimiser step at learning rate `lr`; its loss, the mean over the batch."""
        state, run, clock = self.state, self.run, self.clock
        set_rate(state.optimiser, lr)
        state.model.train()
        torch.manual_seed(seed_from(run.seed, clock.step))
        images, targets = self.task.targets(batch, self.device)
        total = torch.zeros((), device=self.device)
        for part in zip(images.chunk(run.accumulate), targets.chunk(run.accumulate), strict=True):
            randomness = _random_states()
            for loss in self._losses(part):
                loss = loss * (len(part[0]) / len(images))
                loss.backward()
                total += loss.detach()
            if not torch.isfinite(total):
                _random_states(randomness)
                self._blame(part, batch.ids)
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if not torch.isfinite(norm):
            first = next(name for name, p in state.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
            self._stop_bad(f"the gradient of {first} is not finite", batch.ids)
        if run.optim.clip:
            nn.utils.clip_grads_with_norm_(parameters, run.optim.clip, norm)
        state.optimiser.step()
        state.optimiser.zero_grad()
        if state.ema:
            state.ema.update_parameters(state.model)
        return total.item()

    def _losses(self, part: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
        """The task's losses, computed one by one in the run's precision, at most one of their graphs alive."""
        average = self.state.ema.module if self.state.ema else None
        losses = self.task.losses(self.state.model, *part, self.clock.step, average)
        while True:
            with self._autocast():
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _eager(self) -> AbstractContextManager:
        """Where compiling does not pay: few batches, some of another size, or modules that are watched."""
        return torch.compiler.set_stance("force_eager") if self.run.compile else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    # -- when the loss is not a number ------------------------------------------------------------------------------------

    def _blame(self, part: tuple[torch.Tensor, ...], ids: tuple[str, ...]) -> None:
        """Run the bad batch once more, watching every module, and stop with the first whose output is not finite."""
        culprits: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and not culprits and not output.isfinite().all():
                    culprits.append(name)

            return hook

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.state.model.named_modules() if name]
        with torch.no_grad(), self._eager():
            for _ in self._losses(part):
                pass
        for hook in hooks:
            hook.remove()
        where = f"first in module {culprits[0]}" if culprits else "with every module's output finite"
        self._stop_bad(f"the loss is not finite, {where}", ids)

    def _stop_bad(self, what: str, ids: tuple[str, ...]) -> None:
        self.log.record({"step": self.clock.step, "stopped": what, "samples": list(ids)})
        kept = f"; the last good checkpoint is kept in {self.folder}" if checkpoints(self.folder) else ""
        advice = "a lower --lr with another --out, or --precision float32, may help"
        raise Stopped(f"step {self.clock.step + 1}: {what}{kept}; {advice}", 1, diverged=True)

    # -- how long ---------------------------------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Plan the number of steps from the measured speed of a few, on weights that are put back afterwards."""
        kept = {name: tensor.clone() for name, tensor in self.state.model.state_dict().items()}
        times = []
        start = time.monotonic()
        for batch in self.task.train_batches(0, CALIBRATION_STEPS, self.device):
            if len(batch.labels):
                self._step(batch, self.run.optim.warmup_lr)
            self.clock.step += 1  # steps of a supernet differ in what they pass
            times.append(time.monotonic() - start)
            start = time.monotonic()
        with self._eager():
            self.task.evaluate(self.state.final, self.device, self.precision, lambda path, reason: None)
        evaluation = time.monotonic() - start
        self.clock.step = 0
        self.state.model.load_state_dict(kept)
        self.state = State(self.state.model, self.run.optim)
        self.state.clock = self.clock
        self.clock.seconds = time.monotonic() - self.began
        per_step = statistics.median(times) + evaluation / evaluation_steps(self.run, self.clock.steps, self.task.steps_per_epoch)
        self.clock.steps = max(int((seconds(self.run.schedule.time) - self.clock.seconds) / per_step), 1)

    def _replan(self) -> None:
        """With a time budget: fit the steps that are left to the time that is left, at the speed so far; not near the end."""
        clock, budget = self.clock, seconds(self.run.schedule.time)
        clock.seconds = self.before + time.monotonic() - self.began
        if math.isinf(budget) or clock.step >= 0.9 * clock.steps:
            return
        per_step = clock.seconds / clock.step
        steps = max(clock.step + int((budget - clock.seconds) / per_step), clock.step)
        if abs(steps - clock.steps) > 0.02 * clock.steps:
            self.log.note(f"planned {steps} steps instead of {clock.steps}, to end after {self.run.schedule.time}")
            clock.steps = steps

    # -- what is kept -----------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        clock = self.clock
        every = evaluation_steps(self.run, clock.steps, self.task.steps_per_epoch)
        made = bool(clock.history) and clock.history[-1]["step"] == clock.step
        return clock.step > 0 and not made and (clock.step % every == 0 or clock.step >= clock.steps)

    def _evaluate(self) -> None:
        """Evaluate, keep the weights if they are the best, decide how to go on, and save."""
        clock, model = self.clock, self.state.final
        with self._eager():
            metrics = self.task.evaluate(model, self.device, self.precision, self.log.bad_file) | self._probe(model)
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
            best = self.folder / "best"
            self.task.save(model, best)
            write_json(best / "recipe.json", to_dict(self.run))
            write_json(best / "metrics.json", record)
        told = [name for name in metrics if name != "pictures" and not name.startswith("accuracy ")]  # one for every setting of a supernet
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in told)
        self.log.note(f"{self.log.name}  step {clock.step}  {shown}{'  best' if better else ''}")
        if 0 < self.run.schedule.patience <= clock.stale and clock.step < clock.steps:
            self.log.note(f"no better evaluation in {clock.stale}: stopped early")
            clock.steps = clock.step
        if time.monotonic() - self.drawn > DRAW_SECONDS and clock.step < clock.steps:  # at the end the best is drawn
            self._draw(model)
        self._replan()
        self._save()

    def _probe(self, model: nn.Module) -> dict[str, float]:
        """The few-shot accuracies of this evaluation, `{"SET 5shot": ...}`, where it is their turn."""
        clock, found = self.clock, {}
        turn = (len(clock.history) + 1) % self.run.fewshot.probe_every == 0 or clock.step >= clock.steps
        encoder = getattr(model, "encoder", model)  # of a SimMIM net
        for name, evaluation in self.task.probes.items() if turn else ():
            try:
                scores = evaluation(encoder, self.task.preprocess, self.device, self.precision, self.log.bad_file)
            except ValueError as error:  # features that say nothing yet end no run
                self.log.note(f"few-shot evaluation on {name} left out: {error}")
                continue
            found |= {f"{name} {shots}": accuracy for shots, accuracy in scores.items()}
        return found

    def _draw(self, model: nn.Module) -> None:
        with self._eager():
            write(self.folder / "samples.png", lambda path: self.task.draw(model, path))
        self.drawn = time.monotonic()

    def _checkpoint_due(self) -> bool:
        schedule = self.run.schedule
        by_steps = schedule.save_steps and self.clock.step % schedule.save_steps == 0
        return bool(by_steps) or time.monotonic() - self.saved > 60 * (schedule.save_minutes or math.inf)

    def _save(self) -> None:
        save_checkpoint(self.folder, self.clock.step, self.state.tensors(), self.state.values())
        tidy(self.folder, self.run.schedule.keep)
        self.saved = time.monotonic()

    def _check_surroundings(self) -> None:
        """See that data and precision are what the run began with, or write down what they are.

        Raises:
            ValueError: one of them changed, so that going on would not be the same run.
        """
        clock, precision = self.clock, str(self.precision).removeprefix("torch.")
        data = self.task.fingerprint()
        if clock.data and clock.data != data:
            raise ValueError(f"field `data`: the set's classes or files are not those that {self.folder} began with; give another --out")
        if clock.precision and clock.precision != precision:
            raise ValueError(f"field `precision`: the run began in {clock.precision}, this would be {precision}; give --precision")
        clock.data, clock.precision = data, precision

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
        self._draw(self.task.load(self.folder / "best").to(self.device))
        bad, epochs = len(self.log.bad_files), clock.step / self.task.steps_per_epoch
        summary = {"recipe": self.run.recipe, "task": self.run.task, "best": best, "last": clock.history[-1]}
        summary |= {"steps": clock.step, "epochs": epochs, "seconds": clock.seconds, "bad_files": bad}
        write_json(self.folder / "summary.json", summary)
        left_out = f"; {bad} files were left out, see {self.folder}/bad_files.jsonl" if bad else ""
        self.log.note(
            f"{self.log.name}: best {self.task.metric} {clock.best:.4f} at step {clock.best_step}, {clock.seconds:.0f} s{left_out}"
        )
        self.log.note(f"wrote {self.folder}/best, curves.png, samples.png, summary.json")
        return summary

    # -- leaving in order -------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step in hand; a second Ctrl-C at once."""

        def note(number: int, frame: Any) -> None:
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs it there handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _random_states(restore: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The generators' states, of the CPU and of every GPU; given, they are put back first."""
    if restore:
        torch.set_rng_state(restore[0])
        torch.cuda.set_rng_state_all(restore[1:])
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
