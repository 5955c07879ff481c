"""What the tests of several operations share."""

import pytest
import torch

# Against torch in the same dtype; both sides round, and sum in orders of their own.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def tensor(*shape, dtype=torch.float64, device=None, requires_grad=True):
    """A standard normal tensor that asks for its gradient; the same values on every device."""
    values = torch.randn(*shape, dtype=torch.float64, device="cpu")
    return values.to(device or torch.get_default_device(), dtype).requires_grad_(requires_grad)


def moved(value, device):
    """A tensor on a device as it lies here, with what is between its elements and in front of them."""
    if not isinstance(value, torch.Tensor) or value.device.type == device:
        return value
    memory = value.detach()
    memory = memory.as_strided((memory.untyped_storage().nbytes() // memory.itemsize,), (1,), 0).to(device)
    there = memory.as_strided(value.shape, value.stride(), value.storage_offset())
    return there.requires_grad_(value.requires_grad)


def device_type():
    """The device of the running test, as torch.autocast and GradScaler name it."""
    return torch.get_default_device().type


def assert_same(ours, theirs, **tolerance):
    """Equal up to the dtype's tolerance, NaN equal to NaN, with the same shape, dtype and strides left alone."""
    tolerance = tolerance or TOLERANCE.get(theirs.dtype, {"rtol": 0, "atol": 0})
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


def differentiable(args):
    return [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]


def assert_same_as_torch(ours, theirs, *args, **kwargs):
    """The value and every gradient of ours(*args, **kwargs) are those of torch's function."""
    output, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
    assert_same(output.detach(), expected.detach())
    inputs = differentiable([*args, *kwargs.values()])
    if not inputs:
        return
    cotangent = torch.randn(expected.shape, dtype=torch.float64).to(expected)
    gradients = torch.autograd.grad(output, inputs, cotangent)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert_same(gradient, expected_gradient)


def gradchecks(function, *args):
    """gradcheck in reverse, forward and batched mode, then gradgradcheck, with forward over reverse."""
    torch.autograd.gradcheck(function, args, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True)


def assert_wrong_like_torch(ours, theirs, *args, **kwargs):
    """Both refuse the call, ours with the exception type that torch raises and with the op's name in the message."""
    with pytest.raises(Exception) as expected:
        theirs(*args, **kwargs)
    with pytest.raises(expected.type) as raised:
        ours(*args, **kwargs)
    name = ours.__name__ if hasattr(ours, "__name__") else type(ours).__name__
    assert name.lower() in str(raised.value).lower()


def kept_bytes(function):
    """Bytes that autograd keeps alive for the backward of function(), each storage counted once; parameters too."""
    storages = {}

    def pack(saved):
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = function()
    assert output.grad_fn is not None
    return sum(storages.values())
