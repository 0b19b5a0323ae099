# SPDX-License-Identifier: Apache-2.0
"""Tests of ff_ippo_store_experience.py: `pytest test_script.py`.

Run as a program, `python test_script.py`, it prints the benchmark instead, and with `--soak N` it
kills and resumes N runs.
"""
# ruff: noqa: E402, PT018, SIM905

import time

START = time.perf_counter()  # the benchmark counts from here

import ast
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
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
import tyro
from flashbax.vault import Vault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from jumanji import specs
from jumanji.env import Environment
from jumanji.environments import LevelBasedForaging, RobotWarehouse
from jumanji.types import StepType, restart, transition
from jumanji.wrappers import Wrapper
from matplotlib import pyplot
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

# A run of a few seconds: 2 evaluations of 2 updates, short episodes, 8 environments.
SMALL = (
    "--system.num-updates 4 --system.rollout-length 16 --arch.num-evaluation 2 --arch.num-envs 4 "
    "--arch.num-eval-episodes 4 --arch.no-absolute-metric --env.time-limit 10 --vault.uid small "
    "--checkpoint.no-save --results.no-save"
)

# Small enough for a random policy to eat now and then.
ippo.TASKS["tiny-foraging"] = ippo.foraging(grid_size=6, fov=2, num_agents=3, num_food=1)


def small_config(arguments="", **vault):
    """The configuration of the command line SMALL, changed by `arguments`, such as a user gives."""
    config = tyro.cli(ippo.Config, args=[*SMALL.split(), *arguments.split()])
    return dataclasses.replace(config, vault=dataclasses.replace(config.vault, **vault))


def folders(path):
    """Arguments that save everything, below `path`."""
    return (
        f"--vault.rel-dir {path}/vaults --checkpoint.save --checkpoint.rel-dir {path}/checkpoints "
        f"--results.save --results.rel-dir {path}/results"
    )


def assert_equal(actual, expected):
    """Both trees have the same arrays."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def jumanji_env(scenario="tiny-2ag", time_limit=500):
    """Jumanji's own environment of a scenario, without anything of ours."""
    env = ippo.TASKS[scenario].make(time_limit=time_limit)
    make = RobotWarehouse if isinstance(env, RobotWarehouse) else LevelBasedForaging
    return make(env._generator, time_limit=time_limit)


def read_vault(config):
    """Leaves (D * NU * UB * NE, E * T, ...) of a run's vault, as NumPy arrays."""
    vault = Vault(config.vault.name, vault_uid=config.vault.uid, rel_dir=config.vault.rel_dir)
    return jax.tree.map(np.asarray, vault.read().experience)


def read_streams(config):
    """Leaves (UB * NE, E * NU * T, ...) of a vault of one device: one environment a row."""
    num_updates = config.system.num_updates // config.arch.num_evaluation
    return ippo.restore_time_order(read_vault(config), 1, num_updates, config.system.rollout_length)


def run_program(*arguments, cwd, **environment):
    """A Python program as a user would run it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Many tests build the same learner: XLA compiles it once, also for other processes."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    options = {"compilation_cache_dir": folder, "persistent_cache_min_compile_time_secs": 0.3}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in options.items():
            jax.config.update(f"jax_{name}", value)
            monkeypatch.setenv(f"jax_{name}".upper(), str(value))
        yield


def learner_parts(config, env=None):
    """What `run_experiment` builds before it trains: environment, state, learner and mesh."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    env = ippo.make_env(config.env, config.system.add_agent_id, env)
    key, _, params_key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    state = ippo.init_learner(key, params_key, env, config, mesh)
    num_updates = config.system.num_updates // config.arch.num_evaluation
    record = functools.partial(ippo.select_leaves, extra_leaves=config.vault.extra_leaves)
    return env, state, ippo.make_learn(env, config.system, num_updates, mesh, record), mesh


def learned_rows(config, env=None):
    """What the learner returns in a run of `config`, as rows (D * NU * UB * NE, E * T, ...)."""
    _, state, learn, _ = learner_parts(config, env)
    rows = []
    for _ in range(config.arch.num_evaluation):
        state, experience, *_ = learn(state)
        rows.append(ippo.reshape_experience(experience))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *rows)


# ------------------------------------------------------------------------------------------------
# RECORDINGS, at which many tests look
# ------------------------------------------------------------------------------------------------


class WalkState(NamedTuple):
    position: Any  # (N,)
    step_count: Any  # ()
    key: Any


class View(NamedTuple):
    agents_view: Any  # (N, 3)


class Walk(Environment):
    """An environment of one's own: agents on a line, each paid for being near the middle.

    Actions 0, 1 and 2 lead left, nowhere and right.  An episode terminates when the first agent
    reaches 3, and is cut off when the last one reaches -3 or at the time limit.
    """

    time_limit = 10

    def __init__(self, num_agents, is_masked, is_team):
        self.num_agents, self.is_masked, self.is_team = num_agents, is_masked, is_team
        super().__init__()

    def observe(self, state):
        x = state.position
        view = jnp.stack([x, x**2, 0 * x], axis=1)  # integers
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
        reward = 0.5 - jnp.abs(position).astype(jnp.float32)
        discount = jnp.where(terminated, 0.0, jnp.ones(self.num_agents))
        if self.is_team:
            reward, discount = reward.sum(), discount.mean()
        step_type = jnp.where(terminated | truncated, StepType.LAST, StepType.MID)
        timestep = restart(self.observe(state))
        return state, timestep.replace(step_type=step_type, reward=reward, discount=discount)

    @functools.cached_property
    def observation_spec(self):
        return specs.Array((self.num_agents, 3), int)

    @functools.cached_property
    def action_spec(self):
        return specs.MultiDiscreteArray(jnp.full(self.num_agents, 3))


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
    export: Path
    metrics: list[dict]  # metrics.json as it was whenever it had been written
    replay: dict[str, np.ndarray]  # what `read_streams` is to give, from the seed and the actions


def replay(config, env):
    """Leaves (UB * NE, E * NU * T, ...) from the seed and the recorded actions, step by step."""
    actions = read_streams(config)["action"]
    num_rows, num_timesteps, num_agents = actions.shape
    keys = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    keys = jax.random.split(keys[0], num_rows + 1)[1:]
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    ids = np.eye(num_agents, dtype=np.float32)[:, : num_agents * config.system.add_agent_id]
    names = (*LEAVES, "next_observation", "discount", "step_count", "truncation")
    steps = []

    def see(timestep):
        seen = timestep.observation
        mask = getattr(seen, "action_mask", np.ones((num_agents, 3), bool))
        return np.hstack([ids, np.asarray(seen.agents_view, np.float32)]), np.asarray(mask)

    for row, key in enumerate(keys):
        state, timestep = reset(jax.random.split(key)[1])
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
    "warehouse": Case(  # the original's leaves
        "--arch.absolute-metric --arch.num-absolute-metric-eval-episodes 8 --results.animation",
        "",
        "rware/tiny-2ag.vlt",
    ),
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
        Walk(num_agents=3, is_masked=True, is_team=False),
    ),
    "one of one's own": Case(
        "", "truncation", "walk/Walk.vlt", Walk(num_agents=1, is_masked=False, is_team=True)
    ),
}


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """From the name of a recording to the recording, made when it is first asked for."""

    @functools.cache
    def record(name):
        case = RECORDINGS[name]
        folder = tmp_path_factory.mktemp("recording")
        metrics, write_metrics = [], ippo.write_metrics

        def write_and_read(config, *arguments):
            write_metrics(config, *arguments)
            path = ippo.run_path(config.results.rel_dir, config.vault) / "metrics.json"
            metrics.append(json.loads(path.read_text()))

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ippo, "write_metrics", write_and_read)
            config = small_config(f"{folders(folder)} --vault.og-marl {case.arguments}")
            result = ippo.run_experiment(config, case.own_env)
        env = case.own_env or jumanji_env(result.config.env.scenario, config.env.time_limit)
        export = folder / "vaults" / f"{result.config.vault.name}_small" / case.export
        return Recording(result, folder, case, export, metrics, replay(result.config, env))

    return record


@pytest.fixture(params=RECORDINGS)
def recording(request, recordings):
    """Each recording in turn."""
    return recordings(request.param)


def test_stepping_the_environments_by_hand_gives_the_recording_back(recording):
    streams = read_streams(recording.result.config)
    for name in set(streams) - {"log_prob", "value"}:
        assert streams[name].dtype == recording.replay[name].dtype
        np.testing.assert_array_equal(streams[name], recording.replay[name], err_msg=name)
    assert streams["done"].any()


def test_the_vault_holds_what_the_learner_returned(recording):
    result = recording.result
    experience = read_vault(result.config)
    expected = learned_rows(result.config, recording.case.own_env)
    assert_equal(experience, expected)
    assert jax.tree.map(lambda x: x.dtype, experience) == jax.tree.map(lambda x: x.dtype, expected)
    assert result.num_timesteps == experience["done"][..., 0].size == 4 * 2 * 16 * 4
    assert result.evaluations[-1].step_count == result.num_timesteps
    assert set(experience) == {*LEAVES, *recording.case.extra_leaves.split()}


