"""Files from strangers: what the comparison does with each of them.

    python benchmarks/hostile_files.py

Every case is a whole run of `compare_embeddings.py --offline` on one hostile file. It must end by
itself within five minutes: done, or refused with `error:` and `hint:`. Nothing of the file may run,
no traceback may show, nothing outside the output folder may change, and no more than `LIMIT`
megabytes may be held beyond what every run begins with. Exit code 1 if any case fails.
"""

import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from victims import COMPARE, Outcome, print_table, run, tiny_models

LIMIT = 2500
MARKER = "executed"

Flags = list[object]
Case = tuple[str, Callable[[Path], Flags]]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / MARKER),)


class Greedy:
    """Takes ten gigabytes when it is unpickled."""

    def __reduce__(self) -> tuple:
        return bytearray, (10**10,)


class Shaped:
    """A tensor of a shape that is not in the file."""

    def __reduce__(self) -> tuple:
        return torch.FloatTensor, (2**40,)


def archive(path: Path, parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file."""
    with zipfile.ZipFile(path, "w", how) as opened:
        for name, content in parts.items():
            opened.writestr(name, content)


def parts_of(path: Path) -> dict[str, bytes]:
    """What a zip file holds."""
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def checkpoints(tiny: Path) -> Iterator[Case]:  # noqa: C901  a list of small makers
    """Files for --local-checkpoint."""
    content = torch.load(tiny, weights_only=True)

    def saved(change: Callable[[dict, Path], object], **options: bool) -> Callable[[Path], Flags]:
        def make(folder: Path) -> Flags:
            mine = torch.load(tiny, weights_only=True)
            change(mine, folder)
            torch.save(mine, folder / "hostile.pt", **options)
            return ["--local-checkpoint", folder / "hostile.pt"]

        return make

    def zipped(change: Callable[[dict[str, bytes], Path], object], how: int = 0) -> Callable:
        def make(folder: Path) -> Flags:
            parts = parts_of(tiny)
            change(parts, folder)
            archive(folder / "hostile.pt", parts, how)
            return ["--local-checkpoint", folder / "hostile.pt"]

        return make

    def raw(content: bytes) -> Callable[[Path], Flags]:
        def make(folder: Path) -> Flags:
            (folder / "hostile.pt").write_bytes(content)
            return ["--local-checkpoint", folder / "hostile.pt"]

        return make

    def put(name: str, value: object) -> Callable[[dict, Path], object]:
        return lambda mine, _: mine["weights"]["target"].__setitem__(name, value)

    def plant(trap: Callable[[Path], object]) -> Callable[[dict, Path], object]:
        return lambda mine, folder: mine.__setitem__("training", trap(folder))

    def pickled(value: Callable[[Path], object], protocol: int) -> Callable:
        return zipped(
            lambda parts, folder: parts.update(
                {
                    name: pickle.dumps(value(folder), protocol)
                    for name in parts
                    if "data.pkl" in name
                }
            )
        )

    first = next(iter(content["weights"]["target"]))
    shape = content["weights"]["target"][first].shape
    yield "a pickle that runs code", saved(plant(Trap))
    yield (
        "the same in the format before 1.6",
        saved(plant(Trap), _use_new_zipfile_serialization=False),
    )
    yield "the same as a plain pickle", lambda folder: raw(pickle.dumps(Trap(folder)))(folder)
    for protocol in (0, 1, 2, 3, 4, 5):
        yield (
            f"code, pickle protocol {protocol}",
            pickled(lambda folder: {"a": Trap(folder)}, protocol),
        )
    yield "a pickle of ten gigabytes in 60 bytes", pickled(lambda _: {"a": Greedy()}, 2)
    yield "a tensor of 2^40 numbers that is not there", pickled(lambda _: {"a": Shaped()}, 2)
    yield (
        "a zip bomb for weights",
        zipped(
            lambda parts, _: parts.update({"archive/data/0": bytes(10**9)}), zipfile.ZIP_DEFLATED
        ),
    )
    yield (
        "a zip bomb for the pickle",
        zipped(
            lambda parts, _: parts.update({name: bytes(10**9) for name in parts if "pkl" in name}),
            zipfile.ZIP_DEFLATED,
        ),
    )
    yield (
        "a pickle nested 100,000 deep",
        zipped(
            lambda parts, _: parts.update(
                {
                    n: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
                    for n in parts
                    if "pkl" in n
                }
            )
        ),
    )
    yield "a tensor that repeats one number", saved(put(first, torch.zeros(1).expand(2**20, 2**20)))
    yield "weights of NaN", saved(put(first, torch.full(shape, torch.nan)))
    yield "weights of infinity", saved(put(first, torch.full(shape, torch.inf)))
    yield "weights of 1e38", saved(put(first, torch.full(shape, 1e38)))
    for key, value in [
        ("depth", 2**40),
        ("embed_dim", 2**40),
        ("image_size", 2**16),
        ("depth", -1),
    ]:
        yield (
            f"{key} of {value}",
            saved(
                lambda mine, _, key=key, value=value: mine["architecture"].__setitem__(key, value)
            ),
        )
    yield "an empty file", raw(b"")
    yield "a TorchScript archive", lambda folder: scripted(folder)
    yield "a folder", lambda folder: ["--local-checkpoint", folder]
    yield "a pipe", lambda folder: [os.mkfifo(folder / "p"), "--local-checkpoint", folder / "p"][1:]
    yield "an endless device", lambda _: ["--local-checkpoint", "/dev/zero"]


def scripted(folder: Path) -> Flags:
    """A file of torch.jit, which would run code of its own."""
    source = "def forward(self, x):\n    return x\n"
    parts = {"m/code/__torch__.py": source.encode(), "m/constants.pkl": pickle.dumps((), 2)}
    archive(folder / "m.pt", {**parts, "m/data.pkl": pickle.dumps({}, 2), "m/version": b"3\n"})
    return ["--local-checkpoint", folder / "m.pt"]


def copied(pristine: Path, change: Callable[[Path], object]) -> Callable[[Path], Flags]:
    """A model directory with something changed."""

    def make(folder: Path) -> Flags:
        mine = shutil.copytree(pristine, folder / "model")
        (mine / "SHA256SUMS").unlink()  # a stranger's directory has none, or true ones
        change(mine)
        return ["--hf-model", mine]

    return make


def instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else in the place of a file."""
    return lambda mine: [(mine / name).unlink(), put(mine / name)]


def settings(pristine: Path, file: str, **changes: object) -> Callable[[Path], Flags]:
    """A model directory with other settings."""

    def change(mine: Path) -> None:
        content = json.loads((mine / file).read_text())
        (mine / file).write_text(json.dumps({**content, **changes}))

    return copied(pristine, change)


def weight_files(pristine: Path) -> Iterator[Case]:
    """Directories for --hf-model with other weights."""
    weights = "model.safetensors"

    def header(entries: dict, size: int | None = None) -> Callable[[Path], Flags]:
        text = json.dumps(entries).encode()
        content = struct.pack("<Q", len(text) if size is None else size) + text + bytes(40_000)
        return copied(pristine, lambda mine: (mine / weights).write_bytes(content))

    def tensor(shape: list[int], start: int, end: int) -> dict:
        return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}

    yield "safetensors header of 2^63 bytes", header({}, 2**63)
    yield "safetensors header of 2^40 bytes", header({}, 2**40)
    yield "safetensors shape of 2^40", header({"a": tensor([2**40], 0, 2**42)})
    yield "safetensors shape that overflows", header({"a": tensor([2**32, 2**32, 2], 0, 64)})
    overlapping = {"a": tensor([10_000], 0, 40_000), "b": tensor([16], 0, 64)}
    yield "safetensors offsets that overlap", header(overlapping)
    yield "safetensors offsets backwards", header({"a": tensor([10_000], 40_000, 0)})
    yield "safetensors offsets out of the file", header({"a": tensor([16], 10**9, 10**9 + 64)})
    yield "safetensors of NaN", copied(pristine, spoil(float("nan")))
    yield "safetensors of infinity", copied(pristine, spoil(float("inf")))

    def trap(path: Path) -> int:
        return path.write_bytes(pickle.dumps(Trap(path.parent.parent)).ljust(40_000))

    yield "safetensors that are a pickle", copied(pristine, instead(weights, trap))
    away = instead(weights, lambda path: trap(path.with_name("pytorch_model.bin")))
    yield "a pickle for weights", copied(pristine, away)
    device = instead(weights, lambda path: path.symlink_to("/dev/zero"))
    yield "weights: a link to an endless device", copied(pristine, device)
    yield "an index that names weights elsewhere", copied(pristine, index_elsewhere)


