import io
import math
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from ijepa.checkpoint import FORMAT, NUM_HEADS, load_checkpoint, read_torch_file, save_checkpoint
from ijepa.errors import UserError
from ijepa.model import VisionTransformer, ViTConfig

TINY = ViTConfig(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0)
TRAINING = {"epochs": 7, "planned_epochs": 300, "seconds": 1.5}
DELETE = object()


def make_encoder(config=TINY, seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(config)


@cache
def own_bytes():
    encoders = {"target": make_encoder(seed=1), "context": make_encoder(seed=2)}
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    content = {
        "format": FORMAT,
        "architecture": {**sizes, "mlp_ratio": 2.0},
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        "training": dict(TRAINING),
        "weights": {name: dict(one.half().state_dict()) for name, one in encoders.items()},
    }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def own_content():
    return torch.load(io.BytesIO(own_bytes()), weights_only=True)


@cache
def reference_bytes(config):
    torch.manual_seed(3)
    encoder, target = VisionTransformer(config), VisionTransformer(config)
    optimizer = torch.optim.AdamW(encoder.parameters())
    sum(parameter.sum() for parameter in encoder.parameters()).backward()
    optimizer.step()
    with_prefix = {
        key: OrderedDict((f"module.{name}", value) for name, value in network.state_dict().items())
        for key, network in (("encoder", encoder), ("target_encoder", target))
    }
    content = {
        **with_prefix,
        "predictor": OrderedDict({"module.mask_token": torch.zeros(1, 1, 8)}),
        "opt": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 299,
        "loss": 0.25,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def reference_content(config):
    return torch.load(io.BytesIO(reference_bytes(config)), weights_only=True)


def saved(tmp_path, content, **options):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path, **options)
    return path


def failure(path, weights="target"):
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, weights)
    assert caught.value.problem
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    return caught.value


def change(content, keys, value):
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if value is DELETE:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return content


def test_a_saved_checkpoint_comes_back_with_weights_architecture_and_provenance(tmp_path):
    encoders = {"target": make_encoder(seed=1), "context": make_encoder(seed=2)}
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(path, TINY, encoders, (0.5, 0.25), TRAINING)
    for which, encoder in encoders.items():
        checkpoint = load_checkpoint(path, which)
        assert checkpoint.config == TINY
        assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.25,) * 3)
        assert (checkpoint.weights, checkpoint.epochs) == (which, 7)
        assert checkpoint.training == TRAINING
        built = checkpoint.build()
        assert not built.training
        for name, value in encoder.state_dict().items():
            assert torch.equal(built.state_dict()[name], value.half().float()), name
            assert built.state_dict()[name].dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in built.parameters())
    assert list(path.parent.iterdir()) == [path]


def test_weights_are_stored_in_float16(tmp_path):
    path = tmp_path / "checkpoint.pt"
    encoder = make_encoder()
    save_checkpoint(path, TINY, {"target": encoder}, (0.5, 0.5), TRAINING)
    stored = torch.load(path, weights_only=True)["weights"]["target"]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    numbers = sum(value.numel() for value in encoder.state_dict().values())
    assert path.stat().st_size < 2 * numbers + 200 * len(stored) + 8000


@pytest.mark.parametrize("weights", ["target", "context"])
def test_a_checkpoint_of_the_authors_gives_the_encoder_that_was_asked_for(tmp_path, weights):
    config = ViTConfig(32, 8, 192, 2, 3, 4.0)
    content = reference_content(config)
    path = saved(tmp_path, content)
    checkpoint = load_checkpoint(path, weights)
    assert checkpoint.config == config
    assert checkpoint.epochs == 299
    assert checkpoint.mean == (0.485, 0.456, 0.406)
    assert checkpoint.std == (0.229, 0.224, 0.225)
    expected = content["target_encoder" if weights == "target" else "encoder"]
    built = checkpoint.build().state_dict()
    assert built.keys() == {name.removeprefix("module.") for name in expected}
    for name, value in expected.items():
        assert torch.equal(built[name.removeprefix("module.")], value), name


def test_a_checkpoint_of_the_authors_without_prefix_or_epoch_loads(tmp_path):
    config = ViTConfig(32, 8, 192, 1, 3, 4.0)
    content = {"encoder": make_encoder(config).state_dict()}
    path = saved(tmp_path, content)
    checkpoint = load_checkpoint(path, "context")
    assert checkpoint.config == config
    assert checkpoint.epochs is None
    assert failure(path, "target").hint == "choose --local-weights context"


