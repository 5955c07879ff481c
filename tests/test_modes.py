"""The backend is a setting of the thread, and travels from the forward to the backward."""

import threading

import pytest
import torch

import manual_ops
from manual_ops import functional as F
from manual_ops import kernel, modes

pytestmark = pytest.mark.cpu("thread-local settings, without a tensor of their own")


def test_native_is_the_default():
    assert manual_ops.current_backend() == "native"


def test_the_context_manager_restores_what_was_there():
    with manual_ops.backend("python"):
        assert manual_ops.current_backend() == "python"
        with manual_ops.backend("native"):
            assert manual_ops.current_backend() == "native"
        assert manual_ops.current_backend() == "python"
    assert manual_ops.current_backend() == "native"


def test_set_backend_holds_until_the_next():
    manual_ops.set_backend("python")
    try:
        assert manual_ops.current_backend() == "python"
    finally:
        manual_ops.set_backend("native")


@pytest.mark.parametrize("name", ["cuda", "", None, 3])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="set_backend"):
        manual_ops.set_backend(name)
    with pytest.raises(ValueError, match="native"), manual_ops.backend(name):
        pass


def test_native_without_the_library_is_an_error_that_says_how_to_build(monkeypatch):
    monkeypatch.setattr(kernel, "_native_problem", "_C.so is not built; build it with `pip install -e .`")
    with pytest.raises(RuntimeError, match="pip install"):
        manual_ops.set_backend("native")


def test_a_thread_has_its_own_backend():
    seen = []
    with manual_ops.backend("python"):
        thread = threading.Thread(target=lambda: seen.append(manual_ops.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["native"]


def _backends_used(run):
    used = []
    original = kernel.Kernel.__call__

    def recording(this, *args, backend):
        used.append(backend)
        return original(this, *args, backend=backend)

    kernel.Kernel.__call__ = recording
    try:
        run()
    finally:
        kernel.Kernel.__call__ = original
    return set(used)


@pytest.mark.parametrize("name", ["python", "native"])
def test_backward_runs_on_the_backend_of_its_forward(name):
    x, w = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)

    def run():
        with modes.backend(name):
            loss = F.max_pool2d(F.relu(F.conv2d(x, w)), 2).sum()
        thread = threading.Thread(target=loss.backward)  # elsewhere, where the default holds
        thread.start()
        thread.join()

    assert _backends_used(run) == {name}
