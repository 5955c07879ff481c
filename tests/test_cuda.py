"""What only a GPU shows: streams, graphs, sizes, threads, no hidden wait, mixed precision, whole networks.

The other tests run on the GPU too; test_kernel_calls.py is the one that looks at each kernel.
"""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

import manual_ops
from manual_ops import functional, modes
from manual_ops.networks import NETWORKS
from manual_ops.registry import OPERATIONS
from models import MobileNet
from support import TOLERANCE, assert_same, moved

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
CUDA = torch.device("cuda")


def _tensors(sample):
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]


def _run(function, sample, cotangent=None):
    """The output and every gradient; without a cotangent, for one of equal steps."""
    output = function(*sample.args, **sample.kwargs)
    inputs = [value for value in _tensors(sample) if value.requires_grad]
    if cotangent is None:
        cotangent = _cotangent(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]


def _cotangent(output):
    steps = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    return steps.reshape(output.shape).to(output.dtype)


def _assert_equal_bits(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.nan_to_num(nan=123.0), other.nan_to_num(nan=123.0))


@operations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_those_of_the_cpu(operation, dtype):
    for sample in operation.samples():
        here = _run(operation.function, sample.to(dtype))
        for ours, theirs in zip(_run(operation.function, sample.to(dtype, "cuda")), here, strict=True):
            assert_same(ours.cpu(), theirs, **TOLERANCE[dtype])


@operations
def test_work_is_queued_on_the_current_stream(operation):
    """The inputs hold NaN until the stream gets to them: a kernel on another stream would read that."""
    stream = torch.cuda.Stream()
    for sample in operation.samples():
        values = sample.to(torch.float64, "cuda")
        expected = _run(operation.function, values)
        late = sample.to(torch.float64, "cuda")
        with torch.no_grad():
            for value in _tensors(late):
                if value.is_floating_point():
                    value.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # clock ticks: some milliseconds
            with torch.no_grad():
                for value, right in zip(_tensors(late), _tensors(values), strict=True):
                    value.copy_(right)
            results = _run(operation.function, late)
        stream.synchronize()
        _assert_equal_bits(results, expected)


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_captured_pass_replays_as_it_runs(operation, dtype):
    stream = torch.cuda.Stream()
    for sample in operation.samples():
        static = sample.to(dtype, "cuda")
        fresh = sample.to(dtype, "cuda")
        with torch.no_grad():
            for value in _tensors(fresh):
                if value.is_floating_point():
                    value.copy_(value.flip(0) if value.dim() else value / 2)
        with torch.cuda.stream(stream):
            cotangent = _cotangent(operation.function(*static.args, **static.kwargs).detach())
            for _ in range(2):
                _run(operation.function, static, cotangent)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = _run(operation.function, static, cotangent)
            with torch.no_grad():
                for value, other in zip(_tensors(static), _tensors(fresh), strict=True):
                    value.copy_(other)
                for result in captured:
                    result.fill_(-7)
            graph.replay()
            expected = _run(operation.function, fresh, cotangent)
        stream.synchronize()
        _assert_equal_bits(captured, expected)


