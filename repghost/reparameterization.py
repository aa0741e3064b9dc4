"""From the training form of a RepGhostNet to the form for inference, in which no BatchNorm is left.

In evaluation mode a BatchNorm is an affine map of each channel, so it folds into the convolution before it.
The identity branch of a RepGhost module is a depthwise convolution whose only weight is in the centre, so it
adds to the depthwise 3x3 convolution beside it (arXiv 2211.06088). All is computed in float64, rounded once.
Check: `pytest tests/test_reparameterize.py`. The logits are the same in float64; in float32 they differ by less
than 1e-5 of the largest, by rounding alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from repghost.model import RepGhostModule, RepGhostNet


@torch.no_grad()
def reparameterize(model: RepGhostNet) -> RepGhostNet:
    """The fused form of `model`: a new RepGhostNet in evaluation mode.

    `model` stays as it is, its mode included; the running statistics are used, whatever the mode. Every
    parameter keeps its dtype and device. A model that is fused already gives an equal copy. Put into training
    mode, the result differs by its dropout only. Gradients and hooks are not taken over, nor are layers put in
    by hand, except a linear classifier.
    """
    origin = model.state_dict()
    # On the CPU, because not every device has float64; a copy, because what follows writes to it.
    exact = {key: value.to("cpu", torch.float64, copy=True) for key, value in origin.items()}

    def fold(weight: Tensor, bn: nn.BatchNorm2d, name: str) -> tuple[Tensor, Tensor]:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (exact[f"{name}.{key}"] for key in keys)
        return fuse_conv_bn_weights(weight, None, mean, var, bn.eps, gamma, beta)

    conv = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = name  # modules come in the order they run: the next BatchNorm is this convolution's
        elif isinstance(module, nn.BatchNorm2d) and "fusion_bn" not in name:
            exact[f"{conv}.weight"], exact[f"{conv}.bias"] = fold(exact[f"{conv}.weight"], module, name)

    for name, module in model.named_modules():
        if isinstance(module, RepGhostModule) and module.fusion_bn is not None:
            kernel, bias = (exact[f"{name}.cheap_operation.0.{key}"] for key in ("weight", "bias"))
            centre, shift = kernel.new_ones(len(kernel), 1, 1, 1), torch.zeros_like(bias)
            norm = module.fusion_bn[0]
            if isinstance(norm, nn.BatchNorm2d):
                centre, shift = fold(centre, norm, f"{name}.fusion_bn.0")
            kernel[:, :, 1:2, 1:2] += centre
            bias += shift

    with torch.device("meta"):  # takes no memory and draws no random numbers
        fused = RepGhostNet(
            model.width,
            num_classes=model.classifier.out_features,
            in_channels=model.conv_stem.in_channels,
            dropout=model.dropout.p,
            shortcut=model.shortcut,
            fused=True,
        )
    state = {}
    for key in fused.state_dict():
        weight = origin[f"{key.rpartition('.')[0]}.weight"]  # a new bias goes where the weight is
        state[key] = exact[key].to(weight.device, weight.dtype)
    fused.load_state_dict(state, strict=True, assign=True)
    return fused.eval()
