"""QuantLinear: everything that nn.Linear can do."""

import copy
import io
import pickle
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from cases import plain, random_quant
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import qkernels
from qkernels import FormatError, QuantLinear, QuantTensor, UnsupportedError, config, explain, formats, kernels, reference
from qkernels.formats.tensor import FIELDS
from qkernels.kernels import device as devices
from qkernels.kernels.cpu import layout
from qkernels.kernels.registry import Kernel, Problem, why_not
from qkernels.quantizers import nearest
from qkernels.testing import assert_matmul_close

SOME = ("int4", "int8", "int3_asym", "hqq4", "nf4", "fp8_block", "mxfp4", "nvfp4")
some_formats = pytest.mark.parametrize("name", SOME)


def make(name="int4", k=300, n=48, bias=True, **options):
    linear = nn.Linear(k, n, bias)
    return linear, QuantLinear.from_linear(linear, name, compute=options.pop("compute", "float"), **options)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@some_formats
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, copied):
    _, layer = make(name)
    twin, x = copied(layer), torch.randn(3, 300)
    assert same_state(layer, twin) and twin.kernel == layer.kernel
    assert torch.equal(twin(x), layer(x))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_a_copy_compiles_before_its_first_call():
    _, layer = make("int4")
    twin, x = copy.deepcopy(layer), torch.randn(3, 300)
    with torch.no_grad():
        assert torch.equal(torch.compile(twin, fullgraph=True)(x), layer(x))


def test_a_pickle_opens_where_the_kernels_are_missing(monkeypatch):
    _, layer = make("int4")
    pickled = pickle.dumps(layer)
    monkeypatch.setattr(Kernel, "matmul", None)
    assert same_state(pickle.loads(pickled), layer)


@some_formats
def test_meta_then_load(name):
    _, layer = make(name)
    empty = QuantLinear(300, 48, format=name, compute="float", device="meta")
    assert empty.kernel is None and empty.weight.is_meta
    with pytest.raises(FormatError, match="meta"):
        empty(torch.randn(1, 300))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 300)
    assert empty.kernel == layer.kernel and torch.equal(empty(x), layer(x))


@some_formats
@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().float()], ids=["bf16", "half", "double"]
)
def test_dtype_moves_the_bias_alone(name, move):
    _, layer = make(name)
    before = layer.quant_tensor()
    moved = move(layer)
    assert moved is layer and moved.quant_tensor().equal(before)
    assert moved(torch.randn(2, 300, dtype=moved.bias.dtype)).dtype == moved.bias.dtype


@pytest.mark.parametrize("kernel", [k.name for k in kernels.all_kernels()])
@some_formats
def test_state_dict_is_canonical(name, kernel):
    q = random_quant(formats.get(name), 48, 300, perm=name == "int4")
    problem = Problem(q.format, 48, 300, perm=q.perm is not None, device=kernels.registry.explain("int4", device="cpu").problem.device)
    if reason := why_not(kernels.get(kernel), problem):
        pytest.skip(reason)
    layer = QuantLinear.from_quant_tensor(q, kernel=kernel)
    assert layer.kernel == kernel
    state = {("codes" if key == "weight" else key): t for key, t in layer.state_dict().items()}
    assert QuantTensor.from_tensors(q.format, q.shape, state).equal(q)


