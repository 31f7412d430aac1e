"""A GPU that is not there: CUDA tensors are fake, with a shape, a type and a device, but without values.

torch's fake tensors refuse what a GPU refuses (tensors of two devices in one operation) and what needs a value
(`item`, a mask as an index). CPU tensors stay real. So a step runs here as it would there, and tells how many
kernels it launches and where the host has to wait for the device. What cannot be seen here: values, speed, memory.
"""

import collections
import contextlib
import heapq

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten._to_copy.default", "aten.copy_.default")
NO_LAUNCH = ("prim.", "aten.empty", "aten.detach", "aten.alias", "aten._unsafe_view")


class RealCPU(TorchDispatchMode):
    """Inside a FakeTensorMode: what touches no GPU is computed. Keeps account of the rest."""

    def __init__(self):
        super().__init__()
        self.launches = collections.Counter()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if not any(is_cuda(leaf) for leaf in leaves):
            with unset_fake_temporarily():
                return function(*args, **(kwargs or {}))

        # why not the optimizer's step: this kernel has no fake form, and it gives nothing back
        is_step = str(function).startswith("aten._fused_sgd")
        result = None if is_step else function(*args, **(kwargs or {}))
        self.note(function, leaves, result, **(kwargs or {}))
        return result

    def note(self, function, leaves, result, non_blocking=False, **_):
        """Counts a launch, and notes a wait: a copy between devices, or an index that lies on the CPU."""
        name = str(function)
        if not function.is_view and not name.startswith(NO_LAUNCH):
            self.launches[name] += 1
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        if name in COPIES:
            waits = not non_blocking and not all(map(is_cuda, [*tensors, result]))
        else:
            waits = any(tensor.dim() and not is_cuda(tensor) for tensor in tensors)
        if waits:
            self.waits.append(f"{name} of {[tuple(tensor.shape) for tensor in tensors]}")


@contextlib.contextmanager
def running():
    """Everything inside happens on the simulated GPU -> its account: launches and waits."""
    # why other inputs: a real CPU tensor may meet a fake one, as a number or as an index
    with FakeTensorMode(allow_non_fake_inputs=True), RealCPU() as account:
        yield account


def is_cuda(leaf):
    """Whether it is a tensor on the simulated GPU, or its name."""
    # why not `leaf.device`: of a fake tensor this is an operation of its own
    device = leaf.fake_device if isinstance(leaf, FakeTensor) else leaf
    return isinstance(device, torch.device) and device.type == "cuda"


def attention(query, key, value, attn_mask=None, is_causal=False):
    """The kernels that torch takes on a GPU: in half precision without a mask flash attention, else the other."""
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal)[0]

    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, 0.0, is_causal)[0]


def to(module, device):
    """`module.to(device)`, which cannot replace a fake parameter."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not is_cuda(parameter):
                part._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    return module


def backward(loss):
    """`loss.backward()`, node by node. why: torch's own engine asks the GPU's driver about its streams."""
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}          # {node: {number of its output: gradient}}
    waiting = [(0, 0, loss.grad_fn)]
    while waiting:
        node = heapq.heappop(waiting)[-1]                           # the one that was made last
        given = gradients.pop(node)
        found = node(*(given.get(i) for i in range(len(node._input_metadata))))
        found = found if isinstance(found, tuple) else (found,)
        for (other, place), gradient in zip(node.next_functions, found):
            if other is None or gradient is None:
                continue
            leaf = getattr(other, "variable", None)
            gradient = fitting(gradient, other._input_metadata[place] if leaf is None else leaf)
            if leaf is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            if other not in gradients:
                heapq.heappush(waiting, (-other._sequence_nr(), len(waiting), other))
            sums = gradients.setdefault(other, {})
            sums[place] = sums[place] + gradient if place in sums else gradient


def fitting(gradient, tensor):
    """A gradient of a tensor's shape and type, as torch's engine makes it."""
    if gradient.shape != tensor.shape:
        gradient = gradient.sum_to_size(tensor.shape)
    return gradient.to(tensor.dtype)


def replace(monkeypatch):
    """A GPU for torch's own questions: autocast asks whether there is one, and whether it has bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
