"""How a run is saved after each epoch, and how it or another one is taken up again."""

import json
import time

import clip  # before torch: it bounds how long torch's threads wait

import torch

from harness import machine, places, run_pictures, runs


def save_checkpoint(run):
    """last.pt: what was learned, what is needed to read it, and what --resume goes on with.

    why no random state and no schedule: both follow from the configuration and the epoch. Raises ValueError
    for learned tensors that are not finite; the last good last.pt stays. The first one of a run removes what
    an earlier run left.
    """
    learned = run.model.learned_state()
    clip.check_finite(learned, f"epoch {run.epochs_done}: training failed, try a smaller --lr, or --amp off")
    checkpoint = {"learned": learned, **run.fingerprint,
                  "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                  "epoch": run.epochs_done, "seconds": time.monotonic() - run.started, "log": run.log}
    replaced = run.epochs_done == 1 and places.holds_run(run.folder)
    machine.write_whole(run.folder / "last.pt", lambda path: torch.save(checkpoint, path))
    if replaced:
        places.remove(run.folder)


def write_log(run):
    """log.jsonl, whole, as last.pt has it."""
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in run.log]
    machine.write_text(run.folder / "log.jsonl", "".join(lines))


def is_done(run):
    """Whether all epochs are trained and the test is made."""
    return run.epochs_done >= run.args.epochs and (run.folder / "result.json").exists()


def resume(run):
    """Restores the run from last.pt.

    Raises ValueError where the run was started with other options, pictures, classes or CLIP weights.
    """
    checkpoint = runs.read_checkpoint(run.folder)
    changed = runs.changes(checkpoint["config"], run.fingerprint["config"])
    if changed:
        raise ValueError(f"{run.folder} was started with other options ({'; '.join(changed)}): "
                         f"python train.py --resume {run.folder} goes on with its own; "
                         f"--output-dir {places.unused(run.folder)} without --resume leaves it alone")

    runs.check_classes(run.folder, checkpoint["class_names"], run.fingerprint["class_names"])
    run_pictures.check_data(run.folder, checkpoint["data"], run.fingerprint["data"])
    runs.restore(run.folder, checkpoint, run.model, run.fingerprint["clip_sha256"])
    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        # why: the device may be another one
        run.optimizer.param_groups[0]["fused"] = run.device.type == "cuda"
        if checkpoint["scaler"]:                         # empty where the run had no need of one, say on CPU
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{run.folder}/last.pt is damaged: its optimizer state does not fit") from error

    run.fingerprint["training"] = checkpoint["training"]     # why: it includes those of --start-from
    run.log = checkpoint["log"]
    run.started -= checkpoint["seconds"]                 # why: the time before the interruption counts too
    if run.rank == 0:
        write_log(run)                                   # why: the file may be missing, too short or too long
        for name, then, now in (("precision", checkpoint["config"]["amp"], run.args.amp),
                                ("threads", checkpoint["threads"], torch.get_num_threads())):
            if then != now:
                print(f"note: {name} was {then}, is {now}: the last digits may differ")


def start_from(run, other):
    """Puts in what another run, a folder, has learned. Optimizer, schedule and log stay those of a new run.

    Raises ValueError where the other run has other classes, other CLIP weights or other learned tensors, and
    where it was trained on pictures of this run's test.
    """
    checkpoint = runs.read_checkpoint(other)
    runs.check_classes(other, checkpoint["class_names"], run.fingerprint["class_names"])
    runs.restore(other, checkpoint, run.model, run.fingerprint["clip_sha256"])
    # why: equal names then do not mean equal pictures
    if checkpoint["config"]["dataset"] != run.args.dataset:
        return

    tested = {run_pictures.relative_path(path, run.args.data_root) for path, *_ in run.test_set}
    seen = tested.intersection(checkpoint["training"])
    if seen:
        raise ValueError(f"--start-from {other}: it was trained on {len(seen)} of the {len(tested)} pictures "
                         f"of this test, such as {min(seen)}: give both runs the same --split-seed and "
                         "--held-out")
    both = [*run.fingerprint["training"], *checkpoint["training"]]
    run.fingerprint["training"] = [*dict.fromkeys(both)]       # why: none of them may count in a later test
