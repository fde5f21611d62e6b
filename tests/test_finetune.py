import json

import pytest
import torch

from dit.checkpoint import network_config, save_checkpoint
from dit.diffusion import DiffusionConfig
from dit.finetune import adopt, begin_with, require_fit
from dit.initial import open_initial, require_latents
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.transport import TransportConfig

CLASSES = ["a", "b", "c"]


def new_network(seed=0, num_classes=3, input_size=4, condition_shape=None, **changes):
    torch.manual_seed(seed)
    told = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": False, **changes}
    made = DiT(
        ModelConfig("custom", **told),
        input_size=input_size,
        in_channels=2,
        num_classes=num_classes,
        condition_shape=condition_shape,
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def told_of(network, **more):
    return {"model": network_config(network), "classes": CLASSES[: network.num_classes], **more}


@pytest.fixture
def theirs():
    return new_network(seed=1)


def look(network, size=4):
    x = torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 2]))


def test_the_same_network_is_taken_over_whole_and_its_label_table_too(theirs):
    ours = new_network()
    [said] = adopt(ours, theirs.state_dict(), told_of(theirs))
    assert torch.equal(look(ours), look(theirs))
    assert said == "the label table is kept: as many classes, 3, taken in the weights' order (a, b, c)"
    assert adopt(new_network(), theirs.state_dict(), told_of(theirs), CLASSES) == [
        "the label table is kept: the same 3 classes"
    ]


def rows(network):
    return network.state_dict()["y_embedder.embedding_table.weight"]


def test_classes_of_the_same_name_keep_their_rows_and_others_begin_anew(theirs):
    ours = new_network()
    [said] = adopt(ours, theirs.state_dict(), told_of(theirs), ["c", "a", "b"])
    assert "brought into this order by their names" in said and torch.equal(rows(ours), rows(theirs)[[2, 0, 1, 3]])
    ours = new_network()
    drawn = rows(ours).clone()
    [said] = adopt(ours, theirs.state_dict(), told_of(theirs), ["d", "c", "e"])
    assert said == "the label table: 1 of 3 classes have a row of their name; d, e begin anew, a, b are left out"
    assert torch.equal(rows(ours)[[1, 3]], rows(theirs)[[2, 3]]) and torch.equal(rows(ours)[[0, 2]], drawn[[0, 2]])
    # Numbers are places in an order, and no names, unless both have the same.
    for before, now in ((["0", "1", "2"], CLASSES), (CLASSES, ["0", "1", "2"]), (None, CLASSES)):
        [said] = adopt(ours, theirs.state_dict(), told_of(theirs) | {"classes": before}, now)
        assert "taken in the weights' order" in said and torch.equal(rows(ours), rows(theirs))
    adopt(ours, theirs.state_dict(), told_of(theirs) | {"classes": ["2", "1", "0"]}, ["0", "1", "2"])
    assert torch.equal(rows(ours), rows(theirs)[[2, 1, 0, 3]])


def test_positions_of_another_kind_are_replaced_and_said_and_refused_where_nothing_is_trained(theirs):
    tensors = theirs.state_dict() | {"pos_embed": torch.randn_like(theirs.pos_embed)}
    ours = new_network()
    said = adopt(ours, tensors, told_of(theirs))
    assert "replaced by the computed one" in said[0] and torch.equal(look(ours), look(theirs))
    with pytest.raises(ValueError, match="0 trains nothing, and the weights' position table is none of sines"):
        adopt(ours, tensors, told_of(theirs), trained=False)
    with pytest.raises(ValueError, match="pos_embed is 7 in the weights: it is no table of positions"):
        adopt(ours, tensors | {"pos_embed": torch.zeros(7)}, told_of(theirs))
    rounded = theirs.state_dict() | {"pos_embed": theirs.pos_embed.bfloat16()}
    assert len(adopt(ours, rounded, told_of(theirs), trained=False)) == 1


def test_another_number_of_classes_begins_the_label_table_anew(theirs):
    ours = new_network(num_classes=7)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    [said] = adopt(ours, theirs.state_dict(), told_of(theirs))
    assert said == "the label table begins anew: 7 classes, not the 3 of the weights"
    for name, tensor in ours.state_dict().items():
        kept = name in ("y_embedder.embedding_table.weight", "pos_embed")
        assert torch.equal(tensor, before[name] if kept else theirs.state_dict()[name]), name