def test_metadata_holds_configuration_what_follows_from_it_and_versions(recordings):
    config = recordings("foraging").result.config
    _, metadata = ippo.open_vault("ff_ippo_lbf", "small", config.vault.rel_dir)
    actions = ["noop", "up", "down", "left", "right", "load"]
    expected = json.loads(json.dumps(dataclasses.asdict(config))) | {
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


# ------------------------------------------------------------------------------------------------
# ENVIRONMENT
# ------------------------------------------------------------------------------------------------


def test_rare_cond_takes_the_function_just_in_the_rows_of_the_condition():
    num_rows, num_calls = [], []

    def function(x):
        jax.debug.callback(num_calls.append, x)
        return x * 10

    for size, share in ((1, 1.0), (7, 0.0), (7, 1.0), (40, 0.5), (1000, 0.02)):
        condition = np.random.default_rng(size).random(size) < share
        x = jnp.arange(size, dtype=jnp.float32)
        num_calls.clear()
        rare = jax.vmap(lambda condition, x: ippo.rare_cond(condition, function, x + 1, x))
        assert_equal(jax.jit(rare)(condition, x), np.where(condition, x * 10, x + 1))
        jax.effects_barrier()
        num_rows.append(condition.sum())
        assert len(num_calls) < condition.sum() + max(8, size // 64), "in other rows, too"
    assert 0 in num_rows and max(num_rows) > 15  # no row, and more than one chunk
    for condition in (True, False):  # without `vmap`
        assert ippo.rare_cond(jnp.array(condition), function, 3.0, 2.0) == (20 if condition else 3)


@pytest.mark.parametrize("scenario", ["tiny-2ag", "small-4ag"])
def test_warehouse_is_jumanjis_but_for_the_discount_at_the_time_limit(scenario):
    time_limit, num_envs = 80, 256
    theirs, ours = jumanji_env(scenario, time_limit), ippo.TASKS[scenario].make(time_limit)

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
        return jax.lax.scan(step, carry, None, 90)

    key = jax.random.PRNGKey(0)
    expected, actual = (jax.jit(functools.partial(play, env))(key) for env in (theirs, ours))
    timestep, request_queue = expected[1]
    assert timestep.reward.sum() > 0, "nothing was delivered: the test shows nothing"
    assert (timestep.discount[: time_limit - 1] == 0).any(), "no collision"
    discount = timestep.discount.at[time_limit - 1 :].set(1.0)
    assert_equal(actual, (expected[0], (timestep.replace(discount=discount), request_queue)))


def test_foraging_pays_the_team_and_tells_its_two_ends_apart(recordings):
    streams = read_streams(recordings("foraging").result.config)
    reward, done, truncation = streams["reward"], streams["done"], streams["truncation"]
    assert (reward == reward[..., :1]).all() and reward.max() == 1  # the only food, shared or not
    assert (truncation & done).any() and (done & ~truncation).any()
    assert_equal(streams["discount"] == 0, done & ~truncation)
    assert_equal(reward == 1, done & ~truncation)


@pytest.mark.parametrize("scenario", ippo.TASKS)
def test_every_task_has_what_its_name_says(scenario):
    config = ippo.check_config(small_config(f"--env.scenario {scenario} --env.time-limit None"), 1)
    env = ippo.make_env(config.env).unwrapped
    limit = 500 if isinstance(env, RobotWarehouse) else 100
    assert config.env.time_limit == env.time_limit == limit
    assert len(ippo.TASKS[scenario].actions) == np.max(env.action_spec.num_values)
    if size := re.search(r"(\d+)x\d+-(\d)p-(\d)f", scenario):
        size, agents, food = map(int, size.groups())
        assert (env.grid_size, env.num_agents, env.num_food) == (size, agents, food)
        assert env.fov == (2 if scenario.startswith("2s") else size)
        assert env._generator.force_coop == scenario.endswith("coop")
    elif agents := re.search(r"(\d)ag", scenario):
        assert env.num_agents == int(agents[1])


def lacking(what, **parts):
    """An environment with `parts` instead of a Walk's, and a part of the error's message."""
    state, timestep = Walk(2, is_masked=False, is_team=True).reset(jax.random.PRNGKey(0))
    state = parts.pop("state", state)
    timestep = timestep.replace(observation=parts.pop("observation", timestep.observation))
    return SimpleNamespace(**{"reset": lambda key: (state, timestep), **parts}), what


@pytest.mark.parametrize(
    ("env", "message"),
    [
        lacking("SimpleNamespace has no time_limit"),
        lacking("state of SimpleNamespace has no key", time_limit=1, state=np.zeros(2)),
        lacking("no agents_view of shape", time_limit=1, observation=np.zeros((2, 3))),
        lacking("no agents_view of shape", time_limit=1, observation=View(np.zeros(3))),
        lacking("has no action_mask .* nor an action_spec", time_limit=1),
    ],
)
def test_an_environment_that_lacks_something_is_refused_in_a_line_that_names_it(
    env, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ippo.ConfigError, match=message) as error:
        ippo.run_experiment(small_config(), env)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# NETWORKS, ADVANTAGE, LOSSES, LEARNER
# ------------------------------------------------------------------------------------------------


def random_observation(key, shape, num_actions=5, num_features=6):
    """An observation of (*shape, .) in which the first action is always legal."""
    view_key, mask_key = jax.random.split(key)
    mask = jax.random.bernoulli(mask_key, 0.5, (*shape, num_actions)).at[..., 0].set(True)
    return ippo.Observation(jax.random.normal(view_key, (*shape, num_features)), mask)


def test_networks_have_the_original_names_shapes_and_gains():
    observation = random_observation(jax.random.PRNGKey(0), (3, 4, 2))
    actor, critic = ippo.init_networks(ippo.Config(), observation, jax.random.PRNGKey(1))
    logits = actor.apply_fn(actor.params, observation)
    assert logits.shape == (3, 4, 2, 5)
    assert critic.apply_fn(critic.params, observation).shape == (3, 4, 2)
    illegal = np.asarray(logits)[~np.asarray(observation.action_mask)]
    assert (illegal == np.finfo(np.float32).min).all() and len(illegal)

    gains = {  # singular values of an orthogonal kernel are all its gain
        "actor/params/torso/Dense_0/kernel": math.sqrt(2),
        "actor/params/torso/Dense_1/kernel": math.sqrt(2),
        "actor/params/action_head/Dense_0/kernel": 0.01,
        "critic/params/torso/Dense_0/kernel": math.sqrt(2),
        "critic/params/torso/Dense_1/kernel": math.sqrt(2),
        "critic/params/Dense_0/kernel": 1.0,
    }
    params = {"actor": actor.params, "critic": critic.params}
    singular_values = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.linalg.svd(x)[1]
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if x.ndim == 2
    }
    for extreme in (np.min, np.max):
        actual = {name: float(extreme(values)) for name, values in singular_values.items()}
        assert actual == pytest.approx(gains, rel=1e-4)


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
    *updated, losses = jax.jit(update)(actor, critic, batch, index)

    lanes = [jax.tree.map(lambda x: x[rows], batch) for rows in index]
    actor_lanes = [(lane[0], (lane[1] - lane[1].mean()) / lane[1].std()) for lane in lanes]
    critic_lanes = [(lane[0], lane[2]) for lane in lanes]
    for before, after, loss, lanes, coefficient, learning_rate in (
        (actor, updated[0], ippo.actor_loss, actor_lanes, system.ent_coef, 1e-3),
        (critic, updated[1], ippo.critic_loss, critic_lanes, system.vf_coef, 2e-3),
    ):
        grad = jax.grad(loss, has_aux=True)
        outcomes = [
            grad(before.params, before.apply_fn, *lane, system.clip_eps, coefficient)
            for lane in lanes
        ]
        grads, lane_losses = jax.tree.map(lambda *x: sum(x) / 3, *outcomes)
        assert before is actor or optax.global_norm(grads) > 0.4
        optimiser = optax.chain(optax.clip_by_global_norm(0.4), optax.adam(learning_rate, eps=1e-5))
        changes, _ = optimiser.update(grads, optimiser.init(before.params))
        expected = jax.tree.map(jnp.add, before.params, changes)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, after.params, expected)
        for name, value in lane_losses.items():
            assert losses[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)


def test_shuffle_permutes_each_lane_and_epoch_with_the_original_keys():
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    new_keys, permutation = ippo.shuffle(keys, num_epochs=3, num_transitions=10)
    assert permutation.shape == (3, 2, 10)
    for lane, key in enumerate(keys):
        for epoch in range(3):
            key, shuffle_key = jax.random.split(key)
            assert_equal(permutation[epoch, lane], jax.random.permutation(shuffle_key, 10))
        assert_equal(new_keys[lane], key)


def test_learner_is_compiled_once(caplog):
    _, state, learn, _ = learner_parts(small_config())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            state = learn(state).state
    compiled = [r for r in caplog.records if re.search(r"Compiling .*\blearn\b", r.getMessage())]
    assert len(compiled) == 1, [record.getMessage()[:200] for record in caplog.records]


FORAGING = (
    "--env.scenario 2s-8x8-2p-2f-coop --env.time-limit None --arch.num-envs 16 "
    "--arch.num-eval-episodes 64 --system.rollout-length 100"
)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A run that learns to forage, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("learned")
    config = small_config(
        f"{FORAGING} --system.num-updates 40 --system.actor-lr 1e-3 --system.critic-lr 1e-3 "
        f"--vault.no-save --checkpoint.save --checkpoint.rel-dir {folder}"
    )
    return ippo.run_experiment(config), folder / "ff_ippo_lbf/small"


def test_a_short_run_learns_and_its_policy_is_recorded_as_it_is(learned, tmp_path):
    result, path = learned
    _, state, _, _ = learner_parts(result.config)
    best_params = ippo.load_params(path)
    assert_equal(best_params, result.params)

    arguments = f"{FORAGING} --system.no-learn --vault.extra-leaves log_prob value "
    mean_returns = []
    for policy, params, options in (
        ("initial", (state.actor.params, state.critic.params), f"--vault.rel-dir {tmp_path}/first"),
        (str(path), best_params, f"--vault.rel-dir {tmp_path} --checkpoint.load-params {path}"),
    ):
        run = ippo.run_experiment(small_config(arguments + options))
        assert_equal(tuple(run.params), tuple(params))
        assert run.evaluations[0].losses == {}
        rows = read_vault(run.config)  # of the last update as of the first
        seen = ippo.Observation(rows["observation"], rows["legal_action_mask"])
        log_prob = distrax.Categorical(state.actor.apply_fn(params[0], seen)).log_prob(
            rows["action"]
        )
        np.testing.assert_allclose(rows["log_prob"], log_prob, atol=1e-4)
        value = state.critic.apply_fn(params[1], seen)
        np.testing.assert_allclose(rows["value"], value, atol=1e-4)

        vault = run.config.vault
        _, metadata = ippo.open_vault(vault.name, vault.uid, vault.rel_dir)
        evaluated = np.concatenate([x.episode_return for x in run.evaluations])
        mean_return = pytest.approx(evaluated.mean())
        assert metadata["policy"] == {"params": policy, "episode_return": mean_return}
        episodes = ippo.load_episodes(vault.name, vault.uid, vault.rel_dir, leaves=())
        recorded = episodes.episode_return
        error = math.hypot(*(x.std() / math.sqrt(len(x)) for x in (evaluated, recorded)))
        assert abs(recorded.mean() - evaluated.mean()) < 4 * error
        mean_returns.append(evaluated.mean())
    first, last = mean_returns
    assert last > first + 0.2, "nothing was learned"


