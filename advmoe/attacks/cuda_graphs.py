"""CUDA graphs of a network's forward pass and input gradient, captured once and replayed in the steps of attacks.

On a fast GPU the launches of kernels from Python dominate: hundreds for each step of an attack. A graph launches all of
them at once and computes the same bits. It captures a copy of the network with its own memory, and loads the current
weights before every attack, so one graph serves all batches of a training.

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

from advmoe.models.grouped_experts import refold_in_place
from advmoe.models.layers import compute_dtype, module_structure

MIN_STEPS = 20  # of one shape before capture, which takes as long as ten to twenty steps
MAX_TIME_RATIO = 0.8  # graph / plain step, else the graph is not used: wide networks are not bound by launches
MAX_GRAPHS = 3  # each holds a batch's activations: two batch sizes in an epoch, and that of validation
KNOWN_MODULES = ("advmoe.models.", "torch.nn.")  # modules that are known to run the same kernels in every pass

Forward = Callable[[Tensor], Tensor]
Signature = tuple[object, ...]
Key = tuple[torch.Size, torch.dtype]


class GraphedModule:
    """Pixels (B, C, H, W) -> logits (B, K) of a frozen, folded network on a GPU, by CUDA graphs, for one attack."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.signature: Signature | None = None
        self.current: dict[Key, CapturedGraph | None] = {}  # graphs that hold the current weights

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        graph = None
        if torch.is_grad_enabled() and images_BCHW.requires_grad:
            graph = self._graph(images_BCHW)
        logits: Tensor = (graph or self.network)(images_BCHW)
        return logits

    def _graph(self, images_BCHW: Tensor) -> "CapturedGraph | None":
        key = images_BCHW.shape, compute_dtype(images_BCHW)
        if self.current.get(key) is None:
            self.signature = signature(self.network) if self.signature is None else self.signature
            self.current[key] = _find_graph(self.network, self.signature, key) or _capture_if_repeated(
                self.network, self.signature, key, images_BCHW
            )
        return self.current[key]


def signature(network: nn.Module) -> Signature:
    """Returns all that determines a forward pass besides the weights; empty for a network that must not be captured."""
    for module in network.modules():
        if not type(module).__module__.startswith(KNOWN_MODULES) or module._forward_hooks or module._forward_pre_hooks:
            return ()
    return *module_structure(network), *(parameter.shape for parameter in network.parameters())


_graphs: list["CapturedGraph"] = []  # in order of last use
_step_counts: WeakKeyDictionary[nn.Module, Counter[Key]] = WeakKeyDictionary()
_not_graphed: WeakKeyDictionary[nn.Module, set[Key]] = WeakKeyDictionary()


def release_graphs() -> None:
    """Frees the memory of all graphs."""
    _graphs.clear()


def _find_graph(network: nn.Module, network_signature: Signature, key: Key) -> "CapturedGraph | None":
    """The graph of this network, with the current weights, or None."""
    for graph in _graphs:
        if graph.network() is network and (graph.key, graph.signature) == (key, network_signature):
            _graphs.remove(graph)
            _graphs.append(graph)
            graph.load_weights(network)
            return graph
    return None


def _capture_if_repeated(
    network: nn.Module, network_signature: Signature, key: Key, images_BCHW: Tensor
) -> "CapturedGraph | None":
    """Captures a graph once steps repeat; a failed capture is not tried again."""
    steps, not_graphed = _step_counts.setdefault(network, Counter()), _not_graphed.setdefault(network, set())
    steps[key] += 1
    if not network_signature or key in not_graphed or steps[key] <= MIN_STEPS:
        return None
    while len(_graphs) >= MAX_GRAPHS:
        _evict(_graphs[0])
    graph = _try_capture(network, network_signature, key, images_BCHW)
    if graph is None:
        not_graphed.add(key)
        torch.cuda.empty_cache()
    else:
        _graphs.append(graph)
    return graph


def _evict(graph: "CapturedGraph") -> None:
    """Removes a graph and resets its step count; otherwise many networks in turn would be captured all the time."""
    _graphs.remove(graph)
    network = graph.network()
    if network is not None:
        _step_counts[network][graph.key] = 0


