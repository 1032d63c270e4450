import contextlib
import functools
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import WeakFileLock, _http

from ijepa import hub as hub_module
from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.errors import UserError
from ijepa.hub import resolve_model
from ijepa.huggingface import check_model_files, export_huggingface
from ijepa.model import VisionTransformer, ViTConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = ViTConfig(image_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
STATUS = {
    "someone/unknown": (404, "RepoNotFound"),
    "someone/private": (401, "RepoNotFound"),
    "someone/gated": (403, "GatedRepo"),
    "someone/broken": (500, None),
    "someone/busy": (503, None),
    "someone/forbidden": (403, None),
}


class Hub(ThreadingHTTPServer):
    """As much of the hub as snapshot_download needs, on loopback."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.requests = []
        self.headers = []
        self.fault = None
        self.commit = COMMIT
        self.tree = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        # Clients that hang up or are killed are what these tests are about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def downloads(self):
        return sorted(
            path.rsplit("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        )


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        self.server.headers.append(dict(self.headers))
        for name, (status, code) in STATUS.items():
            if name in path:
                self.answer(status, **({"X_Error_Code": code} if code else {}))
                return
        files = self.server.files
        # The page of a gated model can be read by all; its files cannot.
        model = "someone/halfgated" if "halfgated" in path else "someone/ijepa"
        if path == f"/api/models/{model}/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": model, "sha": self.server.commit, "siblings": siblings})
        elif path == f"/api/models/{model}/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": digest(body)[:40]}
                    | self.server.tree
                    for name, body in files.items()
                ]
            )
        elif path.startswith(f"/{model}/resolve/{COMMIT}/"):
            self.answer_file(model, path.rsplit("/", 1)[1])
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    def answer_file(self, model, name):
        body = self.server.files[name]
        if model.endswith("halfgated"):
            self.answer(403, X_Error_Code="GatedRepo")
            return
        headers = {"ETag": f'"{digest(body)}"', "X_Repo_Commit": COMMIT}
        fault = self.server.fault
        if fault and name.endswith(".safetensors") and fault(self, body, headers):
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start and self.command == "GET":
            size = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], **headers, Content_Range=size)
            return
        self.answer(200, body, **headers)


def digest(body):
    return hashlib.sha256(body).hexdigest()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    save_checkpoint(
        folder / "c.pt", TINY, {"target": VisionTransformer(TINY)}, (0.5, 0.5), {"epochs": 1}
    )
    export_huggingface(load_checkpoint(folder / "c.pt"), folder / "hf")
    files = {path.name: path.read_bytes() for path in sorted((folder / "hf").iterdir())}
    return {**files, "pytorch_model.bin": b"pickled", "trap.py": b"raise SystemExit('ran')"}


WANTED = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture
def hub(files):
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(address, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """Point this process's client, which read its environment long ago, to the server."""
    point_to(hub.address, monkeypatch)
    settings = {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_XET": False,
        "DOWNLOAD_CHUNK_SIZE": constants.DOWNLOAD_CHUNK_SIZE,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    close_session()
    yield hub
    close_session()


def failure(source, offline=False):
    with pytest.raises(UserError) as caught:
        resolve_model(source, offline)
    assert repr(source) in caught.value.problem
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    return caught.value


PROGRAM = """
import importlib, os
from huggingface_hub import constants
from ijepa.errors import UserError
from ijepa.hub import resolve_model
for offline in "010":
    os.environ["HF_HUB_OFFLINE"] = offline
    importlib.reload(constants)
    for source in ("someone/ijepa", "someone/unknown"):
        try:
            print(*resolve_model(source, False))
        except UserError as error:
            print(error.problem)
"""


def test_the_client_takes_server_cache_and_offline_mode_from_the_environment(hub, tmp_path):
    settings = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**others, **settings},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    first, unknown, second, uncached, third, _ = result.stdout.splitlines()
    assert first == second == third
    assert first.startswith(settings["HF_HOME"])
    assert first.endswith(f"{COMMIT} {COMMIT}")
    assert unknown == "the hub has no model 'someone/unknown'"
    assert uncached == "the hub model 'someone/unknown' is not, or not wholly, in the local cache"
    assert hub.downloads() == WANTED
    # The middle round was silent.
    asked = [path for _, path in hub.requests if "/revision/" in path]
    assert len(asked) == 4


def test_a_hub_id_gives_the_encoder_that_its_files_give_and_records_the_revision(here, tmp_path):
    from ijepa.encoders import load_huggingface_encoder

    images = [torch.arange(3 * 9 * 9, dtype=torch.uint8).reshape(3, 9, 9)]
    (tmp_path / "same").mkdir()
    for name in WANTED:
        (tmp_path / "same" / name).write_bytes(here.files[name])
    local, *loaded = (
        load_huggingface_encoder(source, torch.device("cpu"), torch.float32, False)
        for source in (str(tmp_path / "same"), "someone/ijepa", "someone/ijepa")
    )
    assert here.downloads() == WANTED
    for encoder in loaded:
        assert torch.equal(encoder.embed(images), local.embed(images))
        assert encoder.description["revision"] == COMMIT
        assert encoder.description["source"] == "someone/ijepa"
        assert encoder.description["sha256"] is None
    assert loaded[0].key == loaded[1].key


def test_only_configuration_processor_and_safetensors_are_downloaded(here):
    folder, revision = resolve_model("someone/ijepa", False)
    assert revision == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == WANTED
    assert here.downloads() == WANTED
    assert resolve_model("someone/ijepa", False) == (folder, COMMIT)
    assert here.downloads() == WANTED


def test_offline_asks_the_cache_alone(here):
    assert "cache" in failure("someone/ijepa", offline=True).problem
    assert here.requests == []
    folder = resolve_model("someone/ijepa", False)
    asked = len(here.requests)
    assert resolve_model("someone/ijepa", True) == folder
    assert len(here.requests) == asked


@pytest.mark.usefixtures("here")
def test_offline_with_a_part_of_the_files_is_a_user_error():
    folder, _ = resolve_model("someone/ijepa", False)
    (folder / "model.safetensors").unlink()
    assert "not wholly" in failure("someone/ijepa", offline=True).problem


def test_offline_by_the_environment_with_a_part_of_the_files_is_a_user_error(here, monkeypatch):
    folder, _ = resolve_model("someone/ijepa", False)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here.requests.clear()
    assert "not wholly" in failure("someone/ijepa").problem
    assert here.requests == []


@pytest.mark.usefixtures("here")
def test_a_server_that_is_gone_is_no_obstacle_once_the_model_is_cached(monkeypatch):
    found = resolve_model("someone/ijepa", False)
    point_to(unused_address(), monkeypatch)
    assert resolve_model("someone/ijepa", False) == found


def unused_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_cannot_be_reached_is_a_user_error(here, monkeypatch):
    point_to(unused_address(), monkeypatch)
    error = failure("someone/ijepa")
    assert "could not be downloaded" in error.problem
    assert "network" in error.hint
    assert here.requests == []


@pytest.mark.parametrize("endpoint", ["no-url", "http://", "ftp://127.0.0.1", "http://a b"])
@pytest.mark.usefixtures("here")
def test_an_address_of_the_hub_that_is_none_is_a_user_error(monkeypatch, endpoint):
    point_to(endpoint, monkeypatch)
    failure("someone/ijepa")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("source", "problem", "hint"),
    [
        ("someone/unknown", "the hub has no model", "spelling"),
        ("someone/private", "the hub has no model", "HF_TOKEN"),
        ("someone/gated", "gated", "access"),
        ("someone/halfgated", "gated", "access"),
        ("someone/broken", "500", "network"),
        ("someone/busy", "503", "network"),
        ("someone/forbidden", "403", "network"),
        ("no such/directory/at all", "neither a directory nor a hub id", "facebook/"),
        ("./missing", "neither a directory nor a hub id", "facebook/"),
        ("a" * 300, "too long", "directory"),
        ("a\0b", "neither a directory nor a hub id", "facebook/"),
    ],
)
def test_what_the_hub_refuses_is_a_user_error_that_says_why(source, problem, hint):
    error = failure(source)
    assert problem in error.problem
    assert hint in error.hint


