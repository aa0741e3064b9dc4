"""RepGhostNet as a backbone, torchvision's detectors on it, and their fused form."""

import copy
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import photographs, randomize_batchnorm
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from repghost import repghostnet
from repghost.detection.backbone import Backbone
from repghost.detection.detectors import Name, detector
from repghost.errors import UserError
from repghost.model import FEATURE_STAGES, WIDTHS, RepGhostNet
from repghost.reparameterization import is_batch_norm, reparameterize
from repghost.weights import save_weights, start_from

CONF = Path(__file__).parents[1] / "conf" / "detector"
CLASSES = {
    "retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "ssdlite": SSD, "fcos": FCOS
}  # fmt: skip
SMALL = {
    "width": 0.1, "channels": 64, "candidates": 50, "detections": 20, "norm": "trained", "trainable_layers": 5,
    "score_threshold": 0.0,
}  # fmt: skip


@cache
def conf(name: str) -> dict[str, Any]:
    """The node `detector` with the values of conf/detector."""
    found = OmegaConf.load(CONF / f"{name}.yaml")
    for parent in [entry for entry in found.pop("defaults", []) if entry != "_self_"]:
        found = OmegaConf.merge(conf(parent.partition("@")[0]), found.get("detector", found))
    return OmegaConf.to_container(found)  # type: ignore[return-value]


def small(name: str, num_classes: int = 3, **values: Any) -> Any:
    """A detector that is built as Hydra does it, for images of 64 to 128 pixels."""
    torch.manual_seed(0)
    size = {"image_size": [96] if name == "ssdlite" else [96, 128]}
    return instantiate(conf(name) | SMALL | size | values, num_classes=num_classes)()


def images() -> list[Tensor]:
    """Photographs in [0, 1] of several sizes."""
    rows = (photographs(3, 128) * 0.225 + 0.45).clamp(0, 1)
    return [rows[0], rows[1, :, :65], rows[2, :, 3:, :90]]


def targets(masks: bool) -> list[dict[str, Tensor]]:
    """Two objects, none, and one."""
    found = []
    for image, boxes in zip(images(), ([[4, 8, 60, 70], [30, 20, 90, 125]], [], [[0, 0, 40, 33]]), strict=True):
        target = {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.arange(len(boxes)) + 1}
        if masks:
            target["masks"] = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(target["masks"], boxes, strict=True):
                mask[top:bottom, left:right] = 1
        found.append(target)
    return found


# -- the backbone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_features_of_every_width(width: float) -> None:
    with torch.device("meta"):
        for model in (repghostnet(width), repghostnet(width, fused=True)):
            maps = model.eval().features(torch.empty(2, 3, 224, 160))
            assert [x.shape[1] for x in maps] == [*model.feature_channels]
            assert [(224 // x.shape[2], 160 // x.shape[3]) for x in maps] == [(s, s) for s in model.feature_strides]
    if width == 1.0:
        assert model.feature_channels == (24, 40, 112, 160) and model.feature_strides == (4, 8, 16, 32)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 97), (127, 64)])
