"""CUDA graphs: a network's way forwards and back to the pixels, recorded once and then launched as a whole.

A network on a fast GPU waits for Python to launch its kernels, hundreds for each step of an attack. A recording
launches all of them at once and computes the same bits. It is of a copy of the network, in memory that nobody else
writes to, and takes over the weights before every attack, so that it serves all batches of a training.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from advmoe.models.grouped_experts import refold_grouped
from advmoe.models.layers import compute_dtype, structure

MIN_STEPS = 20  # of one shape, before it is recorded: recording takes about as long as ten to twenty
MAX_TIME_RATIO = (
    0.8  # of a step's time at most, or it stays as it is: wide networks compute for longer than launches take
)
MAX_GRAPHS = 3  # recordings, each with a batch's activations: two sizes of batches in an epoch, and those of validation
KNOWN_MODULES = ("advmoe.models.", "torch.nn.")  # what is in here does the same every time; others might not

Forward = Callable[[Tensor], Tensor]
Signature = tuple[object, ...]
Key = tuple[torch.Size, torch.dtype]


class GraphedModule:
    """Pixels (B, C, H, W) -> logits (B, K) of a network on a GPU, frozen and folded, for one attack."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.form: Signature | None = None
        self.current: dict[Key, GraphRecording | None] = {}  # those that have taken over the weights

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        recording = None
        if torch.is_grad_enabled() and images_BCHW.requires_grad:
            recording = self._recording(images_BCHW)
        logits: Tensor = (recording or self.network)(images_BCHW)
        return logits

    def _recording(self, images_BCHW: Tensor) -> "GraphRecording | None":
        key = images_BCHW.shape, compute_dtype(images_BCHW)
        if self.current.get(key) is None:
            self.form = signature(self.network) if self.form is None else self.form
            self.current[key] = _found(self.network, self.form, key) or _made(self.network, self.form, key, images_BCHW)
        return self.current[key]


def signature(network: nn.Module) -> Signature:
    """All that shapes a forward pass beside the weights, to know a network again; empty for one not to be recorded."""
    for module in network.modules():
        if not type(module).__module__.startswith(KNOWN_MODULES) or module._forward_hooks or module._forward_pre_hooks:
            return ()
    return *structure(network), *(each.shape for each in network.parameters())


_kept: list["GraphRecording"] = []  # the one used last at the end
_steps: WeakKeyDictionary[nn.Module, Counter[Key]] = WeakKeyDictionary()
_refused: WeakKeyDictionary[nn.Module, set[Key]] = WeakKeyDictionary()


def release_graphs() -> None:
    """Give the memory of all recordings back."""
    _kept.clear()


def _found(network: nn.Module, network_form: Signature, key: Key) -> "GraphRecording | None":
    """A recording of this network, with its weights of now."""
    for recording in _kept:
        if recording.network() is network and (recording.key, recording.form) == (key, network_form):
            _kept.remove(recording)
            _kept.append(recording)
            recording.take_over(network)
            return recording
    return None


def _made(network: nn.Module, network_form: Signature, key: Key, images_BCHW: Tensor) -> "GraphRecording | None":
    """A new one, when steps repeat; what was tried in vain is not tried again."""
    steps, refused = _steps.setdefault(network, Counter()), _refused.setdefault(network, set())
    steps[key] += 1
    if not network_form or key in refused or steps[key] <= MIN_STEPS:
        return None
    while len(_kept) >= MAX_GRAPHS:
        _drop(_kept[0])
    recording = _tried(network, network_form, key, images_BCHW)
    if recording is None:
        refused.add(key)
        torch.cuda.empty_cache()
    else:
        _kept.append(recording)
    return recording


def _drop(recording: "GraphRecording") -> None:
    """Its steps must repeat again, or many networks in turn would be recorded all the time."""
    _kept.remove(recording)
    network = recording.network()
    if network is not None:
        _steps[network][recording.key] = 0


