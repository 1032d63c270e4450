import functools
import math
import os
import pickle
import random
import zipfile
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from ijepa.checkpoint import FORMAT, load_checkpoint
from ijepa.checkpoint import save_checkpoint as save
from ijepa.errors import UserError
from ijepa.model import VisionTransformer, ViTConfig

TINY = ViTConfig(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0)
WIDE = ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
TRAINING = {"epochs": 7, "planned_epochs": 300, "seconds": 1.5}
DELETE = object()
assert_same = functools.partial(torch.testing.assert_close, atol=0, rtol=0)


def make_encoder(config=TINY, seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(config)


def own_content():
    return {
        "format": FORMAT,
        "architecture": asdict(TINY),
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        "training": dict(TRAINING),
        "weights": {
            name: dict(make_encoder(seed=seed).half().state_dict())
            for seed, name in enumerate(("target", "context"))
        },
    }


@pytest.fixture
def saved(tmp_path):
    def save_as(content, name="checkpoint.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save_as


def failure(path, weights="target", num_heads=None):
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, weights, num_heads)
    assert path.name in caught.value.problem
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    return caught.value


def changed(value, *keys):
    """Our content with another value under the keys."""
    content = inner = own_content()
    *path, last = keys
    for key in path:
        inner = inner[key]
    inner[last] = value
    if value is DELETE:
        del inner[last]
    return content


def wrapped(prefix, state_dict):
    return {f"{prefix}{name}": value for name, value in state_dict.items()}


def test_a_saved_checkpoint_comes_back_with_weights_architecture_and_provenance(tmp_path):
    encoders = {"target": make_encoder(seed=1), "context": make_encoder(seed=2)}
    path = tmp_path / "new" / "checkpoint.pt"
    save(path, TINY, encoders, (0.5, 0.25), TRAINING)
    for which, encoder in encoders.items():
        checkpoint = load_checkpoint(path, which)
        assert (checkpoint.config, checkpoint.weights) == (TINY, which)
        assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.25,) * 3)
        assert (checkpoint.epochs, checkpoint.training, checkpoint.notes) == (7, TRAINING, ())
        built = checkpoint.build()
        assert not built.training
        assert_same(built.state_dict(), encoder.half().float().state_dict())
        assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in built.parameters())
    assert list(path.parent.iterdir()) == [path]
    assert load_checkpoint(path).predictor == {}
    save(path, TINY, {**encoders, "predictor": torch.nn.Linear(2, 3)}, (0.5, 0.25), TRAINING)
    shapes = {name: value.shape for name, value in load_checkpoint(path).predictor.items()}
    assert shapes == {"weight": (3, 2), "bias": (3,)}


def test_the_terms_of_the_loss_are_named_where_the_file_has_their_settings(saved):
    three = "I-JEPA prediction + view matching (InfoNCE) + variance/covariance"
    for training, losses in (
        ({"settings": {"matching_weight": 0, "spread_weight": 0.0}}, "I-JEPA prediction"),
        ({"settings": {"matching_weight": 1.0, "spread_weight": 0.1}}, three),
        ({}, None),
    ):
        path = saved(changed({**TRAINING, **training}, "training"))
        assert load_checkpoint(path).losses == losses
    failure(saved(changed({**TRAINING, "settings": 3}, "training")))


def test_tensors_of_the_predictor_are_checked_and_hide_no_others(saved):
    content = own_content()
    content["weights"]["target"]["norm.bias"][0] = torch.nan
    content["weights"]["predictor"] = {"norm.bias": torch.zeros(16)}
    assert "'norm.bias' has NaN" in failure(saved(content)).problem
    content = own_content()
    content["weights"]["predictor"] = {"mask_token": torch.tensor([torch.inf])}
    assert "'mask_token' has NaN" in failure(saved(content)).problem


