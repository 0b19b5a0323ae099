# SPDX-License-Identifier: Apache-2.0
"""Print the figures of an accelerator, within ten minutes: `python .bench/gpu.py`.

It compares a recording with the original's, times a default run, trains with 16, 256 and 4096
environments while the vault is written, and says where the time goes.  It also runs on a CPU.
Each run is a process of its own: this one stays on the CPU.
"""
# ruff: noqa: E402

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
SCRIPT = FOLDER / "ff_ippo_store_experience.py"
ENVIRONMENT = dict(os.environ)  # of the runs
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(FOLDER))

import numpy as np

from test_script import GOLDEN, LEAVES, read_vault


def run(uid, arguments="", **environment):
    """Run the script in the working directory: seconds, its output, and its evaluations."""
    command = [sys.executable, str(SCRIPT), "--vault.uid", uid, *arguments.split()]
    options = {"env": ENVIRONMENT | environment, "capture_output": True, "text": True}
    start = time.perf_counter()
    finished = subprocess.run(command, **options)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stdout}{finished.stderr}")
    seconds = time.perf_counter() - start
    metrics = json.loads(Path("vaults/ff_ippo_rware", uid, "metrics.json").read_text())
    (evaluations,) = metrics["RobotWarehouse"]["tiny-2ag"]["ff_ippo"].values()
    evaluations = [x for name, x in evaluations.items() if name.startswith("step")]
    return seconds, finished.stdout, evaluations


def count_golden():
    """The number of updates, from the first, whose recording is the original's in all leaves."""
    arguments = f"--system.num-updates {len(GOLDEN)} --arch.num-evaluation 1"
    run("golden", f"{arguments} --arch.no-absolute-metric", JAX_THREEFRY_PARTITIONABLE="0")
    leaves = read_vault("vaults/ff_ippo_rware/golden")
    for update, digests in enumerate(GOLDEN):
        for name, digest in zip(LEAVES, digests.split(), strict=True):
            part = np.ascontiguousarray(np.split(leaves[name], len(GOLDEN))[update])
            if hashlib.sha256(part.tobytes()).hexdigest()[:16] != digest:
                return update
    return len(GOLDEN)


def train(num_envs, more=""):
    """Steps/s of three evaluations of one update each, of training alone and of everything."""
    arguments = f"--arch.num-envs {num_envs} --system.num-updates 4 --arch.num-evaluation 4"
    arguments += f" --vault.save-interval 1 --arch.no-absolute-metric {more}"
    _, _, (first, *others) = run(f"train-{num_envs}{more}", arguments)
    speed = np.median([x["steps_per_second"][0] for x in others])
    num_steps = others[-1]["step_count"] - first["step_count"]
    return speed, num_steps / (others[-1]["elapsed_time"] - first["elapsed_time"])


def main():
    """Print a table."""
    print("| figure | value |\n| --- | --- |", flush=True)
    line = lambda name, value: print(f"| {name} | {value} |", flush=True)
    line("recording equal to the original's", f"{count_golden()} of {len(GOLDEN)} updates")
    seconds, output, evaluations = run("default")
    device = re.search(r"seed 42, (.*?):", output)[1]
    absolute_metric = re.search(r"absolute metric: (\S+)", output)[1]
    line(f"default run, {device}", f"{seconds:.0f} s, absolute metric {absolute_metric}")
    speeds = {}
    for num_envs in (16, 256, 4096):
        speed, overall = train(num_envs)
        speeds[num_envs] = speed
        line(f"{num_envs} environments", f"{speed:,.0f} steps/s; {overall:,.0f} with evaluations")
    steps = np.diff([0, *(x["step_count"] for x in evaluations)])
    training = sum(steps / [x["steps_per_second"][0] for x in evaluations])
    evaluating = evaluations[-1]["elapsed_time"] - training
    rest = seconds - training - evaluating
    where = f"training {training:.0f} s, evaluations {evaluating:.0f} s, all else {rest:.0f} s"
    line("where the default run's time goes", where)
    share = speeds[256] / train(256, "--system.no-learn")[0]
    line("where the training's time goes, 256 environments", f"{share:.0%} acting and stepping")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
