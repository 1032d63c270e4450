import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.errors import UserError
from ijepa.huggingface import export_huggingface, resolve_model
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
        self.cut = False
        self.address = f"http://127.0.0.1:{self.server_port}"

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
        for name, value in {"Content-Length": len(body), **headers}.items():
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
        for name, (status, code) in STATUS.items():
            if name in path:
                self.answer(status, **({"X_Error_Code": code} if code else {}))
                return
        files = self.server.files
        # The page of a gated model can be read by all; its files cannot.
        model = "someone/halfgated" if "halfgated" in path else "someone/ijepa"
        if path == f"/api/models/{model}/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": model, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{model}/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": digest(body)[:40]}
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
        if self.server.cut and self.command == "GET" and name.endswith(".safetensors"):
            self.answer(200, body[: len(body) // 2], **{**headers, "Content_Length": len(body)})
            self.close_connection = True
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
from ijepa.huggingface import resolve_model
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


def test_a_download_that_breaks_off_is_a_user_error_and_goes_on_next_time(here, monkeypatch):
    from huggingface_hub import file_download

    # The client's own pauses between its attempts, without the waiting.
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    here.cut = True
    assert "could not be downloaded" in failure("someone/ijepa").problem
    here.cut = False
    folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == here.files["model.safetensors"]


def test_a_directory_is_taken_before_the_hub(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "ijepa").mkdir(parents=True)
    assert resolve_model("someone/ijepa", False) == (Path("someone/ijepa"), None)
    assert here.requests == []
    shutil.rmtree("someone")