def test_training_goes_on_from_loaded_parameters_and_no_others(learned, tmp_path):
    result, path = learned
    arguments = (
        f"{FORAGING} --system.num-updates 1 --arch.num-evaluation 1 --vault.no-save "
        f"--system.actor-lr 1e-9 --system.critic-lr 1e-9 --checkpoint.load-params {path} "
    )
    trained = ippo.run_experiment(small_config(arguments)).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), trained, result.params)
    changed = jax.tree.map(lambda x, y: (x != y).any(), trained, result.params)
    assert any(jax.tree.leaves(changed)), "nothing was learned"
    with pytest.raises(ippo.ConfigError, match=r"load_params .* has other networks"):
        ippo.run_experiment(small_config(arguments + "--network.actor-layer-sizes 64"))
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*/nowhere"):
        ippo.load_params(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------
# EVALUATION
# ------------------------------------------------------------------------------------------------


class PaidByTheStep(Wrapper):
    """A delivery at every step, also of an episode that has ended: none may be counted then."""

    def step(self, state, action):
        state, timestep = self._env.step(state, action)
        return state, timestep.replace(reward=jnp.ones_like(timestep.reward))


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_against_playing_the_episodes_by_hand(greedy):
    time_limit, num_episodes, key = 60, 12, jax.random.PRNGKey(5)
    env = PaidByTheStep(ippo.make_env(ippo.EnvConfig("tiny-4ag", time_limit)))
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape), ippo.observation_shape(env))
    actor, _ = ippo.init_networks(ippo.Config(), observation, jax.random.PRNGKey(6))
    params = jax.tree.map(jnp.array, actor.params)
    bias = params["params"]["action_head"]["Dense_0"]["bias"]
    params["params"]["action_head"]["Dense_0"]["bias"] = bias.at[1].set(1.0)  # forward: collisions
    actor = actor.replace(params=params)
    metrics = jax.jit(lambda key: ippo.evaluate(env, actor, key, num_episodes, greedy))(key)
    assert metrics.done.all()

    theirs = jumanji_env("tiny-4ag", time_limit)
    reset, step = jax.jit(jax.vmap(theirs.reset)), jax.jit(jax.vmap(theirs.step))
    key, reset_key = jax.random.split(key)
    state, timestep = reset(jax.random.split(reset_key, num_episodes))
    lengths = [None] * num_episodes
    for t in range(time_limit):
        key, policy_key = jax.random.split(key)
        ids = np.broadcast_to(np.eye(4), (num_episodes, 4, 4))
        view = np.concatenate([ids, timestep.observation.agents_view], axis=-1).astype(np.float32)
        mask = timestep.observation.action_mask
        policy = distrax.Categorical(actor.apply_fn(params, ippo.Observation(view, mask)))
        state, timestep = step(state, policy.mode() if greedy else policy.sample(seed=policy_key))
        for i in np.flatnonzero(timestep.last()):
            lengths[i] = lengths[i] or t + 1
    assert metrics.episode_return.tolist() == metrics.episode_length.tolist() == lengths
    assert min(lengths) < time_limit, "no episode ended before the others: the test shows nothing"


def test_two_devices_record_and_evaluate_as_one_of_two_lanes_does(tmp_path):
    # A rate at which who leaves out the other device's gradients soon acts otherwise.
    arguments = (
        f"{folders(tmp_path)} --env.scenario 10x10-3p-3f --env.time-limit 40 --system.seed 4 "
        "--system.actor-lr 0.003 --vault.name ff_ippo --vault.extra-leaves truncation"
    )
    run = run_program(
        SCRIPT,
        *f"{SMALL} {arguments} --system.update-batch-size 1 --arch.absolute-metric".split(),
        *"--arch.num-absolute-metric-eval-episodes 10".split(),
        cwd=tmp_path,
        JAX_NUM_CPU_DEVICES="2",
    )
    assert run.returncode == 0, run.stderr
    config = small_config(arguments)
    recorded = read_vault(config)
    for name, rows in learned_rows(config).items():
        expected = rows.reshape(2, 2, 4, *rows.shape[1:]).swapaxes(0, 1)  # (UB, NU, NE, ...)
        assert_equal(recorded[name].reshape(expected.shape), expected)

    # Two of the four episodes are on each device, with a key of its own.
    env, state, learn, _ = learner_parts(config)
    states = [learn(state).state, learn(learn(state).state).state]
    best = ippo.load_params(tmp_path / "checkpoints/ff_ippo/small")
    evaluate = jax.jit(lambda actor, key: ippo.evaluate(env, actor, key, 2).episode_return)
    key, returns = jax.random.split(jax.random.PRNGKey(4), 3)[1], []
    actors = [*(state.actor for state in states), *[states[0].actor.replace(params=best.actor)] * 3]
    for actor in actors:  # of two evaluations, and of the absolute metric, in three parts
        key, *device_keys = jax.random.split(key, 3)
        returns.append(np.concatenate([evaluate(actor, key) for key in device_keys]))
    metrics = json.loads((tmp_path / "results/ff_ippo/small/metrics.json").read_text())
    metrics = metrics["LevelBasedForaging"]["10x10-3p-3f"]["ff_ippo"]["seed_4"]
    evaluated = [metrics[f"step_{index}"]["mean_episode_return"] for index in range(2)]
    assert evaluated == [[pytest.approx(x.mean())] for x in returns[:2]]
    assert evaluated[0] > evaluated[1], "the best are the last: the test shows nothing"
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, tuple(best), (states[0].actor.params, states[0].critic.params))
    absolute = np.concatenate(returns[2:])[:10].mean()
    assert metrics["absolute_metrics"]["mean_episode_return"] == [pytest.approx(absolute)]


# ------------------------------------------------------------------------------------------------
# RECORDING
# ------------------------------------------------------------------------------------------------


def test_a_wrapping_buffer_loses_nothing_and_streams_are_those_of_any_evaluations(
    tmp_path, recordings
):
    # The buffer's time axis holds 3 rollouts; writes come every 2 evaluations, 11 in all.
    config = small_config(
        f"--system.num-updates 11 --arch.num-evaluation 11 --vault.rel-dir {tmp_path} "
        f"--vault.save-interval 2 --vault.max-length {8 * 3 * 16 + 7}"
    )
    result = ippo.run_experiment(config)
    experience = read_vault(config)
    assert_equal(experience, learned_rows(config))
    assert experience["done"].shape[1] == 11 * 16 and result.num_timesteps == 8 * 11 * 16
    # This one had two updates to each of its evaluations.
    expected = read_streams(recordings("warehouse").result.config)
    assert_equal(jax.tree.map(lambda x: x[:, : 4 * 16], read_streams(config)), expected)


def test_a_chunk_on_disk_is_a_rollout_of_as_many_rows_as_its_size_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(ippo, "MAX_CHUNK_SIZE", 6 * 16 * 2 * 3)
    rng = np.random.default_rng(0)
    experience = {"a": rng.random((8, 64, 2, 3), np.float32), "b": rng.random((8, 64)) > 0.5}
    for compression, expected in (({"id": "zlib"}, "zlib"), (None, "zstd")):
        config = ippo.VaultConfig(uid=expected, rel_dir=str(tmp_path), compression=compression)
        ippo.write_vault(ippo.make_vault(config, experience, 16, {}), experience)
        vault = Vault(config.name, vault_uid=expected, rel_dir=str(tmp_path))
        assert_equal(vault.read().experience, experience)
        stores = vault._all_datastores
        chunks = {name: store.chunk_layout.write_chunk.shape for name, store in stores.items()}
        assert chunks == {"a": (6, 16, 2, 3), "b": (8, 16)}
        for store in stores.values():
            assert store.spec().to_json()["metadata"]["compressor"]["id"] == expected


def test_nothing_is_saved_where_that_is_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ippo.run_experiment(small_config("--vault.no-save"))
    assert result.vault_path is None and result.num_timesteps == 0
    assert len(result.evaluation_returns) == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# OFFLINE
# ------------------------------------------------------------------------------------------------


