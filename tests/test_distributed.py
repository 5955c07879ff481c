"""Two processes, each with a part of the batch, are one process with the whole."""

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import manual_ops
from manual_ops import modes, nn
from manual_ops.geometry import accumulation_dtype
from manual_ops.ops.sync_batch_norm import all_gather, all_reduce
from models import ResNet
from support import assert_same

pytestmark = pytest.mark.cpu("the processes exchange by gloo")

WORLD = 2


def _worker(rank, store, connection):
    """Runs the jobs that arrive, each in step with the other process."""
    torch.set_num_threads(1)
    timeout = timedelta(minutes=3)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout)
    while True:
        function, backend, args = connection.recv()
        torch.manual_seed(rank)
        try:
            with modes.backend(backend):
                answer = True, function(*args)
        except Exception:
            answer = False, traceback.format_exc()
        # As bytes: the processes share no memory with each other or with the test.
        connection.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def processes():
    """run(function, backend, *args) -> what function(*args) returned in each of the two processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        connections, workers = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            workers.append(context.Process(target=_worker, args=(rank, f"{folder}/store", theirs), daemon=True))
            workers[-1].start()
            connections.append(ours)

        def run(function, backend, *args):
            for connection in connections:
                connection.send((function, backend, args))
            answers = []
            for connection in connections:
                assert connection.poll(200), "a process gave no answer"
                answers.append(pickle.loads(connection.recv_bytes()))
            problems = [value for worked, value in answers if not worked]
            assert not problems, "\n".join(problems)
            return [value for _, value in answers]

        yield run
        for worker in workers:
            worker.kill()
            worker.join()


def _leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def _part(tensor, sizes):
    """This process's part of a batch; all of it where this is the one process with the whole."""
    return tensor.split(sizes)[dist.get_rank()] if dist.is_initialized() else tensor


