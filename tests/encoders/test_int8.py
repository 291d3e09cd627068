"""Products of stored int8 weights become integer products; everything else stays as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from appliance.encoders.int8 import multiplies_int8, with_int8_products

FLOAT, INT8 = 1, 3


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def _number(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def _field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, values: Any, kind: int) -> bytes:
    shape = b"".join(_number(1, size) for size in values.shape)
    return shape + _number(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def node(kind: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    return names + _field(2, output.encode()) + _field(4, kind.encode()) + attributes


def value(name: str, *shape: str | int) -> bytes:
    sizes = b"".join(_field(1, _number(1, one) if isinstance(one, int) else _field(2, one.encode())) for one in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, FLOAT) + _field(2, sizes)))


def model(scale_shape: tuple[int, ...]) -> bytes:
    chance = np.random.default_rng(0)
    weights = chance.integers(-127, 128, (64, 32)).astype(np.int8)
    scale = (chance.random(scale_shape) / 50).astype(np.float32)
    bias = chance.normal(size=32).astype(np.float32)
    to_float = _field(5, _field(1, b"to") + _number(3, FLOAT) + _number(20, 2))
    nodes = [
        node("Cast", ["q"], "f", to_float),
        node("Mul", ["f", "s"], "w"),
        node("MatMul", ["x", "w"], "product"),
        node("Add", ["bias", "product"], "sum"),
        node("Relu", ["sum"], "y"),
    ]
    tensors = [tensor("q", weights, INT8), tensor("s", scale, FLOAT), tensor("bias", bias, FLOAT)]
    graph = b"".join(_field(1, one) for one in nodes) + _field(2, b"g") + b"".join(_field(5, one) for one in tensors)
    graph += _field(11, value("x", "rows", 64)) + _field(12, value("y", "rows", 32))
    return _number(1, 8) + _field(7, graph) + _field(8, _number(2, 17))


def computed(raw: bytes, rows: Any) -> Any:
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": rows})[0]


@pytest.mark.parametrize("scale_shape", [(1, 32), (32,), (1,), ()])
def test_integer_products_give_nearly_what_the_floats_gave(scale_shape: tuple[int, ...]) -> None:
    raw = model(scale_shape)
    changed = with_int8_products(raw)
    assert b"DynamicQuantizeMatMul" in changed
    rows = np.random.default_rng(1).normal(size=(20, 64)).astype(np.float32)
    expected, found = computed(raw, rows), computed(changed, rows)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert with_int8_products(changed) == changed


def test_scales_of_rows_are_left_alone() -> None:
    raw = model((64, 1))
    assert with_int8_products(raw) == raw


@pytest.mark.parametrize("raw", [b"\x3a\xff", b"\x0b", b"\x08"])
def test_what_is_no_model_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no ONNX model"):
        with_int8_products(raw)


@pytest.mark.parametrize(("line", "able"), [("flags\t: fpu avx2 avx512_vnni", True), ("flags\t: fpu avx2", False)])
def test_the_processor_tells_whether_it_multiplies_int8(tmp_path: Path, line: str, able: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert multiplies_int8(tmp_path / "cpuinfo") is able
    assert not multiplies_int8(tmp_path / "none")