@operations
def test_no_pass_waits_for_the_gpu(operation):
    for sample in operation.samples():
        placed = sample.to(torch.float32, "cuda")
        cotangent = _run(operation.function, placed)[0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            _run(operation.function, placed, cotangent)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@operations
def test_finite_differences_on_the_gpu(operation):
    for sample in operation.samples():
        placed = sample.to(torch.float64, "cuda")
        slots = [*enumerate(placed.args), *placed.kwargs.items()]
        moving = [slot for slot, value in slots if isinstance(value, torch.Tensor) and value.requires_grad]

        def function(*values, placed=placed, moving=moving):
            new = dict(zip(moving, values, strict=True))
            args = [new.get(slot, value) for slot, value in enumerate(placed.args)]
            return operation.function(*args, **{slot: new.get(slot, value) for slot, value in placed.kwargs.items()})

        inputs = [dict(slots)[slot] for slot in moving]
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_two_threads_on_two_streams_compute_as_one():
    samples = [(row.function, row.samples()[0].to(torch.float32, "cuda")) for row in OPERATIONS.values()]
    expected = [_run(*call) for call in samples]
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            stream = torch.cuda.Stream()
            for _ in range(3):
                with torch.cuda.stream(stream):
                    results = [_run(*call) for call in samples]
                stream.synchronize()
                for got, wanted in zip(results, expected, strict=True):
                    _assert_equal_bits(got, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _large_calls():
    from test_determinism import CALLS

    return CALLS


@pytest.mark.parametrize("name", _large_calls())
def test_the_same_bits_on_every_run_while_other_work_runs(name):
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("cuda"):
            function, *args = _large_calls()[name]()
        inputs = [value for value in args if isinstance(value, torch.Tensor) and value.requires_grad]
        busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
        results = []
        for run in range(4):
            torch.cuda.synchronize()
            with torch.cuda.stream(busy):
                for _ in range(8 * run):  # another load each time, so that blocks are scheduled otherwise
                    noise @ noise
            output = function(*args)
            results.append([output.detach(), *torch.autograd.grad(output, inputs, _cotangent(output.detach()))])
        torch.cuda.synchronize()
        for repeated in results[1:]:
            _assert_equal_bits(repeated, results[0])
    finally:
        torch.use_deterministic_algorithms(False)


# More elements than 32 bits can count; results of the last of them are checked, as the operation gives them alone.
PLANES, ROWS = (3, 64, 3360, 3360), (8200, 262_144)
LARGE = {
    "relu": (functional.relu, PLANES),
    "gelu": (functional.gelu, PLANES),
    "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2, 1), PLANES),
    "avg_pool2d": (lambda x: functional.avg_pool2d(x, 2), PLANES),
    "adaptive_avg_pool2d": (lambda x: functional.adaptive_avg_pool2d(x, 7), PLANES),
    "adaptive_max_pool2d": (lambda x: functional.adaptive_max_pool2d(x, 7), PLANES),
    "batch_norm in evaluation": (
        lambda x: functional.batch_norm(x, torch.zeros(64, device=CUDA), torch.full((64,), 2.0, device=CUDA)),
        PLANES,
    ),
    "depthwise conv2d": (
        lambda x: functional.conv2d(
            x, torch.linspace(-1, 1, 576, device=CUDA).half().reshape(64, 1, 3, 3), None, 1, 1, 1, 64
        ),
        PLANES,
    ),
    "softmax": (lambda x: functional.softmax(x, 1), ROWS),
    "cross_entropy": (
        lambda x: functional.cross_entropy(x, torch.arange(len(x), device=CUDA), reduction="none"),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(name, channels_last):
    function, shape = LARGE[name]
    if channels_last and len(shape) == 2:
        return  # rows have one layout
    torch.cuda.empty_cache()
    needed = 6 * 2 * torch.Size(shape).numel()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the GPU")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device=CUDA, memory_format=memory_format).normal_()
    assert x.numel() > 2**31
    x.requires_grad_()
    output = function(x)
    cotangent = torch.empty_like(output).normal_()
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    count = 2 if len(shape) == 2 else 1
    for places in (slice(0, count), slice(-count, None)):
        if name == "cross_entropy" and places.start != 0:
            classes = torch.arange(len(x), device=CUDA)[places]
            alone = x.detach()[places].requires_grad_()
            expected = functional.cross_entropy(alone, classes, reduction="none")
        else:
            alone = x.detach()[places].requires_grad_()
            expected = function(alone)
        (expected_gradient,) = torch.autograd.grad(expected, alone, cotangent[places])
        assert_same(output.detach()[places], expected.detach())
        assert_same(gradient[places], expected_gradient)


def test_batch_norm_over_more_than_2_to_the_31_elements():
    torch.cuda.empty_cache()
    needed = 8 * 2 * torch.Size(PLANES).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the GPU")
    x = torch.empty(PLANES, dtype=torch.float16, device=CUDA).normal_(3, 2).requires_grad_()
    output = functional.batch_norm(x, None, None, training=True)
    for channel in (0, 63):
        plane = output.detach()[:, channel].float()
        assert abs(float(plane.mean())) < 1e-3 and abs(float(plane.std()) - 1) < 1e-3
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert float(gradient.abs().max()) < 1e-3  # a constant gradient is all projected away


def _trained(model, steps, images, labels, autocast=None, loss_of=F.cross_entropy):
    """The losses of some steps, and the optimiser's scale of the last where there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0, enabled=autocast is torch.float16)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            loss = loss_of(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses, scaler.get_scale()


def _resnet50(dtype, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = NETWORKS["resnet50"](classes=10).to(CUDA, dtype, memory_format=memory_format)
    images = torch.randn(16, 3, 64, 64, device=CUDA).to(dtype).contiguous(memory_format=memory_format)
    return model, images, torch.arange(16, device=CUDA) % 10


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_converted_resnet50_trains_as_torchs(memory_format):
    """In float64, where twenty steps do not magnify the rounding of either into a difference."""
    theirs, images, labels = _resnet50(torch.float64, memory_format)
    ours = manual_ops.convert(copy.deepcopy(theirs))
    got, _ = _trained(ours, 20, images, labels, loss_of=functional.cross_entropy)
    expected, _ = _trained(theirs, 20, images, labels)
    assert min(got[-5:]) < got[0] / 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_converted_resnet50_trains_under_autocast(low, memory_format):
    theirs, images, labels = _resnet50(torch.float32, memory_format)
    ours = manual_ops.convert(copy.deepcopy(theirs))
    got, scale = _trained(ours, 20, images, labels, low, functional.cross_entropy)
    expected, _ = _trained(theirs, 20, images, labels, low)
    # One pass apart by the rounding of fifty layers; later ones are of weights that have gone ways of their own.
    assert got[0] == pytest.approx(expected[0], rel=0.05)
    assert min(got[-5:]) < got[0] / 2 and min(expected[-5:]) < expected[0] / 2
    assert scale >= 1
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_uncompiled(mode):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = manual_ops.convert(MobileNet()).to(CUDA, torch.float64)
    uncompiled = copy.deepcopy(model)
    images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64, device=CUDA), torch.arange(8, device=CUDA) % 5
    got, _ = _trained(torch.compile(model, fullgraph=True, mode=mode), 4, images, labels)
    expected, _ = _trained(uncompiled, 4, images, labels)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@operations
def test_kernels_run_on_the_device_of_their_operands(operation):
    sample = operation.samples()[0]
    expected = _run(operation.function, sample.to(torch.float64, "cuda:0"))
    with torch.cuda.device(0):
        results = _run(operation.function, sample.to(torch.float64, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(result.device.index == 1 for result in results)
    _assert_equal_bits([result.cpu() for result in results], [result.cpu() for result in expected])


# Calls that nobody lists: the CPU's results are compared with torch's in test_parity.py, and here the GPU's with those.


def _outcome(function, call, device):
    """What a call gives on a device: an error, or its outputs and gradients, each with its strides, on the CPU."""
    from test_parity import IN_PLACE, _steps

    args, kwargs = call.make()
    args = [moved(arg, device) for arg in args]
    kwargs = {name: moved(value, device) for name, value in kwargs.items()}
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]
    if call.name.endswith("_") or kwargs.get("inplace") or (len(args) > 1 and call.name in IN_PLACE):
        args = [arg.clone() if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = function(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = []
        if outputs[0].requires_grad:
            gradients = torch.autograd.grad(outputs[0], leaves, _cotangent(outputs[0].detach()), allow_unused=True)
    except Exception as error:
        return error
    found = [value if value is None else value.detach() for value in (*outputs, *gradients)]
    return [None if value is None else (value.cpu(), _steps(value)) for value in found]


def _differences(call):
    from test_parity import EPSILON

    function = getattr(functional, call.name)
    here = _outcome(function, call, "cpu")
    if isinstance(here, IndexError):
        return []  # a target out of range: on CUDA an assertion on the device, and the end of the process's GPU
    there = _outcome(function, call, "cuda")
    if isinstance(here, Exception) or isinstance(there, Exception):
        alike = type(here) is type(there)
        return [] if alike else [f"CPU {here!r:.200}, GPU {there!r:.200}"]
    found = []
    for place, (cpu, gpu) in enumerate(zip(here, there, strict=True)):
        if cpu is None or gpu is None:
            found += [] if cpu is gpu else [f"{place}: CPU {cpu}, GPU {gpu}"]
            continue
        (cpu, steps), (gpu, gpu_steps) = cpu, gpu
        tolerance = EPSILON.get(cpu.dtype, 0)
        if cpu.shape != gpu.shape or cpu.dtype != gpu.dtype or steps != gpu_steps:
            found.append(f"{place}: CPU {cpu.shape} {steps} {cpu.dtype}, GPU {gpu.shape} {gpu_steps} {gpu.dtype}")
        elif not torch.allclose(cpu.double(), gpu.double(), tolerance, tolerance, equal_nan=True):
            found.append(f"{place}: CPU {cpu.flatten()[:8].tolist()}, GPU {gpu.flatten()[:8].tolist()}")
    return found


FAMILIES = (
    "convolution",
    "pool",
    "adaptive_pool",
    "batch_norm",
    "activation",
    "softmax",
    "linear",
    "cross_entropy",
    "loss",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_call_is_that_of_the_cpu(family):
    hypothesis = pytest.importorskip("hypothesis")
    import test_parity

    @test_parity._settings(100)
    @hypothesis.given(test_parity.calls(getattr(test_parity, family)))
    def check(call):
        with modes.backend("native"):
            assert _differences(call) == []

    check()
