"""A whole run that dies at its first socket, in Python or below it."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_" + "SeCrEt" * 6

# Numbers of socket and socketpair in the kernel, and of the machine in its filters.
KERNEL = {"x86_64": (0xC000003E, 41, 53), "aarch64": (0xC00000B7, 198, 199)}
HERE = KERNEL.get(platform.machine()) if sys.platform == "linux" else None

GUARD = """
import ctypes, os, runpy, struct, sys

KERNEL = {kernel}

def forbid(event, arguments):
    if event.startswith(("socket.__new__", "socket.connect", "socket.get", "socket.sendto")):
        if event != "socket.gethostname":
            os.write(2, f"{{event}} {{arguments}}".encode())
            os._exit(99)  # an exception could be caught

if {python}:
    sys.addaudithook(forbid)
if KERNEL:
    machine, *calls = KERNEL
    ALLOW, KILL, RETURN, LOAD, EQUAL = 0x7FFF0000, 0x80000000, 0x06, 0x20, 0x15
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    rules += [rule for call in calls for rule in ((EQUAL, 0, 1, call), (RETURN, 0, 0, KILL))]
    rules += [(RETURN, 0, 0, ALLOW)]
    # The kernel's struct sock_filter and struct sock_fprog.
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    code = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(rules), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for option in ((38, 1, 0, 0, 0), (22, 2, program, 0, 0)):
        if libc.prctl(*option):
            sys.exit(f"prctl: {{os.strerror(ctypes.get_errno())}}")

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def guarded(*command, python=True, before=(), **environment):
    code = GUARD.format(kernel=HERE, python=python)
    # Neither the suite's own settings, nor a name that spares the interpreter a look-up.
    hidden = {"HF_HUB_OFFLINE", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"}
    hidden |= {"TORCHINDUCTOR_CACHE_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [*before, sys.executable, "-c", code, *map(str, command)],
        env={**kept, "HF_TOKEN": TOKEN, **environment},
        capture_output=True,
        text=True,
        check=False,
        umask=0o077,
    )


@pytest.mark.parametrize("python", [True, False], ids=["in Python", "in the kernel"])
def test_the_guard_ends_a_program_at_its_first_socket(tmp_path, python):
    if not python and not HERE:
        pytest.skip("needs Linux to filter system calls")
    calls = ["socket()", "getaddrinfo('name.invalid', 80)"]
    for call in calls if python else [*calls, "socketpair()"]:  # Python reports no pairs
        (tmp_path / "program.py").write_text(f"import socket\nsocket.{call}\nprint('went on')\n")
        result = guarded(tmp_path / "program.py", python=python)
        assert "went on" not in result.stdout
        assert result.returncode == (99 if python else -signal.SIGSYS)


def test_an_offline_run_opens_no_socket_and_needs_nothing_of_its_surroundings(tmp_path):
    """No standard output or display, an absent backend, no UTF-8, no writable cache."""
    classes = ["gr\u00f6\u00dfe", "\u540d\u524d"]
    for name in classes:
        (tmp_path / "in" / name).mkdir(parents=True)
        for row in range(4):
            Image.effect_noise((9 + row, 16), 99).save(tmp_path / "in" / name / f"{row}.png")
    (tmp_path / ".cache").touch()
    environment = {"MPLBACKEND": "that of a notebook", "DISPLAY": ""}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "HOME": str(tmp_path)}
    environment |= {"HF_HOME": str(tmp_path / ".cache" / "below a file")}
    environment |= {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # which has the list of fonts
    script = ROOT / "scripts" / "compare_embeddings.py"
    flags = ["--offline", "--dataset", tmp_path / "in", "--output-dir", "~/out"]
    result = guarded(script, *flags, before=["sh", "-c", 'exec "$@" >&-', "sh"], **environment)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["dataset"]["classes"] == classes
    assert any("/out/.cache" in caveat for caveat in content["caveats"])
    assert TOKEN not in result.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", ".cache"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.stat().st_mode & 0o077]
