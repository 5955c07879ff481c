"""verify, train, compare and report as functions; they find what is wrong, and say what they saw."""

import dataclasses
import re

import pytest
import torch

from manual_ops import modes
from manual_ops.compare import LAYERS, Layer, arguments, compare, kept_bytes, parse_options
from manual_ops.environment import environment
from manual_ops.registry import OPERATIONS
from manual_ops.report import write_report
from manual_ops.train import load_digits, train
from manual_ops.verify import largest_error, scaled_error, verify

pytestmark = pytest.mark.cpu("the jobs' own logic; they run on the CPU")

FLOAT64 = [torch.float64]


@pytest.fixture(autouse=True)
def _one_thread():
    """The jobs are tiny here: on a busy machine two threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def registry_with(name, **changes):
    return {name: dataclasses.replace(OPERATIONS[name], **changes)}


def slightly_steeper(input, inplace=False):
    """ReLU with its right value and a gradient that is 0.1% off."""
    return torch.relu(input) + 1e-3 * (input - input.detach())


class FirstOrderTanh(torch.autograd.Function):
    """tanh with the right gradient, which does not depend on the input any more."""

    @staticmethod
    def forward(ctx, input):
        output = torch.tanh(input)
        ctx.derivative = 1 - output * output
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.derivative


def test_verify_passes_what_is_right():
    result = verify(["relu", "softmax"], dtypes=FLOAT64)
    assert result.passed
    assert [row.op for row in result.rows] == ["relu", "softmax"] * 2
    assert {(row.gradcheck, row.gradgradcheck) for row in result.rows} == {("passed", "passed")}


def test_verify_finds_a_planted_wrong_gradient():
    result = verify(operations=registry_with("relu", function=slightly_steeper), public_names=[], dtypes=FLOAT64)
    assert not result.passed
    for row in result.rows:
        assert row.gradcheck == "failed"
        assert row.error == pytest.approx(1e-3, rel=0.9)
        assert "plain" in row.problem


def test_verify_finds_a_planted_wrong_second_derivative():
    result = verify(operations=registry_with("tanh", function=FirstOrderTanh.apply), public_names=[], dtypes=FLOAT64)
    assert not result.passed
    for row in result.rows:
        assert (row.gradcheck, row.gradgradcheck) == ("passed", "failed")
        assert "gradgradcheck" in row.problem


def test_verify_finds_a_wrong_running_mean():
    def reference(input, mean):
        mean += input.mean()
        return input

    def ours(input, mean):
        mean += 2 * input.mean()
        return input

    operation = dataclasses.replace(OPERATIONS["relu"], function=ours, reference=reference)
    (sample,) = OPERATIONS["relu"].samples()
    sample = dataclasses.replace(sample, args=(sample.args[0], torch.zeros(1, dtype=torch.float64)))
    assert largest_error(operation, sample.to(torch.float64)) > 1e-3


def test_verify_finds_an_error_that_only_float32_shows():
    def coarse(input, inplace=False):
        return OPERATIONS["relu"].function(input) * (1 if input.dtype == torch.float64 else 1 + 1e-4)

    result = verify(operations=registry_with("relu", function=coarse), public_names=[], backends=["python"])
    assert [(row.dtype, row.passed) for row in result.rows] == [("float64", True), ("float32", False)]


def test_verify_reports_an_exception_as_a_failure():
    def broken(input, inplace=False):
        raise RuntimeError("relu: out of order")

    result = verify(operations=registry_with("relu", function=broken), public_names=[], dtypes=FLOAT64)
    assert not result.passed
    assert "relu: out of order" in result.rows[0].problem


def test_verify_fails_on_a_public_name_without_a_row():
    result = verify(["relu"], public_names=["relu", "new_op"], dtypes=FLOAT64)
    assert result.problems == ("new_op has no row in the registry",)
    assert not result.passed


def test_verify_of_everything_asks_for_every_public_name():
    result = verify(operations=registry_with("relu"), dtypes=FLOAT64, backends=["python"])
    assert "conv2d has no row in the registry" in result.problems


def test_verify_fails_on_an_operation_without_samples():
    result = verify(operations=registry_with("relu", make_samples=lambda draw: []), public_names=[])
    assert result.problems == ("relu has no samples",)
    assert not result.passed


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.1], [0.3], pytest.approx(0.2)),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("inf")], [float("inf")], 0.0),
        ([float("inf")], [-float("inf")], float("inf")),
        ([0.0], [float("nan")], float("inf")),
        ([float("nan")], [0.0], float("inf")),
        ([9.0], [float("nan")], float("inf")),
        ([1.0, 1.0], [1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_scaled_error(ours, theirs, expected):
    assert scaled_error(torch.tensor(ours), torch.tensor(theirs)) == expected


def test_the_digits_are_split_the_same_way_every_time():
    first, second = load_digits(), load_digits()
    assert len(first.labels) + len(first.test_labels) == 1797
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.test_labels, second.test_labels)
    assert torch.bincount(first.test_labels).min() >= 43


def test_both_trainings_have_one_loss_curve_in_float64():
    result = train(2, dtype=torch.float64)
    assert result.largest_difference < 1e-9
    assert result.manual_ops.losses[-1] < result.manual_ops.losses[0]
    assert result.problems(accuracy=0) == []


def test_training_is_repeatable_to_the_bit():
    assert train(1, repeat=True).repeatable


def test_training_on_the_python_kernels_follows_the_same_curve():
    with modes.backend("python"):
        assert train(1, dtype=torch.float64).largest_difference < 1e-9


def test_training_names_what_is_wrong():
    result = train(1)
    parted = dataclasses.replace(result.manual_ops, losses=tuple(loss + 1 for loss in result.manual_ops.losses))
    problems = dataclasses.replace(result, manual_ops=parted, repeatable=False).problems(accuracy=1.01)
    assert len(problems) == 4


@pytest.mark.slow
def test_the_default_training_learns_the_digits():
    assert train().problems() == []


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_every_layer_of_the_table_fits_its_operation(layer):
    small = dataclasses.replace(layer, input=(2, *layer.input[1:]) if layer.op != "nll_loss" else layer.input)
    operation = OPERATIONS[layer.op]
    args, kwargs = arguments(small, operation, torch.float32)
    with torch.no_grad():
        assert operation.reference(*args, **kwargs).isfinite().all()


def test_every_family_has_a_layer_in_the_table():
    assert {OPERATIONS[layer.op].family for layer in LAYERS} == {row.family for row in OPERATIONS.values()}
    assert {OPERATIONS[layer.op].family for layer in LAYERS if layer.quick} == {
        row.family for row in OPERATIONS.values()
    }


def test_compare_restores_the_number_of_threads():
    before = torch.get_num_threads()
    result = compare([Layer("relu", (4, 4))], threads=before + 1, seconds_per_layer=0.01)
    assert torch.get_num_threads() == before
    assert result.threads == before + 1


def test_compare_names_the_layers_that_lose():
    (row,) = compare([Layer("relu", (4, 4))], seconds_per_layer=0.01).measurements
    result = compare([], seconds_per_layer=0.01)
    slow, fast = dataclasses.replace(row, speedup=0.5), dataclasses.replace(row, speedup=2.0)
    slower = dataclasses.replace(row, speedup=0.25)
    assert dataclasses.replace(result, measurements=(slow, fast, slower)).slower == [slower, slow]


def test_compare_finds_a_wrong_result():
    operations = registry_with("relu", function=lambda input, inplace=False: 2 * torch.relu(input))
    result = compare([Layer("relu", (4, 4))], operations=operations, seconds_per_layer=0.01)
    assert result.wrong == list(result.measurements)


def test_kept_bytes_counts_a_storage_once():
    input = torch.randn(1000, requires_grad=True)
    assert kept_bytes(torch.mul, (input, input), {}) == 4000
    assert kept_bytes(torch.exp, (input,), {}) == 4000
    assert kept_bytes(torch.add, (input, 1), {}) == 0


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["kernel_size=3", "stride=(2,1)"], {"kernel_size": 3, "stride": (2, 1)}),
        (["--kernel-size", "3", "--ceil-mode=True"], {"kernel_size": 3, "ceil_mode": True}),
        (["padding=same", "negative_slope=-0.5"], {"padding": "same", "negative_slope": -0.5}),
        (["--negative-slope", "-0.5"], {"negative_slope": -0.5}),
        (["bias=None"], {"bias": None}),
    ],
)
def test_options_are_read_as_literals_or_words(words, options):
    assert parse_options(words) == options


def test_the_report_holds_every_result_and_needs_nothing_else(tmp_path):
    verification = verify(["relu", "softmax"], dtypes=FLOAT64)
    training = train(1, repeat=True)
    exact = train(1, dtype=torch.float64)
    comparison = compare([Layer("relu", (4, 4)), Layer("softmax", (4, 4), {"dim": 1})], seconds_per_layer=0.01)
    path = tmp_path / "new" / "index.html"
    write_report(path, verification, training, exact, comparison, environment())
    page = path.read_text(encoding="utf-8")
    assert re.findall(r"https?://|<link|<script|@import|url\(", page) == []
    for text in (
        "relu",
        "softmax",
        "gradgradcheck",
        "torch.nn",
        "manual_ops.nn",
        "prefers-color-scheme",
        torch.__version__,
    ):
        assert text in page
    assert page.count("<svg") == page.count("</svg>") == 3
    for tag in ("section", "table", "tr", "div", "ul"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>")


def test_the_report_escapes_what_it_is_told(tmp_path):
    verification = verify(["relu"], dtypes=FLOAT64, public_names=["<b>"])
    training = train(1)
    write_report(tmp_path / "r.html", verification, training, training, compare([]), environment())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;b&gt; has no row in the registry" in page
