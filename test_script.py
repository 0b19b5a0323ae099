# SPDX-License-Identifier: Apache-2.0
"""Tests of ff_ippo_store_experience.py: `pytest test_script.py`.

Run as a program, `python test_script.py`, it prints the benchmark instead, and with `--soak N` it
kills and resumes runs at N random moments.
"""
# ruff: noqa: E402, PT018

import time

START = time.perf_counter()  # the benchmark counts from here

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import distrax
import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
import tyro
from flashbax.vault import Vault
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from jumanji import specs
from jumanji.env import Environment
from jumanji.environments import LevelBasedForaging, RobotWarehouse
from jumanji.types import StepType, restart
from nbclient import NotebookClient
from PIL import Image

import ff_ippo_store_experience as ippo

FOLDER = Path(__file__).resolve().parent
SCRIPT = FOLDER / "ff_ippo_store_experience.py"
LEAVES = ("done", "action", "reward", "observation", "legal_action_mask")

# First 16 hex digits of the SHA-256 of each leaf in each update of the first evaluation, in the
# order of LEAVES, as Mava's own script recorded it with seed 42 and 10 updates in 2 evaluations.
GOLDEN = [
    "5d1b8c6eed499bc1 051efe5f020212e0 c35020473aed1b46 803f4b30e23b4d49 d18b495f2d46a7d4",
    "c1b50a8b66808e68 b9777d36ad93488d c35020473aed1b46 5babceffd52e2523 d5210d2138fcc541",
    "fcadb10effcccce0 9e5b8a8526d1183d c35020473aed1b46 312c277dbd4f18a9 1deac040bec60af9",
    "e737b5ae9c4ad8a9 10afb6bc5c997df5 c35020473aed1b46 00258dc9911f1ee5 45682f5fca5b7531",
    "953c15647b83ee38 24c74519a739559e c35020473aed1b46 775016ab60e0eaae 0f7943e692d9d5f5",
]

# A run of a second or two: 2 evaluations of 2 updates, 2 sets of 4 environments, of the task below.
SMALL = """
    --system.num-updates 4 --system.rollout-length 16 --arch.num-evaluation 2 --arch.num-envs 4
    --arch.num-eval-episodes 4 --arch.num-absolute-metric-eval-episodes 8 --env.scenario walk
    --env.time-limit 10 --network.actor-layer-sizes 8 --network.critic-layer-sizes 8 --vault.uid a
"""
NO_RESULTS = "--results.no-save --arch.no-absolute-metric "
NOTHING_ELSE = NO_RESULTS + "--checkpoint.no-save "
RESUME = " --checkpoint.resume"
VAULT, CHECKPOINT = "vaults/ff_ippo_walk/a", "checkpoints/ff_ippo_walk/a"


class WalkState(NamedTuple):
    position: Any  # (N,)
    step_count: Any  # ()
    key: Any


class View(NamedTuple):
    agents_view: Any  # (N, 3)


class Walk(Environment):
    """An environment of one's own: agents on a line, each paid for being near the middle.

    Actions 0, 1 and 2 lead left, nowhere and right.  An episode terminates when the first agent
    reaches 3, and is cut off when the last one reaches -3 or at the time limit.  One feature is
    random, so that no two steps are alike.
    """

    time_limit = 10
    action_spec = observation_spec = None

    def __init__(self, num_agents, is_masked, is_team):
        self.num_agents, self.is_masked, self.is_team = num_agents, is_masked, is_team
        self.action_spec = specs.MultiDiscreteArray(np.full(num_agents, 3))
        super().__init__()

    def observe(self, state):
        x = state.position
        key = jax.random.fold_in(state.key, state.step_count)
        view = jnp.stack([x, x**2, jax.random.randint(key, x.shape, 0, 9)], axis=1)  # integers
        legal = jnp.stack([x > -3, x == x, x < 3], axis=1)
        return ippo.Observation(view, legal) if self.is_masked else View(view)

    def reset(self, key):
        key, position_key = jax.random.split(key)
        position = jax.random.randint(position_key, (self.num_agents,), -1, 2)
        state = WalkState(position, jnp.int32(0), key)
        return state, restart(self.observe(state), shape=() if self.is_team else self.num_agents)

    def step(self, state, action):
        position = state.position + action - 1
        state = WalkState(position, state.step_count + 1, state.key)
        terminated = position[0] >= 3
        truncated = (position[-1] <= -3) | (state.step_count >= self.time_limit)
        reward = 2 - jnp.abs(position).astype(jnp.float32)
        discount = jnp.where(terminated, 0.0, jnp.ones(self.num_agents))
        if self.is_team:
            reward, discount = reward.sum(), discount.mean()
        step_type = jnp.where(terminated | truncated, StepType.LAST, StepType.MID)
        timestep = restart(self.observe(state))
        return state, timestep.replace(step_type=step_type, reward=reward, discount=discount)


TASKS = dict(ippo.TASKS)  # those of the script; here also two that are small
WALK = ippo.Task(lambda _: Walk(2, is_masked=True, is_team=False), 10, "Walk", "walk")
ippo.TASKS["walk"] = WALK
# Small enough for a random policy to eat now and then.
ippo.TASKS["tiny-foraging"] = ippo.foraging(grid_size=6, fov=2, num_agents=3, num_food=1)


def small_config(arguments="", **vault):
    """The configuration of the command line SMALL, changed by `arguments`, such as a user gives."""
    config = tyro.cli(ippo.Config, args=[*SMALL.split(), *arguments.split()])
    return dataclasses.replace(config, vault=dataclasses.replace(config.vault, **vault))


def experiment(folder, arguments="", env=None):
    """What `run_experiment` gives for SMALL and `arguments` in `folder`."""
    with contextlib.chdir(folder):
        return ippo.run_experiment(small_config(arguments), env)


def where(path):
    """Arguments name, uid and rel_dir of a vault."""
    return path.parent.name, path.name, str(path.parents[1])


def open_with_flashbax(path):
    """A vault as one who has only Flashbax opens it."""
    name, uid, rel_dir = where(Path(path))
    with contextlib.redirect_stdout(io.StringIO()):
        return Vault(name, vault_uid=uid, rel_dir=rel_dir)


def read_vault(path):
    """Leaves (D * NU * UB * NE, E * T, ...) of a vault, as NumPy arrays."""
    return jax.tree.map(np.asarray, open_with_flashbax(path).read().experience)


def read_streams(path, num_updates=2, rollout_length=16):
    """Leaves (UB * NE, E * NU * T, ...) of a vault of one device: one environment a row."""
    return ippo.restore_time_order(read_vault(path), 1, num_updates, rollout_length)


def read_metrics(folder):
    """What `metrics.json` of a run in `folder` says of it, without the times."""
    (path,) = Path(folder, "results").glob("*/*/metrics.json")
    times = r'"(elapsed_time|steps_per_second)": \[?[^],}]*\]?'
    return json.loads(re.sub(times, r'"\1": 0', path.read_text()))


def assert_equal(actual, expected):
    """Both trees have the same arrays."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def jumanji_env(scenario="tiny-2ag", time_limit=500):
    """Jumanji's own environment of a scenario, without anything of ours."""
    env = ippo.TASKS[scenario].make(time_limit=time_limit)
    make = RobotWarehouse if isinstance(env, RobotWarehouse) else LevelBasedForaging
    return make(env._generator, time_limit=time_limit)


