"""Sets of pictures drawn in blocks: into a file, whoever drew them, and whatever stopped it."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import SIZE, write_model

from dit import drawing
from dit.checkpoint import load_checkpoint
from dit.generation import generate_blocks
from dit.parallel import World
from dit.setting import SampleConfig, Setting
from dit.vae import Autoencoder

WAY = Setting("s", 1.5, "heun", 3)
CONFIG = SampleConfig(10, 0, "balanced", 4, (WAY,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return load_checkpoint(folder / "ema"), Autoencoder.load(folder / "vae")


def read(file):
    with np.load(file) as content:
        return content["arr_0"], content["labels"]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 9))
def test_every_image_is_in_one_block_of_one_process(count, size, processes):
    cut = drawing.blocks(SampleConfig(count, 0, "random", size, (WAY,)))
    parts = [World(rank, processes).mine(cut) for rank in range(processes)]
    assert sorted(i for part in parts for block in part for i in block) == list(range(count))
    assert all(block.start % size == 0 and len(block) <= size for block in cut)


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_a_file_holds_what_memory_would(model, tmp_path, labels):
    config = SampleConfig(10, 0, labels, 4, (WAY,))
    images, known = generate_blocks(*model, WAY, config)
    told = drawing.draw(*model, WAY, config, tmp_path / "straight.npz")
    drawing.draw(*model, WAY, config, tmp_path / "kept.npz", keep=tmp_path / "k")
    assert (tmp_path / "straight.npz").read_bytes() == (tmp_path / "kept.npz").read_bytes()
    drawn, written = read(tmp_path / "kept.npz")
    assert np.array_equal(drawn, images) and drawn.dtype == np.uint8 and drawn.shape == (10, SIZE, SIZE, 3)
    assert known.tolist() == told.tolist() == written.tolist() and written.dtype == np.int64


def test_other_blocks_give_the_same_pictures_within_one_grey_level(model, tmp_path):
    drawing.draw(*model, WAY, CONFIG, tmp_path / "4.npz")
    whole = read(tmp_path / "4.npz")[0].astype(int)
    for size in (1, 3, 16):
        config = SampleConfig(10, 0, "balanced", size, (WAY,))
        drawing.draw(*model, WAY, config, tmp_path / f"{size}.npz")
        assert np.abs(read(tmp_path / f"{size}.npz")[0] - whole).max() <= 1


def test_an_interruption_costs_the_block_in_work(model, tmp_path):
    class Stopped(Exception):
        pass

    def stop(count):
        raise Stopped

    drawing.draw(*model, WAY, CONFIG, tmp_path / "whole.npz")
    with pytest.raises(Stopped):
        drawing.draw(*model, WAY, CONFIG, tmp_path / "a.npz", keep=tmp_path / "k", progress=stop)
    assert not (tmp_path / "a.npz").exists()
    [kept] = (tmp_path / "k").iterdir()
    stamp = kept.stat().st_mtime_ns
    drawing.draw(*model, WAY, CONFIG, tmp_path / "a.npz", keep=tmp_path / "k")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert kept.stat().st_mtime_ns == stamp and len(list((tmp_path / "k").iterdir())) == 3


def test_a_torn_block_and_one_of_another_length_are_drawn_again(model, tmp_path):
    drawing.draw(*model, WAY, CONFIG, tmp_path / "whole.npz")
    drawing.draw_blocks(*model, WAY, SampleConfig(6, 0, "balanced", 4, (WAY,)), tmp_path / "k")
    first = tmp_path / "k" / "block-00000000.safetensors"
    first.write_bytes(first.read_bytes()[:-5])
    drawing.draw(*model, WAY, CONFIG, tmp_path / "a.npz", keep=tmp_path / "k")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_processes_meet_in_one_file(model, tmp_path, monkeypatch):
    """Two processes as two threads that meet at a barrier."""
    meeting, own = threading.Barrier(2, timeout=60), threading.local()

    class Threads(World):
        def barrier(self):
            meeting.wait()

    monkeypatch.setattr(drawing, "world", lambda: own.world)
    counts, labels = {}, {}

    def work(rank):
        own.world, counts[rank] = Threads(rank, 2), []
        labels[rank] = drawing.draw(
            *model, WAY, CONFIG, tmp_path / "a.npz", keep=tmp_path / "k", progress=counts[rank].append
        )
        assert sum(counts[rank]) == drawing.share(CONFIG)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    own.world = World(0, 1)
    drawing.draw(*model, WAY, CONFIG, tmp_path / "one.npz")
    assert counts == {0: [4, 2], 1: [4]} and labels[0].tolist() == labels[1].tolist()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_a_folder_that_not_all_processes_see_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "world", lambda: World(1, 2))
    drawing.draw_blocks(*model, WAY, CONFIG, tmp_path / "k")
    with pytest.raises(
        ValueError, match="block-00000000.safetensors is missing: all processes that draw together must"
    ):
        list(drawing.kept_blocks(CONFIG, tmp_path / "k"))


def test_one_block_is_in_memory(model, tmp_path, monkeypatch):
    """Blocks that are handed on are let go of: at most the one in work and the one being written live at once."""
    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= 1

    def counted(*arguments, **options):
        block = torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8)

        class Drawn:
            def numpy(self):
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                return block.numpy().view(Counted)

        return Drawn()

    monkeypatch.setattr(drawing, "generate", counted)
    drawing.draw(*model, WAY, SampleConfig(40, 0, "balanced", 4, (WAY,)), tmp_path / "a.npz")
    assert most[0] <= 2, most


def test_what_is_told_of_pictures(model):
    told = drawing.record(*model, WAY, CONFIG, "d" * 64)
    assert (
        told["num_images"] == 10 and told["labels"] == "balanced" and told["seed"] == 0 and told["image_size"] == SIZE
    )
    assert told["evaluations"] == 6 and told["guidance"] == {"scale": 1.5, "channels": "all", "interval": (0.0, 1.0)}
    assert told["checkpoint"] == {"digest": "d" * 64, "step": 10, "weights": "ema"} and told["precision"] == "float32"
    assert told["autoencoder"] == model[1].digest and told["setting"]["sampler"] == "heun" and told["device"] == "cpu"
    assert drawing.record(*model, Setting("s", 1.0, "dopri5"), CONFIG, "")["guidance"] is None
