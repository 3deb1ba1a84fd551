"""Which kind of run a configuration asks for, and the runs of `--stages` one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from ..errors import AlroFastError
from .checkpoints import check_same_data, check_same_options, newest_checkpoint
from .checks.folders import next_folder
from .config import Config, parse
from .run import Run
from .run_preferences import PreferenceRun
from .run_recranker import RecRankerRun
from .stages import finished, stage_arguments

KINDS = {"lists": Run, "preferences": PreferenceRun, "tasks": RecRankerRun}  # by Description.run


def stages(config: Config, argv: Sequence[str]) -> Iterator[Config]:
    """The run's own configuration, or, with `--stages`, one for each stage, in folders of their own below output_dir.

    Options and data of a stage are checked as it is yielded: taken as a list, a mistake in the second is found before
    the first begins. A resumed run skips the stages that are finished, and begins anew those that have no whole
    checkpoint.
    """
    if config.training.stages is None:
        yield config
        return
    wanted = config.training.resume_from_checkpoint
    if wanted not in (None, True, "auto"):
        raise AlroFastError(
            f"--resume_from_checkpoint {wanted} with --stages: each stage has checkpoints of its own; give true or auto"
        )
    root = Path(config.training.output_dir or next_folder(config))
    for words in stage_arguments(config, root):
        stage = parse(argv, words)
        for name in ("stages", "stage_epochs", "stage_learning_rates", "stage_preferences"):
            setattr(stage.training, name, None)
        folder = Path(cast(str, stage.training.output_dir))
        if stage.training.dry_run:
            stage.model.init_adapter = config.model.init_adapter
            stage.model.model_name_or_path = config.model.model_name_or_path
        kind = kind_of(stage)
        kind.settle(stage)
        given = kind.given(stage)
        if stage.training.resume_from_checkpoint:
            if finished(folder):
                check_same_options(folder, stage)
                if given is not None:
                    check_same_data(str(folder), given)
                print(f"{folder}: finished before")
                continue
            if newest_checkpoint(folder) is None:
                stage.training.resume_from_checkpoint = None
                stage.training.overwrite_output_dir = True
        yield stage


def run_for(config: Config) -> Run:
    """The run that a configuration asks for, built."""
    return kind_of(config)(config)


def kind_of(config: Config) -> type[Run]:
    """The kind of run that a configuration asks for."""
    return KINDS[config.description.run]
