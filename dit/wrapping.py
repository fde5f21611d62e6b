"""How several processes train one network: each holds all of it and they average gradients (DDP), or each holds a part
of every tensor and fetches the rest while it is needed (FSDP2).

Either way a process computes the losses of its part of the global batch, and what is averaged is the gradient of
`size` x its sum / the global batch: the gradient of the mean loss of all.
"""

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.acceleration import for_training
from dit.cost import macs
from dit.estimate import Parallel, parallel_kind, training_memory
from dit.model import DiT
from dit.objective import ObjectiveConfig, loss_of
from dit.parallel import World, device_group
from dit.runtime import RunConfig, memory_bytes
from dit.training import TrainConfig


class Losses(nn.Module):
    """The loss (n,) of each image, as one module of all that learns: what is wrapped.

    `network` holds the parameters; `predict(x, t, y, tap=...)` is how it is asked.
    """

    def __init__(self, network: DiT, projector: nn.Module | None, objective: ObjectiveConfig):
        super().__init__()
        self.network, self.projector, self.objective = network, projector, objective
        self.predict: Callable[..., Any] = network.__call__

    def forward(self, features: Tensor | None = None, **inputs: Tensor) -> Tensor:
        projector = None if features is None else self.projector
        return loss_of(self.predict, self.objective, features=features, projector=projector, **inputs)


class Wrapped:
    """A network and its projector, of which `losses` are asked part by part, and whose gradients are everyone's.

    Made before anything else holds the parameters: `fsdp` exchanges them for sharded ones.
    """

    def __init__(
        self,
        network: DiT,
        projector: nn.Module | None,
        objective: ObjectiveConfig,
        train: TrainConfig,
        run: RunConfig,
        world: World,
        *,
        steps_done: int = 0,
    ):
        device, self.size = network.pos_embed.device, world.size
        self.kind = kind(network, train, run, world, memory_bytes(device))
        self.whole, self._ddp = Losses(network, projector, objective), {}
        if self.kind != "alone":
            device_group(device)
        if run.activation_checkpointing:
            _recompute(network)
        if self.kind == "fsdp":
            _shard(self.whole, train.precision, device)
        if not (run.activation_checkpointing and device.type == "cpu"):  # what is faster there has no blocks
            ahead = 6 * _macs(network) * (train.max_steps - steps_done) * train.global_batch_size / world.size
            # The choice would hang on how much is left: a training that goes on late would round otherwise.
            chosen = "off" if run.deterministic and run.compile == "auto" else run.compile
            settings = {"precision": train.precision, "compile": chosen, "work_ahead_flops": ahead}
            predict = for_training(network, **settings)
            self.whole.predict = predict.__call__  # no module of its own: its parameters are the network's

    def losses(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss (n,) of each image of this part; `features` among the inputs only while tokens are aligned."""
        return self._module("features" in inputs)(**inputs)

    def exchanging(self, last: bool, aligned: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of a part: gradients are averaged with the step's `last` part alone.

        Sharded ones are averaged with each part: what is gathered in between would have to be held whole.
        """
        if last or self.kind != "ddp":
            return contextlib.nullcontext()
        return self._module(aligned).no_sync()

    def _module(self, aligned: bool) -> nn.Module:
        if self.kind != "ddp":
            return self.whole
        if aligned not in self._ddp:
            # DDP waits for the gradient of every parameter that it was made with: the projector's end with alignment.
            self._ddp.clear()
            gc.collect()  # the one before has hooks on the same parameters as long as it lives
            projector = self.whole.projector if aligned else None
            losses = Losses(self.whole.network, projector, self.whole.objective)
            losses.predict = self.whole.predict
            ddp = nn.parallel.DistributedDataParallel
            fixed = [name for name, _ in losses.named_buffers()]  # tables: the same everywhere, nothing to exchange
            ddp._set_params_and_buffers_to_ignore_for_model(losses, fixed)
            self._ddp[aligned] = ddp(losses, gradient_as_bucket_view=True)
        return self._ddp[aligned]


def kind(network: DiT, train: TrainConfig, run: RunConfig, world: World, memory: float | None) -> Parallel:
    """What `run.parallel` means here; `memory` is a device's in bytes, None where it is not known."""
    share = train.global_batch_size // world.size
    held = {"batch_size": min(run.device_batch_size or share, share), "averages": 1 + len(train.power_ema)}
    held |= {"num_classes": network.num_classes, "precision": train.precision, **_shape(network)}
    return parallel_kind(run.parallel, world.size, memory, lambda: training_memory(network.config, **held))


def _shard(losses: Losses, precision: str, device: torch.device) -> None:
    """Exchange every parameter for this process's part of it: one group for each block, and one for all the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in losses.network.blocks:
        # Autocast takes a linear layer's weights to bf16 in any case; it leaves a norm's, and the embedders', in fp32.
        linear = all(
            isinstance(part, nn.Linear) for part in block.modules() if next(part.parameters(False), None) is not None
        )
        fully_shard(block, mesh=mesh, mp_policy=halved if precision == "bf16" and linear else exact)
    fully_shard(losses, mesh=mesh, mp_policy=exact)


def _recompute(network: DiT) -> None:
    """Have each block's activations computed again in the backward pass, in place of keeping them."""
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _macs(network: DiT) -> int:
    return macs(network.config, **_shape(network))


def _shape(network: DiT) -> dict[str, Any]:
    return {name: getattr(network, name) for name in ("input_size", "in_channels", "condition_shape")}