def walk_episodes(done, first=0):
    """Complete episodes of streams whose dones are (B, time), from the timestep `first` on.

    Returns:
        (end, stream, begin) of each, in the order in which they ended, and how many more begin or
        end outside.
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


def load(recording, *args, **kwargs):
    vault = recording.result.config.vault
    return ippo.load_episodes(vault.name, vault.uid, vault.rel_dir, *args, **kwargs)


def write_synthetic_vault(rel_dir, done, num_updates, rollout_length):
    """A vault of streams whose dones are `done` (D, UB, NE, E * NU * T), as the learner records it.

    Each transition's `observation` is its number in (D, UB, NE, time).
    """
    number = np.arange(done.size, dtype=np.int32).reshape(done.shape)
    leaves = {
        "done": np.stack([done, done], axis=-1),
        "reward": np.stack([number % 7, number % 5], axis=-1).astype(np.float32),
        "observation": number,
        "extra": {"nested": -number},
    }
    metadata = {"num_devices": len(done), "num_updates_per_eval": num_updates}
    metadata["system"] = {"rollout_length": rollout_length}
    config = ippo.VaultConfig(name="synthetic", uid="uid", rel_dir=str(rel_dir))
    vault = None
    for index in range(done.shape[-1] // (num_updates * rollout_length)):

        def evaluation(x):  # (D, UB, NE, time, ...) -> (D, NU, UB, T, NE, ...)
            x = x.reshape(*x.shape[:3], -1, num_updates, rollout_length, *x.shape[4:])
            return np.moveaxis(x[:, :, :, index], (3, 1, 4, 2), (1, 2, 3, 4))

        experience = ippo.reshape_experience(jax.tree.map(evaluation, leaves))
        vault = vault or ippo.make_vault(config, experience, rollout_length, metadata)
        ippo.write_vault(vault, experience)


def concatenate(parts):
    """The parts that `iterate_episodes` yields, as `load_episodes` is to give them."""
    whole = jax.tree.map(lambda *x: np.concatenate([np.atleast_1d(y) for y in x]), *parts)
    start = np.cumsum(whole.length) - whole.length
    return whole._replace(start=start, num_incomplete=whole.num_incomplete.sum())


sizes = st.integers(1, 3)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.tuples(sizes, sizes, sizes),
    num_updates=sizes,
    rollout_length=st.integers(1, 5),
    num_evaluations=st.integers(1, 6),
    density=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    num_steps=st.sampled_from([1, 100]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_every_complete_episode_comes_back_once_and_in_order(
    axes, num_updates, rollout_length, num_evaluations, density, num_steps, seed, data
):
    num_timesteps = num_evaluations * num_updates * rollout_length
    done = np.random.default_rng(seed).random((*axes, num_timesteps)) < density
    first = data.draw(st.integers(0, num_evaluations - 1), label="first evaluation")
    last = data.draw(st.integers(first + 1, num_evaluations), label="end of the evaluations")
    # Half an evaluation more, as both ends are rounded down.
    percentiles = tuple(100 * min((x + 0.5) / num_evaluations, 1.0) for x in (first, last))
    first_step, last_step = (x * num_updates * rollout_length for x in (first, last))
    streams = done.reshape(-1, num_timesteps)
    walked, num_incomplete = walk_episodes(streams[:, :last_step], first_step)
    with tempfile.TemporaryDirectory() as rel_dir, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_synthetic_vault(rel_dir, done, num_updates, rollout_length)
        arguments = ("synthetic", "uid", rel_dir, percentiles)
        parts = list(ippo.iterate_episodes(*arguments, num_steps=num_steps))
        assert any("no episode is complete" in str(x.message) for x in caught) == (not walked)
        episodes = ippo.load_episodes(*arguments)

    episode_ids = [
        stream * num_timesteps + np.arange(begin, end + 1) for end, stream, begin in walked
    ]
    ids = np.concatenate([np.zeros(0, int), *episode_ids])
    length = np.array([len(x) for x in episode_ids], np.int64)
    assert_equal(episodes.transitions["observation"], ids)
    assert_equal(episodes.transitions["extra"]["nested"], -ids)
    expected = ippo.Episodes(
        transitions=episodes.transitions,
        start=np.cumsum(length) - length,
        length=length,
        episode_return=np.float32([(x % 7 / 2 + x % 5 / 2).sum() for x in episode_ids]),
        recorded_at=np.array([begin * len(streams) for *_, begin in walked], np.int64),
        num_incomplete=num_incomplete,
    )
    for actual in (episodes, concatenate(parts)):
        assert_equal(actual, expected)
        for array, right in zip(actual[1:-1], expected[1:-1], strict=True):
            assert array.dtype == right.dtype


@pytest.mark.parametrize("module", [np, jnp])
def test_restore_time_order_undoes_the_interleaving(module):
    axes = num_devices, num_lanes, num_envs, num_evaluations, num_updates, length = 2, 3, 4, 5, 6, 7
    streams = np.arange(np.prod(axes)).reshape(axes)
    rows = np.moveaxis(streams, 4, 1).reshape(-1, num_evaluations * length)
    experience = {"a": module.asarray(rows), "b": {"c": module.asarray(rows)[..., None]}}
    restored = ippo.restore_time_order(experience, num_devices, num_updates, length)
    streams = streams.reshape(num_devices * num_lanes * num_envs, -1)
    assert type(restored["a"]) is type(experience["a"])
    assert_equal(restored["a"], streams)
    assert_equal(restored["b"]["c"], streams[..., None])


def test_training_logged_the_returns_of_the_episodes_that_ended(recording):
    config, evaluations = recording.result.config, recording.result.evaluations
    episodes = load(recording)
    num_rows, num_timesteps = recording.replay["done"].shape[:2]
    ended_at = episodes.recorded_at // num_rows + episodes.length - 1
    index = ended_at * len(evaluations) // num_timesteps
    for number, evaluation in enumerate(evaluations):
        returns = episodes.episode_return[index == number]
        assert evaluation.num_train_episodes == len(returns) > 0
        assert evaluation.train_episode_return == pytest.approx(returns.mean(), abs=1e-5)
        assert (evaluation.episode_length > 0).all()
    rewards = np.split(episodes.transitions["reward"].mean(axis=1), episodes.start[1:])
    np.testing.assert_allclose([x.sum() for x in rewards], episodes.episode_return, atol=1e-5)
    assert episodes.length.max() == config.env.time_limit == 10


def test_a_part_of_training_and_only_the_leaves_asked_for_are_returned(recordings):
    recording = recordings("warehouse")
    episodes = load(recording, leaves=("action",))
    assert set(episodes.transitions) == {"action"}
    assert_equal(episodes.episode_return, load(recording).episode_return)
    second_half = load(recording, (50, 100))
    assert second_half.recorded_at.min() >= recording.result.num_timesteps // 2
    assert second_half.num_incomplete > 0
    for percentiles in [(0, 49), (60, 40), (50, 101), (-60, 50)]:
        with pytest.raises(ippo.ConfigError, match="percentiles"):
            load(recording, percentiles)
    with pytest.raises(FileNotFoundError, match="ff_ippo_rware/nobody"):
        ippo.load_episodes("ff_ippo_rware", "nobody", recording.result.config.vault.rel_dir)


def test_exported_vault_has_og_marl_layout(recording):
    config, replay = recording.result.config, recording.replay
    path = recording.export / "Replay"
    vault = Vault(path.parent.name, rel_dir=str(path.parents[1]), vault_uid="Replay")
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
    exported = vault.read().experience
    assert_equal(exported, jax.tree.map(lambda x: x[None], expected))
    dtypes = (jax.tree.map(lambda x: x.dtype.name, leaves) for leaves in (exported, expected))
    assert next(dtypes) == next(dtypes)
    assert expected["terminals"].any() and expected["truncations"].any()
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["recording"]["system"]["seed"] == config.system.seed


def test_parts_are_exported_by_any_name_once_and_within_a_running_event_loop(recordings):
    recording = recordings("warehouse")
    rel_dir = recording.result.config.vault.rel_dir

    async def export():
        return ippo.export_og_marl("ff_ippo_rware", "small", rel_dir, part="Good", label="Expert")

    path = asyncio.run(export())
    assert path == recording.export / "Expert"
    vault = Vault(path.parent.name, rel_dir=str(path.parents[1]), vault_uid="Expert")
    transitions = load(recording, ippo.OG_MARL_PARTS["Good"]).transitions
    assert_equal(vault.read().experience["actions"][0], transitions["action"])
    with pytest.raises(ippo.ConfigError, match=r"tiny-2ag\.vlt/Replay"):
        ippo.export_og_marl("ff_ippo_rware", "small", rel_dir)


def test_joint_saco_counts_distinct_pairs(recordings):
    recording = recordings("warehouse")
    vault, transitions = recording.result.config.vault, load(recording).transitions
    leaves = [transitions[leaf] for leaf in ("observation", "action")]
    pairs = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
    expected = len(np.unique(pairs, axis=0)) / len(pairs)
    assert ippo.joint_saco(vault.name, vault.uid, vault.rel_dir) == expected
    assert 0 < expected < 1


# ------------------------------------------------------------------------------------------------
# RESULTS
# ------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_evaluations_and_can_be_read_after_each(recordings):
    for name, names in (
        ("warehouse", ("RobotWarehouse", "tiny-2ag")),
        ("foraging", ("LevelBasedForaging", "tiny-foraging")),
        ("three of one's own", ("Walk", "line")),
    ):
        result, seen = recordings(name).result, recordings(name).metrics
        for key in (*names, "ff_ippo", "seed_42"):
            seen = [metrics[key] for metrics in seen]
        expected = {
            f"step_{index}": {
                "step_count": evaluation.step_count,
                "elapsed_time": evaluation.elapsed_time,
                "mean_episode_return": [float(evaluation.episode_return.mean())],
                "steps_per_second": [evaluation.steps_per_second],
            }
            for index, evaluation in enumerate(result.evaluations)
        }
        assert seen[:2] == [{"step_0": expected["step_0"]}, expected]
        if result.absolute_metric is not None:
            absolute = {"mean_episode_return": [result.absolute_metric]}
            expected["absolute_metrics"] = absolute
        assert seen[-1] == expected
    assert recordings("warehouse").result.absolute_metric is not None


def test_pictures_show_the_run(recording):
    config = recording.result.config
    path = recording.folder / "results" / config.vault.name / "small"
    names = {"metrics.json", "learning_curve.png", "dataset.png"}
    if config.results.animation:
        names.add("episode.gif")
        with Image.open(path / "episode.gif") as gif:
            assert 1 < gif.n_frames <= config.env.time_limit  # frames alike are merged
    assert {file.name for file in path.iterdir()} == names
    for name, size in {"learning_curve.png": (1275, 825), "dataset.png": (1275, 570)}.items():
        with Image.open(path / name) as picture:
            assert picture.size == size
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10  # not blank
    assert pyplot.get_fignums() == []

    figure = ippo.plot_dataset(config.vault.name, "small", config.vault.rel_dir)
    for axes in figure.axes:  # every episode and every action is in a bar
        shares = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
        assert shares == [pytest.approx(100)] * 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    num_episodes = [int(re.search(r"(\d+) episodes", label)[1]) for label in labels]
    assert sum(num_episodes) == len(load(recording).length)
    num_actions = recording.replay["legal_action_mask"].shape[-1]
    assert len(figure.axes[2].get_xticklabels()) == num_actions
    assert [len(bars) for bars in figure.axes[2].containers] == [num_actions] * 3


# ------------------------------------------------------------------------------------------------
# CONFIGURATION
# ------------------------------------------------------------------------------------------------


BAD_NAMES = (".", "..", "", "a/b", "../../x", "run#1", "%20", "a?b", "a\nb", "x" * 300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env.scenario huge-9ag", r"env.scenario 'huge-9ag' is unknown: .*tiny-2ag"),
        ("--system.num-updates 5", r"num_updates is 5: .*: set arch.num_evaluation to 1"),
        ("--system.num-updates 0", "system.num_updates is 0: it must be at least 1"),
        ("--system.total-timesteps 0", "system.total_timesteps is 0"),
        ("--system.num-minibatches 5", r"num_minibatches is 5: it must divide .* 64"),
        ("--system.rollout-length -1", "system.rollout_length is -1"),
        ("--system.seed -1", "system.seed is -1: it must be from 0 to"),
        ("--system.gamma 1.5", "system.gamma is 1.5: it must be from 0 to 1"),
        ("--system.actor-lr 0.0", "system.actor_lr is 0.0: it must be above 0"),
        ("--system.ent-coef -0.1", "system.ent_coef is -0.1: it must be at least 0"),
        ("--arch.num-envs 0", "arch.num_envs is 0"),
        ("--arch.num-eval-episodes 0", "arch.num_eval_episodes is 0"),
        ("--env.time-limit 0", "env.time_limit is 0"),
        ("--network.actor-layer-sizes 8 0", "network.actor_layer_sizes is"),
        ("--vault.save-interval 0", "vault.save_interval is 0"),
        # 16 rows of (5 + 1) * 16 timesteps
        ("--vault.max-length 1535", r"vault.max_length is 1535: .* at least 1536"),
        (f"--vault.max-length {10**15}", r"takes .* GB of .* memory: .*max_length"),
        ("--vault.compression id zip", r"vault.compression .* is unknown"),
        (f"--vault.rel-dir {__file__}/x", r"vault.rel_dir .* cannot be written"),
        ("--vault.rel-dir run#1", r"'.*/run#1/ff_ippo_rware/small' has one of # % "),
        ("--vault.extra-leaves q_value", r"'q_value'.*log_prob, value"),
        (f"--results.rel-dir {__file__}/x", r"results.rel_dir .* cannot be written"),
        ("--results.rel-dir vaults", "results.rel_dir 'vaults' is taken"),
        ("--checkpoint.rel-dir vaults", "checkpoint.rel_dir 'vaults' is taken"),
        ("--checkpoint.resume --vault.uid None", "resume needs vault.uid"),
        *(({"name": name}, r"vault.name .* is not the name|has one of # %") for name in BAD_NAMES),
        *(({"uid": name}, r"vault.uid .* is not the name|has one of # %") for name in BAD_NAMES),
    ],
)
def test_bad_configuration_is_refused_in_one_line_before_anything_is_created(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if "max-length" not in arguments:  # which is of what an environment records
        monkeypatch.setattr(ippo, "init_learner", None)  # would take a while
    names = arguments if isinstance(arguments, dict) else {}
    arguments = "" if names else arguments
    config = small_config(f"--checkpoint.save --results.save {arguments}", **names)
    with pytest.raises(ippo.ConfigError, match=message) as error:
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
    recording = recordings("warehouse")
    for name in ("vaults", "checkpoints", "results"):  # just one is in the way
        (tmp_path / name / "ff_ippo_rware").mkdir(parents=True)
    folder = "vaults/ff_ippo_rware_small" if blocking == "export" else f"{blocking}/ff_ippo_rware"
    shutil.copytree(recording.folder / folder, tmp_path / folder, dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ippo.ConfigError, match=rf"exists already, at .*{folder}"):
        ippo.run_experiment(small_config(f"{folders(tmp_path)} --vault.og-marl"))
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_requirements_are_those_in_the_head_of_the_script():
    head = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S).group(1)
    in_script = re.findall(r'^#     "(.+)",$', head, re.M)
    lines = (FOLDER / "requirements.txt").read_text().split("# To run test_script.py.")[0]
    in_file = [line for line in lines.splitlines() if line and not line.startswith("#")]
    assert in_script == in_file and len(in_file) > 8


# ------------------------------------------------------------------------------------------------
# COMMAND LINE
# ------------------------------------------------------------------------------------------------


def test_the_command_line_records_the_original_data(tmp_path):
    run = run_program(
        SCRIPT,
        *"--system.num-updates 5 --arch.num-evaluation 1 --arch.no-absolute-metric".split(),
        *"--vault.uid golden --vault.rel-dir somewhere".split(),
        cwd=tmp_path,
        JAX_THREEFRY_PARTITIONABLE="0",
    )
    assert run.returncode == 0, run.stderr
    vault = Vault("ff_ippo_rware", vault_uid="golden", rel_dir=str(tmp_path / "somewhere"))
    experience = jax.tree.map(np.asarray, vault.read().experience)
    rows = len(experience["done"]) // len(GOLDEN)
    for update, digests in enumerate(GOLDEN):
        for name, digest in zip(LEAVES, digests.split(), strict=True):
            part = np.ascontiguousarray(experience[name][update * rows : (update + 1) * rows])
            assert hashlib.sha256(part.tobytes()).hexdigest()[:16] == digest, (update, name)


def test_the_command_line_refuses_in_one_line(tmp_path):
    for arguments, message in (
        ("--env.scenario huge-9ag", "error: env.scenario 'huge-9ag' is unknown: choose one of "),
        ("--checkpoint.load-params nowhere", f"error: there is no checkpoint in {tmp_path}/"),
    ):
        run = run_program(SCRIPT, *SMALL.split(), *arguments.split(), cwd=tmp_path)
        (line,) = run.stderr.splitlines()
        assert line.startswith(message) and run.returncode == 1 and not list(tmp_path.iterdir())


RULE = "# " + "-" * 96 + "\n"


def without_sections(text, *sections):
    """The script without these sections, and without what calls them in RUN."""
    head, *parts = text.split(RULE + "# ")
    parts = {re.match(r"\w*", part)[0]: part for part in parts}
    trees = [ast.parse("# " + parts.pop(section)) for section in sections]
    names = {node.name for tree in trees for node in tree.body if hasattr(node, "name")}

    class Cut(ast.NodeTransformer):
        def visit(self, node):
            is_called = any(getattr(x, "id", None) in names for x in ast.walk(node))
            is_optional = isinstance(node, ast.With) and "optional(" in ast.unparse(node.items[0])
            if is_called and (is_optional or isinstance(node, (ast.Expr, ast.Assign))):
                return None
            node = self.generic_visit(node)
            return None if getattr(node, "body", True) == [] else node

    title, run = parts["RUN"].split("\n", 1)
    parts["RUN"] = f"{title}\n{RULE}{ast.unparse(Cut().visit(ast.parse(run)))}\n\n\n"
    return "".join([head, *(f"{RULE}# {part}" for part in parts.values())])


def test_without_its_optional_sections_the_script_trains_and_records(tmp_path):
    text = SCRIPT.read_text()
    script = tmp_path / "script.py"
    script.write_text(without_sections(text, "OFFLINE", "RESULTS"))
    assert len(script.read_text().splitlines()) < 0.85 * len(text.splitlines())
    arguments = f"{SMALL} --vault.uid cut --checkpoint.save --results.save"
    run = run_program(script, *arguments.split(), cwd=tmp_path)
    assert run.returncode == 0 and "failed" not in run.stderr, run.stderr
    vault = Vault("ff_ippo_rware", vault_uid="cut", rel_dir=str(tmp_path / "vaults"))
    assert vault.read().experience["done"].shape == (16, 32, 2)
    assert not list(tmp_path.glob("results/*/*/*"))


# ------------------------------------------------------------------------------------------------
# NOTEBOOK AND README
# ------------------------------------------------------------------------------------------------


def readme_code(heading, language="python"):
    """The code blocks of a section of the README."""
    section = re.split(r"^##+ ", (FOLDER / "README.md").read_text(), flags=re.M)
    (section,) = [text for text in section if text.startswith(heading)]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    assert blocks
    return blocks


def run_notebook(cwd, *cells):
    """Run cells in a real kernel, in `cwd`, and give what each printed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(cwd)}})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(FOLDER))
        kernel.execute()
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]


