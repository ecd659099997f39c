"""The Triton kernels without a GPU: under the interpreter, and compiled for GPUs that are not here, with a look at the machine code."""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SWEEP, random_quant

from benchmarks.gpu.static import SHARED, Built, build_backward, build_f16, build_s8, build_s8_w4, compiled_for
from qkernels import formats
from qkernels.kernels.device import Device
from qkernels.kernels.registry import explain
from qkernels.kernels.triton import f16_gemm, int8, layout, s8_gemm, s8_w4_gemm
from qkernels.kernels.triton.unpack_asm import unpack_asm

pytest.importorskip("triton")

TESTS = Path(__file__).parent
FORMATS = ("int4", "int4_g32", "int4_g-1", "int4_asym", "hqq4", "nf4", "mxfp4", "nvfp4", "int8", "int8_asym", "fp8", "fp8_block", "int2")
PLANES = ("int3", "hqq3", "int5", "int6")  # their codes come in two planes
BLOCKS = ("q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "tq2_0", "ggml_nvfp4")
SOME_BLOCKS = {("q4_k", 4096, 1), ("q6_k", 4096, 64)}  # bytes and minima, bytes of both signs
ROWS = (1, 64, 128, 1024)


@pytest.mark.long
@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_w4.py"])
def test_under_the_interpreter(name):
    # numpy multiplies the tiles: too small for a second thread, which would spin
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / name)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout


SHAPES = [*((4096, 4096, m) for m in ROWS), (28672, 4096, 1), (4096, 8192, 1), (4096, 8192, 32)]
FOREMOST = ("int4", "int4_g32", "nf4", "int8", "int3")