def test_another_kind_of_condition_begins_its_embedder_anew(theirs):
    ours = new_network(condition="embeddings", condition_shape=(1, 5))
    assert adopt(ours, theirs.state_dict(), told_of(theirs)) == [
        "the condition's embedder begins anew: the weights were conditioned on something else"
    ]
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)
    again = new_network(seed=2, condition="embeddings", condition_shape=(1, 5))
    assert adopt(again, ours.state_dict(), told_of(ours)) == []
    assert torch.equal(again.y_embedder.mlp[0].weight, ours.y_embedder.mlp[0].weight)


def test_another_size_of_image_has_its_own_positions(theirs):
    ours = new_network(input_size=8)
    positions = ours.pos_embed.clone()
    said = adopt(ours, theirs.state_dict(), told_of(theirs))
    assert said[0] == "the position table is computed anew: 16 tokens an image, not 4"
    assert torch.equal(ours.pos_embed, positions) and look(ours, 8).shape == (2, 2, 8, 8)


def test_outputs_for_variances_are_left_out_or_begin_at_zero(theirs):
    wide = new_network(seed=2, learn_sigma=True)
    said = adopt(wide, theirs.state_dict(), told_of(theirs))
    assert said[-1] == "the outputs for variances begin at 0: the weights have none (model.learn_sigma)"
    prediction, variance = look(wide).chunk(2, dim=1)
    torch.testing.assert_close(prediction, look(theirs))
    assert not variance.any()
    wide = new_network(seed=3, learn_sigma=True)
    narrow = new_network(seed=4)
    said = adopt(narrow, wide.state_dict(), told_of(wide))
    assert said[-1] == "the outputs for variances are left out: model.learn_sigma is false"
    torch.testing.assert_close(look(narrow), look(wide)[:, :2])


def test_half_precision_weights_are_taken_as_floats(theirs):
    ours = new_network()
    adopt(ours, {name: tensor.bfloat16() for name, tensor in theirs.state_dict().items()}, told_of(theirs))
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"hidden_size": 32},
            r"train.init_from: x_embedder.proj.weight is 16x2x2x2 in the weights, 32x2x2x2 here: set `model`",
        ),
        (
            {"depth": 3},
            r"train.init_from: the weights have no blocks.2.adaLN_modulation.1.bias: they are another network's",
        ),
        (
            {"depth": 1},
            r"train.init_from: `model` has no blocks.1.attn.qkv.weight, which the weights hold",
        ),
        ({"num_heads": 4}, r"the weights are of a network with num_heads 2, not 4: set model.num_heads to it"),
        ({"timestep_embedding": "diffusers"}, r"a network with timestep_embedding published, not diffusers"),
        ({"rotary": True}, r"a network with rotary False, not True: set model.rotary to it"),
        ({"patch_size": 4}, r"is .* in the weights, .* here"),
    ],
)
def test_another_network_is_refused_by_name_and_changes_nothing(theirs, change, message):
    ours = new_network(**change)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        adopt(ours, theirs.state_dict(), told_of(theirs))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_weights_whose_config_says_little_are_taken_by_their_shapes(theirs):
    ours = new_network()
    model = {"input_size": 4, "in_channels": 2, "num_classes": 3}  # as of an earlier version, without the new fields
    adopt(ours, theirs.state_dict(), {"model": model, "classes": None})
    assert torch.equal(look(ours), look(theirs))


def unfetched(name, which):
    raise AssertionError("nothing is to be fetched")


def test_a_folder_is_opened_and_told(tmp_path, theirs):
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "other", theirs.state_dict(), told_of(theirs, license="CC-BY-NC-4.0"))
    initial = open_initial("other", unfetched, tmp_path)
    told = initial.told()
    assert told["from"] == "other" and told["license"] == "CC-BY-NC-4.0" and len(told["digest"]) == 64
    again = open_initial(str(tmp_path / "other"), unfetched)
    assert again.digest == initial.digest
    theirs.pos_embed += 1
    save_checkpoint(tmp_path / "other", theirs.state_dict(), told_of(theirs))
    assert open_initial("other", unfetched, tmp_path).digest != initial.digest