def test_the_pasted_file_runs_in_a_notebook(tmp_path):
    pasted, run, shown = run_notebook(
        tmp_path,
        SCRIPT.read_text(),
        f"config = tyro.cli(Config, args='{SMALL} --vault.og-marl'.split())\n"
        "result = run_experiment(config)",
        "print(result.num_timesteps, len(result.evaluation_returns))",
    )
    assert "run_experiment(Config())" in pasted
    assert "2/2" in run, "no progress bar"
    assert shown.split() == ["512", "2"]
    vault = Vault("ff_ippo_rware", vault_uid="small", rel_dir=str(tmp_path / "vaults"))
    assert vault.read().experience["done"].shape == (16, 32, 2)
    assert list(tmp_path.glob("vaults/*/rware/tiny-2ag.vlt/Replay"))


def test_percent_run_and_import_work_in_a_notebook(tmp_path):
    *_, shown = run_notebook(
        tmp_path,
        f"%run {SCRIPT} {SMALL} --vault.uid percent",
        "from ff_ippo_store_experience import Config, run_experiment",
        "from flashbax.vault import Vault\n"
        "vault = Vault('ff_ippo_rware', vault_uid='percent')\n"
        "print(vault.read().experience['done'].shape)",
    )
    assert "(16, 32, 2)" in shown


def test_readme_notebook_cells(tmp_path):
    train, *cells = readme_code("In a notebook")
    requirements = (FOLDER / "requirements.txt").read_text().splitlines()
    installed = re.findall(r"^%pip install -q (.*)\n", train, re.M)
    assert set(re.findall(r'"(.+?)"', " ".join(installed))) <= set(requirements)
    assert len(installed) == 2
    train = re.sub(r"^%pip.*\n", "", train, flags=re.M)
    small = train.replace("num_updates=50", "num_updates=2").replace("=10)", "=2)")
    assert small.count("=2)") == 2
    run_notebook(tmp_path, small, *cells)
    assert len(list(tmp_path.glob("vaults/*/*/metadata.json"))) == 1


def test_readme_reads_the_vault_back(recordings):
    vault = recordings("warehouse").result.config.vault
    (code,) = readme_code("Reading the vault")
    code = code.replace('"demo"', repr(vault.uid))
    checked = code + "\nassert experience['done'].shape == (16, 32, 2)"
    run = run_program("-c", checked, cwd=Path(vault.rel_dir).parent)
    assert run.returncode == 0, run.stderr
    assert "(16, 32, 2, 68)" in run.stdout and "(32, 2, 68)" in run.stdout


def test_readme_learns_offline(recordings, monkeypatch, capsys):
    monkeypatch.chdir(recordings("warehouse").folder)
    code = readme_code("Training offline")[-1]
    for name, value in (("UID", '"small"'), ("NUM_STEPS", "20"), ("NUM_EPISODES", "4")):
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", code, flags=re.M)
        assert count == 1, name
    code = re.sub(r"^PERCENTILES = .*$", "PERCENTILES = (50, 100)", code, flags=re.M)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "behaviour" in printed and printed.count("cloning_loss") == 3


def test_readme_trains_on_an_environment_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = readme_code("Your own environment")
    code, count = re.subn(r"num_(updates|evaluation)=\d+", r"num_\1=2", code)
    assert count == 2
    exec(compile(code, "README.md", "exec"), {})
    export, cut_off = capsys.readouterr().out.splitlines()[-2:]
    assert Path(export).is_dir() and re.fullmatch(r"\d+ of \d+ cut off", cut_off)


