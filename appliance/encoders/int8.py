"""Encoders whose weights are stored in int8 are computed in int8, where the processor multiplies such numbers at once.

Such a file holds its weights as `Cast(int8) x scale`. The run time multiplies them out to floats when it loads: small
on disk, and no quicker. Here each product of that kind becomes one `DynamicQuantizeMatMul` of the run time's own, which
brings the other side to int8 as well, by the largest number in it.

Measured with all-minilm-l6-v2 on one thread of a processor with AVX-512 VNNI: 560 texts a second instead of 228. Heads
on its vectors are as good (0.894 on banking77 with either). A text's vector then depends a little on what it is
computed together with: alone and in a batch it has a cosine of 0.995 with itself.

`onnxruntime.quantization` could do this too, but needs the `onnx` package, which is not installed, and weights in
floats. The few messages of onnx.proto3 that are read or changed are declared below; protobuf, which the run time brings
along, keeps all other fields as they are.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_FLOAT: Final = 1
_INT8: Final = 3
_RUN_TIME_DOMAIN: Final = "com.microsoft"
"""The domain of the run time's own operators."""
_INT8_PRODUCT_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
"""Processors without one of these add such products up in 16 bits and lose the large ones."""

Messages = Mapping[str, Any]
"""Nodes or tensors of a graph by name; protobuf's classes are made while the program runs."""

_MESSAGES: Final[Mapping[str, tuple[tuple[str, int, str], ...]]] = {
    "OperatorSetIdProto": (("domain", 1, "string"), ("version", 2, "int64")),
    "NodeProto": (("input", 1, "string*"), ("output", 2, "string*"), ("op_type", 4, "string"), ("domain", 7, "string")),
    "TensorProto": (("dims", 1, "int64*"), ("data_type", 2, "int32"), ("name", 8, "string"), ("raw_data", 9, "bytes")),
    "GraphProto": (("node", 1, "NodeProto*"), ("initializer", 5, "TensorProto*")),
    "ModelProto": (("graph", 7, "GraphProto"), ("opset_import", 8, "OperatorSetIdProto*")),
}
"""Field name, number and type of each message of onnx.proto3 that is read here; `*` for repeated fields."""


def multiplies_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products of int8."""
    try:
        text = cpuinfo.read_text("ascii", "replace")
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return not _INT8_PRODUCT_FLAGS.isdisjoint(line.split())


def with_int8_products(model: bytes) -> bytes:
    """The same model with its products in int8, or as it is where nothing in it is stored so.

    Raises ValueError for bytes that are no ONNX model.
    """
    parsed = _model_class()()
    try:
        parsed.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(f"the file is no ONNX model: {error}") from error
    if not _replace_products(parsed.graph):
        return model
    parsed.opset_import.add(domain=_RUN_TIME_DOMAIN, version=1)
    written: bytes = parsed.SerializeToString()
    return written


def _replace_products(graph: Any) -> bool:
    """Change the graph's products in place; whether there were any."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    adds = {name: place for place, node in enumerate(graph.node) if node.op_type == "Add" for name in node.input}
    merged: list[int] = []
    """Places of the additions that become a part of their product."""
    changed = False
    for node in graph.node:
        stored = _find_stored_weights(node, makers, tensors) if node.op_type == "MatMul" else None
        if stored is None:
            continue
        (output,) = node.output
        add = adds.get(output) if uses[output] == 1 else None
        bias = None if add is None else _find_bias(graph.node[add], output, tensors)
        scale = _add_scale(graph, f"{output} scale", stored[1])
        node.op_type, node.domain = "DynamicQuantizeMatMul", _RUN_TIME_DOMAIN
        node.input[:] = [node.input[0], stored[0].name, scale, *(() if bias is None else ("", bias))]
        if add is not None and bias is not None:
            node.output[:] = graph.node[add].output
            merged.append(add)
        changed = True
    for place in sorted(merged, reverse=True):
        del graph.node[place]
    return changed


def _find_stored_weights(node: Any, makers: Messages, tensors: Messages) -> tuple[Any, Any] | None:
    """The int8 weights and their scale that a product's right side is made of, if it is made of such."""
    scaled = makers.get(node.input[1])
    if scaled is None or scaled.op_type != "Mul":
        return None
    first, second = scaled.input
    for one, other in ((first, second), (second, first)):
        cast, scale = makers.get(one), tensors.get(other)
        weights = tensors.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if weights is None or scale is None or weights.data_type != _INT8 or len(weights.dims) != 2:
            continue
        of_columns = [size for size in scale.dims if size != 1] in ([], [weights.dims[1]])
        of_rows = len(scale.dims) == 2 and scale.dims[0] != 1
        if of_columns and not of_rows and scale.data_type == _FLOAT and scale.raw_data:
            return weights, scale
    return None


def _find_bias(add: Any, output: str, tensors: Messages) -> str | None:
    """What is added to a product, if that is one row of numbers."""
    other = next((name for name in add.input if name != output), "")
    tensor = tensors.get(other)
    return other if tensor is not None and tensor.data_type == _FLOAT and len(tensor.dims) == 1 else None


def _add_scale(graph: Any, name: str, scale: Any) -> str:
    """As one row: that is how the integer product wants it."""
    graph.initializer.add(name=name, dims=[len(scale.raw_data) // 4], data_type=_FLOAT, raw_data=scale.raw_data)
    return name


@cache
def _model_class() -> Any:
    """The class of ONNX's ModelProto, made from `_MESSAGES`."""
    file = descriptor_pb2.FileDescriptorProto(name="onnx_int8.proto", package="onnx_int8", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, written in fields:
            kind, repeated = written.removesuffix("*"), written.endswith("*")
            entry = message.field.add(
                name=field, number=number, label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            )
            if kind in _MESSAGES:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".onnx_int8.{kind}"
            else:
                entry.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("onnx_int8.ModelProto"))
