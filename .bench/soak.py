# SPDX-License-Identifier: Apache-2.0
"""Kill small runs at random moments and resume them: `python .bench/soak.py 1000` for 1,000 kills.

Two runs at a time, each resumed until it is finished.  After every kill the folder of the run is
compared with that of a run that was never interrupted.  Ends with exit status 1 at any difference.
"""
# ruff: noqa: E402

import collections
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).resolve().parents[1] / "ff_ippo_store_experience.py"
sys.path.insert(0, str(SCRIPT.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flashbax.vault import Vault
from flax.serialization import msgpack_restore
from jumanji.env import Environment
from jumanji.types import StepType, restart

import ff_ippo_store_experience as ippo

E, T, NUM_ENVS = 30, 16, 8  # evaluations of one update each, timesteps, environments
ARGUMENTS = f"""
    --system.num-updates {E} --arch.num-evaluation {E} --system.rollout-length {T}
    --arch.num-envs {NUM_ENVS // 2} --arch.num-eval-episodes 4 --env.scenario walk --vault.uid a
    --network.actor-layer-sizes 8 --network.critic-layer-sizes 8
"""
SAVE_INTERVALS = (1, 2, 5)  # drawn anew each time that a run is resumed
TOTALS = (
    *("kills", "SIGTERM", "while the folder was made", "after the last evaluation", "recordings"),
    *("timesteps compared", "lost", "duplicated", "different", "temporary files left"),
)
# Every run is a process of its own, forked from one that has imported the libraries but has not
# started JAX's backend, whose threads a fork would not take along.
FORK = multiprocessing.get_context("forkserver")
LIBRARIES = "flashbax.vault flax.training.train_state distrax optax matplotlib.figure tyro tqdm"


class WalkState(NamedTuple):
    position: Any  # (2,)
    step_count: Any  # ()
    key: Any


class Walk(Environment):
    """Two agents on a line, which actions 0, 1 and 2 lead left, nowhere and right.

    An episode terminates when the first agent reaches 3 or the other -3, and is cut off at the
    time limit.  One feature is random, so that no two steps are alike.
    """

    time_limit = 10
    action_spec = observation_spec = None

    def observe(self, state):
        x, key = state.position, jax.random.fold_in(state.key, state.step_count)
        view = jnp.stack([x, x**2, jax.random.randint(key, x.shape, 0, 9)], axis=1)
        return ippo.Observation(view, jnp.stack([x > -3, x == x, x < 3], axis=1))

    def reset(self, key):
        key, position_key = jax.random.split(key)
        state = WalkState(jax.random.randint(position_key, (2,), -1, 2), jnp.int32(0), key)
        return state, restart(self.observe(state), shape=2)

    def step(self, state, action):
        position = state.position + action - 1
        state = WalkState(position, state.step_count + 1, state.key)
        terminated = (position[0] >= 3) | (position[1] <= -3)
        truncated = state.step_count >= self.time_limit
        return state, restart(self.observe(state)).replace(
            step_type=jnp.where(terminated | truncated, StepType.LAST, StepType.MID),
            reward=2 - jnp.abs(position).astype(jnp.float32),
            discount=jnp.where(terminated, 0.0, jnp.ones(2)),
        )


class Run:
    """A run in `folder`, of which each process begins or resumes the recording."""

    def __init__(self, folder):
        self.log, self.path = folder / "log", folder / "vaults/ff_ippo_walk/a"
        folder.mkdir()

    def main(self, *options):
        """What a process does: the command line, which also logs when it heeds signals."""
        os.chdir(self.log.parent)
        for output in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND), output)

        def run_experiment(*arguments, run=ippo.run_experiment):
            print("BEGIN")
            result = run(*arguments)
            print("END")
            return result

        ippo.run_experiment = run_experiment
        sys.argv = [str(SCRIPT), *ARGUMENTS.split(), *options]
        ippo.main(Walk())

    def start(self, save_interval):
        """A process that begins the run, or resumes it once its folder exists."""
        self.log.write_text("")
        self.begins = not self.path.exists()
        resume = () if self.begins else ("--checkpoint.resume",)
        options = "--vault.save-interval", str(save_interval), *resume
        process = FORK.Process(target=self.main, args=options)
        process.start()
        return process

    def hidden(self):
        """The folders in which that of the run is made."""
        return set(self.path.parent.glob(".*"))

    def logged(self):
        """How many evaluations the last process logged, and how many it said to be saved."""
        found = re.findall(r"^step ([\d,]+):.*, saved to ([\d,]+)$", self.log.read_text(), re.M)
        return [int(x.replace(",", "")) // (T * NUM_ENVS) for x in (found or ["00"])[-1]]

    def kill(self, process, duration, choose):
        """Wait for the end of a process, or kill it at some moment: the signal sent, and when."""
        hidden, moment, delay = self.hidden(), choose.random(), choose.uniform(0, duration)
        awaited = lambda: True
        if moment < 0.25:
            delay = None
        elif moment < 0.5 and self.begins:  # while the folder of the run is made
            awaited, delay = lambda: self.hidden() != hidden, delay / 50
        elif moment > 0.8:  # around the last writes
            awaited, delay = lambda: self.logged()[0] >= E - 1, delay / 5
        while process.is_alive() and not awaited():
            time.sleep(0.002)
        process.join(delay)
        if not process.is_alive():
            return 0, ""
        number = choose.choice((signal.SIGTERM, *[signal.SIGKILL] * 3))
        os.kill(process.pid, number)
        process.join(60)
        assert not process.is_alive(), "it goes on after a signal"
        if self.begins and self.hidden() != hidden and not self.path.exists():
            return number, "while the folder was made"
        is_last = self.logged()[0] == E and "END" not in self.log.read_text()
        return number, "after the last evaluation" if is_last else "between"

    def read(self):
        """What is in the folder: leaves (rows, any, ...), their length, and all but the times."""
        with contextlib.redirect_stdout(io.StringIO()):
            vault = Vault("ff_ippo_walk", vault_uid="a", rel_dir=str(self.path.parents[1]))
        leaves = jax.tree.map(np.asarray, vault.read().experience) if vault.vault_index else {}
        files = ippo.find_checkpoints(self.path)
        checkpoint = msgpack_restore(files[max(files)].read_bytes())
        file = self.path / "metrics.json"
        metrics = json.loads(file.read_text())["Walk"]["walk"]["ff_ippo"] if file.exists() else {}
        steps = metrics.get("seed_42", {})
        for times in (*checkpoint["evaluations"], *steps.values()):
            times.pop("elapsed_time", None)
            times.pop("steps_per_second", None)
        names = [str(file.relative_to(self.path)) for file in self.path.rglob("*")]
        # Not TensorStore's data, but its locks, and nothing that was being written at a kill.
        names = [x for x in names if x[0] != "." and ("/d/" not in f"/{x}" or "__lock" in x)]
        names = sorted(re.sub(r"^checkpoint\.\d+", "checkpoint", x) for x in names)
        return leaves, vault.vault_index, {"files": names, "steps": steps, "checkpoint": checkpoint}

    def check(self, whole, num_saved, totals):
        """Compare what is on disk, with `num_saved` evaluations or more, with the whole run."""
        num_rows, limit = whole["done"].shape[:2]
        leaves, length, found = {}, 0, {"steps": {}, "checkpoint": {"evaluations": []}}
        if self.path.exists():
            leaves, length, found = self.read()
        differ = np.zeros((num_rows, min(length, limit)), bool)
        for name, leaf in leaves.items():
            same = leaf[:, :limit] == whole[name][:, :length]
            differ |= ~same.reshape(*differ.shape, -1).all(axis=-1)
        lost, twice = max(0, num_saved * T - length), max(0, length - limit)
        counts = differ.size, num_rows * lost, num_rows * twice, int(differ.sum())
        totals.update(dict(zip(TOTALS[5:9], counts, strict=True)))
        assert not any(counts[1:]), f"lost, duplicated, different: {counts[1:]}"
        num_metrics = sum(name.startswith("step_") for name in found["steps"])
        order = num_saved, num_metrics, len(found["checkpoint"]["evaluations"]), length / T
        names = "evaluations that are promised, in metrics.json, in the checkpoint, in the vault"
        assert sorted(order) == list(order), f"{names}: {order}"
        return found

    def record(self, duration, whole, expected, choose, totals, lock):
        """One recording, from its beginning to its end, however often it is killed."""
        status, num_saved = None, 0
        while status != 0:
            process = self.start(choose.choice(SAVE_INTERVALS))
            sent, moment = self.kill(process, duration, choose)
            status, text, statuses = process.exitcode, self.log.read_text(), {-sent}
            if "END" in text:  # it may have ended just before the signal
                statuses.add(0)
            if sent == signal.SIGTERM:  # which is not heeded before and after the run itself
                is_heeded = "BEGIN" in text and "END" not in text
                statuses = {143} if is_heeded else {0, 143, -sent}
            assert status in statuses, f"the exit status is {status}, not {statuses}"
            num_saved = max(num_saved, self.logged()[status not in (0, 143)])
            with lock:  # which also keeps one thread's redirection from the other's
                if sent:
                    totals.update(("kills", moment, signal.Signals(sent).name))
                found = self.check(whole, num_saved, totals)
        for name in found:
            same = lambda *pair: np.testing.assert_array_equal(*pair, err_msg=name)
            jax.tree.map(same, found[name], expected[name])
        totals["temporary files left"] += len([*self.path.glob(".*"), *self.hidden()])
        totals["recordings"] += 1


def soak(num_kills, root):
    """Kill runs in the folder `root`, and print the totals after each recording."""
    totals, problems, lock, numbers = collections.Counter(), [], threading.Lock(), itertools.count()

    def work(*others):
        while totals["kills"] < num_kills and not problems:
            number = next(numbers)
            run = Run(root / str(number))
            try:
                run.record(*others, random.Random(number), totals, lock)
                shutil.rmtree(run.log.parent)
            except Exception as error:
                problems.append(f"recording {number}: {error!r}\n{run.log.read_text()[-3000:]}")
            print(", ".join(f"{totals[name]:,} {name}" for name in TOTALS), flush=True)

    for index, save_interval in enumerate((*SAVE_INTERVALS, 1)):  # the first fill JAX's cache
        run, start = Run(root / f"whole{index}"), time.monotonic()
        process = run.start(save_interval)
        process.join()
        assert process.exitcode == 0, run.log.read_text()
    duration = time.monotonic() - start
    print(f"an uninterrupted run takes {duration:.1f} s", flush=True)
    whole, _, expected = run.read()
    with ThreadPoolExecutor(2) as workers:
        others = 1.2 * duration, whole, expected  # two at a time are slower
        for future in [workers.submit(work, *others) for _ in range(2)]:
            future.result()
    if problems:
        kept = shutil.copytree(root, tempfile.mkdtemp(prefix="soak"), dirs_exist_ok=True)
        sys.exit("\n".join([*problems, f"what was on the disk is in {kept}"]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of processes that were killed
        FORK.set_forkserver_preload(LIBRARIES.split())
        soak(int(sys.argv[1]), Path(folder))