def run_script(arguments, cwd, program=(SCRIPT,), **environment):
    """The script as a user runs it, or another Python program."""
    command = [sys.executable, *program, *arguments.split()]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def learner_parts(config):
    """What `run_experiment` builds before it trains: environment, state, learner and mesh."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    env = ippo.make_env(config.env, config.system.add_agent_id)
    key, _, params_key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    state = ippo.init_learner(key, params_key, env, config, mesh)
    num_updates = config.system.num_updates // config.arch.num_evaluation
    extra_leaves = config.vault.extra_leaves
    return env, state, ippo.make_learn(env, config.system, num_updates, mesh, extra_leaves), mesh


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Many tests build the same learner: XLA compiles it once, also for other processes."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    options = {"compilation_cache_dir": folder, "persistent_cache_min_compile_time_secs": 0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in options.items():
            jax.config.update(f"jax_{name}", value)
            monkeypatch.setenv(f"jax_{name}".upper(), str(value))
        monkeypatch.setenv("PYTHONPATH", str(FOLDER))
        yield


# ---- RECORDINGS, at which many tests look --------------------------------------------------------


class Case(NamedTuple):
    """How a recording is made, and what it is to have."""

    arguments: str
    extra_leaves: str
    export: str  # folder of its export, after NAME_UID
    own_env: Environment | None = None


class Recording(NamedTuple):
    """A run with all that it can save, and what its actions lead to."""

    result: ippo.ExperimentResult
    folder: Path  # with vaults, checkpoints and results in it
    case: Case
    replay: dict[str, np.ndarray]  # what `read_streams` is to give, from the seed and the actions


def replay(result, env):
    """Leaves (UB * NE, E * NU * T, ...) from the seed and the recorded actions, step by step."""
    config, actions = result.config, read_streams(result.vault_path)["action"]
    num_rows, num_timesteps, num_agents = actions.shape
    key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)[0]
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    ids = np.eye(num_agents, dtype=np.float32)[:, : num_agents * config.system.add_agent_id]
    names = (*LEAVES, "next_observation", "discount", "step_count", "truncation")
    steps = []

    def see(timestep):
        seen = timestep.observation
        mask = getattr(seen, "action_mask", np.ones((num_agents, 3), bool))
        return np.hstack([ids, np.asarray(seen.agents_view, np.float32)]), np.asarray(mask)

    for row, row_key in enumerate(jax.random.split(key, num_rows + 1)[1:]):
        state, timestep = reset(jax.random.split(row_key)[1])
        step_count = 0
        for action in actions[row]:
            view, mask = see(timestep)
            assert mask[np.arange(num_agents), action].all(), "an illegal action"
            state, timestep = step(state, action)
            reward, discount, done = timestep.reward, timestep.discount, bool(timestep.last())
            if isinstance(env, LevelBasedForaging):  # the team's
                reward = reward.sum()
            if isinstance(env, RobotWarehouse) and step_count == config.env.time_limit - 1:
                discount = np.float32(1)  # Jumanji says 0
            truncation = done and bool(np.min(discount) > 0)
            now = (done, action, reward, view, mask)
            steps.append((*now, see(timestep)[0], discount, np.int32(step_count), truncation))
            step_count += 1
            if done:
                state, timestep = reset(jax.random.split(state.key)[0])
                step_count = 0

    def stack(*values):  # what the team has in common is that of each agent
        values = np.array([np.broadcast_to(x, (num_agents, *np.shape(x)[1:])) for x in values])
        return values.reshape(num_rows, num_timesteps, *values.shape[1:])

    return dict(zip(names, map(stack, *steps), strict=True))


ALL_EXTRA_LEAVES = "next_observation log_prob value discount step_count truncation"
RECORDINGS = {
    "warehouse": Case("--env.scenario tiny-2ag", "", "rware/tiny-2ag.vlt"),  # the original's leaves
    "four agents": Case(
        f"--env.scenario tiny-4ag --system.no-add-agent-id --vault.extra-leaves {ALL_EXTRA_LEAVES}",
        ALL_EXTRA_LEAVES,
        "rware/tiny-4ag.vlt",
    ),
    "foraging": Case(
        "--env.scenario tiny-foraging --vault.extra-leaves discount --results.animation",
        "truncation discount",
        "lbf/tiny-foraging.vlt",
    ),
    "three of one's own": Case(
        "--env.scenario line --vault.extra-leaves discount next_observation",
        "truncation discount next_observation",
        "walk/line.vlt",
        Walk(3, is_masked=True, is_team=False),
    ),
    "one of one's own": Case(  # more episodes end at once than are reset in one go
        "--arch.num-envs 8 --vault.compression id gzip level 5",
        "truncation",
        "walk/Walk.vlt",
        Walk(1, is_masked=False, is_team=True),
    ),
}


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """From the name of a recording to the recording, made when it is first asked for."""

    @functools.cache
    def record(name):
        case, folder = RECORDINGS[name], tmp_path_factory.mktemp("recording")
        result = experiment(folder, f"--vault.og-marl {case.arguments}", case.own_env)
        env = case.own_env or jumanji_env(result.config.env.scenario, result.config.env.time_limit)
        return Recording(result, folder, case, replay(result, env))

    return record


@pytest.fixture(params=RECORDINGS)
def recording(request, recordings):
    """Each recording in turn."""
    return recordings(request.param)


def test_stepping_the_environments_by_hand_gives_the_recording_back(recording):
    result, streams = recording.result, read_streams(recording.result.vault_path)
    assert set(streams) == {*LEAVES, *recording.case.extra_leaves.split()}
    for name, leaf in streams.items():
        if name in ("log_prob", "value"):  # see the test of what a policy says
            assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
        else:
            assert leaf.dtype == recording.replay[name].dtype
            np.testing.assert_array_equal(leaf, recording.replay[name], err_msg=name)
    num_envs = result.config.arch.num_envs
    assert result.num_timesteps == result.evaluations[-1].step_count == 4 * 2 * 16 * num_envs
    for store in open_with_flashbax(result.vault_path)._all_datastores.values():
        assert store.chunk_layout.write_chunk.shape[1] == 16  # no rollout is coded twice
        compressor = (result.config.vault.compression or {"id": "zstd"})["id"]
        assert store.spec().to_json()["metadata"]["compressor"]["id"] == compressor


def walk_episodes(done, first=0):
    """Complete episodes of streams whose dones are (B, time), from the timestep `first` on.

    Returns (end, stream, begin) of each, in the order in which they ended, and how many more begin
    or end outside.
    """
    episodes, num_incomplete = [], 0
    for stream, ends in enumerate(done):
        begin = 0 if first == 0 else None
        for step in range(first, len(ends)):
            if ends[step]:
                if begin is None:
                    num_incomplete += 1
                else:
                    episodes.append((step, stream, begin))
                begin = step + 1
        num_incomplete += begin != len(ends)
    return sorted(episodes), num_incomplete


def test_exported_vault_has_og_marl_layout(recording):
    config, replay = recording.result.config, recording.replay
    name = f"{config.vault.name}_a"
    path = recording.folder / "vaults" / name / recording.case.export / "Replay"
    walked, _ = walk_episodes(replay["done"][..., 0])
    leaves = {
        name: np.concatenate([x[row, begin : end + 1] for end, row, begin in walked])
        for name, x in replay.items()
    }
    num_ids = leaves["action"].shape[1] if config.system.add_agent_id else 0
    observation = leaves["observation"][..., num_ids:]
    expected = {
        "observations": observation,
        "actions": leaves["action"],
        "rewards": leaves["reward"],
        "terminals": leaves["done"] & ~leaves["truncation"],
        "truncations": leaves["truncation"],
        "infos": {
            "legals": leaves["legal_action_mask"],
            "state": np.concatenate(list(observation.swapaxes(0, 1)), axis=-1),
        },
    }
    exported = read_vault(path)
    assert_equal(exported, jax.tree.map(lambda x: x[None], expected))
    dtypes = (jax.tree.map(lambda x: x.dtype.name, leaves) for leaves in (exported, expected))
    assert next(dtypes) == next(dtypes)
    assert expected["terminals"].any() and expected["truncations"].any()
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["recording"]["env"]["scenario"] == config.env.scenario


def test_training_logged_the_returns_of_the_episodes_that_ended(recording):
    evaluations, replay = recording.result.evaluations, recording.replay
    reward = replay["reward"].mean(axis=-1)
    walked, _ = walk_episodes(replay["done"][..., 0])
    for number, evaluation in enumerate(evaluations):
        ended = [x for x in walked if x[0] // 32 == number]
        returns = [reward[row, begin : end + 1].sum() for end, row, begin in ended]
        assert returns and evaluation.train_episode_return == pytest.approx(
            np.mean(returns), abs=1e-5
        )


def test_metadata_and_metrics_say_what_the_run_was(recordings):
    recording = recordings("foraging")
    result = recording.result
    metadata = json.loads((result.vault_path / "metadata.json").read_text())
    actions = ["noop", "up", "down", "left", "right", "load"]
    expected = json.loads(json.dumps(dataclasses.asdict(result.config))) | {
        "task": {"environment": "LevelBasedForaging", "folder": "lbf", "actions": actions},
        "policy": {"params": "initial", "episode_return": None},
        "num_agents": 3,
        "num_actions": 6,
        "num_devices": 1,
        "num_updates_per_eval": 2,
    }
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["versions"]["jax"] == jax.__version__
    assert set(ippo.PACKAGES) == set(metadata["versions"])

    metrics = json.loads((recording.folder / "results/ff_ippo_lbf/a/metrics.json").read_text())
    run = {
        f"step_{index}": {
            "step_count": evaluation.step_count,
            "elapsed_time": evaluation.elapsed_time,
            "mean_episode_return": [float(evaluation.episode_return.mean())],
            "steps_per_second": [evaluation.steps_per_second],
        }
        for index, evaluation in enumerate(result.evaluations)
    }
    run["absolute_metrics"] = {"mean_episode_return": [result.absolute_metric]}
    task = {"tiny-foraging": {"ff_ippo": {"seed_42": run}}}
    assert metrics == {"LevelBasedForaging": task} and result.absolute_metric is not None
    assert list(read_metrics(recordings("three of one's own").folder)["Walk"]) == ["line"]


def test_pictures_show_the_run(recordings):
    recording = recordings("foraging")
    path = recording.folder / "results/ff_ippo_lbf/a"
    names = {"metrics.json", "learning_curve.png", "dataset.png", "episode.gif"}
    assert {file.name for file in path.iterdir()} == names
    with Image.open(path / "episode.gif") as gif:
        assert 1 < gif.n_frames <= 10  # frames alike are merged
    for name in ("learning_curve.png", "dataset.png"):
        with Image.open(path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10  # not blank
    figure = ippo.plot_dataset(*where(recording.result.vault_path))
    for axes in figure.axes:  # every episode and every action is in a bar
        shares = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
        assert shares == [pytest.approx(100)] * 3


# ---- ENVIRONMENT ---------------------------------------------------------------------------------


def test_warehouse_is_jumanjis_but_for_the_discount_at_the_time_limit():
    time_limit, num_envs = 80, 256
    theirs, ours = jumanji_env("small-4ag", time_limit), TASKS["small-4ag"].make(time_limit)

    def play(env, reset_key):
        def step(carry, _):
            state, mask, key = carry
            key, action_key = jax.random.split(key)
            logits = jnp.where(mask, jnp.array([0.0, 1.0, 0.0, 0.0, 1.0]), -jnp.inf)
            action = jax.random.categorical(action_key, logits)
            state, timestep = jax.vmap(env.step)(state, action)
            return (state, timestep.observation.action_mask, key), (timestep, state.request_queue)

        state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, num_envs))
        carry = (state, timestep.observation.action_mask, reset_key)
        return jax.lax.scan(step, carry, None, 85)

    key = jax.random.PRNGKey(0)
    expected, actual = (jax.jit(functools.partial(play, env))(key) for env in (theirs, ours))
    timestep, request_queue = expected[1]
    assert timestep.reward.sum() > 0, "nothing was delivered: the test shows nothing"
    assert (timestep.discount[: time_limit - 1] == 0).any(), "no collision"
    discount = timestep.discount.at[time_limit - 1 :].set(1.0)
    assert_equal(actual, (expected[0], (timestep.replace(discount=discount), request_queue)))


def test_every_task_has_what_its_name_says():
    for scenario, task in TASKS.items():
        config = small_config(f"--env.scenario {scenario} --env.time-limit None")
        config = ippo.check_config(config, 1)
        env = ippo.make_env(config.env).unwrapped
        limit = 500 if isinstance(env, RobotWarehouse) else 100
        assert config.env.time_limit == env.time_limit == limit
        assert len(task.actions) == np.max(env.action_spec.num_values)
        if size := re.search(r"(\d+)x\d+-(\d)p-(\d)f", scenario):
            size, agents, food = map(int, size.groups())
            assert (env.grid_size, env.num_agents, env.num_food) == (size, agents, food)
            assert env.fov == (2 if scenario.startswith("2s") else size)
            assert env._generator.force_coop == scenario.endswith("coop")
        else:
            assert env.num_agents == int(re.search(r"(\d)ag", scenario)[1])


def lacking(message, **parts):
    """An environment with `parts` instead of a Walk's, and a part of the error's message."""
    walk = Walk(2, is_masked=False, is_team=True)
    state, timestep = walk.reset(jax.random.PRNGKey(0))
    state = parts.pop("state", state)
    timestep = timestep.replace(observation=parts.pop("observation", timestep.observation))
    return SimpleNamespace(**{"reset": lambda key: (state, timestep), **parts}), message


def test_an_environment_that_lacks_something_is_refused_in_a_line_that_names_it(tmp_path):
    bad = Walk(2, is_masked=True, is_team=False)
    bad.step = lambda state, _: (state, bad.reset(state.key)[1].replace(reward=jnp.zeros(3)))
    for env, message in (
        (Walk, r"Walk.* is a class: give an instance of it"),
        lacking("SimpleNamespace has no time_limit"),
        lacking("state of SimpleNamespace has no key", time_limit=10, state=np.zeros(2)),
        lacking("no agents_view of shape", time_limit=10, observation=np.zeros((2, 3))),
        lacking("no agents_view of shape", time_limit=10, observation=View(np.zeros(3))),
        lacking("has no action_mask .* nor an action_spec", time_limit=10),
        (bad, r"reward and discount of Walk must be of shape \(\) or \(N,\): they are .*3,"),
    ):
        with pytest.raises(ippo.ConfigError, match=message) as error:
            experiment(tmp_path, "", env)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(ippo.ConfigError, match="time_limit is 9, but that of Walk 10"):
        experiment(tmp_path, "--env.time-limit 9", Walk(2, is_masked=True, is_team=False))


# ---- NETWORKS, ADVANTAGE, LOSSES, LEARNER --------------------------------------------------------


def random_observation(key, shape, num_actions=5, num_features=6):
    """An observation of (*shape, .) in which the first action is always legal."""
    view_key, mask_key = jax.random.split(key)
    mask = jax.random.bernoulli(mask_key, 0.5, (*shape, num_actions)).at[..., 0].set(True)
    return ippo.Observation(jax.random.normal(view_key, (*shape, num_features)), mask)


def test_advantage_against_a_plain_loop():
    rng = np.random.default_rng(0)
    shape, gamma, gae_lambda = (20, 3), 0.9, 0.8
    reward, value = rng.normal(size=(2, *shape)).astype(np.float32)
    done = rng.random(shape) < 0.2
    last_value = rng.normal(size=3).astype(np.float32)
    advantage, target = ippo.calculate_advantage(reward, done, value, last_value, gamma, gae_lambda)
    next_value = np.concatenate([value[1:], last_value[None]])
    delta = reward + np.where(done, 0, gamma * next_value) - value
    expected = np.zeros(shape)
    for t, i in np.ndindex(*shape):  # the definition: a discounted sum of temporal differences
        for k in range(t, shape[0]):
            expected[t, i] += (gamma * gae_lambda) ** (k - t) * delta[k, i]
            if done[k, i]:
                break
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, expected + value, rtol=1e-4, atol=1e-5)


EMPTY = ippo.Transition(*[None] * 7)
FIXED = lambda params, observation: params  # stands for a network: its output is its parameters


def test_losses_against_hand_worked_numbers():
    # Two transitions, one agent, two actions.  Probabilities 0.5/0.5 and 0.8/0.2; the first action
    # was taken both times, when its probability was 0.4.  Ratios 1.25 and 2 are both clipped to 1.2
    # where that is less.  Values: from 1 to 2, towards 3, is clipped to 1.2, error 1.8 instead of
    # 1; from 1 to 2, towards 0, is an error of 2, more than the clipped 1.2.
    transition = EMPTY._replace(
        action=jnp.array([[0], [0]]),
        log_prob=jnp.log(jnp.full((2, 1), 0.4)),
        value=jnp.ones((2, 1)),
    )
    logits = jnp.log(jnp.array([[[0.5, 0.5]], [[0.8, 0.2]]]))
    advantage, target = jnp.array([[1.0], [-1.0]]), jnp.array([[3.0], [0.0]])
    total, losses = ippo.actor_loss(logits, FIXED, transition, advantage, 0.2, ent_coef=0.1)
    loss = -(1.2 * 1 + 2 * -1) / 2  # a negative advantage takes the larger ratio
    entropy = (math.log(2) - 0.8 * math.log(0.8) - 0.2 * math.log(0.2)) / 2
    assert jax.device_get(losses) == pytest.approx({"actor_loss": loss, "entropy": entropy})
    assert total == pytest.approx(loss - 0.1 * entropy, rel=1e-5)
    total, losses = ippo.critic_loss(jnp.full((2, 1), 2.0), FIXED, transition, target, 0.2, 0.5)
    assert jax.device_get(losses) == pytest.approx({"value_loss": 0.5 * (1.8**2 + 2**2) / 2})
    assert total == pytest.approx(0.5 * float(losses["value_loss"]))


def test_update_minibatch_follows_the_mean_of_the_lanes_gradients():
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    shape = (48, 2)  # twice as many as are in the minibatch of three lanes
    observation = random_observation(keys[0], shape)
    index = jax.random.permutation(keys[1], 48)[:24].reshape(3, 8)
    scale = jnp.ones((48, 1)).at[index].set(jnp.array([1.0, 10.0, 100.0])[:, None, None])
    transition = EMPTY._replace(
        observation=observation,
        action=jnp.zeros(shape, jnp.int32),
        log_prob=-jnp.ones(shape),
        value=jax.random.normal(keys[2], shape),
    )
    advantage = jax.random.normal(keys[3], shape) * scale + scale  # lanes normalise differently
    target = 10 * jax.random.normal(keys[4], shape)  # gradients that are clipped
    batch = (transition, advantage, target)
    system = ippo.SystemConfig(actor_lr=1e-3, critic_lr=2e-3, max_grad_norm=0.4)
    actor, critic = ippo.init_networks(ippo.Config(system), observation, keys[5])
    mesh, specs = Mesh(np.array(jax.devices()[:1]), ("device",)), (PartitionSpec(),)
    update = functools.partial(ippo.update_minibatch, config=system)
    update = jax.shard_map(update, mesh=mesh, in_specs=specs * 4, out_specs=specs[0])
    updated = jax.jit(update)(actor, critic, batch, index)

    def loss(params, network, coefficient, call):  # the mean over the lanes
        return sum(call(params, network.apply_fn, rows, 0.2, coefficient)[0] for rows in index) / 3

    def actor_loss(params, apply, rows, *options):
        mean, std = advantage[rows].mean(), advantage[rows].std()
        lane = jax.tree.map(lambda x: x[rows], transition)
        return ippo.actor_loss(params, apply, lane, (advantage[rows] - mean) / std, *options)

    def critic_loss(params, apply, rows, *options):
        lane = jax.tree.map(lambda x: x[rows], transition)
        return ippo.critic_loss(params, apply, lane, target[rows], *options)

    for before, after, call, coefficient, learning_rate in (
        (actor, updated[0], actor_loss, system.ent_coef, 1e-3),
        (critic, updated[1], critic_loss, system.vf_coef, 2e-3),
    ):
        grads = jax.jit(jax.grad(loss), static_argnums=3)(before.params, before, coefficient, call)
        assert before is actor or optax.global_norm(grads) > 0.4
        optimiser = optax.chain(optax.clip_by_global_norm(0.4), optax.adam(learning_rate, eps=1e-5))
        changes, _ = optimiser.update(grads, optimiser.init(before.params))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, after.params, jax.tree.map(jnp.add, before.params, changes))


def actor_with(params, config):
    """The actor of a run, with these parameters, and what its critic calls."""
    env = ippo.make_env(config.env, config.system.add_agent_id)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, critic = ippo.init_networks(config, observation, jax.random.PRNGKey(0))
    return env, actor.replace(params=params.actor), critic.apply_fn


def test_a_short_run_learns_and_its_policy_is_recorded_as_it_is(tmp_path):
    learn = "--system.num-updates 60 --system.actor-lr 0.01 --system.critic-lr 0.01 --vault.no-save"
    trained = experiment(tmp_path, f"{learn} {NO_RESULTS} --vault.uid trained")
    path = "checkpoints/ff_ippo_walk/trained"
    assert_equal(ippo.load_params(tmp_path / path), trained.params)

    record = "--system.no-learn --vault.extra-leaves log_prob value --arch.num-eval-episodes 64 "
    mean_returns = []
    for uid, policy, options in (
        ("first", "initial", ""),
        ("best", path, f"--checkpoint.load-params {path}"),
    ):
        run = experiment(tmp_path, f"{record} {NOTHING_ELSE} --vault.uid {uid} {options}")
        assert policy == "initial" or assert_equal(run.params, trained.params) is None
        assert run.evaluations[0].losses == {}
        rows = read_vault(run.vault_path)  # of the last update as of the first
        seen = ippo.Observation(rows["observation"], rows["legal_action_mask"])
        _, actor, value = actor_with(run.params, run.config)
        log_prob = distrax.Categorical(actor.apply_fn(actor.params, seen)).log_prob(rows["action"])
        np.testing.assert_allclose(rows["log_prob"], log_prob, atol=1e-4)
        np.testing.assert_allclose(rows["value"], value(run.params.critic, seen), atol=1e-4)

        evaluated = np.concatenate([x.episode_return for x in run.evaluations])
        metadata = json.loads((run.vault_path / "metadata.json").read_text())
        mean_return = pytest.approx(evaluated.mean())
        assert metadata["policy"] == {"params": policy, "episode_return": mean_return}
        recorded = ippo.load_episodes(*where(run.vault_path), leaves=()).episode_return
        error = math.hypot(*(x.std() / math.sqrt(len(x)) for x in (evaluated, recorded)))
        assert abs(recorded.mean() - evaluated.mean()) < 4 * error
        mean_returns.append(evaluated.mean())
    first, best = mean_returns
    assert best > first + 2, "nothing was learned"

    slow = f"--system.actor-lr 1e-9 --system.critic-lr 1e-9 --checkpoint.load-params {path} "
    params = experiment(tmp_path, slow + NOTHING_ELSE + "--vault.no-save").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), params, trained.params)
    changed = jax.tree.map(lambda x, y: (x != y).any(), params, trained.params)
    assert any(jax.tree.leaves(changed)), "training did not go on"
    with pytest.raises(ippo.ConfigError, match=r"load_params .* has other networks"):
        experiment(tmp_path, slow + "--network.actor-layer-sizes 9")


# ---- EVALUATION ----------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_against_playing_the_episodes_by_hand(greedy):
    num_episodes, key = 12, jax.random.PRNGKey(5)
    theirs = Walk(3, is_masked=True, is_team=False)
    env = ippo.make_env(small_config().env, env=theirs)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, _ = ippo.init_networks(ippo.Config(), observation, jax.random.PRNGKey(6))
    metrics = jax.jit(lambda key: ippo.evaluate(env, actor, key, num_episodes, greedy))(key)

    reset, step = jax.jit(jax.vmap(theirs.reset)), jax.jit(jax.vmap(theirs.step))
    key, reset_key = jax.random.split(key)
    state, timestep = reset(jax.random.split(reset_key, num_episodes))
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, int)
    ended = np.zeros(num_episodes, bool)
    for _ in range(theirs.time_limit):
        key, policy_key = jax.random.split(key)
        ids = np.broadcast_to(np.eye(3), (num_episodes, 3, 3))
        view = np.concatenate([ids, timestep.observation.agents_view], axis=-1).astype(np.float32)
        seen = ippo.Observation(view, timestep.observation.action_mask)
        policy = distrax.Categorical(actor.apply_fn(actor.params, seen))
        state, timestep = step(state, policy.mode() if greedy else policy.sample(seed=policy_key))
        returns += np.where(ended, 0, timestep.reward.mean(axis=-1))
        lengths += ~ended
        ended |= np.asarray(timestep.last())
    assert metrics.done.all() and metrics.episode_length.tolist() == lengths.tolist()
    np.testing.assert_allclose(metrics.episode_return, returns, atol=1e-5)
    assert min(lengths) < max(lengths), "all episodes ended at once: the test shows nothing"


def test_two_devices_record_and_evaluate_as_one_with_two_sets_does(tmp_path):
    # A rate at which who leaves out the other device's gradients soon acts otherwise.
    arguments = "--arch.num-evaluation 1 --system.actor-lr 0.01 --checkpoint.rel-dir c "
    arguments += "--arch.num-absolute-metric-eval-episodes 10 "
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    program = ("-c", "import test_script; test_script.ippo.main()")  # which has this small task
    one_set = f"{SMALL} {arguments} --system.update-batch-size 1"
    run = run_script(one_set, tmp_path / "two", program, JAX_NUM_CPU_DEVICES="2")
    assert run.returncode == 0, run.stderr
    one = experiment(tmp_path / "one", arguments)
    recorded = read_vault(tmp_path / "two" / VAULT)
    for name, rows in read_vault(one.vault_path).items():  # (NU * UB * NE, ...)
        expected = rows.reshape(4, 2, 4, *rows.shape[1:]).swapaxes(0, 1)  # (D, NU, NE, ...)
        assert_equal(recorded[name].reshape(expected.shape), expected)

    # The streams of two devices are put together as those of two sets.
    episodes = ippo.load_episodes(*where(tmp_path / "two" / VAULT))
    assert_equal(episodes, ippo.load_episodes(*where(one.vault_path)))

    # Two of the four episodes are on each device, with a key of its own.
    params = ippo.load_params(tmp_path / "two/c/ff_ippo_walk/a")
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, tuple(params), tuple(one.params))
    env, actor, _ = actor_with(params, one.config)
    evaluate = jax.jit(lambda key: ippo.evaluate(env, actor, key, 2).episode_return)
    key, returns = jax.random.split(jax.random.PRNGKey(42), 3)[1], []
    for _ in range(4):  # the evaluation, and the absolute metric in three parts
        key, *device_keys = jax.random.split(key, 3)
        returns.append(np.concatenate([evaluate(key) for key in device_keys]))
    metrics = read_metrics(tmp_path / "two")["Walk"]["walk"]["ff_ippo"]["seed_42"]
    assert metrics["step_0"]["mean_episode_return"] == [pytest.approx(returns[0].mean())]
    absolute = np.concatenate(returns[1:])[:10].mean()
    assert metrics["absolute_metrics"]["mean_episode_return"] == [pytest.approx(absolute)]


# ---- OFFLINE -------------------------------------------------------------------------------------

ROLLOUTS = "--system.rollout-length 4 --checkpoint.save " + NO_RESULTS


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory):
    """A vault of 6 evaluations of 3 rollouts of 4 timesteps, and its streams."""
    arguments = f"{ROLLOUTS} --system.num-updates 18 --arch.num-evaluation 6"
    path = experiment(tmp_path_factory.mktemp("rollouts"), arguments).vault_path
    return path, read_streams(path, 3, 4)


@pytest.mark.parametrize("num_steps", [1, 250_000])
def test_every_complete_episode_comes_back_once_and_in_order(rollouts, num_steps):
    path, streams = rollouts
    for first, last in itertools.combinations(range(7), 2):
        # Half an evaluation more, as both ends are rounded down.
        percentiles = tuple(100 * min((x + 0.5) / 6, 1.0) for x in (first, last))
        walked, num_incomplete = walk_episodes(streams["done"][:, : last * 12, 0], first * 12)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts = list(ippo.iterate_episodes(*where(path), percentiles, num_steps=num_steps))
            episodes = ippo.load_episodes(*where(path), percentiles)
        assert any("no episode is complete" in str(x.message) for x in caught) == (not walked)
        length = np.array([end + 1 - begin for end, _, begin in walked], np.int64)
        pick = lambda x: np.concatenate([x[0, :0], *(x[row, a : b + 1] for b, row, a in walked)])
        transitions = jax.tree.map(pick, streams)
        reward = np.split(transitions["reward"].mean(axis=1, dtype=float), np.cumsum(length)[:-1])
        expected = ippo.Episodes(
            transitions=transitions,
            start=np.cumsum(length) - length,
            length=length,
            episode_return=np.float32([x.sum() for x in reward][: len(length)]),
            recorded_at=np.array([begin * len(streams["done"]) for *_, begin in walked], np.int64),
            num_incomplete=num_incomplete,
        )
        whole = jax.tree.map(lambda *x: np.concatenate([np.atleast_1d(y) for y in x]), *parts)
        whole = whole._replace(start=expected.start, num_incomplete=whole.num_incomplete.sum())
        for actual in (episodes, whole):
            assert_equal(actual, expected)
            assert [x.dtype for x in actual[1:-1]] == [x.dtype for x in expected[1:-1]]
    assert walked, "no episode was complete: the test shows nothing"


def test_parts_and_leaves_that_were_asked_for_are_loaded_and_exported(recordings):
    path = recordings("warehouse").result.vault_path
    whole, leaves = ippo.load_episodes(*where(path)), ("observation", "action")
    some = ippo.load_episodes(*where(path), leaves=leaves).transitions
    assert_equal(some, {name: whole.transitions[name] for name in leaves})
    for percentiles in [(0, 49), (60, 40), (50, 101), (-60, 50)]:
        with pytest.raises(ippo.ConfigError, match="percentiles"):
            ippo.load_episodes(*where(path), percentiles)

    async def export():  # as in a notebook, within a running event loop
        return ippo.export_og_marl(*where(path), part="Good", label="Expert")

    exported = read_vault(asyncio.run(export()))
    last = ippo.load_episodes(*where(path), ippo.OG_MARL_PARTS["Good"])
    assert_equal(exported["actions"][0], last.transitions["action"])
    with pytest.raises(ippo.ConfigError, match=r"tiny-2ag\.vlt/Replay"):
        ippo.export_og_marl(*where(path))
    with pytest.raises(FileNotFoundError, match="ff_ippo_rware/nobody"):
        ippo.load_episodes(*where(path.with_name("nobody")))


def test_a_recording_without_a_complete_episode_is_exported_and_drawn_all_the_same(tmp_path):
    arguments = "--system.rollout-length 1 --system.num-minibatches 1 --vault.og-marl "
    arguments += "--system.num-updates 1 --arch.num-evaluation 1"
    with pytest.warns(UserWarning, match="no episode is complete") as caught:
        result = experiment(tmp_path, arguments)
    assert not any("failed" in str(warning.message) for warning in caught)
    assert (
        open_with_flashbax(tmp_path / "vaults/ff_ippo_walk_a/walk/walk.vlt/Replay").vault_index == 0
    )
    assert math.isnan(result.evaluations[0].train_episode_return)
    assert (tmp_path / "results/ff_ippo_walk/a/dataset.png").exists()


# ---- CONFIGURATION -------------------------------------------------------------------------------

BAD_NAME = r"is not the name of a folder|has one of # %"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env.scenario huge-9ag", r"env.scenario 'huge-9ag' is unknown: .*tiny-2ag"),
        ("--system.num-updates 5", r"num_updates is 5: .*: set arch.num_evaluation to 1"),
        ("--system.num-updates 0", "system.num_updates is 0: it must be at least 1"),
        ("--system.total-timesteps 0", "system.total_timesteps is 0"),
        ("--system.num-minibatches 5", r"num_minibatches is 5: it must divide .* 64"),
        ("--system.seed -1", "system.seed is -1: it must be from 0 to"),
        ("--system.gamma 1.5", "system.gamma is 1.5: it must be from 0 to 1"),
        ("--system.actor-lr 0.0", "system.actor_lr is 0.0: it must be above 0"),
        ("--system.ent-coef -0.1", "system.ent_coef is -0.1: it must be at least 0"),
        ("--arch.num-envs 1000000000", "arch.num_envs .* too many transitions for 32 bits"),
        ("--network.actor-layer-sizes 8 0", "layer_sizes is .*: it must be layers of at least 1"),
        ("--vault.max-length 10", "vault.max_length is 10: .* at least [0-9]+"),
        (f"--vault.max-length {10**15}", r"takes .* GB of .* memory: .*vault.max_length"),
        ("--vault.compression id zip", "vault.compression .* is unknown"),
        ("--vault.extra-leaves q_value", "'q_value'.*log_prob, value"),
        (f"--vault.rel-dir {__file__}/x", "vault.rel_dir .* cannot be written"),
        (f"--results.rel-dir {__file__}/x", "results.rel_dir .* cannot be written"),
        ("--results.rel-dir vaults", "results.rel_dir 'vaults' is taken"),
        ("--vault.rel-dir run#1", r"'.*/run#1/ff_ippo_walk/a' has one of # % "),
        ("--checkpoint.resume --vault.uid None", "resume needs .*the vault.uid of the run"),
        ("--checkpoint.resume --checkpoint.no-save", "resume needs checkpoint.save"),
        ("--checkpoint.load-params no", "there is no checkpoint in .*/no"),
        *(({"name": name}, BAD_NAME) for name in ("..", "", "a/b", "a?b", "x" * 300)),
        *(({"uid": name}, BAD_NAME) for name in (".", "../../x", "run#1", "%20", "a\nb")),
    ],
)
def test_bad_configuration_is_refused_in_one_line_before_anything_is_created(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = arguments if isinstance(arguments, dict) else {}
    config = small_config("" if names else arguments, **names)
    with pytest.raises((ippo.ConfigError, FileNotFoundError), match=message) as error:
        ippo.run_experiment(config)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_configuration_is_completed():
    # An update is 2 lanes * 4 environments * 16 timesteps = 128 steps, an evaluation at least one.
    config = small_config(
        "--system.total-timesteps 257 --env.scenario 2s-8x8-2p-2f-coop --env.time-limit None "
        "--vault.uid None --vault.extra-leaves value truncation"
    )
    completed = ippo.check_config(config, num_devices=1)
    assert completed.system.num_updates == 4 and completed.env.time_limit == 100
    assert completed.vault.name == "ff_ippo_lbf"
    assert completed.vault.extra_leaves == ("truncation", "value")
    uids = {ippo.check_config(config, num_devices=1).vault.uid for _ in range(100)}
    assert len(uids) == 100 and all(re.fullmatch(r"\d{14}-\w{8}", uid) for uid in uids)
    with pytest.raises(ippo.ConfigError, match="multiple of the number of devices, 3"):
        ippo.check_config(config, num_devices=3)


@pytest.mark.parametrize("blocking", ["vaults", "checkpoints", "results", "export"])
def test_what_an_earlier_run_saved_is_left_untouched(recordings, tmp_path, blocking):
    recording = recordings("three of one's own")
    for name in ("vaults", "checkpoints", "results"):  # just one is in the way
        (tmp_path / name / "ff_ippo_walk").mkdir(parents=True)
    folder = "vaults/ff_ippo_walk_a" if blocking == "export" else f"{blocking}/ff_ippo_walk"
    shutil.copytree(recording.folder / folder, tmp_path / folder, dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ippo.ConfigError, match=rf"exists already, at .*{folder}"):
        experiment(tmp_path, "--env.scenario line --vault.og-marl", recording.case.own_env)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_nothing_is_saved_where_that_is_off(tmp_path):
    result = experiment(tmp_path, "--vault.no-save " + NOTHING_ELSE)
    assert result.vault_path is None and result.num_timesteps == 0
    assert len(result.evaluation_returns) == 2 and not list(tmp_path.iterdir())


def test_requirements_are_those_in_the_head_of_the_script():
    head = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S).group(1)
    in_script = re.findall(r'^#     "(.+)",$', head, re.M)
    lines = (FOLDER / "requirements.txt").read_text().split("# To run test_script.py.")[0]
    in_file = [line for line in lines.splitlines() if line and not line.startswith("#")]
    assert in_script == in_file and len(in_file) > 8


# ---- COMMAND LINE, NOTEBOOK AND README -----------------------------------------------------------


def test_the_command_line_records_the_original_data(tmp_path):
    arguments = "--system.num-updates 5 --arch.num-evaluation 1 --arch.no-absolute-metric"
    arguments += " --vault.uid golden --vault.rel-dir somewhere"
    run = run_script(arguments, tmp_path, JAX_THREEFRY_PARTITIONABLE="0")
    assert run.returncode == 0, run.stderr
    experience = read_vault(tmp_path / "somewhere/ff_ippo_rware/golden")
    rows = len(experience["done"]) // len(GOLDEN)
    for update, digests in enumerate(GOLDEN):
        for name, digest in zip(LEAVES, digests.split(), strict=True):
            part = np.ascontiguousarray(experience[name][update * rows : (update + 1) * rows])
            assert hashlib.sha256(part.tobytes()).hexdigest()[:16] == digest, (update, name)


def test_the_command_line_refuses_in_one_line(tmp_path):
    run = run_script("--checkpoint.load-params nowhere", tmp_path)
    assert run.stderr == f"error: there is no checkpoint in {tmp_path}/nowhere\n"
    assert run.returncode == 1 and not list(tmp_path.iterdir())


def readme_code(heading, language="python"):
    """The code blocks of a section of the README."""
    section = re.split(r"^##+ ", (FOLDER / "README.md").read_text(), flags=re.M)
    (section,) = [text for text in section if text.startswith(heading)]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    assert blocks
    return blocks


def assign(code, **values):
    """The code with other values where it assigns these names or arguments."""
    for name, value in values.items():
        code, count = re.subn(
            rf"\b{name}( ?= ?)([\d_]+|\(.*?\)|\".*?\")", rf"{name}\g<1>{value}", code
        )
        assert count == 1, name
    return code


def test_the_readmes_cells_percent_run_and_the_pasted_file_work_in_a_notebook(tmp_path):
    train, *cells = readme_code("In a notebook")
    requirements = (FOLDER / "requirements.txt").read_text().splitlines()
    installed = re.findall(r"^%pip install -q (.*)\n", train, re.M)
    assert len(installed) == 2
    assert set(re.findall(r'"(.+?)"', " ".join(installed))) <= set(requirements)
    train = assign(re.sub(r"^%pip.*\n", "", train, flags=re.M), num_updates=1, num_evaluation=1)
    small = SMALL.replace("walk", "tiny-2ag").replace("\n", " ") + NOTHING_ELSE
    cells = [
        train,
        *cells,
        f"%run {SCRIPT} {small} --vault.uid percent",
        "%reset -f",
        SCRIPT.read_text(),
        f"config = tyro.cli(Config, args='{small} --vault.uid pasted --vault.og-marl'.split())\n"
        "result = run_experiment(config)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, pasted, run = ("".join(x.get("text", "") for x in cell.outputs) for cell in notebook.cells)
    assert "run_experiment(Config())" in pasted and "2/2" in run, "no progress bar"
    vaults = tmp_path / "vaults/ff_ippo_rware"
    for uid in ("percent", "pasted"):
        assert read_vault(vaults / uid)["done"].shape == (16, 32, 2)
    assert len(list(vaults.iterdir())) == 3  # that of the README's cells, too
    assert (tmp_path / "vaults/ff_ippo_rware_pasted/rware/tiny-2ag.vlt/Replay").is_dir()


def test_readmes_commands_record_policies_and_its_code_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ippo.TASKS, "tiny-2ag", WALK._replace(folder="rware"))  # which is quick
    rware = "--env.scenario tiny-2ag "
    for uid in ("short", "long"):
        ippo.run_experiment(small_config(f"{rware}{NO_RESULTS} --vault.no-save --vault.uid {uid}"))
    (commands,) = readme_code("Recording a policy", "sh")
    for command in commands.splitlines():
        arguments = rware + NOTHING_ELSE + command.split(SCRIPT.name)[1]
        policy = ippo.run_experiment(small_config(arguments)).config.checkpoint.load_params
    assert policy == "checkpoints/ff_ippo_rware/long"
    variables = {}
    exec(readme_code("Recording a policy")[0], variables)
    assert_equal(variables["params"], ippo.load_params(policy))
    assert Path("vaults/ff_ippo_rware_expert/rware/tiny-2ag.vlt/Expert").is_dir()

    exec(readme_code("Reading the vault")[0].replace('"demo"', '"expert"'), variables)
    assert variables["pair"].first["observation"].shape == (32, 2, 5)
    exec(readme_code("Changing the algorithm")[0].replace('"demo"', '"expert"'), variables)
    assert variables["batch"]["observation"].shape == (32, 20, 2, 5)
    code = assign(readme_code("Training offline")[-1], PERCENTILES=(50, 100), NUM_STEPS=20)
    exec(assign(code, UID='"expert"', NUM_EPISODES=4), {})
    printed = capsys.readouterr().out
    assert "behaviour" in printed and printed.count("cloning_loss") == 3


def test_readme_trains_on_an_environment_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = readme_code("Your own environment")
    exec(compile(assign(code, num_updates=1, num_evaluation=1), "README.md", "exec"), {})
    export, cut_off = capsys.readouterr().out.splitlines()[-2:]
    assert Path(export).is_dir() and re.fullmatch(r"\d+ of \d+ cut off", cut_off)


def test_readme_names_no_option_that_is_not_there():
    options = set(re.findall(r"--(\w+\.[\w-]+)", (FOLDER / "README.md").read_text()))
    known = {
        f"{group}.{no}{name.replace('_', '-')}"
        for group, fields in dataclasses.asdict(ippo.Config()).items()
        for name in fields
        for no in ("", "no-")
    }
    assert options <= known and len(options) > 5


# ---- FAULTS --------------------------------------------------------------------------------------

EVALUATION_STEPS = 128  # 8 environments, 16 timesteps
# Every run is a process of its own, forked from one that has imported the libraries but has not
# started JAX's backend, whose threads a fork would not take along.
FORK = multiprocessing.get_context("forkserver")
LIBRARIES = """
    chex distrax flashbax flashbax.vault flax.linen flax.training.train_state jax.numpy
    matplotlib.figure optax orbax.checkpoint tensorstore tyro tqdm gymnasium huggingface_hub
    IPython typeguard tyro.constructors hypothesis pytest nbclient nbformat PIL.Image
    PIL.GifImagePlugin
