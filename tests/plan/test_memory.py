"""Planned bytes against those of real optimisers; how a net lies on many GPUs; and what `plan memory` says and refuses."""

import subprocess
import sys

import pytest
import torch

import manyscale as ms
from manyscale.cli import main
from manyscale.config import Memory, Optim
from manyscale.plan import memory as planned
from manyscale.plan.activations import Part
from manyscale.plan.memory import METHODS, Job, advise, leans, memory, shardings, step
from manyscale.presets import model_config
from manyscale.train.moments import LEAST
from manyscale.train.optim import make_optimiser
from tests.test_cli import refused
from tests.train.test_moments import state_bytes

VIT = {"image_size": 64, "patch": 8, "width": 128, "depth": 2, "heads": 2, "mlp_width": 200, "classes": 40}
SWIN = {"image_size": 64, "patch": 4, "window": 4, "width": 64, "depths": (2, 1), "heads": (2, 4), "classes": 33}
SUPER = {"sizes": (48, 64), "patch": 8, "width": 128, "depth": 2, "heads": 2, "mlp_width": 200, "drop_blocks": (1,), "classes": 40}
NETS = [
    ("vit_tiny_patch16", {**VIT, "pool": "map", "pre_logits": 48}),
    ("vit_tiny_patch16", {**VIT, "pool": "token", "mask_token": True}),
    ("vit_tiny_patch16", {**VIT, "position": "sincos2d", "classes": 0, "heads": 4, "patch": 32}),
    ("vit_tiny_patch16", {**VIT, "width": 1024, "heads": 32, "depth": 1, "patch": 32}),  # heads and their width are axes too
    ("swinv2_tiny", {**SWIN, "level_norms": True, "mask_token": True, "extra_norm_every": 1}),
    ("swinv2_tiny", {**SWIN, "heads": (2, 32), "width": 64}),
    ("swin_tiny", {**SWIN, "heads": (2, 32)}),
    ("supervit_deit_tiny", {**SUPER, "registers": 40}),
    ("supervit_lvvit_tiny", {**SUPER, "stem_width": 40, "positions": "interpolated"}),
]


@pytest.mark.parametrize(("name", "fields"), NETS)
def test_planned_bytes_are_the_optimisers_own(name, fields):
    model = ms.create_model(name, **fields)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for method, half in METHODS:
        optimiser = make_optimiser(model, Optim(method=method, momentum="bfloat16" if half else "float32"))
        optimiser.step()
        counters = 4 * len(parameters)
        assert memory(model.config, method, half=half).optimiser == state_bytes(optimiser) - counters, (method, half)
    assert memory(model.config).weights == sum(4 * p.numel() for p in parameters)
    assert planned.FACTORED_FROM == LEAST


def test_the_papers_numbers_for_g():
    """Of 1.88 billion parameters with MAP pooling: 7.0 GiB of weights, +14.0 for Adam, +10.5, +3.5 (section 3.4)."""
    giant = model_config("G/14", pool="map", classes=0)

    def gib(*arguments, **options):
        return memory(giant, *arguments, **options).optimiser / 2**30

    assert memory(giant).weights / 2**30 == pytest.approx(7.0, abs=0.05)
    assert (gib("adamw"), gib("adamw", half=True), gib("adafactor", half=True)) == pytest.approx((14.0, 10.5, 3.5), abs=0.05)
    assert memory(giant, ema=True).total - memory(giant).total == memory(giant).weights


GIANT = {"image_size": 1536, "window": 32}


def test_states_of_a_rank():
    """3.0 billion parameters at 16 bytes each, divided among ranks by hand: 10^9 bytes (ZeRO, arXiv 1910.02054, figure 1)."""
    states = memory(model_config("swinv2_giant"))
    expected = {8: (48.0, 27.0, 6.0, 6.0), 64: (48.0, 24.4, 0.75, 6.0, 0.75)}
    for ranks, sizes in expected.items():
        found = {how.name: how.states(states) / 1e9 for how in shardings(ranks)}
        assert list(found) == ["DDP", "ZeRO-1", "ZeRO-2", *["HSDP"] * (ranks > 8), "ZeRO-3"]
        assert list(found.values()) == pytest.approx(sizes, abs=0.05)


def test_weights_and_gradients_on_their_way():
    """Four equal parts that keep nothing: 4 bytes a weight in float32, 2 in bfloat16, and as often as a rank has them at once."""
    states = memory(model_config("swinv2_tiny"))._replace(weights=4000, gradients=4000, optimiser=8000, average=0)
    parts = [Part(f"part {i}", 1000, 0, 0, 0) for i in range(4)]
    for again in (False, True):
        found = {how.name: step([part._replace(again=again) for part in parts], states, how) for how in (*shardings(1), *shardings(4))}
        assert found == {
            "one GPU": 16000 + 500,  # all gradients, and the first part's copy
            "DDP": 16000 + 2000,
            "ZeRO-1": 10000 + 2000,
            "ZeRO-2": 3000 + 2000 + 1500,  # all gathered, and the last part's gradient in both types
            "ZeRO-3": 3000 + 500 + 1000 + 1500,  # two parts' gradients sharded, two parts gathered
        }
    assert step(parts, states, shardings(4)[3], "float32") == 3000 + 500 + 2000 + 2000


