"""Evaluates a run, or any weights: python evaluate.py run=outputs/NAME
                                 python evaluate.py weights=timm width=1.0 data.root=SHARDS
                                 python evaluate.py weights=FILE width=1.0 data=imagenet_a data.root=SHARDS
                                 python evaluate.py weights=model.onnx data.root=SHARDS

Counts every validation image once, in float32 unless the command says otherwise, with the trained and with the fused
form of the network; an exported file (.onnx, .pte) with its own runtime.
"""

if __name__ == "__main__":  # before anything that takes a moment to import
    from repghost.errors import end_at_once_on_signals

    end_at_once_on_signals()

from pathlib import Path

from omegaconf import DictConfig

from repghost.launch import command


@command("evaluate")
def main(config: DictConfig) -> int:
    # Here and below, what takes long to import: the command line was understood by now.
    from repghost.processes import run_on_devices
    from repghost.run import resolved_for_evaluation

    return run_on_devices(run, resolved_for_evaluation(config))


def run(config: DictConfig) -> None:
    """Evaluates what `config` names, as one of its ranks."""
    from hydra.utils import instantiate

    from repghost.export.runtimes import is_exported, open_exported
    from repghost.files import require_writable
    from repghost.training.loggers import SpeedBar

    if config.get("task") == "detection":
        from repghost.detection.evaluate import evaluate, record, subject_of
    else:
        from repghost.evaluation.evaluate import evaluate, record, subject_of

    exported = None
    if is_exported(config.get("weights")):
        exported = open_exported(config.weights, config.image_size, config.precision, config.data.augment)
    trainer = instantiate(config.trainer)(directory=Path.cwd(), callbacks=[SpeedBar(refresh_rate=1)])
    data = instantiate(config.data)
    data.setup("validate")
    subject = subject_of(config, exported)
    if config.report or config.run:
        require_writable(subject.folder / "evaluation.json", "run" if config.run else "results")
    evaluation = evaluate(subject, trainer, data, config, autocast=config.precision != "float32")
    if trainer.is_global_zero:
        record(config, subject, evaluation)


if __name__ == "__main__":
    main()