"""
FORK.set_forkserver_preload(LIBRARIES.split())


def call_main(folder, arguments, setup):
    """What a process of `start_run` does."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    setup()
    sys.argv = [str(SCRIPT), *SMALL.split(), *arguments.split()]
    ippo.main()


def slow_disk():
    Vault.write = lambda *_, **__: time.sleep(60)


def start_run(folder, arguments, setup=int):
    """Begin a small run with the command line in `folder`, where its file `log` is; a process."""
    Path(folder).mkdir(exist_ok=True)
    process = FORK.Process(target=call_main, args=(folder, arguments, setup))
    process.start()
    return process


def finish_run(process, folder):
    """Wait for a run; its exit status and the lines of its log since the last such call."""
    process.join(300)
    process.kill()  # one that was to end by itself
    process.join()
    text = Path(folder, "log").read_text()
    Path(folder, "log").unlink()
    return process.exitcode, text.splitlines()


def run(folder, arguments, setup=int):
    """A small run with the command line: its exit status and the lines it printed."""
    return finish_run(start_run(folder, arguments, setup), folder)


def evaluations(num_evaluations):
    """Arguments of a run of as many evaluations, one update each, written two at a time."""
    count = f"--system.num-updates {num_evaluations} --arch.num-evaluation {num_evaluations} "
    return count + "--vault.save-interval 2 --system.seed 2 "