@pytest.fixture
def patient(here, monkeypatch):
    """The client's own pauses between its attempts, noted and not waited for."""
    pauses = []
    for module in (file_download, _http):
        monkeypatch.setattr(module.time, "sleep", pauses.append)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    here.pauses = pauses
    return here


def reset(handler):
    """End the connection as a crashed server or a firewall does."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()


def broken_at(place):
    """Send so many bytes of each answer, then reset the connection."""

    def fault(handler, body, headers):
        if handler.command == "HEAD":
            return False
        handler.answer(200, body[:place], **{**headers, "Content_Length": len(body)})
        handler.wfile.flush()
        reset(handler)
        return True

    return fault


@pytest.mark.parametrize("share", [0, 1, 0.1, 0.5, 0.9, -1])
def test_a_reset_at_any_byte_is_a_user_error_and_the_next_run_does_the_rest(patient, share):
    body = patient.files["model.safetensors"]
    place = int(share * len(body)) if 0 < share < 1 else share % len(body)
    patient.fault = broken_at(place)
    error = failure("someone/ijepa")
    assert "could not be downloaded" in error.problem
    assert "run again" in error.hint
    patient.fault = None
    finished = patient.downloads()[:2]
    patient.requests.clear()
    folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == body
    assert finished == ["config.json", "model.safetensors"]
    assert "config.json" not in patient.downloads()


def starts(server):
    """First bytes of the parts that were asked for."""
    asked = [one["Range"] for one in server.headers if "Range" in one]
    return [int(re.fullmatch(r"bytes=(\d+)-\d+", one)[1]) for one in asked]


def unfinished(cache):
    return sorted(path.name for path in cache.rglob("*.incomplete"))


def test_a_download_goes_on_after_a_lost_connection(patient, monkeypatch, tmp_path):
    monkeypatch.setattr(hub_module, "PIECE", 100)
    body = patient.files["model.safetensors"]
    half = len(body) // 200 * 100

    def fault(handler, body, headers):
        if handler.command == "HEAD" or not handler.headers["Range"].startswith("bytes=0-"):
            return False
        handler.answer(200, body[:half], **{**headers, "Content_Length": len(body)})
        handler.close_connection = True
        return True

    patient.fault = fault
    folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == body
    assert starts(patient) == [0, half]
    assert not unfinished(tmp_path)


# Whoever is started in the background by a shell has SIGINT ignored, and its children too.
DOWNLOAD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ijepa.hub import resolve_model
print(*resolve_model("someone/ijepa", False))
"""


