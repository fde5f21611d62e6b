import pytest
import torch
import torch.nn.functional as F

from dit.blocks import AdaLNZeroBlock, FinalLayer
from dit.model import ModelConfig
from dit.onednn import available
from dit.written import Block, Last, attention, gelu, of_layers, patches

pytestmark = pytest.mark.skipif(not available(), reason="no oneDNN for this processor, or in this torch")
SIZES = ModelConfig("custom", patch_size=2, hidden_size=32, depth=1, num_heads=4)


def test_gelu_and_its_derivative_are_torchs():
    z = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([0.0, 100.0, -100.0])]).requires_grad_()
    expected = F.gelu(z, approximate="tanh")
    slope = torch.autograd.grad(expected.sum(), z)[0]
    value, derivative = gelu(z.detach().clone())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(derivative, slope, rtol=1e-5, atol=2e-6)


def test_patches_are_what_a_convolution_of_their_size_sees():
    x, layer = torch.randn(3, 4, 8, 8), torch.nn.Conv2d(4, 6, 2, stride=2)
    expected = layer(x).flatten(2).transpose(1, 2)
    found = patches(x, 2) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 9])  # 4: images share a sequence
@pytest.mark.parametrize("kind", ["block", "last"])
def test_gradients_by_hand_are_autograds(kind, tokens):
    torch.manual_seed(0)
    layer = AdaLNZeroBlock(SIZES) if kind == "block" else FinalLayer(SIZES, 2, 4, modulated=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, c = torch.randn(8, tokens, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    if kind == "block":
        layers = of_layers(layer.adaLN_modulation[1], layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2)
        outputs = Block.apply(x, F.silu(c), 4, *layers), layer(x, c, None)
    else:
        layers = of_layers(layer.adaLN_modulation[1], layer.linear)
        outputs = Last.apply(x, F.silu(c), *layers), layer(x, c)
    towards = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    found, expected = (torch.autograd.grad(output, (x, c, *layers), towards) for output in outputs)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest)


def test_images_that_share_a_sequence_do_not_see_each_other():
    qkv = torch.randn(8, 4, 96)
    o, _ = attention(qkv, 2)
    changed, images = qkv.clone(), [0, 1, 2, 4, 5, 6, 7]
    changed[3] = 100.0
    assert torch.equal(attention(changed, 2)[0][images], o[images])
    alone = torch.cat([attention(image, 2)[0] for image in qkv.split(1)])
    torch.testing.assert_close(o, alone, rtol=1e-5, atol=1e-6)


def test_another_derivative_is_refused():
    x, c = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 32)
    layer = FinalLayer(SIZES, 2, 4, modulated=True)
    output = Last.apply(x, c, *of_layers(layer.adaLN_modulation[1], layer.linear))
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
