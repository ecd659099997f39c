"""torchao: tensor subclasses taken apart into plain tensors, and described in the metadata of the safetensors files.

    metadata: tensor_names            JSON list of the weights and other tensors
    metadata: <module>.weight         JSON {"_type": class, "_data": its attributes, "_tensor_data_names": [...]}; Tensor is a plain one
    <module>._weight_<tensor name>    e.g. qdata, scale, zero_point

    class                      qdata                                      W
    Int8Tensor                 int8 [N, K]                                (qdata - zero_point) * scale, one of each per block_size
    IntxUnpackedToInt8Tensor   int8 [N, K], of 1 to 8 bits                the same
    Int4Tensor                 [N, K / 2], signed, even k in low nibble   qdata * scale + zero_point; both are [K / group, N]
    Float8Tensor               e4m3 or e5m2 [N, K]                        qdata * scale
    NVFP4Tensor                e2m1 [N, K / 2], even k in low nibble      qdata * scale * per_tensor_scale, e4m3 scales of 16
    MXTensor                   e4m3, e5m2, e2m3, e3m2 or e2m1             qdata * scale, e8m0 scales

Source: what `torchao.prototype.safetensors` of torchao 0.18.0 makes of them. Older checkpoints are pickles, which are never loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Float, Int, QuantFormat, QuantTensor
from qkernels.formats.format import scale_type
from qkernels.formats.packing import pack
from qkernels.io import checked
from qkernels.io.settings import Settings
from qkernels.io.shards import Tensors

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT_CODES = {
    "float8_e4m3fn": Float(4, 3),
    "float8_e5m2": Float(5, 2),
    "fp6_e2m3": Float(2, 3),
    "fp6_e3m2": Float(3, 2),
    "float4_e2m1fn_x2": Float(2, 1),
}
_BYTES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
# those of activations: how torchao multiplies, not what the weight is
_IGNORED = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")


class _Weight(NamedTuple):
    """A weight's name, its attributes and its tensors by their full names."""

    name: str
    said: Settings
    parts: Mapping[str, Tensor]

    def part(self, leaf: str) -> str:
        module, _, own = self.name.rpartition(".")
        return f"{module}._{own}_{leaf}"

    def has(self, leaf: str) -> bool:
        return self.part(leaf) in self.parts

    def take(self, leaf: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        return checked.tensor(self.parts, self.part(leaf), dtypes, shape)

    def numbers(self, leaf: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> Tensor:
        """Of one number per group, [N groups, K groups]; torchao drops or adds axes of one."""
        found = self.take(leaf, dtypes)
        if found.numel() != shape[0] * shape[1]:
            raise CheckpointError(f"{self.part(leaf)} is {list(found.shape)}; {list(shape)} is needed")
        return found.reshape(shape)


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Go through a checkpoint: weights as QuantTensor, everything else as it is; see `qkernels.io`.

    Decoded in the wider type of torchao's dtype and the scales' (float32 for e4m3 and e8m0), and rounded to torchao's dtype, the values
    are torchao's to the last bit.
    """
    _check_settings(settings)
    weights = _weights(tensors.metadata)
    owners = {f"{prefix}{leaf}": name for name, (prefix, kind) in weights.items() for leaf in _CLASSES[kind].leaves}
    done: set[str] = set()
    for name in tensors:
        weight = owners.get(name)
        if weight is None:
            if name.rpartition(".")[2].startswith("_"):
                raise CheckpointError(f"{name} belongs to no tensor that the metadata describes")
            yield name, tensors[name]
        elif weight not in done:
            done.add(weight)
            yield weight, _read_weight(weight, tensors, *weights[weight])
    if missing := weights.keys() - done:
        raise CheckpointError(f"{min(missing)} is in the metadata, but has no tensors")


def _check_settings(values: Mapping[str, Any]) -> None:
    settings = Settings(values, "quantization_config")
    settings.take("quant_method", of=str, default="torchao", choices=("torchao",))
    # how it was made; what each tensor is says the metadata
    settings.ignore(
        "quant_type", "quant_type_kwargs", "modules_to_not_convert", "include_input_output_embeddings", "untie_embedding_weights"
    )
    settings.done()


def _weights(metadata: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Quantised weight -> (what its tensors' names begin with, its class)."""
    if "tensor_names" not in metadata:
        raise CheckpointError(
            "the metadata of the safetensors files has no tensor_names, as torchao writes them; save it with torchao 0.15 or later"
        )
    found = {}
    for name in checked.json_names(metadata["tensor_names"], "metadata: tensor_names"):
        if name not in metadata:
            raise CheckpointError(f"the metadata names {name!r:.80} but does not describe it")
        kind = _description(name, metadata).take("_type", of=str)
        if kind == "Tensor":
            continue
        if kind not in _CLASSES:
            raise UnsupportedError(f"{name} is a {kind}, which is not read; {', '.join(_CLASSES)} are")
        module, _, own = name.rpartition(".")
        if not module:
            raise CheckpointError(f"{name} has no module before its name")
        found[name] = f"{module}._{own}_", kind
    return found


def _description(name: str, metadata: Mapping[str, str]) -> Settings:
    where = f"metadata: {name}"
    return Settings(checked.json_object(metadata[name], where), where)


def _read_weight(name: str, tensors: Tensors, prefix: str, kind: str) -> QuantTensor:
    described = _description(name, tensors.metadata)
    described.ignore("_type")
    parts = {part: tensors[part] for leaf in _CLASSES[kind].leaves if (part := f"{prefix}{leaf}") in tensors}
    weight = _Weight(name, Settings(described.take("_data", of=dict), described.where), parts)
    listed = described.take("_tensor_data_names", of=list, default=None)
    described.done()
    if listed is not None and {weight.part(str(leaf)) for leaf in listed} != parts.keys():
        raise CheckpointError(f"{name} has the tensors {sorted(parts)}, and {listed!r:.200} in the metadata")
    if weight.has("act_pre_scale"):
        raise UnsupportedError(f"{weight.part('act_pre_scale')}: a weight whose activations are scaled first is not read")
    weight.said.ignore("dtype", "orig_dtype", "activation_dtype", "kernel_preference", "mm_config", "use_triton_kernel", "reduce_range")
    weight.said.ignore("act_quant_kwargs", "activation_quantization")
    q = _CLASSES[kind].read(weight)
    weight.said.done()
    return q


def _dtype(said: Settings, name: str, choices: tuple[str, ...]) -> str:
    """A torch.dtype as torchao writes it, or the name of one that torch has not."""
    value = said.take(name, of=(dict, str))
    value = value if isinstance(value, str) else value.get("_data")
    if value not in choices:
        raise CheckpointError(f"{said.where}: {name} is {value!r:.80}; {', '.join(choices)} are read")
    return value


def _qdata(weight: _Weight, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    qdata = weight.take("qdata", dtypes)
    if qdata.dim() != 2:
        raise UnsupportedError(f"{weight.part('qdata')} is {list(qdata.shape)}; weights of two dimensions are read")
    return qdata.contiguous()


def _group(weight: _Weight, n: int, k: int, block: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """What shares a scale, -1 for whole axes, and the shape of the scales."""
    group_n, group_k = checked.extents(block, 2, f"{weight.said.where}: block_size")
    if n % group_n or k % group_k:
        raise CheckpointError(f"{weight.said.where}: block_size is {[group_n, group_k]}, which does not divide {n} x {k}")
    whole = (-1 if group_n == n > 1 else group_n), (-1 if group_k == k else group_k)
    return whole, (n // group_n, k // group_k)


def _read_int8(weight: _Weight) -> QuantTensor:
    return _integers(weight, 8)


def _read_intx(weight: _Weight) -> QuantTensor:
    return _integers(weight, int(_dtype(weight.said, "target_dtype", tuple(f"int{bits}" for bits in range(1, 9))).removeprefix("int")))


def _integers(weight: _Weight, bits: int) -> QuantTensor:
    qdata = _qdata(weight, (torch.int8,))
    n, k = qdata.shape
    group, shape = _group(weight, n, k, weight.said.take("block_size", of=list))
    half = 2 ** (bits - 1)
    codes = qdata.view(torch.uint8) + half  # modulo 256
    if (wrong := codes.int() >= 2 * half).any():
        raise CheckpointError(f"{weight.part('qdata')} holds {qdata[wrong][0].item()}, beyond int{bits}")
    scales = weight.numbers("scale", _FLOATS, shape).contiguous()
    zeros = weight.numbers("zero_point", (torch.int8, torch.int32, torch.int64, *_FLOATS), shape) if weight.has("zero_point") else None
    packed = pack(codes, bits)
    if zeros is None or not zeros.any():
        return QuantTensor(QuantFormat(Int(bits, half), group, scale_type(scales.dtype)), (n, k), packed, scales)
    shifted = zeros.double() + half
    if torch.equal(shifted, shifted.round().clamp(0, 255)):
        format = QuantFormat(Int(bits), group, scale_type(scales.dtype), "int")
        return QuantTensor(format, (n, k), packed, scales, shifted.to(torch.uint8))
    if not torch.equal(zeros.to(scales.dtype).double(), zeros.double()):
        raise UnsupportedError(f"{weight.part('zero_point')} has numbers that {scales.dtype}, the type of the scales, does not hold")
    format = QuantFormat(Int(bits, half), group, scale_type(scales.dtype), "float")
    return QuantTensor(format, (n, k), packed, scales, zeros.to(scales.dtype).contiguous())


def _read_int4(weight: _Weight) -> QuantTensor:
    qdata = _qdata(weight, (torch.uint8, torch.int8))
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    if (stated := checked.extents(weight.said.take("shape", of=list), 2, f"{weight.said.where}: shape")) != (n, k):
        raise CheckpointError(f"{weight.said.where}: shape is {list(stated)}, but {weight.part('qdata')} holds {n} x {k} codes")
    group, (rows, groups) = _group(weight, n, k, weight.said.take("block_size", of=list))
    if rows != n:
        raise CheckpointError(f"{weight.said.where}: block_size has {n // rows} rows; an Int4Tensor has 1")
    scales = weight.take("scale", _FLOATS, (groups, n)).T.contiguous()
    minima = weight.take("zero_point", (scales.dtype,), (groups, n)).T.contiguous()
    # a signed nibble with its highest bit turned over is code - 8
    codes = qdata.view(torch.uint8) ^ 0x88
    if not minima.any():
        return QuantTensor(QuantFormat(Int(4, 8), group, scale_type(scales.dtype)), (n, k), codes, scales)
    return QuantTensor(QuantFormat(Int(4, 8), group, scale_type(scales.dtype), "min"), (n, k), codes, scales, minima)


def _read_float8(weight: _Weight) -> QuantTensor:
    qdata = _qdata(weight, (torch.float8_e4m3fn, torch.float8_e5m2))
    n, k = qdata.shape
    block = weight.said.take("block_size", of=list, default=None)
    if block is None:  # older ones do not say it
        block = {1: [n, k], n: [1, k]}.get(weight.take("scale", _FLOATS).numel(), [])
    group, shape = _group(weight, n, k, block)
    scales = weight.numbers("scale", _FLOATS, shape).contiguous()
    format = QuantFormat(_FLOAT_CODES[str(qdata.dtype).removeprefix("torch.")], group, scale_type(scales.dtype))
    return QuantTensor(format, (n, k), qdata.view(torch.uint8), scales)


def _read_nvfp4(weight: _Weight) -> QuantTensor:
    qdata = _qdata(weight, _BYTES)
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    weight.said.take("block_size", of=int, choices=(16,))
    scales = _micro_scales(weight, torch.float8_e4m3fn, n, k, 16)
    tensor_scale = weight.numbers("per_tensor_scale", (torch.float32,), (1, 1)).reshape(1) if weight.has("per_tensor_scale") else None
    format = QuantFormat(Float(2, 1), (1, 16), "e4m3", tensor_scale=tensor_scale is not None)
    return QuantTensor(format, (n, k), qdata.view(torch.uint8), scales, tensor_scale=tensor_scale)


def _read_mx(weight: _Weight) -> QuantTensor:
    code = _FLOAT_CODES[_dtype(weight.said, "elem_dtype", tuple(_FLOAT_CODES))]
    exact = {Float(4, 3): (torch.float8_e4m3fn,), Float(5, 2): (torch.float8_e5m2,)}
    codes = _qdata(weight, exact.get(code, _BYTES)).view(torch.uint8)
    n, k = codes.shape[0], codes.shape[1] * (2 if code.bits == 4 else 1)
    block = weight.said.take("block_size", of=int, choices=(16, 32, 64, 128))
    if code.bits == 6:  # one in a byte
        if int(codes.max()) >= 64:
            raise CheckpointError(f"{weight.part('qdata')} holds the code {int(codes.max())}, beyond 6 bits")
        codes = pack(codes, 6)
    scales = _micro_scales(weight, torch.float8_e8m0fnu, n, k, block)
    return QuantTensor(QuantFormat(code, (1, block), "e8m0"), (n, k), codes, scales)


def _micro_scales(weight: _Weight, dtype: torch.dtype, n: int, k: int, block: int) -> Tensor:
    """Scales [N, K / block]; swizzled ones lie in tiles of 128 x 4, of which each 16 bytes hold rows r, r + 32, r + 64 and r + 96."""
    if k % block:
        raise CheckpointError(f"{weight.name} has K = {k}, no multiple of its blocks of {block}")
    columns = k // block
    if not weight.said.take("is_swizzled_scales", of=bool, default=False):
        return weight.numbers("scale", (dtype,), (n, columns)).contiguous()
    tiles_n, tiles_k = -(-n // 128), -(-columns // 4)
    tiles = weight.numbers("scale", (dtype,), (tiles_n * tiles_k, 512)).view(torch.uint8).view(tiles_n, tiles_k, 32, 4, 4)
    rows = tiles.permute(0, 3, 2, 1, 4).reshape(tiles_n * 128, tiles_k * 4)
    return rows[:n, :columns].contiguous().view(dtype)


class _Class(NamedTuple):
    leaves: tuple[str, ...]
    read: Callable[[_Weight], QuantTensor]


_CLASSES = {
    "Int8Tensor": _Class(("qdata", "scale", "zero_point", "act_pre_scale", *_IGNORED), _read_int8),
    "IntxUnpackedToInt8Tensor": _Class(("qdata", "scale", "zero_point"), _read_intx),
    "Int4Tensor": _Class(("qdata", "scale", "zero_point", "act_pre_scale"), _read_int4),
    "Float8Tensor": _Class(("qdata", "scale"), _read_float8),
    "NVFP4Tensor": _Class(("qdata", "scale", "per_tensor_scale", *_IGNORED), _read_nvfp4),
    "MXTensor": _Class(("qdata", "scale"), _read_mx),
}
