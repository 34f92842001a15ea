"""Batches: a pure function of (seed, epoch, sample), whatever the workers and wherever a run starts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manyscale.config import Augment, Input, Preprocess
from manyscale.data import loader
from manyscale.data.images import BadImage
from manyscale.data.loader import BadFile, Batch, eval_batches, order, steps_per_epoch, train_batches, worker_count
from manyscale.data.sources import Digits, open_splits
from manyscale.data.transforms import eval_transform, train_transform

PRE = Preprocess(image_size=(16, 16))
TRAIN = train_transform(PRE, Augment(randaugment=2, erase=0.5))


class Shades:
    """`count` plain pictures, number i of colour (i, i, i); those in `broken` are bad."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BadImage(self.path(index), "empty file")
        return Image.new("RGB", (20, 18), (index,) * 3)

    def label(self, index: int) -> int:
        return index % 3

    def name(self, index: int) -> str:
        return f"{index}.png"

    def path(self, index: int) -> str:
        return f"/set/{index}.png"


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a[2:] == b[2:] for a, b in pairs)


@given(st.integers(1, 300), st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_order_is_a_permutation(count, seed, epoch):
    permutation = order(count, seed, epoch)
    assert permutation.sort().values.tolist() == list(range(count))
    assert torch.equal(permutation, order(count, seed, epoch))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9))
