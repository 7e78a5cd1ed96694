"""Run by torchrun in test_several_processes.py: several runs, one after another.

Usage: several_processes.py RECIPE FOLDER NAME[:STAGE:STEP][,key=value...] ...
A STAGE and STEP stop the run there first, then it goes on. With finetune=RECIPE it is that recipe
of fine-tuning.
"""

import json
import sys
import time
from pathlib import Path

import transformers
from accelerate import PartialState

from hive_vision.folders import check_folder
from hive_vision.studies.regression_guard import RegressionGuard
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.checkpoints import last_checkpoint
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.finetune import finetune
from hive_vision.training.pretrain import PretrainJob, pretrain
from hive_vision.training.processes import gather_lists, leave_processes, on_main
from hive_vision.training.recipes import load_finetune_recipe, load_recipe
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.trainer import HiveTrainer
from hive_vision.training.watchdog import Watchdog


def global_batches(arguments):
    """Sample ids of each optimiser step of stage 1, of all processes together."""
    watchdog = Watchdog(Path(arguments.output), 0, 1, stall_seconds=0)
    job = PretrainJob(
        arguments, RunFolder(arguments), watchdog, InterruptCallback(grace_seconds=60)
    )
    trainer = job.trainer("stage1", arguments.stage1, [])
    own = [batch["sample_ids"] for batch in trainer.get_train_dataloader()]
    steps = trainer.args.gradient_accumulation_steps
    return [
        sorted(gather_lists([i for ids in own[start : start + steps] for i in ids]))
        for start in range(0, len(own), steps)
    ]


class LateTrainer(transformers.Trainer):
    """The second process takes its time to write its part of a checkpoint."""

    def _save_rng_state(self, output_dir):
        time.sleep(0.5 * PartialState().process_index)
        super()._save_rng_state(output_dir)


def check_checkpoint(stage):
    """Every process's part is in the sealed checkpoint."""
    files = check_folder(last_checkpoint(stage), "checkpoint")["files"]
    ranks = PartialState().num_processes
    assert ranks == sum(Path(name).name.startswith("rng_state") for name in files), files


def main(recipe, folder, scenarios):
    transformers.utils.logging.disable_progress_bar()
    for scenario in scenarios:
        spec, *overrides = scenario.split(",")
        name, *stop = spec.split(":")
        if overrides and overrides[0].startswith("finetune="):
            vlm = overrides.pop(0).removeprefix("finetune=")
            finetune(load_finetune_recipe(vlm, [*overrides, f"output={folder}/{name}"]))
            continue
        arguments = load_recipe(recipe, [*overrides, f"output={folder}/{name}"])
        if stop:
            try:
                pretrain(arguments, (stop[0], int(stop[1])), RegressionGuard)
            except InterruptedRunError:
                pass
            else:
                raise AssertionError("was not stopped")
            on_main(lambda stage=Path(arguments.output, stop[0]): check_checkpoint(stage))
        pretrain(arguments, guard=RegressionGuard if arguments.probe_after_stage else None)
        batches = global_batches(load_recipe(recipe, [*overrides, f"output={folder}/.{name}"]))
        text = json.dumps(batches)
        on_main(lambda name=name, text=text: Path(folder, f"{name}.json").write_text(text))


if __name__ == "__main__":
    HiveTrainer.__bases__ = (LateTrainer,)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    leave_processes()