@pytest.mark.parametrize(
    ("name", "n", "k", "m"),
    [
        *((name, *shape) for name in FORMATS + PLANES for shape in (SHAPES if SWEEP or name in FOREMOST else (SHAPES[0], SHAPES[3]))),
        *((name, n, k, m) for name in BLOCKS for n, k, m in SHAPES if SWEEP or ((name, n, m) in SOME_BLOCKS and k == 4096)),
    ],
)
def test_machine_code_for_hopper(name, n, k, m):
    build = build_f16(name, m, 90, torch.float16 if m == 64 else torch.bfloat16, n, k)
    code = build.instructions()
    assert build.compiled.metadata.shared <= SHARED[90]
    loop = build.loop()
    assert loop and not {"LDL", "STL"} & set(loop) and build.resources()[1] <= 8, "registers are spilled"
    assert len(code["I2F"]) < (20 if layout.held(formats.get(name)).columns else 8), "codes become floats one by one"
    products = code["HGMMA"]
    assert products, "no matrix instructions of Hopper's"
    assert all(re.search(r" R\d+, R\d+, gdesc", p) for p in products), "weights come from shared memory"
    ir = build.compiled.asm["ttgir"]
    assert set(re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", ir)) == {"0"}, "products overlap with what overwrites their operands"
    if name == "int4" and m == 1:
        assert len(loop) < 3.6 * build.weights, "instructions for a weight: at this many an H100's memory waits for them"
    stores = len(code["STS"]) + len(code["STSM"])
    assert stores * 128 * 16 < 2 * 64 * layout.tile_columns(formats.get(name)) * 16, "the unpacked weights go through shared memory"
    assert "LDSM" not in loop, "so do the words"


@pytest.mark.parametrize(("n", "m"), [(4096, 1024), (28672, 128), (28672, 1024)])
@pytest.mark.parametrize("name", ["int4", "int4_g32", "int4_asym", "nf4", "int8", "q4_k", "q2_k", "q6_k"])
def test_machine_code_of_invariant_tiles(name, n, m):
    if name in BLOCKS and not SWEEP:
        pytest.skip("left to `make sweep`")
    build = build_f16(name, m, 90, n=n, choose=f16_gemm.choose_invariant)
    assert build.compiled.metadata.shared <= SHARED[90] and build.instructions()["HGMMA"]
    assert not {"LDL", "STL"} & set(build.loop()) and build.resources()[1] <= 8, "registers are spilled"


@pytest.mark.parametrize(("sm", "m"), [(90, 1), (90, 32), (90, 64), (90, 256), *((sm, 256) for sm in SHARED if sm != 90)])
@pytest.mark.parametrize("name", ["int4", "int4_g32", "nf4", "int8", "int3", "q4_k", "q2_k", "q6_k"])
def test_machine_code_of_gradients(name, sm, m):
    if ((sm != 90 and name not in ("int4", "int3")) or (name in BLOCKS and (name, m) != ("q4_k", 64))) and not SWEEP:
        pytest.skip("left to `make sweep`")
    build = build_backward(name, m, sm)
    code, loop = build.instructions(), build.loop()
    assert build.compiled.metadata.shared <= SHARED[sm]
    assert not {"LDL", "STL"} & set(loop) and build.resources()[1] <= 8, "registers are spilled"
    assert code["UTCHMMA" if sm == 100 else "HGMMA" if sm == 90 and m >= 64 else "HMMA"]
    assert len(code["SHFL"]) <= 1 and len(code["I2F"]) < 8, "weights move between threads, or become floats one by one"
    if sm == 90:
        assert len(code["STSM"]) * 128 <= layout.tile_columns(formats.get(name)) * 8, "weights are stored to shared memory more than once"
        pendings = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", build.compiled.asm["ttgir"])
        assert set(pendings) <= {"0"}, "products overlap with what overwrites their operands"


@pytest.mark.parametrize("sm", [sm for sm in SHARED if sm != 90])
@pytest.mark.parametrize("name", ["int4", "int2", "int3", "nf4", "q4_k", "q2_k", "q6_k"])
def test_machine_code_for_other_gpus(name, sm):
    if name in BLOCKS and (name, sm) != ("q4_k", 80) and not SWEEP:
        pytest.skip("left to `make sweep`")
    for m in (1, 1024):
        build = build_f16(name, m, sm)
        code = build.instructions()
        assert build.compiled.metadata.shared <= SHARED[sm]
        assert code["HMMA"] or code["UTCHMMA"], m


@pytest.mark.parametrize("m", (*ROWS, 32, 512))
def test_machine_code_of_int8_for_hopper(m):
    build = build_s8(m, 90)
    code = build.instructions()
    assert build.compiled.metadata.shared <= SHARED[90]
    assert not code["LDL"] and not code["STL"], "registers are spilled"
    assert code["IGMMA"] and not code["IMMA"], "no integer matrix instructions of Hopper's"
    assert all(".S8.S8 R" in i and "gdesc" in i for i in code["IGMMA"]), "an operand is not what it was laid out for"
    assert all(".128" in i for i in code["LDGSTS"]) and len(code["LDGSTS"]) >= 8, "loads of less than 16 bytes"


@pytest.mark.parametrize("sm", [sm for sm in SHARED if sm != 90])
def test_machine_code_of_int8_for_other_gpus(sm):
    for m in (1, 1024):
        build = build_s8(m, sm)
        code = build.instructions()
        assert not code["STL"] or sm == 100, "registers are spilled"
        assert build.compiled.metadata.shared <= SHARED[sm] and (code["IMMA"] or code["UTCIMMA"]), m


# name -> instructions for a weight, a thread, in a tile for 1, 64 and 1024 tokens: as few as this, and the tensor core may be what waits
W4_MOST = {"int4": (2.2, 3.2, 4.2), "int4_asym": (2.9, 4.0, 5.0), "int4_g64": (3.5, 5.3, 7.3), "int4_g-1": (1.7, 2.0, 2.0)}


@pytest.mark.parametrize(("n", "m", "at"), [(4096, 1, 0), (4096, 32, 1), (4096, 64, 1), (1024, 200, 1), (4096, 1024, 2), (28672, 8192, 2)])
@pytest.mark.parametrize("name", [*W4_MOST, "u4_g-1_zi_sbf16", "u4_g64_zi_sf16", "u4_g32_zi_sf32"])
def test_machine_code_of_w4_for_hopper(name, n, m, at):
    if n == 28672 and "g-1" not in name:
        pytest.skip("the tile of 1024 tokens")
    build = build_s8_w4(name, m, 90, n)
    code, loop = build.instructions(), build.loop()
    assert build.compiled.metadata.shared <= SHARED[90]
    assert not code["LDL"] and not code["STL"] and build.resources()[1] == 0, "registers are spilled"
    assert code["IGMMA"] and all(re.search(r"S8\.S8 R\d+, R\d+, gdesc", i) for i in code["IGMMA"]), "weights come from shared memory"
    assert not {"STS", "STSM"} & set(loop), "weights move between threads"
    assert set(re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", build.compiled.asm["ttgir"])) == {"0"}
    assert all(".128" in i for i in code["LDGSTS"]) or "_g64" in name or "_g32" in name, "loads of less than 16 bytes"
    if name in W4_MOST and n == 4096:
        assert len(loop) < W4_MOST[name][at] * build.weights


@pytest.mark.parametrize("sm", [sm for sm in SHARED if sm != 90])
def test_machine_code_of_w4_for_other_gpus(sm):
    for name, m in (("int4", 1), ("int4_asym", 64), ("int4", 1024), ("int4_g-1", 1024)):
        build = build_s8_w4(name, m, sm)
        code = build.instructions()
        assert not code["STL"], "registers are spilled"
        assert build.compiled.metadata.shared <= SHARED[sm] and (code["IMMA"] or code["UTCIMMA"]), m


class Compiled:
    """Stands for a compiled kernel: keeps what it is called with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *arguments, stream):
        self.arguments, self.stream = arguments, stream


@pytest.mark.parametrize(("kernel", "name"), [(s8_gemm, "int8"), (s8_w4_gemm, "int4"), (s8_w4_gemm, "int4_g-1")])
def test_a_second_call_passes_all_that_the_kernels_take(monkeypatch, kernel, name):
    from qkernels.kernels.triton.jit.int8 import quantize_rows

    class Known(dict):
        def get(self, key):
            return self["only"]

    packed, x = kernel.prepare(random_quant(formats.get(name), 64, 512)), torch.randn(3, 512).half()
    values = {} if name == "int8" else kernel.constants(packed.format, 64, 512, assembly=True)
    t = int8.Tile(64, 16, 4, split_k=2)
    product = int8.Product(Compiled(), (*values.values(), *kernel.tile_constants(t).values()), t, exact=name != "int4")
    quantize = Compiled()
    monkeypatch.setattr(int8, "_LAUNCHES", Known(only=int8.Launch(product, (1, 2, 1))))
    monkeypatch.setattr(int8, "_QUANTIZERS", Known(only=quantize))
    monkeypatch.setattr(int8, "usual", lambda *tensors: True)
    monkeypatch.setattr(int8, "_stream", lambda x: 7)
    assert kernel.run(x, packed, None).shape == (3, 64)
    gemm = importlib.import_module(f"qkernels.kernels.triton.jit.{kernel.__name__.rpartition('.')[2]}").gemm
    names = dict(zip(gemm.arg_names, product.gemm.arguments))
    assert len(product.gemm.arguments) == len(gemm.arg_names) and len(quantize.arguments) == len(quantize_rows.arg_names)
    assert {n: names[n] for n in values | kernel.tile_constants(t)} == values | kernel.tile_constants(t)
    assert names["p_w"] is packed.weight and names["p_part"].dtype == (torch.int32 if product.exact else torch.float32)
    assert (names["M"], names["N"], names["padded"]) == (3, 64, 512) and product.gemm.grid == (1, 2, 1) and product.gemm.stream == 7


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_machine_code_of_quantising(dtype):
    from qkernels.kernels.triton.jit.int8 import quantize_rows

    types = {"p_x": dtype, "p_codes": "*i8", "p_rows": "*fp32", "M": "i32", "K": "i32", "padded": "i32", "stride_x": "i32"}
    compiled = compiled_for(90, quantize_rows, types, {"BLOCK": int8.quantize_block(4096), "EARLY": True}, num_warps=8)
    code = Built(compiled, 0, None).instructions()
    assert not code["LDL"] and not code["STL"] and not code["F2I"]
    assert all(".128" in i for i in code["LDG"]) and any(".128" in i for i in code["STG"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "nf4", "mxfp4", "int8", "fp8", "fp8_e5m2", "int2", "int3", "int5", "int6"])
def test_every_code_through_the_assembly(name, dtype):
    """The PTX, run here by a model of the few instructions that it has."""
    code = formats.get(name).code
    wide, narrow = layout.planes(code.bits)
    values = 32 // wide
    base = 2 ** (code.bits - 1) if isinstance(code, formats.Int) else None
    want = [v - base for v in range(2**code.bits)] if base else list(code.values)
    text = unpack_asm(code, dtype)
    for first in range(2**code.bits):
        word, beside, taken, expected = 0, 0, 0, []
        for j in range(values):
            c = (first + 37 * j) % 2**code.bits
            expected.append(want[c])
            at = code.bits * j if layout.is_table(code) else wide * (j // 2) + 16 * (j % 2)
            odd = j // 2 % 2 if narrow else 0
            word |= (c >> narrow if odd else c & (2**wide - 1)) << at
            beside |= (c & (2**narrow - 1)) << (at - narrow) if odd else (c >> wide) << (at + wide)
            taken |= (2**narrow - 1) << (at - narrow if odd else at + wide)
        for others in (0, 0xFFFFFFFF & ~taken):  # in the narrow word: bits of the words that it is shared with
            got = run_ptx(text, {f"${values}": word, f"${values + 1}": beside | others}, values, dtype)
            torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype).double(), rtol=0, atol=0, equal_nan=True)


def test_every_byte_through_the_assembly_of_w4():
    """Both codes of a byte, wherever it lies in a word, and all zeros that a word may share."""
    for first, zero in itertools.product(range(256), range(16)):
        word = bytes((first + 37 * i) % 256 for i in range(4))
        for text, flip, minus, times in ((s8_w4_gemm.SYMMETRIC, 8, 8, 16), (s8_w4_gemm.ZEROS, 0, zero, 1)):
            registers = {"$2": int.from_bytes(word, "little"), "$3": zero * 0x01010101}
            run_ptx(text, registers)
            for half in (0, 1):
                want = [times * (((byte >> 4 * half & 15) ^ flip) - minus) & 255 for byte in word]
                assert list(registers[f"${half}"].to_bytes(4, "little")) == want


def run_ptx(text, registers, values=0, dtype=torch.float16):
    """Interpret the integer instructions, and fma on pairs of 16-bit floats; results are left in `registers`, pairs are returned."""
    out = torch.zeros(values, dtype=torch.float64)

    def value(operand):
        return int(operand, 16) if operand.startswith("0x") else int(operand) if operand.isdigit() else registers[operand]

    def floats(bits):
        return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()

    for line in text.strip("{}\n").splitlines():
        name, *operands = re.findall(r"[^\s,;{}]+", line)
        if name == ".reg":
            continue
        if name == "mov.b32" and len(operands) == 3:
            for target, v in zip(operands[:2], floats(registers[operands[2]]).tolist()):
                out[int(target[1:])] = v
            continue
        target, a, *rest = operands
        others = [value(o) for o in rest]
        x = value(a)
        if name == "mov.b32":
            result = x
        elif name == "shr.u32":
            result = x >> others[0]
        elif name == "shl.b32":
            result = x << others[0] & 0xFFFFFFFF
        elif name == "and.b32":
            result = x & others[0]
        elif name == "or.b32":
            result = x | others[0]
        elif name == "add.u32":
            result = (x + others[0]) & 0xFFFFFFFF
        elif name == "sub.u32":
            result = (x - others[0]) & 0xFFFFFFFF
        elif name == "xor.b32":
            result = x ^ others[0]
        elif name == "mul.lo.u32":
            result = (x * others[0]) & 0xFFFFFFFF
        elif name == "lop3.b32":
            b, c, table = others
            result = sum((table >> (4 * (x >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        elif name == "prmt.b32":
            source = (x | others[0] << 32).to_bytes(8, "little")
            picks = [others[1] >> 4 * i & 15 for i in range(4)]
            result = int.from_bytes(bytes(255 * (source[p & 7] >> 7) if p & 8 else source[p] for p in picks), "little")
        else:
            assert name.startswith("fma.rn."), name
            halves = (floats(x) * floats(others[0]) + floats(others[1])).to(dtype).view(torch.int16).tolist()
            result = (halves[0] & 0xFFFF) | (halves[1] & 0xFFFF) << 16
        registers[target] = result
    return out


def test_explain_needs_no_gpu():
    plan = explain("int4", (4096, 4096), 16, device="cuda:sm90")
    assert plan.kernel.name == "cuda_f16_w4_gemm" and "cuda:sm90" in str(plan)
    assert explain("int4", m=4096, device="cuda:sm90", batch_invariant=True).kernel.name == "triton_f16_wN_gemm_invariant"
    for m in (None, 1, 64, 4096):
        for sm, backend, float_kernel in ((80, "triton", "f16_wN"), (90, "cuda", "f16_w4"), (100, "triton", "f16_wN")):
            assert explain("int4", m=m, device=f"cuda:sm{sm}").kernel.name == f"{backend}_{float_kernel}_gemm"
            assert explain("int4", m=m, device=f"cuda:sm{sm}", compute="int8").kernel.name == f"{backend}_s8_w4_gemm"
            assert explain("int8", m=m, device=f"cuda:sm{sm}", compute="int8").kernel.name == f"{backend}_s8_w8_gemm"
    assert explain("nf4", device="cuda:sm90").kernel.name == "triton_f16_wN_gemm"
    for name in ("q4_k", "q6_k", "q1_0", "int4_min"):
        plan = explain(name, device="cuda:sm90")
        assert plan.kernel.name == "triton_f16_wN_gemm" and "which the Triton kernels read" in plan.rejected["cuda_f16_w4_mma"]
        assert explain(name, device="cuda:sm90", batch_invariant=True).kernel.name == "triton_f16_wN_gemm_invariant"
    plan = explain("iq2_xxs", device="cuda:sm90")
    assert plan.kernel.name == "reference" and "iq2_xxs does not come apart" in plan.rejected["triton_f16_wN_gemm"]
    assert "u4b7" in explain("u4b7_g128_sf16", device="cuda:sm90").rejected["cuda_f16_w4_gemm"]
    assert "N = 100" in explain("int4", (100, 4096), device="cuda:sm90").rejected["cuda_f16_w4_gemm"]
    assert explain("int4", device=Device("cuda", sm=90, compiled=False)).kernel.name == "triton_f16_wN_gemm"
    assert "needs sm80" in explain("int4", device="cuda:sm75").rejected["triton_f16_wN_gemm"]
    assert "Triton is not installed" in explain("int4", device=Device("cuda", sm=90, triton=False)).rejected["triton_f16_wN_gemm"]
    assert "groups of 12" in explain("int4_g12", device="cuda:sm90").rejected["triton_f16_wN_gemm"]
    assert "7 bits" in explain("u7b64_g128_sf16", device="cuda:sm90").rejected["triton_f16_wN_gemm"]