def test_repeats_show_fewer_samples_several_times_in_a_row(count, repeats, epoch):
    shown = order(count, 3, epoch, repeats).tolist()
    assert len(shown) == count and len(set(shown)) == -(-count // repeats)
    assert shown == [order(count, 3, epoch).tolist()[place // repeats] for place in range(count)]


def test_orders_differ():
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_steps_per_epoch():
    assert [steps_per_epoch(count, 4) for count in (4, 7, 8)] == [1, 1, 2]
    with pytest.raises(ValueError, match="`batch`: 8 is more than the 7 training images"):
        steps_per_epoch(7, 8)
    with pytest.raises(ValueError, match="8 is more than the 7"):  # before the first batch is asked for
        train_batches(Shades(7), TRAIN, batch=8, seed=0, start_step=0, steps=1, workers=0)


def test_worker_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert [worker_count(workers) for workers in (-1, 0, 5)] == [3, 0, 5]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert worker_count(-1) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert worker_count(-1) == 0


def run(workers: int, start: int = 0, source=None, **changes) -> list[Batch]:
    options = {"batch": 6, "seed": 3, "start_step": start, "steps": 9, "workers": workers} | changes
    return list(train_batches(source or Shades(20, broken=(4, 11)), TRAIN, **options))  # 3 steps an epoch, 3 epochs


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    return run(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(reference, workers):
    assert same(reference, run(workers))


@pytest.mark.parametrize("start", range(10))
def test_any_start_continues_the_run(reference, start):
    assert same(reference[start:], run(0, start))


def test_start_with_workers_across_epochs(reference):
    assert same(reference[2:], run(2, 2))


def test_what_a_run_is_made_of(reference):
    """Each epoch sees nobody twice, in another order and with other pixels; another seed is another run."""
    assert len(reference) == 9
    whole = run(0, source=Shades(20))
    epochs = [[name for read in part for name in read.ids] for part in (whole[:3], whole[3:6], whole[6:])]
    assert all(len(names) == len(set(names)) == 18 for names in epochs) and epochs[0] != epochs[1] != epochs[2]
    pixels = [{name: image for read in part for name, image in zip(read.ids, read.images, strict=True)}
              for part in (reference[:3], reference[3:6])]  # fmt: skip
    shared = pixels[0].keys() & pixels[1].keys()
    assert len(shared) > 10 and sum(torch.equal(pixels[0][name], pixels[1][name]) for name in shared) < len(shared) / 3
    assert not same(reference, run(0, seed=4))
    for read in reference:
        assert read.images.dtype == torch.float32 and read.labels.dtype == torch.int64
        assert read.labels.tolist() == [int(name.split(".")[0]) % 3 for name in read.ids]
        assert len(read.images) == 6


def test_a_bad_file_makes_way_for_another_and_is_named(reference):
    """In training; the others of its batch are what they were."""
    whole, met = run(0, source=Shades(20)), 0
    for good, read in zip(whole, reference, strict=True):
        places = [i for i, name in enumerate(good.ids) if name in ("4.png", "11.png")]
        assert {f"/set/{good.ids[i]}" for i in places} <= {bad.path for bad in read.bad}
        assert all(a == b for i, (a, b) in enumerate(zip(good.ids, read.ids, strict=True)) if i not in places)
        assert not {"4.png", "11.png"} & set(read.ids)
        met += len(places)
    assert met > 3
    with pytest.raises(ValueError, match=r"/set/\d+\.png: empty file \(nor can 19 others that were drawn in its place\)"):
        run(0, source=Shades(20, broken=tuple(range(20))))


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_share_every_batch(reference, ranks):
    shares = [run(0, share=(rank, ranks)) for rank in range(ranks)]
    for step, read in enumerate(reference):
        parts = [share[step] for share in shares]
        assert same([read], [Batch(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]),
                                   sum((p.ids for p in parts), ()), sum((p.bad for p in parts), ()))])  # fmt: skip
        assert [part.ids for part in read.parts(ranks)] == [part.ids for part in parts]
    with pytest.raises(ValueError, match=r"field `batch`: 6 is not shared out evenly by 4 ranks"):
        run(0, share=(0, 4))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_evaluation(ranks):
    """Whole batches in turns, as many for each rank."""

    def read(share):
        return list(eval_batches(Shades(20, broken=(4,)), TRAIN, batch=3, workers=0, share=share))

    whole, shares = read((0, 1)), [read((rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    in_turns = [batch for group in zip(*shares, strict=True) for batch in group]
    assert same(whole, in_turns[: len(whole)])
    assert all(batch.ids == () and batch.images.shape == (0, *whole[0].images.shape[1:]) for batch in in_turns[len(whole) :])


class Deadly(Shades):
    """Kills or stops the worker that reads a picture, the first time."""

    def __init__(self, folder, number: int, at: int = 7) -> None:
        super().__init__(20)
        self.mark, self.number, self.at = folder / "done", number, at

    def read(self, index):
        if index == self.at and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.number)
        return super().read(index)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_replaced_and_no_batch_is_lost(tmp_path, number, monkeypatch):
    monkeypatch.setattr(loader, "LOOK", 1.0)
    with pytest.warns(RuntimeWarning, match=r"loader workers were lost at batch \d \(DataLoader .*\); new ones go on with it"):
        found = run(2, source=Deadly(tmp_path, number), timeout=2.0)
    assert same(found, run(0, source=Shades(20)))
    assert not multiprocessing.active_children()


class Faulty(Shades):
    def read(self, index):
        raise RuntimeError("a mistake of ours")


def test_an_error_of_our_own_in_a_worker_is_not_tried_again():
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(1, source=Faulty(20))


class Killer(Deadly):
    """Kills every worker that reads a picture."""

    def read(self, index):
        if index == self.at:
            os.kill(os.getpid(), self.number)
        return Shades.read(self, index)


def test_a_picture_that_kills_every_worker_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "LOOK", 0.5)
    with pytest.warns(RuntimeWarning, match="workers were lost"), pytest.raises(RuntimeError, match="DataLoader worker"):
        run(1, source=Killer(tmp_path, signal.SIGKILL))


def test_repeats_are_augmented_anew():
    source = Digits(held_out=False)
    batches = run(0, source=source, batch=9, steps=4, repeats=3)
    assert all(batch.ids[0::3] == batch.ids[1::3] == batch.ids[2::3] and len(set(batch.ids)) == 3 for batch in batches)
    for batch in batches:
        for i in range(0, 9, 3):
            assert not torch.equal(batch.images[i], batch.images[i + 1]) and not torch.equal(batch.images[i + 1], batch.images[i + 2])
    once = {name: image for batch in run(0, source=source, batch=9, steps=159) for name, image in zip(batch.ids, batch.images, strict=True)}
    first = {name: image for batch in batches[:1] for name, image in zip(batch.ids[::3], batch.images[::3], strict=True)}
    assert all(torch.equal(once[name], image) for name, image in first.items()), "the first copy is the one there was without repeats"
    assert same(batches[2:], run(0, 2, source=source, batch=9, steps=4, repeats=3))


def test_what_a_run_reads():
    class Counted(Shades):
        def read(self, index: int) -> Image.Image:
            asked.append(index)
            return super().read(index)

    asked: list[int] = []
    run(0, 8, source=Counted(20))
    assert asked == order(20, 3, 2)[12:18].tolist(), "nothing but the batch of the last step"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generator_is_left_alone(workers):
    torch.manual_seed(5)
    before, got = torch.get_rng_state(), []
    for read in train_batches(Shades(20), TRAIN, batch=6, seed=3, start_step=0, steps=4, workers=workers):
        got.append(read)
        assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(got, run(0, source=Shades(20), steps=4)), "nor does it matter"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_listed_or_end_the_run(workers):
    source = Shades(12, broken=(2, 3, 4, 5, 9))
    batches = list(eval_batches(source, eval_transform(PRE), batch=4, workers=workers))
    assert [read.ids for read in batches] == [("0.png", "1.png"), ("6.png", "7.png"), ("8.png", "10.png", "11.png")]
    assert batches[2].bad == (BadFile("/set/9.png", "empty file"),)
    for call in (eval_batches, train_batches):
        extra = {} if call is eval_batches else {"seed": 0, "start_step": 0, "steps": 3}
        with pytest.raises(ValueError, match=r"^/set/\d\.png: empty file; repair or remove the file.*`bad_files` skip$"):
            list(call(source, eval_transform(PRE), batch=4, workers=workers, policy="stop", **extra))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_bad_files_is_empty(workers):
    (read,) = eval_batches(Shades(3, broken=(0, 1, 2)), TRAIN, batch=4, workers=workers)
    assert read.images.shape == (0, 3, 16, 16) and read.labels.shape == (0,) and read.labels.dtype == torch.int64
    assert read.ids == () and len(read.bad) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_whole(workers):
    source = Digits(held_out=True)
    batches = list(eval_batches(source, eval_transform(PRE), batch=100, workers=workers))
    assert [len(read.images) for read in batches] == [100, 100, 100, 59]
    assert [name for read in batches for name in read.ids] == [source.name(index) for index in range(359)]
    assert torch.equal(batches[3].images[-1], eval_transform(PRE)(source.read(358)))


def test_names_that_are_no_text_pass_the_workers(tmp_path):
    for part in (b"cat/\xff\n.png", b"cat/1.png", b"dog/1.png", b"dog/\xfe.png"):
        path = os.path.join(os.fsencode(tmp_path), part)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            if b"1" in part:
                Image.new("RGB", (4, 4)).save(stream, "PNG")
    splits = open_splits(Input(data=str(tmp_path), holdout=0.5), 0)
    reads = [read for source in splits[:2] for read in eval_batches(source, eval_transform(PRE), batch=4, workers=1)]
    assert {bad.path for read in reads for bad in read.bad} == {os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
                                                                for name in (b"cat/\xff\n.png", b"dog/\xfe.png")}  # fmt: skip


def test_workers_leave_signals_to_the_parent():
    """Ctrl-C and SIGTERM reach the whole process group: the parent must still get every batch it asks for, and leave at once."""
    program = """
        import signal, time
        import torch
        from PIL import Image
        from manyscale.data.loader import train_batches
        class Black:
            __len__ = lambda self: 300
            read = lambda self, index: Image.new("RGB", (1, 1))
            label = lambda self, index: 0
            name = path = lambda self, index: str(index)
        run = lambda workers: train_batches(
            Black(), lambda picture: torch.zeros(3, 8, 8), batch=8, seed=0, start_step=0, steps=60, workers=workers
        )
        batches = run(2)
        next(batches)
        caught = []
        for name in (signal.SIGINT, signal.SIGTERM):  # only now: workers inherit the handlers there are
            signal.signal(name, lambda number, frame: caught.append(number))
        print("ready", flush=True)
        while len(caught) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        print(sum(1 for _ in batches), flush=True)
        left = run(1)
        next(left)  # its worker is let go with the interpreter
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        timer = threading.Timer(40, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        assert child.stdout.readline() == "ready\n"
        os.killpg(child.pid, signal.SIGINT)
        os.killpg(child.pid, signal.SIGTERM)
        out, errors = child.communicate()
        timer.cancel()
    assert (child.returncode, out, errors) == (0, "59\n", "")
