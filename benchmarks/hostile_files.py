"""Files from strangers and damaged files: what the comparison does with each of them.

    python benchmarks/hostile_files.py

Every case is a whole offline run in a folder of its own, in which one thing was made hostile. It
must end within five minutes: done, or refused with `error:` and `hint:`. No code of a file may run,
no traceback may show, nothing outside the output and cache folders may change, and no more than
`LIMIT` megabytes may be held. Exit code 1 if any case fails.
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
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from victims import COMPARE, print_table, run, some_images, tiny_models

LIMIT = 3000
FLAGS = ["--offline", "--local-checkpoint", "tiny.pt", "--hf-model", "hf", "--dataset", "images"]
FLAGS += ["--cache-dir", "cache", "--output-dir", "out"]
CONFIG, PROCESSOR, WEIGHTS = "hf/config.json", "hf/preprocessor_config.json", "hf/model.safetensors"
MINE = ("out", "cache", "log")


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


TRAP = Call(os.mkdir, "executed")


def case(make):
    """Let a case be written without its folder, which comes later."""
    return lambda *args, **options: lambda folder: make(folder, *args, **options)


@case
def saved(folder, change, as_zip=True):
    """The checkpoint with other content."""
    content = torch.load(folder / "tiny.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "tiny.pt", _use_new_zipfile_serialization=as_zip)


@case
def zipped(folder, part, content):
    """The checkpoint with other bytes in one part of its archive."""
    with zipfile.ZipFile(folder / "tiny.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    how = zipfile.ZIP_DEFLATED if len(content) > 10**6 else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / "tiny.pt", "w", how) as archive:
        for name, old in parts.items():
            archive.writestr(name, content if name.endswith(part) else old)


@case
def put(folder, name, content):
    """Other bytes in a file, or whatever a function makes in its place."""
    if not callable(content):
        return (folder / name).write_bytes(content)
    (folder / name).unlink(missing_ok=True)
    return content(folder / name)


@case
def settings(folder, name, **values):
    """Other values in a JSON file."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))
    (folder / "hf" / "trap.py").write_text("import os\nos.mkdir('executed')\n")


