import contextlib
import gzip
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

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


def ranges(server):
    asked = [one.get("Range", one.get("range", "bytes=0-")) for one in server.headers]
    return [one for one in asked if one != "bytes=0-"]


def test_a_download_goes_on_after_a_lost_connection(patient, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # instead of 10 MB
    body = patient.files["model.safetensors"]
    half = len(body) // 200 * 100

    def fault(handler, body, headers):
        if handler.command == "HEAD" or "Range" in handler.headers:
            return False
        handler.answer(200, body[:half], **{**headers, "Content_Length": len(body)})
        handler.close_connection = True
        return True

    patient.fault = fault
    folder, _ = resolve_model("someone/ijepa", False)
    assert (folder / "model.safetensors").read_bytes() == body
    assert ranges(patient) == [f"bytes={half}-"]


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


def test_a_file_that_does_not_have_its_hash_is_refused_until_it_is_deleted(patient):
    def fault(handler, body, headers):
        changed = bytearray(body)
        changed[-1] ^= 1
        handler.answer(200, bytes(changed), **headers)
        return True

    patient.fault = fault
    for _ in range(2):
        folder, _ = resolve_model("someone/ijepa", False)
        with pytest.raises(UserError, match="does not have the hash the hub gave") as caught:
            check_model_files(folder, "someone/ijepa")
        patient.fault = None
    blob = Path(caught.value.hint.split()[1])
    assert blob == (folder / "model.safetensors").resolve()
    blob.unlink()
    folder, _ = resolve_model("someone/ijepa", False)
    check_model_files(folder, "someone/ijepa")


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


@pytest.mark.parametrize("part", ["sha", "name", "etag", "commit"])
@pytest.mark.parametrize("ups", [0, 3, 4])
def test_names_that_a_server_makes_up_lead_nowhere_outside_the_cache(here, tmp_path, part, ups):
    away = "../" * ups + "evil" if ups else str(tmp_path / "evil")
    if part == "name":
        here.files = {**here.files, f"{away}.safetensors": here.files["model.safetensors"]}
    if part == "sha":
        here.commit = away

    def fault(handler, body, headers):
        changes = {"etag": {"ETag": f'"{away}"'}, "commit": {"X_Repo_Commit": away}}
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


@pytest.mark.parametrize("of", ["file", "listing"])
def test_an_answer_that_grows_on_reading_is_a_user_error(patient, monkeypatch, of):
    bomb = gzip.compress(bytes(10**8))

    def fault(handler, _, headers):
        if handler.command == "HEAD" and of == "file":
            return False
        handler.answer(200, bomb, **{**headers, "Content_Encoding": "gzip"})
        return True

    patient.fault = fault
    if of == "listing":
        monkeypatch.setattr(
            HubHandler, "answer_json", lambda handler, _: fault(handler, b"", {"ETag": '"x"'})
        )
    check_model_files_fails("someone/ijepa")


def test_a_directory_is_taken_before_the_hub(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "ijepa").mkdir(parents=True)
    assert resolve_model("someone/ijepa", False) == (Path("someone/ijepa"), None)
    assert here.requests == []
    shutil.rmtree("someone")