@pytest.mark.parametrize(
    ("width", "heads", "hidden_dim"),
    # ViT-g has the ratio 48 / 11, which no float holds exactly.
    [(192, 3, 768), (384, 6, 1536), (768, 12, 3072), (1280, 16, 5120), (1408, 16, 6144)],
)
def test_the_head_count_follows_from_the_width_and_the_hidden_width_is_exact(
    tmp_path, width, heads, hidden_dim
):
    with torch.device("meta"):
        shapes = VisionTransformer(ViTConfig(16, 8, width, 1, heads, hidden_dim / width))
    tensors = {name: torch.zeros(v.shape, dtype=torch.float16) for name, v in
               shapes.state_dict().items()}  # fmt: skip
    config = load_checkpoint(saved(tmp_path, {"target_encoder": tensors})).config
    assert config.num_heads == heads == NUM_HEADS[width]
    assert int(config.embed_dim * config.mlp_ratio) == hidden_dim
    assert tensors["blocks.0.mlp.fc1.weight"].shape == (hidden_dim, width)


def test_an_unknown_width_of_the_authors_asks_for_the_head_count_clearly(tmp_path):
    error = failure(saved(tmp_path, reference_content(TINY)))
    assert "attention heads" in error.problem
    assert "24" in error.problem
    assert "192" in error.problem


def test_a_missing_file_is_named(tmp_path):
    error = failure(tmp_path / "none.pt")
    assert "none.pt" in error.problem
    assert failure(tmp_path).problem.startswith("no checkpoint")
    failure(tmp_path / ("a" * 300))


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.pt"
    path.touch()
    assert "empty.pt" in failure(path).problem


