"""torch.compile and torch.export: no graph break, no needless recompilation, the results of the uncompiled call."""

import copy

import pytest
import torch

import manual_ops
from manual_ops import functional as F
from manual_ops import modes, registry
from models import MobileNet, ResNet
from support import tensor

SAMPLES = [
    pytest.param(operation.function, index, id=f"{operation.name}-{sample.label}")
    for operation in registry.OPERATIONS.values()
    for index, sample in enumerate(operation.samples())
]
FIRST_SAMPLES = [param for param in SAMPLES if param.values[1] == 0]
IN_PLACE = (F.relu_, F.leaky_relu_)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _sample(function, index, device, requires_grad):
    operation = next(row for row in registry.OPERATIONS.values() if row.function is function)
    sample = operation.samples()[index].to(torch.float64, device)
    for value in (*sample.args, *sample.kwargs.values()):
        if isinstance(value, torch.Tensor) and not requires_grad:
            value.requires_grad_(False)
    return sample.args, sample.kwargs


def _run(function, args, kwargs):
    """The value, with every gradient where one is asked for."""
    inputs = [value for value in (*args, *kwargs.values()) if getattr(value, "requires_grad", False)]
    output = function(*args, **kwargs)
    if not inputs:
        return [output]
    cotangent = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]


def _assert_compiles(function, index, device, *, training, **options):
    """Compiled without a graph break, the sample gives what it gives uncompiled, in the same strides."""
    compiled = torch.compile(function, fullgraph=True, **options)
    results = _run(compiled, *_sample(function, index, device, training))
    expected = _run(function, *_sample(function, index, device, training))
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same, check_stride=same.numel() > 0)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("function", "index"), SAMPLES)
def test_every_sample_compiles_in_one_graph(function, index, training, device):
    _assert_compiles(function, index, device, training=training, backend="eager")


@pytest.mark.parametrize(("function", "index"), FIRST_SAMPLES)
def test_every_operation_trains_through_aot_autograd(function, index, device):
    _assert_compiles(function, index, device, training=True, backend="aot_eager")


@pytest.mark.slow  # every operation with symbolic sizes: about a second each
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("function", "index"), SAMPLES)
def test_every_sample_compiles_with_dynamic_shapes(function, index, compiler, training, backend, device):
    _assert_compiles(function, index, device, training=training, backend=compiler, dynamic=True)


@pytest.mark.slow  # the C++ compiler runs for each: several seconds
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("function", "index"), FIRST_SAMPLES)
def test_every_operation_compiles_with_inductor(function, index, training, backend, device):
    _assert_compiles(function, index, device, training=training, backend="inductor")


@pytest.mark.parametrize("function", [F.relu, F.conv2d], ids=["relu", "conv2d"])
def test_inductor_trains(function, device):
    _assert_compiles(function, 0, device, training=True, backend="inductor")


WEIGHT, BIAS = torch.linspace(-1, 1, 144, dtype=torch.float64).reshape(4, 4, 3, 3), torch.ones(4, dtype=torch.float64)
MATRIX = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)
OF_BATCHES = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT, BIAS, 2, 1),
    "depthwise conv2d": lambda x: F.conv2d(x, WEIGHT[:, :1], BIAS, 1, "same", 1, 4),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, WEIGHT, None, 2, 1, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, BIAS, BIAS, training=True),
    "batch_norm in evaluation": lambda x: F.batch_norm(x, BIAS, BIAS),
    "batch_norm_relu": lambda x: F.batch_norm_relu(x, None, None, BIAS, BIAS, training=True),
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 2, inplace=True),
    "gelu": F.gelu,
    "softmax": lambda x: F.softmax(x, 1),
    "linear": lambda x: F.linear(x, MATRIX),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.ones(x.shape[0], 6, 5, dtype=torch.long)),
    "mse_loss": lambda x: F.mse_loss(x, x * 2),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid()),
}