def test_readme_records_policies_and_reads_sequences(recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uid in ("short", "long"):
        checkpoints = recordings("warehouse").folder / "checkpoints/ff_ippo_rware/small"
        shutil.copytree(checkpoints, f"checkpoints/ff_ippo_rware/{uid}")
    (commands,) = readme_code("Recording a policy", "sh")
    for command in commands.splitlines():
        arguments = command.split(SCRIPT.name)[1]
        policy = ippo.run_experiment(small_config(arguments)).config.checkpoint.load_params
    assert policy == "checkpoints/ff_ippo_rware/long"
    (code,) = readme_code("Recording a policy")
    variables = {}
    exec(code, variables)
    assert_equal(variables["params"], ippo.load_params("checkpoints/ff_ippo_rware/long"))
    assert Path("vaults/ff_ippo_rware_expert/rware/tiny-2ag.vlt/Expert").is_dir()
    (code,) = readme_code("Changing the algorithm")
    exec(code.replace('"demo"', '"expert"'), variables)
    assert variables["batch"]["observation"].shape[:2] == (32, 20)


def test_readme_names_no_option_that_is_not_there():
    options = set(re.findall(r"--(\w+\.[\w-]+)", (FOLDER / "README.md").read_text()))
    known = {
        f"{group}.{no}{name.replace('_', '-')}"
        for group, fields in dataclasses.asdict(ippo.Config()).items()
        for name in fields
        for no in ("", "no-")
    }
    assert options <= known and len(options) > 5


# ------------------------------------------------------------------------------------------------
# FAULTS
# ------------------------------------------------------------------------------------------------

# A run whose every part is tiny: four environments, rollouts of 16 timesteps.
TINY_ARGUMENTS = """
    --system.rollout-length 16 --system.update-batch-size 1 --arch.num-envs 4
    --arch.num-eval-episodes 4 --arch.num-absolute-metric-eval-episodes 8 --env.time-limit 10
    --network.actor-layer-sizes 8 --network.critic-layer-sizes 8 --vault.save-interval 2
"""
EVALUATION_STEPS = 64  # 4 environments, 16 timesteps

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


def call_main(folder, arguments, patches):
    """What a process of `start_run` does."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name, value in patches.items():
        setattr(ippo, name, value)
    ippo.TASKS.update(WANDER)
    sys.argv = [str(SCRIPT), *arguments]
    ippo.main()


def start_run(folder, arguments, num_updates=5, **patches):
    """Begin a tiny run with the command line in `folder`, where its file `log` is; a process."""
    Path(folder).mkdir(exist_ok=True)
    count = ["--system.num-updates", str(num_updates), "--arch.num-evaluation", str(num_updates)]
    arguments = [*TINY_ARGUMENTS.split(), *count, *arguments.split()]
    process = FORK.Process(target=call_main, args=(folder, arguments, patches))
    process.start()
    return process


def finish_run(process, folder):
    """Wait for a run; its exit status and the lines of its log since the last such call."""
    process.join()
    text = Path(folder, "log").read_text()
    Path(folder, "log").unlink()
    return process.exitcode, text.splitlines()


def run(folder, arguments, **options):
    """A tiny run with the command line: its exit status and the lines it printed."""
    return finish_run(start_run(folder, arguments, **options), folder)


def wait_for(condition, seconds=60):
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


def experiment(folder, num_updates=5, **groups):
    """What `run` does, in this process: `run_experiment`'s result, or its error."""
    defaults = {
        "system": {"rollout_length": 16, "update_batch_size": 1, "num_updates": num_updates},
        "arch": {
            "num_envs": 4,
            "num_evaluation": num_updates,
            "num_eval_episodes": 4,
            "num_absolute_metric_eval_episodes": 8,
        },
        "env": {"time_limit": 10},
        "network": {"actor_layer_sizes": (8,), "critic_layer_sizes": (8,)},
        "vault": {"save_interval": 2, "uid": "a"},
    }
    config = ippo.Config()
    for group in dataclasses.fields(config):
        changes = {**defaults.get(group.name, {}), **groups.get(group.name, {})}
        part = dataclasses.replace(getattr(config, group.name), **changes)
        config = dataclasses.replace(config, **{group.name: part})
    with contextlib.chdir(folder):
        return ippo.run_experiment(config)


def read_leaves(folder, uid="a"):
    """Leaves (NE, any, ...) of a tiny run's vault, read with Flashbax alone."""
    vault = Vault("ff_ippo_rware", vault_uid=uid, rel_dir=str(Path(folder, "vaults")))
    return jax.tree.map(np.asarray, vault.read().experience)


def read_metrics(folder, uid="a"):
    """A tiny run's metrics.json, without the times, from the first evaluation to the metric."""
    text = Path(folder, "results", "ff_ippo_rware", uid, "metrics.json").read_text()
    text = re.sub(r'"(elapsed_time|steps_per_second)": \[?[^],}]*\]?', r'"\1": 0', text)
    return json.loads(text)


def check_equal(folder, other, uid="a", length=None):
    """Two folders hold the same recording and metrics; or a beginning of `length` timesteps."""
    leaves, others = read_leaves(folder, uid), read_leaves(other)
    for name in others:
        np.testing.assert_array_equal(leaves[name], others[name][:, :length], err_msg=name)
    if length is None:
        assert read_metrics(folder, uid) == read_metrics(other)


def one_error(lines, *words):
    """The lines have one error, no traceback, and every word in it."""
    assert not any("Traceback" in line for line in lines), lines
    (error,) = (line for line in lines if line.startswith("error:"))
    assert lines[-1] == error, lines
    assert all(word in error for word in words), error
    return error


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the result of an uninterrupted tiny run: 5 evaluations, none at the end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, experiment(folder)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run's folder, to be damaged."""
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy"


# ---- one recording, one folder -----------------------------------------------------------------


def test_processes_started_at_once_record_into_folders_of_their_own(tmp_path):
    arguments = ("", "", "--vault.uid same", "--vault.uid same")
    rel_dirs = "--vault.rel-dir {0}/v --checkpoint.rel-dir {0}/c --results.no-save"
    rel_dirs = rel_dirs.format(tmp_path)
    processes = [  # each with a log of its own
        start_run(tmp_path / str(index), f"{argument} {rel_dirs}", num_updates=1)
        for index, argument in enumerate(arguments)
    ]
    ends = [finish_run(each, tmp_path / str(index)) for index, each in enumerate(processes)]
    assert [status for status, _ in ends[:2]] == [0, 0]
    assert sorted(status for status, _ in ends[2:]) == [0, 1]
    one_error(max(ends[2:], key=lambda end: end[0])[1], "same", "exists already")
    assert len(list(tmp_path.glob("v/ff_ippo_rware/*"))) == 3
    for path in tmp_path.glob("v/ff_ippo_rware/*"):
        assert Vault("ff_ippo_rware", vault_uid=path.name, rel_dir=f"{tmp_path}/v").vault_index


def test_a_library_user_cannot_record_twice_into_one_folder(tmp_path):
    config = ippo.VaultConfig(uid="a", rel_dir=str(tmp_path), save_interval=1)
    experience = synthetic(1)[0]
    rows = ippo.reshape_experience(experience)
    with ippo.Recorder(config, experience, {}, MESH) as recorder:
        with pytest.raises(ippo.ConfigError, match="exists already"):
            ippo.Recorder(config, experience, {}, MESH)
        with pytest.raises(ippo.ConfigError, match="another process is recording"):
            ippo.Recorder(config, experience, {}, MESH, num_written=0)
        with pytest.raises(ippo.ConfigError, match="exists already"):
            ippo.make_vault(config, rows, 4, {})
        recorder.add(experience)
    assert Vault(config.name, vault_uid="a", rel_dir=str(tmp_path)).vault_index == 4

    def make(_):
        with contextlib.suppress(ippo.ConfigError):
            return ippo.make_vault(dataclasses.replace(config, uid="b"), rows, 4, {})

    with ThreadPoolExecutor(4) as threads:
        assert sum(vault is not None for vault in threads.map(make, range(4))) == 1


def test_nothing_is_overwritten_without_a_word(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for group in ("vault", "checkpoint", "results"):
        groups = ("vault", "checkpoint", "results")
        no_save = {each: {"save": False} for each in groups if each != group}
        with pytest.raises(ippo.ConfigError, match="'a' exists already"):
            experiment(copy, **no_save)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_refused_configuration_leaves_its_uid_free(tmp_path):
    for changes in ({"max_length": 64}, {"max_length": 10**15}):
        with pytest.raises(ippo.ConfigError, match=r"vault.max_length"):
            experiment(tmp_path, vault=changes)
        assert not list(tmp_path.rglob("a")), "the same command, put right, would be refused"


# ---- resume, bit for bit -----------------------------------------------------------------------


RESUME = {"checkpoint": {"resume": True}}


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The folder of a run that was stopped in its fourth evaluation, past its last checkpoint."""
    evaluate, count = ippo.make_evaluate, itertools.count()

    def interrupt(*arguments):
        function = evaluate(*arguments)

        def call(*arguments):
            if next(count) == 3:
                raise KeyboardInterrupt(2)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(ippo, "make_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            experiment(tmp_path)
    assert len(read_leaves(tmp_path)["done"][0]) == 4 * 16  # one evaluation past the checkpoint
    return tmp_path


def test_a_resumed_run_equals_an_uninterrupted_one(interrupted, whole):
    for setting in ("system.seed", "network.actor_layer_sizes", "vault.save_interval"):
        group, name = setting.split(".")
        changes = {"seed": 7, "actor_layer_sizes": (16,), "save_interval": 3}
        with pytest.raises(ippo.ConfigError, match=setting) as error:
            experiment(interrupted, **{group: {name: changes[name]}, **RESUME})
        assert "\n" not in str(error.value)
    result = experiment(interrupted, **RESUME)
    folder, expected = whole
    check_equal(interrupted, folder)
    assert result.absolute_metric == expected.absolute_metric
    np.testing.assert_array_equal(result.evaluation_returns, expected.evaluation_returns)
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)


def test_a_finished_run_grows(tmp_path, whole):
    experiment(tmp_path, num_updates=2)
    experiment(tmp_path, **RESUME)
    check_equal(tmp_path, whole[0])
    with pytest.raises(ippo.ConfigError, match=r"arch.num_evaluation is 2, but 5 are done"):
        experiment(tmp_path, num_updates=2, **RESUME)


def test_resuming_without_a_checkpoint_begins_only_where_nothing_is_recorded(
    tmp_path, whole, copy, capsys
):
    experiment(tmp_path, **RESUME)
    assert "there is no checkpoint" in capsys.readouterr().out
    check_equal(tmp_path, whole[0])
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ippo.ConfigError, match="'a' holds data"):
        experiment(copy, **RESUME)
    check_equal(copy, whole[0])


def test_a_vault_shorter_than_its_checkpoint_is_not_resumed_with_a_hole(copy):
    vault = Vault("ff_ippo_rware", vault_uid="a", rel_dir=str(copy / "vaults"))
    vault._vault_index_ds.write(32).result()
    with pytest.raises((ippo.ConfigError, ippo.RecordingError), match="vault"):
        experiment(copy, num_updates=6, **RESUME)


def test_what_a_killed_write_left_does_not_spoil_the_next(interrupted, whole):
    path = interrupted / "vaults" / "ff_ippo_rware" / "a"
    (path / "manifest.ocdbt.__lock").write_bytes(bytes(3000))  # TensorStore would write into it
    experiment(interrupted, **RESUME)
    check_equal(interrupted, whole[0])


def test_load_params_gives_the_best_parameters_back(whole, tmp_path):
    folder, result = whole
    path = folder / "checkpoints" / "ff_ippo_rware" / "a"
    jax.tree.map(np.testing.assert_array_equal, ippo.load_params(path), result.params)
    groups = {
        "system": {"learn": False},
        "checkpoint": {"save": False, "load_params": str(path)},
        "results": {"save": False},
    }
    recorded = experiment(tmp_path, num_updates=1, **groups)
    jax.tree.map(np.testing.assert_array_equal, recorded.params, result.params)
    with pytest.raises(ippo.ConfigError, match=r"checkpoint.load_params .* has other networks"):
        experiment(tmp_path, vault={"uid": "b"}, network={"actor_layer_sizes": (16,)}, **groups)


# ---- signals -----------------------------------------------------------------------------------


def slow_write(vault, experience, write=ippo.write_vault):
    """A disk that takes its time."""
    time.sleep(60)
    return write(vault, experience)


def test_signals_stop_a_run_with_all_that_was_logged_recorded(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    folders = [tmp_path / number.name for number in numbers]
    processes = [start_run(folder, "--vault.uid a", num_updates=10**5) for folder in folders]
    for folder in folders:
        wait_for(lambda: len(logged(folder)) > 3)  # lines are in the file as they are printed
    resume = f"--vault.uid a --checkpoint.resume --vault.rel-dir {folders[0]}/vaults"
    resume += f" --checkpoint.rel-dir {folders[0]}/checkpoints"
    status, lines = run(tmp_path / "second", resume, num_updates=10**5)
    assert status == 1
    one_error(lines, "another process is recording into")
    for number, process, folder in zip(numbers, processes, folders, strict=True):
        os.kill(process.pid, number)
        process.join(20)
        steps = logged(folder)
        status, lines = finish_run(process, folder)
        assert status == 128 + number
        end = f"stopped by {number.name} after {len(steps)} of 100000 evaluations: to go on, run"
        assert lines[-1].startswith(end)
        assert lines[-2].startswith("step")
        length = Vault("ff_ippo_rware", vault_uid="a", rel_dir=str(folder / "vaults")).vault_index
        assert length % 16 == 0
        assert length * 4 >= steps[-1]


def test_a_second_signal_stops_at_once(tmp_path):
    process = start_run(tmp_path, "--vault.uid a", num_updates=100, write_vault=slow_write)
    wait_for(lambda: logged(tmp_path))
    for alive in (True, False):
        os.kill(process.pid, signal.SIGTERM)
        process.join(2)
        assert process.is_alive() == alive
    assert process.exitcode == -signal.SIGTERM


# ---- a full disk -------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path, size):
    """A disk of `size` at `path`, while the context is open."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("group", ["vault", "checkpoint"])
def test_a_full_disk_is_told_and_the_run_goes_on_after_room_is_made(tmp_path, whole, group):
    disk = tmp_path / f"{group}s"
    size = {"vault": "96k", "checkpoint": "300k"}[group]
    with small_disk(disk, size):
        status, lines = run(tmp_path, "--vault.uid a")
        assert status == 1
        assert any(line.startswith("step") for line in lines), lines
        one_error(lines, str(disk), "room", "resume")
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        status, lines = run(tmp_path, "--vault.uid a --checkpoint.resume")
        assert status == 0, lines
        check_equal(tmp_path, whole[0])


@pytest.mark.parametrize("group", ["vault", "checkpoint"])
def test_a_disk_that_is_full_from_the_beginning(tmp_path, whole, group):
    disk = tmp_path / f"{group}s"
    with small_disk(disk, "8k"):
        (disk / "other").write_bytes(bytes(8192))
        with pytest.raises(ippo.RecordingError, match=f"(?s){disk}.*room"):
            experiment(tmp_path)
        (disk / "other").unlink()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        experiment(tmp_path, **RESUME)
        check_equal(tmp_path, whole[0])
        assert not list(disk.rglob(".*")), "nothing is left of what failed"


def test_results_on_a_full_disk_are_only_missed(tmp_path, whole):
    disk = tmp_path / "results"
    with small_disk(disk, "8k"):
        (disk / "other").write_bytes(bytes(4096))
        with pytest.warns(UserWarning, match="failed: .*No space left") as warned:
            result = experiment(tmp_path)
        assert any("metrics.json" in str(warning.message) for warning in warned)
    assert result.absolute_metric == whole[1].absolute_metric
    check_equal(tmp_path, whole[0], length=5 * 16)


# ---- not a number ------------------------------------------------------------------------------


def test_training_that_diverges_stops_with_what_came_before_recorded(tmp_path):
    arguments = "--vault.uid a --system.actor-lr 1e30 --vault.extra-leaves log_prob value"
    status, lines = run(tmp_path, arguments)
    assert status == 1
    error = one_error(lines, "not a number", "system.actor_lr")
    step = int(re.search(r"at step ([\d,]+)", error)[1].replace(",", ""))
    leaves = read_leaves(tmp_path)
    num_evaluations = leaves["done"].shape[1] // 16
    assert step == (num_evaluations + 1) * EVALUATION_STEPS
    assert sum(line.startswith("step") for line in lines) == num_evaluations
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


# ---- damaged files -----------------------------------------------------------------------------


def damage(path, how):
    """Cut the file `path` in half, empty it, or delete it."""
    if how == "delete":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if how == "truncate" else b"")


def newest(folder, pattern):
    """The newest file of a pattern; older ones may be of an earlier write, and not be read."""
    return max(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def check_one_line(error, *words):
    """The error's message is one line with every word."""
    message = str(error.value)
    assert "\n" not in message, message
    assert len(message) < 600, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("how", ["truncate", "empty", "delete"])
@pytest.mark.parametrize("pattern", ["metadata.json", "manifest.ocdbt", "d/*"])
def test_a_damaged_vault_is_told_in_one_line(copy, pattern, how):
    path = copy / "vaults" / "ff_ippo_rware" / "a"
    damage(newest(path, pattern), how)
    with pytest.raises(ippo.RecordingError) as error:
        ippo.load_episodes("ff_ippo_rware", "a", str(copy / "vaults"))
    check_one_line(error, str(path), "damaged")


def test_a_vault_of_another_program_is_told_in_one_line(tmp_path):
    experience = {"done": jnp.zeros((2, 8, 2), bool), "reward": jnp.zeros((2, 8, 2))}
    Vault("other", experience, rel_dir=str(tmp_path), vault_uid="a")
    with pytest.raises(ippo.RecordingError) as error:
        ippo.load_episodes("other", "a", str(tmp_path))
    check_one_line(error, str(tmp_path))


@pytest.mark.parametrize("how", ["truncate", "delete"])
@pytest.mark.parametrize("pattern", ["5/state/d/*", "5/state/manifest.ocdbt", "5/state/_METADATA"])
def test_damaged_parameters_are_told_in_one_line(copy, pattern, how):
    path = copy / "checkpoints" / "ff_ippo_rware" / "a"
    damage(newest(path, pattern), how)
    with pytest.raises(ippo.RecordingError) as error:
        ippo.load_params(path)
    check_one_line(error, str(path))


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("checkpoints/**/5/run/metadata", "truncate"),
        ("checkpoints/**/5/state/d/*", "delete"),
        ("checkpoints/**/5/state/_METADATA", "delete"),
        ("vaults/**/metadata.json", "truncate"),
        ("vaults/**/manifest.ocdbt", "empty"),
    ],
)
def test_resuming_from_damaged_files_is_refused_in_one_line(copy, pattern, how):
    damage(newest(copy, pattern), how)
    with pytest.raises(ippo.RecordingError) as error:
        experiment(copy, num_updates=6, **RESUME)
    check_one_line(error, str(copy))


