"""The Triton kernels without a GPU: under the interpreter, and compiled for GPUs that are not here, with a look at the machine code."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels import formats
from qkernels.kernels.device import Device
from qkernels.kernels.registry import explain
from qkernels.kernels.triton import f16_gemm, layout, s8_gemm
from qkernels.kernels.triton.unpack_asm import unpack_asm

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent
KIB = 1 << 10
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # of a block
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "HMMA", 120: "HMMA"}
FORMATS = ("int4", "int4_g32", "int4_g-1", "int4_asym", "hqq4", "nf4", "mxfp4", "nvfp4", "int8", "int8_asym", "fp8", "fp8_block", "int2")
ROWS = (1, 64, 128, 1024)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SCALES = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "e4m3": "*u8", "e8m0": "*u8"}


def test_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / "interpreted.py")]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout


def compiled_for(sm, kernel, types, constants, **options):
    """A kernel for a GPU; its pointers and integers are multiples of 16, but for M."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {arg: types.get(arg) or "constexpr" for arg in kernel.arg_names}
    values = {(i,): constants.get(arg) for i, arg in enumerate(signature) if signature[arg] == "constexpr"}
    sixteen = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(signature) if signature[arg] != "constexpr" and arg != "M"}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=sixteen)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def instructions(compiled, tmp_path):
    """Name -> lines of machine code."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = collections.defaultdict(list)
    for m in re.finditer(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_]*)(.*)", text, re.MULTILINE):
        found[m[1]].append(m[1] + m[2])
    return found


class Build:
    """The kernel for x [m, k] and a weight [n, k], compiled for a GPU, and what can be read off it."""

    def __init__(self, name, m, sm, dtype=torch.bfloat16, n=4096, k=4096):
        from qkernels.kernels.triton.jit.f16_gemm import gemm

        self.format = formats.get(name)
        self.tile = f16_gemm.choose(n, k, m, layout.tile_columns(self.format), f16_gemm.Gpu(132, SHARED[sm], sm >= 90))
        constants = f16_gemm.tile_constants(self.format, n, k, dtype, torch.device("cuda"), self.tile)
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        self.compiled = compiled_for(sm, gemm, self.types(dtype), constants, **options)

    def types(self, dtype):
        """Argument -> type, as they are on a launch; None for an argument that is None."""
        f, split = self.format, self.tile.split_k > 1
        scale = SCALES[f.scale]
        return {
            "p_x": POINTERS[dtype], "p_w": "*i32", "p_s": scale, "p_z": {"none": None, "int": "*u8", "float": scale}[f.zero],
            "p_tensor_scale": "*fp32" if f.tensor_scale else None, "p_table": None if isinstance(f.code, formats.Int) else "*fp32",
            "p_bias": None, "p_out": POINTERS[dtype], "p_part": "*fp32" if split else None, "p_count": "*i32" if split else None,
            "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32",
        }  # fmt: skip


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_machine_code_for_hopper(name, m, tmp_path):
    dtype = torch.float16 if m == 64 else torch.bfloat16
    build = Build(name, m, 90, dtype)
    code = instructions(build.compiled, tmp_path)
    assert build.compiled.metadata.shared <= SHARED[90]
    assert not code["LDL"] and not code["STL"], "registers are spilled"
    assert not code["I2F"] or len(code["I2F"]) < 8, "codes become floats one by one"
    products = code["HGMMA"]
    assert products, "no matrix instructions of Hopper's"
    assert all(re.search(r" R\d+, R\d+, gdesc", p) for p in products), "weights come from shared memory"
    loop = build.compiled.asm["ttgir"]
    assert set(re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", loop)) == {"0"}, "products overlap with what overwrites their operands"
    if build.tile.direct:
        stores = len(code["STS"]) + len(code["STSM"])
        assert stores * 128 * 16 < 2 * 64 * layout.tile_columns(build.format) * 16, "the unpacked weights go through shared memory"


@pytest.mark.parametrize("sm", [sm for sm in SHARED if sm != 90])
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_machine_code_for_other_gpus(name, sm, tmp_path):
    for m in (1, 1024):
        build = Build(name, m, sm)
        code = instructions(build.compiled, tmp_path)
        assert build.compiled.metadata.shared <= SHARED[sm]
        assert code["HMMA"] or code["UTCHMMA"], m


def build_s8(sm, m, n=4096, k=4096):
    """The product in int8, with all that a call may bring along."""
    from qkernels.kernels.triton.jit.s8_gemm import gemm

    t = s8_gemm.choose(n, k, m, f16_gemm.Gpu(132, SHARED[sm], sm >= 90))
    types = {
        "p_x": "*i8", "p_rows": "*fp32", "p_w": "*i8", "p_s": "*fp32", "p_z": "*u8", "p_bias": "*bf16", "p_out": "*bf16",
        "p_part": "*i32" if t.split_k > 1 else None, "p_count": "*i32" if t.split_k > 1 else None, "M": "i32", "N": "i32", "padded": "i32",
    }  # fmt: skip
    return compiled_for(sm, gemm, types, s8_gemm.tile_constants(t), num_warps=t.num_warps, num_stages=t.num_stages)


@pytest.mark.parametrize("m", (*ROWS, 32, 512))
def test_machine_code_of_int8_for_hopper(m, tmp_path):
    compiled = build_s8(90, m)
    code = instructions(compiled, tmp_path)
    assert compiled.metadata.shared <= SHARED[90]
    assert not code["LDL"] and not code["STL"], "registers are spilled"
    assert code["IGMMA"] and not code["IMMA"], "no integer matrix instructions of Hopper's"
    assert all(".S8.S8 R" in i and "gdesc" in i for i in code["IGMMA"]), "an operand is not what it was laid out for"
    assert all(".128" in i for i in code["LDGSTS"]) and len(code["LDGSTS"]) >= 8, "loads of less than 16 bytes"


@pytest.mark.parametrize("sm", [sm for sm in SHARED if sm != 90])
def test_machine_code_of_int8_for_other_gpus(sm, tmp_path):
    for m in (1, 1024):
        compiled = build_s8(sm, m)
        code = instructions(compiled, tmp_path)
        assert not code["STL"] or sm == 100, "registers are spilled"
        assert compiled.metadata.shared <= SHARED[sm] and (code["IMMA"] or code["UTCIMMA"]), m


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_machine_code_of_quantising(dtype, tmp_path):
    from qkernels.kernels.triton.jit.s8_gemm import quantize_rows

    types = {"p_x": dtype, "p_codes": "*i8", "p_rows": "*fp32", "M": "i32", "K": "i32", "padded": "i32", "stride_x": "i32"}
    compiled = compiled_for(90, quantize_rows, types, {"BLOCK": s8_gemm.quantize_block(4096), "EARLY": True}, num_warps=8)
    code = instructions(compiled, tmp_path)
    assert not code["LDL"] and not code["STL"] and not code["F2I"]
    assert all(".128" in i for i in code["LDG"]) and any(".128" in i for i in code["STG"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "nf4", "mxfp4", "int8", "fp8", "fp8_e5m2", "int2"])
def test_every_code_through_the_assembly(name, dtype):
    """The PTX, run here by a model of the few instructions that it has."""
    code = formats.get(name).code
    values = 32 // code.bits
    base = 2 ** (code.bits - 1) if isinstance(code, formats.Int) else None
    want = [v - base for v in range(2**code.bits)] if base else list(code.values)
    for first in range(2**code.bits):
        word, expected = 0, []
        for j in range(values):
            c = (first + 37 * j) % 2**code.bits
            at = code.bits * j if layout.is_table(code) else code.bits * (j // 2) + 16 * (j % 2)
            word |= c << at
            expected.append(want[c])
        got = run_ptx(unpack_asm(code, dtype), word, values, dtype)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype).double(), rtol=0, atol=0, equal_nan=True)


def run_ptx(text, word, values, dtype):
    """Interpret the integer instructions, and fma on pairs of 16-bit floats."""
    registers, out = {f"${values}": word}, torch.zeros(values, dtype=torch.float64)

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
    assert plan.kernel.name == "triton_f16_wN_gemm" and "cuda:sm90" in str(plan)
    assert "needs sm80" in explain("int4", device="cuda:sm75").rejected["triton_f16_wN_gemm"]
    assert "Triton is not installed" in explain("int4", device=Device("cuda", sm=90, triton=False)).rejected["triton_f16_wN_gemm"]
    assert "groups of 12" in explain("int4_g12", device="cuda:sm90").rejected["triton_f16_wN_gemm"]
    assert "3 bits" in explain("int3", device="cuda:sm90").rejected["triton_f16_wN_gemm"]
