import pytest
import torch

from dit.adam import Adam, here


def parameters(seed=0, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws, dtype=dtype).requires_grad_() for shape in ((5, 3), (7,), ())]


def give_gradients(ours, seed, scale=1.0):
    for own, drawn in zip(ours, parameters(seed), strict=True):
        own.grad = scale * drawn.detach()


def settings(**changes):
    return {"betas": (0.8, 0.95), "weight_decay": 0.1, **changes}


def tensors(adam):
    return [*adam.parameters, *adam.first, *adam.second, adam.count]


GO, SKIP = torch.zeros(()), torch.ones(())


def test_it_is_torchs_adamw_bit_for_bit():
    ours, theirs = parameters(), parameters()
    adam = Adam(ours, **settings())
    torchs = torch.optim.AdamW(theirs, lr=0.1, fused=True, **settings())
    for step in range(4):
        give_gradients(ours, step + 1)
        give_gradients(theirs, step + 1)
        torchs.param_groups[0]["lr"] = 0.1 / (step + 1)
        adam.step(0.1 / (step + 1), GO)
        torchs.step()
    assert adam.count == 4
    for own, moment, other in zip(ours, adam.second, theirs, strict=True):
        assert torch.equal(own, other) and torch.equal(moment, torchs.state[other]["exp_avg_sq"])


@pytest.mark.parametrize("written", [False, True])
def test_a_skipped_step_changes_nothing_and_does_not_count(written, monkeypatch):
    if written:
        monkeypatch.setattr(Adam, "_fused", Adam._written)
    ours, others = parameters(), parameters()
    adam, without = Adam(ours, **settings()), Adam(others, **settings())
    for step in range(5):
        give_gradients(ours, step + 1, scale=torch.nan if step in (0, 3) else 1.0)
        give_gradients(others, step + 1)
        before = [tensor.detach().clone() for tensor in tensors(adam)]
        adam.step(0.1, SKIP if step in (0, 3) else GO)
        if step in (0, 3):
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(adam), strict=True))
        else:
            without.step(0.1, GO)
    assert all(torch.equal(a, b) for a, b in zip(tensors(adam), tensors(without), strict=True))


def test_the_formulas_are_what_the_kernel_does(monkeypatch):
    ours, others = parameters(), parameters()
    fused, written = Adam(ours, **settings()), Adam(others, **settings())
    for step in range(20):
        give_gradients(ours, step + 1, scale=10.0 ** (step % 5 - 2))
        give_gradients(others, step + 1, scale=10.0 ** (step % 5 - 2))
        fused.step(1e-2, GO)
        with monkeypatch.context() as patch:
            patch.setattr(Adam, "_fused", Adam._written)
            written.step(1e-2, GO)
    for a, b in zip(tensors(fused), tensors(written), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def test_what_is_here_is_the_tensors_own_memory():
    weight = torch.zeros(3, requires_grad=True)
    here([weight])[0].fill_(2.0)
    assert weight.tolist() == [2.0] * 3 and not here([weight])[0].requires_grad
