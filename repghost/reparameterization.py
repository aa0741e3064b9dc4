"""From the training form of a RepGhostNet to the form for inference, in which no BatchNorm is left.

In evaluation mode a BatchNorm is an affine map of each channel, so it folds into the convolution before it.
The identity branch of a RepGhost module is a depthwise convolution whose only weight is in the centre, so it
adds to the depthwise 3x3 convolution beside it (arXiv 2211.06088). All is computed in float64, rounded once.
The logits are the same in float64; in float32 they differ by less than 1e-5 of the largest, by rounding alone.
Check: `pytest tests/test_reparameterize.py tests/test_detectors.py`.
"""

import copy
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from repghost.model import RepGhostModule, RepGhostNet

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def reparameterize(model: Network) -> Network:
    """The fused form of `model`: a new network of the same class, in evaluation mode.

    model: a RepGhostNet, or a network with RepGhostNets in it, such as a detector. In all of it, a BatchNorm folds into
    a convolution that is registered right before it in the same module, as in torchvision's blocks; others stay.

    `model` stays as it is, its mode included; the running statistics are used, whatever the mode. Every
    parameter keeps its dtype and device. A model that is fused already gives an equal copy. Put into training
    mode, a fused RepGhostNet differs by its dropout only. Gradients are not taken over. What is
    frozen stays frozen; a new bias learns if the weight beside it does.
    """
    # On the CPU, because not every device has float64.
    fused = copy.deepcopy(model).eval().to("cpu", torch.float64)
    for module in [*fused.modules()]:
        for (name, conv), (norm_name, norm) in pairwise([*module.named_children()]):
            if isinstance(conv, nn.Conv2d) and is_batch_norm(norm):
                folded: Any = fuse_conv_bn_eval(conv, norm)
                folded.bias.requires_grad_(conv.weight.requires_grad)  # PyTorch freezes one that is new
                setattr(module, name, folded)
                setattr(module, norm_name, nn.Identity())
        if isinstance(module, RepGhostNet):
            module.fused = True
    for module in fused.modules():
        if isinstance(module, RepGhostModule) and module.fusion_bn is not None:
            _merge_identity(module.cheap_operation[0], module.fusion_bn[0])
            module.fusion_bn = None
    origin, state = model.state_dict(), {}
    for key, tensor in fused.state_dict().items():
        # A new bias goes where the weight is.
        like = origin[key if key in origin else f"{key.rpartition('.')[0]}.weight"]
        state[key] = tensor.to(like.device, like.dtype)
    fused.load_state_dict(state, strict=True, assign=True)
    return fused


def _merge_identity(conv: Any, norm: Any) -> None:
    """Adds the identity branch to the depthwise convolution beside it, whose BatchNorm is folded already."""
    centre, shift = conv.weight.new_ones(len(conv.weight), 1, 1, 1), torch.zeros_like(conv.bias)
    if is_batch_norm(norm):
        statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        centre, shift = fuse_conv_bn_weights(centre, None, *statistics)
    conv.weight[:, :, 1:2, 1:2] += centre
    conv.bias += shift


def is_batch_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a BatchNorm with running statistics: PyTorch's, a synchronized one, or torchvision's frozen one."""
    # Told by its name, since torchvision takes seconds to import.
    kind = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"
    return kind and module.running_mean is not None