@case
def tensor(folder, value):
    """Another last norm in the directory, or none."""
    found = {**load_file(folder / WEIGHTS), "layernorm.weight": value}
    found = {name: one for name, one in found.items() if one is not None}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def png(width, height, extra=b""):
    """A black PNG of any stated size, as small as deflate makes it."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    pixels = zlib.compress(bytes((1 + 3 * width) * height) if width * height < 2**28 else b"", 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    comment = chunk(b"zTXt", b"Comment\0\0" + extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + head + comment + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@case
def classes(folder, *names):
    """Class folders with other names."""
    for name in names:
        shutil.copytree(folder / "images" / "a", folder / "images" / name)


@case
def cache(folder, content):
    """A cache of an earlier run whose files hold something else."""
    shutil.move(folder / "earlier" / "cache", folder / "cache")
    for path in (folder / "cache").rglob("*.*"):
        path.write_bytes(content)


@case
def earlier(folder, change):
    """Embeddings of an earlier run with other arrays, instead of a checkpoint."""
    with np.load(folder / "earlier" / "out" / "embeddings_local.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez_compressed(folder / "e.npz", **arrays)
    return ["--local-checkpoint", "e.npz"]


def index_elsewhere(folder):
    """An index that names weights outside the directory."""
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


ENDLESS = partial(os.symlink, "/dev/zero")
NEST = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
REMOTE = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "trap.X")}
PICTURE, WIDE = "images/a/x.png", torch.zeros(1).expand(2**20, 2**20)
CASES = {
    "checkpoint: code in its pickle": saved(lambda c: c.update(training=TRAP)),
    "the same, PyTorch before 1.6": saved(lambda c: c.update(training=TRAP), as_zip=False),
    "a plain pickle with code": put("tiny.pt", pickle.dumps(TRAP)),
    "code, pickle protocol 0": zipped("data.pkl", pickle.dumps({"a": TRAP}, 0)),
    "a pickle nested 100,000 deep": zipped("data.pkl", NEST),
    "a zip bomb for the pickle": zipped("data.pkl", bytes(10**9)),
    "a zip bomb for weights": zipped("data/0", bytes(10**9)),
    "weights of NaN": saved(lambda c: next(iter(c["weights"]["target"].values())).fill_(np.nan)),
    "a tensor is missing": saved(lambda c: c["weights"]["target"].popitem()),
    "a tensor repeats one number": saved(lambda c: c["weights"]["target"].update(pos_embed=WIDE)),
    "depth 2^40": saved(lambda c: c["architecture"].update(depth=2**40)),
    "embed_dim -1": saved(lambda c: c["architecture"].update(embed_dim=-1)),
    "cut in half": lambda folder: os.truncate(folder / "tiny.pt", 20_000),
    "empty": put("tiny.pt", b""),
    "an endless device": put("tiny.pt", ENDLESS),
    "directory: code by config.json": settings(CONFIG, **REMOTE),
    "code by the processor": settings(PROCESSOR, **REMOTE),
    "code by an unknown family": settings(CONFIG, model_type="trap", **REMOTE),
    "safetensors are a pickle": put(WEIGHTS, pickle.dumps(TRAP).ljust(40_000)),
    "pytorch_model.bin, a pickle": put(
        WEIGHTS, lambda path: path.with_name("pytorch_model.bin").write_bytes(pickle.dumps(TRAP))
    ),
    "an index names weights elsewhere": index_elsewhere,
    "a header of 2^63 bytes": put(WEIGHTS, struct.pack("<Q", 2**63) + bytes(40_000)),
    "weights of infinity": tensor(torch.full((16,), torch.inf)),
    "missing weights": tensor(None),
    "weights of another size": tensor(torch.zeros(17)),
    "hidden_size 2^40": settings(CONFIG, hidden_size=2**40),
    "an attention kernel of a stranger": settings(CONFIG, _attn_implementation="someone/kernel"),
    "config.json nested 100,000 deep": put(CONFIG, b"[" * 10**5),
    "config.json: an endless device": put(CONFIG, ENDLESS),
    "images of 10^6 x 10^6": settings(PROCESSOR, size={"height": 10**6, "width": 10**6}),
    "std 0": settings(PROCESSOR, image_std=[0] * 3),
    "no processor": lambda folder: (folder / PROCESSOR).unlink(),
    "images: a bomb of 2^62 pixels": put(PICTURE, png(2**31 - 1, 2**31 - 1)),
    "a PNG of 89 megapixels": put(PICTURE, png(9_450, 9_450)),
    "a PNG whose comment grows to 1 GB": put(PICTURE, png(8, 8, zlib.compress(bytes(10**9), 9))),
    "a PNG cut short": put(PICTURE, png(400, 400)[:80]),
    "PostScript as PNG": put(PICTURE, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "a pipe as PNG": put(PICTURE, os.mkfifo),
    "a link to an endless device": put(PICTURE, ENDLESS),
    "a link to the folder itself": put("images/c", partial(os.symlink, "../images")),
    "classes of HTML and quotes": classes("<img src=x onerror=alert(1)>", "\"'`$\\x$ & {}%s"),
    "classes with control characters": classes("a\nb\r|c", "\x1b[31m", "\u202egnp.exe", "=1+1"),
    "classes of 255 bytes": classes("x" * 255, "ä" * 127),
    "a class that is not UTF-8": classes(os.fsdecode(b"b\xff")),
    "an npz with pickled objects": earlier(lambda a: a.update(embeddings=np.array([TRAP], object))),
    "an npz with pickled keys": earlier(lambda a: a.update(keys=np.array([TRAP], object))),
    "an npz of NaN": earlier(lambda a: a["embeddings"].fill(np.nan)),
    "an npz of other images": earlier(lambda a: a.update(keys=a["keys"] ^ 1)),
    "cache: pickles": cache(pickle.dumps(TRAP)),
    "cache: zip bombs": cache(zlib.compress(bytes(10**8))),
    "cache: zeros": cache(bytes(5000)),
    "the cache is a file": put("cache", b"x"),
    "a result is a link elsewhere": put("out/metrics.json", partial(os.symlink, "../tiny.pt")),
}


def pristine(folder):
    """Tiny models, twelve images, and what an earlier run made of them."""
    tiny_models(folder)
    some_images(folder / "images", 12, 20)
    os.chdir(folder)
    outcome = run(COMPARE, FLAGS, folder / "log")
    assert outcome.code == 0, outcome.text
    for name in ("cache", "out"):
        os.renames(name, f"earlier/{name}")
    (folder / "out").mkdir()


def listing(folder):
    """Every file outside the output and cache folders, with its size and time of change."""
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in MINE]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def attempt(folder, change):
    """Make a folder hostile and run in it: how the run ended, and its outcome."""
    os.chdir(folder)
    extra = change(folder)
    flags = [*FLAGS[:1], *extra, *FLAGS[3:]] if isinstance(extra, list) else FLAGS
    before = listing(folder)
    outcome = run(COMPARE, flags, folder / "log")
    endings = {
        "CODE RAN": (folder / "executed").exists(),
        "WROTE ELSEWHERE": listing(folder) != before,
        "TOO MUCH MEMORY": outcome.megabytes > LIMIT,
        "done": outcome.code == 0 and "Traceback" not in outcome.text,
        "refused": outcome.refused,
    }
    return next((ending for ending, true in endings.items() if true), "FAILED"), outcome


def main():
    """A table of all cases."""
    rows, ends, wanted = [("case", "ended", "s", "MB", "said")], Counter(), sys.argv[1:] or [""]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "pristine")
        whole.mkdir()
        pristine(whole)
        for name in (name for name in CASES if wanted[0] in name):
            folder = shutil.copytree(whole, Path(scratch, str(len(rows))))
            ended, outcome = attempt(folder, CASES[name])
            ends[ended] += 1
            said = "" if ended == "done" else ascii(outcome.said)[1:110]
            rows.append((name, ended, f"{outcome.seconds:.1f}", f"{outcome.megabytes:.0f}", said))
            if ended not in ("done", "refused"):
                print(f"{name}: {ended} ({outcome.code})\n{outcome.text[-3000:]}", file=sys.stderr)
            shutil.rmtree(folder)
    print_table(rows)
    print(f"\n{len(rows) - 1} cases: {dict(ends)}")
    return not set(ends) <= {"done", "refused"}


if __name__ == "__main__":
    sys.exit(main())
