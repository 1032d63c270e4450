import hashlib
import json
import math
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, IJepaConfig, IJepaModel

from ijepa import huggingface
from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.encoders import load_huggingface_encoder, load_local_encoder, resize_and_normalize
from ijepa.errors import UserError
from ijepa.huggingface import export_huggingface
from ijepa.model import VisionTransformer, ViTConfig

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_model(folder, processor=PROCESSOR, **sizes):
    torch.manual_seed(0)
    config = IJepaConfig(**{**SIZES, **sizes})
    IJepaModel(config, add_pooling_layer=False).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor)
    return folder


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def make_images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes
    ]


MIXED = make_images((16, 16), (32, 32), (40, 23), (16, 16), (1, 1), (10, 3), (3, 10))


def load(folder, dtype=torch.float32):
    return load_huggingface_encoder(str(folder), CPU, dtype, offline=True)


def failure(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    error = caught.value
    assert str(folder) in error.problem
    assert error.hint
    assert "\n" not in error.problem
    return error.problem


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    write_json(path, content)


def mean_of_tokens(folder, images):
    """What a user of transformers would write by hand."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = IJepaModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    rows = []
    for image in images:
        inputs = processor(
            images=Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt"
        )
        with torch.no_grad():
            rows.append(model(**inputs).last_hidden_state[0].mean(dim=0))
    return torch.stack(rows)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_embeddings_equal_the_mean_token_of_transformers_on_the_processors_pixels(folder):
    found = load(folder).embed(MIXED)
    assert found.dtype == torch.float32
    assert relative_error(found, mean_of_tokens(folder, MIXED)) < 1e-4


BICUBIC_224 = {
    **PROCESSOR,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def test_size_resampling_mean_and_std_are_those_of_the_models_own_processor(tmp_path):
    folder = write_model(tmp_path / "m", BICUBIC_224, image_size=224, patch_size=56)
    encoder = load(folder)
    pixels = encoder.preprocess(MIXED)
    assert pixels.shape == (len(MIXED), 3, 224, 224)
    for row, image in zip(pixels, MIXED, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = np.asarray(pillow.resize((224, 224), Image.Resampling.BICUBIC)) / 255
        expected = (resized - BICUBIC_224["image_mean"]) / BICUBIC_224["image_std"]
        # Pillow and torchvision round differently: most pixels alike, two grey levels at most.
        difference = np.abs(row.permute(1, 2, 0).numpy() - expected) * 255 * 0.229
        assert difference.max() < 2.3
        assert difference.mean() < 0.1
    assert relative_error(encoder.embed(MIXED), mean_of_tokens(folder, MIXED)) < 1e-4
    assert encoder.description["resize"] == "bicubic, antialiased"
    assert encoder.description["mean"] == BICUBIC_224["image_mean"]
    assert encoder.description["std"] == BICUBIC_224["image_std"]
    assert encoder.description["input_size"] == 224


@pytest.mark.slow
def test_a_vit_base_equals_transformers(tmp_path):
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    folder = write_model(
        tmp_path, BICUBIC_224, **sizes, intermediate_size=3072, image_size=224, patch_size=16
    )
    found = load(folder).embed(MIXED)
    assert found.shape == (len(MIXED), 768)
    assert relative_error(found, mean_of_tokens(folder, MIXED)) < 1e-4


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "ViTImageProcessorFast"])
def test_both_kinds_of_processor_are_read(folder, kind):
    expected = load(folder).embed(MIXED)
    change_json(folder / "preprocessor_config.json", image_processor_type=kind)
    assert torch.equal(load(folder).embed(MIXED), expected)


def test_a_processor_of_the_time_of_the_first_release_is_read(folder):
    path = folder / "preprocessor_config.json"
    expected = load(folder).embed(MIXED)
    change_json(path, feature_extractor_type="ViTFeatureExtractor", do_convert_rgb=None)
    assert torch.equal(load(folder).embed(MIXED), expected)


def test_a_processor_that_resizes_the_short_side_and_crops_is_honoured(folder):
    path = folder / "preprocessor_config.json"
    change_json(
        path,
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        do_center_crop=True,
    )
    assert relative_error(load(folder).embed(MIXED[:3]), mean_of_tokens(folder, MIXED[:3])) < 1e-4


def test_the_description_says_what_defines_the_embeddings(folder):
    description = load(folder, torch.bfloat16).description
    digest = description.pop("sha256")
    assert len(digest) == 64
    with safe_open(folder / "model.safetensors", "pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert description == {
        "source": str(folder),
        "revision": None,
        "parameters": numbers,
        "input_size": 16,
        "resize": "bilinear, antialiased",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "pooling": "mean over patch tokens",
        "dtype": "bfloat16",
    }
    json.dumps(description)


def test_the_fingerprint_changes_with_weights_configuration_and_processor(folder):
    digests = {load(folder).description["sha256"]}
    change_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    digests.add(load(folder).description["sha256"])
    change_json(folder / "config.json", layer_norm_eps=1e-5)
    digests.add(load(folder).description["sha256"])
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digests.add(load(folder).description["sha256"])
    assert len(digests) == 4


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_embeddings_depend_on_no_other_image_and_move_with_their_rows(folder, dtype, atol):
    encoder = load(folder, dtype)
    together = encoder.embed(MIXED)
    alone = torch.cat([encoder.embed([image]) for image in MIXED])
    torch.testing.assert_close(together, alone, atol=atol, rtol=0)
    backwards = encoder.embed(MIXED[::-1]).flip(0)
    torch.testing.assert_close(together, backwards, atol=atol, rtol=0)


def test_weights_are_held_in_the_number_format_asked_for(folder):
    encoder = load(folder, torch.bfloat16)
    _, model = encoder.load()
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    exact = load(folder).embed(MIXED)
    assert 0 < relative_error(encoder.embed(MIXED), exact) < 0.02


def test_a_model_in_several_files_equals_the_same_in_one(folder, tmp_path):
    expected = load(folder).embed(MIXED)
    several = tmp_path / "several"
    IJepaModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(
        several, max_shard_size="10KB"
    )
    shutil.copy(folder / "preprocessor_config.json", several)
    parts = sorted(several.glob("*.safetensors"))
    assert len(parts) > 2
    assert torch.equal(load(several).embed(MIXED), expected)
    parts[1].unlink()
    failure(several)


def test_a_model_without_configuration_is_named(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in failure(folder)


def test_a_model_without_processor_is_named(folder):
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in failure(folder)


def test_a_model_without_safetensors_is_named_and_pickled_weights_stay_unread(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in failure(folder)


def test_safetensors_of_another_name_are_a_user_error(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    failure(folder)


@pytest.mark.parametrize("kind", ["bert", "vit", None, 3, ["ijepa"]])
def test_another_kind_of_model_is_named(folder, kind):
    change_json(folder / "config.json", model_type=kind)
    problem = failure(folder)
    assert "not an I-JEPA" in problem
    assert str(kind or "nameless") in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_that_cannot_be_read_is_a_user_error(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    failure(folder)


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("value", ["24", -1, 0, 10**9, 2**40, None, 1.5, [], {}, True])
def test_a_size_that_no_network_has_is_a_user_error(folder, name, value):
    if (name, value) == ("patch_size", True):
        pytest.skip("one number")
    change_json(folder / "config.json", **{name: value})
    failure(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 48},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 5},
        {"intermediate_size": 24},
        {"image_size": 32},
        {"image_size": 65536, "patch_size": 1},
        {"image_size": [16, 16, 16]},
        {"num_channels": 2**40},
        {"patch_size": 8},
        {"patch_size": 5},
        {"num_channels": 4},
        {"qkv_bias": "no"},
        {"hidden_act": "nothing"},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": "small"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": 3},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_weights_is_a_user_error(folder, changes):
    change_json(folder / "config.json", **changes)
    failure(folder)


NAME = "encoder.layer.1.intermediate.dense.weight"


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the tensor 'layers.1.mlp.fc1.weight'" in failure(folder)


def test_a_misshapen_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME] = tensors[NAME][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problem = failure(folder)
    assert "tensor 'layers.1.mlp.fc1.weight' has shape (47, 24), expected (48, 24)" in problem


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "tensor 'layernorm.bias' has NaN or infinite values" in failure(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"transformers_weights": "other.safetensors"},
        {"attribute_map": {"hidden_size": "foo"}, "foo": 10**9},
        {"tie_word_embeddings": True, "is_decoder": True, "output_attentions": True},
        {"dtype": "float99"},
    ],
    ids=str,
)
def test_settings_that_are_not_ours_to_follow_change_nothing(folder, settings):
    expected = load(folder).embed(MIXED)
    tensors = load_file(folder / "model.safetensors")
    others = {name: value + 1 for name, value in tensors.items()}
    save_file(others, folder / "other.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", **settings)
    assert torch.equal(load(folder).embed(MIXED), expected)


def test_an_index_leads_to_no_weights_outside_the_directory(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    save_file({"a": torch.zeros(10_000)}, folder / "unused.safetensors")
    for part in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), ["a"]):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, part)}
        write_json(folder / "model.safetensors.index.json", index)
        assert "names weights that are not in" in failure(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors", "other.json"]
)
def test_a_pipe_or_a_link_to_a_device_is_never_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    failure(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    failure(folder)


def test_an_enormous_configuration_is_not_read(folder):
    with (folder / "preprocessor_config.json").open("r+b") as file:
        file.truncate(10**10)  # sparse
    assert "no ordinary file" in failure(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 3000, -1])
def test_truncated_weights_are_a_user_error(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    failure(folder)


def test_random_bytes_for_weights_are_a_user_error(folder):
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(5000))
    failure(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": 16, "width": 8}},
        {"size": {"height": -16, "width": -16}},
        {"size": {"height": 0, "width": 0}},
        {"size": {"height": "16", "width": "16"}},
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"height": 2**70, "width": 2**70}},
        {"size": {"shortest_edge": 10**6}},
        {"size": "large"},
        {"size": -3},
        {"size": None},
        {"size": {"depth": 3}},
        {"do_resize": False},
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
        {"do_center_crop": True, "crop_size": {"height": 10**6, "width": 10**6}},
        {"do_pad": True, "pad_size": {"height": 10**6, "width": 10**6}},
        {"resample": 99},
        {"resample": "soft"},
        {"image_mean": ["a", "b", "c"]},
        {"image_mean": "mean"},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": [0.5] * 4},
        {"image_mean": None},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0.0, 0.0, 0.0]},
        {"image_std": [1e-60, 1.0, 1.0]},
        {"image_std": [-float("inf")] * 3, "image_mean": [float("inf")] * 3},
        {"rescale_factor": "1/255"},
        {"rescale_factor": 0},
        {"rescale_factor": float("nan")},
        {"image_processor_type": "NoSuchProcessor"},
        {"image_processor_type": "AutoModel"},
        {"image_processor_type": "BertTokenizer"},
        {"image_processor_type": 3},
        {"image_processor_type": "VideoMAEImageProcessor"},
    ],
    ids=str,
)
def test_a_processor_that_makes_no_sense_is_a_user_error(folder, changes):
    change_json(folder / "preprocessor_config.json", **changes)
    failure(folder)


TRAP = "from pathlib import Path\n\nPath({marker!r}).touch()\n\n\nclass Trap:\n    pass\n"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["known class", "class only in the code"])
def test_code_of_a_repository_is_never_run_or_asked_about(folder, tmp_path, name, known):
    marker = tmp_path / "ran"
    (folder / "trap.py").write_text(TRAP.format(marker=str(marker)))
    change_json(
        folder / name,
        auto_map=dict.fromkeys(["AutoConfig", "AutoModel", "AutoImageProcessor"], "trap.Trap"),
    )
    if not known:
        change_json(folder / "preprocessor_config.json", image_processor_type="Trap")
        failure(folder)
    else:
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_kernel_named_by_a_repository_is_not_fetched(folder, key):
    expected = load(folder).embed(MIXED)
    change_json(folder / "config.json", **{key: "someone/their-kernel"})
    assert torch.equal(load(folder).embed(MIXED), expected)


def test_loading_writes_nothing_to_the_terminal(folder, capfd):
    change_json(folder / "config.json", unknown_field=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(3, 24)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, torch.bfloat16).embed(MIXED)
    assert capfd.readouterr() == ("", "")
    IJepaModel.from_pretrained(folder)
    assert capfd.readouterr().err  # transformers itself is not so quiet


def test_loading_leaves_the_verbosity_of_transformers_as_it_was(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_out_of_memory_while_loading_is_not_called_a_damaged_file(folder, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(IJepaModel, "from_pretrained", exhausted)
    assert failure(folder).startswith("out of memory")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = ViTConfig(image_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3)
    torch.manual_seed(1)
    networks = {"target": VisionTransformer(config), "context": VisionTransformer(config)}
    path = folder / "checkpoint.pt"
    save_checkpoint(path, config, networks, (0.45, 0.25), {"epochs": 1, "planned_epochs": 1})
    for weights in networks:
        export_huggingface(load_checkpoint(path, weights), folder / weights)
    return folder


@pytest.mark.parametrize("weights", ["target", "context"])
def test_an_exported_model_loads_in_one_line_in_float32_and_embeds_alike(exported, weights):
    model = IJepaModel.from_pretrained(exported / weights, add_pooling_layer=False)
    assert model.dtype == torch.float32
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    images = make_images((32, 32), (32, 32), (50, 20), (8, 8))
    local = load_local_encoder(exported / "checkpoint.pt", weights, CPU, torch.float32)
    pixels = AutoImageProcessor.from_pretrained(exported / weights)(
        images=images, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(**pixels).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(theirs, local.embed(images), atol=1e-5, rtol=0)
    ours = load(exported / weights)
    torch.testing.assert_close(ours.embed(images), local.embed(images), atol=1e-5, rtol=0)
    assert ours.description["parameters"] == local.description["parameters"]
    assert ours.description["resize"] == local.description["resize"]


def test_the_plain_line_of_the_documentation_loads_an_export_without_a_missing_encoder_tensor(
    exported,
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = IJepaModel.from_pretrained(exported / "target", output_loading_info=True)
    assert all(name.startswith("pooler") for name in report["missing_keys"])
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (64, 64), (33, 31), (100, 20), (224, 224)])
def test_the_exported_processor_makes_our_pixels(exported, size):
    images = make_images(size)
    processor = AutoImageProcessor.from_pretrained(exported / "target")
    expected = resize_and_normalize(images, 32, (0.45,) * 3, (0.25,) * 3)
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_export_has_the_names_of_the_files_that_transformers_writes(exported, tmp_path):
    IJepaModel.from_pretrained(exported / "target", add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    theirs = load_file(tmp_path / "model.safetensors")
    ours = load_file(exported / "target" / "model.safetensors")
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


def test_an_export_keeps_the_precision_and_size_of_the_checkpoint(exported):
    tensors = load_file(exported / "target" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    names = sorted(path.name for path in (exported / "target").iterdir())
    assert names == ["SHA256SUMS", "config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_no_flipped_bit_of_an_export_is_read(exported, tmp_path, name):
    folder = shutil.copytree(exported / "context", tmp_path / "hf")
    load(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert "does not have its sum" in failure(folder)
    (folder / name).unlink()
    failure(folder)


def test_the_sums_of_an_export_are_those_of_sha256sum(exported):
    lines = (exported / "target" / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        digest, name = line.split("  ")
        content = (exported / "target" / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()


def load_keeping_facts(folder, kept, dtype=torch.float32):
    return load_huggingface_encoder(str(folder), CPU, dtype, offline=True, facts_folder=kept)


def test_a_model_that_was_told_of_before_is_loaded_when_it_is_needed(folder, tmp_path, monkeypatch):
    reads, read_model = [], huggingface.read_model
    monkeypatch.setattr(
        huggingface, "read_model", lambda *args: reads.append(args) or read_model(*args)
    )
    first = load_keeping_facts(folder, tmp_path / "kept")
    assert len(reads) == 1
    second = load_keeping_facts(folder, tmp_path / "kept")
    assert (second.description, second.embed_dim, second.key) == (
        first.description,
        first.embed_dim,
        first.key,
    )
    assert list(second.description) == list(first.description)
    assert len(reads) == 1
    torch.testing.assert_close(second.embed(MIXED), first.embed(MIXED), atol=0, rtol=0)
    assert len(reads) == 2


def test_facts_are_those_of_the_same_files_number_format_and_library(folder, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    load_keeping_facts(folder, kept)
    load_keeping_facts(folder, kept, torch.bfloat16)
    assert len(list(kept.iterdir())) == 2
    change_json(folder / "preprocessor_config.json", image_mean=[0.3, 0.2, 0.1])
    assert load_keeping_facts(folder, kept).description["mean"] == [0.3, 0.2, 0.1]
    monkeypatch.setattr("ijepa.encoders.version", lambda _: "0")
    load_keeping_facts(folder, kept)
    assert len(list(kept.iterdir())) == 4


def test_damaged_facts_are_found_out_again(folder, tmp_path):
    expected = load_keeping_facts(folder, tmp_path / "kept").description
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"24", b"25"))
    assert file.read_bytes() != whole
    assert load_keeping_facts(folder, tmp_path / "kept").description == expected
    assert file.read_bytes() == whole


def test_a_model_that_is_damaged_after_it_was_told_of_is_refused_before_its_first_image(
    exported, tmp_path
):
    folder = shutil.copytree(exported / "context", tmp_path / "hf")
    load_keeping_facts(folder, tmp_path / "kept")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not have its sum"):
        load_keeping_facts(folder, tmp_path / "kept")