def _total(tensor):
    """The sum over the processes."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _layer(kind, options, dtype):
    """The same layer in every process: ours, or torch's batch norm for the process with the whole batch."""
    layer = kind(5, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(5, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def _train_layer(kind, options, sizes, steps, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Outputs and input gradients of a process, gradients of the parameters summed over the processes, buffers."""
    # float32 parameters for a 16-bit input: the processes' shares of a 16-bit gradient would each be rounded.
    layer = _layer(kind, options, accumulation_dtype(dtype))
    outputs, gradients, parameter_gradients = [], [], []
    for whole, cotangent in steps:
        # torch's own sums lose accuracy in 16 bits where the two are not of one memory format.
        input, cotangent = (
            _part(each, sizes).to(dtype).contiguous(memory_format=memory_format) for each in (whole, cotangent)
        )
        input = _leaf(input)
        output = layer(input)
        found = torch.autograd.grad(output, [input, *layer.parameters()], cotangent)
        assert output.stride() == found[0].stride() == input.stride()
        outputs.append(output.detach())
        gradients.append(found[0])
        parameter_gradients.append([_total(gradient) for gradient in found[1:]])
    return outputs, gradients, parameter_gradients, dict(layer.named_buffers())


def _assert_parts_of(answers, expected, **tolerance):
    outputs, gradients, parameter_gradients, buffers = expected
    for index, whole in ((0, outputs), (1, gradients)):
        for step, want in enumerate(whole):
            assert_same(torch.cat([answer[index][step] for answer in answers]), want, **tolerance)
    for answer in answers:
        for got, want in zip(answer[2], parameter_gradients, strict=True):
            for gradient, other in zip(got, want, strict=True):
                assert_same(gradient, other, **tolerance)
        assert answer[3].keys() == buffers.keys()
        for name, buffer in buffers.items():
            assert_same(answer[3][name], buffer, **tolerance)


def _steps(sizes, *rest, count=2, dtype=torch.float64):
    shape = (sum(sizes), 5, *rest)
    return [(torch.randn(shape, dtype=dtype) * 2 + 3, torch.randn(shape, dtype=dtype)) for _ in range(count)]


@pytest.mark.parametrize("sizes", [(3, 3), (5, 2), (0, 4), (4, 0), (1, 1)], ids=str)
@pytest.mark.parametrize(("axes", "rest"), [(1, ()), (1, (4,)), (2, (4, 3)), (3, (2, 3, 2))], ids=str)
def test_two_processes_are_one_with_the_whole_batch(processes, backend, sizes, axes, rest):
    steps = _steps(sizes, *rest)
    torchs = getattr(torch.nn, f"BatchNorm{axes}d")
    expected = _train_layer(torchs, {}, sizes, steps)
    _assert_parts_of(processes(_train_layer, backend, nn.SyncBatchNorm, {}, sizes, steps), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.6, "eps": 0.3},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_options(processes, backend, options):
    steps = _steps((3, 2), 4, 3)
    expected = _train_layer(torch.nn.BatchNorm2d, options, (3, 2), steps)
    _assert_parts_of(processes(_train_layer, backend, nn.SyncBatchNorm, options, (3, 2), steps), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_channels_last(processes, backend, dtype):
    arguments = {}, (3, 2), _steps((3, 2), 4, 3), dtype
    for memory_format in (torch.contiguous_format, torch.channels_last):
        expected = _train_layer(torch.nn.BatchNorm2d, *arguments, memory_format)
        _assert_parts_of(processes(_train_layer, backend, nn.SyncBatchNorm, *arguments, memory_format), expected)


def test_sixteen_bit_gradients_round_once(processes, backend):
    """A gradient that is nearly constant is cancelled in float32, not in what its terms would round to."""
    sizes, dtype = (8, 8), torch.bfloat16
    steps = [(input, cotangent * 0.02 + 3) for input, cotangent in _steps(sizes, 4, 4, count=1)]
    steps = [(input.to(dtype), cotangent.to(dtype)) for input, cotangent in steps]
    wide = [(input.double(), cotangent.double()) for input, cotangent in steps]
    (_, (expected,), _, _) = _train_layer(torch.nn.BatchNorm2d, {}, sizes, wide)
    answers = processes(_train_layer, backend, nn.SyncBatchNorm, {}, sizes, steps, dtype)
    gradient = torch.cat([answer[1][0] for answer in answers]).double()
    torch.testing.assert_close(gradient, expected, rtol=2**-8, atol=1e-3 * expected.abs().max().item())


def test_large_means_cost_no_accuracy(processes, backend):
    """Variances are merged around the means: squares of values far from 0 would leave nothing of them."""
    sizes = (16, 8)
    steps = [(input + 1e4, cotangent) for input, cotangent in _steps(sizes, 5, 5)]
    steps = [(input.float(), cotangent.float()) for input, cotangent in steps]
    wide = [(input.double(), cotangent.double()) for input, cotangent in steps]
    expected = _train_layer(torch.nn.BatchNorm2d, {}, sizes, wide)
    answers = processes(_train_layer, backend, nn.SyncBatchNorm, {}, sizes, steps, torch.float32)
    for index in (0, 1):
        for step, want in enumerate(expected[index]):
            # float32 numbers near 1e4 are 1e-3 apart, and so is the mean from its true value.
            assert_same(torch.cat([answer[index][step] for answer in answers]).double(), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_spread_to_the_other_process(processes, backend, value):
    steps = _steps((2, 3), 3)
    steps[0][0][0, 1, 2] = value
    expected = _train_layer(torch.nn.BatchNorm1d, {}, (2, 3), steps)
    _assert_parts_of(processes(_train_layer, backend, nn.SyncBatchNorm, {}, (2, 3), steps), expected)


def test_an_empty_batch_everywhere_moves_nothing(processes, backend):
    before = dict(nn.SyncBatchNorm(5, dtype=torch.float64).named_buffers())
    for answer in processes(_train_layer, backend, nn.SyncBatchNorm, {}, (0, 0), _steps((0, 0), 3, count=1)):
        assert all((gradient == 0).all() for gradient in answer[2][0])
        assert torch.equal(answer[3]["running_mean"], before["running_mean"])
        assert torch.equal(answer[3]["running_var"], before["running_var"])


class _Composed(torch.nn.BatchNorm1d):
    """Batch norm in small steps: the derivatives of torch's own are wrong from the third order on."""

    def forward(self, input):
        var, mean = torch.var_mean(input, (0, 2), correction=0, keepdim=True)
        xhat = (input - mean) / (var + self.eps).sqrt()
        return xhat * self.weight[:, None] + self.bias[:, None]


def _higher_orders(kind, sizes, whole, needs):
    """Derivatives of orders 1 to 3, along directions of the whole, by the tensors named in `needs`."""
    layer = _layer(kind, {}, torch.float64)
    input = _part(whole["input"], sizes).clone().requires_grad_("input" in needs)
    cotangent = _part(whole["cotangent"], sizes).clone().requires_grad_("cotangent" in needs)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in needs)
    named = {"input": input, "cotangent": cotangent, **dict(layer.named_parameters())}
    leaves = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    directions = {name: _part(whole[name + "'"], sizes) if leaf.dim() > 1 else whole[name + "'"]
                  for name, leaf in leaves.items()}  # fmt: skip
    value = (layer(input) * cotangent).sum()
    orders = []
    for order in range(3):
        found = torch.autograd.grad(value, list(leaves.values()), create_graph=order < 2, materialize_grads=True)
        orders.append(
            {name: g.detach() if leaves[name].dim() > 1 else _total(g) for name, g in zip(leaves, found, strict=True)}
        )
        terms = [(g * directions[name]).sum() for name, g in zip(leaves, found, strict=True) if g.requires_grad]
        if not terms:
            break
        value = sum(terms)
    return orders


@pytest.mark.parametrize(
    "needs",
    [
        ("input", "weight", "bias", "cotangent"),
        ("input",),
        ("input", "weight"),
        ("weight", "bias", "cotangent"),
        ("bias", "cotangent"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("sizes", [(4, 2), (0, 5)], ids=str)
def test_derivatives_to_the_third_order(processes, backend, needs, sizes):
    shape = (sum(sizes), 5, 3)
    whole = {name: torch.randn(shape, dtype=torch.float64) for name in ("input", "cotangent", "input'", "cotangent'")}
    whole |= {name: torch.randn(5, dtype=torch.float64) for name in ("weight'", "bias'")}
    expected = _higher_orders(_Composed, sizes, whole, needs)
    answers = processes(_higher_orders, backend, nn.SyncBatchNorm, sizes, whole, needs)
    for order, derivatives in enumerate(expected):
        for name, want in derivatives.items():
            parts = [answer[order][name] for answer in answers]
            for got in [torch.cat(parts)] if want.dim() > 1 else parts:
                assert_same(got, want, rtol=1e-8, atol=1e-8)


def _with_weights_of_its_own(sizes, whole):
    """The gradients where each process has another weight: by input, by this process's weight."""
    input = _leaf(_part(whole["input"], sizes))
    weight = _leaf(whole["weights"][dist.get_rank()])
    layer = nn.SyncBatchNorm(5, affine=False, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(weight)
    loss = (layer(input) * _part(whole["cotangent"], sizes)).sum()
    return torch.autograd.grad(loss, (input, layer.weight))


def test_processes_may_have_different_weights(processes, backend):
    """torch sums the gradients before it multiplies by the weight, which is right for equal ones alone."""
    sizes = (4, 2)
    whole = {name: torch.randn(6, 5, 3, dtype=torch.float64) for name in ("input", "cotangent")}
    whole["weights"] = torch.randn(WORLD, 5, dtype=torch.float64)
    input, weights = _leaf(whole["input"]), _leaf(whole["weights"])
    xhat = torch.nn.functional.batch_norm(input, None, None, None, None, True)
    output = xhat * weights.repeat_interleave(torch.tensor(sizes), 0)[:, :, None]
    by_input, by_weights = torch.autograd.grad((output * whole["cotangent"]).sum(), (input, weights))
    answers = processes(_with_weights_of_its_own, backend, sizes, whole)
    assert_same(torch.cat([answer[0] for answer in answers]), by_input)
    assert_same(torch.stack([answer[1] for answer in answers]), by_weights)


def _forward_mode(kind, sizes, whole):
    """The tangent of the output, and of the gradient by the input."""
    layer = _layer(kind, {"track_running_stats": False}, torch.float64)
    input, tangent, cotangent = (_part(whole[name], sizes) for name in ("input", "tangent", "cotangent"))
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    directions = {"weight": whole["weight'"], "bias": whole["bias'"]}

    def output(input, parameters):
        return torch.func.functional_call(layer, parameters, (input,))

    def gradient(input, parameters):
        return torch.func.grad(lambda input: (output(input, parameters) * cotangent).sum())(input)

    primals, tangents = (input, parameters), (tangent, directions)
    return [torch.func.jvp(function, primals, tangents)[1].detach() for function in (output, gradient)]


@pytest.mark.parametrize("sizes", [(4, 2), (0, 5)], ids=str)
def test_forward_mode(processes, backend, sizes):
    whole = {name: torch.randn(sum(sizes), 5, 3, dtype=torch.float64) for name in ("input", "tangent", "cotangent")}
    whole |= {name: torch.randn(5, dtype=torch.float64) for name in ("weight'", "bias'")}
    expected = _forward_mode(torch.nn.BatchNorm1d, sizes, whole)
    answers = processes(_forward_mode, backend, nn.SyncBatchNorm, sizes, whole)
    for index, want in enumerate(expected):
        assert_same(torch.cat([answer[index] for answer in answers]), want)


def _several_batches(sizes, batches):
    """vmap over a gradient, and over its tangent."""
    layer = nn.SyncBatchNorm(5, dtype=torch.float64, track_running_stats=False)
    batches = torch.stack([_part(batch, sizes) for batch in batches])

    def gradient(batch):
        return torch.func.grad(lambda batch: layer(batch).pow(3).sum())(batch)

    def tangent(batch):
        return torch.func.jvp(gradient, (batch,), (batch.cos(),))[1]

    together = [torch.func.vmap(function)(batches) for function in (gradient, tangent)]
    apart = [torch.stack([function(batch) for batch in batches]) for function in (gradient, tangent)]
    return [tensor.detach() for tensor in together], [tensor.detach() for tensor in apart]


def test_vmap(processes, backend):
    for together, apart in processes(_several_batches, backend, (2, 3), torch.randn(3, 5, 5, 2, dtype=torch.float64)):
        for got, want in zip(together, apart, strict=True):
            assert_same(got, want)


def _compiled(sizes, steps):
    """Outputs and gradients of a compiled layer, and of the same layer as it is."""
    found = []
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer = nn.SyncBatchNorm(5, dtype=torch.float64)
        run = wrap(layer)
        input = _leaf(_part(steps[0][0], sizes))
        output = run(input)
        gradients = torch.autograd.grad(output, [input, *layer.parameters()], _part(steps[0][1], sizes))
        found.append([output.detach(), *gradients, layer.running_mean, layer.running_var])
    return found


def test_it_compiles_as_one_graph(processes):
    for eager, compiled in processes(_compiled, "native", (3, 2), _steps((3, 2), 4, count=1)):
        for got, want in zip(compiled, eager, strict=True):
            assert_same(got, want)


def _collectives():
    """The two operators' own checks, and what they give."""
    group = dist.group.WORLD.group_name
    input = torch.arange(6.0).reshape(2, 3).t() + dist.get_rank()
    for operator in (all_reduce, all_gather):
        for backend in ("native", "python"):
            torch.library.opcheck(getattr(operator, backend), (input, group), test_utils=("test_schema",))
            torch.library.opcheck(getattr(operator, backend), (input, group), test_utils=("test_faketensor",))
    return all_reduce(input, group, backend="native"), all_gather(input, group, backend="native")


def test_collectives_are_operators(processes):
    input = torch.arange(6.0).reshape(2, 3).t()
    for total, gathered in processes(_collectives, "native"):
        assert torch.equal(total, 2 * input + 1)
        assert torch.equal(gathered, torch.stack([input, input + 1]))


def _alone(kind, steps):
    """With a group of one process, and in evaluation, nothing is shared."""
    groups = [dist.new_group([rank]) for rank in range(WORLD)]
    layer = nn.SyncBatchNorm(5, dtype=torch.float64, process_group=groups[dist.get_rank()])
    plain = torch.nn.BatchNorm1d(5, dtype=torch.float64)
    found = []
    for input, _ in steps:
        input = input + dist.get_rank()
        found.append((layer(input).detach(), plain(input).detach()))
    layer.process_group = None
    layer.eval(), plain.eval()
    if dist.get_rank() == 0:  # alone: evaluation waits for nobody
        found.append((layer(input).detach(), plain(input).detach()))
    return found


def test_a_group_of_one_and_evaluation_are_plain_batch_norm(processes, backend):
    for found in processes(_alone, backend, None, _steps((4,), 3)):
        for ours, theirs in found:
            assert_same(ours, theirs)


def _in_groups(sizes, steps):
    """A group that holds both processes in the other order, given by the argument."""
    group = dist.new_group([1, 0])
    return _train_layer(nn.SyncBatchNorm, {"process_group": group}, sizes, steps)


def test_a_process_group_may_be_given(processes, backend):
    steps = _steps((4, 2), 3)
    expected = _train_layer(torch.nn.BatchNorm1d, {}, (4, 2), steps)
    _assert_parts_of(processes(_in_groups, backend, (4, 2), steps), expected)


def _torch_refuses(input):
    with pytest.raises(ValueError, match="GPU"):
        torch.nn.SyncBatchNorm(5)(input)
    return nn.SyncBatchNorm(5)(input).shape


def test_it_runs_on_the_cpu_where_torchs_refuses(processes):
    assert processes(_torch_refuses, "native", torch.randn(4, 5, 2)) == [(4, 5, 2)] * WORLD


def _wrong(input):
    for dims, error in (((5,), ValueError), ((2, 0, 3), ValueError), ((2, 4, 3), RuntimeError)):
        with pytest.raises(error):
            nn.SyncBatchNorm(5)(torch.randn(dims))
    with pytest.raises(NotImplementedError, match="sync_batch_norm"):
        nn.SyncBatchNorm(5)(torch.ones(2, 5, 3, dtype=torch.long))


def test_wrong_calls_are_refused_before_anything_is_sent(processes):
    processes(_wrong, "native", None)


# Models


def _converted(model):
    """A model of torch's layers on manual_ops, with synchronised batch norm."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(manual_ops.convert(model))


def _data_parallel(model):
    return DistributedDataParallel(_converted(model))


def _sharded(model):
    model = _converted(model)
    for block in (*model.layer1, *model.layer2):
        fully_shard(block)
    return fully_shard(model)


def _train_model(wrap, images, labels, sizes):
    """Losses, gradients of the last step, and the trained state, after three steps of one batch each."""
    torch.manual_seed(0)
    model = ResNet().double()
    model = wrap(model) if wrap else model
    loss_function = manual_ops.nn.CrossEntropyLoss(reduction="sum") if wrap else torch.nn.CrossEntropyLoss(
        reduction="sum"
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for batch, targets in zip(images, labels, strict=True):
        optimizer.zero_grad()
        # The wrappers average the gradients over the processes.
        loss = loss_function(model(_part(batch, sizes)), _part(targets, sizes)) / len(batch)
        (loss * (WORLD if wrap else 1)).backward()
        optimizer.step()
        losses.append(_total(loss))
    gradients = {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}
    state = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        evaluated = model(images[0])
    return losses, *({name.removeprefix("module."): t for name, t in d.items()} for d in (gradients, state)), evaluated


def _whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.mark.parametrize("wrap", [_data_parallel, _sharded], ids=["DistributedDataParallel", "fully_shard"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)], ids=str)
def test_a_converted_resnet_trains_as_in_one_process(processes, backend, wrap, sizes):
    images = torch.randn(3, sum(sizes), 3, 20, 18, dtype=torch.float64)
    labels = torch.randint(5, (3, sum(sizes)))
    losses, gradients, state, evaluated = _train_model(None, images, labels, sizes)
    for answer in processes(_train_model, backend, wrap, images, labels, sizes):
        for got, want in zip(answer[0], losses, strict=True):
            assert_same(got, want, rtol=1e-8, atol=1e-8)
        for found, expected in ((answer[1], gradients), (answer[2], state)):
            assert found.keys() == expected.keys()
            for name, want in expected.items():
                assert_same(found[name], want, rtol=1e-7, atol=1e-8)
        assert_same(answer[3], evaluated, rtol=1e-7, atol=1e-8)


# convert_sync_batchnorm


@pytest.mark.parametrize("package", [torch.nn, nn], ids=["torch", "manual_ops"])
def test_convert_sync_batchnorm_replaces_the_batch_norms_that_torchs_method_replaces(package):
    model = package.Sequential(
        package.BatchNorm1d(3),
        package.Sequential(package.BatchNorm2d(4, momentum=None, eps=0.1), package.ReLU()),
        torch.nn.ModuleDict({"norm": package.BatchNorm3d(2, affine=False, track_running_stats=False)}),
        package.SyncBatchNorm(2).eval(),
        torch.nn.GroupNorm(1, 2),
        torch.nn.InstanceNorm2d(2),
    )
    state, parameters = dict(model.state_dict()), list(model.parameters())
    expected = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group="a group")
    assert converted is model
    for (name, ours), theirs in zip(converted.named_modules(), expected.modules(), strict=True):
        assert ours.training == theirs.training
        assert ours.extra_repr() == theirs.extra_repr()
        if isinstance(theirs, torch.nn.SyncBatchNorm):
            assert type(ours) is nn.SyncBatchNorm, name
            assert ours.process_group == "a group"
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in converted.state_dict().items())
    assert all(ours is before for ours, before in zip(converted.parameters(), parameters, strict=True))


def test_convert_sync_batchnorm_of_a_layer_is_a_new_layer():
    layer = nn.BatchNorm2d(3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted) is nn.SyncBatchNorm
    assert converted.weight is layer.weight and converted.running_mean is layer.running_mean


def test_convert_sync_batchnorm_keeps_a_shared_layer_one():
    """torch's method converts the first of two places in one parent, and leaves the second."""
    norm = nn.BatchNorm1d(3)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(norm, nn.ReLU(), norm))
    assert model[0] is model[2]
    assert type(model[0]) is nn.SyncBatchNorm


def test_convert_sync_batchnorm_keeps_the_relu_of_the_fused_layers():
    """torch's method takes a fused layer for a batch norm, and drops its ReLU."""
    fused = nn.BatchNormReLU2d(3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    input, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert_same(converted(input, residual), fused(input, residual))
    assert_same(converted(input), fused(input))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(converted)) is nn.SyncBatchNormReLU


def test_convert_knows_the_twin_of_torchs_layer():
    layer = manual_ops.convert(torch.nn.SyncBatchNorm(3))
    assert type(layer) is nn.SyncBatchNorm
    assert type(manual_ops.convert(layer, to="torch")) is torch.nn.SyncBatchNorm


# torchrun


def _torchrun(*args, processes=WORLD):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.run(
        [str(word) for word in (*command, "-m", "manual_ops", *args)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_torchrun_trains_one_model_in_two_processes(tmp_path):
    path: Path = tmp_path / "train.json"
    result = _torchrun("train", "--epochs", 1, "--dtype", "float64", "--json", path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("largest difference") == 1  # one of the processes speaks
    training = json.loads(path.read_text())["training"]
    assert training["processes"] == WORLD
    assert training["largest_difference"] < 1e-9
    assert training["torch"]["accuracy"] == training["manual_ops"]["accuracy"]