def test_a_file_cut_anywhere_is_a_user_error(tmp_path):
    path = saved(tmp_path, own_content())
    whole = path.read_bytes()
    for length in [*range(0, 600, 61), *range(0, len(whole), len(whole) // 30)]:
        path.write_bytes(whole[:length])
        assert "checkpoint.pt" in failure(path).problem


def test_random_bytes_are_a_user_error(tmp_path):
    path = tmp_path / "noise.pt"
    generator = random.Random(0)
    for length in [1, 2, 3, 10, 100, 1000] * 15:
        path.write_bytes(generator.randbytes(length))
        assert "noise.pt" in failure(path).problem


def test_no_flipped_bit_changes_a_weight_or_a_setting_unseen(tmp_path):
    path = saved(tmp_path, own_content())
    whole, expected = path.read_bytes(), load_checkpoint(path)
    generator = random.Random(1)
    refused = 0
    # Most bytes are weights: aim half of the flips at the pickle at the start and the end.
    for trial in range(80):
        ends = [generator.randrange(3000), len(whole) - 1 - generator.randrange(3000)]
        place = [*ends, generator.randrange(len(whole))][trial % 3]
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert replace(found, state_dict={}) == replace(expected, state_dict={}), place
        for name, value in expected.state_dict.items():
            assert torch.equal(found.state_dict[name], value), place
    # The rest is padding and what zip says twice.
    assert refused > 40


def rewritten(path, change):
    """The same archive with its pickle, or the way it is stored, changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, parts)
    return path


def test_a_file_that_grows_on_reading_is_refused_before_it_does(tmp_path):
    def bomb(archive, parts):
        for name, content in parts.items():
            archive.writestr(name, content)
        largest = max(parts, key=lambda name: len(parts[name]))
        archive.writestr(largest + "0", bytes(10**8), zipfile.ZIP_DEFLATED)

    path = rewritten(saved(tmp_path, own_content()), bomb)
    assert path.stat().st_size < 10**6
    assert "compressed" in failure(path).problem


class Greedy:
    def __reduce__(self):
        return bytearray, (10**10,)


def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": Greedy()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    assert "bytearray" in failure(path).problem


def test_a_file_from_before_torch_1_6_which_has_no_checksums_is_refused(tmp_path):
    path = saved(tmp_path, own_content(), _use_new_zipfile_serialization=False)
    assert "1.6" in failure(path).hint


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_named_and_never_runs(tmp_path):
    marker = tmp_path / "ran"
    content = {**own_content(), "trap": Trap(marker)}
    path = saved(tmp_path, content)
    error = failure(path)
    assert "mkdir" in error.problem
    assert "code" in error.hint
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the trap was armed


def test_another_kind_of_file_is_a_user_error(tmp_path):
    path = tmp_path / "other"
    path.write_text("hello\n" * 100)
    failure(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")
    failure(path)


def test_a_tensor_alone_is_a_user_error(tmp_path):
    assert "Tensor" in failure(saved(tmp_path, torch.zeros(3))).problem


def test_a_state_dict_alone_is_a_user_error_that_names_the_expected_keys(tmp_path):
    error = failure(saved(tmp_path, make_encoder().state_dict()))
    assert "'target_encoder'" in error.problem


@pytest.mark.parametrize("content", [{}, [], "text", 3, None, {"format": FORMAT}, {1: 2}])
def test_plain_data_that_is_no_checkpoint_is_a_user_error(tmp_path, content):
    failure(saved(tmp_path, content))


def test_the_untouched_content_of_the_damage_tests_loads(tmp_path):
    assert load_checkpoint(saved(tmp_path, own_content())).config == TINY


@pytest.mark.parametrize(
    "key", ["architecture", "preprocessing", "training", "weights"]
)  # fmt: skip
@pytest.mark.parametrize("value", [DELETE, None, 3, "x", [], torch.zeros(2), {}, {1: 2}])
def test_a_part_that_is_missing_or_of_another_type_is_a_user_error(tmp_path, key, value):
    failure(saved(tmp_path, change(own_content(), [key], value)))


@pytest.mark.parametrize(
    "name", ["image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"]
)
@pytest.mark.parametrize(
    "value",
    [DELETE, None, "6", -1, 0, 10**9, 2**40, 2**70, math.nan, [4], True],
    ids=lambda value: "missing" if value is DELETE else None,
)
def test_a_size_that_no_network_has_is_named_quickly(tmp_path, name, value):
    path = saved(tmp_path, change(own_content(), ["architecture", name], value))
    began = time.perf_counter()
    assert name in failure(path).problem
    assert time.perf_counter() - began < 1


def test_an_unknown_size_is_a_user_error(tmp_path):
    assert "registers" in failure(
        saved(tmp_path, change(own_content(), ["architecture", "registers"], 4))
    ).problem  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("patch_size", 5), ("num_heads", 5), ("embed_dim", 26), ("depth", 3), ("depth", 1000)],
        *[("image_size", 32), ("embed_dim", 48), ("mlp_ratio", 4.0), ("embed_dim", 65536)],
        *[("mlp_ratio", 65536.0), ("image_size", 65536)],
    ],
)
def test_sizes_that_do_not_fit_the_weights_are_a_user_error(tmp_path, name, value):
    failure(saved(tmp_path, change(own_content(), ["architecture", name], value)))


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(
    "value",
    [
        *[DELETE, None, "abc", 0.5, [0.5], [0.5] * 4, ["0.5"] * 3, [math.nan] * 3],
        *[[0.5, 0.5, math.inf], [10**400] * 3, torch.ones(3), [True] * 3, {0: 1, 1: 1, 2: 1}],
    ],
)
def test_channel_statistics_that_are_no_three_numbers_are_named(tmp_path, name, value):
    error = failure(saved(tmp_path, change(own_content(), ["preprocessing", name], value)))
    assert name in error.problem


@pytest.mark.parametrize("value", [0, 0.0, -0.5])
def test_a_deviation_that_is_not_positive_is_named(tmp_path, value):
    content = change(own_content(), ["preprocessing", "std"], [0.5, 0.5, value])
    assert "std" in failure(saved(tmp_path, content)).problem


@pytest.mark.parametrize("value", [DELETE, "300", -1, 1.5, True, [3], torch.ones(())])
def test_epochs_that_are_no_count_are_named(tmp_path, value):
    content = change(own_content(), ["training", "epochs"], value)
    assert "epochs" in failure(saved(tmp_path, content)).problem
    if value is not DELETE:
        content = change(own_content(), ["training", "planned_epochs"], value)
        assert "planned_epochs" in failure(saved(tmp_path, content)).problem
        content = {**reference_content(ViTConfig(32, 8, 192, 1, 3)), "epoch": value}
        assert "epoch" in failure(saved(tmp_path, content)).problem


def test_context_weights_that_are_absent_are_named_with_those_there_are(tmp_path):
    path = saved(tmp_path, change(own_content(), ["weights", "context"], DELETE))
    error = failure(path, "context")
    assert "no context encoder" in error.problem
    assert error.hint == "choose --local-weights target"
    assert load_checkpoint(path, "target").weights == "target"


@pytest.mark.parametrize("value", [None, 3, [], torch.zeros(2), {}, {1: torch.zeros(2)}])
@pytest.mark.parametrize("kind", ["own", "reference"])
def test_weights_of_another_type_are_a_user_error(tmp_path, kind, value):
    content = (
        change(own_content(), ["weights", "target"], value)
        if kind == "own"
        else {"target_encoder": value}
    )
    failure(saved(tmp_path, content))


NAMES = [
    "patch_embed.proj.weight",
    "pos_embed",
    "blocks.0.attn.qkv.bias",
    "blocks.1.mlp.fc1.weight",
    "norm.bias",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_unknown_misshapen_or_infinite_tensor_is_named(tmp_path, name):
    def problem(value):
        return failure(saved(tmp_path, change(own_content(), ["weights", "target", name], value)))

    good = own_content()["weights"]["target"][name]
    assert f"lacks the tensor {name!r}" in problem(DELETE).problem
    assert f"tensor {name!r} has shape (5, 2)" in problem(torch.zeros(5, 2)).problem
    assert str(tuple(good.shape)) in problem(torch.zeros(5, 2)).problem
    for bad in (math.nan, math.inf):
        spoilt = good.clone()
        spoilt.view(-1)[-1] = bad
        assert f"tensor {name!r} has NaN" in problem(spoilt).problem
    extra = change(own_content(), ["weights", "target", f"{name}2"], torch.zeros(2))
    assert f"unknown tensor '{name}2'" in failure(saved(tmp_path, extra)).problem


@pytest.mark.parametrize(
    "make",
    [
        lambda good: good.tolist(),
        lambda good: str(good),
        lambda good: good.to(torch.int32),
        lambda good: good.to(torch.complex64),
        lambda good: good.to_sparse(),
        lambda good: good.to("meta"),
        lambda good: good.to(torch.float8_e4m3fn),
        lambda good: torch.zeros(1).expand(good.shape),
    ],
    ids=["list", "text", "int", "complex", "sparse", "meta", "float8", "expanded"],
)
def test_a_value_that_is_no_dense_float_tensor_is_named(tmp_path, make):
    name = "blocks.1.mlp.fc1.weight"
    content = own_content()
    content["weights"]["target"][name] = make(content["weights"]["target"][name])
    problem = failure(saved(tmp_path, content)).problem
    assert name in problem or "sparse_tensor" in problem


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", NAMES[3]])
@pytest.mark.parametrize("value", [DELETE, torch.zeros(3), torch.zeros(()), None, 3])
def test_a_damaged_checkpoint_of_the_authors_names_the_tensor(tmp_path, name, value):
    content = reference_content(ViTConfig(32, 8, 192, 2, 3))
    content = change(content, ["target_encoder", f"module.{name}"], value)
    assert name in failure(saved(tmp_path, content)).problem


def test_a_checkpoint_of_the_authors_with_patches_in_no_square_is_a_user_error(tmp_path):
    content = reference_content(ViTConfig(32, 8, 192, 1, 3))
    content["target_encoder"]["module.pos_embed"] = torch.zeros(1, 15, 192)
    assert "pos_embed" in failure(saved(tmp_path, content)).problem


def test_a_checkpoint_of_the_authors_with_patches_of_no_size_is_a_user_error(tmp_path):
    content = reference_content(ViTConfig(32, 8, 192, 1, 3))
    content["target_encoder"]["module.patch_embed.proj.weight"] = torch.zeros(192, 3, 0, 0)
    assert "size" in failure(saved(tmp_path, content)).problem


def test_a_fortran_ordered_tensor_is_as_good_as_any(tmp_path):
    content = own_content()
    weights = content["weights"]["target"]
    name = "blocks.1.mlp.fc1.weight"
    expected = weights[name].clone()
    weights[name] = weights[name].t().contiguous().t()
    built = load_checkpoint(saved(tmp_path, content)).build()
    assert torch.equal(built.state_dict()[name], expected.float())


def test_reading_leaves_what_is_not_used_on_the_disk(tmp_path):
    path = saved(tmp_path, {"used": torch.ones(2), "opt": torch.zeros(25_000_000)})

    def resident():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux to see the memory in use")
    before = resident()
    content = read_torch_file(path)
    assert content["used"].tolist() == [1, 1]
    assert resident() - before < 50e6


def test_the_config_of_a_checkpoint_rules_the_network_built(tmp_path):
    other = replace(TINY, depth=3, embed_dim=32)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, other, {"target": make_encoder(other)}, (0.5, 0.5), TRAINING)
    assert len(load_checkpoint(path).build().blocks) == 3
