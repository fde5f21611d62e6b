"""Between two rows of loss.csv a training asks nothing of the device: the whole loop is watched at what it calls."""

import contextlib

import pytest
import torch
from test_trainer import ALIGNED, DIFFUSION, TRANSPORT, embedding_network, featured, latents, new_network  # noqa: F401
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit import learner
from dit.dataset import LatentDataset
from dit.runtime import RunConfig
from dit.trainer import fit
from dit.training import TrainConfig

# What waits for an accelerator whatever the values are: a number or a copy for the host, or one of the host's.
CALLS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__contains__, Tensor.__repr__),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__, Tensor.__reduce_ex__),
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy),
}
# What has to know values to know its result or its shape, also where an operation of torch's own asks.
OPERATIONS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_static",
    "masked_select",
}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount", "histc", "argwhere"}


class Waits(Exception):
    pass


class Calls(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = [*args[1:], *kwargs.values()]
        moved = function is Tensor.to and any(isinstance(told, str) for told in to)
        if function in CALLS or moved:
            raise Waits(getattr(function, "__name__", function))
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else seconds are spent on importing a compiler that is off here

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        masks = [i for i in indices if getattr(i, "dtype", None) in (torch.bool, torch.uint8)] if indices else []
        if name in OPERATIONS or masks:
            raise Waits(name)
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched():
    with Calls(), Operations():
        yield


PLANTED = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: 1 if x.sum() > 0 else 2,
    "format": lambda x: f"{x.sum():.3f}",
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "host": lambda x: x.cpu(),
    "moved": lambda x: x.to("cpu", non_blocking=True),
    "mask": lambda x: x[x > 0],
    "where": lambda x: torch.where(x > 0),
    "put": lambda x: x.index_put((x > 0,), x.sum()),
    "same": lambda x: torch.equal(x, x),
    "selected": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "constant": lambda x: x * torch.tensor([2.0, 3.0]),
    "torch's own": lambda x: torch.nn.utils.get_total_norm([x], error_if_nonfinite=True),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_watch_sees_what_waits(what):
    PLANTED[what](torch.ones(2))
    with watched(), pytest.raises(Waits):
        PLANTED[what](torch.ones(2))


CASES = {
    "transport": (TRANSPORT, new_network, {"betas": (0.9, 0.95), "weight_decay": 0.1}, {}),
    "diffusion": (DIFFUSION, new_network, {"lr_schedule": "cosine", "ema_warmup": True}, {"device_batch_size": 3}),
    "aligned": (ALIGNED, embedding_network, {"grad_clip": 1.0, "power_ema": (0.05, 0.1)}, {"device_batch_size": 4}),
    "bf16": (TRANSPORT, new_network, {"precision": "bf16", "grad_clip": 1.0}, {}),
}


def trained(folder, case, fused=True):
    """A training of eight steps with a row after the fourth and the eighth, of whose others each is watched."""
    objective, network, changes, run = CASES[case]
    config = TrainConfig(**{"max_steps": 8, "global_batch_size": 8, "lr": 1e-2, "warmup_steps": 2, **changes})
    stack, asked, watched_steps = contextlib.ExitStack(), [], []

    def should_stop():  # asked at the end of each step, after the row if there is one
        asked.append(1)
        stack.close()
        if len(asked) in (1, 2, 5, 6):  # no row comes with the next step, nor a state with this one
            stack.enter_context(watched())
            watched_steps.append(len(asked))
        return False

    # Mapped latents: a thread of its own gathers the batches, as for any accelerator, and it may look at its indices.
    data = LatentDataset(folder, config.seed, config.global_batch_size, where="mapped")
    with stack:
        run = RunConfig(log_every_steps=4, checkpoint_every_steps=4, compile="off", **run)
        state = fit(network(), data, objective, config, run, should_stop=should_stop)
    assert state.step == 8 and watched_steps == [1, 2, 5, 6]
    return state


@pytest.mark.parametrize("case", CASES)
def test_no_step_between_two_rows_waits_for_the_device(featured, case):  # noqa: F811
    trained(featured, case)


def test_nor_where_there_is_no_fused_optimizer(featured, monkeypatch):  # noqa: F811
    from dit import adam

    monkeypatch.setattr(adam, "FUSED", ())
    trained(featured, "aligned")


def test_one_more_question_in_a_step_is_seen(featured, monkeypatch):  # noqa: F811
    class Curious(learner.Learner):
        def update(self, lr, grad_clip=0.0):
            norm, applied = super().update(lr, grad_clip)
            return norm, applied if applied.item() else applied

    monkeypatch.setattr("dit.trainer.Learner", Curious)
    with pytest.raises(Waits, match="item"):
        trained(featured, "transport")
