import copy

import pytest
import torch

from dit.acceleration import for_drawing, for_training
from dit.model import DiT, ModelConfig
from dit.onednn import available
from dit.written import Drawing, Training

fast = pytest.mark.skipif(not available(), reason="no faster form on this processor, or in this torch")
DESIGNS = [
    {},
    {"learn_sigma": False, "timestep_embedding": "diffusers"},
    {"block": "adaln"},
    {"block": "cross_attention", "rotary": True},
    {"block": "in_context", "qk_norm": True},
    {"norm": "rms", "mlp": "swiglu", "rotary": True, "qk_norm": True},
    {"condition": "embeddings"},
    {"condition": "none"},
]


def network(design, trained=False, **sizes):
    torch.manual_seed(0)
    config = ModelConfig(
        "custom", **({"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2} | sizes), **design
    )
    by_sequence = design.get("condition") == "embeddings"
    shape = (3, 5) if by_sequence else None
    model = DiT(config, input_size=8, in_channels=4, num_classes=3, condition_shape=shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(trained)


def inputs(model, N=6):
    x, t = torch.randn(N, 4, 8, 8), torch.full((N,), 300.0)
    y = torch.randn(N, 3, 5) if model.condition_shape else torch.arange(N) % (model.num_classes + 1)
    return x, t, y


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_the_twin_is_the_same_function(design):
    model = network(design)
    given = inputs(model)
    expected, drawn = model(*given), for_drawing(model)(*given)
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@fast
def test_the_published_design_alone_is_written_out():
    kinds = [isinstance(for_drawing(network(design)), Drawing) for design in DESIGNS]
    assert kinds == [True, True, False, False, False, False, True, True]


@fast
def test_making_a_twin_leaves_the_network_as_it_is_and_calls_its_hooks():
    for design in ({}, {"block": "cross_attention"}):
        model = network(design)
        before, parts, calls = copy.deepcopy(model.state_dict()), str(model), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        given = inputs(model)
        expected = model(*given)
        twin = for_drawing(model)
        assert twin is not model
        twin(*given)
        assert str(model) == parts and torch.equal(model(*given), expected) and len(calls) == 3
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_plain_network_is_used_where_nothing_is_known_to_be_faster():
    model = network({})
    with torch.backends.mkldnn.flags(enabled=False):
        assert for_drawing(model) is model
    half = network({}).to(torch.bfloat16)
    assert for_drawing(half) is half


def gradients(step, model, given, **asked):
    """What `step` gives and what every parameter learns from it, the tapped tokens' part included."""
    model.zero_grad(set_to_none=True)
    outputs = step(*given, **asked)
    outputs = outputs if asked else (outputs,)
    sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("asked", [{}, {"tap": 1}], ids=["alone", "tapped"])
def test_what_is_trained_is_the_same_function_with_the_same_gradients(design, asked):
    model = network(design, trained=True)
    x, t, y = inputs(model)
    given = x, torch.linspace(0, 999, len(t)), y
    expected = gradients(model, model, given, **asked)
    found = gradients(for_training(model, precision="fp32"), model, given, **asked)
    largest = max(float(tensor.abs().max()) for tensor in expected)  # some gradients are 0 but for rounding
    for one, other in zip(found, expected, strict=True):
        atol = 2e-5 * float(other.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


@fast
def test_training_is_written_out_for_the_published_design_and_gives_the_same_bits_again():
    for design in ({}, {"norm": "rms"}):
        model = network(design, trained=True)
        step, given = for_training(model, precision="fp32"), inputs(model)
        assert step is not model and isinstance(step, Training) == (design == {})
        first, again = gradients(step, model, given), gradients(step, model, given)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_what_is_trained_sees_every_change_of_the_weights():
    model = network({}, trained=True)
    step, given = for_training(model, precision="fp32"), inputs(model)
    step(*given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        torch.testing.assert_close(step(*given), model(*given), rtol=1e-4, atol=1e-4)


def test_the_network_itself_is_trained_where_nothing_is_known_to_be_faster():
    model = network({}, trained=True)
    assert for_training(model, precision="bf16") is model
    with torch.backends.mkldnn.flags(enabled=False):
        assert for_training(model, precision="fp32") is model