FIVE = evaluations(5)


def wait_for(condition, seconds=120):
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def logged(folder):
    """The steps of the evaluations in a log, while the run goes on."""
    log = Path(folder, "log")
    text = log.read_text() if log.exists() else ""
    return [int(step.replace(",", "")) for step in re.findall(r"^step ([\d,]+):.*\n", text, re.M)]


def check_equal(folder, other):
    """Two folders hold the same recording and metrics."""
    assert_equal(read_vault(folder / VAULT), read_vault(other / VAULT))
    assert read_metrics(folder) == read_metrics(other)


def one_error(lines, *words):
    """The lines have one error, the last, no traceback, and every word in it."""
    assert not any("Traceback" in line for line in lines), lines
    (error,) = (line for line in lines if line.startswith("error:"))
    assert lines[-1] == error and all(word in error for word in words), lines
    return error


@contextlib.contextmanager
def interrupted(evaluation):
    """Within, a run is interrupted in its evaluation of this index, past its last checkpoint."""
    make_evaluate, count = ippo.make_evaluate, itertools.count()

    def make(*arguments):
        evaluate = make_evaluate(*arguments)

        def call(*arguments):
            if next(count) == evaluation:
                raise KeyboardInterrupt(2)
            return evaluate(*arguments)

        return call

    with mock.patch.object(ippo, "make_evaluate", make):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the result of an uninterrupted small run of 5 evaluations."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, experiment(folder, FIVE)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run's folder, to be damaged."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def test_of_processes_that_begin_with_one_uid_one_records(tmp_path):
    arguments = f"{evaluations(1)} {NO_RESULTS} --vault.rel-dir {tmp_path}/v --vault.uid "
    save, no_save = f"same --checkpoint.rel-dir {tmp_path}/c", "other --checkpoint.no-save"
    names = {f"{index}": (save, no_save)[index % 2] for index in range(4)}  # a log for each
    processes = [start_run(tmp_path / name, arguments + uid) for name, uid in names.items()]
    ends = [finish_run(each, tmp_path / name) for each, name in zip(processes, names, strict=True)]
    for pair in (ends[::2], ends[1::2]):
        (status, _), (other, lines) = sorted(pair)
        assert (status, other) == (0, 1)
        one_error(lines, "exists already")
    for uid in ("same", "other"):
        assert open_with_flashbax(tmp_path / "v/ff_ippo_walk" / uid).vault_index == 16


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, whole):
    with interrupted(3), pytest.raises(KeyboardInterrupt) as stopped:
        experiment(tmp_path, FIVE)
    assert "--checkpoint.resume --vault.uid a" in stopped.value.__notes__[0]
    assert read_vault(tmp_path / VAULT)["done"].shape[1] == 4 * 16  # one past the checkpoint
    for other in ("system.seed 7", "network.actor-layer-sizes 16", "vault.save-interval 3"):
        name, value = other.replace("-", "_").split()
        with pytest.raises(ippo.ConfigError, match=rf"^{name} is .*{value}.*, but .* to go on$"):
            experiment(tmp_path, f"{FIVE} --{other} {RESUME}")
    # What a killed write leaves, into which TensorStore would write.
    (tmp_path / VAULT / "manifest.ocdbt.__lock").write_bytes(bytes(3000))
    result = experiment(tmp_path, FIVE + RESUME)
    folder, expected = whole
    check_equal(tmp_path, folder)
    assert_equal(result.params, expected.params)
    assert_equal(result.evaluation_returns, expected.evaluation_returns)
    assert result.absolute_metric == expected.absolute_metric