def test_the_largest_batch_is_the_largest():
    config = model_config("swinv2_tiny")
    job, lean = Job(config=config, states=memory(config)), Memory(checkpointing="blocks")
    for how, limit in ((shardings(1)[0], 2**30), (shardings(4)[2], 2**31)):
        found = job.largest(lean, how, limit)
        assert found > 1 and job.takes(lean, how, found) <= limit < job.takes(lean, how, found + 1)
    assert job.largest(lean, shardings(1)[0], 2**20) == 0


def test_the_papers_claim_for_3_billion():
    """ZeRO, checkpointing and chunks of attention in two stages train it at 1536 pixels on 40 GB (Swin V2, section 4.1).

    Its ZeRO is DeepSpeed's first stage, which keeps weights and gradients in 16 bits.
    """
    config = model_config("swinv2_giant", **GIANT)
    states, ways = memory(config), leans(Memory(), 2)
    job = Job(config=config, states=states._replace(weights=states.weights // 2, gradients=states.gradients // 2))
    one, three = (how for how in shardings(64) if how.name in ("ZeRO-1", "ZeRO-3"))
    assert job.takes(ways["--checkpointing blocks --sequential 2"], one) < 40e9 < job.takes(ways["--checkpointing blocks"], one)
    assert job.takes(ways["nothing"], three) > job.takes(ways["--sequential 2"], three) > 200e9
    assert Job(config=config, states=states).takes(ways["--checkpointing blocks --sequential 2"], three) < 16e9


def test_the_cheapest_shards_before_it_computes_again():
    config = model_config("swinv2_giant", **GIANT)
    job = Job(config=config, states=memory(config))
    for limit, start in ((100e9, "DDP with --checkpointing selective: "), (36e9, "ZeRO-3 with --checkpointing selective: ")):
        lines = advise(job, leans(Memory(), 2), shardings(64), int(limit))
        assert lines[0].startswith(f"cheapest that fits: {start}"), lines
        assert lines[1].startswith("leanest: ZeRO-3 with --checkpointing blocks --sequential 2: ")
    small = model_config("swinv2_tiny")
    lines = advise(Job(config=small, states=memory(small)), leans(Memory(), 2), shardings(64), int(36e9))
    assert lines[0].startswith("cheapest that fits: DDP: 0."), lines


def test_the_verb_answers_without_torch():
    call = ["plan", "memory", "swinv2_giant", "--image-size", "1536", "--window", "32", "--gpu-memory", "40GB", "--gpus", "64"]
    code = f"import sys, time; from manyscale.cli import main; main({call}); print('torch' in sys.modules, time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    *table, last = done.stdout.splitlines()
    assert done.returncode == 0 and "swinv2_giant at 1536/32, batch 1, bfloat16" in table[0], done.stderr
    assert any(line.startswith("cheapest that fits: ZeRO-3 with --checkpointing selective") for line in table)
    with_torch, seconds = last.split()
    assert with_torch == "False" and float(seconds) < 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["swinv2_tiny"], "optimiser bytes / parameter"),
        (["swinv2_tiny", "--ema", "--classes", "10"], "swinv2_tiny: 27,5"),
        (["swinv2_tiny", "--image-size", "384", "--window", "24"], "swinv2_tiny at 384/24, batch 1, bfloat16"),
        (["supervit_deit_small", "--image-size", "160", "--precision", "float32"], "supervit_deit_small at 160, batch 1, float32"),
        (["vit_base_patch16", "--gpus", "16", "--batch", "4"], "HSDP"),
        (["G/14", "--gpu-memory", "80GB", "--method", "adafactor", "--momentum", "bfloat16"], "cheapest that fits: one GPU: "),
    ],
)
def test_what_the_verb_says(arguments, said, capsys):
    main(["plan", "memory", *arguments])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "0"], "field `gpu_memory`: '0' is no number of bytes; write 64MiB or 40GB"),
        (["--gpu-memory", "40"], "field `gpu_memory`: 40 is 36 bytes; give a unit, such as 40GB"),
        (["--gpu-memory", "much"], "field `gpu_memory`: 'much' is no number of bytes"),
        (
            ["--gpu-memory", "100MB"],
            "swinv2_tiny: field `gpu_memory`: nothing fits 0.08 GiB, which leave a tenth free: the leanest, one GPU",
        ),
        (["--gpus", "0"], "field `gpus`: 0 must be at least 1"),
        (["--gpus", "12"], "field `gpus`: 12 do not fill nodes of 8"),
        (["--gpus", "4", "--gpus-per-node", "0"], "field `gpus_per_node`: 0 must be at least 1"),
        (["--batch", "0"], "field `batch`: 0 must be at least 1"),
        (["--sequential", "5"], "field `sequential`: 5 stages, but the net has 4"),
        (["--sequential", "2", "--attention", "fused"], "field `sequential`: 2 stages, but --attention fused for all"),
        (["--image-size", "0"], "field `image_size`: 0 must be at least 1"),
        (["--precision", "float16"], "float16"),
    ],
)
def test_what_the_verb_refuses(arguments, said, capsys):
    assert said in refused(capsys, "plan", "memory", "swinv2_tiny", *arguments)


def test_what_other_nets_refuse(capsys):
    assert "unknown field `window` of ViTConfig" in refused(capsys, "plan", "memory", "vit_base_patch16", "--window", "8")
    assert "field `sequential`: 2 stages, but the net has 0" in refused(capsys, "plan", "memory", "vit_base_patch16", "--sequential", "2")
    assert "field `size`: 200 must be a multiple" in refused(capsys, "plan", "memory", "supervit_deit_small", "--image-size", "200")
    assert "has no position table" in refused(capsys, "plan", "memory", "supervit_deit_small", "--image-size", "256")
