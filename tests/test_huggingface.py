import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, IJepaConfig, IJepaModel

from ijepa.encoders import load_encoder
from ijepa.errors import UserError
from ijepa.huggingface import FAMILIES, stored_parameters

CPU = torch.device("cpu")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = SIZES | {"intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 4}
RATIO = SIZES | IMAGE | {"mlp_ratio": 2}
SIZES = TOWER | IMAGE
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
DECODER |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
TEXT = TOWER | {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
REGISTERS = {"num_register_tokens": 3}
TWO_TOWERS = {"vision_config": SIZES, "text_config": TEXT}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2}
PROCESSOR |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
PROCESSOR |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
PROCESSOR |= {"size": {"height": 16, "width": 16}}
CROP = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3}
CROP |= {"size": {"shortest_edge": 20}, "crop_size": PROCESSOR["size"]}
# Kind: class with a head or a second tower, its configuration, and what its processor changes.
MODELS = {
    "ijepa": ("IJepaForImageClassification", SIZES, {}),
    "vit": ("ViTForImageClassification", SIZES, {}),
    "vit_mae": ("ViTMAEForPreTraining", {**SIZES, **DECODER}, {}),
    "vit_msn": ("ViTMSNForImageClassification", SIZES, {}),
    # Trained at another size than the processor makes, as the released ones.
    "dinov2": ("Dinov2ForImageClassification", {**RATIO, "image_size": 32}, CROP),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", RATIO | REGISTERS, {}),
    "dinov3_vit": ("DINOv3ViTModel", SIZES | REGISTERS, {}),
    "beit": ("BeitForImageClassification", SIZES, {}),
    "data2vec-vision": ("Data2VecVisionForImageClassification", SIZES, {}),
    "clip": ("CLIPModel", TWO_TOWERS, CROP),
    "clip_vision_model": ("CLIPVisionModel", SIZES, CROP),
    "siglip": ("SiglipModel", TWO_TOWERS, {"image_processor_type": "SiglipImageProcessor"}),
    "siglip_vision_model": ("SiglipVisionModel", SIZES, {}),
    "swin": ("SwinForImageClassification", {**SWIN, "window_size": 4}, {}),
}
LEADING = dict.fromkeys(("ijepa", "siglip", "siglip_vision_model", "swin"), 0)
LEADING |= dict.fromkeys(("dinov2_with_registers", "dinov3_vit"), 4)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"
REVISIONS = {"main": COMMIT, "v1": OLDER, "refs%2Fpr%2F1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
STATUS = {"unknown": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}
STATUS |= {"unauthorized": (401, None), "gated": (403, "GatedRepo"), "broken": (500, None)}


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, **changes):
    """Replace tensors of a model; None removes one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"format": "pt"})


def build(kind):
    name, sizes, _ = MODELS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():  # what starts at 0 or 1 would hide a mistake
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(kind, folder):
    model = build(kind)
    model.save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps({**PROCESSOR, **MODELS[kind][2]}))
    return model


def write_model(folder, processor=PROCESSOR, **sizes):
    torch.manual_seed(0)
    config = IJepaConfig(**{**SIZES, **sizes})
    IJepaModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps(processor))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


def make_images(*sizes):
    torch.manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


MIXED = make_images((16, 16), (32, 32), (40, 23), (16, 16), (1, 1), (10, 3), (3, 10))


def load(source, dtype="float32", **options):
    return load_encoder(source, "hf", device=CPU, dtype=dtype, **options)


def failure(source, **options):
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert str(source).partition("@")[0] in caught.value.problem
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    return caught.value


def features(model, folder, images):
    """What transformers gives for each image: all tokens, and the pooled output if there is one."""
    processor = AutoImageProcessor.from_pretrained(folder)
    headless = model.base_model if "For" in type(model).__name__ else model
    network = getattr(model, "vision_model", headless)
    pillows = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        return [network(**processor(images=one, return_tensors="pt")) for one in pillows]


def mean_tokens(outputs, leading=0):
    return torch.stack([found.last_hidden_state[0, leading:].mean(dim=0) for found in outputs])


def assert_close(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_no_weight_is_left_at_a_random_value_and_unused_ones_are_reported(kind, tmp_path):
    write(kind, tmp_path)
    notes = load(tmp_path).description["notes"]
    assert kind != "clip" or "text_model" in notes[0]
    assert all(note.startswith(f"{tmp_path}: tensors that ") for note in notes)
    if "Classification" in MODELS[kind][0]:
        assert "classifier (2)" in notes[0]
    tensors = load_file(tmp_path / "model.safetensors")
    unused = set(re.findall(r"(\w+) \(", " ".join(notes)))
    used = [name for name in tensors if unused.isdisjoint(name.split("."))]
    assert len(used) > 30
    for name in used[:: len(used) // 2 + 1]:
        change_tensors(tmp_path, **{name: None})
        if "mask_token" not in name:
            assert "lacks the tensor" in failure(tmp_path).problem, name
        change_tensors(tmp_path, **{name: tensors[name]})


def test_rectangular_images_and_patches_of_another_size_work(tmp_path):
    sizes = {"image_size": [16, 24], "patch_size": 8}
    folder = write_model(tmp_path, {**PROCESSOR, "size": {"height": 16, "width": 24}}, **sizes)
    model = IJepaModel.from_pretrained(folder, add_pooling_layer=False).eval()
    encoder = load(folder)
    assert_close(encoder.embed(MIXED), mean_tokens(features(model, folder, MIXED)))
    assert encoder.description["input_size"] == [16, 24]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (PREPROCESSOR, {"image_processor_type": "ViTImageProcessorFast"}),
        (PREPROCESSOR, {"feature_extractor_type": "ViTFeatureExtractor"}),
        ("processor_config.json", {"image_processor": PROCESSOR, "processor_class": "X"}),
    ],
)
def test_processors_of_all_times_are_read_alike(folder, name, changes):
    expected = load(folder).embed(MIXED)
    (folder / PREPROCESSOR).unlink()
    old = {key: value for key, value in PROCESSOR.items() if key != "image_processor_type"}
    (folder / name).write_text(json.dumps({**(old if name == PREPROCESSOR else {}), **changes}))
    assert torch.equal(load(folder).embed(MIXED), expected)


def test_the_description_says_what_defines_the_embeddings(folder):
    description = load(folder, "bfloat16").description
    assert len(description.pop("sha256")) == 64
    assert description.pop("preprocessing")
    numbers = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert stored_parameters(folder, "x") == numbers
    expected = {"source": str(folder), "short_name": "model", "family": "ijepa", "revision": None}
    expected |= {"parameters": numbers, "input_size": 16, "resize": "bilinear, antialiased"}
    expected |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "dtype": "bfloat16", "notes": []}
    assert description == expected | {"pooling": "mean over patch tokens"}
    renamed = shutil.copytree(folder, folder.parent / "hf")
    assert load(renamed).description["short_name"] == f"{folder.parent.name}/hf"


def test_the_key_changes_with_weights_configuration_and_processor_and_not_with_the_place(folder):
    keys = {load(folder).key, load(shutil.copytree(folder, folder.parent / "copy")).key}
    assert len(keys) == 1
    change_json(folder / PREPROCESSOR, image_mean=[0.5, 0.5, 0.5])
    keys.add(load(folder).key)
    change_json(folder / CONFIG, layer_norm_eps=1e-5)
    keys.add(load(folder).key)
    change_tensors(folder, **{"layernorm.bias": torch.ones(24)})
    keys |= {load(folder).key, load(folder, "bfloat16").key}
    assert len(keys) == 5


def test_missing_files_are_named_with_what_to_do(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in failure(folder).problem
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / PREPROCESSOR).unlink()
    assert "has no preprocessor_config.json" in failure(folder).problem
    (folder / CONFIG).unlink()
    assert "no config.json" in failure(folder).problem


def test_hidden_files_of_macos_are_not_read_and_pointers_of_git_lfs_are_named(folder):
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert load(folder).embed_dim == 24
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    assert "cannot read model.safetensors of" in failure(folder).problem
    assert "git lfs pull" in failure(folder).hint
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")  # as in a cache of the hub that was pruned
    assert "cannot read model.safetensors of" in failure(folder).problem


def test_a_model_of_gray_images_is_refused(folder):
    change_json(folder / CONFIG, num_channels=1)
    name = "embeddings.patch_embeddings.projection.weight"
    weight = load_file(folder / "model.safetensors")[name][:, :1].contiguous()
    change_tensors(folder, **{name: weight})
    assert "takes images of 1 channel, not of 3" in failure(folder).problem


@pytest.mark.parametrize("kind", ["bert", None, 3, ["ijepa"], "siglip2"])
def test_an_unknown_family_is_named_with_those_there_are(folder, kind):
    (folder / PREPROCESSOR).unlink()  # which many of them do not have
    change_json(folder / CONFIG, model_type=kind)
    error = failure(folder)
    assert ("NaFlex" if kind == "siglip2" else str(kind)) in error.problem
    assert ("fixed-size" if kind == "siglip2" else "dinov2") in error.hint


def test_a_misshapen_infinite_or_cut_tensor_is_named(folder):
    change_tensors(folder, **{"layernorm.bias": torch.full((24,), math.nan)})
    assert "'layernorm.bias' has NaN" in failure(folder).problem
    change_tensors(folder, **{"encoder.layer.1.intermediate.dense.weight": torch.ones(47, 24)})
    words = "'layers.1.mlp.fc1.weight' has shape (47, 24), expected (48, 24)"
    assert words in failure(folder).problem
    path = folder / "model.safetensors"
    for keep in (-1, 100, 0):
        path.write_bytes(path.read_bytes()[:keep])
        failure(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (CONFIG, "{"),
        (PREPROCESSOR, "\xff\xfe"),
        (CONFIG, {"hidden_size": 48}),
        (CONFIG, {"hidden_size": "24"}),
        (CONFIG, {"num_attention_heads": 5}),
        (CONFIG, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        (PREPROCESSOR, {"size": "large"}),
        (PREPROCESSOR, {"size": {"shortest_edge": 16}}),
        (PREPROCESSOR, {"size": {"height": 32, "width": 32}}),
        (PREPROCESSOR, {"do_resize": False}),
        (PREPROCESSOR, {"rescale_factor": 0}),
        (PREPROCESSOR, {"image_std": [0.0, 0.0, 0.0]}),
        (PREPROCESSOR, {"image_processor_type": "BertTokenizer"}),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense_are_a_user_error(folder, name, changes):
    if isinstance(changes, str):
        (folder / name).write_bytes(changes.encode("latin-1"))
    else:
        change_json(folder / name, **changes)
    failure(folder)


@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR])
@pytest.mark.parametrize("known", [True, False], ids=["known class", "class only in the code"])
def test_code_of_a_repository_is_never_run_or_asked_about(folder, tmp_path, name, known):
    marker = tmp_path / "ran"
    (folder / "trap.py").write_text(f"open({str(marker)!r}, 'x')")
    kinds = ("AutoConfig", "AutoModel", "AutoImageProcessor")
    change_json(folder / name, auto_map=dict.fromkeys(kinds, "trap.Trap"))
    if known:
        load(folder)
    else:
        change_json(folder / PREPROCESSOR, image_processor_type="Trap")
        failure(folder)
    assert not marker.exists()


def test_an_attention_kernel_named_by_a_repository_is_not_fetched(folder):
    expected = load(folder).embed(MIXED)
    for key in ("attn_implementation", "_attn_implementation"):
        change_json(folder / CONFIG, **{key: "someone/their-kernel"})
        assert torch.equal(load(folder).embed(MIXED), expected)


def test_loading_writes_nothing_to_the_terminal_and_leaves_its_settings(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    change_json(folder / CONFIG, unknown_field=3)
    change_tensors(folder, **{"classifier.weight": torch.zeros(3, 24)})
    assert load(folder, "bfloat16").embed(MIXED).dtype == torch.float32
    assert capfd.readouterr() == ("", "")
    IJepaModel.from_pretrained(folder)
    assert capfd.readouterr().err  # transformers itself is not so quiet
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_model_whose_facts_are_kept_is_loaded_when_it_is_needed(folder, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    first = load(folder, cache=kept)
    expected = first.embed(MIXED)
    watched = Mock(wraps=IJepaModel.from_pretrained)
    monkeypatch.setattr(IJepaModel, "from_pretrained", watched)
    second = load(folder, cache=kept)
    for name in ("description", "embed_dim", "key"):
        assert getattr(second, name) == getattr(first, name)
    assert not watched.called
    assert torch.equal(second.embed(MIXED), expected)
    assert watched.call_count == 1
    file = kept / first.key / "facts.json"
    assert [path for path in kept.rglob("*") if path.is_file()] == [file]
    whole = file.read_bytes()
    for damaged in (whole.replace(b"24", b"25"), whole[:-9]):
        assert damaged != whole
        file.write_bytes(damaged)
        assert load(folder, cache=kept).description == first.description
        assert file.read_bytes() == whole
    change_json(folder / PREPROCESSOR, image_mean=[0.3, 0.2, 0.1])
    assert load(folder, cache=kept).description["mean"] == [0.3, 0.2, 0.1]


def test_a_note_names_the_directory_of_this_run_and_not_of_the_first(tmp_path):
    write("clip", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        (note,) = load(folder, cache=tmp_path / "kept").description["notes"]
        assert note.startswith(f"{folder}: tensors that CLIPVisionModel does not use: logit_scale")


def test_an_exported_model_loads_in_one_line_in_float32_and_embeds_alike(tiny_models):
    checkpoint, exported = tiny_models
    model = IJepaModel.from_pretrained(exported, add_pooling_layer=False)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    images = make_images((32, 32), (32, 32), (50, 20), (8, 8))
    local = load_encoder(checkpoint, "local", weights="context", device=CPU, dtype="float32")
    pixels = AutoImageProcessor.from_pretrained(exported)(images=images, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**pixels).last_hidden_state.mean(dim=1)
    ours = load(exported)
    for found in (theirs, ours.embed(images)):
        torch.testing.assert_close(found, local.embed(images), atol=1e-5, rtol=0)
    for fact in ("parameters", "resize", "epochs", "planned_epochs", "losses"):
        assert ours.description[fact] == local.description[fact]
    assert ours.description["losses"] == "I-JEPA prediction + variance/covariance"
    assert ours.description["short_name"].endswith("/hf (paper)")


def test_what_a_configuration_says_of_training_is_taken_only_where_it_makes_sense(folder):
    change_json(folder / CONFIG, ijepa_training={"epochs": "many", "recipe": None, "losses": "one"})
    description = load(folder).description
    assert description["losses"] == "one"
    assert description["short_name"] == "model"
    assert not {"epochs", "recipe"} & description.keys()
    change_json(folder / CONFIG, ijepa_training=["paper"])
    with pytest.raises(UserError, match="cannot load"):
        load(folder)


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as snapshot_download needs."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, files = self.path.split("?")[0], self.server.files
        for name, (status, code) in STATUS.items():
            if f"someone/{name}" in path:
                return self.answer(status, **({"X_Error_Code": code} if code else {}))
        *_, revision = path.partition("/revision/")
        if revision in REVISIONS:
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": "x", "sha": REVISIONS[revision], "siblings": siblings})
        if "/tree/" in path:
            facts = [{"path": name, "size": len(body), "oid": name} for name, body in files.items()]
            return self.json([{"type": "file", **one} for one in facts])
        if "/resolve/" in path:
            return self.file(*path.split("/resolve/")[1].split("/", 1))
        return self.answer(404, X_Error_Code="RevisionNotFound" if revision else "EntryNotFound")

    def do_HEAD(self):
        self.do_GET()

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def file(self, commit, name):
        body = self.server.files[name]
        if self.command == "GET":
            self.server.downloads.append(name)
        sent = body[: len(body) // 2] if self.server.breaks else body
        self.close_connection = self.server.breaks
        headers = {"Content_Length": len(body), "ETag": f'"{hash(body)}"'}
        self.answer(200, sent, **headers, X_Repo_Commit=commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback hub that this process's client, which read its environment long ago, uses."""
    write("vit", tmp_path / "served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}
    server.files |= {"pytorch_model.bin": b"pickled", "trap.py": b"raise SystemExit('ran')"}
    server.files["onnx/model.safetensors"] = b"of a subfolder"
    server.breaks, server.downloads = False, []  # whether connections break in the middle of a file
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    constants |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
    for name, value in {**constants, "HF_HUB_DISABLE_PROGRESS_BARS": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", FAMILIES)
def test_embeddings_of_every_family_are_those_of_transformers(kind, tmp_path):
    folder, shards = tmp_path / "whole", tmp_path / "shards"
    model = write(kind, folder)
    if kind == "vit_mae":
        model.config.mask_ratio = model.vit.embeddings.config.mask_ratio = 0.0
    images = [image for image in MIXED if min(image.shape[1:]) > 2]
    outputs, leading = features(model, folder, images), LEADING.get(kind, 1)
    expected = mean_tokens(outputs, leading)
    encoder = load(folder)
    assert_close(encoder.embed(images), expected)
    assert encoder.embed_dim == expected.shape[1]
    assert encoder.description["family"] == kind
    resample = "bicubic" if MODELS[kind][2].get("resample") == 3 else "bilinear"
    assert encoder.description["resize"] == f"{resample}, antialiased"
    half = build(kind).bfloat16()
    half.save_pretrained(shards, max_shard_size="10KB")
    shutil.copy(folder / PREPROCESSOR, shards)
    assert (shards / "model.safetensors.index.json").exists()
    model.load_state_dict(half.state_dict())  # in float32, but rounded
    assert_close(load(shards).embed(images), mean_tokens(features(model, folder, images), leading))
    if not leading:
        with pytest.raises(UserError, match="no class token"):
            load(folder, pooling="cls")
        return
    name = "pooler_output" if kind.startswith("clip") else "last_hidden_state"
    tokens = torch.cat([found[name].reshape(-1, encoder.embed_dim)[:1] for found in outputs])
    found = load(folder, pooling="cls")
    assert_close(found.embed(images), tokens)
    assert found.description["pooling"] == "class token"
    assert found.key != encoder.key


def test_a_hub_model_is_downloaded_once_and_found_again_without_a_network(hub, tmp_path):
    first, wanted = load("someone/vit"), [CONFIG, "model.safetensors", PREPROCESSOR]
    assert sorted(hub.downloads) == wanted
    expected = load(tmp_path / "served").embed(MIXED)
    assert torch.equal(first.embed(MIXED), expected)
    assert first.description["revision"] == COMMIT
    assert first.description["short_name"] == "vit"
    for options in ({}, {"offline": True}, {"revision": COMMIT}):
        assert torch.equal(load("someone/vit", **options).embed(MIXED), expected)
    assert sorted(hub.downloads) == wanted
    hub.shutdown()
    hub.server_close()
    assert load("someone/vit").key == first.key
    assert load("someone/vit", pooling="cls").key != first.key


@pytest.mark.usefixtures("hub")
def test_a_revision_is_a_branch_a_tag_or_a_commit():
    found = [load("someone/vit@v1"), load("someone/vit", revision=OLDER), load("someone/vit@main")]
    found.append(load("someone/vit@refs/pr/1"))
    assert [encoder.description["revision"] for encoder in found] == [OLDER, OLDER, COMMIT, OLDER]
    assert found[0].key == found[1].key != found[2].key
    assert "no revision 'v2'" in failure("someone/vit@v2").problem


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("gated", "is gated", "HF_TOKEN"),
        ("unknown", "not on the hub", "spelling"),
        ("private", "not on the hub", "HF_TOKEN"),
        ("unauthorized", "could not be downloaded", "HF_TOKEN"),
        ("broken", "could not be downloaded", "run again"),
        ("with a space", "not a file, a directory or a hub id", "looks like"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(name, problem, hint):
    error = failure(f"someone/{name}")
    assert problem in error.problem
    assert hint in error.hint


def test_a_model_that_is_not_in_the_cache_needs_a_network_that_works(hub, monkeypatch):
    assert "local cache" in failure("someone/vit", offline=True).problem
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure("someone/vit").hint
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.breaks = True
    assert "could not be downloaded" in failure("someone/vit").problem
    assert hub.downloads
    hub.shutdown()
    hub.server_close()
    assert "could not be downloaded" in failure("someone/vit").problem
