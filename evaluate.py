"""Evaluates a run, or any weights: python evaluate.py run=outputs/NAME
                                 python evaluate.py weights=FILE width=1.0 data.root=SHARDS

Counts every validation image once, in float32, with the trained and with the fused form of the network.
"""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from repghost.cli import command, say
from repghost.errors import UserError
from repghost.results import append_result
from repghost.run import data_name, evaluate_model, evaluate_selection, resolved_for_evaluation, table, write_evaluation
from repghost.weights import model_from_state, read_weights


@command("evaluate")
def main(config: DictConfig) -> None:
    if (config.run is None) == (config.weights is None):
        raise UserError("give either run=outputs/NAME or weights=FILE")
    config = resolved_for_evaluation(config)
    trainer = instantiate(config.trainer)(directory=Path.cwd())
    if config.run is not None:
        data = instantiate(config.data).load("val")
        directory = Path(config.run)
        evaluation = evaluate_selection(directory, config.selection, trainer, data, config.image_size)
        title, name = f"{directory}, EMA, {config.selection} epoch", directory.name
    else:
        model = model_from_state(read_weights(config.weights), config.weights, config.width)
        data = instantiate(config.data).load("val")
        evaluation = evaluate_model(model, trainer, data, config.width, config.image_size)
        evaluation |= {"weights": str(config.weights), "epoch": None, "selection": None}
        title, name = f"{config.weights}, width {config.width:g}", Path(config.weights).stem
    say(table(evaluation, title))
    if trainer.is_global_zero:
        append_result(config.results, name, data_name(config), evaluation)
        if config.run is not None:
            write_evaluation(directory, evaluation)


if __name__ == "__main__":
    main()
