import hashlib
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa import encoders
from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.encoders import load_encoder, pixel_encoder, random_encoder
from ijepa.errors import UserError
from ijepa.model import VisionTransformer, ViTConfig

CPU = torch.device("cpu")
TINY = ViTConfig(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0)
TRAINING = {"epochs": 3, "planned_epochs": 9}


def make_images(*sizes):
    torch.manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    networks = {name: VisionTransformer(TINY) for name in ("target", "context")}
    save_checkpoint(tmp_path / "checkpoint.pt", TINY, networks, (0.4, 0.25), TRAINING)
    return tmp_path / "checkpoint.pt"


def load(path, weights="target", dtype="float32", **options):
    return load_encoder(path, "local", weights=weights, device=CPU, dtype=dtype, **options)


def test_only_other_seeds_of_the_same_training_are_seeds():
    facts = {"source": "me/a", "sha256": None, "revision": "12ab", "parameters": 1}
    first, second, larger = (
        replace(pixel_encoder(), description=facts | other)
        for other in ({}, {"revision": "34cd"}, {"revision": "56ef", "parameters": 2})
    )
    wider = replace(second, embed_dim=5)
    encoders.check_seeds(first, [second])  # of one hub id
    for others, words in (
        ([second, second], "is given twice"),
        ([larger], "has parameters 2"),
        ([wider], "has width 5"),
    ):
        with pytest.raises(UserError, match=f"me/a {words}"):
            encoders.check_seeds(first, others)


def test_the_local_encoder_equals_a_plain_loop_over_images(checkpoint):
    images = make_images(*[(16, 16)] * 5)
    network = load_checkpoint(checkpoint, "context").build()
    found = load(checkpoint, "context").embed(images)
    for row, image in zip(found, images, strict=True):
        pixels = (image.double().numpy() / 255 - 0.4) / 0.25
        tokens = network(torch.from_numpy(pixels).float()[None])[0].detach().numpy()
        np.testing.assert_allclose(row, sum(tokens) / 16, atol=1e-5)
    assert found.shape == (5, 24)


def test_the_local_description_says_what_defines_the_embeddings(checkpoint):
    description = load(checkpoint, dtype="bfloat16").description
    numbers = sum(value.numel() for value in VisionTransformer(TINY).state_dict().values())
    expected = {"source": str(checkpoint), "short_name": "checkpoint (target)", "family": "ijepa"}
    expected |= {"weights": "target", "epochs": 3, "planned_epochs": 9, "num_heads": 2}
    expected |= {"parameters": numbers, "input_size": 16, "mean": [0.4] * 3, "std": [0.25] * 3}
    expected |= {"resize": "bilinear, antialiased", "pooling": "mean over patch tokens"}
    expected |= {"dtype": "bfloat16", "losses": None, "notes": []}
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert description == expected | {"sha256": sha256}
    named = checkpoint.rename(checkpoint.with_name("vit.h.14-300e.pth.tar"))
    assert load(named).description["short_name"] == "vit.h.14-300e (target)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_float32_without_gradient_and_depend_on_no_other_image(checkpoint, dtype):
    images = make_images((16, 16), (9, 30), (40, 40), (16, 16), (1, 1))
    encoder = load(checkpoint, dtype=dtype)
    together = encoder.embed(images)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    alone = torch.cat([encoder.embed([image]) for image in images])
    # In bfloat16 a matrix product may take another order of additions at another size.
    atol = 1e-5 if dtype == "float32" else 0.03
    torch.testing.assert_close(together, alone, atol=atol, rtol=0)


def test_resizing_is_pillows_bilinear_to_one_gray_level():
    for image in make_images((8, 8), (64, 64), (31, 50), (1, 7)):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = pillow.resize((16, 16), Image.Resampling.BILINEAR)
        found = encoders.resize_and_normalize([image], 16, (0.0,) * 3, (1.0,) * 3)[0] * 255
        np.testing.assert_allclose(found.permute(1, 2, 0), np.asarray(expected, "f4"), atol=1.01)


def test_the_random_encoder_follows_its_seed_and_leaves_the_global_generator_alone(checkpoint):
    trained, images = load(checkpoint), make_images((16, 16))
    state = torch.random.get_rng_state()
    one, same, other = (random_encoder(trained, seed).embed(images) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-2)


def test_pixels_as_embeddings_are_the_flattened_image():
    image = make_images((32, 32))[0]
    found = pixel_encoder().embed([image])
    np.testing.assert_allclose(found[0], (image.numpy().ravel() + 0.5) / 255, atol=1e-7)
    assert pixel_encoder().embed_dim == found.shape[1] == 3072
    assert pixel_encoder().embed(make_images((5, 9))).shape == (1, 3072)


def failing(error):
    def network(_):
        raise error

    return replace(pixel_encoder(), network=network)


@pytest.mark.parametrize(
    "encoder",
    [
        failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        failing(MemoryError()),
        failing(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
        replace(pixel_encoder(), network=lambda _: torch.empty(2**46)),
    ],
)
def test_running_out_of_memory_suggests_a_smaller_batch(encoder):
    cases = ((64, "64 images", "--batch-size 16"), (1, "1 image", "--device cpu"))
    for count, words, hint in cases:
        with pytest.raises(UserError, match=f"out of memory on cpu with {words} in") as caught:
            encoder.embed(make_images((4, 4)) * count)
        assert caught.value.hint == f"try {hint}"


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError, match="multiplied"):
        failing(RuntimeError("shapes cannot be multiplied")).embed(make_images((4, 4)))


