"""In evaluation a position bias is computed once, and never outlives the weights it came from."""

import copy
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured

from manyscale.config import Setting, SwinConfig
from manyscale.layers.kept import LIMIT, Kept
from manyscale.layers.position_bias import ContinuousBias
from manyscale.models import build, set_attention
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.ops.windows import layout
from tests.conftest import loud

pytestmark = pytest.mark.attention
NET = SwinConfig(image_size=32, patch=4, window=4, width=8, depths=(2, 2), heads=(2, 2), classes=5)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return loud(build(NET)).eval()


@pytest.fixture
def calls(monkeypatch):
    """How often a bias is computed."""
    made, real = [], ContinuousBias.forward
    monkeypatch.setattr(ContinuousBias, "forward", lambda self, *inputs: made.append(self) or real(self, *inputs))
    return made


def fresh(model) -> torch.Tensor:
    """What a net without memory answers."""
    model = copy.deepcopy(model)
    model.train().eval()
    with torch.no_grad():
        return model(IMAGES)


@torch.no_grad()
def test_a_bias_is_computed_once(model, calls):
    first = model(IMAGES)
    assert len(calls) == 4 and torch.equal(model(IMAGES), first) and len(calls) == 4
    model(IMAGES[:1]), model(IMAGES[..., :24])
    assert len(calls) == 8, "another grid has layouts of its own, another batch has not"
    with torch.inference_mode():
        assert torch.equal(model(IMAGES), first) and len(calls) == 8
    model.bfloat16()(IMAGES.bfloat16())
    assert len(calls) == 12


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_kept_biases_change_nothing(padding, similarity):
    model = loud(build(replace(NET, padding=padding, similarity=similarity))).eval()
    images = torch.randn(2, 3, 28, 40)
    with torch.enable_grad():
        expected = model(images)
    for _ in range(2):
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


