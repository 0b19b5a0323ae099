# SPDX-License-Identifier: Apache-2.0
"""Kill small runs at random moments and resume them: `python .bench/soak.py 1000` for 1,000 kills.

Two runs at a time, each resumed until it is finished.  After every kill the folder of the run is
compared with that of a run that was never interrupted.  Ends with exit status 1 at any difference.

`python .bench/soak.py --processes 30` kills one of two processes that train together, at random 30
times.  The other has to end by itself, before both are resumed.  They are compared with one process
that has two devices.
"""
# ruff: noqa: E402

import collections
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SCRIPT = Path(__file__).resolve().parents[1] / "ff_ippo_store_experience.py"
sys.path.insert(0, str(SCRIPT.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flashbax.vault import Vault
from flax.serialization import msgpack_restore

# Before Jumanji: several processes find each other before one uses a device.
import ff_ippo_store_experience as ippo

# isort: split
from jumanji.env import Environment
from jumanji.types import StepType, restart

E, T, NUM_ENVS = 30, 16, 8  # evaluations of one update each, timesteps, environments
ARGUMENTS = f"""
    --system.num-updates {E} --arch.num-evaluation {E} --system.rollout-length {T}
    --arch.num-envs {NUM_ENVS // 2} --arch.num-eval-episodes 4 --env.scenario walk --vault.uid a
    --network.actor-layer-sizes 8 --network.critic-layer-sizes 8
"""
SAVE_INTERVALS = (1, 2, 5)  # drawn anew each time that a run is resumed
TOTALS = (
    *("kills", "SIGTERM", "SIGHUP", "while the folder was made", "after the last evaluation"),
    *("recordings", "timesteps compared", "lost", "duplicated", "different"),
    "temporary files left",
)
# Every run is a process of its own, forked from one that has imported the libraries but has not
# started JAX's backend, whose threads a fork would not take along.
FORK, SPAWN = map(multiprocessing.get_context, ("forkserver", "spawn"))
LIBRARIES = "flashbax.vault flax.training.train_state distrax optax matplotlib.figure tyro tqdm"
TWO_DEVICES = "--arch.num-envs", str(NUM_ENVS // 4)  # they have NUM_ENVS environments, too


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

    def __init__(self, folder, uid="a"):
        self.log, self.path = folder / "log", folder / "vaults/ff_ippo_walk" / uid
        folder.mkdir()

    def main(self, *options):
        """What a process does: the command line, which also logs when it heeds signals."""
        os.chdir(self.log.parent)
        for output in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND), output)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup`, it is ignored

        def run_experiment(*arguments, run=ippo.run_experiment):
            print("BEGIN", flush=True)
            result = run(*arguments)
            print("END")
            return result

        ippo.run_experiment = run_experiment
        sys.argv = [str(SCRIPT), *ARGUMENTS.split(), *options]
        ippo.main(Walk())

    def start(self, save_interval, *more, context=FORK):
        """A process that begins the run, or resumes it once its folder exists."""
        self.log.write_text("")
        self.begins = not self.path.exists()
        resume = () if self.begins else ("--checkpoint.resume",)
        options = "--vault.save-interval", str(save_interval), *resume, *more
        process = context.Process(target=self.main, args=options)
        process.start()
        return process

    def hidden(self):
        """The folders in which that of the run is made."""
        return set(self.path.parent.glob(".*"))

    def logged(self, line=-1):
        """How many evaluations a line of the log tells of, and how many are saved by then."""
        found = re.findall(r"^step ([\d,]+):.*, saved to ([\d,]+)$", self.log.read_text(), re.M)
        return [int(x.replace(",", "")) // (T * NUM_ENVS) for x in ("00", "00", *found)[line]]

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
        number = choose.choice((signal.SIGTERM, signal.SIGHUP, *[signal.SIGKILL] * 3))
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
            rel_dir = str(self.path.parents[1])
            vault = Vault("ff_ippo_walk", vault_uid=self.path.name, rel_dir=rel_dir)
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

    def compare(self, whole, num_saved, totals):
        """Compare the vault, which has `num_saved` evaluations or more, with that of the whole run.

        Returns its length, and what else was found.
        """
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
        totals.update(dict(zip(TOTALS[6:10], counts, strict=True)))
        assert not any(counts[1:]), f"lost, duplicated, different: {counts[1:]}"
        return length, found

    def check(self, whole, num_saved, totals):
        """Compare what is on disk, with `num_saved` evaluations or more, with the whole run."""
        length, found = self.compare(whole, num_saved, totals)
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
            heeded = 128 + sent
            if sent in (signal.SIGTERM, signal.SIGHUP):  # not before and after the run itself
                is_heeded = "BEGIN" in text and "END" not in text
                statuses = {heeded} if is_heeded else {0, heeded, -sent}
            assert status in statuses, f"the exit status is {status}, not {statuses}"
            num_saved = max(num_saved, self.logged()[status not in (0, heeded)])
            with lock:  # which also keeps one thread's redirection from the other's
                if sent:
                    totals.update(("kills", moment, signal.Signals(sent).name))
                found = self.check(whole, num_saved, totals)
        for name in found:
            same = lambda *pair: np.testing.assert_array_equal(*pair, err_msg=name)
            jax.tree.map(same, found[name], expected[name])
        totals["temporary files left"] += len([*self.path.glob(".*"), *self.hidden()])
        totals["recordings"] += 1


def start_together(runs, save_interval):
    """The processes of runs that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = *TWO_DEVICES, "--arch.distributed", "--arch.num-processes", "2"
    options += "--arch.coordinator-address", address, "--arch.process-id"
    processes = []
    for index, run in enumerate(runs):
        own = *options, str(index)
        # The script looks there when it is imported.
        with mock.patch.object(sys, "argv", [str(SCRIPT), *own]):
            processes.append(run.start(save_interval, *own))
    return processes


def record_together(folder, whole, expected, choose, totals):
    """One recording of two processes, from its beginning to its end, however often one is killed.

    Each has a folder of its own, and half of the rows.
    """
    folder.mkdir()
    runs = [Run(folder / str(index), f"a-p{index}of2") for index in range(2)]
    begun = lambda: all("BEGIN" in run.log.read_text() for run in runs)
    halves = [{name: np.split(x, 2)[index] for name, x in whole.items()} for index in range(2)]
    statuses, num_saved = [], 0
    while statuses != [0, 0]:
        if not all(run.path.exists() for run in runs):  # killed before anything was recorded
            for run in runs:
                shutil.rmtree(run.path.parent, ignore_errors=True)
        processes = start_together(runs, choose.choice(SAVE_INTERVALS))
        victim, other = choose.sample(processes, 2)
        # Within the first seconds, or after an evaluation.  Before they have found each other, one
        # that is alone waits for five minutes.
        number = choose.randint(num_saved - 5, E + 5)
        delay = choose.uniform(0, 4 if number <= num_saved else 0.3)
        while victim.is_alive() and not (begun() and runs[0].logged()[0] >= number):
            time.sleep(0.002)
        victim.join(delay)
        is_killed = victim.is_alive()
        totals["kills"] += is_killed
        victim.kill()
        start = time.monotonic()
        for process in (victim, other):
            process.join(120)
        assert not other.is_alive(), "the other process goes on"
        totals["seconds"] = max(totals["seconds"], math.ceil(time.monotonic() - start))
        statuses = [process.exitcode for process in processes]
        assert is_killed or statuses == [0, 0], f"the exit statuses are {statuses}"
        for status, run in zip(statuses, runs, strict=True):
            assert status or "END" in run.log.read_text(), f"the exit statuses are {statuses}"
        # When the first one says what it has saved, the second may be a line behind.
        num_saved = max(num_saved, runs[0].logged(line=-2)[1])
        pairs = zip(runs, halves, strict=True)
        found = [run.compare(half, num_saved, totals)[1] for run, half in pairs]
    assert found[0]["steps"] == expected["steps"]
    for name in ("eval_key", "params", "evaluations"):
        for each in found:
            same = lambda *pair: np.testing.assert_array_equal(*pair, err_msg=name)
            jax.tree.map(same, each["checkpoint"][name], expected["checkpoint"][name])
    totals["recordings"] += 1


def end(root, *problems):
    """End with exit status 1; the folder is kept."""
    kept = shutil.copytree(root, tempfile.mkdtemp(prefix="soak"), dirs_exist_ok=True)
    sys.exit("\n".join([*problems, f"what was on the disk is in {kept}"]))


def soak_together(num_kills, root):
    """Kill one of two processes in the folder `root`, and print the totals after each recording."""
    run, totals = Run(root / "whole"), collections.Counter()
    with mock.patch.dict(os.environ, JAX_NUM_CPU_DEVICES="2"):
        process = run.start(1, *TWO_DEVICES, context=SPAWN)
    process.join()
    assert process.exitcode == 0, run.log.read_text()
    whole, _, expected = run.read()
    while totals["kills"] < num_kills:
        number = totals["recordings"]
        try:
            record_together(root / str(number), whole, expected, random.Random(number), totals)
        except Exception as error:
            end(root, f"recording {number}: {error!r}")
        counts = ", ".join(f"{totals[name]:,} {name}" for name in ("kills", *TOTALS[5:10]))
        print(f"{counts}, {totals['seconds']} seconds until the other ended, at most", flush=True)


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
        end(root, *problems)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of processes that were killed
        FORK.set_forkserver_preload(LIBRARIES.split())
        work = soak_together if "--processes" in sys.argv else soak
        work(int(sys.argv[-1]), Path(folder))