@torch.no_grad()
def test_features_are_what_the_stages_give(size: tuple[int, int]) -> None:
    model = repghostnet(0.5).eval()
    randomize_batchnorm(model, 0)
    x = photographs(2, 128)[:, :, : size[0], : size[1]]
    seen: dict[int, Tensor] = {}
    for number in FEATURE_STAGES:
        model.blocks[number].register_forward_hook(lambda _, __, out, n=number: seen.update({n: out.clone()}))
    model(x)
    expected = [*seen.values()]
    for network in (model, reparameterize(model)):
        maps = network.features(x)
        for found, other, stride in zip(maps, expected, model.feature_strides, strict=True):
            assert found.shape[2:] == tuple(-(-side // stride) for side in size)
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@torch.no_grad()
def test_timms_maps_are_those_of_the_first_blocks() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("repghostnet_050", features_only=True).eval()
    ours = repghostnet(0.5).eval()
    weights = {
        name.replace(".", "_", 1) if name.startswith("blocks") else name: t for name, t in ours.state_dict().items()
    }
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    x = photographs(1, 64)
    maps = theirs(x)[1:]
    assert [x.shape[1] for x in maps] == [12, 20, 40, 80] and ours.feature_channels == (12, 20, 56, 80)
    y = ours.blocks[:2](ours.relu(ours.bn1(ours.conv_stem(x))))
    torch.testing.assert_close(maps[0], y)
    torch.testing.assert_close(ours.blocks[8](maps[-1]), ours.features(x)[-1])


def test_layers_that_do_not_learn_keep_their_statistics() -> None:
    for count, first in ((0, None), (2, 5), (5, 0)):
        body = Backbone(0.1, count, "trained", 3).train().body
        for name, parameter in body.named_parameters():
            stage = int(name.split(".")[1]) if name.startswith("blocks.") else 0
            assert parameter.requires_grad == (first is not None and stage >= first), name
        for module in filter(is_batch_norm, body.modules()):
            assert module.training == module.weight.requires_grad
    frozen = Backbone(0.1, 5, "frozen", 3).train()
    norms = {module for module in frozen.modules() if is_batch_norm(module)}
    assert norms and not any(module.training for module in norms) and frozen.body.training
    learning = {p for p in frozen.body.parameters() if p.requires_grad}
    assert learning == {p for p in frozen.body.parameters()} - {p for norm in norms for p in norm.parameters()}
    before = [norm.running_mean.clone() for norm in norms]
    frozen.features(photographs(2, 64))
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


# -- the detectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", get_args(Name))
def test_losses_and_boxes(name: str) -> None:
    model = small(name)
    assert type(model) is CLASSES[name] and [*model.transform.image_mean] == [0.485, 0.456, 0.406]
    losses = model.train()(images(), targets(name == "mask_rcnn"))
    total = sum(losses.values())
    assert total.isfinite() and all(loss.ndim == 0 for loss in losses.values())
    total.backward()
    missing = [n for n, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, "every parameter has a part in the loss: several ranks wait for all gradients"
    with torch.inference_mode():
        found = model.eval()(images())
    for image, row in zip(images(), found, strict=True):
        height, width = image.shape[1:]
        assert {"boxes", "labels", "scores"} <= row.keys() and ("masks" in row) == (name == "mask_rcnn")
        assert 0 < len(row["boxes"]) <= 20 and set(row["labels"].tolist()) <= {1, 2, 3}
        assert row["boxes"].min() >= 0 and (row["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert torch.equal(row["scores"].sort(descending=True).values, row["scores"])
        if "masks" in row:
            assert row["masks"].shape == (len(row["boxes"]), 1, height, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_detector_is_built_at_every_width(width: float) -> None:
    for name in get_args(Name):
        with torch.device("meta"):
            model: Any = detector(
                **{k: v for k, v in conf(name).items() if k[0] != "_"} | {"width": width}, num_classes=80
            )
        assert model.backbone.body.width == width
        assert not {"conv_head", "classifier"} & dict(model.backbone.body.named_children()).keys()


def test_values_are_those_of_torchvisions_builders() -> None:
    from torchvision.models import detection as theirs

    builders = {
        "retinanet": theirs.retinanet_resnet50_fpn, "faster_rcnn": theirs.fasterrcnn_resnet50_fpn,
        "mask_rcnn": theirs.maskrcnn_resnet50_fpn, "ssdlite": theirs.ssdlite320_mobilenet_v3_large,
        "fcos": theirs.fcos_resnet50_fpn,
    }  # fmt: skip
    for name, build in builders.items():
        node = {key: value for key, value in conf(name).items() if key[0] != "_"}
        ours: Any = detector(**node | {"width": 0.1}, num_classes=90)
        other: Any = build(weights=None, weights_backbone=None, num_classes=91)
        assert (ours.transform.min_size, ours.transform.max_size) == (
            other.transform.min_size,
            other.transform.max_size,
        )
        assert ours.transform.fixed_size == other.transform.fixed_size
        for path in ("", "anchor_generator", "rpn", "rpn.anchor_generator", "roi_heads", "proposal_matcher"):
            parts = [_numbers(_at(model, path)) for model in (ours, other)]
            assert parts[0] == parts[1], (name, path)
        for heads in ("head", "rpn.head", "roi_heads.box_head", "roi_heads.mask_head"):
            if name != "ssdlite":  # whose heads depend on the channels of the backbone
                shapes = [
                    [p.shape for p in getattr(_at(model, heads), "parameters", list)()] for model in (ours, other)
                ]
                assert shapes[0] == shapes[1], (name, heads)


def _at(model: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        model = getattr(model, part, None)
    return model


def _numbers(module: Any) -> dict[str, str]:
    """The attributes that are numbers or plain containers of them."""
    plain = {k: v for k, v in vars(module or torch.nn.Identity()).items() if not k.startswith("_")}
    return {k: repr(v) for k, v in plain.items() if isinstance(v, int | float | dict | list | tuple)}


def test_synchronized() -> None:
    model = small("ssdlite", norm="synchronized")
    norms = [module for module in model.modules() if is_batch_norm(module)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    other = small("ssdlite")
    assert model.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, two in zip(model.eval()(images()), reparameterize(model)(images()), strict=True):
            torch.testing.assert_close(one["scores"], two["scores"], rtol=0, atol=1e-4)
    assert not [m for m in reparameterize(model).modules() if is_batch_norm(m)]
    kept = small("ssdlite", norm="synchronized", trainable_layers=2).train().backbone.body
    assert not kept.blocks[0][0].ghost1.primary_conv[1].training and kept.blocks[8][0].ghost1.primary_conv[1].training


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "yolo"}, "detector=yolo: give one of retinanet"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"image_size": [1, 2, 3]}, "detector.image_size"),
        ({"anchor_sizes": [8, 16]}, "detector.anchor_sizes"),
        ({"norm": "group"}, "norm=group"),
        ({"trainable_layers": 6}, "trainable_layers=6"),
        ({"name": "fcos", "channels": 48}, "detector.channels=48"),
        ({"name": "fcos", "channels": 32}, "detector.channels=32: fcos takes multiples of 32 from 64 on"),
        ({"width": -1}, "width=-1"),
    ],
)
def test_mistakes(values: dict[str, Any], said: str) -> None:
    node = {key: value for key, value in conf("retinanet").items() if key[0] != "_"} | SMALL | {"num_classes": 2}
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        detector(**node | values)


def test_the_weights_of_a_classifier(tmp_path: Path) -> None:
    classifier = repghostnet(0.1, 5)
    randomize_batchnorm(classifier, 1)
    save_weights(classifier, tmp_path / "w.safetensors")
    save_weights(reparameterize(classifier), tmp_path / "fused.safetensors")
    model = small("retinanet")
    start_from(model.backbone.body, str(tmp_path / "w.safetensors"))
    x = photographs(1, 64)
    with torch.no_grad():
        found, expected = (net.eval().features(x) for net in (model.backbone.body, classifier))
    assert all(map(torch.equal, found, expected))
    with pytest.raises(UserError, match="fused"):
        start_from(model.backbone.body, str(tmp_path / "fused.safetensors"))
    with pytest.raises(UserError, match="width"):
        start_from(small("retinanet", width=0.5).backbone.body, str(tmp_path / "w.safetensors"))


# -- the fused form ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomize(model: Any) -> None:
    """BatchNorms as if the detector had been trained, in the body and in the heads."""
    whole = repghostnet(model.backbone.body.width)
    randomize_batchnorm(whole, 3)
    state = whole.state_dict()
    model.backbone.body.load_state_dict({name: state[name] for name in model.backbone.body.state_dict()})
    generator = torch.Generator().manual_seed(4)
    inside = {*model.backbone.body.modules()}
    for norm in (module for module in model.modules() if is_batch_norm(module) and module not in inside):
        for tensor, low, high in ((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 1.5)):
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))


def raw(model: Any) -> list[Tensor]:
    """What a detector computes before it selects boxes: the outputs of its heads, for the R-CNNs on fixed boxes."""
    batch, _ = model.transform(images())
    maps = model.backbone(batch.tensors)
    if not hasattr(model, "rpn"):
        return [x.clamp(min=-100) for _, x in sorted(model.head([*maps.values()]).items())]  # -1e4 is never
    boxes = [torch.tensor([[2.0, 3, 50, 60], [20, 5, 90, 80]])] * 3
    heads = model.roi_heads
    x = heads.box_head(heads.box_roi_pool(maps, boxes, batch.image_sizes))
    found = [*heads.box_predictor(x), *(y for rows in model.rpn.head([*maps.values()]) for y in rows)]
    if heads.has_mask():
        found.append(
            heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, batch.image_sizes))).sigmoid()
        )
    return found