def _tried(network: nn.Module, network_form: Signature, key: Key, images_BCHW: Tensor) -> "GraphRecording | None":
    """None where it is not faster, memory does not suffice or the driver refuses: slow is no error."""
    try:
        recording = GraphRecording(network, network_form, key, images_BCHW)
        pays = _seconds(recording, images_BCHW) <= MAX_TIME_RATIO * _seconds(network, images_BCHW)
    except RuntimeError:  # running out of memory is one, too
        release_graphs()
        return None
    return recording if pays else None


def _seconds(forward: Forward, images_BCHW: Tensor) -> float:
    """Of a step: the better of two, after one that warms up."""
    each = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        leaf = images_BCHW.detach().requires_grad_(True)
        _gradient(forward(leaf), leaf)
        torch.cuda.synchronize()
        each.append(time.perf_counter() - started)
    return min(each[1:])


def _gradient(logits_BK: Tensor, images_BCHW: Tensor, towards_BK: Tensor | None = None) -> Tensor:
    """Of the sum, or `towards` other logits. Whoever asks for a gradient does so outside of autocast."""
    with torch.autocast(images_BCHW.device.type, enabled=False):
        towards_BK = torch.ones_like(logits_BK) if towards_BK is None else towards_BK
        (gradient_BCHW,) = torch.autograd.grad(logits_BK, images_BCHW, towards_BK)
    return gradient_BCHW


class GraphRecording:
    """One pass forwards and one back, of a copy. Raises RuntimeError where that cannot be recorded."""

    def __init__(self, network: nn.Module, network_form: Signature, key: Key, images_BCHW: Tensor) -> None:
        self.network, self.form, self.key = ref(network), network_form, key
        self.copy = copy.deepcopy(network)
        self.images = images_BCHW.detach().clone().requires_grad_(True)
        self.passes = 0
        self._record()

    def _record(self) -> None:
        self.fold, self.ahead, self.back = (torch.cuda.CUDAGraph() for _ in range(3))
        self._warm()
        with torch.cuda.graph(self.fold):
            refold_grouped(self.copy)
        with torch.cuda.graph(self.ahead, pool=self.fold.pool()):
            self.logits = self.copy(self.images)
        self.towards = torch.empty_like(self.logits)  # gradient of the loss by the logits
        with torch.cuda.graph(self.back, pool=self.fold.pool()):
            self.gradient = _gradient(self.logits, self.images, self.towards)

    def _warm(self) -> None:
        """On a stream of its own, as recording does: libraries set up their workspaces at the first call there, and
        layers fold themselves.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _gradient(self.copy(self.images), self.images)
            refold_grouped(self.copy)
        torch.cuda.current_stream().wait_stream(stream)

    def take_over(self, network: nn.Module) -> None:
        """Have the weights that `network` has now."""
        torch._foreach_copy_(_weights(self.copy), _weights(network))
        self.fold.replay()
        self.passes += 1  # what the last pass left behind belongs to other weights

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = _Pass.apply(images_BCHW, self)
        return logits

    def forwards(self, images_BCHW: Tensor) -> int:
        """Compute logits; returns the number of this pass."""
        self.images.detach().copy_(images_BCHW)
        self.ahead.replay()
        self.passes += 1
        return self.passes


def _weights(network: nn.Module) -> list[Tensor]:
    """Parameters and statistics; counters shape no forward pass."""
    return [
        *(each.detach() for each in network.parameters()),
        *(each for each in network.buffers() if each.is_floating_point()),
    ]


class _Pass(torch.autograd.Function):
    """A pass by recording. What goes out are copies: the next pass writes over the originals."""

    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, recording: GraphRecording) -> Tensor:
        ctx.recording, ctx.number = recording, recording.forwards(images_BCHW)
        ctx.save_for_backward(images_BCHW)
        logits: Tensor = recording.logits.detach().clone()
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, towards_BK: Tensor) -> tuple[Tensor, None]:
        recording: GraphRecording = ctx.recording
        if ctx.number != recording.passes:  # another pass has gone over what this one left behind
            ctx.number = recording.forwards(*ctx.saved_tensors)
        recording.towards.copy_(towards_BK)
        recording.back.replay()
        return recording.gradient.detach().clone(), None