# ---- an interrupted export, memory, and nothing to write ----------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(2), OSError(28, "No space left on device")])
def test_an_interrupted_export_has_no_name(copy, monkeypatch, error):
    arguments = "ff_ippo_rware", "a", str(copy / "vaults")
    iterate = functools.partial(ippo.iterate_episodes, num_steps=EVALUATION_STEPS)
    monkeypatch.setattr(ippo, "iterate_episodes", iterate)
    calls, write = itertools.count(), ippo.write_vault

    def fail(*arguments):
        if next(calls) == 2:
            raise error
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ippo, "write_vault", fail)
        kind = type(error) if isinstance(error, KeyboardInterrupt) else ippo.RecordingError
        with pytest.raises(kind):
            ippo.export_og_marl(*arguments)
    assert not list(copy.rglob("Replay"))
    path = ippo.export_og_marl(*arguments)
    rel_dir, name = path.parents[1], path.parent.name
    exported = Vault(name, vault_uid="Replay", rel_dir=str(rel_dir)).read().experience
    episodes = ippo.load_episodes(*arguments)
    np.testing.assert_array_equal(exported["actions"][0], episodes.transitions["action"])
    assert [child.name for child in path.parent.iterdir()] == ["Replay"]


@pytest.mark.parametrize(
    ("setting", "option"),
    [("--vault.max-length 999999999999999", "vault.max_length"),
     ("--arch.num-envs 1000000000", "arch.num_envs"),
     ("--vault.save-interval 1000000000", "vault.save_interval")],
)  # fmt: skip
def test_memory_that_is_not_there_is_told_with_the_option(tmp_path, setting, option):
    status, lines = run(tmp_path, f"--vault.uid a {setting}")
    assert status == 1, lines
    one_error(lines, option)


def test_writing_no_timesteps_changes_nothing(tmp_path):
    config = ippo.VaultConfig(uid="a", rel_dir=str(tmp_path))
    rows = ippo.reshape_experience(synthetic(1)[0])
    vault = ippo.make_vault(config, rows, 4, {})
    nothing = jax.tree.map(lambda x: x[:, :0], rows)
    lengths = [ippo.write_vault(vault, x) for x in (nothing, rows, nothing, rows, nothing)]
    assert lengths == [0, 4, 0, 4, 0]
    written = Vault(config.name, vault_uid="a", rel_dir=str(tmp_path)).read().experience
    np.testing.assert_array_equal(written["x"], np.concatenate([rows["x"]] * 2, axis=1))


# ---- every timestep exactly once ---------------------------------------------------------------

MESH = Mesh(np.array(jax.devices()), ("device",))


def synthetic(num_rollouts):
    """Experience whose every number is its own: leaves (D=1, NU=2, UB=1, T=4, NE=3)."""
    numbers = np.arange(num_rollouts * 24, dtype=np.int32).reshape(num_rollouts, 1, 2, 1, 4, 3)
    return [{"x": jnp.asarray(x), "y": jnp.asarray(x[..., None] % 7 == 0)} for x in numbers]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_timestep_is_recorded_exactly_once(data):
    num_rollouts = data.draw(st.integers(0, 9), "rollouts")
    save_interval = data.draw(st.integers(1, 5), "save_interval")
    # From the smallest buffer that is accepted; not always a whole number of rollouts.
    max_length = 24 * (save_interval + 1) + data.draw(st.integers(0, 60), "more")
    max_length = data.draw(st.sampled_from([None, max_length]), "max_length")
    stop = data.draw(st.integers(0, num_rollouts), "stopped after")
    saved = data.draw(st.integers(0, stop), "last checkpoint")
    experience = synthetic(num_rollouts + 1)
    rows = [ippo.reshape_experience(x) for x in experience[:num_rollouts]]
    with tempfile.TemporaryDirectory() as rel_dir:
        config = ippo.VaultConfig(
            uid="a", rel_dir=rel_dir, save_interval=save_interval, max_length=max_length
        )
        for num_written, begin, end in ((None, 0, stop), (saved, saved, num_rollouts)):
            with ippo.Recorder(config, experience[0], {}, MESH, num_written) as recorder:
                for index in range(begin, end):
                    recorder.add(experience[index])
                    if index % save_interval == 0:
                        recorder.write()
            assert recorder.num_written == end
        vault = Vault(config.name, vault_uid="a", rel_dir=rel_dir)
        written = vault.read().experience
        assert vault.vault_index == num_rollouts * 4
        for name in ("x", "y") if num_rollouts else ():
            expected = np.concatenate([x[name] for x in rows], axis=1)
            np.testing.assert_array_equal(written[name], expected)


# ------------------------------------------------------------------------------------------------
# SOAK: python test_script.py --soak 1000
# ------------------------------------------------------------------------------------------------

SOAK_EVALUATIONS = 30


class WanderState(NamedTuple):
    """Of a `Wander`."""

    key: jax.Array
    step_count: jax.Array


class Wander(Environment):
    """Observations that are drawn anew in each step: traced in a fraction of a warehouse's time."""

    time_limit = 10
    action_spec = specs.MultiDiscreteArray(np.full(2, 5))
    observation_spec = None

    def reset(self, key):
        state = WanderState(key, jnp.int32(0))
        return state, restart(self.observe(state))

    def step(self, state, action):
        state = WanderState(jax.random.split(state.key)[0], state.step_count + 1)
        reward = (action == state.step_count % 5).mean()
        timestep = transition(reward, self.observe(state))
        last = state.step_count >= self.time_limit
        return state, timestep.replace(step_type=jnp.where(last, 2, 1).astype(jnp.int8))

    def observe(self, state):
        view = jax.random.normal(state.key, (2, 4))
        return ippo.Observation(view, jnp.ones((2, 5), bool))


WANDER = {
    "wander": ippo.Task(lambda time_limit: Wander(), 10, "Wander", "rware", scenario="wander")
}
SOAK_RUN = "--vault.uid a --env.scenario wander"


