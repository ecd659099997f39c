"""On a CUDA GPU: `pytest -m gpu`. Every kernel × every format that it takes, layers as users have them, graphs, streams."""

import copy
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import equal_values, random_quant, whole
from emulated_cuda import quantize
from torch import nn

import qkernels
from qkernels import QuantLinear, formats, kernels, reference
from qkernels.kernels import device as devices
from qkernels.kernels.cuda import library, s8_mma
from qkernels.kernels.registry import Problem, why_not
from qkernels.kernels.triton import int8
from qkernels.testing import assert_matmul_close, assert_swiglu_close

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)  # once: there are thousands of them

pytestmark = pytest.mark.gpu
KERNELS = [k for k in kernels.all_kernels() if k.backend in ("triton", "cuda")]
MORE = [
    formats.get(n)
    for n in (
        "int4_g32", "int4_g-1", "int4_g256", "int3_g256", "int8_g32", "u8_g16_zi_sf16", "u4_g64_zi_sbf16", "u4_g-1_zi_sf32",
        "u5b3_g64_zm_sbf16",
    )
]  # fmt: skip
PAIRS = [pytest.param(k, f, id=f"{k.name}-{f.name}") for k in KERNELS for f in (*formats.all_formats(), *MORE)]
SHAPES = ((1, 8), (70, 300), (130, 515), (512, 1024), (512, 8192), (4096, 4096))
ROWS = (0, 1, 3, 8, 16, 17, 33, 64, 100, 130, 257, 600, 2100)


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_against_fp64(kernel, format):
    here, ran = devices.current("cuda"), 0
    for i, ((n, k), m) in enumerate(itertools.product(SHAPES, ROWS)):
        if i % 4 and n < 4096:  # each tile is compiled, and most of them serve all of these shapes
            continue
        dtype, k = (torch.bfloat16, torch.float16)[(i + i // 12) % 2], whole(format, k)
        if why_not(kernel, Problem(format, n, k, m, dtype, device=here)):
            continue
        q = random_quant(format, n, k, seed=i, perm=i % 5 == 1).to("cuda")
        x = torch.randn(m, 2 * k, device="cuda").to(dtype)
        x = (x[:, :k], x[:, ::2], x[:, :k].reshape(1, m, k), x[:, :k].contiguous())[i % 4]
        bias = torch.randn(n, device="cuda").to(dtype) if i % 3 else None
        packed = kernel.prepare(q)
        y = kernel.run(x, packed, bias)
        assert_matmul_close(y, x, reference.decode(q, torch.float64), bias, int8=q if kernel.compute == "int8" else None, act_group=None)
        for _ in range(3):
            assert torch.equal(kernel.run(x, packed, bias), y), "not the same bits again"
        ran += 1
    if not ran:
        pytest.skip(why_not(kernel, Problem(format, 4096, 4096, device=here)) or "none of these shapes")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "int4_g32", "int4_asym", "hqq4", "nf4", "mxfp4", "int8", "int8_asym"])
def test_swiglu(name, dtype):
    """In one launch, and again in a graph: the same bits."""
    format, here = formats.get(name), devices.current("cuda")
    for (n, k), m in itertools.product(((16, 64), (48, 320), (512, 1024), (14336, 4096)), (1, 2, 8, 19)):
        if reason := why_not(kernels.get("cuda_f16_wN_gemv"), Problem(format, n, k, m, dtype, device=here)):
            pytest.skip(reason)
        q = [random_quant(format, n, k, seed=i).to("cuda") for i in range(2)]
        weights = [reference.decode(one, torch.float64) for one in q]
        x = (torch.randn(m, k, device="cuda") / weights[0].square().sum(1).mean().sqrt()).to(dtype)
        bias = torch.randn(n, device="cuda").to(dtype) if m == 2 else None
        layers = [QuantLinear.from_quant_tensor(one, bias, kernel="cuda_f16_wN_gemv", dtype=dtype) for one in q]
        with torch.inference_mode():
            y = qkernels.swiglu(x, *layers)
            assert_swiglu_close(y, x, *weights, bias, bias)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = qkernels.swiglu(x, *layers)
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(again, y)


COMPILED = pytest.mark.parametrize("kernel", [k for k in KERNELS if k.backend == "cuda"], ids=lambda k: k.name)


