"""A net as a file that other engines run: torch.export, ONNX, OpenVINO. What is written has been read back, run, and compared.

Every format takes images (B, 3, H, W) in float32, for any B and the one size it was exported at, and gives logits (B, classes) in
float32. ONNX is made from torch's exported graph, OpenVINO from ONNX: so each op is translated once.
"""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import manyscale
from manyscale.config import Preprocess, Setting, to_dict
from manyscale.data.loader import eval_batches, worker_count
from manyscale.data.sources import Part
from manyscale.data.transforms import eval_transform
from manyscale.models import Net
from manyscale.models.settings import AtSetting
from manyscale.ship.evaluate import Scored, pictures_for, recipe_of
from manyscale.ship.measure import apart
from manyscale.ship.onnx_ops import translations
from manyscale.storage import read_json, sync, write_json
from manyscale.tasks import classify
from manyscale.tasks.pictures import Report

Format = Literal["torch", "onnx", "openvino"]
DType = Literal["float32", "float16", "bfloat16"]
Engine = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, classes), both float32 on the CPU

FILES = {"torch": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml"}
NEEDS = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
CARD = "export.json"
AGREE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}  # of the largest logit: how far a file's logits may be from the net's
OPSET = 20
CALIBRATION = 300  # pictures that int8 takes its ranges from: NNCF's default


class Exported(NamedTuple):
    """What was written, and how near its answers are."""

    folder: Path
    difference: float  # from the net in float32, of the largest logit, over batches of one and three random images
    card: dict[str, Any]  # what export.json says


def export(
    model: Net,
    folder: Path | str,
    *,
    format: Format,
    dtype: DType = "float32",
    setting: Setting | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> Exported:
    """Write a net as one file of `format` in `folder`, beside export.json that says how its pictures are prepared.

    The file is run by its own engine and compared with the net before it comes into the folder; what stood there stays until then.

    Args:
        model: with a head, in float32 on the CPU; it is left in evaluation mode.
        dtype: of the weights, and what the engine computes in. Of OpenVINO, bfloat16 is what it computes in alone.
        setting: at which size and how it runs; None: at its own size, whole.
        calibration: batches of prepared images (B, 3, H, W), of which the first `CALIBRATION` images choose the ranges of int8 (NNCF);
            None: no int8. Its answers differ by more than rounding, so they are not held to a limit here: score it on pictures.

    Raises:
        ValueError: a setting that the net cannot be run at, a net of another type, on another device, or whose attention is this
            package's own operation; a type that the format has not, a package that is not installed, or answers that are not the net's.
        OSError: the folder cannot be written.
    """
    _require(format, dtype, int8=calibration is not None)
    _see_that_it_can_go_out(model)
    model.eval()
    net, shape = AtSetting(model, setting).eval(), (model.config.channels, *_size(model, setting))
    with torch.no_grad():
        checks = [torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)) for count in (1, 3)]
        expected = [net(images).float() for images in checks]  # refuses what cannot be
    folder = Path(folder)
    with _made(folder), tempfile.TemporaryDirectory(prefix=".", dir=folder) as place:
        beside = Path(place)
        card = write_engine(net, shape, beside, format=format, dtype=dtype, calibration=calibration)
        engine = open_engine(beside)
        difference = max(apart(engine(images), logits) for images, logits in zip(checks, expected, strict=True))
        if not difference <= (AGREE[dtype] if calibration is None else float("inf")):  # NaN is not
            raise ValueError(f"field `format`: logits of the {format} file differ by {difference:.1g} of the largest; it was not written")
        card |= {
            "setting": str(setting) if setting else "",
            "preprocess": to_dict(_prepared(model, setting)) if model.preprocess else None,
            "labels": list(model.labels),
            "difference": difference,
        }
        write_json(beside / CARD, card)
        (folder / CARD).unlink(missing_ok=True)  # a folder without it is no export
        for file in sorted(beside.iterdir(), key=lambda file: file.name == CARD):
            sync(file)
            os.replace(file, folder / file.name)
    sync(folder)
    return Exported(folder, difference, card)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder is there; one that was made for what then failed is not."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # somebody else's file may be in it by now
            for each in made:
                each.rmdir()
        raise