def test_a_finished_run_grows(tmp_path, whole):
    first = experiment(tmp_path, evaluations(2))
    experiment(tmp_path, FIVE + RESUME)
    check_equal(tmp_path, whole[0])
    returns = whole[1].evaluation_returns
    assert returns.argmax() == 1, "another seed: the best evaluation is to be the second"
    assert_equal(whole[1].params, first.params)
    with pytest.raises(ippo.ConfigError, match=r"arch.num_evaluation is 2, but 5 are done"):
        experiment(tmp_path, evaluations(2) + RESUME)


def test_resuming_without_a_checkpoint_begins_only_where_nothing_is_recorded(copy, whole, capsys):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ippo.ConfigError, match="'a' holds data"):
        experiment(copy, FIVE + RESUME)
    check_equal(copy, whole[0])
    for folder in ("checkpoints", "vaults", "results"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    experiment(copy, FIVE + RESUME)
    assert "there is no checkpoint" in capsys.readouterr().out
    check_equal(copy, whole[0])


def test_a_vault_that_is_gone_or_shorter_than_its_checkpoint_is_not_resumed(copy):
    open_with_flashbax(copy / VAULT)._vault_index_ds.write(32).result()
    with pytest.raises(ippo.ConfigError, match="holds less than its checkpoint"):
        experiment(copy, evaluations(6) + RESUME)
    shutil.rmtree(copy / VAULT)
    with pytest.raises(ippo.ConfigError, match="there is no vault in"):
        experiment(copy, evaluations(6) + RESUME)


def test_signals_stop_a_run_with_all_that_was_logged_recorded(tmp_path):
    numbers, endless = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL), evaluations(10**5)
    folders = [tmp_path / number.name for number in numbers]
    processes = [start_run(folder, endless) for folder in folders]
    for folder in folders:
        wait_for(lambda: len(logged(folder)) > 3)  # lines are in the file as they are printed
    rel_dirs = f"--vault.rel-dir {folders[0]}/vaults --checkpoint.rel-dir {folders[0]}/checkpoints"
    status, lines = run(tmp_path / "second", f"{endless} {RESUME} {rel_dirs}")
    assert status == 1
    one_error(lines, "another process is recording into")
    lengths = []
    for number, process, folder in zip(numbers, processes, folders, strict=True):
        os.kill(process.pid, number)
        process.join(60)
        steps = logged(folder)
        num_metrics = len(read_metrics(folder)["Walk"]["walk"]["ff_ippo"]["seed_2"])
        assert len(steps) / 2 < num_metrics <= len(steps) + 1  # rarer as it grows
        lengths.append(open_with_flashbax(folder / VAULT).vault_index)
        status, lines = finish_run(process, folder)
        if number == signal.SIGKILL:
            written = re.findall(r"written to ([\d,]+)", "\n".join(lines))[-1]
            assert status == -number and lengths[-1] * 8 >= int(written.replace(",", "")) > 0
        else:
            end = f"stopped by {number.name} after {len(steps)} of 100000 evaluations: to go on"
            assert status == 128 + number and lines[-1].startswith(end)
            assert lines[-2].startswith("step") and lengths[-1] * 8 >= steps[-1]
    # The one that was killed goes on, to more than any recorded.
    status, lines = run(folders[2], evaluations(max(lengths) // 16 + 2) + RESUME)
    assert status == 0, lines
    resumed = read_vault(folders[2] / VAULT)
    for folder, length in zip(folders[:2], lengths, strict=False):
        expected = jax.tree.map(lambda x: x[:, :length], resumed)
        assert length % 16 == 0 and assert_equal(read_vault(folder / VAULT), expected) is None


def test_a_second_signal_stops_at_once(tmp_path):
    process = start_run(tmp_path, evaluations(100), slow_disk)
    wait_for(lambda: logged(tmp_path))
    for alive in (True, False):
        os.kill(process.pid, signal.SIGTERM)
        process.join(5)
        assert process.is_alive() == alive
    assert process.exitcode == -signal.SIGTERM


@contextlib.contextmanager
def small_disk(path, size):
    """A disk of `size` at `path`, while the context is open; gives what makes it large."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    try:
        resize = ["mount", "-o", "remount,size={}", str(path)]
        yield lambda size: subprocess.run([x.format(size) for x in resize], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize(("group", "size"), [("vault", "96k"), ("checkpoint", "150k")])
def test_a_full_disk_is_told_and_the_run_goes_on_after_room_is_made(tmp_path, whole, group, size):
    disk = tmp_path / f"{group}s"
    with small_disk(disk, "8k") as resize:
        (disk / "other").write_bytes(bytes(8192))  # full from the beginning
        with pytest.raises(ippo.RecordingError, match=f"(?s){disk}.*room"):
            experiment(tmp_path, FIVE)
        (disk / "other").unlink()
        resize(size)
        status, lines = run(tmp_path, FIVE + RESUME)
        assert status == 1 and any(line.startswith("step") for line in lines), lines
        one_error(lines, str(disk), "room", "resume")
        resize("100m")
        experiment(tmp_path, FIVE + RESUME)
        check_equal(tmp_path, whole[0])
        assert not list(disk.rglob(".*")), "nothing is left of what failed"


def test_results_on_a_full_disk_are_only_missed(tmp_path, whole):
    with small_disk(tmp_path / "results", "8k"):
        (tmp_path / "results/other").write_bytes(bytes(4096))
        with pytest.warns(UserWarning, match="failed: .*No space left") as warned:
            result = experiment(tmp_path, FIVE)
        assert any("metrics.json" in str(warning.message) for warning in warned)
    assert result.absolute_metric == whole[1].absolute_metric
    assert_equal(read_vault(tmp_path / VAULT), read_vault(whole[0] / VAULT))


def test_training_that_diverges_stops_with_what_came_before_recorded(tmp_path):
    arguments = "--system.actor-lr 1e30 --vault.extra-leaves log_prob value"
    status, lines = run(tmp_path, f"{FIVE} {arguments}")
    assert status == 1
    error = one_error(lines, "not a number", "system.actor_lr")
    step = int(re.search(r"at step ([\d,]+)", error)[1].replace(",", ""))
    leaves = read_vault(tmp_path / VAULT)
    num_evaluations = leaves["done"].shape[1] // 16
    assert step == (num_evaluations + 1) * EVALUATION_STEPS
    assert sum(line.startswith("step") for line in lines) == num_evaluations
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


LOAD = lambda folder: ippo.load_episodes(*where(folder / VAULT))
LOAD_PARAMS = lambda folder: ippo.load_params(folder / CHECKPOINT)
GO_ON = lambda folder: experiment(folder, evaluations(6) + RESUME)


@pytest.mark.parametrize(
    ("action", "pattern", "is_cut"),  # in half, or deleted
    [
        (LOAD, f"{VAULT}/metadata.json", True),
        (LOAD, f"{VAULT}/d/*", False),
        (LOAD_PARAMS, f"{CHECKPOINT}/5/state/manifest.ocdbt", True),
        (LOAD_PARAMS, f"{CHECKPOINT}/5/state/d/*", False),
        (GO_ON, f"{CHECKPOINT}/5/run/metadata", True),
        (GO_ON, f"{CHECKPOINT}/5/state/_METADATA", False),
        (GO_ON, f"{VAULT}/manifest.ocdbt", True),
    ],
)
def test_damaged_files_are_told_in_one_line(copy, action, pattern, is_cut):
    # The newest, as an older one may be of an earlier write, and not be read.
    path = max(copy.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    data = path.read_bytes()
    path.unlink()
    if is_cut:
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ippo.RecordingError) as error:
        action(copy)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and str(copy) in message, message


def test_a_vault_of_another_program_is_told_in_one_line(tmp_path):
    Vault("other", {"done": jnp.zeros((2, 8, 2), bool)}, rel_dir=str(tmp_path), vault_uid="a")
    for function in (ippo.load_episodes, ippo.export_og_marl):
        with pytest.raises(ippo.RecordingError, match="other/a is no recording of"):
            function("other", "a", str(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt(2), OSError(28, "No space left on device")])
def test_an_interrupted_export_has_no_name(copy, error):
    arguments = where(copy / VAULT)
    kind = type(error) if isinstance(error, KeyboardInterrupt) else ippo.RecordingError
    with mock.patch.object(Vault, "write", side_effect=error), pytest.raises(kind):
        ippo.export_og_marl(*arguments)
    assert list(copy.rglob("*walk.vlt*")) and not list(copy.rglob("Replay"))
    path = ippo.export_og_marl(*arguments)
    episodes = ippo.load_episodes(*arguments)
    assert_equal(read_vault(path)["actions"][0], episodes.transitions["action"])
    assert [child.name for child in path.parent.iterdir()] == ["Replay"]


def make_once(make_learn, env, system, num_updates, *others, made={}):  # noqa: B006
    """`make_learn`, whose learner of as many updates is made just once."""
    if num_updates not in made:
        made[num_updates] = make_learn(env, system, num_updates, *others)
    return made[num_updates]


@functools.cache
def smallest_buffer(arguments):
    """The smallest `vault.max_length` that is accepted."""
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ippo.ConfigError) as error:
        experiment(folder, arguments + " --vault.max-length 1")
    return int(re.search(r"max_length is 1: .* at least (\d+)", str(error.value))[1])


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=set(Phase) - {Phase.shrink},  # each example is some seconds
)
@given(data=st.data())
def test_every_timestep_is_recorded_exactly_once(rollouts, data):
    num_updates = data.draw(st.integers(1, 2), "updates in each evaluation")
    num_evaluations = data.draw(st.integers(1, 9), "evaluations")
    stop = data.draw(st.integers(0, num_evaluations), "interrupted in")
    arguments = (
        f"{ROLLOUTS} --system.num-updates {num_updates * num_evaluations} --arch.num-evaluation "
        f"{num_evaluations} --vault.save-interval {data.draw(st.integers(1, 5), 'save_interval')}"
    )
    make_learn = functools.partial(make_once, ippo.make_learn)  # a learner is traced once
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ippo, "make_learn", make_learn):
        if data.draw(st.booleans(), "max_length"):  # not always a whole number of rollouts
            size = smallest_buffer(arguments) + data.draw(st.integers(0, 150), "more")
            arguments += f" --vault.max-length {size}"
        with interrupted(stop), contextlib.suppress(KeyboardInterrupt):
            experiment(folder, arguments)
        result = experiment(folder, arguments + RESUME)
        streams = read_streams(result.vault_path, num_updates, 4)
    length = num_evaluations * num_updates * 4
    assert result.num_timesteps == 8 * length
    assert_equal(streams, jax.tree.map(lambda x: x[:, :length], rollouts[1]))


def test_what_a_failed_or_an_unfinished_write_holds_is_written_once(tmp_path):
    config = ippo.VaultConfig(uid="a", rel_dir=str(tmp_path))
    leaf = np.arange(16, dtype=np.int32).reshape(1, 1, 1, 8, 2)  # (D, NU, UB, T, NE)
    mesh = Mesh(np.array(jax.devices()[:1]), ("device",))
    with ippo.Recorder(config, {"leaf": leaf}, {}, mesh) as recorder:
        recorder.add({"leaf": leaf})
        full = SimpleNamespace(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
        refusal = pytest.raises(ippo.RecordingError, match=r"No space left .* make room there")
        with mock.patch.object(recorder.vault, "_vault_index_ds", full), refusal:
            recorder.write()
        recorder.write()
        recorder.add({"leaf": leaf + 16})
        write, writing = recorder.vault.write, threading.Event()

        def slow_write(*arguments, **options):
            writing.set()
            time.sleep(1)
            return write(*arguments, **options)

        recorder.vault.write = slow_write
        thread = threading.Thread(target=recorder.write)
        thread.start()
        writing.wait()
    thread.join()
    expected = np.concatenate([leaf, leaf + 16], axis=3)[0, 0, 0].T
    assert_equal(read_vault(recorder.path), {"leaf": expected})


# ---- PROCESSES -----------------------------------------------------------------------------------


def start_processes(folder, arguments, count=2):
    """Begin processes that train together, each in a folder of its own, where its `log` is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for index in range(count):
        own = folder / str(index)
        own.mkdir(parents=True, exist_ok=True)
        found = (
            f"--arch.distributed --arch.coordinator-address {address} --arch.num-processes {count}"
        )
        command = f"{SCRIPT} {arguments} {found} --arch.process-id {index}"
        with (own / "log").open("w") as log:
            command = [sys.executable, *command.split()]
            to_log = {"stdout": log, "stderr": log, "start_new_session": True}
            processes.append(subprocess.Popen(command, cwd=own, **to_log))
    return processes


def test_processes_record_and_go_on_as_one_process_with_all_their_devices(tmp_path):
    arguments = SMALL.replace("walk", "2s-8x8-2p-2f-coop") + evaluations(40)
    alone = run_script(arguments, tmp_path, JAX_NUM_CPU_DEVICES="2")
    assert alone.returncode == 0, alone.stderr
    logs = [tmp_path / index / "log" for index in "01"]
    for killed in (1, 0, None):
        processes = start_processes(tmp_path, arguments + RESUME)
        if killed is None:
            assert [process.wait(300) for process in processes] == [0, 0]
            continue
        wait_for(lambda: len(logged(tmp_path / "0")) >= 4)  # its folder is process 0's
        processes[killed].kill()
        assert processes[1 - killed].wait(60) != 0
        wait_for(lambda: "error:" in logs[1 - killed].read_text(), 5)  # what JAX says is passed on
        one_error(logs[1 - killed].read_text().splitlines(), "checkpoint.resume")

    text, other = (log.read_text() for log in logs)
    assert not re.search("step|metric", other)  # process 0 alone prints
    returns = re.compile(r"step [\d,]+:|absolute metric.*|episode return [\d.]+, length \d+")
    printed = returns.findall(text)
    assert len(printed) > 3 and printed == returns.findall(alone.stdout)[-len(printed) :]
    assert read_metrics(tmp_path / "0") == read_metrics(tmp_path)

    # Nothing was shared.  To be read as one, the parts are brought together.
    name, together = "ff_ippo_lbf", tmp_path / "0/vaults"
    with pytest.warns(UserWarning, match=r"without the parts \[1\]"):
        half = ippo.load_episodes(name, "a", str(together))
    shutil.copytree(tmp_path / "1/vaults", together, dirs_exist_ok=True)
    shutil.copytree(together / name / "a-p0of2", together / name / "a-profile")  # is no part of it
    whole = tmp_path / "vaults" / name / "a"
    parts = [read_vault(together / name / f"a-p{index}of2") for index in range(2)]
    assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), read_vault(whole))
    episodes = ippo.load_episodes(name, "a", str(together))
    assert_equal(episodes, ippo.load_episodes(*where(whole)))
    assert 0 < len(half.length) < len(episodes.length)