def soak_check(folder, expected):
    """Compare a vault, read with Flashbax alone, with the uninterrupted run's.

    Returns:
        How many timesteps of the environments were compared, are missing of those of which the
        log says that they are written, are there too often, and differ.
    """
    path = Path(folder, "vaults", "ff_ippo_rware", "a")
    log = Path(folder, "log").read_text() if Path(folder, "log").exists() else ""
    promised = [0, *re.findall(r"vault written to ([\d,]+)$|^vault: ([\d,]+)", log, re.M)]
    promised = int("".join(promised[-1]).replace(",", "")) if promised[-1] else 0
    if not path.exists():
        return 0, promised, 0, 0
    with contextlib.redirect_stdout(io.StringIO()):
        vault = Vault("ff_ippo_rware", vault_uid="a", rel_dir=str(path.parents[1]))
    length = vault.vault_index
    experience = jax.tree.map(np.asarray, vault.read().experience) if length else {}
    differ = np.zeros((EVALUATION_STEPS // 16, length), bool)
    for name, leaf in experience.items():
        same = leaf[:, : expected[name].shape[1]] == expected[name][:, :length]
        same = same.reshape(*same.shape[:2], -1).all(axis=-1)
        differ[:, : same.shape[1]] |= ~same
    rows, limit = len(differ), SOAK_EVALUATIONS * 16
    assert length % 16 == 0, f"the length {length} is not a whole number of rollouts"
    return (
        rows * min(length, limit),
        max(0, promised - rows * length),
        rows * max(0, length - limit),
        int(differ.sum()),
    )


def soak(num_kills):
    """Kill tiny runs at random moments and resume them, `num_kills` times, and compare.

    Two recordings at a time; each is killed and resumed until it is finished, then compared whole
    with a run that was never interrupted.  Ends with exit status 1 if anything differs.
    """
    totals, problems, lock = [0] * 6, [], threading.Lock()
    begin = time.monotonic()

    def check(readers, folder, expected):
        counts = readers.submit(soak_check, folder, expected).result()
        with lock:
            for index, count in enumerate(counts):
                totals[2 + index] += count
        if any(counts[1:]):
            raise AssertionError(f"lost, duplicated, different: {counts[1:]}")

    def record(number, root, duration, readers, expected):
        """One recording, from its beginning to its end, however often it is killed."""
        folder, resume, moments = Path(root, str(number)), "", []
        choose = random.Random(number)
        while True:
            process = start_run(folder, SOAK_RUN + resume, SOAK_EVALUATIONS)
            resume = " --checkpoint.resume"
            moments.append(None if choose.random() < 0.25 else choose.uniform(0, duration))
            process.join(moments[-1])
            if process.is_alive():
                process.kill()
                process.join()
                check(readers, folder, expected)
                Path(folder, "log").unlink(missing_ok=True)
                with lock:
                    totals[0] += 1
                continue
            check(readers, folder, expected)
            assert process.exitcode == 0, f"exit status {process.exitcode}"
            assert "done in" in Path(folder, "log").read_text()
            rows = EVALUATION_STEPS // 16
            with contextlib.redirect_stdout(io.StringIO()):
                length = read_leaves(folder)["done"].shape[1]
            missing = rows * (SOAK_EVALUATIONS * 16 - length)
            assert missing == 0, f"{missing} timesteps are missing at the end"
            assert read_metrics(folder) == read_metrics(Path(root, "whole"))
            shutil.rmtree(folder)
            with lock:
                totals[1] += 1
            return

    def work(*arguments):
        while totals[0] < num_kills and not problems:
            with lock:
                number = next(numbers)
            try:
                record(number, *arguments)
            except Exception as error:
                log = Path(arguments[0], str(number), "log")
                tail = log.read_text()[-3000:] if log.exists() else ""
                problems.append(f"recording {number}: {error}\n{tail}")
            report()

    def report():
        kills, recordings, compared, lost, duplicated, different = totals
        seconds = (time.monotonic() - begin) / max(1, kills)
        print(
            f"{kills:,} kills, {recordings:,} recordings finished, {compared:,} timesteps "
            f"compared, {lost} lost, {duplicated} duplicated, {different} different, "
            f"{seconds:.1f} s a kill",
            file=sys.__stdout__,  # which no redirection of the other thread hides
            flush=True,
        )

    numbers = itertools.count()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(root, "cache"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for folder in ("compile", "whole"):  # the first fills the cache
            start = time.monotonic()
            status, lines = run(Path(root, folder), SOAK_RUN, num_updates=SOAK_EVALUATIONS)
            assert status == 0, lines
        duration = 1.2 * (time.monotonic() - start)  # two at a time are slower
        expected = read_leaves(Path(root, "whole"))
        print(f"an uninterrupted run takes {duration / 1.2:.1f} s", flush=True)
        begin = time.monotonic()
        with ProcessPoolExecutor(2, mp_context=FORK) as readers, ThreadPoolExecutor(2) as workers:
            arguments = root, duration, readers, expected
            for future in [workers.submit(work, *arguments) for _ in range(2)]:
                future.result()
        report()
        if problems:
            folder = tempfile.mkdtemp(prefix="soak")
            shutil.copytree(root, folder, dirs_exist_ok=True)
            sys.exit("\n".join([*problems, f"what was on the disk is in {folder}"]))


# ------------------------------------------------------------------------------------------------
# BENCHMARK: python test_script.py
# ------------------------------------------------------------------------------------------------

REPEATS = 20


def seconds(function, *arguments):
    """How long a call takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def original_env_steps(config, auto_reset):
    """Steps of Jumanji's environment alone, with random legal actions, as the original does them.

    Returns:
        A function of nothing that makes T steps of UB * NE environments, on one device.
    """
    env = jumanji_env(config.env.scenario, config.env.time_limit)
    num_envs = config.system.update_batch_size * config.arch.num_envs

    def step_env(state, action):
        state, timestep = env.step(state, action)

        def reset(state, timestep):
            state, first = env.reset(jax.random.split(state.key)[0])
            return state, timestep.replace(observation=first.observation)

        if auto_reset:
            state, timestep = jax.lax.cond(
                timestep.last(), reset, lambda *same: same, state, timestep
            )
        return state, timestep

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


def benchmark(config):
    """Print the figures of this machine, each the median of several repeats, as a table."""
    compiled = []
    handler = logging.Handler()
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

    output = learn(state)
    num_updates = output.experience["done"].shape[1]
    steps_per_call = math.prod(output.experience["done"].shape[:5])
    x = jnp.ones((4096, 4096))
    folder = tempfile.TemporaryDirectory()
    vault = dataclasses.replace(config.vault, rel_dir=f"{folder.name}/vaults")
    results = dataclasses.replace(config.results, rel_dir=f"{folder.name}/results")
    recorder = ippo.Recorder(vault, output.experience, {}, mesh)
    written = jax.device_get(ippo.reshape_experience(output.experience))
    save_interval = config.vault.save_interval
    written = jax.tree.map(lambda x: np.concatenate([x] * save_interval, axis=1), written)
    evaluation = ippo.Evaluation(10**6, 1.0, 1.0, np.zeros(32, np.float32), None, 0.0, 0, {})
    write_metrics = functools.partial(
        ippo.write_metrics,
        dataclasses.replace(config, vault=vault, results=results),
        ippo.find_task(config.env),
    )
    ippo.run_path(results.rel_dir, vault).mkdir(parents=True)

    def block(state, record=False):  # what lies between two writes, which is beside the later calls
        for index in range(save_interval):
            output = jax.block_until_ready(learn(state))
            state = output.state
            if record:
                recorder.add(output.experience)
                if index == 0:
                    recorder.write()
        if record:
            recorder.wait()

    measured = {
        "env": (original_env_steps(config, auto_reset=True),),
        "env, no reset": (original_env_steps(config, auto_reset=False),),
        "matmul": (jax.jit(jnp.matmul), x, x),
        "train": (block, state),  # each time from the state after a few updates
        "record": (block, state, True),
        "vault": (ippo.write_vault, recorder.vault, written),
        "metrics": (write_metrics, [evaluation] * 10_000),
    }
    if config.checkpoint.load_params:
        params = ippo.load_params(config.checkpoint.load_params)
        actor, critic = (
            each.replace(params=jax.device_put(new, ippo.shardings(mesh)[0]))
            for each, new in zip(state[:2], params, strict=True)
        )
        measured["trained"] = (block, state._replace(actor=actor, critic=critic))
    times = collections.defaultdict(list)
    for _ in range(REPEATS + 1):  # all figures in turn, so that a slow moment meets them all
        for name, call in measured.items():
            times[name].append(seconds(*call))
    size = sum(file.stat().st_size for file in recorder.path.rglob("*") if file.is_file())
    bytes_per_step = size / (recorder.vault.vault_index * recorder.num_rows)
    times = {name: np.median(values[1:]) for name, values in times.items()}  # the first compiles

    system = config.system
    num_env_steps = system.rollout_length * system.update_batch_size * config.arch.num_envs
    steps = dict.fromkeys(measured, save_interval * steps_per_call)
    steps |= {"env": num_env_steps, "env, no reset": num_env_steps}
    speed = {name: steps[name] / times[name] for name in measured}
    matmul_speed = 2 * 4096**3 / times["matmul"]
    observation = ippo.observation_shape(env)
    flops = mesh.size * count_update_flops(
        config, *observation.action_mask.shape, observation.agents_view.shape[1]
    )
    update_speed = flops * save_interval * num_updates / times["train"]
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
    if "trained" in measured:
        rows["train, trained policy"] = (
            f"{speed['trained']:,.0f} steps/s with {config.checkpoint.load_params}, "
            f"{times['trained'] / times['train']:.2f} times the time"
        )
    growing = {}
    for num_envs in (16, 64, 256, 1024):
        arch = dataclasses.replace(config.arch, num_envs=num_envs)
        larger = dataclasses.replace(system, num_updates=config.arch.num_evaluation)
        _, state, learn, _ = learner_parts(dataclasses.replace(config, arch=arch, system=larger))
        for _ in range(2):
            state = jax.block_until_ready(learn(state)).state
        growing[num_envs] = learn, state

    def train_with(num_envs):  # as many steps whatever the number of environments
        learn, state = growing[num_envs]
        for _ in range(1024 // num_envs):
            state = jax.block_until_ready(learn(state)).state

    times = {num_envs: [] for num_envs in growing}
    for _ in range(REPEATS // 5):  # they take longer
        for num_envs in growing:
            times[num_envs].append(seconds(train_with, num_envs))
    num_steps = mesh.size * system.rollout_length * system.update_batch_size * 1024
    for num_envs in growing:
        speed = num_steps / np.median(times[num_envs])
        rows[f"train, num_envs {num_envs}"] = f"{speed:,.0f} steps/s"
    folder.cleanup()
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    print(f"{os.cpu_count()} cores, {device}, JAX {jax.__version__}\n")
    print("| figure | |\n| --- | --- |")
    for name, text in rows.items():
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--soak"]:
        soak(int(sys.argv[2]))
        sys.exit()
    benchmark(ippo.check_config(tyro.cli(ippo.Config), len(jax.devices())))