def setting_files(pristine: Path) -> Iterator[Case]:
    """Directories for --hf-model with other settings."""
    config, processor = "config.json", "preprocessor_config.json"
    for name, value in [
        ("hidden_size", 2**40),
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", 1000),
        ("intermediate_size", 65536),
        ("num_channels", 2**40),
        ("hidden_size", -8),
    ]:
        yield f"{config}: {name} {value}", settings(pristine, config, **{name: value})
    others = {
        "65536 pixels in patches of 1": {"image_size": 65536, "patch_size": 1},
        "sizes under other names": {"attribute_map": {"hidden_size": "x"}, "x": 10**9},
        "an attention kernel of a stranger": {"_attn_implementation": "someone/kernel"},
        "a quantiser of a stranger": {"quantization_config": {"quant_method": "bitsandbytes"}},
    }
    for name, changes in others.items():
        yield f"{config}: {name}", settings(pristine, config, **changes)
    for size in (-16, 0, 10**6, 2**70):
        for sides in ({"height": size, "width": size}, {"shortest_edge": size}):
            yield f"{processor}: {sides}", settings(pristine, processor, size=sides)
    yield f"{processor}: std 0", settings(pristine, processor, image_std=[0] * 3)
    crop = {"height": 10**6, "width": 10**6}
    yield f"{processor}: crop", settings(pristine, processor, do_center_crop=True, crop_size=crop)
    kinds: dict[str, Callable[[Path], object]] = {
        "nested 100,000 deep": lambda path: path.write_text("[" * 10**5),
        "ten gigabytes": lambda path: [path.touch(), os.truncate(path, 10**10)],
        "a pipe": os.mkfifo,
        "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a link to a file elsewhere": lambda path: path.symlink_to("/etc/passwd"),
    }
    for file in (config, processor):
        for name, put in kinds.items():
            yield f"{file}: {name}", copied(pristine, instead(file, put))
        ask = partial(foreign_code, name=file)
        yield f"{file}: auto_map to code", copied(pristine, ask)