@pytest.mark.parametrize("name", get_args(Name))
@torch.no_grad()
def test_fused_outputs_agree(name: str) -> None:
    model = small(name).train()
    randomize(model)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    fused = reparameterize(model)
    assert type(fused) is type(model) and not fused.training and fused.backbone.body.fused
    assert not [module for module in fused.modules() if is_batch_norm(module)]
    assert not model.backbone.body.fused and [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    expected, found = raw(model.eval()), raw(fused)
    for one, two in zip(expected, found, strict=True):
        assert one.std() > 0 and (one - two).abs().max() < 1e-4
    assert reparameterize(fused).state_dict().keys() == fused.state_dict().keys()
    # A detector that is built anew takes the fused weights in its fused form.
    again = reparameterize(small(name, norm="frozen", trainable_layers=0))
    again.load_state_dict(fused.state_dict())
    assert all(map(torch.equal, raw(again), found))


@torch.no_grad()
def test_only_a_batchnorm_right_after_a_convolution_folds() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        Conv2dNormActivation(3, 8), Conv2dNormActivation(8, 8, norm_layer=FrozenBatchNorm2d), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False),
    ).eval()  # fmt: skip
    for norm in (module for module in blocks.modules() if is_batch_norm(module)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    fused = reparameterize(blocks)
    assert [isinstance(fused[i], nn.Identity) for i in (4, 6, 8)] == [False, True, False]
    assert isinstance(fused[0][1], nn.Identity) and isinstance(fused[1][1], nn.Identity)
    x = photographs(2, 32)
    torch.testing.assert_close(fused(x), blocks(x), rtol=1e-4, atol=1e-4)


def test_a_body_is_fused_alone() -> None:
    body = Backbone(0.1, 5, "trained", 3).eval().body
    fused = reparameterize(body)
    assert isinstance(fused, RepGhostNet) and fused.fused
    torch.testing.assert_close(
        fused.features(photographs(1, 64)), body.features(photographs(1, 64)), rtol=1e-4, atol=1e-4
    )