def _try_capture(
    network: nn.Module, network_signature: Signature, key: Key, images_BCHW: Tensor
) -> "CapturedGraph | None":
    """None if the graph is not faster, memory runs out or the driver raises: attacks then run without graphs."""
    try:
        graph = CapturedGraph(network, network_signature, key, images_BCHW)
        faster = _time_step(graph, images_BCHW) <= MAX_TIME_RATIO * _time_step(network, images_BCHW)
    except RuntimeError:  # includes running out of memory
        release_graphs()
        return None
    return graph if faster else None


def _time_step(forward: Forward, images_BCHW: Tensor) -> float:
    """Seconds of a step: the minimum of two, after a warm-up."""
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        leaf = images_BCHW.detach().requires_grad_(True)
        _gradient(forward(leaf), leaf)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _gradient(logits_BK: Tensor, images_BCHW: Tensor, grad_logits_BK: Tensor | None = None) -> Tensor:
    """Input gradient of the summed logits, or of the logits weighted by `grad_logits_BK`, outside of autocast."""
    with torch.autocast(images_BCHW.device.type, enabled=False):
        grad_logits_BK = torch.ones_like(logits_BK) if grad_logits_BK is None else grad_logits_BK
        (gradient_BCHW,) = torch.autograd.grad(logits_BK, images_BCHW, grad_logits_BK)
    return gradient_BCHW


class CapturedGraph:
    """Graphs of one forward and one backward pass of a copy of a network. Raises RuntimeError if capture fails."""

    def __init__(self, network: nn.Module, network_signature: Signature, key: Key, images_BCHW: Tensor) -> None:
        self.network, self.signature, self.key = ref(network), network_signature, key
        self.copy = copy.deepcopy(network)
        self.images = images_BCHW.detach().clone().requires_grad_(True)
        self.pass_count = 0
        self._capture()

    def _capture(self) -> None:
        self.fold_graph, self.forward_graph, self.backward_graph = (torch.cuda.CUDAGraph() for _ in range(3))
        self._warm_up()
        with torch.cuda.graph(self.fold_graph):
            refold_in_place(self.copy)
        with torch.cuda.graph(self.forward_graph, pool=self.fold_graph.pool()):
            self.logits = self.copy(self.images)
        self.grad_logits = torch.empty_like(self.logits)  # gradient of the loss by the logits
        with torch.cuda.graph(self.backward_graph, pool=self.fold_graph.pool()):
            self.gradient = _gradient(self.logits, self.images, self.grad_logits)

    def _warm_up(self) -> None:
        """Runs once on a side stream, as capture does: libraries allocate workspaces, and layers fold."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _gradient(self.copy(self.images), self.images)
            refold_in_place(self.copy)
        torch.cuda.current_stream().wait_stream(stream)

    def load_weights(self, network: nn.Module) -> None:
        """Copies the current weights of `network` and folds them."""
        torch._foreach_copy_(_weight_tensors(self.copy), _weight_tensors(network))
        self.fold_graph.replay()
        self.pass_count += 1  # the activations in memory belong to the previous weights

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = _GraphFunction.apply(images_BCHW, self)
        return logits

    def run_forward(self, images_BCHW: Tensor) -> int:
        """Computes the logits; returns the number of this pass."""
        self.images.detach().copy_(images_BCHW)
        self.forward_graph.replay()
        self.pass_count += 1
        return self.pass_count


def _weight_tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and floating-point buffers; integer buffers do not affect the forward pass."""
    return [
        *(parameter.detach() for parameter in network.parameters()),
        *(buffer for buffer in network.buffers() if buffer.is_floating_point()),
    ]


class _GraphFunction(torch.autograd.Function):
    """A pass by CUDA graph. Returns copies: the next pass overwrites the graph's own tensors."""

    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, graph: CapturedGraph) -> Tensor:
        ctx.graph, ctx.number = graph, graph.run_forward(images_BCHW)
        ctx.save_for_backward(images_BCHW)
        logits: Tensor = graph.logits.detach().clone()
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits_BK: Tensor) -> tuple[Tensor, None]:
        graph: CapturedGraph = ctx.graph
        if ctx.number != graph.pass_count:  # another pass has overwritten the activations of this one
            ctx.number = graph.run_forward(*ctx.saved_tensors)
        graph.grad_logits.copy_(grad_logits_BK)
        graph.backward_graph.replay()
        return graph.gradient.detach().clone(), None
