"""FSDP2: each process holds a slice of every weight, gradient and moment; a layer's weights are gathered while it runs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import GradientCheckpointingLayer

from groupwise.errors import UserError
from groupwise.models.language_model import LanguageModel

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Root(nn.Module):
    """A network as FSDP's root: what it is called with runs while the weights outside the layers are gathered.

    Log-probabilities need the output matrix in both passes, so they have to be computed inside the root's forward pass.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._used: set[nn.Parameter] = set()
        """Weights that this process has a gradient of."""
        self._noted: set[Any] = set()
        """FSDP's descriptions of weights that are added to them."""

    def forward(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    def note_use(self) -> None:
        """Between a forward and its backward pass: have that note of which weights it has a gradient. FSDP does not tell those
        from weights without, which it sums as zeros."""
        modules = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for group in (group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups):
            for weight in group.fsdp_params:
                if weight not in self._noted and weight.sharded_param.requires_grad and hasattr(weight, "_unsharded_param"):
                    self._noted.add(weight)
                    use = partial(_add, self._used, weight.sharded_param)
                    weight._unsharded_param.register_post_accumulate_grad_hook(use)  # type: ignore[no-untyped-call]

    def settle(self, total: Callable[[Tensor], Tensor]) -> None:
        """Leave weights that no process has used without a gradient, as a single process does: a gradient of zeros would have
        them decay. `total`: the sum over the processes."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        users = total(torch.tensor([float(weight in self._used) for weight in weights]))
        for weight, count in zip(weights, users.tolist(), strict=True):
            if count == 0:
                weight.grad = None
        self._used.clear()


def _add(used: set[nn.Parameter], weight: nn.Parameter, _: Tensor) -> None:
    used.add(weight)


def shard(model: LanguageModel, network: nn.Module, mesh: DeviceMesh, precision: str) -> Root:
    """Slice a model's weights over the processes of a mesh; from then on its forward passes run inside the returned root.

    Args:
        model: the owner of the network, whose trials are made first: they need whole weights.
        network: its module, or one around its decoder.
        precision: "bfloat16": on a GPU, weights are gathered in it and gradients summed in float32.

    Raises:
        UserError: the model cannot be sharded.
    """
    model.check_once()
    decoder, root = model.decoder, Root(network)
    if decoder.compiled:
        raise UserError("a model that runs through torch.compile cannot be sharded: set model.compile = false")
    decoder.kept_dtype = decoder.dtype
    mixed = _mixed_precision() if precision == "bfloat16" and not decoder.on_cpu else MixedPrecisionPolicy()
    try:
        for layer in _layers(decoder.module):
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        fully_shard(root, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    except (ValueError, NotImplementedError) as error:  # such as weights without a dimension
        raise UserError(f"{model.name} cannot be sharded: {error}") from error
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum over processes, and not their mean
            module.set_force_sum_reduction_for_comms(True)  # which gloo has, unlike a sum with a factor
            # The processes must agree on what is reduced where a weight is used by the tokens of some of them only.
            module.set_reduce_scatter_unused_params(True)
    return root


def _mixed_precision() -> MixedPrecisionPolicy:
    """What is gathered and reduced on GPUs. On a CPU the bfloat16 kernels round float32 weights themselves."""
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The outermost layers of a decoder, but for those that have weights in common (Zamba): these stay with the root, gathered
    throughout."""
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    inside = {inner for layer in layers for inner in layer.modules() if inner is not layer}
    outermost = [layer for layer in layers if layer not in inside]
    users = Counter(parameter for layer in outermost for parameter in layer.parameters())
    return [layer for layer in outermost if all(users[parameter] == 1 for parameter in layer.parameters())]


def run(root: Root, function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
    """The result of a function that runs the network. All processes of the mesh must do this, and then the backward pass."""
    result: Result = root(function, *arguments, **keywords)
    if torch.is_grad_enabled():
        root.note_use()
    else:  # the backward pass would do it
        root.reshard()  # type: ignore[operator]
    return result


def full(tensor: Tensor) -> Tensor:
    """A tensor as a whole, which all processes must ask for."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


@contextmanager
def gathered(network: nn.Module, *, keep: bool) -> Iterator[None]:
    """Within: the network holds whole weights on the CPU, one gathered after the other, where `keep`; elsewhere none.

    Its forward pass cannot run meanwhile.
    """
    shards = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(parameter, DTensor)
    ]
    whole: dict[int, nn.Parameter] = {}
    for _, _, parameter in shards:
        if id(parameter) not in whole:  # an embedding may be the output matrix too
            tensor = full(parameter.detach())
            kept = tensor.cpu() if keep else torch.empty(0, dtype=tensor.dtype)
            whole[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    try:
        for module, name, parameter in shards:
            module.register_parameter(name, whole[id(parameter)])
        yield
    finally:
        for module, name, parameter in shards:
            module.register_parameter(name, parameter)