@pytest.mark.cpu("the functions' weights are constants made when the file is read")
@pytest.mark.parametrize("name", OF_BATCHES)
def test_another_batch_size_does_not_recompile(name, backend):
    function = OF_BATCHES[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (11, 7, 8):  # other numbers than the sizes of windows, which dynamo would take for one with them
            x = tensor(batch, 4, 6, 5)
            for result, same in zip(_run(compiled, (x,), {}), _run(function, (x,), {}), strict=True):
                torch.testing.assert_close(result, same)


@pytest.mark.parametrize(
    "function",
    [lambda x: F.mse_loss(x, x, reduction="none"), lambda x: F.linear(x, x, x[0])],
    ids=["mse_loss", "linear"],
)
def test_one_tensor_as_two_arguments(function, backend):
    x = tensor(3, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for result, same in zip(_run(compiled, (x,), {}), _run(function, (x,), {}), strict=True):
        torch.testing.assert_close(result, same)


def test_the_backend_is_guarded():
    operators = []

    def recording(graph, inputs):
        operators.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    x = tensor(3, 4, requires_grad=False)
    compiled = torch.compile(lambda x: F.softmax(x, 1), fullgraph=True, backend=recording)
    for name in ("native", "python", "native"):
        with modes.backend(name):
            torch.testing.assert_close(compiled(x), x.softmax(1))
    assert len(operators) == 2
    native, python = operators
    assert any(operator.startswith("manual_ops.") for operator in native)
    assert any(operator.startswith("manual_ops_python.") for operator in python)


def test_the_backend_may_be_chosen_inside_what_is_compiled():
    def both(x):
        before = modes.current_backend()
        modes.set_backend("python")
        first = F.sigmoid(x)
        modes.set_backend(before)
        return first + F.sigmoid(x)

    x = tensor(3, 4, requires_grad=False)
    compiled = torch.compile(both, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * x.sigmoid())
    assert modes.current_backend() == "native"


@pytest.mark.parametrize(
    ("compiler", "momentum"),
    [("eager", 0.1), ("aot_eager", 0.1), pytest.param("eager", None, id="cumulative average")],
)
def test_running_statistics_move_as_uncompiled(compiler, momentum, backend):
    layer = manual_ops.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    uncompiled = copy.deepcopy(layer)
    # A cumulative average reads the count of batches as a number, which torch's own layer breaks the graph for too.
    compiled = torch.compile(layer, fullgraph=momentum is not None, backend=compiler)
    for _ in range(3):
        x = tensor(4, 3, 5, 2)
        for result, same in zip(_run(compiled, (x,), {}), _run(uncompiled, (x,), {}), strict=True):
            torch.testing.assert_close(result, same)
    torch.testing.assert_close(layer.state_dict(), uncompiled.state_dict())
    assert layer.num_batches_tracked == 3
    layer.eval(), uncompiled.eval()
    torch.testing.assert_close(compiled(x), uncompiled(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [F.relu, F.relu6, F.leaky_relu, F.silu], ids=lambda function: function.__name__)
def test_in_place_activations_write_to_their_input(function, compiler, backend):
    def written(x):
        y = x * 2
        z = function(y, inplace=True)
        return y + z

    x = tensor(3, 4)
    compiled = torch.compile(written, fullgraph=True, backend=compiler)
    for result, same in zip(_run(compiled, (x,), {}), _run(written, (x,), {}), strict=True):
        torch.testing.assert_close(result, same)

    buffer, same = x.detach().clone(), x.detach().clone()
    torch.compile(lambda y: function(y, inplace=True), fullgraph=True, backend=compiler)(buffer)
    torch.testing.assert_close(buffer, function(same, inplace=True))


def _converted(model):
    torch.manual_seed(1)
    return manual_ops.convert(model())


def _train(step, model, batches):
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for x in batches:
        optimiser.zero_grad()
        loss = manual_ops.functional.cross_entropy(step(x), torch.arange(len(x)) % 5)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _assert_trains(model, batches, **options):
    model = _converted(model).double()
    uncompiled = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    batches = [torch.randn(n, 3, 24, 24, dtype=torch.float64) for n in batches]
    torch.testing.assert_close(_train(compiled, model, batches), _train(uncompiled, uncompiled, batches))
    torch.testing.assert_close(model.state_dict(), uncompiled.state_dict())
    model.eval(), uncompiled.eval()
    torch.testing.assert_close(compiled(batches[0]), uncompiled(batches[0]))


def test_a_converted_resnet_trains_in_one_graph():
    _assert_trains(ResNet, [6, 6, 6], backend="eager")


@pytest.mark.slow  # a whole model is traced, forward and backward: ten seconds and more
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("model", [ResNet, MobileNet])
def test_a_converted_model_trains_in_one_graph(model, compiler, backend):
    _assert_trains(model, [6, 6, 6], backend=compiler)


@pytest.mark.slow  # a whole model is traced, forward and backward: ten seconds and more
def test_a_converted_model_trains_with_batches_of_any_size(backend):
    _assert_trains(ResNet, [11, 10, 14], backend="aot_eager", dynamic=True)
    # One graph for training and one for evaluation, whatever the sizes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow  # a whole model is traced, forward and backward: ten seconds and more
def test_a_converted_resnet_trains_with_inductor():
    _assert_trains(ResNet, [6, 6, 6], backend="inductor")


def test_a_converted_model_has_no_graph_break():
    explanation = torch._dynamo.explain(_converted(ResNet))(torch.randn(2, 3, 24, 24))
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])  # traces the Python too
@pytest.mark.parametrize("model", [ResNet, MobileNet])
def test_a_converted_model_exports_in_evaluation(model, strict, backend):
    model = _converted(model).eval()
    x = torch.randn(4, 3, 24, 24)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
        namespace = "manual_ops_python" if backend == "python" else "manual_ops"
        assert any(str(node.target).startswith(f"{namespace}.conv") for node in program.graph.nodes)
        for batch in (x, torch.randn(7, 3, 24, 24)):
            torch.testing.assert_close(program.module()(batch), model(batch))


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    model = _converted(MobileNet).eval()
    x = torch.randn(2, 3, 24, 24)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.vmap])
def test_a_transform_after_a_graph_break_is_right_or_raises(transform):
    x = tensor(4, requires_grad=False)
    compiled = torch.compile(transform(F.sigmoid), backend="aot_eager")
    if torch.__version__ < "2.13":  # there torch's own functions have zero gradients after a break
        with pytest.raises(NotImplementedError, match=r"inside torch\.compile"):
            compiled(x)
    else:
        torch.testing.assert_close(compiled(x), transform(torch.sigmoid)(x))