def write_engine(
    net: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    *,
    format: Format,
    dtype: DType = "float32",
    calibration: Iterable[Tensor] | None = None,
) -> dict[str, Any]:
    """Write any net of images as `open_engine` reads it, without comparing: for nets that are not this package's.

    Args:
        net: from images (B, *shape) to logits, in float32 on the CPU.
        folder: where the file and its export.json go.
        dtype, calibration: as of `export`.

    Returns:
        What export.json says.

    Raises:
        ValueError: a type that the format has not, a package that is not installed, int8 without images.
    """
    _require(format, dtype, int8=calibration is not None)
    card = {
        "format": format,
        "file": FILES[format],
        "dtype": dtype,
        "int8": calibration is not None,
        "images": ["batch", *shape],
        "manyscale": manyscale.__version__,
        "torch": torch.__version__,
    }
    with _quiet():
        _write(net, shape, format, dtype, calibration, folder)
    write_json(folder / CARD, card)
    return card


def open_engine(folder: Path | str, threads: int = 0) -> Engine:
    """What runs the file that `export` wrote, on the CPU; `threads`, of ONNX Runtime and OpenVINO, 0: as the engine takes them.

    Raises:
        ValueError: no export, one that is damaged, or its engine is not installed.
    """
    folder = Path(folder)
    card = read_json(folder / CARD)
    format = card.get("format")
    if format not in FILES:
        raise ValueError(f"{folder / CARD}: field `format`: {format!r} is none of {', '.join(FILES)}")
    _require(format)
    try:
        return {"torch": _open_torch, "onnx": _open_onnx, "openvino": _open_openvino}[format](folder, card, threads)
    except Exception as error:  # every engine has its own
        raise ValueError(f"{folder / FILES[format]}: {format} cannot run it ({error!r}); export the net again") from error


class Scores(NamedTuple):
    """Top-1 accuracy of a net and of a file made of it, on the same pictures."""

    name: str  # set and split
    pictures: int
    net: float
    file: float


def calibration(path: str, model: Net, setting: Setting | None, data: str = "") -> Iterator[Tensor]:
    """Training pictures for the ranges of int8, prepared at a setting's size: batches (B, 3, H, W).

    Raises:
        ValueError: no such set, no word on which, or a model that does not know how its pictures are prepared.
    """
    run = recipe_of(path)
    if not data and not run:
        raise ValueError(f"{path}: there is no recipe.json that names its data; give --data")
    return pictures_for(model, data or run.input.data, CALIBRATION, _prepared(model, setting))


def score(scored: Scored, model: Net, folder: Path | str, setting: Setting | None, *, pictures: int, report: Report) -> Scores:
    """Score a net and the file that `export` made of it on the same pictures; export.json then says both accuracies.

    Args:
        scored: from `ship.evaluate.open_scored`.
        pictures: drawn at random; 0: all of the split.
        report: called with path and reason of every picture that could not be read.
    """
    chosen = np.random.default_rng(0).permutation(len(scored.source))[: pictures or None]
    source, transform = Part(scored.source, np.sort(chosen)), eval_transform(_prepared(model, setting))
    found = []
    for net in (AtSetting(model, setting), _Runs(open_engine(folder))):
        batches = eval_batches(source, transform, batch=32, workers=worker_count(-1), policy=scored.policy)
        with torch.no_grad():
            found.append(classify.score(net, batches, torch.device("cpu"), torch.float32, report, scored.order))
        report = _ignore  # each bad file once
    whole, file = found
    card = read_json(Path(folder) / CARD)
    card["accuracy"] = {"set": scored.name, "pictures": whole["pictures"], "net": whole["accuracy"], "file": file["accuracy"]}
    write_json(Path(folder) / CARD, card)
    return Scores(scored.name, whole["pictures"], whole["accuracy"], file["accuracy"])


class _Runs(nn.Module):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images)


def _ignore(path: str, reason: str) -> None:
    pass


def _prepared(model: Net, setting: Setting | None) -> Preprocess:
    if not model.preprocess:
        raise ValueError("this model does not know how its pictures are prepared; give one that `train` or `convert` wrote")
    return replace(model.preprocess, image_size=tuple(_size(model, setting)))


# --- Writing -------------------------------------------------------------------------------------------------------------------


