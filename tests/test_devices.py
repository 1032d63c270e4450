import pytest
import torch

from ijepa.devices import can_compile, choose_device, choose_dtype, has_bfloat16
from ijepa.errors import UserError


def test_auto_takes_an_accelerator_where_there_is_one():
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = choose_device("auto").type
    assert found == next((name for name, is_here in present.items() if is_here), "cpu")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:", "cpu:1", "cuda:99", "cuda:-1", "CPU", "mps:7"])
def test_a_device_that_is_not_here_is_a_user_error_that_lists_those_that_are(name):
    with pytest.raises(UserError, match="is not available") as caught:
        choose_device(name)
    assert repr(name) in caught.value.problem
    assert "cpu" in caught.value.hint


def test_float32_is_not_rounded_to_tf32_on_a_gpu():
    products = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for kind in products:
        kind.allow_tf32 = True
    choose_device("cpu")
    assert not any(kind.allow_tf32 for kind in products)


def test_number_formats_follow_their_names_and_auto_the_hardware():
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    automatic = torch.bfloat16 if has_bfloat16(cpu) else torch.float32
    assert choose_dtype("auto", cpu) == automatic
    assert choose_dtype("auto", cpu, 100_000_000) == automatic
    assert choose_dtype("auto", cpu, 99_999_999) == torch.float32
    assert choose_dtype("bfloat16", cpu, 10) == torch.bfloat16
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"bf16": True}, True),  # ARM
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
    ],
)
def test_bfloat16_is_chosen_where_its_products_are_faster(monkeypatch, able, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert has_bfloat16(torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"programs": {"clang"}}, True),
        ({"cc": "/opt/mine/cc", "programs": {"/opt/mine/cc"}}, True),
        ({"triton": False}, False),
        ({"headers": False}, False),
        ({"capability": (6, 1)}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_blocks_are_compiled_where_triton_can_build(monkeypatch, tmp_path, change, expected):
    usual = {"device": "cuda", "triton": True, "programs": {"gcc"}, "cc": None, "headers": True}
    facts = {**usual, "capability": (9, 0), **change}
    if facts["headers"]:
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    if facts["cc"]:
        monkeypatch.setenv("CC", facts["cc"])
    monkeypatch.setattr("ijepa.devices.find_spec", {"triton": facts["triton"] or None}.get)
    monkeypatch.setattr("shutil.which", lambda name: name if name in facts["programs"] else None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: facts["capability"])
    assert can_compile(torch.device(facts["device"])) is expected