def test_a_signal_to_all_that_a_process_started_stops_it_with_one_line(tmp_path):
    arguments = SMALL.replace("walk", "2s-8x8-2p-2f-coop") + evaluations(10**5)
    (process,) = start_processes(tmp_path, arguments, 1)
    wait_for(lambda: len(logged(tmp_path / "0")) >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "0/log").read_text().splitlines()[-1].startswith("stopped by SIGTERM after")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("", "coordinator_address"), ("--arch.num-processes 2 --arch.process-id 2", "process_id")],
)
def test_processes_that_cannot_find_each_other_are_told_in_one_line(tmp_path, arguments, words):
    if arguments:
        arguments += " --arch.coordinator-address localhost:1"
    ended = run_script(f"--arch.distributed {arguments}", tmp_path)
    assert ended.returncode == 1 and not list(tmp_path.iterdir())
    one_error(ended.stderr.splitlines(), "arch.distributed", words)


# ---- SOAK: python test_script.py --soak 1000 -----------------------------------------------------

SOAK_EVALUATIONS = 30
SOAK_COUNTS = ("compared", "lost", "duplicated", "different")


def soak_check(folder, expected):
    """Compare a vault, read with Flashbax alone, with the leaves of an uninterrupted run.

    Returns how many timesteps of the environments were compared, are missing of those of which the
    log says that they are written, are there too often, and differ.
    """
    log = Path(folder, "log").read_text() if Path(folder, "log").exists() else ""
    promised = re.findall(r"vault written to ([\d,]+)$|^vault: ([\d,]+)", log, re.M) or [("0", "")]
    promised = int("".join(promised[-1]).replace(",", ""))
    if not Path(folder, VAULT).exists():
        return 0, promised, 0, 0
    vault = open_with_flashbax(Path(folder, VAULT))
    length, (rows, limit) = vault.vault_index, expected["done"].shape[:2]
    assert length % 16 == 0, f"the length {length} is not a whole number of rollouts"
    differ = np.zeros((rows, min(length, limit)), bool)
    for name, leaf in vault.read().experience.items() if length else ():
        same = np.asarray(leaf)[:, :limit] == expected[name][:, :length]
        differ |= ~same.reshape(*differ.shape, -1).all(axis=-1)
    lost, duplicated = max(0, promised - rows * length), rows * max(0, length - limit)
    return differ.size, lost, duplicated, int(differ.sum())


