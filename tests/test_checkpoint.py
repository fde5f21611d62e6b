import json

import pytest
import torch

from dit.checkpoint import load_checkpoint, network_config, save_checkpoint
from dit.model import DiT, ModelConfig


def network():
    torch.manual_seed(0)
    made = DiT(ModelConfig("custom", 2, 16, 1, 2), input_size=4, in_channels=3, num_classes=5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval()


def test_a_checkpoint_explains_itself(tmp_path):
    ours = network()
    save_checkpoint(tmp_path, ours.state_dict(), {"model": network_config(ours), "classes": list("abcde")})
    opened = load_checkpoint(tmp_path)
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 5])
    assert torch.equal(opened.model(x, t, y), ours(x, t, y))
    assert opened.config["classes"] == list("abcde") and not opened.model.training


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: config.json is missing or torn"):
        load_checkpoint(tmp_path)
    ours = network()
    save_checkpoint(tmp_path, ours.state_dict(), {"model": network_config(ours)})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is missing or torn") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other/9"}))
    with pytest.raises(ValueError, match="is of format 'other/9'"):
        load_checkpoint(tmp_path)