def start(hub, program, cache):
    """Another process with the client's own settings."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**others, **settings},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_run_downloaded_is_not_downloaded_again(here, tmp_path, by):
    body = random.Random(0).randbytes(3 * 10**6)
    here.files = {**here.files, "model.safetensors": body}
    release = threading.Event()

    def fault(handler, body, headers):
        if handler.command == "HEAD":
            return False
        handler.answer(200, body[: 25 * 10**5], **{**headers, "Content_Length": len(body)})
        handler.wfile.flush()
        release.wait(20)
        handler.close_connection = True
        return True

    here.fault = fault
    process = start(here, DOWNLOAD, tmp_path / "cache")
    kept = 25 * 10**5 // 2**16 * 2**16
    held = tmp_path / "cache/models--someone--ijepa/blobs" / f"{digest(body)}.incomplete"
    while not (held.exists() and held.stat().st_size >= kept):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(by)
    process.communicate(timeout=60)
    release.set()
    assert held.stat().st_size == kept
    assert starts(here) == [0]

    here.fault = None
    here.headers.clear()
    folder, _ = resolve_model("someone/ijepa", False)
    assert starts(here) == [kept]
    assert (folder / "model.safetensors").read_bytes() == body
    assert not unfinished(tmp_path)


@pytest.mark.slow
def test_a_download_that_is_killed_25_times_goes_on_25_times(here, tmp_path):
    rng = random.Random(0)
    body = rng.randbytes(10**8)
    here.files = {**here.files, "model.safetensors": body}
    name = digest(body)

    def fault(handler, body, headers):
        if handler.command == "HEAD":
            return False
        first = starts(handler.server)[-1]
        span = f"bytes {first}-{len(body) - 1}/{len(body)}"
        headers = {**headers, "Content_Length": len(body) - first, "Content_Range": span}
        with contextlib.suppress(ConnectionError):
            handler.answer(206, **headers)
            for place in range(first, len(body), 2**20):
                time.sleep(0.02)
                handler.wfile.write(body[place : place + 2**20])
        handler.close_connection = True
        return True

    here.fault = fault
    held = tmp_path / "cache/models--someone--ijepa/blobs" / f"{name}.incomplete"
    sizes = [0]
    for _ in range(25):
        process = start(here, DOWNLOAD, tmp_path / "cache")
        while not held.exists() or held.stat().st_size <= sizes[-1]:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        sizes.append(held.stat().st_size)
    here.fault = None
    folder, _ = resolve_model("someone/ijepa", False)
    assert starts(here) == sizes
    assert (folder / "model.safetensors").read_bytes() == body
    assert not unfinished(tmp_path)


def test_of_two_runs_at_once_one_downloads_and_both_have_the_files(hub, tmp_path):
    waiting = threading.Semaphore(0)

    def fault(handler, *_):
        if handler.command == "HEAD":
            waiting.release()
        else:
            for _ in range(2):
                assert waiting.acquire(timeout=20)  # both have come as far as the lock
        return False

    hub.fault = fault
    runs = [start(hub, DOWNLOAD, tmp_path / "cache") for _ in range(2)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert hub.downloads().count("model.safetensors") == 1


@pytest.mark.parametrize("lacking", ["ETag", "Content_Length"])
def test_a_server_that_says_too_little_is_left_to_the_client(patient, lacking):
    body = patient.files["model.safetensors"]

    def fault(handler, body, headers):
        if handler.command == "GET":
            return False
        headers = {**headers, "Content_Length": len(body)}
        handler.send_response(200)
        for name in headers.keys() - {lacking}:
            handler.send_header(name.replace("_", "-"), str(headers[name]))
        handler.end_headers()
        return True

    patient.fault = fault
    if lacking == "ETag":
        assert "etag" in failure("someone/ijepa").problem.lower()
    else:
        folder, _ = resolve_model("someone/ijepa", False)
        assert (folder / "model.safetensors").read_bytes() == body
    assert starts(patient) == []


def test_a_cache_of_an_older_client_is_enough_without_a_network(here, tmp_path):
    folder, _ = resolve_model("someone/ijepa", False)
    shutil.rmtree(folder.parents[1] / "trees")
    here.address = unused_address()
    output, _ = start(here, DOWNLOAD, tmp_path / "cache").communicate()
    assert output.split() == [str(folder), COMMIT]


def test_files_in_subfolders_are_not_downloaded(here):
    here.files = {
        **here.files,
        **dict.fromkeys(["a/m.safetensors", "a/m.safetensors.index.json"], b""),
    }
    found = resolve_model("someone/ijepa", False)
    assert here.downloads() == WANTED
    assert resolve_model("someone/ijepa", True) == found


@pytest.fixture
def begun(patient, monkeypatch, tmp_path):
    """A cache with the first half of the weights, as a broken download leaves it."""
    monkeypatch.setattr(hub_module, "PIECE", 100)
    body = patient.files["model.safetensors"]
    half = len(body) // 200 * 100

    def fault(handler, body, headers):
        if handler.command == "HEAD":
            return False
        if handler.headers["Range"].startswith("bytes=0-"):
            handler.answer(200, body[:half], **{**headers, "Content_Length": len(body)})
            handler.close_connection = True
        else:
            reset(handler)
        return True

    patient.fault = fault
    assert "run again" in failure("someone/ijepa").hint
    patient.fault = None
    patient.headers.clear()
    patient.partial = tmp_path / f"cache/models--someone--ijepa/blobs/{digest(body)}.incomplete"
    assert patient.partial.read_bytes() == body[:half]
    return patient


def finishes(server):
    folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert not unfinished(server.partial.parent)


def test_a_broken_download_goes_on_from_its_last_byte(begun):
    place = begun.partial.stat().st_size
    finishes(begun)
    assert starts(begun) == [place]


def test_a_file_system_that_knows_no_locks_is_no_obstacle(begun, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.utils, "WeakFileLock", lambda *_, **__: contextlib.nullcontext()
    )
    place = begun.partial.stat().st_size
    finishes(begun)
    assert starts(begun) == [place]


def test_a_broken_download_goes_on_on_another_host_without_the_token(begun, files, monkeypatch):
    other = Hub(files)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place = begun.partial.stat().st_size

    def fault(handler, *_):
        if handler.command == "HEAD":
            return False
        handler.answer(302, Location=f"http://localhost:{other.server_port}{handler.path}")
        return True

    begun.fault = fault
    try:
        finishes(begun)
    finally:
        other.shutdown()
        other.server_close()
        thread.join()
    assert starts(begun) == starts(other) == [place]
    assert TOKEN in str([one for one in begun.headers if "Range" in one])
    assert TOKEN not in str(other.headers)


def test_a_server_that_knows_no_ranges_begins_anew(begun):
    def fault(handler, body, headers):
        handler.answer(200, body, **headers)
        return True

    begun.fault = fault
    finishes(begun)


def test_a_server_that_refuses_ranges_is_asked_for_the_whole_in_the_next_run(begun):
    def fault(handler, *_):
        if handler.headers.get("Range", "bytes=0-").startswith("bytes=0-"):
            return False
        handler.answer(416)
        return True

    begun.fault = fault
    assert "416" in failure("someone/ijepa").problem
    finishes(begun)


def test_a_file_that_only_lacks_its_name_is_not_asked_for(begun):
    begun.partial.write_bytes(begun.files["model.safetensors"])
    finishes(begun)
    assert starts(begun) == []


@pytest.mark.parametrize("change", ["first byte", "all", "more"])
def test_a_beginning_that_does_not_fit_is_thrown_away(begun, change):
    held, body = begun.partial.read_bytes(), begun.files["model.safetensors"]
    changed = {"first byte": b"?" + held[1:], "all": bytes(len(body)), "more": body + b"?"}[change]
    begun.partial.write_bytes(changed)
    if change != "more":
        with pytest.raises(UserError, match="does not have the hash") as caught:
            resolve_model("someone/ijepa", False)
        assert "run again" in caught.value.hint
        assert not unfinished(begun.partial.parent)
    finishes(begun)


def test_the_beginning_of_another_version_is_neither_used_nor_kept(begun):
    body = begun.files["model.safetensors"]
    begun.files = {**begun.files, "model.safetensors": body[:-1] + b"?"}
    others = [begun.partial.with_name(f"{name}.incomplete") for name in ("held", "a.clients")]
    locks = begun.partial.parents[2] / ".locks" / "models--someone--ijepa"
    for other in others:
        other.touch()
    with WeakFileLock(locks / "held.lock"):
        folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == begun.files["model.safetensors"]
    assert starts(begun) == [0]
    assert unfinished(begun.partial.parent) == ["a.clients.incomplete", "held.incomplete"]


def test_a_full_disk_is_a_user_error_and_the_next_run_goes_on(begun):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = begun.partial.stat().st_size + 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        error = failure("someone/ijepa")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error.problem
    assert "disk" in error.hint
    begun.headers.clear()
    finishes(begun)
    assert starts(begun) == [room]


def test_a_server_that_falls_silent_is_a_user_error(patient):
    release = threading.Event()

    def fault(handler, body, headers):
        if handler.command == "HEAD":
            return False
        handler.answer(200, body[:100], **{**headers, "Content_Length": len(body)})
        handler.wfile.flush()
        release.wait(20)
        return True

    patient.fault = fault
    try:
        assert "could not be downloaded" in failure("someone/ijepa").problem
    finally:
        release.set()


@pytest.mark.parametrize("length", [10, 10**6])
def test_a_length_that_is_wrong_is_a_user_error(patient, length):
    def fault(handler, body, headers):
        handler.answer(200, body[:length], **{**headers, "Content_Length": length})
        handler.close_connection = True
        return True

    patient.fault = fault
    check_model_files_fails("someone/ijepa")


def check_model_files_fails(source):
    """The download is refused, or what came is refused before it is read."""
    try:
        folder, _ = resolve_model(source, False)
    except UserError as error:
        return error
    with pytest.raises(UserError) as caught:
        check_model_files(folder, source)
    return caught.value


def test_weights_that_do_not_have_their_hash_are_not_kept(patient, tmp_path):
    def fault(handler, body, headers):
        changed = bytearray(body)
        changed[-1] ^= 1
        handler.answer(200, bytes(changed), **headers)
        return True

    patient.fault = fault
    with pytest.raises(UserError, match="does not have the hash the hub gave"):
        resolve_model("someone/ijepa", False)
    name = digest(patient.files["model.safetensors"])
    assert [path.suffix for path in tmp_path.rglob(f"{name}*")] == [".lock"]
    patient.fault = None
    folder, _ = resolve_model("someone/ijepa", False)
    check_model_files(folder, "someone/ijepa")


def test_a_file_that_lost_its_hash_is_refused_until_it_is_deleted(here):
    folder, _ = resolve_model("someone/ijepa", False)
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="does not have the hash the hub gave") as caught:
        check_model_files(folder, "someone/ijepa")
    assert blob == Path(caught.value.hint.split()[1])
    blob.unlink()
    folder, _ = resolve_model("someone/ijepa", False)
    check_model_files(folder, "someone/ijepa")
    assert here.downloads().count("model.safetensors") == 2


def test_small_files_are_checked_against_gits_hash(here):
    def fault(handler, body, headers):
        name = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        handler.answer(200, body, **{**headers, "ETag": f'"{name}"'})
        return True

    here.fault = fault
    folder, _ = resolve_model("someone/ijepa", False)
    check_model_files(folder, "someone/ijepa")
    blob = (folder / "model.safetensors").resolve()
    assert len(blob.name) == 40
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="does not have the hash"):
        check_model_files(folder, "someone/ijepa")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_after_the_time_it_names(patient, status):
    refused = []

    def fault(handler, *_):
        if len(refused) == 2:
            return False
        refused.append(status)
        handler.answer(status, Retry_After="7")
        return True

    patient.fault = fault
    folder, _ = resolve_model("someone/ijepa", False)
    check_model_files(folder, "someone/ijepa")
    assert 8.0 in patient.pauses  # a second more than was asked for


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418, 429, 500, 503])
def test_a_server_that_never_gives_the_file_is_a_user_error(patient, status):
    def fault(handler, *_):
        handler.answer(status, Retry_After="1")
        return True

    patient.fault = fault
    failure("someone/ijepa")
    assert len(patient.pauses) < 50


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "//", "http://a b/", "javascript:x"],
)
def test_a_redirect_to_a_file_or_to_nowhere_is_a_user_error(patient, target):
    def fault(handler, *_):
        handler.answer(302, Location=target)
        return True

    patient.fault = fault
    check_model_files_fails("someone/ijepa")


def test_a_redirect_in_a_circle_is_a_user_error(patient):
    def fault(handler, *_):
        handler.answer(302, Location=handler.path)
        return True

    patient.fault = fault
    failure("someone/ijepa")


TOKEN = "hf_" + "SeCrEt" * 6


@pytest.mark.parametrize("statuses", [(302, 302), (307, 307), (308, 302)])
def test_a_token_stays_with_its_host_and_is_written_nowhere(patient, files, tmp_path, statuses):
    other = Hub(files)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    os.environ["HF_TOKEN"] = TOKEN

    def fault(handler, body, headers):
        status = statuses[handler.command == "GET"]
        # Another name of this machine is another host, as a store of large files is.
        place = f"http://localhost:{other.server_port}{handler.path}"
        linked = {"X_Linked_ETag": headers["ETag"], "X_Linked_Size": len(body)}
        handler.answer(status, Location=place, X_Repo_Commit=COMMIT, **linked)
        return True

    patient.fault = fault
    try:
        folder, _ = resolve_model("someone/ijepa", False)
        check_model_files(folder, "someone/ijepa")
    finally:
        del os.environ["HF_TOKEN"]
        other.shutdown()
        other.server_close()
        thread.join()
    given = [one.get("Authorization", one.get("authorization")) for one in patient.headers]
    assert f"Bearer {TOKEN}" in given
    assert other.requests
    assert TOKEN not in str(other.headers)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"[]", b"3", b'{"id": 3}', b"{}"])
@pytest.mark.usefixtures("here")
def test_an_answer_that_is_no_listing_is_a_user_error(monkeypatch, body):
    monkeypatch.setattr(HubHandler, "answer_json", lambda handler, _: handler.answer(200, body))
    assert "could not be downloaded" in failure("someone/ijepa").problem


@pytest.mark.parametrize("part", ["sha", "name", "etag", "quoted", "commit", "tree"])
@pytest.mark.parametrize("ups", [0, 3, 4])
def test_names_that_a_server_makes_up_lead_nowhere_outside_the_cache(here, tmp_path, part, ups):
    away = "../" * ups + "evil" if ups else str(tmp_path / "evil")
    if part == "name":
        here.files = {**here.files, f"{away}.safetensors": here.files["model.safetensors"]}
    if part == "sha":
        here.commit = away
    if part == "tree":
        here.tree = {"lfs": {"oid": f"{away}/x", "size": 9, "pointerSize": 9}, "xetHash": 64 * "0"}

    def fault(handler, body, headers):
        changes = {
            "etag": {"ETag": f'"{away}"'},
            "quoted": {"ETag": f'W"{away}"'},
            "commit": {"X_Repo_Commit": away},
        }
        handler.answer(200, body, **{**headers, **changes.get(part, {})})
        return True

    here.fault = fault
    before = set(tmp_path.parent.iterdir())
    with contextlib.suppress(UserError):
        resolve_model("someone/ijepa", False)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert set(tmp_path.parent.iterdir()) == before


def test_a_hash_in_base64_is_as_good_as_any(here, monkeypatch):
    def answer(handler, content):
        handler.answer(200, json.dumps(content).encode(), ETag='W/"1f-a/b+c=="')

    monkeypatch.setattr(HubHandler, "answer_json", answer)
    assert resolve_model("someone/ijepa", False)[1] == COMMIT
    assert here.downloads() == WANTED


def endless(handler, status=200, **headers):
    """Send 128 MB, which is endless here, unless the client hangs up."""
    handler.send_response(status)
    for name, value in {"Transfer_Encoding": "chunked", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.close_connection = True
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(2**11):
            handler.wfile.write(piece)
            handler.server.sent += 2**16
        handler.wfile.write(b"0\r\n\r\n")


@functools.cache
def compressed_zeros():
    return gzip.compress(bytes(2**27))


def bomb(handler, **headers):
    with contextlib.suppress(ConnectionError):
        handler.answer(200, compressed_zeros(), Content_Encoding="gzip", **headers)


def pages(handler):
    """Lists that name a next one, each of them short enough; 128 of them are endless here."""
    entries = [{"type": "file", "path": "a" * 2**16, "size": 1, "oid": ""} for _ in range(16)]
    body = json.dumps(entries).encode()
    handler.server.sent += len(body)
    link = f'<{handler.server.address}{handler.path}>; rel="next"'
    handler.answer(200, body, **({"Link": link} if handler.server.sent < 2**27 else {}))


@pytest.fixture
def held(patient, tmp_path):
    """Bytes that this process takes at most, and those of the files that it keeps."""
    patient.sent = 0
    compressed_zeros()  # the server's own memory does not count
    tracemalloc.start()
    yield lambda: (
        tracemalloc.get_traced_memory()[1],
        sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()),
    )
    tracemalloc.stop()


SENT_MORE = "sends more than 16,777,216 bytes"


@pytest.mark.parametrize(
    "answer",
    [
        endless,
        bomb,
        pages,
        lambda handler: endless(handler, 500),
        lambda handler: endless(handler, 302, Location="/elsewhere"),
    ],
    ids=["endless", "bomb", "pages", "error", "redirect"],
)
def test_a_list_that_is_too_long_is_a_user_error(patient, monkeypatch, held, answer):
    listing = HubHandler.answer_json

    def answer_json(handler, content):
        if answer is pages and "/tree/" not in handler.path:
            listing(handler, content)
        else:
            answer(handler)

    monkeypatch.setattr(HubHandler, "answer_json", answer_json)
    with pytest.raises(UserError, match=SENT_MORE) as caught:
        resolve_model("someone/ijepa", False)
    assert "HF_ENDPOINT" in caught.value.hint
    memory, kept = held()
    assert memory < 3 * 2**24
    assert kept < 2**24
    assert patient.sent < 2**26


PEAK = """
import re
from pathlib import Path
from ijepa.errors import UserError
from ijepa.hub import resolve_model
import huggingface_hub.hf_api

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")
before = peak()
try:
    resolve_model("someone/ijepa", False)