def soak(num_kills):
    """Kill small runs at random moments, two at a time, and resume each until it is finished.

    Ends with exit status 1 if anything differs from a run that was never interrupted.
    """
    totals, problems, lock, numbers = collections.Counter(), [], threading.Lock(), itertools.count()
    arguments = evaluations(SOAK_EVALUATIONS)

    def check(folder, expected):
        with lock:  # which also keeps one thread's redirection from the other's
            counts = soak_check(folder, expected)
            totals.update(dict(zip(SOAK_COUNTS, counts, strict=True)))
        assert not any(counts[1:]), f"lost, duplicated, different: {counts[1:]}"

    def record(number, root, duration, expected):
        """One recording, from its beginning to its end, however often it is killed."""
        folder, resume, choose = root / str(number), "", random.Random(number)
        while True:
            process = start_run(folder, arguments + resume)
            process.join(None if choose.random() < 0.25 else choose.uniform(0, duration))
            resume, killed = RESUME, process.is_alive()
            if killed:
                process.kill()
                process.join()
                totals["kills"] += 1
            check(folder, expected)
            if not killed:
                break
            (folder / "log").unlink(missing_ok=True)
        assert process.exitcode == 0 and "done in" in (folder / "log").read_text()
        with lock:
            check_equal(folder, root / "whole")
        shutil.rmtree(folder)
        totals["recordings"] += 1

    def work(root, *others):
        while totals["kills"] < num_kills and not problems:
            number = next(numbers)
            try:
                record(number, root, *others)
            except Exception as error:
                log = root / str(number) / "log"
                tail = log.read_text()[-3000:] if log.exists() else ""
                problems.append(f"recording {number}: {error}\n{tail}")
            begin = f"{totals['kills']:,} kills, {totals['recordings']:,} recordings finished"
            compared, *rest = (f"{totals[name]:,} {name}" for name in SOAK_COUNTS)
            line = ", ".join([begin, compared.replace(" ", " timesteps "), *rest])
            print(line, file=sys.__stdout__, flush=True)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        root = Path(root)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["PYTHONPATH"] = str(FOLDER)
        for name in ("compile", "whole"):  # the first fills the cache
            start = time.monotonic()
            status, lines = run(root / name, arguments)
            assert status == 0, lines
        duration = 1.2 * (time.monotonic() - start)  # two at a time are slower
        print(f"an uninterrupted run takes {duration / 1.2:.1f} s", flush=True)
        others = root, duration, read_vault(root / "whole" / VAULT)
        with ThreadPoolExecutor(2) as workers:
            for future in [workers.submit(work, *others) for _ in range(2)]:
                future.result()
        if problems:
            kept = shutil.copytree(root, tempfile.mkdtemp(prefix="soak"), dirs_exist_ok=True)
            sys.exit("\n".join([*problems, f"what was on the disk is in {kept}"]))


