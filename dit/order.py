"""Which images training sees at which position: a function of the seed, never of what was seen before.

Images lie in shards, and a stream shows them epoch after epoch, each time in a fresh order. With a window it goes
through whole shards, a few at a time, and holds the order of these alone; without one, all are shuffled together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dit.randomness import generator, permutation


@dataclass(frozen=True)
class Mix:
    """How often each class is seen: as its weight says, whatever the number of its images."""

    weights: Sequence[float]  # (K,), relative to each other
    counts: Tensor  # (S, K) int64, images of each class in each shard
    labels: Callable[[int], Tensor]  # the labels (n,) of a shard's images

    def draws(self, shards: Sequence[int], size: int, *name: int | str) -> Tensor:
        """How often each class is drawn from each of these shards, (len(shards), K): `size` draws in all.

        Both the share of a class and that of each shard in it are rounded up or down, at random places (systematic
        sampling): the expectation is exact.
        """
        upto = self.counts[list(shards)].cumsum(0)
        images = upto[-1]
        here = (images / self.counts.sum(0).clamp(min=1)).tolist()  # of each class's images, where shards are dealt out
        weights = [weight * share for weight, share in zip(self.weights, here, strict=True)]
        shares = torch.tensor(list(accumulate(weights)), dtype=torch.float64)
        chance = generator(*name)
        ends = (shares / shares[-1] * size + torch.rand((), dtype=torch.float64, generator=chance)).floor().long()
        ends[shares == shares[-1]] = size  # whatever was rounded before it
        totals = ends.diff(prepend=ends.new_zeros(1))
        begin = (torch.rand(len(images), dtype=torch.float64, generator=chance) * images).long()
        return ((totals * upto + begin) // images.clamp(min=1)).diff(dim=0, prepend=torch.zeros_like(upto[:1]))


@dataclass(frozen=True)
class Epoch:
    """One walk through the shards: those of each window, in order, and the position at which each window ends."""

    windows: list[list[int]]
    ends: Tensor
    draws: dict[int, Tensor] | None  # of each class (K,) by shard, where classes are weighted

    def span(self, window: int) -> tuple[int, int]:
        return (int(self.ends[window - 1]) if window else 0), int(self.ends[window])


class Order:
    """An endless stream of the images of some shards.

    Args:
        sizes: images in each shard; an image's index counts through all of them.
        window: images shuffled together, in whole shards (one at least); 0 = all.
        mix: how often each class is seen; None = each image once an epoch.
        shards: those that this stream is of; None = all.
        stream: tells the randomness of one stream from another's.

    Raises ValueError where `mix` leaves nothing.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        *,
        window: int = 0,
        mix: Mix | None = None,
        shards: Sequence[int] | None = None,
        stream: tuple[int | str, ...] = (),
    ):
        self.sizes = list(sizes)
        self.starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self.shards = list(range(len(sizes)) if shards is None else shards)
        self.size = sum(sizes[shard] for shard in self.shards)
        self.seed, self.window, self.mix, self.stream = seed, window, mix, stream
        if mix and not any(w and n for w, n in zip(mix.weights, mix.counts[self.shards].sum(0).tolist(), strict=True)):
            part = " of one of train.data_parts" if stream else ""
            raise ValueError(f"train.classes: no image{part} is of a class with a weight above 0: raise one")
        self._epochs: dict[int, Epoch] = {}
        self._orders: dict[tuple[int, int], Tensor] = {}

    @property
    def at_a_time(self) -> int:
        """The images, at most, of the windows that a batch reads and of the one after them."""
        largest = max(self.sizes[shard] for shard in self.shards)
        return min(self.size, 3 * max(self.window, largest)) if self.window else self.size

    def at(self, positions: Tensor) -> Tensor:
        """The images' indices at these positions (n,) of the stream, both int64."""
        result = torch.empty_like(positions)
        epochs = positions // self.size
        orders: dict[tuple[int, int], Tensor] = {}
        for epoch in epochs.unique().tolist():
            here = (epochs == epoch).nonzero().flatten()
            places = positions[here] - epoch * self.size
            plan = self._plan(epoch)
            windows = torch.searchsorted(plan.ends, places, right=True)
            for window in windows.unique().tolist():
                order = self._orders.get((epoch, window))
                orders[epoch, window] = order = self._order(epoch, plan, window) if order is None else order
                inside = windows == window
                result[here[inside]] = order[places[inside] - plan.span(window)[0]]
        self._orders = orders  # what the next positions need too, mostly
        return result

    def ahead(self, position: int) -> tuple[list[int], list[int]]:
        """The shards of the window at this position, and those of the window after it."""
        epoch, place = divmod(position, self.size)
        plan = self._plan(epoch)
        window = int(torch.searchsorted(plan.ends, place, right=True))
        following = plan.windows[window + 1] if window + 1 < len(plan.windows) else self._plan(epoch + 1).windows[0]
        return plan.windows[window], following

    def _plan(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: plan for e, plan in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = self._new_plan(epoch)
        return self._epochs[epoch]

    def _new_plan(self, epoch: int) -> Epoch:
        shards = self.shards
        if self.window:
            turn = permutation(len(shards), self.seed, "shard order", *self.stream, epoch)
            shards = [shards[place] for place in turn.tolist()]
        draws, lengths = None, {shard: self.sizes[shard] for shard in shards}
        if self.mix:
            drawn = self.mix.draws(shards, self.size, self.seed, "class shares", *self.stream, epoch)
            draws = dict(zip(shards, drawn, strict=True))
            lengths = dict(zip(shards, drawn.sum(1).tolist(), strict=True))
            shards = [shard for shard in shards if lengths[shard]]
        windows: list[list[int]] = []
        room = 0
        for shard in shards:
            room -= self.sizes[shard]
            if not windows or (self.window and room < 0):
                windows.append([])
                room = self.window - self.sizes[shard]
            windows[-1].append(shard)
        ends = torch.tensor([sum(lengths[shard] for shard in window) for window in windows]).cumsum(0)
        return Epoch(windows, ends, draws)

    def _order(self, epoch: int, plan: Epoch, window: int) -> Tensor:
        images = torch.cat([self._images(epoch, plan, shard) for shard in plan.windows[window]])
        name = (epoch, window) if self.window else (epoch,)
        return images[permutation(len(images), self.seed, "data order", *self.stream, *name)]

    def _images(self, epoch: int, plan: Epoch, shard: int) -> Tensor:
        start, size = self.starts[shard], self.sizes[shard]
        if plan.draws is None:
            return torch.arange(start, start + size)
        turn = permutation(size, self.seed, "image shares", *self.stream, epoch, shard)
        labels = self.mix.labels(shard)[turn]
        labels, by_class = labels.sort(stable=True)
        images = labels.bincount(minlength=len(self.mix.weights))
        if not torch.equal(images, self.mix.counts[shard]):
            raise ValueError("the latents are of other classes than their index.json tells: run `encode` again")
        place = torch.arange(size) - (images.cumsum(0) - images)[labels]  # within its class, at random
        draws, images = plan.draws[shard][labels], images[labels]
        return start + turn[by_class].repeat_interleave((place + 1) * draws // images - place * draws // images)


def deal(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """The shards' numbers in `parts` parts of about as many images each: the largest first, each to the smallest part.

    Raises ValueError where there are fewer shards than parts.
    """
    if parts > len(sizes):
        raise ValueError(
            f"train.data_parts: {len(sizes)} shards cannot be dealt into {parts} parts: "
            f"lower it to at most {len(sizes)}, or lower data.shard_images"
        )
    dealt: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for shard in sorted(range(len(sizes)), key=lambda shard: (-sizes[shard], shard)):
        part = min(range(parts), key=lambda part: (held[part], len(dealt[part]), part))
        dealt[part].append(shard)
        held[part] += sizes[shard]
    return [sorted(part) for part in dealt]


class Batches:
    """Global batches of `size` images: of V streams, the v-th fills the slots from v size / V on."""

    def __init__(self, streams: Sequence[Order], size: int):
        if len(streams) > size:
            raise ValueError(f"train.data_parts must not be above train.global_batch_size ({size}), got {len(streams)}")
        self.streams = streams
        self.slots = [range(v * size // len(streams), (v + 1) * size // len(streams)) for v in range(len(streams))]

    def at(self, step: int, rows: range) -> Tensor:
        """The images' indices in these rows of a step's batch, (len(rows),)."""
        result = torch.empty(len(rows), dtype=torch.int64)
        for stream, here, positions in self._shares(step, rows):
            result[here] = stream.at(positions)
        return result

    def ahead(self, step: int, rows: range) -> tuple[set[int], set[int]]:
        """The shards of the windows that these rows are of at this step, and those of the windows after them."""
        now: set[int] = set()
        following: set[int] = set()
        for stream, _, positions in self._shares(step, rows):
            for position in {int(positions.min()), int(positions.max())}:
                here, after = stream.ahead(position)
                now.update(here)
                following.update(after)
        return now, following - now

    def shards(self, rows: range) -> list[int]:
        """All shards that these rows are ever of."""
        return sorted(shard for stream, _, _ in self._shares(0, rows) for shard in stream.shards)

    def at_a_time(self, rows: range) -> int:
        """The images, at most, of the shards that these rows need at a time."""
        return sum(stream.at_a_time for stream, _, _ in self._shares(0, rows))

    def _shares(self, step: int, rows: range) -> Iterator[tuple[Order, Tensor, Tensor]]:
        """The streams that these rows are of; which of the rows are; and their positions in the stream."""
        wanted = torch.arange(rows.start, rows.stop, rows.step)
        for stream, slots in zip(self.streams, self.slots, strict=True):
            here = (wanted >= slots.start) & (wanted < slots.stop)
            if here.any():
                yield stream, here, step * len(slots) + wanted[here] - slots.start