@some_formats
@pytest.mark.parametrize("bias", [True, False])
def test_strict_round_trip(name, bias):
    _, layer = make(name, bias=bias)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = QuantLinear(300, 48, bias, name, compute="float")
    assert str(fresh.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert same_state(fresh, layer)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("scales"), r"Missing key.*scales"),
        (lambda s: s.pop("bias"), r"Missing key.*bias"),
        (lambda s: s.update(zeros=s["scales"]), "has no zeros"),
        (lambda s: s.update(other=s["scales"]), r"Unexpected key.*other"),
        (lambda s: s.update(weight=s["weight"][:, 1:]), r"needs codes \[48, 150\]"),
        (lambda s: s.update(scales=s["scales"].float()), "float16"),
        (lambda s: s.update(bias=s["bias"][1:]), r"size mismatch for bias.*\[47\]"),
    ],
)
def test_errors_of_load_state_dict(edit, message):
    _, layer = make()
    state = dict(layer.state_dict())
    edit(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@some_formats
@pytest.mark.parametrize("shape", [(300,), (0, 300), (5, 300), (2, 3, 300)])
def test_gradients_are_those_of_the_dense_layer(name, shape):
    _, layer = make(name)
    dense = layer.to_linear()
    layer.bias = nn.Parameter(layer.bias.detach().clone())
    xs = [torch.randn(shape).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    grad = torch.randn(*shape[:-1], 48)
    for module, x in ((layer, xs[0]), (dense, xs[1])):
        module(x).backward(grad)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize(("compute", "dynamic"), [("float", None), ("int8", True)])
def test_compile_fullgraph(compute, dynamic):
    """A model of several formats, one with a permutation, one on the reference kernel: the same outputs for any M, and gradients."""
    layers = [
        make("int8", 64, 64, compute=compute)[1],
        QuantLinear.from_quant_tensor(random_quant(formats.get("int4_g32"), 64, 64, perm=True), torch.randn(64), compute=compute),
        make("nf4", 64, 64, kernel="reference")[1],
        make("nvfp4", 64, 64, bias=False, compute=compute)[1],
    ]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for m in (1, 4, 9, 0):
        with torch.no_grad():
            x = torch.randn(m, 64)
            assert torch.equal(compiled(x), model(x))
    x, gradients = torch.randn(5, 64, requires_grad=True), []
    for module in (compiled, model):
        gradients.append(torch.autograd.grad(module(x).square().sum(), (x, *(layer.bias for layer in layers[:3]))))
    torch.testing.assert_close(*gradients)


@some_formats
@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_an_explicit_cast(name, kernel, dtype):
    linear, layer = make(name, kernel=kernel)
    xs = [torch.randn(3, 300).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    with torch.autocast("cpu", dtype=dtype):
        y, plain = layer(xs[0]), linear(xs[0])
        assert layer(torch.randn(1, 300, dtype=torch.bfloat16)).dtype == y.dtype == plain.dtype == dtype
        with torch.no_grad():
            assert torch.equal(layer(xs[0]), y)
        with torch.autocast("cpu", enabled=False):
            assert layer(xs[0]).dtype == torch.float32
        with pytest.raises(FormatError, match="float64"):
            layer(xs[0].double())
    expected = layer(xs[1].to(dtype))
    grad, grads = torch.randn(3, 48).to(dtype), []
    for out, x in ((y, xs[0]), (expected, xs[1])):
        layer.bias.grad = None
        out.backward(grad)
        grads.append((x.grad, layer.bias.grad))
    assert torch.equal(y, expected) and y.dtype == expected.dtype
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(*grads))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_compiled(grad):
    _, layer = make()
    torch.compiler.reset()
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(3, 300)
    with torch.set_grad_enabled(grad):
        for enabled in (True, False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                y, expected = compiled(x), layer(x)
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            torch.testing.assert_close(y, expected)


@some_formats
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs the op in a loop
def test_transforms_of_torch_func(name):
    _, layer = make(name)
    dense, x, bias = layer.to_linear(), torch.randn(4, 300), torch.randn(4, 48)

    def loss(module, row):
        return (module(row) ** 2).sum()

    for transform in (
        lambda m: vmap(m)(x),
        lambda m: vmap(m, in_dims=1)(x.T),
        lambda m: jacrev(m)(x[0]),
        lambda m: vmap(grad(partial(loss, m)))(x),
        lambda m: vmap(lambda b, row: functional_call(m, {"bias": b}, (row,)))(bias, x),
        lambda m: vmap(grad(lambda b, row: functional_call(m, {"bias": b}, (row,)).pow(2).sum()))(bias, x),
    ):
        torch.testing.assert_close(transform(layer), transform(dense), rtol=1e-4, atol=1e-4)


@some_formats
def test_no_rows(name):
    _, layer = make(name)
    with torch.no_grad():
        assert layer(torch.randn(0, 300)).shape == (0, 48)
        assert layer(torch.randn(2, 0, 300)).shape == (2, 0, 48)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_no_weights(shape):
    with pytest.raises(FormatError, match="at least 1 x 1"):
        QuantLinear(*shape)
    with pytest.raises(FormatError, match="empty"):
        QuantLinear.from_linear(nn.Linear(*shape))


def test_wrong_k():
    _, layer = make()
    with pytest.raises(FormatError, match=r"in_features = 300"):
        layer(torch.randn(2, 301))


def test_it_is_a_linear():
    linear, layer = make()
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (300, 48)
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert "u4b8_g128_sf16" in repr(layer) and layer.kernel in repr(layer)
    assert make(bias=False)[1].bias is None


@some_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_linear(name, dtype):
    _, layer = make(name)
    layer, x = layer.to(dtype).eval(), torch.randn(4, 300).to(dtype)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear and dense.weight.dtype == dtype and not dense.training
    assert dense.weight.requires_grad and dense.bias is layer.bias
    with torch.no_grad():
        assert_matmul_close(layer(x), x, layer.dequantize(torch.float32).double(), layer.bias)
    assert torch.equal(dense.weight, layer.dequantize(dtype))


def test_compute_values():
    for compute in ("auto", "float", "int8"):
        assert make(compute=compute)[1].compute == compute
    with pytest.raises(FormatError, match="nearest: int8"):
        make(compute="int9")
    assert kernels.get(make(compute="float")[1].kernel).compute == "float"
    for device in ("cpu", "meta"):
        with pytest.raises(FormatError, match="unknown kernel 'refrence'; nearest: reference"):
            QuantLinear(300, 48, kernel="refrence", device=device)
    assert make(kernel="reference")[1].kernel == "reference"


def test_plan_explains():
    plan = make()[1].plan(m=4)
    assert plan.kernel.name in str(plan) and "48 x 300" in str(plan)
    for kernel in kernels.all_kernels():
        if kernel.compute == "int8":
            with pytest.raises(UnsupportedError, match="compute='float'"):
                make(compute="float", kernel=kernel.name)


@pytest.mark.parametrize("format", plain(formats.all_formats()), ids=lambda f: f.name)
def test_a_new_layer_runs(format):
    with torch.no_grad():
        y = QuantLinear(40, 17, format=format)(torch.randn(2, 40))
    assert y.shape == (2, 17) and bool(torch.isfinite(y).all())


@pytest.mark.parametrize("x", [torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.int32), torch.tensor(1.0)])
def test_a_wrong_x_is_a_typed_error(x):
    layer = QuantLinear.from_linear(nn.Linear(64, 32), "int4_g32")
    with pytest.raises(FormatError, match=r"takes float32, bfloat16 or float16|does not fit"):
        layer(x)


def test_a_meta_linear_becomes_a_meta_layer():
    layer = QuantLinear.from_linear(nn.Linear(64, 32, device="meta"), "int4_g32")
    assert layer.weight.is_meta and layer.bias.is_meta
    with torch.autocast("cpu", dtype=torch.float16):  # which leaves meta alone
        y = layer(torch.empty(2, 3, 64, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 3, 32) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_a_meta_x_says_the_shape(kernel):
    layer = QuantLinear.from_linear(nn.Linear(64, 32), "int4_g32", kernel=kernel)
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 32)


def test_falling_back_to_the_reference_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(devices, "current", lambda _: devices.Device("cpu", isa="none"))
    monkeypatch.setattr("qkernels.linear._SAID", set())
    for _ in range(2):
        QuantLinear.from_linear(nn.Linear(64, 32), "int4_g32")
    QuantLinear.from_linear(nn.Linear(64, 32), "int4_g32", kernel="reference")  # as asked: nothing to say
    (said,) = [record.getMessage() for record in caplog.records if record.name == "qkernels"]
    assert "slow reference kernel serves u4b8_g32_sf16 on cpu:none" in said and "cpu_s8_wN_dot" in said


@pytest.mark.parametrize("isa", config.ISA_LEVELS)
def test_the_smallest_layer_runs_on_a_compiled_kernel(isa):
    """The reference kernel's dozen ops take ten times as long, and it rounds the weight to x's dtype."""
    plan = explain("int4", (1, 1), device=f"cpu:{isa}", compute="float")
    assert plan.kernel.name == "cpu_f32_wN_dot" and "reference" in plan.costs


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def fresh_tables():
    """Tables that are made once, at their first use, which may be anywhere."""

    def forget():
        reference.ordered.cache_clear()
        layout._DESCRIBED.clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("format", plain(formats.all_formats()), ids=lambda f: f.name)
@pytest.mark.parametrize(
    "context",
    [lambda: torch.device("meta"), *(partial(default_dtype, t) for t in (torch.bfloat16, torch.float16, torch.float64))],
    ids=["meta", "bf16", "f16", "f64"],
)
def test_the_surroundings_change_no_bit(format, context, fresh_tables):
    """A layer lives where the linear's weight does; neither a device context nor another default dtype gets into it or the tables."""
    linear, x = nn.Linear(300, 48), torch.randn(2, 300)
    with context(), torch.no_grad():
        layer = QuantLinear.from_linear(linear, format)
        y, weight = layer(x), layer.to_linear().weight
        state = layer.state_dict()
    fresh_tables()
    with torch.no_grad():
        expected = QuantLinear.from_linear(linear, format)
        assert torch.equal(y, expected(x)) and torch.equal(weight, expected.to_linear().weight)
    assert same_state(layer, expected) and not any(t.is_meta for t in state.values())


@pytest.mark.parametrize("format", plain(formats.all_formats()), ids=lambda f: f.name)
def test_quantising_stays_on_the_weight_s_device(format):
    """Meta stands for any device but the CPU."""
    group_n, group_k = format.group_shape(48, 300)
    weight, scales = torch.empty(48, 300, device="meta"), torch.empty(group_n, group_k, 2, device="meta")
    zeros = None if format.zero == "none" else scales
    tensor_scale = torch.empty(1, device="meta") if format.tensor_scale else None
    index, _ = nearest.best_scales(weight, format, scales, zeros, tensor_scale)
    codes = nearest.codes(weight, format, scales[..., 0], None if zeros is None else zeros[..., 0], tensor_scale)
    assert index.is_meta and codes.is_meta


def test_warmup_calls_every_kind_of_layer_once():
    twice = nn.Linear(64, 48)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 48, bias=False), twice)
    qkernels.replace_linear(model, "int4", progress=False)
    called = []
    for layer in model:
        layer.register_forward_hook(lambda layer, args, y: called.append((layer, len(args[0]), args[0].dtype)))
    assert qkernels.warmup(model, [1, 16, 1]) == 6
    assert sorted(m for _, m, _ in called) == [1, 1, 1, 16, 16, 16] and {dtype for *_, dtype in called} == {torch.float32}
    assert qkernels.warmup(model, [2], torch.bfloat16) == 3 and called[-1][2] == torch.bfloat16
    for bad in ([], [0, 4]):
        with pytest.raises(FormatError, match="batch_sizes are numbers of rows from 1 on"):
            qkernels.warmup(model, bad)


def test_unpickled_on_another_kind_of_device_it_takes_a_kernel_of_that():
    """As `torch.load(map_location="cpu")` of a GPU's layer does."""
    from qkernels.kernels.triton import f16_gemm

    layer = QuantLinear.from_linear(nn.Linear(256, 64), "int4")
    there = copy.deepcopy(layer)
    there._kernel, packed = f16_gemm.KERNEL.name, f16_gemm.prepare(layer.quant_tensor())
    there._hold(dict(zip(FIELDS, packed[2:])))
    loaded, x = pickle.loads(pickle.dumps(there)), torch.randn(3, 256)
    assert loaded.kernel == layer.kernel and torch.equal(loaded(x), layer(x))