except UserError as error:
    print((peak() - before) // 1024, error.problem)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of the process")
def test_a_list_that_is_just_short_enough_takes_less_than_half_a_gigabyte(
    hub, monkeypatch, tmp_path
):
    entry = b'{"":0}'  # of all that was tried, what JSON makes most of
    count = (2**24 - 2**12) // (len(entry) + 1)
    body = b"[" + b",".join([entry] * count) + b"]"
    monkeypatch.setattr(HubHandler, "answer_json", lambda handler, _: handler.answer(200, body))
    result, _ = start(hub, PEAK, tmp_path).communicate()
    mebibytes, problem = result.split(" ", 1)
    assert "could not be downloaded" in problem
    assert 2**8 < int(mebibytes) < 2**9


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("answer", [endless, bomb])
def test_a_file_that_is_longer_than_announced_is_a_user_error(
    patient, monkeypatch, held, name, answer
):
    answer_file = HubHandler.answer_file

    def answer_longer(handler, model, asked):
        if asked != name or handler.command == "HEAD":
            answer_file(handler, model, asked)
        else:
            answer(handler, ETag='"x"')

    monkeypatch.setattr(HubHandler, "answer_file", answer_longer)
    size = len(patient.files[name]) if name == "model.safetensors" else 2**24
    with pytest.raises(UserError, match=f"sends more than {size:,} bytes"):
        resolve_model("someone/ijepa", False)
    memory, kept = held()
    assert memory < 4 * 2**24
    assert kept < 2**24
    assert patient.sent < 2**26


@pytest.mark.parametrize("status", [302, 500])
def test_no_answer_but_a_file_is_as_long_as_a_file(patient, held, status):
    def fault(handler, _, headers):
        if handler.command == "HEAD":
            handler.answer(200, **headers, X_Linked_Size=2**30)
        else:
            endless(handler, status, Location="/elsewhere")
        return True

    patient.fault = fault
    with pytest.raises(UserError, match="500|" + SENT_MORE):
        resolve_model("someone/ijepa", False)
    memory, _ = held()
    assert memory < 3 * 2**24
    assert patient.sent < 2**26


def test_every_model_has_the_whole_allowance(here, monkeypatch):
    monkeypatch.setattr(hub_module, "LARGEST_ANSWERS", 2000)
    for _ in range(5):
        resolve_model("someone/ijepa", False)
    monkeypatch.setattr(hub_module, "LARGEST_ANSWERS", 200)
    with pytest.raises(UserError, match="sends more than 200 bytes"):
        resolve_model("someone/ijepa", False)
    assert here.downloads() == WANTED


def test_a_directory_is_taken_before_the_hub(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "ijepa").mkdir(parents=True)
    assert resolve_model("someone/ijepa", False) == (Path("someone/ijepa"), None)
    assert here.requests == []
    shutil.rmtree("someone")