@COMPILED
def test_small_products(kernel):
    """With edges in all directions, and K cut."""
    names = ("int4", "int4_g32", "int4_g64", "int4_g-1", "int4_asym", "nf4", "hqq4", "int8", "int8_asym")
    for name, (n, k), m in itertools.product(names, ((70, 304), (144, 2056)), (1, 7, 17, 70)):
        if why_not(kernel, Problem(formats.get(name), n, k, m, torch.float16, device=devices.current("cuda"))) is None:
            q, x = random_quant(formats.get(name), n, k).to("cuda"), torch.randn(m, k, device="cuda", dtype=torch.float16)
            y = kernel.run(x, kernel.prepare(q), None)
            int8_of = q if kernel.compute == "int8" else None
            assert_matmul_close(y, x, reference.decode(q, torch.float64), None, int8=int8_of, act_group=None)


@COMPILED
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(kernel, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # memory beside a tensor is nobody's
    what = f"{__file__}::test_small_products[{kernel.name}]"
    done = subprocess.run([*command, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.batch_invariant], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["int4", "int4_g32", "int4_asym", "nf4", "int8", "int8_asym", "q4_k", "q6_k"])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 1024), (512, 8192), (70, 300)])
def test_rows_do_not_depend_on_the_batch(kernel, name, n, k):
    format = formats.get(name)
    k = whole(format, k)
    if reason := why_not(kernel, Problem(format, n, k, device=devices.current("cuda"), batch_invariant=True)):
        pytest.skip(reason)
    packed = kernel.prepare(random_quant(format, n, k).to("cuda"))
    x = torch.randn(2100, k, device="cuda", dtype=torch.bfloat16)
    y = kernel.run(x, packed, None)
    for first, m in ((0, 1), (2099, 1), (7, 16), (40, 17), (90, 33), (1, 64), (1000, 100), (50, 200), (1024, 600)):
        assert torch.equal(kernel.run(x[first : first + m], packed, None), y[first : first + m]), (first, m)


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_restore_and_dequantize(kernel, format):
    if reason := why_not(kernel, Problem(format, 130, 1024, device=devices.current("cuda"))):
        pytest.skip(reason)
    for (n, k), perm in itertools.product(((130, 1024), (17, whole(format, 300))), (False, True)):
        if why_not(kernel, Problem(format, n, k, device=devices.current("cuda"))) is None:
            q = random_quant(format, n, k, perm=perm).to("cuda")
            packed = kernel.prepare(q)
            assert kernel.restore(packed).equal(q)
            torch.testing.assert_close(kernel.dequantize(packed), reference.decode(q), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_quantized(dtype):
    """By CUDA as by torch, bit for bit; by Triton, whose divisions are not to the nearest, nearly so."""
    if reason := library.why_missing():
        pytest.skip(reason)
    for m, k in ((1, 64), (33, 515), (300, 4096), (7, 14336)):
        x = torch.randn(m, k, device="cuda", dtype=dtype) * torch.logspace(-3, 3, m, device="cuda")[:, None].to(dtype)
        if m > 5:
            x[1], x[2, -1], x[3, 0], x[4] = 0, torch.inf, torch.nan, 2e-36
        padded = -(-k // 128) * 128
        (codes, rows), (want_codes, want_rows) = s8_mma.quantize(x, padded), quantize(x.cpu(), padded)
        assert torch.equal(codes.cpu(), want_codes)
        equal_values(rows.cpu(), want_rows)
        other_codes, other_rows = int8.quantize(x, padded, early=False)
        assert (other_codes.int() - codes.int()).abs()[x.isfinite().all(1)].max() <= 1
        torch.testing.assert_close(other_rows[0], rows[0], rtol=1e-6, atol=0, equal_nan=True)


def linear(n=512, k=1024, dtype=torch.bfloat16):
    return nn.Linear(k, n, device="cuda", dtype=dtype)


@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_layers(name):
    """From a dense layer on the GPU, from the CPU and back: the same codes, and a kernel of the GPU's."""
    model = nn.Sequential(linear(), nn.ReLU(), linear(256, 512))
    dense = copy.deepcopy(model)
    report = qkernels.replace_linear(model, name, progress=False)
    assert model[0].kernel in ("triton_f16_wN_gemm", "cuda_f16_w4_gemm") and model[0].kernel in str(report)
    x = torch.randn(40, 1024, device="cuda", dtype=torch.bfloat16)
    assert (model(x) - dense(x)).float().norm() < 0.3 * dense(x).float().norm()
    moved = copy.deepcopy(model).to("cpu")
    assert moved[0].kernel.startswith("cpu") or moved[0].kernel == "reference"
    for key, value in moved.state_dict().items():
        assert torch.equal(value.cuda(), model.state_dict()[key])
    assert torch.equal(moved.to("cuda")(x), model(x))


@pytest.mark.parametrize(("kernel", "format"), [p for p in PAIRS if p.values[0].backward is not None])
def test_gradients_against_fp64(kernel, format):
    here, ran = devices.current("cuda"), 0
    for i, ((n, k), m) in enumerate(itertools.product(((70, 300), (512, 1024), (4096, 4096)), (0, 1, 17, 64, 100, 300, 600))):
        k = whole(format, k)
        if why_not(kernel, Problem(format, n, k, m, device=here)):
            continue
        q = random_quant(format, n, k, seed=i, perm=i % 5 == 1).to("cuda")
        grad, packed = torch.randn(m, n, device="cuda").to((torch.bfloat16, torch.float16)[i % 2]), kernel.prepare(q)
        got = kernel.backward(grad, packed)
        assert_matmul_close(got, grad, reference.decode(q, torch.float64).t())
        assert torch.equal(kernel.backward(grad, packed), got), "not the same bits again"
        ran += 1
    if not ran:
        pytest.skip(why_not(kernel, Problem(format, 4096, 4096, device=here)) or "none of these shapes")


@pytest.mark.parametrize("m", [5, 100, 2000])
def test_gradients(m):
    layer = QuantLinear.from_linear(linear(), "int4")
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_matmul_close(x.grad, grad, layer.dequantize(torch.float64).t())
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize(
    ("name", "compute", "kernel"),
    [
        ("int4", "float", None), ("int8", "int8", None), ("int4", "int8", None), ("int4_g-1", "int8", None),
        ("int8", "int8", "cuda_s8_w8_mma"), ("int4", "int8", "cuda_s8_w4_mma"), ("int4_g32", "int8", "cuda_s8_w4_mma"),
    ],
)  # fmt: skip
def test_cuda_graphs(name, compute, kernel, m):
    layer = QuantLinear.from_linear(linear(2048, 2048), name, compute=compute, kernel=kernel)
    assert kernels.get(layer.kernel).compute == compute
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        want = [layer(x), layer(-x)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = [layer(x), layer(layer(x)), layer(-x)]
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[1]) and torch.equal(got[1], layer(want[0]))


@pytest.mark.parametrize("m", [2, 100])
def test_a_graph_on_a_stream_that_never_ran(m):
    layer = QuantLinear.from_linear(linear(2048, 2048), "int4")
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        want, graph = layer(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer(x)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_x_elsewhere_is_refused():
    layer = QuantLinear.from_linear(linear(), "int4")
    with pytest.raises(qkernels.FormatError, match="x is on cpu, the weight on cuda:0"):
        layer(torch.randn(1, 1024, dtype=torch.bfloat16))


def test_fp32():
    layer = QuantLinear.from_linear(linear(dtype=torch.float32), "int4")
    x = torch.randn(5, 1024, device="cuda")
    assert_matmul_close(layer(x), x, layer.dequantize(torch.float64), layer.bias)


@pytest.mark.parametrize("m", [8, 100])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_streams_do_not_share_counters(compute, m):
    layer = QuantLinear.from_linear(linear(1024, 4096), "int4", compute=compute)
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    with torch.inference_mode():
        want = [layer(x) for x in xs]
        streams = [torch.cuda.Stream() for _ in xs]
        torch.cuda.synchronize()
        got = [[] for _ in xs]
        for _ in range(50):
            for x, stream, ys in zip(xs, streams, got):
                with torch.cuda.stream(stream):
                    ys.append(layer(x))
        torch.cuda.synchronize()
    assert all(torch.equal(y, w) for ys, w in zip(got, want) for y in ys)


@pytest.mark.parametrize(
    ("name", "compute", "mode"),
    [("int4", "auto", None), ("int8", "int8", None), ("int4", "int8", None), ("int4", "auto", "reduce-overhead")],
)
def test_compiles(name, compute, mode):
    layer = QuantLinear.from_linear(linear(), name, compute=compute)
    torch._dynamo.reset()  # it counts what it compiles for a method, whatever the layer
    compiled = torch.compile(layer, fullgraph=True, dynamic=mode is None, mode=mode)
    for m in (1, 7, 100):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))