WAYS = {
    "optimiser": lambda p: torch.optim.SGD([p], lr=1.0).step(),
    "fused optimiser": lambda p: torch.optim.AdamW([p], lr=1.0, fused=True).step(),  # raises no version
    "in place": lambda p: p.add_(1),
    "data": lambda p: setattr(p, "data", p.data + 1),
    "loaded": None,
    "assigned": None,
    "by name": None,
    "data in place": None,
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_follows_its_weights(model, way):
    before = model(IMAGES)
    layer = model.stages[0].blocks[1].attention.branch.bias.fc2
    if way in ("loaded", "assigned"):
        other = {name: tensor + 0.5 * name.endswith("fc2.weight") for name, tensor in model.state_dict().items()}
        model.load_state_dict(other, assign=way == "assigned")
    elif way == "by name":
        layer.weight = torch.nn.Parameter(layer.weight + 1)
    elif way == "data in place":  # leaves no trace, but for the change of mode that goes with it
        model.train()
        layer.weight.data.add_(1)
        model.eval()
    else:
        layer.weight.grad = torch.ones_like(layer.weight)
        WAYS[way](layer.weight)
    after = model(IMAGES)
    assert not torch.equal(before, after) and torch.equal(after, fresh(model))


@torch.no_grad()
def test_memory_that_was_freed_and_given_out_again_is_no_excuse(model):
    layer = model.stages[0].blocks[1].attention.branch.bias.fc2
    for _ in range(10):
        before = model(IMAGES)
        layer.weight.data = layer.weight + 1
        layer.weight.data = -layer.weight
        after = model(IMAGES)
        assert not torch.equal(before, after) and torch.equal(after, fresh(model))


@torch.no_grad()
def test_a_bias_that_hooks_change_is_not_kept(model):
    before = model(IMAGES)
    for module in model.modules():
        if isinstance(module, ContinuousBias):
            l1_unstructured(module.fc2, "weight", 0.5)
    after = model(IMAGES)
    assert not torch.equal(before, after)
    with torch.enable_grad():
        torch.testing.assert_close(after, model(IMAGES).detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bias_of_another_kind_is_another(model):
    model(IMAGES)
    for module in model.modules():
        if isinstance(module, ContinuousBias):
            register_parametrization(module.fc2, "weight", torch.nn.Tanh())
    after = model(IMAGES)
    with torch.enable_grad():
        torch.testing.assert_close(after, model(IMAGES).detach(), rtol=1e-5, atol=1e-5)


def test_where_a_gradient_is_wanted_nothing_is_kept(model, calls):
    for count in (4, 8):
        model(IMAGES).sum().backward()
        assert len(calls) == count and model.stages[0].blocks[1].attention.branch.bias.fc2.weight.grad.any()
    model.train()
    with torch.no_grad():
        model(IMAGES), model(IMAGES)
    assert len(calls) == 16


def test_training_goes_on_after_inference(model):
    with torch.inference_mode():
        model(IMAGES)
    model.train()(IMAGES).sum().backward()


@torch.no_grad()
def test_copies_keep_their_own(model, calls):
    model(IMAGES)
    other = copy.deepcopy(model)
    other.stages[0].blocks[1].attention.branch.bias.fc2.weight.add_(1)
    assert not torch.equal(other(IMAGES), model(IMAGES)) and torch.equal(other(IMAGES), fresh(other))
    assert "kept" not in " ".join(model.state_dict())


@torch.no_grad()
def test_traced_nets_take_no_kept_bias(model):
    expected = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), expected)
    model.stages[0].blocks[1].attention.branch.bias.fc2.weight.add_(1)
    torch.testing.assert_close(compiled(IMAGES), fresh(model))
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), fresh(model))
    with torch.device("meta"):
        assert copy.deepcopy(model).to("meta")(IMAGES.to("meta")).shape == (2, 5)
    torch.testing.assert_close(model(IMAGES), fresh(model))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_nets_that_torch_func_stacks(model):
    models = [model, loud(build(NET), seed=5).eval()]
    for one in models:
        one(IMAGES)
    parameters, buffers = stack_module_state(models)
    stacked = vmap(lambda p, b: functional_call(model, (p, b), (IMAGES,)))(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([fresh(one) for one in models]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(IMAGES), fresh(model))


@torch.no_grad()
def test_the_settings_of_a_swin_keep_one_each(model, calls):
    settings = [Setting(size=32), Setting(size=32, window=2), Setting(size=48, window=3)]
    answers = [model(IMAGES, setting=setting) for setting in settings]
    count = len(calls)
    for setting, answer in zip(settings, answers, strict=True):
        assert torch.equal(model(IMAGES, setting=setting), answer)
    assert len(calls) == count == 12


@torch.no_grad()
def test_a_path_finds_what_it_can_read(model):
    """The fused one reads biases with the mask laid into them, the others both apart."""
    expected = model(IMAGES)
    for path in ("sequential", "reference", "fused", "sequential"):
        torch.testing.assert_close(set_attention(model, path, budget=8192)(IMAGES), expected)  # a window at a time


@torch.no_grad()
def test_a_layer_tells_layouts_apart(model):
    """One layer, given windows that are shifted and that are not."""
    layer, x = model.stages[0].blocks[0].attention.branch, torch.randn(1, 8, 8, 8)
    rest = relative_index((4, 4), (4, 4)), relative_coordinates((4, 4), (4, 4), "log")
    cuts = [layout((8, 8), (4, 4), shifted=shifted, mask_padding=True) for shifted in (False, True)]
    with torch.enable_grad():
        expected = [layer(x, cut, *rest) for cut in cuts]
    for cut, answer in zip(cuts, expected, strict=True):
        torch.testing.assert_close(layer(x, cut, *rest), answer)


def test_threads_share_what_is_kept():
    """Replicas of nn.DataParallel have parameters of their own and one `Kept`; a server's threads have all in common."""
    for parameters in ([torch.zeros(1)] * 8, [torch.zeros(1) for _ in range(8)]):
        kept, wrong = Kept(), []

        def run(mine, kept=kept, wrong=wrong):
            try:
                for number in range(2000):
                    key = (id(mine), number % (LIMIT + 3))
                    assert kept.get(key, lambda key=key: key, [mine]) == key
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=run, args=(mine,)) for mine in parameters]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        assert not wrong


def test_the_oldest_value_goes_first():
    kept, made = Kept(), []
    for key in range(LIMIT + 1):
        assert kept.get(key, lambda key=key: made.append(key) or key) == key
    assert kept.get(1, lambda: made.append(1)) == 1 and len(made) == LIMIT + 1
    kept.get(0, lambda: made.append(0))
    assert made[-1] == 0 and len(kept.held[1]) == LIMIT