def test_a_checkpoint_of_the_authors_gives_the_encoder_that_was_asked_for(saved):
    networks = {"encoder": make_encoder(WIDE, 3), "target_encoder": make_encoder(WIDE, 4)}
    optimizer = torch.optim.AdamW(networks["encoder"].parameters()).state_dict()
    optimizer["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    content = {key: wrapped("module.", one.state_dict()) for key, one in networks.items()}
    content |= {"predictor": {"module.mask_token": torch.zeros(1, 1, 8)}, "epoch": 299}
    content |= {"opt": optimizer, "scaler": {"scale": 65536.0}, "lr": 1e-3}
    path = saved(content, "vit.pth.tar")
    for weights, name in (("target", "target_encoder"), ("context", "encoder")):
        checkpoint = load_checkpoint(path, weights)
        assert checkpoint.config == WIDE
        assert (checkpoint.epochs, checkpoint.weights) == (299, weights)
        assert (checkpoint.mean, checkpoint.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert checkpoint.losses == "I-JEPA prediction"
        assert_same(checkpoint.build().state_dict(), networks[name].state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda sd: sd,
        lambda sd: {"state_dict": wrapped("model._orig_mod.", sd)},
        lambda sd: {"model": wrapped("module.backbone.", sd), "optimizer": {"step": 3}},
        lambda sd: {"model_state_dict": wrapped("encoder.", sd), "args": {"lr": 0.1}},
        lambda sd: {"encoder": sd},
        lambda sd: {"teacher": wrapped("backbone.", sd), "student": wrapped("backbone.", {})},
        lambda sd: wrapped("_orig_mod.module.", sd),
    ],
)
def test_a_state_dict_is_found_under_any_wrapper_and_prefix(saved, make):
    state_dict = make_encoder(WIDE).state_dict()
    checkpoint = load_checkpoint(saved(make(state_dict)), num_heads=1)
    assert checkpoint.config == WIDE
    assert checkpoint.losses is None
    assert_same(checkpoint.build().state_dict(), state_dict)


def test_of_two_encoders_the_wanted_one_is_taken_whatever_the_wrapper(saved):
    teacher, student = (make_encoder(WIDE, seed).state_dict() for seed in (1, 2))
    both = wrapped("teacher.", teacher) | wrapped("student.", student)
    path = saved({"state_dict": both})
    for weights, expected in (("target", teacher), ("context", student)):
        found = load_checkpoint(path, weights)
        assert found.weights == weights
        assert_same(found.state_dict, expected)
        assert not any("encoder" in note for note in found.notes)
    only = load_checkpoint(saved({"student": student}), "target")
    assert only.weights == "context"
    assert any("no target encoder" in note and "student" in note for note in only.notes)
    error = failure(saved({"left": teacher, "right": student}))
    assert "'left.', 'right.'" in error.problem


@pytest.mark.parametrize(
    ("width", "heads", "hidden_dim"),
    # ViT-g has the ratio 48 / 11, which no float holds exactly.
    [(192, 3, 768), (384, 6, 1536), (96, 3, 384), (1280, 16, 5120), (1408, 16, 6144)],
)
def test_heads_that_a_file_does_not_record_are_assumed_and_noted(saved, width, heads, hidden_dim):
    with torch.device("meta"):
        shapes = VisionTransformer(ViTConfig(16, 8, width, 1, heads, hidden_dim / width))
    tensors = {name: torch.zeros(value.shape).half() for name, value in shapes.state_dict().items()}
    path = saved({"target_encoder": tensors}, "vit.pth")
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.num_heads == heads
    assert int(checkpoint.config.embed_dim * checkpoint.config.mlp_ratio) == hidden_dim
    (note,) = [note for note in checkpoint.notes if "heads" in note]
    assumed = f"assumed {heads} ({width // heads} channels each); --local-num-heads"
    assert f"vit.pth does not record its attention heads: {assumed}" in note
    given = load_checkpoint(path, num_heads=2 * heads)
    assert given.config.num_heads == 2 * heads
    assert not any("heads" in note for note in given.notes)


def test_heads_that_cannot_be_assumed_or_contradict_the_file_are_an_error(saved):
    path = saved(make_encoder().state_dict())
    assert "--local-num-heads" in failure(path).problem
    assert load_checkpoint(path, num_heads=2).config == TINY
    assert "multiple" in failure(path, num_heads=5).problem
    path = saved(own_content())
    assert load_checkpoint(path, num_heads=2).config.num_heads == 2
    assert "2 attention heads, not 4" in failure(path, num_heads=4).problem


def test_a_safetensors_file_is_read(tmp_path):
    state_dict, path = make_encoder(WIDE).state_dict(), tmp_path / "weights.safetensors"
    save_file(wrapped("encoder.", state_dict), path)
    assert_same(load_checkpoint(path).build().state_dict(), state_dict)
    path.write_bytes(path.read_bytes()[:-5])
    failure(path)


def test_files_that_are_missing_cut_flipped_or_of_another_kind_or_model_are_named(saved, tmp_path):
    failure(tmp_path / "none.pt")
    failure(tmp_path)
    tensors = {f"layer{row}.0.conv1.weight": torch.zeros(2) for row in range(9)}
    error = failure(saved({"state_dict": tensors}))
    assert "it has 9 tensors: 'state_dict.layer0.0.conv1.weight'" in error.problem
    assert "patch_embed.proj.weight" in error.hint
    for content in ({}, "text", {"format": FORMAT}, {1: 2}, torch.zeros(3)):
        failure(saved(content))
    videos = make_encoder(WIDE).state_dict()
    videos["patch_embed.proj.weight"] = torch.zeros(64, 3, 2, 4, 4)
    assert "has shape (64, 3, 2, 4, 4): it is of no encoder" in failure(saved(videos)).problem
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12")
    assert "git lfs pull" in failure(tmp_path / "lfs.pt").hint
    # Before PyTorch 1.6 a file had no checksums.
    path = saved(own_content(), _use_new_zipfile_serialization=False)
    assert "1.6" in failure(path).hint
    content = own_content()
    path, weight = saved(content), content["weights"]["target"]["patch_embed.proj.weight"]
    whole = path.read_bytes()
    at = whole.index(weight.numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    cut = [whole[:length] for length in range(0, len(whole), len(whole) // 12)]
    for content in (*cut, flipped, b"hello\n" * 100, random.Random(0).randbytes(1000)):
        path.write_bytes(content)
        failure(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")
    failure(path)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_named_and_never_runs(saved, tmp_path):
    marker = tmp_path / "ran"
    error = failure(saved({**own_content(), "trap": Trap(marker)}))
    assert "mkdir" in error.problem
    assert "state_dict" in error.hint
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the trap was armed


def test_a_part_or_an_encoder_that_is_missing_or_of_another_type_is_a_user_error(saved):
    for key in ("architecture", "preprocessing", "training", "weights"):
        for value in (DELETE, None, {1: 2}):
            failure(saved(changed(value, key)))
    path = saved(changed(DELETE, "weights", "context"))
    problem = failure(path, "context").problem
    assert "no context encoder, choose another with --local-weights" in problem
    assert load_checkpoint(path, "target").weights == "target"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "norm.bias"])
def test_a_missing_unknown_misshapen_or_infinite_tensor_is_named(saved, name):
    good = own_content()["weights"]["target"][name]
    bad = [DELETE, good.tolist(), good.to(torch.int32), good.to("meta"), good.to_sparse()]
    nan, inf = good.clone(), good.clone()
    nan.view(-1)[-1], inf.view(-1)[-1] = math.nan, math.inf
    for value, other, words in (
        *((value, "", name) for value in bad),
        *((value, "", f"{name!r} has NaN") for value in (nan, inf)),
        (torch.zeros(5, 2), "", ""),
        (torch.zeros(2), "2", f'"{name}2"'),
    ):
        path = saved(changed(value, "weights", "target", name + other))
        assert words in failure(path).problem
