"""Evaluates a run, or any weights: python evaluate.py run=outputs/NAME
                                 python evaluate.py weights=timm width=1.0 data.root=SHARDS
                                 python evaluate.py weights=FILE width=1.0 data=imagenet_a data.root=SHARDS
                                 python evaluate.py weights=model.onnx data.root=SHARDS

Counts every validation image once, in float32 unless the command says otherwise, with the trained and with the fused
form of the network; an exported file (.onnx, .pte) with its own runtime.
"""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from repghost.errors import UserError, print_rank_zero
from repghost.evaluation import evaluate_exported, evaluate_model, evaluate_selection, summary, table, write_evaluation
from repghost.export.runtimes import is_exported, open_exported
from repghost.launch import command
from repghost.reference import published_accuracy
from repghost.results import append_result
from repghost.run import data_name, resolved_for_evaluation
from repghost.training.loggers import SpeedBar
from repghost.weights import load_model


@command("evaluate")
def main(config: DictConfig) -> None:
    if (config.run is None) == (config.weights is None):
        raise UserError("give either run=outputs/NAME or weights=timm, weights=FILE")
    config = resolved_for_evaluation(config)
    exported = (
        open_exported(config.weights, config.image_size, config.precision, config.data.augment)
        if is_exported(config.weights)
        else None
    )
    trainer = instantiate(config.trainer)(directory=Path.cwd(), callbacks=[SpeedBar(refresh_rate=1)])
    name = Path(config.run or str(config.weights).removeprefix("official:")).name
    if config.weights is not None and exported is None:
        name = f"{Path(name).stem}-{config.width:g}"
    folder = Path(config.run or Path(config.results).parent / name)
    if config.test_set:
        folder = folder / config.test_set
    options = {
        "test_set": config.test_set,
        "real_labels": config.real_labels,
        "autocast": config.precision != "float32",
        "report": [config.report] if isinstance(config.report, str) else list(config.report or ()),
        "folder": folder,
    }
    if config.run is not None:
        data = instantiate(config.data).load("val")
        evaluation = evaluate_selection(Path(config.run), config.selection, trainer, data, config.image_size, **options)
        title = f"{config.run}, EMA, {config.selection} epoch"
    elif exported is not None:
        data = instantiate(config.data).load("val")
        evaluation = evaluate_exported(exported, trainer, data, **options)
        evaluation |= {"weights": str(config.weights), "epoch": None, "selection": None}
        title = str(config.weights)
    else:
        model = load_model(config.weights, config.width)
        data = instantiate(config.data).load("val")
        evaluation = evaluate_model(model, trainer, data, config.width, config.image_size, **options)
        evaluation |= {"weights": str(config.weights), "epoch": None, "selection": None}
        title = f"{config.weights}, width {config.width:g}"
    evaluation = {"crop_fraction": config.data.crop_fraction, "precision": str(trainer.precision)} | evaluation
    print_rank_zero(table(evaluation, title) if exported is None else summary(evaluation, title))
    if config.test_set and (expected := published_accuracy(config.test_set, evaluation["width"])):
        print_rank_zero(
            f"  timm, published weights of this width: Top-1 {expected[0]:6.2f}%   Top-5 {expected[1]:6.2f}%"
        )
    if options["report"]:
        print_rank_zero(f"  reports in {folder}")
    if trainer.is_global_zero:
        append_result(config.results, name, config.test_set or data_name(config), evaluation)
        if config.run is not None and not config.test_set:
            write_evaluation(Path(config.run), evaluation)


if __name__ == "__main__":
    main()
