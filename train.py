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
    from repghost.run import record_run
    from repghost.run_name import folder_of
    from repghost.training.checkpoint import AtomicCheckpointIO, Checkpoints, resume_point
    from repghost.training.loggers import RunFiles, SpeedBar, make_logger
    from repghost.training.profiler import StepProfiler

    if config.task == "detection":
        from repghost.detection.evaluate import evaluate_run
        from repghost.detection.module import prepare
    else:
        from repghost.evaluation.evaluate import evaluate_run
        from repghost.training.recipe import prepare

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
        module, files.official = prepare(config, trainer, data)
        checkpoints.record = partial(record_run, directory, config, data)
        trainer.fit(module, datamodule=data, ckpt_path=resume_point(folder), weights_only=True)
        evaluate_run(directory, config, trainer, data)


if __name__ == "__main__":
    main()