# ---- BENCHMARK: python test_script.py ------------------------------------------------------------

REPEATS = 20


def seconds(function, *arguments):
    """How long a call takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def original_env_steps(config, auto_reset):
    """Steps of Jumanji's environment alone, with random legal actions, as the original does them.

    Returns a function of nothing that makes T steps of UB * NE environments, on one device.
    """
    env = jumanji_env(config.env.scenario, config.env.time_limit)
    num_envs = config.system.update_batch_size * config.arch.num_envs

    def step_env(state, action):
        def reset(state, timestep):
            state, first = env.reset(jax.random.split(state.key)[0])
            return state, timestep.replace(observation=first.observation)

        state, timestep = env.step(state, action)
        if not auto_reset:
            return state, timestep
        return jax.lax.cond(timestep.last(), reset, lambda *same: same, state, timestep)

    def step(carry, _):
        key, state, mask = carry
        key, action_key = jax.random.split(key)
        action = jax.random.categorical(action_key, jnp.where(mask, 0.0, -jnp.inf))
        state, timestep = jax.vmap(step_env)(state, action)
        observation = timestep.observation
        return (key, state, observation.action_mask), (observation.agents_view, timestep.reward)

    key = jax.random.PRNGKey(0)
    state, timestep = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    carry = (key, state, timestep.observation.action_mask)
    steps = jax.jit(lambda carry: jax.lax.scan(step, carry, None, config.system.rollout_length))
    return functools.partial(steps, carry)


def count_update_flops(config, num_agents, num_actions, num_features):
    """Floating point operations of the matrix products of one update on one device."""

    def products(*sizes):  # multiplications and additions of the layers, forward, for one row
        return 2 * sum(math.prod(pair) for pair in itertools.pairwise(sizes))

    system, network = config.system, config.network
    actor = (num_features, *network.actor_layer_sizes, num_actions)
    flops = products(*actor)  # to act
    for sizes in (actor, (num_features, *network.critic_layer_sizes, 1)):
        # Backward it is the same again for the weights, and for all inputs but the observation.
        backward = products(*sizes) + products(*sizes[1:])
        flops += products(*sizes) + system.ppo_epochs * (products(*sizes) + backward)
    num_envs = system.update_batch_size * config.arch.num_envs
    return flops * system.rollout_length * num_envs * num_agents


def medians(calls, repeats):
    """The median time of each call, all in turn, so that a slow moment meets them all."""
    times = collections.defaultdict(list)
    for _ in range(repeats + 1):
        for name, call in calls.items():
            times[name].append(seconds(*call))
    return {name: float(np.median(values[1:])) for name, values in times.items()}  # first: compiles


def benchmark(config):
    """Print the figures of this machine, each the median of several repeats, as a table."""
    compiled, handler = [], logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    logging.getLogger("jax").propagate = False
    with jax.log_compiles():
        env, state, learn, mesh = learner_parts(config)
        state = jax.block_until_ready(learn(state)).state
        first_update = time.perf_counter() - START
        for _ in range(3):
            state = jax.block_until_ready(learn(state)).state
    logging.getLogger("jax").removeHandler(handler)
    num_compiled = sum(bool(re.search(r"Compiling .*\blearn\b", text)) for text in compiled)

    system, save_interval = config.system, config.vault.save_interval
    output = learn(state)
    num_updates = output.experience["done"].shape[1]
    recorder = ippo.Recorder(config.vault, output.experience, {}, mesh)
    written = jax.device_get(ippo.reshape_experience(output.experience))
    written = jax.tree.map(lambda x: np.concatenate([x] * save_interval, axis=1), written)
    evaluation = ippo.Evaluation(10**6, 1.0, 1.0, np.zeros(32, np.float32), None, 0.0, {})
    ippo.run_path(config.results.rel_dir, config.vault).mkdir(parents=True)
    metrics = (config, ippo.find_task(config.env), [evaluation] * 10_000)

    disk, begun = ThreadPoolExecutor(1), []

    def begin(function, *arguments):  # as `run_experiment` does
        if begun:
            begun.pop().result()
        begun.append(disk.submit(function, *arguments))

    def block(state, record=False):  # what lies between two writes, which is beside the later calls
        for index in range(save_interval):
            output = jax.block_until_ready(learn(state))
            state = output.state
            if record:
                begin(recorder.add, output.experience)
                if index == 0:
                    begin(recorder.write)
        if record:
            begin(int)

    x = jnp.ones((4096, 4096))
    calls = {
        "env": (original_env_steps(config, auto_reset=True),),
        "env, no reset": (original_env_steps(config, auto_reset=False),),
        "matmul": (jax.jit(jnp.matmul), x, x),
        "train": (block, state),  # each time from the state after a few updates
        "record": (block, state, True),
        "vault": (ippo.write_vault, recorder.vault, written),
        "metrics": (ippo.write_metrics, *metrics),
    }
    if config.checkpoint.load_params:
        params = ippo.load_params(config.checkpoint.load_params)
        actor, critic = state.actor, state.critic
        params = jax.device_put(params, actor.step.sharding)
        actor, critic = actor.replace(params=params.actor), critic.replace(params=params.critic)
        calls["trained"] = (block, state._replace(actor=actor, critic=critic))
    times = medians(calls, REPEATS)
    size = sum(file.stat().st_size for file in recorder.path.rglob("*") if file.is_file())
    bytes_per_step = size / (recorder.vault.vault_index * recorder.num_rows)

    steps = dict.fromkeys(calls, save_interval * math.prod(output.experience["done"].shape[:5]))
    num_env_steps = system.rollout_length * system.update_batch_size * config.arch.num_envs
    steps |= {"env": num_env_steps, "env, no reset": num_env_steps}
    speed = {name: steps[name] / times[name] for name in calls}
    matmul_speed = 2 * 4096**3 / times["matmul"]
    seen = env.reset(jax.random.PRNGKey(0))[1].observation
    flops = count_update_flops(config, *seen.action_mask.shape, seen.agents_view.shape[1])
    update_speed = mesh.size * flops * save_interval * num_updates / times["train"]
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB resident"
    if device_memory := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        memory += f", {device_memory / 1e9:.2f} GB on the device"
    rows = {
        "train": f"{speed['train']:,.0f} steps/s with an untrained policy",
        "record": f"{speed['record']:,.0f} steps/s with an untrained policy",
        "env": f"{speed['env']:,.0f} steps/s",
        "env, no reset": f"{speed['env, no reset']:,.0f} steps/s",
        "matmul": f"{matmul_speed / 1e9:,.0f} GFLOP/s; the update {update_speed / 1e9:,.0f}, "
        f"{100 * update_speed / matmul_speed:.0f} % of that",
        "train / env": f"{speed['train'] / speed['env']:.2f}",
        "record / train": f"{speed['record'] / speed['train']:.3f}",
        "compile": f"{first_update:.1f} s from start to the first update, "
        f"learner compiled {num_compiled} time(s)",
        "memory": memory,
        "vault": f"{speed['vault']:,.0f} steps/s written, {bytes_per_step:.1f} bytes a step",
        "metrics.json": f"{1000 * times['metrics']:.0f} ms to write 10,000 evaluations",
    }
    if "trained" in calls:
        rows["train, trained policy"] = (
            f"{speed['trained']:,.0f} steps/s with {config.checkpoint.load_params}, "
            f"{times['trained'] / times['train']:.2f} times the time"
        )

    def train_with(num_envs, learn, state):  # as many steps whatever the number of environments
        for _ in range(1024 // num_envs):
            state = jax.block_until_ready(learn(state)).state

    growing = {}
    for num_envs in (16, 64, 256, 1024):
        arch = dataclasses.replace(config.arch, num_envs=num_envs)
        larger = dataclasses.replace(system, num_updates=config.arch.num_evaluation)
        _, state, learn, _ = learner_parts(dataclasses.replace(config, arch=arch, system=larger))
        state = learn(learn(state).state).state
        growing[num_envs] = (train_with, num_envs, learn, state)
    num_steps = mesh.size * system.rollout_length * system.update_batch_size * 1024
    for num_envs, median in medians(growing, REPEATS // 5).items():  # they take longer
        rows[f"train, num_envs {num_envs}"] = f"{num_steps / median:,.0f} steps/s"
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    print(f"{os.cpu_count()} cores, {device}, JAX {jax.__version__}\n")
    print("| figure | |\n| --- | --- |")
    for name, text in rows.items():
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--soak"]:
        soak(int(sys.argv[2]))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        config = ippo.check_config(tyro.cli(ippo.Config), len(jax.devices()))
        vault = dataclasses.replace(config.vault, rel_dir=f"{folder}/vaults")
        results = dataclasses.replace(config.results, rel_dir=f"{folder}/results")
        benchmark(dataclasses.replace(config, vault=vault, results=results))
