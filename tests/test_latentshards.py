import json
import os

import pytest
import torch

from dit import latentshards
from dit.checkpoint import load_tensors, save_tensors
from dit.latentshards import Mapped, file_layout, images_in, lying, map_file, open_shard


@pytest.fixture
def shard(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"mean": torch.randn(5, 2, 3, 3, generator=generator).half(), "label": torch.arange(5)}
    tensors |= {"wide": torch.randn(5, 3, generator=generator), "flags": torch.arange(5) % 2 == 0}
    tensors |= {"rough": torch.randn(5, 7, generator=generator).bfloat16(), "bytes": torch.arange(5).to(torch.uint8)}
    save_tensors(tmp_path / "0.safetensors", tensors)
    return tmp_path / "0.safetensors"


def test_a_mapped_file_holds_what_safetensors_reads(shard):
    shard.chmod(0o444)  # as DVC's links are
    expected, mapped = load_tensors(shard), map_file(shard)
    assert set(mapped) == set(expected) and images_in(shard) == 5
    for key, tensor in expected.items():
        assert mapped[key].dtype == tensor.dtype and torch.equal(mapped[key], tensor)


def test_writing_into_a_mapped_file_leaves_it_as_it_was(shard):
    before = shard.read_bytes()
    map_file(shard)["mean"].zero_()
    assert shard.read_bytes() == before


def test_a_mapped_file_takes_no_file_descriptor(shard):
    before = len(os.listdir("/proc/self/fd"))
    kept = [map_file(shard) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and kept


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "no header", "no json", "other dtype"])
def test_a_file_that_is_missing_or_torn_is_named(shard, damage):
    content = shard.read_bytes()
    torn = {
        "empty": b"",
        "truncated": content[:-1],
        "longer": content + b"0",
        "no header": b"\xff" * 64,
        "no json": content[:8] + b"?" + content[9:],
        "other dtype": content.replace(b'"BF16"', b'"XF16"'),
    }
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(torn[damage])
    with pytest.raises(ValueError, match=r"0\.safetensors is missing or torn \("):
        map_file(shard)


def test_a_shard_of_other_latents_is_refused(shard):
    pieces = file_layout(shard)
    assert set(open_shard(shard, pieces, 5)) == set(pieces)
    with pytest.raises(ValueError, match=r"0\.safetensors and the latents beside it do not fit together"):
        open_shard(shard, pieces, 4)
    mean = pieces["mean"]
    for other in ({"mean": mean._replace(dtype=torch.float32)}, {"mean": mean._replace(shape=(5, 3, 3, 3))}):
        with pytest.raises(ValueError, match="do not fit together"):
            open_shard(shard, pieces | other, 5)
    with pytest.raises(ValueError, match="do not fit together"):
        open_shard(shard, {"mean": mean}, 5)


def test_little_lies_in_memory_and_asks_for_no_further_shards(tmp_path):
    (tmp_path / "a").write_text(json.dumps("small"))
    assert lying([tmp_path / "a", tmp_path / "b"], [0], None) == "memory"


def test_only_so_many_files_are_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(latentshards, "MOST_OPEN", 2)
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for number, file in enumerate(files):
        save_tensors(file, {"label": torch.full((3,), number)})
    mapped = Mapped(files, torch.full((5,), 3), range(5))
    for indices in (torch.arange(15), torch.tensor([14, 0, 7])):
        assert mapped.gather(indices, ["label"], False)["label"].tolist() == (indices // 3).tolist()
        assert len(mapped._open) <= 2