class _InType(nn.Module):
    """A net that computes in a type of its own between images and logits in float32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.dtype)).float()


def _write(
    net: nn.Module, shape: tuple[int, ...], format: Format, dtype: DType, calibration: Iterable[Tensor] | None, folder: Path
) -> None:
    if dtype != "float32" and format != "openvino":  # which changes types itself
        kind = getattr(torch, dtype)
        net = _InType(copy.deepcopy(net).to(kind), kind)
    graph = _graph(net, shape)
    if format == "torch":
        torch.export.save(graph, folder / FILES["torch"])
        return
    program = torch.onnx.export(
        graph,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table=translations(),
    )
    file = folder / FILES["onnx"]
    if format == "onnx" and calibration is None:
        program.save(file)
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place) / "whole.onnx"
        program.save(whole)
        if format == "onnx":
            import onnx

            onnx.save(_int8(onnx.load(whole), ({"images": images.numpy()} for images in _single(calibration))), file)
        else:
            import openvino

            converted = openvino.Core().read_model(whole)  # convert_model takes a comma in a path for the end of it
            for op in converted.get_ops():
                if op.get_type_name() == "TopK":
                    op.set_attribute("stable", True)  # as ONNX's is: of equals the earlier
            if calibration is not None:
                converted = _int8(converted, (images.numpy() for images in _single(calibration)))
            openvino.save_model(converted, folder / FILES["openvino"], compress_to_fp16=dtype == "float16")


@torch.no_grad()
def _graph(net: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Of two images, so that nothing is made for one alone."""
    return torch.export.export(net, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _int8(model: Any, samples: Iterable[Any]) -> Any:
    import nncf

    if not (images := list(samples)):
        raise ValueError("field `calibration`: no images to choose the ranges of int8 on")
    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset(images)
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)


def _single(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The first `CALIBRATION` images, one at a time."""
    return islice((image[None] for batch in batches for image in batch), CALIBRATION)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the words that torch, onnxscript and NNCF say of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "nncf")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


# --- Reading back --------------------------------------------------------------------------------------------------------------


def _open_torch(folder: Path, card: dict[str, Any], threads: int) -> Engine:
    net = torch.export.load(folder / FILES["torch"]).module()
    return torch.no_grad()(net)


def _open_onnx(folder: Path, card: dict[str, Any], threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(folder / FILES["onnx"], options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _open_openvino(folder: Path, card: dict[str, Any], threads: int) -> Engine:
    import openvino

    hint = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}[card["dtype"]]  # left alone, a CPU with bfloat16 computes in it
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(folder / FILES["openvino"], "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


# --- Checks --------------------------------------------------------------------------------------------------------------------


def _see_that_it_can_go_out(model: Net) -> None:
    weight = next(model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        here = f"{weight.dtype} on {weight.device.type}"
        raise ValueError(f"field `model`: its weights are {here}; an export is made of float32 on the CPU: model.float().cpu()")
    for module in model.modules():
        if (path := getattr(module, "attention_path", "auto")) in ("sequential", "kernel"):
            raise ValueError(f"field `attention`: {path} is an operation of this package alone; call set_attention(model, 'auto') first")


def _require(format: str, dtype: str = "float32", int8: bool = False) -> None:
    for field, value, known in (("format", format, FILES), ("dtype", dtype, AGREE)):
        if value not in known:
            raise ValueError(f"field `{field}`: {value!r} is none of {', '.join(known)}")
    if format == "onnx" and dtype == "bfloat16":
        raise ValueError("field `dtype`: ONNX Runtime has few operations in bfloat16; give float16 or float32, or --format openvino")
    if int8 and (format == "torch" or dtype != "float32"):
        fix = "give --format onnx or openvino" if format == "torch" else "leave --dtype out"
        raise ValueError(f"field `int8`: int8 is made of float32 in ONNX or OpenVINO, not of {dtype} in {format}; {fix}")
    for package in (*NEEDS[format], *["nncf"] * int8):
        try:
            __import__(package)
        except ImportError as error:
            raise ValueError(f"field `format`: {format} needs {package}: pip install 'manyscale[export]' ({error})") from None


def _size(model: Net, setting: Setting | None) -> Sequence[int]:
    size = setting.size if setting and setting.size else model.config.size
    return size if isinstance(size, tuple) else (size, size)