def test_the_key_follows_what_decides_the_embeddings_and_no_path_or_name(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    first, copied = load(checkpoint), shutil.copy(checkpoint, checkpoint.with_name("other.pt"))
    assert first.key == load(copied).key == load_encoder("~/other.pt", "hf", device=CPU).key
    keys = {first.key, load(checkpoint, "context").key, load(checkpoint, dtype="bfloat16").key}
    keys |= {random_encoder(first, seed).key for seed in (0, 1)} | {pixel_encoder().key}
    torch.manual_seed(9)
    save_checkpoint(checkpoint, TINY, {"target": VisionTransformer(TINY)}, (0.4, 0.3), TRAINING)
    keys |= {load(checkpoint).key, random_encoder(load(checkpoint), 0).key}
    raw = checkpoint.with_name("raw.pth")
    torch.save(VisionTransformer(TINY).state_dict(), raw)
    keys |= {load(raw, num_heads=heads).key for heads in (2, 3)}
    packages = ("torch", "torchvision", "transformers", "pillow")
    for new in packages:
        versions = {name: version(name) for name in packages} | {new: "0"}
        monkeypatch.setattr("ijepa.encoders.version", versions.get)
        keys.add(load(copied).key)
    assert len(keys) == 14


def test_a_source_that_is_not_there_is_a_user_error_that_names_it(tmp_path):
    for source in (tmp_path / "none.pt", "none.pt", "./none", "a/b/c", "~none/x", "./" + 300 * "x"):
        with pytest.raises(UserError, match="no checkpoint at"):
            load_encoder(source, "local", device=CPU, offline=True)
    for name in ("none.npz", "none.NPZ"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}"):
            load_encoder(tmp_path / name, "local", device=CPU)
    with pytest.raises(UserError, match="'https://a/b' is a web address"):
        load_encoder("https://a/b", "local", device=CPU)
    with pytest.raises(UserError, match="'a/b@main' is not revision 'x'"):
        load_encoder("a/b@main", "hf", device=CPU, revision="x")


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ("x.npz", {"num_heads": 3}),
        ("x.pth", {"pooling": "cls"}),
        ("x.pth", {"revision": "main"}),
        (".", {"num_heads": 3}),
        (".", {"revision": "main"}),
        ("a/b", {"weights": "context"}),
    ],
)
def test_a_flag_that_means_nothing_for_a_source_is_refused(source, flags):
    with pytest.raises(UserError, match=r"^--[a-z-]+ means nothing for") as caught:
        load_encoder(source, "hf", device=CPU, **flags)
    assert caught.value.hint.startswith("omit --")


def saved(tmp_path, **arrays):
    """Arrays written as an earlier run did."""
    np.savez(tmp_path / "embeddings_hf.npz", **arrays)
    return tmp_path / "embeddings_hf.npz"


def test_embeddings_of_an_earlier_run_are_found_by_image_key(tmp_path):
    rng = np.random.default_rng(0)
    values, keys = rng.normal(size=(9, 5)), rng.integers(0, 256, (9, 16), dtype=np.uint8)
    path = saved(tmp_path, embeddings=values, keys=keys, indices=np.arange(9))
    found = load_encoder(path, "hf", device=CPU)
    assert (found.name, found.embed_dim) == ("hf", 5)
    order = [4, 4, 0, 8]
    wanted = [keys[row].tobytes() for row in order]
    result = found.look_up(wanted, np.arange(100, 104))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, values[order].astype(np.float32))
    assert (found.description["short_name"], found.description["notes"]) == ("embeddings_hf", [])
    with pytest.raises(UserError, match=r"embeddings_hf\.npz lacks 2 of 6 images"):
        found.look_up([*wanted, bytes(16), bytes(16)], np.arange(6))


def test_embeddings_without_keys_are_found_by_index_and_a_note_says_so(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = saved(tmp_path, embeddings=values, indices=np.array([7, 3, 5, 1]))
    found = load_encoder(path, "local", device=CPU)
    np.testing.assert_array_equal(found.look_up([b""] * 2, np.array([5, 7])), values[[2, 0]])
    assert "index" in found.description["notes"][0]
    with pytest.raises(UserError, match="1 of 2 images"):
        found.look_up([b""] * 2, np.array([5, 6]))


@pytest.mark.parametrize(
    ("arrays", "kept"),
    [
        ({}, None),
        *(({"indices": np.arange(4)}, None), ({"indices": np.array(3)}, None)),
        *(({"indices": odd}, None) for odd in (np.array([0, 1, 1]), np.array([0.5, 1, 2]))),
        *(({"indices": odd}, None) for odd in (np.zeros((3, 1), int), np.array(["a", "b", "c"]))),
        *(({"keys": odd}, None) for odd in (np.zeros((3, 32), np.uint8), np.array([*"abc"]))),
        ({"embeddings": np.array([{}] * 3), "indices": np.arange(3)}, None),
        *(({"indices": np.arange(3)}, kept) for kept in (0, 100, -1)),
    ],
)
def test_an_npz_that_is_cut_or_without_embeddings_of_images_is_a_user_error(tmp_path, arrays, kept):
    path = saved(tmp_path, **{"embeddings": np.zeros((3, 2)), **arrays})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot read embeddings from") as caught:
        load_encoder(path, "hf", device=CPU)
    assert "keys" in caught.value.hint


def test_names_that_mean_nothing_are_value_errors(checkpoint):
    for options, words in (({"pooling": "max"}, "mean or cls"), ({"dtype": "float16"}, "bfloat16")):
        with pytest.raises(ValueError, match=words):
            load(checkpoint, **options)
    assert load_encoder(checkpoint, "local", device="cpu").device == CPU
