"""One training run: python train.py width=1.0 data.root=SHARDS trainer=gpu trainer.devices=8

Composes conf/train.yaml with the command line, trains, and evaluates what it trained. The same command again resumes
the run where it stopped, and does nothing when it is finished. SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 stop it
between two batches, saved, with exit code 75.
"""

import os

# Read when torch is loaded: threads that wait for each other sleep, since beside decoding processes they starve them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":  # before anything that takes a moment to import
    from repghost.errors import end_at_once_on_signals

    end_at_once_on_signals()

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from repghost.launch import command


@command("train")
def main(config: DictConfig) -> int:
    from repghost.lock import sole_writer
    from repghost.run_name import folder_of

    with sole_writer(folder_of(config)):
        # Here and below, what takes long to import: the command line was understood by now.
        from repghost.processes import run_on_devices
        from repghost.run import is_finished, open_run

        directory, config = open_run(config)
        if is_finished(directory):
            print(f"{directory} is finished; evaluation.json in it holds the result")
            return 0
        return run_on_devices(train, config)


def train(config: DictConfig) -> None:
    """Trains the run that `config` describes, as one of its ranks, and evaluates it."""
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    from repghost.description import describe_run
    from repghost.errors import print_rank_zero
    from repghost.evaluation.evaluate import evaluate_run
    from repghost.reference import reference_curve
    from repghost.run import record_run
    from repghost.run_name import folder_of
    from repghost.training.checkpoint import AtomicCheckpointIO, Checkpoints, resume_point
    from repghost.training.loggers import RunFiles, SpeedBar, make_logger
    from repghost.training.profiler import StepProfiler
    from repghost.training.recipe import describe
    from repghost.training.trainer import compiles, keep_compiled
    from repghost.weights import start_from

    directory = folder_of(config)
    folder = directory / "checkpoints"
    checkpoints = Checkpoints(folder, **config.checkpoint)
    files = RunFiles(directory, config.curve_seconds)
    trainer = instantiate(config.trainer)(
        directory=directory,
        callbacks=[checkpoints, files, SpeedBar(refresh_rate=1)],
        logger=make_logger(config.logger, directory),
        profiler=StepProfiler(directory) if config.profile else None,
        plugins=[AtomicCheckpointIO()],
    )
    with checkpoints.signals:
        data = instantiate(config.data)
        data.setup("fit")
        index = data.index("train")
        checkpoints.description = describe_run(config, index.classes, index.fingerprint)
        pl.seed_everything(config.seed, verbose=False)  # the initial weights; all later draws have seeds of their own
        model = instantiate(config.model, num_classes=data.num_classes)
        if config.weights:
            start_from(model, config.weights)
        data.augment.match_step(trainer.strategy.root_device, trainer.precision, config.channels_last)
        if compiles(config.compile, trainer.strategy.root_device):
            keep_compiled(Path(config.data.cache) / "compiled")
            print_rank_zero("compile    the first batches take a minute or two, in which the step is compiled, once")
            data.augment.compile()
        classifier = instantiate(config.classifier)(model, config.recipe, steps_per_epoch=data.steps_per_epoch)
        files.official = reference_curve(config.width, config.epochs, data.counts)
        paper = Path(__file__).parent / "conf/recipe/paper.yaml"
        describe(config, paper, trainer, data, model, files.official is not None)
        checkpoints.record = partial(record_run, directory, config, data)
        trainer.fit(classifier, datamodule=data, ckpt_path=resume_point(folder), weights_only=True)
        evaluate_run(directory, config, trainer, data)


if __name__ == "__main__":
    main()