def spoil(value: float) -> Callable[[Path], object]:
    """Put a value into the weights of a directory."""

    def change(mine: Path) -> None:
        tensors = load_file(mine / "model.safetensors")
        tensors["layernorm.weight"][0] = value
        save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})

    return change


def foreign_code(mine: Path, name: str) -> None:
    """Ask for code that lies in the directory."""
    (mine / "trap.py").write_text(f"import os\nos.mkdir({str(mine.parent / MARKER)!r})\n")
    content = json.loads((mine / name).read_text())
    classes = ("AutoConfig", "AutoModel", "AutoImageProcessor")
    content["auto_map"] = dict.fromkeys(classes, "trap.Trap")
    (mine / name).write_text(json.dumps(content))


def index_elsewhere(mine: Path) -> None:
    """Name weights outside the directory."""
    names = load_file(mine / "model.safetensors")
    (mine / "model.safetensors").rename(mine.parent / "outside.safetensors")
    save_file({"a": torch.zeros(10**5)}, mine / "unused.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))


def png(width: int, height: int, color: int = 2) -> bytes:
    """A PNG of any stated size in black, as small as deflate makes it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_

    squeeze, lines = zlib.compressobj(9), []
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[color])
    for _ in range(height if width * height < 2**28 else 0):
        lines.append(squeeze.compress(row))
    body = b"".join(lines) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def image_folders() -> Iterator[Case]:
    """Folders for --dataset."""
    rng = np.random.default_rng(0)

    def folder_with(change: Callable[[Path], object], names: tuple = ("a", "b")) -> Callable:
        def make(folder: Path) -> Flags:
            for name in names:
                place = folder / "images" / name
                place.mkdir(parents=True)
                for row in range(6):
                    pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{row}.png")
            change(folder / "images")
            return ["--dataset", folder / "images", "--hf-model", "none"]

        return make

    def written(name: str, content: bytes) -> Callable[[Path], Flags]:
        return folder_with(lambda images: (images / "a" / name).write_bytes(content))

    def drawn(name: str, mode: str, **options: object) -> Callable[[Path], Flags]:
        return folder_with(
            lambda images: Image.new(mode, (20, 20)).save(images / "a" / name, **options)
        )

    yield "a bomb of 2^62 pixels", written("x.png", png(2**31 - 1, 2**31 - 1))
    yield "a bomb of 10 gigapixels", written("x.png", png(100_000, 100_000))
    yield "a bomb of 150 megapixels", written("x.png", png(12_500, 12_000))
    yield (
        "four images of 89 megapixels, RGB",
        folder_with(
            lambda images: [
                (images / "a" / f"x{i}.png").write_bytes(png(9_450, 9_450)) for i in range(4)
            ]
        ),
    )
    yield "an image of 89 megapixels, RGBA", written("x.png", png(9_450, 9_450, 6))
    yield "an image of 0 x 0", written("x.png", png(0, 0))
    yield "an image of 1 x 60,000", written("x.png", png(1, 60_000, 0))
    yield "a PNG whose text grows to 1 GB", written("x.png", text_bomb())
    yield "a truncated PNG", written("x.png", png(400, 400)[:80])
    yield "a truncated JPEG", folder_with(truncated_jpeg)
    yield "CMYK", drawn("x.jpg", "CMYK")
    yield "16 bit", drawn("x.png", "I;16")
    yield "a palette with transparency", drawn("x.png", "P", transparency=0)
    yield (
        "animated WebP",
        drawn(
            "x.webp", "RGB", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")] * 5
        ),
    )
    yield "SVG by the name of PNG", written("x.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    yield "PostScript by the name of PNG", drawn("x.png", "RGB", format="EPS")
    yield "TIFF by the name of PNG", drawn("x.png", "RGB", format="TIFF")
    yield "a pipe by the name of PNG", folder_with(lambda images: os.mkfifo(images / "a" / "x.png"))
    yield (
        "a link to an endless device",
        folder_with(lambda images: (images / "a" / "x.png").symlink_to("/dev/zero")),
    )
    yield (
        "a link to nothing",
        folder_with(lambda images: (images / "a" / "x.png").symlink_to("nothing")),
    )
    yield (
        "a folder by the name of PNG",
        folder_with(lambda images: (images / "a" / "x.png").mkdir()),
    )
    yield (
        "a link to the folder itself",
        folder_with(lambda images: (images / "c").symlink_to(images)),
    )
    script = "<img src=x onerror=alert(1)>"
    yield (
        "classes of HTML, quotes, line breaks, bars",
        folder_with(
            lambda _: None,
            (script, "a\nb\r|c", "\"'`$\\x$ & {}%s", "<title>&lt;", "[x](javascript:0)"),
        ),
    )
    yield (
        "classes of 255 bytes",
        folder_with(lambda _: None, ("x" * 255, "ä" * 127, "x" * 254 + "y")),
    )
    yield (
        "classes of control and bidirectional characters",
        folder_with(
            lambda _: None, ("\x1b[31mred\x07", "\u202egnp.exe", "\x01", "=1+1", "😀 \u0301")
        ),
    )
    yield "a class that is not UTF-8", folder_with(lambda _: None, ("a", os.fsdecode(b"b\xff")))
    yield (
        "an image name that is not UTF-8",
        folder_with(
            lambda images: shutil.copy(
                images / "a" / "0.png", images / "a" / os.fsdecode(b"\xff.png")
            )
        ),
    )
    yield "classes . and spaces", folder_with(lambda _: None, (" ", "  ", "...", "-rf", "a\\..\\b"))


def text_bomb() -> bytes:
    """A PNG with a compressed comment."""
    content = b"zTXtComment\0\0" + zlib.compress(bytes(10**9), 9)
    part = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    whole = png(8, 8)
    return whole[:33] + part + whole[33:]


def truncated_jpeg(images: Path) -> None:
    """Cut a JPEG in the middle."""
    path = images / "a" / "x.jpg"
    Image.effect_noise((200, 200), 50).save(path)
    os.truncate(path, path.stat().st_size // 2)


def output_folders(tiny: Path) -> Iterator[Case]:
    """What may lie in the output folder before."""

    def cached(content: bytes) -> Callable[[Path], Flags]:
        def make(folder: Path) -> Flags:
            output = folder / "output"
            first = run(COMPARE, [*common(tiny), "--output-dir", output], folder / "log")
            assert first.code == 0, first.text
            for file in (output / ".cache").rglob("*.*"):
                file.write_bytes(content)
            return []

        return make

    yield "cached files that are a zip bomb", cached(zlib.compress(bytes(10**8)))
    yield (
        "cached files that are a pickle",
        lambda folder: cached(pickle.dumps(Trap(folder)))(folder),
    )
    yield "cached files of zeros", cached(bytes(32 + 64 * 16 * 4))
    yield "files of the report that are links elsewhere", links_elsewhere


def links_elsewhere(folder: Path) -> Flags:
    """Links in the place of results, to a file that is not the run's."""
    (folder / "output").mkdir()
    for name in ("metrics.json", "report.html", "embeddings_local.npz", "tsne_comparison.png"):
        (folder / "output" / name).symlink_to(folder / "canary")
    return []


def common(tiny: Path) -> Flags:
    """Flags of every case; a case's own come later and win."""
    return ["--offline", "--max-samples", 64, "--local-checkpoint", tiny, "--hf-model", "none"]


def judge(outcome: Outcome, folder: Path) -> str:
    """`done`, `refused`, or what is wrong."""
    if (folder / MARKER).exists():
        return "CODE RAN"
    if (folder / "canary").read_text() != "untouched":
        return "WROTE ELSEWHERE"
    if outcome.megabytes > LIMIT:
        return "TOO MUCH MEMORY"
    if outcome.code == 0 and "Traceback" not in outcome.text:
        return "done"
    return "refused" if outcome.refused else "FAILED"


def main() -> int:
    """Try every case."""
    rows = [("case", "ended", "s", "MB", "said")]
    scratch = Path(tempfile.mkdtemp(prefix="hostile-"))
    tiny, exported = tiny_models(scratch)
    flags = common(tiny)
    models = (checkpoints(tiny), weight_files(exported), setting_files(exported))
    groups = (*models, image_folders(), output_folders(tiny))
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, make in (case for group in groups for case in group if wanted in case[0]):
        folder = Path(tempfile.mkdtemp(dir=scratch))
        (folder / "canary").write_text("untouched")
        mine = make(folder)
        arguments = [*(flags if "--local-checkpoint" not in mine else flags[:3] + flags[5:]), *mine]
        log = folder / "log"
        outcome = run(COMPARE, [*arguments, "--output-dir", folder / "output"], log, limit=300)
        ended = judge(outcome, folder)
        said = "" if ended == "done" else ascii(outcome.said.replace(str(folder), "."))[1:110]
        rows.append((name, ended, f"{outcome.seconds:.1f}", f"{outcome.megabytes:.0f}", said))
        if ended not in ("done", "refused"):
            print(f"{name}: {ended} ({outcome.code})\n{outcome.text[-3000:]}", file=sys.stderr)
        shutil.rmtree(folder)
    shutil.rmtree(scratch)
    print_table(rows)
    ends = [row[1] for row in rows[1:]]
    bad = [end for end in ends if end not in ("done", "refused")]
    most = max(float(row[3]) for row in rows[1:])
    print(
        f"\n{len(ends)} files: {ends.count('refused')} refused, {ends.count('done')} compared, "
        f"{len(bad)} failed; at most {most:.0f} MB held"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