def test_a_registered_model_is_fetched_by_alias_or_number(tmp_path, theirs):
    save_checkpoint(tmp_path, theirs.state_dict(), told_of(theirs))
    asked = []

    def download(name, which):
        asked.append((name, which))
        return tmp_path

    for spec in ("models:/dit-digits@champion", "models:/dit-digits/12"):
        assert open_initial(spec, download).told()["from"] == spec
    assert asked == [("dit-digits", "champion"), ("dit-digits", 12)]


@pytest.mark.parametrize(
    "spec,message",
    [
        ("nowhere", "train.init_from: 'nowhere' is no folder with model.safetensors and config.json"),
        ("models:/x", "train.init_from: 'models:/x' is neither models:/NAME@ALIAS nor models:/NAME/VERSION"),
        ("models:/x/y", "train.init_from: 'models:/x/y' is neither"),
        ("torn", "train.init_from: .*torn is not a checkpoint: config.json is missing or torn"),
        ("foreign", "train.init_from: .*config.json is of format 'other/1'"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, spec, message):
    for name, text in (("torn", "{"), ("foreign", json.dumps({"format": "other/1"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_initial(spec, unfetched, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "odd,message",
    [
        ({"latents": "x"}, "latents must be settings, got 'x'"),
        ({"latents": {"std": "x"}}, "latents.std must be a list of numbers"),
        ({"latents": {"autoencoder": 3}}, "latents.autoencoder must be a digest, got 3"),
        ({"model": "x"}, "model must be settings, got 'x'"),
        ({"model": {"input_size": "x"}}, "model.input_size must be a size, got 'x'"),
        ({"model": {"name": "custom"}}, "model.patch_size must be a whole number"),
        ({"model": {"name": "DiT-S/2", "zzz": 1}}, "model.zzz is no setting of this code's"),
        ({"objective": {"name": "foo"}}, "objective.name must be one of diffusion, transport, got 'foo'"),
        (
            {"objective": {"name": "transport", "transport": {"path": "odd"}}},
            "objective.transport.path must be one of linear",
        ),
        ({"objective": {"name": "transport", "zzz": 1}}, "objective.zzz is no setting"),
        ({"objective": {"transport": {}}}, "objective is not whole"),
        ({"objective": {"name": "transport", "transport": 3}}, "objective.transport must be settings, got 3"),
        ({"model": {"name": "custom", "patch_size": "x"}}, "model is not whole, or of another kind"),
        ({"objective": ["x"]}, "objective must be settings"),
        ({"classes": 5}, "classes must be a list of names, got 5"),
        ({"classes": [1]}, "classes must be a list of names"),
        ({"license": ["MIT"]}, r"license must be a text, got \['MIT'\]"),
        ({"license": ""}, "license must be a text"),
    ],
)
def test_odd_parts_of_a_foreign_config_are_a_line(tmp_path, theirs, odd, message):
    save_checkpoint(tmp_path, theirs.state_dict(), told_of(theirs) | odd)
    with pytest.raises(ValueError, match=f"^train.init_from: .*config.json: {message}") as caught:
        open_initial(str(tmp_path), unfetched)
    assert "\n" not in str(caught.value)


def test_latents_of_another_autoencoder_are_refused_where_both_are_known(tmp_path, theirs):
    for known, ours, fits in (("a" * 64, "b" * 64, False), ("a" * 64, "a" * 64, True), (None, "b" * 64, True)):
        save_checkpoint(tmp_path, theirs.state_dict(), told_of(theirs, latents={"autoencoder": known}))
        initial = open_initial(str(tmp_path), unfetched)
        if fits:
            require_latents(initial, {"autoencoder": ours})
        else:
            with pytest.raises(ValueError, match="belong to the autoencoder aaaaaaaaaaaa, .* set vae.pretrained"):
                require_latents(initial, {"autoencoder": ours})


INDEX = {"classes": CLASSES, "normalization": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}}


@pytest.fixture
def initial(tmp_path, theirs):
    latents = {"autoencoder": None, **INDEX["normalization"]}
    save_checkpoint(tmp_path, theirs.state_dict(), told_of(theirs, latents=latents, objective={"name": "diffusion"}))
    return open_initial(str(tmp_path), unfetched)


def test_what_differs_in_the_way_of_training_is_said(initial):
    assert len(begin_with(new_network(), initial, ObjectiveConfig("diffusion"), INDEX)) == 1
    scaled = {**INDEX, "normalization": {"mean": [0.0, 0.0], "std": [2.0, 1.0]}}
    said = begin_with(new_network(), initial, ObjectiveConfig("transport"), scaled)
    assert (
        said[1].startswith("the weights learned diffusion linear epsilon") and "go on with transport linear" in said[1]
    )
    assert "scaled in another way" in said[2]


@pytest.mark.parametrize(
    "network,objective,index,message",
    [
        (
            {},
            ObjectiveConfig("transport"),
            {},
            "the weights learned diffusion, not transport: set objective.name to diffusion",
        ),
        (
            {},
            ObjectiveConfig("diffusion", DiffusionConfig(prediction="v")),
            {},
            "the weights learned epsilon, not v: set objective.diffusion.prediction to epsilon",
        ),
        ({}, None, {"normalization": {"mean": [0.0, 0.0], "std": [2.0, 1.0]}}, ".* set encode.normalization"),
        (
            {},
            None,
            {"classes": ["a", "b", "d"]},
            "the weights do not know the classes d, but a, b, c: name data.source",
        ),
        ({"num_classes": 7}, None, {}, "the label table begins anew: 7 classes, not the 3 .* set data.source"),
        (
            {"condition": "embeddings", "condition_shape": (1, 5)},
            None,
            {},
            "the weights are conditioned on something else: set model.condition to classes",
        ),
        ({"learn_sigma": True}, None, {}, "the weights have no outputs for variances: set model.learn_sigma to false"),
    ],
)
def test_where_nothing_is_trained_nothing_may_begin_anew(initial, network, objective, index, message):
    ours, objective = new_network(**network), objective or ObjectiveConfig("diffusion")
    with pytest.raises(ValueError, match=f"^train.max_steps: 0 trains nothing, and {message}") as caught:
        begin_with(ours, initial, objective, INDEX | index, trained=False)
    assert "\n" not in str(caught.value)
    begin_with(ours, initial, objective, INDEX | index)  # what is trained may


def test_rounding_and_settings_of_the_loss_alone_do_not_hinder_passing_on(initial):
    index = {**INDEX, "normalization": {"mean": [1e-9, 0.0], "std": [1.00001, 1.0]}}
    objective = ObjectiveConfig("diffusion", DiffusionConfig(loss="rescaled_mse"), TransportConfig(path="vp"))
    assert len(begin_with(new_network(), initial, objective, index, trained=False)) == 1


def test_whether_a_folder_fits_is_known_without_reading_its_numbers(tmp_path, initial, theirs):
    small = ModelConfig("custom", 2, 16, 2, 2, learn_sigma=False)
    here = {"input_size": 8, "in_channels": 2, "trained": True}
    diffusion, transport = ObjectiveConfig("diffusion"), ObjectiveConfig("transport")
    require_fit(str(tmp_path), tmp_path, small, transport, **here)
    require_fit(".", tmp_path, small, diffusion, input_size=None, in_channels=None, trained=False)
    require_fit("models:/somewhere/3", tmp_path, small, transport, **here)
    deep, embedded = (
        ModelConfig("custom", 2, 16, d, 2, learn_sigma=False, condition=c) for d, c in ((3, "none"), (2, "embeddings"))
    )
    require_fit(".", tmp_path, embedded, transport, **here)
    for model, objective, change, message in (
        (deep, transport, {}, "the weights have no blocks.2"),
        (small, transport, {"in_channels": 3}, "final_layer.linear.bias is 8 in the weights, 12 here"),
        (small, transport, {"trained": False}, "the weights learned diffusion, not transport"),
        (small, diffusion, {"trained": False, "num_classes": 99}, "the weights have [0-9]+ classes, not 99"),
    ):
        with pytest.raises(ValueError, match=message):
            require_fit(".", tmp_path, model, objective, **here | change)
    with pytest.raises(ValueError, match="train.init_from: 'models:/x' is neither"):
        require_fit("models:/x", tmp_path, small, transport, **here)
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match="model.safetensors is torn"):
        require_fit(".", tmp_path, small, transport, **here)
