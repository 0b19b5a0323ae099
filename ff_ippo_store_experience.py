#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7.0,<0.11",
#     "jaxlib>=0.7.0,<0.11",
#     "flashbax>=0.1.3,<0.2",
#     "flax>=0.11.0,<0.13",
#     "optax>=0.2.5,<0.3",
#     "distrax>=0.1.7,<0.2",
#     "jumanji>=1.1.2,<1.2",
#     "chex>=0.1.90,<0.2",
#     "orbax-checkpoint>=0.11.22,<0.13",
#     "tyro>=0.9.0,<2",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Train independent PPO and record every transition into a Flashbax Vault.

    python ff_ippo_store_experience.py --system.num-updates 10 --arch.num-evaluation 2

or, from Python, `run_experiment(Config())`.  The system is Mava's Anakin IPPO
(https://github.com/instadeepai/Mava); the file reads in the order in which data flows.

Shapes are given in these letters, on every array and in every docstring:

    D   devices                          N   agents
    NU  updates per evaluation           O   features of one agent's observation
    UB  update batch size                A   actions
    T   timesteps per rollout            B   any batch of environments, within a device UB * NE
    NE  environments                     E   evaluations

Each device holds UB sets of NE environments, each with a random key of its own; the gradient is the
mean over all sets and devices.
"""

import builtins
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import io
import json
import logging
import math
import operator
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints
from unittest import mock

import chex
import distrax
import flashbax as fbx
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
import tyro
from chex import Array, ArrayTree, PRNGKey
from flashbax.buffers.trajectory_buffer import TrajectoryBuffer, TrajectoryBufferState
from flashbax.vault import Vault
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tqdm import tqdm

# ---- CONFIGURATION -------------------------------------------------------------------------------


def bounded(kind: Any, words: str, holds: Callable[[Any], bool]) -> Any:
    """The type of a field that has a bound, whose words stand in its help and in its error."""
    hint = tyro.conf.arg(help_behavior_hint=lambda default: f"({words}; default: {default})")
    return Annotated[kind, words, holds, hint]


Count = bounded(int, "at least 1", lambda value: value >= 1)
OptionalCount = bounded(int | None, "at least 1", lambda value: value is None or value >= 1)
Seed = bounded(int, "from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
Positive = bounded(float, "above 0", lambda value: value > 0)
NotNegative = bounded(float, "at least 0", lambda value: value >= 0)
Fraction = bounded(float, "from 0 to 1", lambda value: 0 <= value <= 1)
LayerSizes = bounded(
    tuple[int, ...], "layers of at least 1 unit", lambda sizes: all(size >= 1 for size in sizes)
)


@dataclass(frozen=True)
class SystemConfig:
    """Independent PPO, with Mava's defaults."""

    total_timesteps: OptionalCount = None  # environment steps in all; if set, decides num_updates
    num_updates: Count = 1000  # PPO updates in all, a multiple of arch.num_evaluation
    seed: Seed = 42  # seed of every random number
    learn: bool = True  # update the policy; without, it is recorded as it is
    add_agent_id: bool = True  # put a one-hot of the agent's index in front of its observation
    actor_lr: Positive = 2.5e-4  # Adam's learning rate for the actor
    critic_lr: Positive = 2.5e-4  # Adam's learning rate for the critic
    update_batch_size: Count = 2  # environment sets per device; their gradients are averaged (UB)
    rollout_length: Count = 128  # timesteps of each environment between updates (T)
    ppo_epochs: Count = 4  # passes over the transitions of a rollout
    num_minibatches: Count = 2  # minibatches in each pass, dividing rollout_length * arch.num_envs
    gamma: Fraction = 0.99  # discount per timestep
    gae_lambda: Fraction = 0.95  # lambda of the generalised advantage estimate
    clip_eps: Positive = 0.2  # clip range of the probability ratio and of the value
    ent_coef: NotNegative = 0.01  # entropy coefficient
    vf_coef: NotNegative = 0.5  # value loss coefficient
    max_grad_norm: Positive = 0.5  # global norm to which gradients are clipped


@dataclass(frozen=True)
class ArchConfig:
    """Anakin: how much runs side by side, and how often it is evaluated."""

    num_envs: Count = 16  # environments in each of the system.update_batch_size sets (NE)
    num_evaluation: Count = 200  # evaluations, evenly spaced over training (E)
    num_eval_episodes: Count = 32  # episodes per evaluation, a multiple of the number of devices
    num_absolute_metric_eval_episodes: Count = 320  # episodes for the absolute metric
    absolute_metric: bool = True  # evaluate the best parameters once more at the end
    evaluation_greedy: bool = False  # evaluate the most probable action instead of a sampled one
    distributed: bool = False  # be one of several processes, each with devices of its own
    coordinator_address: str | None = None  # of process 0, host:port, if the cluster does not say
    num_processes: OptionalCount = None  # processes in all, if the cluster does not say
    process_id: int | None = None  # which of them this is, from 0, if the cluster does not say


@dataclass(frozen=True)
class EnvConfig:
    """The task."""

    # one of TASKS, such as small-4ag (RobotWarehouse) or 15x15-3p-5f (LevelBasedForaging)
    scenario: str = "tiny-2ag"
    time_limit: OptionalCount = None  # timesteps until an episode is cut off; by default 500 or 100


@dataclass(frozen=True)
class NetworkConfig:
    """Torsos of the actor and the critic."""

    actor_layer_sizes: LayerSizes = (128, 128)  # units of each ReLU layer of the actor
    critic_layer_sizes: LayerSizes = (128, 128)  # units of each ReLU layer of the critic


@dataclass(frozen=True)
class VaultConfig:
    """Where and how the experience is recorded: REL_DIR/NAME/UID."""

    save: bool = True  # record the experience
    name: str = "ff_ippo_rware"  # name of the vault; for another family of tasks ff_ippo_lbf, say
    uid: str | None = None  # identifier of this recording; by default date, time, random number
    rel_dir: str = "vaults"  # folder of all vaults, from the working directory
    save_interval: Count = 5  # evaluations between writes to disk
    # transitions that the buffer holds, in whole evaluations; by default save_interval, up to 1 GB
    max_length: OptionalCount = None
    # compression as Flashbax takes it, such as id gzip level 5; by default zstd at level 1
    compression: dict[str, int | str] | None = None
    # recorded too: any of next_observation, log_prob, value, discount, step_count, truncation
    extra_leaves: tuple[str, ...] = ()
    og_marl: bool = False  # also export the vault in OG-MARL's layout, to REL_DIR/NAME_UID/rware


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run needs to go on: REL_DIR/NAME/UID, with the vault's name and uid."""

    save: bool = True  # save a checkpoint after each write to the vault; the newest two are kept
    resume: bool = False  # go on from the last checkpoint of vault.uid, to as many updates or more
    rel_dir: str = "checkpoints"  # folder of all checkpoints, from the working directory
    load_params: str | None = None  # begin with the best parameters of a run, checkpoints/NAME/UID


@dataclass(frozen=True)
class ResultsConfig:
    """Metrics and pictures of the run: REL_DIR/NAME/UID, with the vault's name and uid."""

    save: bool = True  # save the metrics and, at the end, pictures of them and of the vault
    rel_dir: str = "results"  # folder of all results, from the working directory
    animation: bool = False  # save an animation too, of one episode of the best parameters


@dataclass(frozen=True)
class Config:
    """Train independent PPO and record the experience into a Flashbax Vault."""

    system: SystemConfig = SystemConfig()
    arch: ArchConfig = ArchConfig()
    env: EnvConfig = EnvConfig()
    network: NetworkConfig = NetworkConfig()
    vault: VaultConfig = VaultConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    results: ResultsConfig = ResultsConfig()


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that says what to change."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def run_path(rel_dir: str, config: VaultConfig) -> Path:
    """The folder REL_DIR/NAME/UID, absolute; a `ConfigError` where Flashbax would mistake it."""
    for name, value in (("name", config.name), ("uid", str(config.uid))):
        plain = 0 < len(os.fsencode(value)) < 200 and value not in (".", "..") and "/" not in value
        require(plain, f"vault.{name} {value!r} is not the name of a folder: choose another")
    path = Path(os.path.abspath(rel_dir), config.name, str(config.uid))
    plain = str(path).isprintable() and not set(str(path)) & set("#%?|\\")
    require(plain, f"{str(path)!r} has one of # % ? | \\, which a URL cannot hold")
    return path


def check_config(config: Config, num_devices: int, env: "Environment | None" = None) -> Config:
    """The configuration with nothing left open; a `ConfigError` before anything is created."""

    def check(name, holds, bound):
        require(holds, f"{name} is {operator.attrgetter(name)(config)}: it must {bound}")

    for group, settings in vars(config).items():
        for name, hint in get_type_hints(type(settings), include_extras=True).items():
            words, holds, *_ = getattr(hint, "__metadata__", ("", lambda _: True))
            check(f"{group}.{name}", holds(getattr(settings, name)), f"be {words}")

    system, arch, checkpoint, vault = config.system, config.arch, config.checkpoint, config.vault
    transitions = system.rollout_length * arch.num_envs
    few = system.update_batch_size * transitions < 2**31
    check("arch.num_envs", few, "be lower: a rollout has too many transitions for 32 bits")
    divide = f"divide system.rollout_length * arch.num_envs, {transitions}"
    check("system.num_minibatches", transitions % system.num_minibatches == 0, divide)
    multiple = f"be a multiple of the number of devices, {num_devices}"
    check("arch.num_eval_episodes", arch.num_eval_episodes % num_devices == 0, multiple)
    updates, evaluations = system.num_updates, arch.num_evaluation
    if system.total_timesteps is not None:
        steps = num_devices * system.update_batch_size * transitions * evaluations
        updates = math.ceil(system.total_timesteps / steps) * evaluations
        system = dataclasses.replace(system, num_updates=updates)
    remedy = f"set arch.num_evaluation to {math.gcd(updates, evaluations)}, say"
    multiple = f"be a multiple of arch.num_evaluation, {evaluations}: {remedy}"
    check("system.num_updates", updates % evaluations == 0, multiple)
    unknown = [name for name in vault.extra_leaves if name not in EXTRA_LEAVES]
    require(not unknown, f"vault.extra_leaves {unknown}: choose from {', '.join(EXTRA_LEAVES)}")
    try:
        tensorstore.Spec({"driver": "zarr", "metadata": {"compressor": vault.compression}})
    except ValueError as error:
        raise ConfigError(f"vault.compression {vault.compression} is unknown") from error
    initialised = not arch.distributed or jax.distributed.is_initialized()
    problem = "arch.distributed needs jax.distributed.initialize before this file is imported"
    require(initialised, problem)
    resumable = not checkpoint.resume or (checkpoint.save and vault.uid)
    require(resumable, "checkpoint.resume needs checkpoint.save, and the vault.uid of the run")

    task = find_task(config.env, env)
    name = f"ff_ippo_{task.folder}" if vault.name == VaultConfig.name else vault.name
    new_uid = f"{datetime.datetime.now():%Y%m%d%H%M%S}-{secrets.token_hex(4)}"
    uid = broadcast(new_uid) if vault.uid is None else vault.uid
    extra_leaves = tuple(dict.fromkeys((*task.extra_leaves, *vault.extra_leaves)))
    vault = dataclasses.replace(vault, name=name, uid=uid, extra_leaves=extra_leaves)
    env_config = EnvConfig(task.scenario, config.env.time_limit or task.time_limit)
    config = dataclasses.replace(config, system=system, env=env_config, vault=vault)

    paths: list[Path] = []
    for group, settings in vars(config).items():
        is_vault = group == "vault"
        if getattr(settings, "save", False) and (is_vault or jax.process_index() == 0):
            path = run_path(settings.rel_dir, part_of(vault) if is_vault else vault)
            folder = f"{group}.rel_dir {settings.rel_dir!r}"
            require(path not in paths, f"{folder} is taken: choose another")
            problem = f"vault.uid {uid!r} exists already, at {path}: choose another"
            free = checkpoint.resume or not path.exists()
            require(free, f"{problem}, or go on by checkpoint.resume")
            parent = next(parent for parent in path.parents if parent.exists())
            writable = parent.is_dir() and os.access(parent, os.W_OK)
            require(writable, f"{folder} cannot be written: choose another")
            paths.append(path)
    if vault.save and vault.og_marl:
        export = og_marl_path(vault, task.folder, task.scenario)
        require(not export.exists(), f"the export exists already, at {export}: move or delete it")
    return config


# ---- PROCESSES -----------------------------------------------------------------------------------

# Several processes find each other before one touches a device, as importing Jumanji does.
IS_SCRIPT = __name__ == "__main__" and "__file__" in globals()  # not pasted into a notebook
stderr_filter: subprocess.Popen | None = None
if IS_SCRIPT and (arch := tyro.cli(Config).arch).distributed:
    # Where process 0 dies, JAX ends the others with a page of text: one line of it is passed on,
    # and nothing that comes after an error.
    script = r"""s/^F.*Terminating.*/error: another process ended: use checkpoint.resume on all/
        /^error:/{p;:a;n;ba;}
        /^[EW][0-9]+ .*(preemption_sync|coordination_service)|GRPC|grpc|googleapis/!p"""
    command = ["sh", "-c", 'trap "" HUP INT TERM; exec sed -nuE "$0"', script]
    stderr_filter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr)
    os.dup2(stderr_filter.stdin.fileno(), 2)
    stderr_filter.stdin.close()
    this_process = (arch.coordinator_address, arch.num_processes, arch.process_id)
    try:
        jax.distributed.initialize(*this_process, heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: arch.distributed: {error}")

# Imported in a notebook, Jumanji chooses a backend of matplotlib that may not be installed.
with mock.patch.object(builtins, "__IPYTHON__", False, create=True):
    from jumanji.env import Environment, State
    from jumanji.environments import LevelBasedForaging, RobotWarehouse
    from jumanji.environments.routing.lbf import generator as lbf
    from jumanji.environments.routing.robot_warehouse import constants
    from jumanji.environments.routing.robot_warehouse import generator as rware
    from jumanji.types import TimeStep
    from jumanji.wrappers import Wrapper


def gather(tree: ArrayTree) -> ArrayTree:
    """Arrays that are spread over all devices, as NumPy's; all processes must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def broadcast(value: Any) -> Any:
    """What process 0 gives it, on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    return pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())


def part_of(config: VaultConfig) -> VaultConfig:
    """The vault in which this process records the rows of its own devices: UID, or UID-p0of2."""
    index, count = jax.process_index(), jax.process_count()
    uid = config.uid if count == 1 else f"{config.uid}-p{index}of{count}"
    return dataclasses.replace(config, uid=uid)


def part_paths(path: Path) -> list[Path]:
    """The vaults of a recording, by process: its folder, or UID-p0of2 and so on."""
    is_part = re.compile(re.escape(path.name) + r"-p\d+of\d+").fullmatch  # and not UID-profile
    parts = [part for part in path.parent.glob("*") if is_part(part.name)]
    in_order = sorted(parts, key=lambda part: (len(part.name), part.name))  # p2of12 before p10of12
    return [path] if path.exists() or not in_order else in_order


# ---- ENVIRONMENT ---------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a scenario is made of, and what others call it."""

    make: Callable[[int], Environment]  # of the time limit
    time_limit: int  # timesteps, by default
    environment: str  # marl-eval's name of the family
    folder: str  # OG-MARL's name of the family
    actions: tuple[str, ...] = ()  # for the pictures; by default numbers
    extra_leaves: tuple[str, ...] = ("truncation",)  # recorded by default
    scenario: str = ""


def warehouse(**size: int) -> Task:
    """A RobotWarehouse, whose vault is the original's: no leaf but `done` tells of an end."""
    size = {"shelf_columns": 3, "column_height": 8, "sensor_range": 1, **size}
    make = lambda time_limit: Warehouse(rware.RandomGenerator(**size), time_limit)
    actions = ("noop", "forward", "left", "right", "toggle load")
    return Task(make, 500, "RobotWarehouse", "rware", actions, extra_leaves=())


def foraging(**size: int) -> Task:
    """A LevelBasedForaging."""
    make = lambda time_limit: Foraging(lbf.RandomGenerator(**size), time_limit=time_limit)
    actions = ("noop", "up", "down", "left", "right", "load")
    return Task(make, 100, "LevelBasedForaging", "lbf", actions)


# To add a task is to add an entry.  "2s" sees 2 cells far (`fov`), the others the whole grid.
TASKS: dict[str, Task] = {
    "tiny-2ag": warehouse(shelf_rows=1, num_agents=2, request_queue_size=2),
    "tiny-4ag": warehouse(shelf_rows=1, num_agents=4, request_queue_size=4),
    "tiny-4ag-easy": warehouse(shelf_rows=1, num_agents=4, request_queue_size=8),
    "small-4ag": warehouse(shelf_rows=2, num_agents=4, request_queue_size=4),
    "2s-8x8-2p-2f-coop": foraging(grid_size=8, fov=2, num_agents=2, num_food=2, force_coop=True),
    "8x8-2p-2f-coop": foraging(grid_size=8, fov=8, num_agents=2, num_food=2, force_coop=True),
    "2s-10x10-3p-3f": foraging(grid_size=10, fov=2, num_agents=3, num_food=3),
    "10x10-3p-3f": foraging(grid_size=10, fov=10, num_agents=3, num_food=3),
    "15x15-3p-5f": foraging(grid_size=15, fov=15, num_agents=3, num_food=5),
    "15x15-4p-3f": foraging(grid_size=15, fov=15, num_agents=4, num_food=3),
    "15x15-4p-5f": foraging(grid_size=15, fov=15, num_agents=4, num_food=5),
}


def find_task(config: EnvConfig, env: Environment | None = None) -> Task:
    """The task, by name or of an environment of one's own; a `ConfigError` says what it lacks."""
    if env is None:
        name, names = config.scenario, ", ".join(TASKS)
        require(name in TASKS, f"env.scenario {name!r} is unknown: choose one of {names}")
        return TASKS[name]._replace(scenario=name)
    name = type(env).__name__
    require(not isinstance(env, type), f"{env} is a class: give an instance of it")
    require(hasattr(env, "time_limit"), f"{name} has no time_limit")
    state, timestep = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    require(hasattr(state, "key"), f"the state of {name} has no key to begin the next episode with")
    view = getattr(timestep.observation, "agents_view", np.zeros(0))
    require(view.ndim == 2, f"the observation of {name} has no agents_view of shape (N, O)")
    mask = getattr(timestep.observation, "action_mask", None)
    has_actions = hasattr(env, "action_spec") if mask is None else mask.ndim == 2
    require(has_actions, f"{name} has no action_mask (N, A) in its observation, nor an action_spec")
    _, timestep = jax.eval_shape(env.step, state, jnp.zeros(len(view), jnp.int32))
    shapes = {timestep.reward.shape, timestep.discount.shape}
    problem = f"reward and discount of {name} must be of shape () or (N,): they are {shapes}"
    require(shapes <= {(), (len(view),)}, problem)
    limit = f"env.time_limit is {config.time_limit}, but that of {name} {env.time_limit}"
    require(config.time_limit in (None, env.time_limit), limit)
    scenario = name if config.scenario in TASKS else config.scenario
    return Task(lambda _: env, env.time_limit, name, name.lower(), scenario=scenario)


def make_env(
    config: EnvConfig, add_agent_id: bool = True, env: Environment | None = None
) -> Environment:
    """One environment of the task, without auto-reset; raises what `find_task` does."""
    task = find_task(config, env)
    return AgentWrapper(task.make(config.time_limit or task.time_limit), add_agent_id)


class Observation(NamedTuple):
    """What the agents see."""

    agents_view: Array  # (..., N, O) float32
    action_mask: Array  # (..., N, A) bool, the action is legal


class AgentWrapper(Wrapper):
    """Gives each agent its `Observation` (N, .), reward and discount (N,) float32, as in Mava."""

    def __init__(self, env: Environment, add_agent_id: bool):
        self._env, self.add_agent_id = env, add_agent_id

    def reset(self, key: PRNGKey) -> tuple[State, TimeStep]:
        return self._per_agent(*self._env.reset(key))

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:  # (N,) int32
        return self._per_agent(*self._env.step(state, action))

    def _per_agent(self, state: State, timestep: TimeStep) -> tuple[State, TimeStep]:
        view = timestep.observation.agents_view.astype(jnp.float32)
        if self.add_agent_id:
            view = jnp.concatenate([jnp.eye(len(view)), view], axis=1)
        mask = getattr(timestep.observation, "action_mask", None)
        if mask is None:  # all actions are legal
            with jax.ensure_compile_time_eval():  # the specification would be traced, too
                num_actions = int(np.max(self._env.action_spec.num_values))
            mask = jnp.ones((len(view), num_actions))
        # What the team has in common is that of each agent.
        spread = lambda x: jnp.broadcast_to(x, len(view)).astype(jnp.float32)
        reward, discount = spread(timestep.reward), spread(timestep.discount)
        observation = Observation(view, mask.astype(bool))
        return state, timestep.replace(
            observation=observation, reward=reward, discount=discount, extras={}
        )


class EpisodeMetrics(NamedTuple):
    """Return and length of episodes so far: of whole ones where `done`."""

    episode_return: Array  # (...) float32, the agents' mean reward, summed
    episode_length: Array  # (...) int32, timesteps
    done: Array  # (...) bool, the step was the last of its episode


class EnvState(NamedTuple):
    """Where environments are, between two steps."""

    state: State  # Jumanji's, tree of (...)
    observation: Observation  # (..., N, .), what the next action is chosen on
    metrics: EpisodeMetrics  # (...), of the last step's episode


def reset_environments(env: Environment, keys: PRNGKey) -> EnvState:
    """Begin the first episodes of B environments, with the keys (B, 2)."""
    state, timestep = jax.vmap(env.reset)(keys)
    zeros = functools.partial(jnp.zeros, len(keys))
    metrics = EpisodeMetrics(zeros(jnp.float32), zeros(jnp.int32), zeros(bool))
    return EnvState(state, timestep.observation, metrics)


def step_environment(
    env: Environment, env_state: EnvState, action: Array
) -> tuple[EnvState, TimeStep]:
    """Step an environment with the joint action (N,), and begin a new episode where one ended.

    The timestep is what the step led to, also where it ended: only the state is of the new episode.
    """
    state, timestep = env.step(env_state.state, action)
    before, done = env_state.metrics, timestep.last()
    episode_return = jnp.where(before.done, 0, before.episode_return) + timestep.reward.mean()
    episode_length = jnp.where(before.done, 0, before.episode_length) + 1

    def reset(key):
        state, timestep = env.reset(jax.random.split(key)[0])
        return state, timestep.observation

    state, observation = rare_cond(done, reset, (state, timestep.observation), state.key)
    metrics = EpisodeMetrics(episode_return, episode_length, done)
    return EnvState(state, observation, metrics), timestep


def rare_cond(condition: Array, function: Callable, default: Any, *operands: Any) -> Any:
    """`function(*operands)` where `condition` holds, else `default`: a cheap `cond` under `vmap`.

    Under `vmap` a `lax.cond` becomes a select: both branches run for every row.  Here the few rows
    that need `function` are gathered, mapped and scattered back, a chunk at a time.
    """

    @jax.custom_batching.custom_vmap
    def branch(condition, default, operands):
        return jax.lax.cond(condition, lambda: function(*operands), lambda: default)

    @branch.def_vmap
    def branch_batch(size, in_batched, *arguments):
        batch = lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))
        condition, default, operands = jax.tree.map(batch, arguments, tuple(in_batched))
        chunk = min(size, max(8, size // 64))

        def map_chunk(carry):
            condition, result = carry
            (rows,) = jnp.nonzero(condition, size=chunk, fill_value=size)  # `size` is no row
            mapped = jax.vmap(function)(*jax.tree.map(lambda x: x[rows], operands))
            result = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), result, mapped)
            return condition.at[rows].set(False, mode="drop"), result

        _, result = jax.lax.while_loop(lambda x: x[0].any(), map_chunk, (condition, default))
        return result, jax.tree.map(lambda _: True, result)

    return branch(condition, default, operands)


class Warehouse(RobotWarehouse):
    """Jumanji's RobotWarehouse, step for step, but for the discount at the time limit: 1, not 0.

    It draws a new request only where a shelf arrived.  Deliveries are rare, yet under `vmap`
    Jumanji draws one for every goal, environment and step: four fifths of its time.
    """

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:
        state, timestep = super().step(state, action)
        truncated = state.step_count >= self.time_limit
        return state, timestep.replace(discount=jnp.where(truncated, 1.0, timestep.discount))

    def _update_reward_and_request_queue(self, *arguments: Any) -> tuple[Any, Any, Any, Any]:
        key, reward, request_queue, grid, shelves, (column, row) = arguments
        delivered = (request_queue + 1 == grid[constants._SHELVES, row, column]).any()
        update = super()._update_reward_and_request_queue
        return rare_cond(delivered, update, (key, reward, request_queue, shelves), *arguments)


class Foraging(LevelBasedForaging):
    """Jumanji's LevelBasedForaging, whose reward is the team's, summed over the agents."""

    def get_reward(self, *food: Any) -> Array:  # (N,) float32
        reward = super().get_reward(*food)
        return jnp.broadcast_to(reward.sum(), reward.shape)


# ---- NETWORKS ------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Dense layers with orthogonal weights, (..., F) -> (rows, sizes[-1])."""

    sizes: tuple[int, ...]
    gain: float = math.sqrt(2)
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # One matrix product over all rows is 2.6 times as fast as one with several batch axes.
        x = x.reshape(-1, x.shape[-1])
        for size in self.sizes:
            layer = nn.Dense(size, kernel_init=nn.initializers.orthogonal(self.gain))
            x = self.activation(layer(x))
        return x


class Actor(nn.Module):
    """Logits (..., N, A) of the agents' shared policy, float32's smallest for illegal actions."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: Observation) -> Array:
        mask = observation.action_mask
        x = Layers(self.layer_sizes, name="torso")(observation.agents_view)
        logits = Layers(mask.shape[-1:], 0.01, lambda x: x, name="action_head")(x)
        return jnp.where(mask, logits.reshape(mask.shape), jnp.finfo(jnp.float32).min)


class Critic(nn.Module):
    """Values (..., N) of each agent's own observation."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: Observation) -> Array:
        x = Layers(self.layer_sizes, name="torso")(observation.agents_view)
        value = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x)
        return value.reshape(observation.agents_view.shape[:-1])


def init_networks(
    config: Config, observation: Observation, key: PRNGKey
) -> tuple[TrainState, TrainState]:
    """The actor and the critic, each with its optimiser: Adam after clipping by the global norm."""

    def init(network, learning_rate):
        clip = optax.clip_by_global_norm(config.system.max_grad_norm)
        optimiser = optax.chain(clip, optax.adam(learning_rate, eps=1e-5))
        params = network.init(key, observation)
        return TrainState.create(apply_fn=network.apply, params=params, tx=optimiser)

    actor = init(Actor(config.network.actor_layer_sizes), config.system.actor_lr)
    return actor, init(Critic(config.network.critic_layer_sizes), config.system.critic_lr)


# ---- ROLLOUT -------------------------------------------------------------------------------------


def act(actor: TrainState, observation: Observation, keys: PRNGKey, greedy: bool = False) -> Array:
    """Actions (B, N) int32 on observations (B, N, .); each of K `keys` (K, 2) samples B / K."""
    logits = actor.apply_fn(actor.params, observation)
    if greedy:  # the most probable actions
        return distrax.Categorical(logits).mode()
    sample = jax.vmap(lambda key, logits: distrax.Categorical(logits).sample(seed=key))
    action = sample(keys, logits.reshape(len(keys), -1, *logits.shape[1:]))
    return action.reshape(logits.shape[:-1])


class Transition(NamedTuple):
    """One step of environments.  What the network says of it is None until `update` computes it."""

    done: Array  # (..., N) bool, the step ended the episode, for whatever reason
    action: Array  # (..., N) int32
    reward: Array  # (..., N) float32
    discount: Array  # (..., N) float32, 0 where a terminal state was reached
    observation: Observation  # (..., N, .), what the action was chosen on
    next_observation: Observation  # (..., N, .), what the step led to, also where it ended
    metrics: EpisodeMetrics  # (...)
    log_prob: Array | None = None  # (..., N) float32, of the action
    value: Array | None = None  # (..., N) float32, of the observation


def rollout(
    env: Environment, actor: TrainState, keys: PRNGKey, env_state: EnvState, rollout_length: int
) -> tuple[tuple[PRNGKey, EnvState], Transition]:
    """Act with the policy for T = `rollout_length` timesteps, as Anakin does (Hessel et al., 2021).

    Returns the new keys (UB, 2) and states (UB * NE, ...), and transitions (T, UB * NE, ...).
    """

    def step(carry, _):
        keys, env_state = carry
        keys, policy_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        observation = env_state.observation
        action = act(actor, observation, policy_keys)
        env_state, timestep = jax.vmap(functools.partial(step_environment, env))(env_state, action)
        transition = Transition(
            done=jnp.broadcast_to(timestep.last()[:, None], action.shape),
            action=action,
            reward=timestep.reward,
            discount=timestep.discount,
            observation=observation,
            next_observation=timestep.observation,
            metrics=env_state.metrics,
        )
        return (keys, env_state), transition

    return jax.lax.scan(step, (keys, env_state), None, rollout_length)


# ---- ADVANTAGE -----------------------------------------------------------------------------------


def calculate_advantage(
    reward: Array, done: Array, value: Array, last_value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalised advantage estimate (Schulman et al., 2016), and the values' targets.

    All are (T, ...) float32 but `done`, bool, past which nothing is bootstrapped, and `last_value`,
    (...), of the observation after the last step; `value` is of those that were acted on.
    Returns the advantages and the lambda-returns, both (T, ...) float32.
    """

    def backward(carry, step):
        advantage, next_value = carry
        reward, done, value = step
        delta = reward + gamma * next_value * (1 - done) - value
        advantage = delta + gamma * gae_lambda * (1 - done) * advantage
        return (advantage, value), advantage

    carry = (jnp.zeros_like(last_value), last_value)
    _, advantage = jax.lax.scan(backward, carry, (reward, done, value), reverse=True, unroll=16)
    return advantage, advantage + value


# ---- LOSSES --------------------------------------------------------------------------------------


def actor_loss(
    params: ArrayTree,
    apply: Callable[..., Array],
    transition: Transition,
    advantage: Array,
    clip_eps: float,
    ent_coef: float,
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped objective (Schulman et al., 2017), less the entropy bonus.

    `transition` and the normalised `advantage` are of (..., N).  Returns the loss, and its two
    parts before the coefficient, each () float32.
    """
    policy = distrax.Categorical(apply(params, transition.observation))
    ratio = jnp.exp(policy.log_prob(transition.action) - transition.log_prob)
    clipped_ratio = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()
    entropy = policy.entropy().mean()
    return loss - ent_coef * entropy, {"actor_loss": loss, "entropy": entropy}


def critic_loss(
    params: ArrayTree,
    apply: Callable[..., Array],
    transition: Transition,
    target: Array,
    clip_eps: float,
    vf_coef: float,
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the value, or of the value clipped around the old one where that is larger.

    `transition` and the lambda-returns `target` are of (..., N).  Returns the loss, and the same
    before the coefficient, each () float32.
    """
    value = apply(params, transition.observation)
    clipped_value = transition.value + (value - transition.value).clip(-clip_eps, clip_eps)
    loss = 0.5 * jnp.maximum((value - target) ** 2, (clipped_value - target) ** 2).mean()
    return vf_coef * loss, {"value_loss": loss}


# ---- LEARNER -------------------------------------------------------------------------------------

# How arrays lie on the devices: the same on each, or spread along their first axis.
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("device")


class Params(NamedTuple):
    """Parameters of both networks."""

    actor: ArrayTree
    critic: ArrayTree


class LearnerState(NamedTuple):
    """Everything that training carries from one update to the next, here on one device.

    Outside `learn`, the first axis of the keys and of the environments is D times as long.
    """

    actor: TrainState
    critic: TrainState
    keys: PRNGKey  # (UB, 2) uint32
    env_state: EnvState  # (UB * NE, ...)

    @property
    def params(self) -> Params:
        return Params(self.actor.params, self.critic.params)


STATE_SPECS = LearnerState(actor=REPLICATED, critic=REPLICATED, keys=SHARDED, env_state=SHARDED)


def init_learner(
    key: PRNGKey, params_key: PRNGKey, env: Environment, config: Config, mesh: Mesh
) -> LearnerState:
    """The initial state on the mesh's devices: both networks by `params_key`, the rest by `key`."""
    num_sets = mesh.size * config.system.update_batch_size

    def init(key, params_key):
        keys = jax.random.split(key, num_sets * config.arch.num_envs + 1)
        policy_keys = jax.random.split(keys[0], num_sets + 1)[1:]
        env_state = reset_environments(env, jax.vmap(jax.random.split)(keys[1:])[:, 1])
        # With a dtype of their own also where an environment puts Python's numbers into its state.
        env_state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), env_state)
        actor, critic = init_networks(config, env_state.observation, params_key)
        return LearnerState(actor, critic, policy_keys, env_state)

    # Placed as `learn` places its outputs: otherwise its second call would compile it again.
    shardings = LearnerState(*(NamedSharding(mesh, spec) for spec in STATE_SPECS))
    return jax.jit(init, out_shardings=shardings)(key, params_key)


def update_minibatch(
    actor: TrainState, critic: TrainState, batch: tuple, indices: Array, config: SystemConfig
) -> tuple[TrainState, TrainState, dict[str, Array]]:
    """One step of both optimisers, along the gradient's mean over UB and over the devices.

    `batch` holds transitions, advantages and lambda-returns of the rollout, (T * UB * NE, N, ...),
    and `indices` (UB, M) those of the minibatch.  Returns also the losses, each () float32.
    """
    transition, advantage, target = jax.tree.map(lambda x: x[indices], batch)  # (UB, M, N, ...)
    mean = advantage.mean(axis=(1, 2), keepdims=True)  # each set is normalised by itself
    advantage = (advantage - mean) / (advantage.std(axis=(1, 2), keepdims=True) + 1e-8)

    # The mean of the sets' gradients is the gradient of their mean loss: one copy of the parameters
    # and one matrix product serve them all.
    actor_grads, actor_losses = jax.grad(actor_loss, has_aux=True)(
        actor.params, actor.apply_fn, transition, advantage, config.clip_eps, config.ent_coef
    )
    critic_grads, critic_losses = jax.grad(critic_loss, has_aux=True)(
        critic.params, critic.apply_fn, transition, target, config.clip_eps, config.vf_coef
    )
    gradients = actor_grads, critic_grads, {**actor_losses, **critic_losses}
    # One message for all arrays: two CPU devices learn 8 % faster than with one for each.  (Without
    # the barrier, one device is 2 % slower.)
    flat, unravel = ravel_pytree(jax.lax.optimization_barrier(gradients))
    actor_grads, critic_grads, losses = unravel(jax.lax.pmean(flat, axis_name="device"))
    actor = actor.apply_gradients(grads=actor_grads)
    return actor, critic.apply_gradients(grads=critic_grads), losses


def update(
    state: LearnerState, env: Environment, config: SystemConfig
) -> tuple[LearnerState, tuple[Transition, dict[str, Array]]]:
    """One update of independent PPO, as in Mava, on one device.

    Returns the new state; the transitions, (T, UB * NE, ...), and the mean losses, each () float32.
    """
    actor, critic, keys, env_state = state

    # ROLLOUT
    (keys, env_state), transitions = rollout(env, actor, keys, env_state, config.rollout_length)

    # ADVANTAGE.  Choosing an action needs neither its value nor its log-probability: here they are
    # computed for the whole rollout at once.
    policy = distrax.Categorical(actor.apply_fn(actor.params, transitions.observation))
    log_prob = policy.log_prob(transitions.action)
    value = critic.apply_fn(critic.params, transitions.observation)
    transitions = transitions._replace(log_prob=log_prob, value=value)
    if not config.learn:
        return LearnerState(actor, critic, keys, env_state), (transitions, {})
    last_value = critic.apply_fn(critic.params, env_state.observation)
    advantage, target = calculate_advantage(
        transitions.reward, transitions.done, value, last_value, config.gamma, config.gae_lambda
    )

    # MINIBATCHES: each of the UB sets shuffles its own transitions, counted in the order of (T, NE)
    num_epochs, num_sets = config.ppo_epochs, config.update_batch_size
    num_envs = advantage.shape[1] // num_sets
    split = jax.vmap(jax.random.split, out_axes=1)
    keys, shuffle_keys = jax.lax.scan(lambda keys, _: tuple(split(keys)), keys, None, num_epochs)
    permute = functools.partial(jax.random.permutation, x=config.rollout_length * num_envs)
    permutation = jax.vmap(jax.vmap(permute))(shuffle_keys)
    timestep, env_index = jnp.divmod(permutation, num_envs)  # (epochs, UB, T * NE)
    set_index = jnp.arange(num_sets)[:, None]
    indices = (timestep * num_sets + set_index) * num_envs + env_index  # in (T, UB, NE)
    # (epochs, UB, minibatches * M) -> (epochs * minibatches, UB, M)
    indices = indices.reshape(num_epochs, num_sets, config.num_minibatches, -1)
    indices = indices.swapaxes(1, 2).reshape(-1, num_sets, indices.shape[-1])
    # (T, UB * NE, ...) -> (T * UB * NE, ...)
    flatten = lambda x: x.reshape(-1, *x.shape[2:])
    batch = jax.tree.map(flatten, (transitions, advantage, target))

    # UPDATE
    def step(carry, indices):
        actor, critic, losses = update_minibatch(*carry, batch, indices, config)
        return (actor, critic), losses

    (actor, critic), losses = jax.lax.scan(step, (actor, critic), indices)
    losses = jax.tree.map(jnp.mean, losses)
    return LearnerState(actor, critic, keys, env_state), (transitions, losses)


class LearnerOutput(NamedTuple):
    """What one call of `learn` returns."""

    state: LearnerState  # for the next call
    experience: dict[str, Array]  # leaves (D, NU, UB, T, NE, ...)
    metrics: EpisodeMetrics  # of the training episodes, (D, NU, UB, T, NE)
    losses: dict[str, Array]  # (NU,) float32, mean over devices, sets and minibatches
    finite: Array  # (NU,) bool, no loss and no parameter is infinite or not a number


def make_learn(
    env: Environment, config: SystemConfig, num_updates: int, mesh: Mesh, extra_leaves: tuple
) -> Callable[[LearnerState], LearnerOutput]:
    """The learner of NU updates on each of the D devices, compiled at its first call."""
    # (T, UB * NE, ...) -> (T, UB, NE, ...) -> (UB, T, NE, ...)
    split = lambda x: x.reshape(len(x), config.update_batch_size, -1, *x.shape[2:]).swapaxes(0, 1)

    def step(state, _):
        state, (transitions, losses) = update(state, env, config)
        finite = jnp.isfinite(ravel_pytree((losses, state.params))[0]).all()
        experience = select_leaves(transitions, extra_leaves)
        outputs = jax.tree.map(split, (experience, transitions.metrics))
        return state, (*outputs, losses, finite)

    def learn(state):
        state, (experience, metrics, *rest) = jax.lax.scan(step, state, None, num_updates)
        experience, metrics = jax.tree.map(lambda x: x[None], (experience, metrics))  # D is 1 here
        return LearnerOutput(state, experience, metrics, *rest)

    output_specs = LearnerOutput(STATE_SPECS, SHARDED, SHARDED, REPLICATED, REPLICATED)
    specs = {"in_specs": (STATE_SPECS,), "out_specs": output_specs}
    return jax.jit(jax.shard_map(learn, mesh=mesh, check_vma=False, **specs))


# ---- EVALUATION ----------------------------------------------------------------------------------


def evaluate(
    env: Environment, actor: TrainState, key: PRNGKey, num_episodes: int, greedy: bool = False
) -> EpisodeMetrics:
    """Play whole episodes side by side, until the last of them has ended.

    Returns their returns and lengths, (num_episodes,), all of them done.  How often, and the
    absolute metric, follow Gorsane et al. (2022).
    """

    def step(carry):
        key, (state, observation, metrics) = carry
        key, policy_key = jax.random.split(key)
        action = act(actor, observation, policy_key[None], greedy)
        state, timestep = jax.vmap(env.step)(state, action)
        # An environment whose episode has ended is stepped on, but not counted.
        reward = jnp.where(metrics.done, 0.0, timestep.reward.mean(axis=-1))
        metrics = EpisodeMetrics(
            metrics.episode_return + reward,
            metrics.episode_length + jnp.where(metrics.done, 0, 1),
            metrics.done | timestep.last(),
        )
        return key, EnvState(state, timestep.observation, metrics)

    key, reset_key = jax.random.split(key)
    env_state = reset_environments(env, jax.random.split(reset_key, num_episodes))
    going_on = lambda carry: ~carry[1].metrics.done.all()
    return jax.lax.while_loop(going_on, step, (key, env_state))[1].metrics


class Evaluation(NamedTuple):
    """What is known after one evaluation."""

    step_count: int  # environment steps of training so far
    elapsed_time: float  # seconds since the first evaluation
    steps_per_second: float  # of the training since the evaluation before
    episode_return: np.ndarray  # (num_eval_episodes,) float32
    episode_length: np.ndarray  # (num_eval_episodes,) int32, timesteps
    train_episode_return: float  # mean of the training episodes that ended since, nan if none did
    losses: dict[str, float]  # mean since, of "actor_loss", "value_loss" and "entropy"


def make_evaluate(
    env: Environment, num_episodes: int, greedy: bool, mesh: Mesh
) -> Callable[[TrainState, PRNGKey], EpisodeMetrics]:
    """`evaluate` of an actor with the keys (D, 2), its episodes spread over the devices."""
    num_episodes //= mesh.size
    evaluate_part = lambda actor, keys: evaluate(env, actor, keys[0], num_episodes, greedy)
    specs = {"in_specs": (REPLICATED, SHARDED), "out_specs": SHARDED}
    return jax.jit(jax.shard_map(evaluate_part, mesh=mesh, check_vma=False, **specs))


# ---- RECORDING -----------------------------------------------------------------------------------

# The leaves of the vault, and those that may be asked for.
LEAVES = ("done", "action", "reward", "observation", "legal_action_mask")
EXTRA_LEAVES = ("next_observation", "log_prob", "value", "discount", "step_count", "truncation")


def select_leaves(transition: Transition, extra_leaves: tuple[str, ...]) -> dict[str, Array]:
    """What is recorded of a transition: `LEAVES`, and those named of `EXTRA_LEAVES`."""
    step_count = transition.metrics.episode_length[..., None] - 1
    leaves = {
        **transition._asdict(),
        "observation": transition.observation.agents_view,
        "legal_action_mask": transition.observation.action_mask,
        "next_observation": transition.next_observation.agents_view,
        "step_count": jnp.broadcast_to(step_count, transition.action.shape),
        "truncation": transition.done & (transition.discount != 0),
    }
    return {name: leaves[name] for name in (*LEAVES, *extra_leaves)}


def reshape_experience(experience: dict[str, Array]) -> dict[str, Array]:
    """Rows of consecutive timesteps, as a buffer wants them, of what the learner returns."""
    # (D, NU, UB, T, NE, ...) -> (D, NU, UB, NE, T, ...) -> (D * NU * UB * NE, T, ...)
    rows = lambda x: x.swapaxes(3, 4).reshape(-1, x.shape[3], *x.shape[5:])
    return jax.tree.map(rows, experience)


def make_buffer(max_length: int, add_batch_size: int) -> TrajectoryBuffer:
    """Flashbax's flat buffer of `max_length` transitions, in `add_batch_size` rows."""
    return fbx.make_flat_buffer(
        max_length=max_length,
        min_length=add_batch_size,
        sample_batch_size=1,
        add_sequences=True,
        add_batch_size=add_batch_size,
    )


# Whose versions are kept in the vault's metadata.
PACKAGES = ("jax", "jaxlib", "flashbax", "flax", "optax", "distrax", "jumanji", "chex")


def describe_recording(config: Config, task: Task, experience: dict[str, Any]) -> dict[str, Any]:
    """What `metadata.json` keeps beside the vault of leaves (D, NU, UB, T, NE, ...)."""
    num_devices, num_updates, *_, num_agents, num_actions = experience["legal_action_mask"].shape
    return {
        **dataclasses.asdict(config),
        "task": {name: getattr(task, name) for name in ("environment", "folder", "actions")},
        "policy": {"params": config.checkpoint.load_params or "initial", "episode_return": None},
        "num_agents": num_agents,
        "num_actions": num_actions,
        "num_devices": num_devices,
        "process": {"index": jax.process_index(), "count": jax.process_count()},
        "num_updates_per_eval": num_updates,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


class RecordingError(RuntimeError):
    """A vault or a checkpoint could not be written or read; the message is one line."""


@contextlib.contextmanager
def storage(action: str, path: Path, remedy: str) -> Iterator[None]:
    """Turns what libraries raise about files into one line: `ConfigError` or `RecordingError`."""
    try:
        yield
    except (ConfigError, RecordingError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.EEXIST, errno.ENOTEMPTY):
            raise ConfigError(f"{path} exists already: choose another vault.uid") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(" [source")[0]
        reason = f"{reason[:80]} ... {reason[-80:]}" if len(reason) > 165 else reason
        raise RecordingError(f"{action} {path} failed: {reason}: {remedy}") from error


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """A run goes on without what fails here."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} failed: {error}", stacklevel=3)


def claim(path: Path, exist_ok: bool) -> io.TextIOBase:
    """Make a folder, and keep other processes out of it until the file that is returned is closed.

    Where it exists already, unless `exist_ok`, or another process holds it: a `ConfigError`.
    """
    with storage("making", path, "make room there, or choose another folder"):
        try:
            path.mkdir(parents=True, exist_ok=exist_ok)
            lock = (path / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is recording into {path}") from error
        return lock


MAX_CHUNK_SIZE = 2**22  # elements in a chunk of the vault on disk: 16 MB of float32
MAX_BUFFER_SIZE = 2**30  # bytes of the buffer by default, unless one rollout has more


def set_chunks(store: tensorstore.TensorStore, chunk_length: int) -> None:
    """Create an empty leaf of a vault anew, in chunks of `chunk_length` timesteps of many rows.

    Otherwise TensorStore chooses chunks across rollouts: each write codes some of the earlier ones
    again, which takes 1.5 times the processor time, and leaves 30 % more on disk.
    """
    row_shape = (chunk_length, *store.shape[2:])
    num_rows = min(store.shape[0], max(1, MAX_CHUNK_SIZE // math.prod(row_shape)))
    spec = store.spec().to_json()
    spec["metadata"]["chunks"] = [num_rows, *row_shape]
    tensorstore.open(spec, create=True, delete_existing=True).result()


def make_vault(
    config: VaultConfig, experience: dict[str, Any], chunk_length: int, metadata: dict[str, Any]
) -> Vault:
    """Create the vault; by default with zstd, three times as fast as Flashbax's gzip, and smaller.

    It is for leaves (D * NU * UB * NE, any, ...), arrays or shapes, in chunks of `chunk_length`
    timesteps, best a divisor of what each write brings; `metadata` is kept beside, in
    `metadata.json`.  Where the vault exists already, there is a `ConfigError`.
    """
    path = run_path(config.rel_dir, config)
    making = storage("making the vault", path, "make room there, or choose another folder")
    with making, contextlib.redirect_stdout(io.StringIO()):  # Flashbax's advice on writing
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            vault = Vault(
                vault_name=folder,  # absolute, so that nothing is put in front
                vault_uid=path.name,
                experience_structure=experience,
                compression=config.compression or {"id": "zstd", "level": 1},
                metadata=metadata,
            )
            jax.tree.map(lambda store: set_chunks(store, chunk_length), vault._all_datastores)
            Path(folder, path.name).rename(path)  # it has its name only when it is whole
    return open_vault(config.name, config.uid, config.rel_dir)[0]


def open_vault(name: str, uid: str, rel_dir: str = "vaults") -> tuple[Vault, dict[str, Any]]:
    """A vault that exists, and the metadata that `run_experiment` kept beside it.

    There is a FileNotFoundError where there is none, a `RecordingError` where it cannot be read.
    """
    path = run_path(rel_dir, VaultConfig(name=name, uid=uid))
    if not path.exists():
        raise FileNotFoundError(f"there is no vault in {path}")
    reading = storage("reading the vault", path, "it is damaged: record it again")
    with reading, contextlib.redirect_stdout(io.StringIO()):
        metadata = json.loads((path / "metadata.json").read_text())
        return Vault(vault_name=name, vault_uid=uid, rel_dir=rel_dir), metadata


def to_plain(value: Any) -> Any:
    """What JSON can hold of a value: of NumPy's numbers, Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def write_json(path: Path, content: Any) -> None:
    """Write a file that who reads it meanwhile finds whole: a new one takes its place at once."""
    with storage("writing", path, "make room there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(content, default=to_plain))
        path.with_suffix(".tmp").replace(path)


def update_metadata(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of what is kept beside a vault."""
    path = path / "metadata.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


def write_vault(vault: Vault, experience: dict[str, Array]) -> None:
    """Append leaves (D * NU * UB * NE, any, ...) to the vault."""
    length = jax.tree.leaves(experience)[0].shape[1]
    # Of no timestep, Flashbax takes the interval for its default, up to this index: also nothing.
    state = TrajectoryBufferState(experience=experience, current_index=0, is_full=False)
    with ThreadPoolExecutor(1) as thread:  # it starts an event loop: a notebook's own is running
        thread.submit(vault.write, state, source_interval=(0, length)).result()


def buffer_capacity(config: VaultConfig, experience: Any) -> int:
    """How many rollouts, of leaves (D, NU, UB, T, NE, ...), the buffer holds.

    There is a `ConfigError` where it does not hold one, or does not fit into memory: a process that
    asks for too much may be killed.
    """
    leaves = jax.tree.leaves(experience)
    num_transitions = math.prod(leaves[0].shape[:5])
    rollout_size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    fitting = min(config.save_interval, max(1, MAX_BUFFER_SIZE // rollout_size))
    capacity = fitting if config.max_length is None else config.max_length // num_transitions
    least = f"at least {num_transitions} transitions, those between two evaluations"
    require(capacity > 0, f"vault.max_length is {config.max_length}: it must hold {least}")
    # Beside the buffer and the copy of it that is being written, one rollout is being made.
    size = (2 * capacity + 1) * rollout_size
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        available = stats["bytes_limit"] * jax.local_device_count()
    else:  # a CPU, whose devices share one memory
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = f"{size / 1e9:,.1f} GB of the {available / 1e9:,.1f} GB of memory"
    large = "arch.num_envs, vault.max_length, or raise arch.num_evaluation"
    require(size <= available, f"the experience takes {sizes}: lower {large}")
    return capacity


class Recorder(contextlib.AbstractContextManager):
    """Gathers experience in a buffer, and writes it to a vault: what is left when it is closed."""

    def __init__(
        self,
        config: VaultConfig,
        experience: Any,
        metadata: dict[str, Any],
        mesh: Mesh,
        num_written: int | None = None,
    ):
        """Create the buffer and the vault for leaves (D, NU, UB, T, NE, ...), arrays or shapes.

        `num_written` is for going on with a vault, after as many rollouts of each row: what it
        holds past them is overwritten.  A `ConfigError` says where the buffer cannot hold one or
        does not fit into memory, or the vault is another's.
        """
        *axes, self.rollout_length, num_envs = jax.tree.leaves(experience)[0].shape[:5]
        self.num_rows = math.prod(axes) * num_envs
        require(bool(config.uid) and config.save, "a recorder needs vault.uid and vault.save")
        self.capacity = buffer_capacity(config, experience)
        buffer = make_buffer(self.capacity * self.num_rows * self.rollout_length, self.num_rows)
        replicated, sharded = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, SHARDED)
        shardings = TrajectoryBufferState(
            experience=sharded, current_index=replicated, is_full=replicated
        )
        transition = jax.tree.map(lambda x: jnp.zeros(x.shape[5:], x.dtype), experience)
        self.buffer_state = jax.jit(buffer.init, out_shardings=shardings)(transition)

        def add(state, experience, index):
            return buffer.add(state.replace(current_index=index), reshape_experience(experience))

        self.add_to_buffer = jax.jit(add, donate_argnums=0)  # in place: there is no second buffer
        self.path = run_path(config.rel_dir, config)
        if num_written is None or not (num_written or self.path.exists()):
            make_vault(config, self.buffer_state.experience, self.rollout_length, metadata)
        require(self.path.exists(), f"there is no vault in {self.path}: record it again")
        self.lock = claim(self.path, exist_ok=True)
        # TensorStore's next write would go into such a file of a process that was killed, without
        # truncating it, and make the vault unreadable.
        for stale in self.path.rglob("*.__lock"):
            stale.unlink()
        self.vault, _ = open_vault(config.name, config.uid, config.rel_dir)
        self.num_added = self.num_written = num_written or 0  # rollouts of each row
        whole = self.vault.vault_index >= self.num_written * self.rollout_length
        require(whole, f"{self.path} holds less than its checkpoint: record it again")
        update_metadata(self.path, metadata)
        self.turn = threading.RLock()  # to add or to write

    @property
    def num_timesteps(self) -> int:
        """Environment steps that are on disk, also of the other processes, which write alike."""
        return self.num_written * self.num_rows * self.rollout_length * jax.process_count()

    def add(self, experience: dict[str, Array]) -> None:
        """Add leaves (D, NU, UB, T, NE, ...) to the buffer; where it is full, write it first."""
        with self.turn:
            if self.num_added - self.num_written == self.capacity:
                self.write()
            index = np.int32((self.num_added - self.num_written) * self.rollout_length)
            self.buffer_state = self.add_to_buffer(self.buffer_state, experience, index)
            self.num_added += 1

    def write(self) -> None:
        """Write what was added since the last write; raises a `RecordingError` where it fails."""
        remedy = "make room there, then use checkpoint.resume"
        with self.turn:
            length = (self.num_added - self.num_written) * self.rollout_length
            new = jax.tree.map(lambda x: x[:, :length], self.buffer_state.experience)
            # Not after what failed, nor after what a run that goes on had written too much.
            self.vault.vault_index = self.num_written * self.rollout_length
            with storage("writing the vault", self.path, remedy):
                write_vault(self.vault, new)
            self.num_written = self.num_added

    def __exit__(self, error_type: Any, *_: Any) -> None:
        try:
            self.write()
        except Exception:
            if error_type in (None, KeyboardInterrupt):
                raise  # any other error says more
        finally:
            self.lock.close()


# ---- CHECKPOINT: what a run needs to go on where it stopped --------------------------------------


def place_as(tree: ArrayTree, like: ArrayTree) -> ArrayTree:
    """A tree of arrays, on the devices as those of the tree `like` lie there."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, like))


class Progress(NamedTuple):
    """A run between two evaluations."""

    state: LearnerState
    eval_key: PRNGKey
    best_params: Params  # of the evaluation with the highest mean return
    best_return: float
    evaluations: list[Evaluation]


def open_checkpoints(path: Path) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in a folder, of which it keeps the newest two."""
    index = jax.process_index()  # of several processes, only this one takes part
    processes = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    options = {"max_to_keep": 2, "create": False, "enable_async_checkpointing": False}
    options = ocp.CheckpointManagerOptions(**options, multiprocessing_options=processes)
    return ocp.CheckpointManager(path, options=options)


def describe_config(config: Config) -> dict[str, Any]:
    """What must be the same where a run goes on, from a setting's name to its value."""
    groups = json.loads(json.dumps(dataclasses.asdict(config), default=to_plain))
    settings = {f"{group}.{name}": x for group, xs in groups.items() for name, x in xs.items()}
    process = ("distributed", "coordinator_address", "num_processes", "process_id")
    for name in ("system.total_timesteps", "checkpoint.resume", *(f"arch.{x}" for x in process)):
        del settings[name]
    num_updates_per_eval = settings.pop("system.num_updates") // settings.pop("arch.num_evaluation")
    settings["system.num_updates / arch.num_evaluation"] = num_updates_per_eval
    settings["the number of devices"] = jax.device_count()
    settings["the number of processes"] = jax.process_count()
    return settings


def save_checkpoint(manager: ocp.CheckpointManager, config: Config, progress: Progress) -> None:
    """Save `progress`, of NumPy arrays, by its number of evaluations; a crash leaves the last."""
    evaluations = progress.evaluations
    state = {
        "learner": jax.tree.leaves(progress.state),
        "eval_key": np.asarray(progress.eval_key),
        "params": progress.best_params._asdict(),
    }
    if evaluations:
        state["evaluations"] = jax.tree.map(lambda *x: np.stack(x), *evaluations)._asdict()
    run = {"config": describe_config(config), "best_return": progress.best_return}
    items = ocp.args.Composite(run=ocp.args.JsonSave(run), state=ocp.args.StandardSave(state))
    with storage("saving a checkpoint in", manager.directory, "make room there, then resume"):
        manager.save(len(evaluations), args=items)  # Orbax leaves out a step that is saved already


def load_checkpoint(
    manager: ocp.CheckpointManager | None, config: Config, progress: Progress
) -> Progress:
    """The progress that was saved last, placed on the devices as the beginning's `progress` is.

    Process 0, which has a manager, reads it for all; where there is none, `progress` comes back.  A
    `ConfigError` names the first difference where it is of another configuration.
    """
    remedy = "delete it to go on from the one before"
    saved = path = None
    if manager is not None and manager.latest_step() is not None:
        path = Path(manager.directory, str(manager.latest_step()))
        items = ocp.args.Composite(run=ocp.args.JsonRestore(), state=ocp.args.StandardRestore())
        with storage("reading the checkpoint", path, remedy):
            saved = dict(manager.restore(manager.latest_step(), args=items).items())
    saved = broadcast(saved)
    if saved is None:
        return progress
    run, state = saved["run"], saved["state"]
    for name, value in describe_config(config).items():
        old = run["config"].get(name)
        require(value == old, f"{name} is {value}, but {old} in the run that is to go on")
    columns = state.get("evaluations", {"step_count": []})
    num_done, num_evaluation = len(columns["step_count"]), config.arch.num_evaluation
    done = f"arch.num_evaluation is {num_evaluation}, but {num_done} are done already"
    require(num_done <= num_evaluation, done)
    with storage("reading the checkpoint", path, remedy):
        leaves, structure = jax.tree.flatten(progress.state)
        chex.assert_trees_all_equal_shapes(state["learner"], leaves)
        learner = place_as(structure.unflatten(state["learner"]), progress.state)
        params = place_as(Params(**state["params"]), progress.best_params)
        fields = [columns[name] for name in Evaluation._fields] if num_done else []
        rows = (jax.tree.map(lambda x: x[index], fields) for index in range(num_done))
        evaluations = [Evaluation(*row) for row in rows]
    return Progress(learner, state["eval_key"], params, run["best_return"], evaluations)


def load_params(path: str | Path) -> Params:
    """The best parameters of a run; `path` is the folder of its checkpoints, checkpoints/NAME/UID.

    There is a FileNotFoundError where it has none, a `RecordingError` where they cannot be read.
    """
    path = Path(path).absolute()
    if not any(child.name.isdigit() for child in path.glob("*")):
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    items = ocp.args.Composite(state=ocp.args.StandardRestore())
    with storage("reading a checkpoint in", path, "it is damaged"), open_checkpoints(path) as saved:
        return Params(**saved.restore(saved.latest_step(), args=items).state["params"])


# ---- OFFLINE: episodes from a vault, OG-MARL's layout --------------------------------------------


def restore_time_order(
    experience: ArrayTree, num_devices: int, num_updates_per_eval: int, rollout_length: int
) -> ArrayTree:
    """Each environment's own stream of timesteps, unbroken, from the rows of a vault.

    With NU > 1 a row of the vault holds every NU-th rollout of an environment, end to end: read
    along a row, time jumps wherever one rollout ends and the next begins.  Leaves
    (D * NU * UB * NE, E * T, ...) of E evaluations, NumPy or JAX, come back as
    (D * UB * NE, E * NU * T, ...), one row for each environment.
    """

    def restore(x):
        num_evaluations, rest = x.shape[1] // rollout_length, x.shape[2:]
        # (D * NU * UB * NE, E * T, ...) -> (D, NU, UB * NE, E, T, ...)
        x = x.reshape(num_devices, num_updates_per_eval, -1, num_evaluations, rollout_length, *rest)
        # (D, NU, UB * NE, E, T, ...) -> (D, UB * NE, E, NU, T, ...)
        x = x.swapaxes(1, 2).swapaxes(2, 3)
        return x.reshape(-1, num_evaluations * num_updates_per_eval * rollout_length, *rest)

    return jax.tree.map(restore, experience)


def open_recording(
    name: str, uid: str, rel_dir: str = "vaults"
) -> tuple[dict[str, tensorstore.TensorStore], int, dict[str, Any]]:
    """What is on disk of a recording, that of several processes as one.

    Returns its leaves (D * NU * UB * NE, any, ...), how many timesteps they hold, and its metadata.
    Raises what `open_vault` does, also where it is not of this file; warns of missing parts.
    """
    path = run_path(rel_dir, VaultConfig(name=name, uid=uid))
    parts = [open_vault(name, part.name, rel_dir) for part in part_paths(path)]
    vaults, metadata = zip(*parts, strict=True)
    if "num_updates_per_eval" not in metadata[0]:
        raise RecordingError(f"{path} is no recording of ff_ippo_store_experience.py")
    if not path.exists():  # it has the parts of several processes
        present = {part["process"]["index"] for part in metadata}
        missing = sorted(set(range(metadata[0]["process"]["count"])) - present)
        if missing:
            warnings.warn(f"{path} is without the parts {missing}", stacklevel=1)
    join = lambda *stores: tensorstore.concat(stores, axis=0)
    leaves = jax.tree.map(join, *(vault._all_datastores for vault in vaults))
    num_devices = sum(part["num_devices"] for part in metadata)
    length = min(vault.vault_index for vault in vaults)
    return leaves, length, {**metadata[0], "num_devices": num_devices}


class Episodes(NamedTuple):
    """K complete episodes, in the order in which they ended; S transitions in all.

    They lie end to end along one axis, not padded: a transition is sampled with one gather of a
    random index below S, `jnp.repeat(jnp.arange(K), length, total_repeat_length=S)` gives the ids
    for a `segment_sum`, and what followed transition i is transition i + 1, unless `done`.
    """

    transitions: dict[str, np.ndarray]  # leaves of the vault, (S, ...)
    start: np.ndarray  # (K,) int64, index of the first transition
    length: np.ndarray  # (K,) int64, timesteps
    episode_return: np.ndarray  # (K,) float32, the agents' mean reward, summed
    recorded_at: np.ndarray  # (K,) int64, environment steps of training before the episode's first
    num_incomplete: int  # left out, as their beginning or end is not in the part that was read


def iterate_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: tuple[float, float] | None = None,
    leaves: tuple[str, ...] | None = None,
    num_steps: int = 250_000,
) -> Iterator[Episodes]:
    """Every complete episode of a vault, exactly once, a part of the vault at a time.

    `percentiles` of training are read, in whole evaluations, both ends rounded down, by default all
    of it; where they hold none, there is a `ConfigError`, else what `open_vault` raises.
    `transitions` has these `leaves`, by default all.  `num_steps` environment steps are read at a
    time, in whole evaluations, at least one: it changes neither the episodes nor their order.
    """
    stores, length, metadata = open_recording(name, uid, rel_dir)
    leaves = tuple(stores if leaves is None else leaves)
    num_updates = metadata["num_updates_per_eval"]
    rollout_length = metadata["system"]["rollout_length"]
    num_evaluations = length // rollout_length
    low, high = percentiles or (0, 100)
    first, last = (int(num_evaluations * percentile / 100) for percentile in (low, high))
    part = f"percentiles {low} to {high} of the {num_evaluations} evaluations of {name}/{uid}"
    require(0 <= low <= high <= 100 and first < last, f"there is nothing in {part}")
    path = run_path(rel_dir, VaultConfig(name=name, uid=uid))

    def read(leaves, first, last):
        # `Vault.read` would read all leaves, whatever is asked for, onto the accelerator.
        times = slice(first * rollout_length, last * rollout_length)
        with storage("reading the vault", path, "it is damaged: record it again"):
            chosen = {leaf: stores[leaf] for leaf in leaves}
            futures = jax.tree.map(lambda store: store[:, times].read(), chosen)
            experience = jax.tree.map(lambda future: future.result(), futures)
        return restore_time_order(experience, metadata["num_devices"], num_updates, rollout_length)

    # INDEX: where each episode lies.  Where the recording begins, episodes begin too; elsewhere an
    # environment's first episode is known to begin only after its first `done`.
    done = read({"done"}, first, last)["done"][..., 0]  # (D * UB * NE, time)
    row, end = np.nonzero(done)
    begin = np.where(np.diff(row, prepend=-1) > 0, -1 if first else 0, np.roll(end + 1, 1))
    num_incomplete = int(np.sum(begin < 0) + np.sum(~done[:, -1]))
    order = np.lexsort((row, end))
    order = order[begin[order] >= 0]
    evaluation_length = num_updates * rollout_length
    offset = first * evaluation_length  # all times are on an environment's own clock
    row, begin, end = row[order], begin[order] + offset, end[order] + 1 + offset
    if len(order) == 0:
        warnings.warn(f"no episode is complete in {part}", stacklevel=2)

    # READ together the episodes that end in the same stretch of evaluations
    stretch = max(1, num_steps // (len(done) * evaluation_length))
    for start in range(first, last, stretch):
        stop = min(start + stretch, last)
        chosen = slice(*np.searchsorted(end, np.array([start, stop]) * evaluation_length + 1))
        length = end[chosen] - begin[chosen]
        start = min(start, begin[chosen].min(initial=last * evaluation_length) // evaluation_length)
        experience = read({"reward", *leaves}, start, stop)
        index = (row[chosen] * (stop - start) - start) * evaluation_length + begin[chosen]
        position = np.cumsum(length) - length
        index = np.repeat(index - position, length) + np.arange(length.sum())
        transitions = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[index], experience)
        reward = transitions["reward"].mean(axis=1, dtype=np.float64)
        yield Episodes(
            transitions={leaf: transitions[leaf] for leaf in leaves},
            start=position,
            length=length,
            episode_return=np.add.reduceat(reward, position).astype(np.float32),
            recorded_at=begin[chosen] * len(done),
            num_incomplete=num_incomplete if stop == last else 0,
        )


def load_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: tuple[float, float] | None = None,
    leaves: tuple[str, ...] | None = None,
) -> Episodes:
    """The complete episodes of a vault, in memory: see `iterate_episodes`, also for the arguments.

    It takes the memory of what it returns and of one part of the vault, not of a second copy.
    """

    def append(x, new):
        size = len(x)
        x.resize((size + len(new), *x.shape[1:]), refcheck=False)
        x[size:] = new

    parts = iterate_episodes(name, uid, rel_dir, percentiles, leaves)
    episodes = next(parts)
    for part in parts:
        part = part._replace(start=part.start + episodes.length.sum())
        jax.tree.map(append, episodes[:-1], part[:-1])
        episodes = episodes._replace(num_incomplete=part.num_incomplete)
    return episodes


# What OG-MARL calls the parts of a recording, and the percentiles of training that are in them.
OG_MARL_PARTS = {"Replay": (0, 100), "Poor": (0, 33), "Medium": (33, 67), "Good": (67, 100)}


def to_og_marl(episodes: Episodes, metadata: dict[str, Any]) -> dict[str, ArrayTree]:
    """The transitions of complete episodes, with all their leaves, as OG-MARL has them.

    Returns leaves (1, S, N, ...) and, in `infos`, the legal actions (1, S, N, A) bool and the state
    (1, S, N * O), the agents' observations side by side.  Observations come without the one-hot of
    the agent's index: OG-MARL's systems put their own in front.
    """
    transitions = episodes.transitions
    num_ids = metadata["num_agents"] if metadata["system"]["add_agent_id"] else 0
    observation = transitions["observation"][..., num_ids:]
    state = observation.reshape(len(observation), math.prod(observation.shape[1:]))
    truncated = transitions.get("truncation")
    if truncated is None:
        # RobotWarehouse's vault, as the original's, has no leaf that tells: an episode as long as
        # the time limit was cut off, even if its very last step also brought a collision.
        cut_off = episodes.length == metadata["env"]["time_limit"]  # (K,)
        truncated = np.repeat(cut_off, episodes.length)[:, None]  # (S, 1)
    experience = {
        "observations": observation,
        "actions": transitions["action"],
        "rewards": transitions["reward"],
        "terminals": transitions["done"] & ~truncated,
        "truncations": transitions["done"] & truncated,
        "infos": {"legals": transitions["legal_action_mask"], "state": state},
    }
    return jax.tree.map(lambda x: x[None], experience)


def og_marl_path(config: VaultConfig, folder: str, scenario: str, label: str = "Replay") -> Path:
    """Where an export lies, by OG-MARL's names: REL_DIR/SOURCE/ENV/SCENARIO.vlt/UID.

    The source is NAME_UID of the recording, so that no two recordings meet in one folder.
    """
    rel_dir = os.path.join(config.rel_dir, f"{config.name}_{config.uid}", folder)
    return run_path(rel_dir, VaultConfig(name=f"{scenario}.vlt", uid=label))


def export_og_marl(
    name: str, uid: str, rel_dir: str = "vaults", part: str = "Replay", label: str | None = None
) -> Path:
    """Write a part of a vault as a vault that OG-MARL reads, episodes end to end in one row.

    `part` is one of `OG_MARL_PARTS`: "Replay" is everything, the others are thirds of training.
    Returns the folder of the export, named `label`, such as "Expert", or by default as the part; it
    has this name only when it is whole.  Where it exists already, there is a `ConfigError`.
    """
    *_, metadata = open_recording(name, uid, rel_dir)
    config = VaultConfig(name=name, uid=uid, rel_dir=rel_dir)
    folder, scenario = metadata["task"]["folder"], metadata["env"]["scenario"]
    path = og_marl_path(config, folder, scenario, label or part)
    require(not path.exists(), f"the export exists already, at {path}: move or delete it")
    vault = None
    with storage("exporting to", path, "make room there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            config = VaultConfig(name=Path(folder).name, uid=path.name, rel_dir=str(path.parent))
            for episodes in iterate_episodes(name, uid, rel_dir, OG_MARL_PARTS[part]):
                experience = to_og_marl(episodes, metadata)
                # Chunks of 10,000 timesteps: about 5 MB of observations.
                vault = vault or make_vault(config, experience, 10_000, {"recording": metadata})
                write_vault(vault, experience)
            Path(folder, path.name).rename(path)
    return path


# ---- RESULTS: metrics, pictures and animation ----------------------------------------------------


def write_metrics(
    config: Config, task: Task, evaluations: list[Evaluation], absolute_metric: float | None = None
) -> None:
    """Write all evaluations so far to `metrics.json`, in the format that marl-eval reads."""
    metrics: dict[str, Any] = {
        f"step_{index}": {
            "step_count": evaluation.step_count,
            "elapsed_time": evaluation.elapsed_time,
            "mean_episode_return": [float(evaluation.episode_return.mean())],
            "steps_per_second": [evaluation.steps_per_second],
        }
        for index, evaluation in enumerate(evaluations)
    }
    if absolute_metric is not None:
        metrics["absolute_metrics"] = {"mean_episode_return": [absolute_metric]}
    for key in (f"seed_{config.system.seed}", "ff_ippo", task.scenario, task.environment):
        metrics = {key: metrics}
    write_json(run_path(config.results.rel_dir, config.vault) / "metrics.json", metrics)


def plot_learning_curve(evaluations: list[Evaluation]) -> Figure:
    """Return, losses and entropy against environment steps."""
    steps = [evaluation.step_count for evaluation in evaluations]
    returns = np.stack([evaluation.episode_return for evaluation in evaluations])
    training = [evaluation.train_episode_return for evaluation in evaluations]
    style = {"marker": "o" if len(evaluations) == 1 else None}  # there is no line through one point

    figure = Figure(figsize=(8.5, 5.5), dpi=150, layout="constrained")
    losses = list(evaluations[0].losses)  # none where nothing was learned
    mosaic = [["return"] * len(losses), losses] if losses else [["return"]]
    panels = figure.subplot_mosaic(mosaic, height_ratios=[2, 1][: len(mosaic)], sharex=True)
    axes = panels.pop("return")
    band = np.percentile(returns, [10, 90], axis=1)
    label = "evaluation: 10th to 90th percentile of the episodes"
    axes.fill_between(steps, *band, label=label, color="#0072B2", alpha=0.2, linewidth=0)
    axes.plot(steps, training, "#E69F00", label="training: mean", linewidth=1, **style)
    axes.plot(steps, returns.mean(axis=1), "#0072B2", label="evaluation: mean", **style)
    axes.set(ylabel="Episode return", xlabel="Environment steps")
    axes.locator_params(axis="x", nbins=5)  # the panels below share these ticks, with less room
    axes.tick_params(labelbottom=True)
    axes.legend(loc="upper left")
    for name, axes in panels.items():
        axes.plot(steps, [e.losses[name] for e in evaluations], "#555555", linewidth=1, **style)
        title = {"entropy": "Entropy of the policy (nats)"}
        axes.set_title(title.get(name, name.replace("_", " ").capitalize()), fontsize="medium")
        axes.set_xlabel("Environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def plot_dataset(name: str, uid: str, rel_dir: str = "vaults") -> Figure:
    """What is in a vault: returns, lengths and actions, in each third of the training."""
    stores, num_timesteps, metadata = open_recording(name, uid, rel_dir)
    episodes = load_episodes(name, uid, rel_dir, leaves=("action",))
    returns, length = episodes.episode_return, episodes.length
    low, high = float(returns.min(initial=0)), float(returns.max(initial=0))
    if (returns == returns.round()).all():  # a whole number in the middle of each bar
        low, high = low - 0.5, low - 0.5 + 12 * math.ceil((high - low + 1) / 12)
    bins = (
        np.linspace(low, high, 13),
        np.linspace(0, length.max(initial=1), 11),
        np.arange(metadata["num_actions"] + 1) - 0.5,
    )
    num_steps = num_timesteps * stores["done"].shape[0]
    third = 3 * episodes.recorded_at // max(1, num_steps)

    figure = Figure(figsize=(8.5, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[4, 4, 5])
    colors = ("#A6CEE3", "#4292C6", "#08306B")  # their lightness tells them apart
    parts = [third == part for part in range(3)]
    labels = [
        f"{ordinal} third of training: {part.sum():,} episodes"
        for ordinal, part in zip(("first", "second", "last"), parts, strict=True)
    ]
    actions = [episodes.transitions["action"][np.repeat(part, length)].ravel() for part in parts]
    values = ([returns[part] for part in parts], [length[part] for part in parts], actions)
    for axes, value, edges in zip(panels, values, bins, strict=True):
        percent = [np.full(x.size, 100 / max(1, x.size)) for x in value]
        axes.hist(value, edges, weights=percent, color=colors, label=labels)
    panels[0].set(xlabel="Episode return", ylabel="Share of episodes (%)")
    panels[1].set(xlabel="Episode length (timesteps)", ylabel="Share of episodes (%)")
    panels[2].set(xlabel="Action of an agent", ylabel="Share of actions (%)")
    actions = metadata["task"]["actions"] or range(metadata["num_actions"])
    names = [str(action).replace(" ", "\n") for action in actions]
    panels[2].set_xticks(range(len(names)), names, fontsize="small")
    entries = panels[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=3, fontsize="small")
    return figure


def animate_episode(
    env: Environment, actor: TrainState, path: Path, seed: int = 42, greedy: bool = False
) -> None:
    """Draw an episode of the policy as a GIF, ten timesteps a second."""
    reset, step, choose = jax.jit(env.reset), jax.jit(env.step), jax.jit(act, static_argnums=3)
    key = jax.random.PRNGKey(seed)
    state, timestep = reset(key)
    states = []
    while not timestep.last():
        key, policy_key = jax.random.split(key)
        observation = jax.tree.map(lambda x: x[None], timestep.observation)
        action = choose(actor, observation, policy_key[None], greedy)[0]
        state, timestep = step(state, action)
        states.append(state)
    with matplotlib.rc_context({"animation.writer": "pillow", "figure.dpi": 40}):
        env.unwrapped.animate(jax.device_get(states), interval=100, save_path=str(path))


def save_results(
    result: "ExperimentResult", task: Task, env: Environment, actor: TrainState
) -> None:
    """Write the metrics and draw the pictures of a finished run; what fails is a warning."""
    config, vault = result.config, result.config.vault
    path = run_path(config.results.rel_dir, vault)
    with optional("writing metrics.json"):
        write_metrics(config, task, result.evaluations, result.absolute_metric)
    with optional("drawing learning_curve.png"):
        plot_learning_curve(result.evaluations).savefig(path / "learning_curve.png")
    if vault.save:
        with optional("drawing dataset.png"):
            plot_dataset(vault.name, vault.uid, vault.rel_dir).savefig(path / "dataset.png")
    if config.results.animation:
        with optional("drawing episode.gif"):
            actor, greedy = jax.device_get(actor), config.arch.evaluation_greedy
            animate_episode(env, actor, path / "episode.gif", config.system.seed, greedy)
    print(f"results: {', '.join(sorted(x.name for x in path.glob('*.*')))} in {path}")


# ---- RUN -----------------------------------------------------------------------------------------


class TrainingError(RuntimeError):
    """A loss or a parameter became infinite or not a number; the message is one line."""


class ExperimentResult(NamedTuple):
    """What `run_experiment` returns."""

    config: Config  # of the run, with nothing left open
    vault_path: Path | None  # folder of the vault, None where nothing was saved
    num_timesteps: int  # environment steps that the vault holds
    evaluations: list[Evaluation]  # in the order of training
    params: Params  # of the evaluation with the highest mean return
    absolute_metric: float | None  # mean return of `params` over more episodes, if asked for

    @property
    def evaluation_returns(self) -> np.ndarray:
        """Mean episode return of each evaluation, (num_evaluation,) float32."""
        return np.array([evaluation.episode_return.mean() for evaluation in self.evaluations])


def run_experiment(config: Config = Config(), env: Environment | None = None) -> ExperimentResult:
    """Train, evaluate and record; `env` is an environment of one's own, instead of `config.env`.

    Of several processes each records the rows of its own devices, and process 0 does the rest.
    Raises a `ConfigError` before anything is recorded, later a `RecordingError` (a vault or a
    checkpoint that could not be written or read) or a `TrainingError`.
    """
    start_time = time.perf_counter()
    is_first_process, is_alone = jax.process_index() == 0, jax.process_count() == 1
    mesh = Mesh(np.array(jax.devices()), ("device",))
    config = check_config(config, mesh.size, env)
    system, arch, checkpoint, vault = config.system, config.arch, config.checkpoint, config.vault
    saves_results = config.results.save and is_first_process
    num_updates_per_eval = system.num_updates // arch.num_evaluation
    task = find_task(config.env, env)
    env = make_env(config.env, system.add_agent_id, env)

    # INITIALISE
    key, eval_key, params_key = jax.random.split(jax.random.PRNGKey(system.seed), 3)
    learn = make_learn(env, system, num_updates_per_eval, mesh, vault.extra_leaves)
    evaluate_parts = make_evaluate(env, arch.num_eval_episodes, arch.evaluation_greedy, mesh)
    init = functools.partial(init_learner, env=env, config=config, mesh=mesh)
    experience = jax.eval_shape(learn, jax.eval_shape(init, key, params_key)).experience
    *axes, num_agents, num_actions = experience["legal_action_mask"].shape
    steps_per_evaluation = math.prod(axes)
    own_shape = lambda x: jax.ShapeDtypeStruct((jax.local_device_count(), *x.shape[1:]), x.dtype)
    experience = jax.tree.map(own_shape, experience)  # of this process
    if vault.save:
        buffer_capacity(vault, experience)  # refused before anything is made
    state = init(key, params_key)
    if checkpoint.load_params:
        loaded = broadcast(load_params(checkpoint.load_params) if is_first_process else None)
        same = jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, loaded)
        require(same, f"checkpoint.load_params {checkpoint.load_params!r} has other networks")
        actor, critic = place_as(loaded, state.params)
        actor, critic = state.actor.replace(params=actor), state.critic.replace(params=critic)
        state = state._replace(actor=actor, critic=critic)
    progress = Progress(state, eval_key, state.params, -math.inf, [])
    recorder = manager = absolute_metric = None

    with contextlib.ExitStack() as stack:

        @stack.push
        def tell_how_to_go_on(error_type, error, _):
            if error_type is KeyboardInterrupt and checkpoint.save:
                done = f"after {len(progress.evaluations)} of {arch.num_evaluation} evaluations"
                flags = f"--checkpoint.resume --vault.uid {vault.uid}"
                error.add_note(f"{done}: to go on, run the same with {flags}")

        if not is_first_process:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))

        # RESUME, or begin in folders of its own
        path, own_vault = run_path(checkpoint.rel_dir, vault), part_of(vault)
        if checkpoint.save and is_first_process:
            stack.enter_context(claim(path, exist_ok=checkpoint.resume))
            manager = stack.enter_context(open_checkpoints(path))
        if checkpoint.resume:
            progress = load_checkpoint(manager, config, progress)
            if progress.state is state:
                print(f"there is no checkpoint in {path}: the run starts from the beginning")
                if vault.save and run_path(vault.rel_dir, own_vault).exists():
                    recorded, _ = open_vault(vault.name, own_vault.uid, vault.rel_dir)
                    holds_data = f"vault.uid {vault.uid!r} holds data: choose another"
                    require(recorded.vault_index == 0, holds_data)
        num_done = len(progress.evaluations)
        if vault.save:
            metadata = describe_recording(config, task, experience)
            num_written = num_done if checkpoint.resume else None
            recorder = Recorder(own_vault, experience, metadata, mesh.local_mesh, num_written)
            stack.enter_context(recorder)
        print(
            f"ff_ippo on {task.scenario}: {num_agents} agents, {num_actions} actions, seed "
            f"{system.seed}, {mesh.size} x {jax.devices()[0].device_kind}\n"
            f"{arch.num_evaluation * steps_per_evaluation:,} environment steps in "
            f"{steps_per_evaluation // system.rollout_length:,} rows, "
            f"recorded in {recorder.path if recorder else 'no vault'}"
            f"{'' if is_alone else f' and {jax.process_count() - 1} more'}"
        )
        if system.total_timesteps not in (None, arch.num_evaluation * steps_per_evaluation):
            print(f"system.total_timesteps {system.total_timesteps:,} is rounded up to evaluations")

        # In threads: a signal is answered at once, not when XLA returns, and what is recorded is
        # written beside the training.
        compute, disk = ThreadPoolExecutor(1), stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(compute.shutdown, wait=False)
        recording = disk.submit(int)  # what was begun last

        def call(function, *arguments):
            return compute.submit(lambda: jax.block_until_ready(function(*arguments))).result()

        def begin(function, *arguments):
            nonlocal recording
            recording.result()  # raises what failed before
            recording = disk.submit(function, *arguments)

        def save():
            """Write the vault, then a checkpoint: it never knows of more than any part holds."""
            if recorder and not is_alone:
                begin(recorder.write)
                recording.result()
            saved = progress
            if checkpoint.save:
                state, params = gather((progress.state, progress.best_params))
                saved = progress._replace(state=state, best_params=params)
            begin(write, saved)

        def write(saved):
            if recorder:
                recorder.write()
            if manager:
                save_checkpoint(manager, config, saved)

        def evaluate_actor(actor, key):
            key, *keys = jax.random.split(key, mesh.size + 1)
            return key, gather(evaluate_parts(actor, np.stack(keys)))

        hidden = not sys.stdout.isatty() and "ipykernel" not in sys.modules
        bar = tqdm(total=arch.num_evaluation, initial=num_done, file=sys.stdout, disable=hidden)
        stack.enter_context(bar)
        last_time = time.perf_counter()
        try:
            if num_done == 0:
                save()
            for index in range(num_done, arch.num_evaluation):
                # TRAIN
                train_time = time.perf_counter()
                state, experience, metrics, losses, finite = call(learn, progress.state)
                train_time = time.perf_counter() - train_time
                finite, losses = jax.device_get((finite, losses))
                if not finite.all():
                    num_updates = index * num_updates_per_eval + int(finite.argmin()) + 1
                    step = num_updates * steps_per_evaluation // num_updates_per_eval
                    problem = f"a loss or a parameter is infinite or not a number at step {step:,}"
                    remedy = "what came before is recorded; lower system.actor_lr and critic_lr"
                    raise TrainingError(f"{problem}: {remedy}")

                # RECORD
                if recorder:
                    own_part = multihost_utils.global_array_to_host_local_array
                    begin(recorder.add, own_part(experience, mesh, SHARDED))
                del experience  # so that it is not held while the next is made

                # EVALUATE the parameters that the update has just produced
                eval_key, evaluated = call(evaluate_actor, state.actor, progress.eval_key)
                mean_return = float(evaluated.episode_return.mean())
                best = progress.best_params, progress.best_return
                if mean_return >= progress.best_return:
                    best = state.params, mean_return

                # LOG
                metrics = call(gather, metrics)
                train_returns = metrics.episode_return[metrics.done].tolist()
                past, now = progress.evaluations, time.perf_counter()
                evaluation = Evaluation(
                    step_count=(index + 1) * steps_per_evaluation,
                    elapsed_time=past[-1].elapsed_time + now - last_time if past else 0.0,
                    steps_per_second=steps_per_evaluation / train_time,
                    episode_return=evaluated.episode_return,
                    episode_length=evaluated.episode_length,
                    train_episode_return=float(np.mean(train_returns or math.nan)),
                    losses={name: float(loss.mean()) for name, loss in losses.items()},
                )
                last_time = now
                progress = Progress(state, eval_key, *best, [*past, evaluation])
                parts = [
                    f"step {evaluation.step_count:,}: {evaluation.steps_per_second:,.0f} steps/s"
                    f"{' (with compiling)' if index == num_done else ''}",
                    f"episode return {mean_return:.2f}",
                    f"length {evaluation.episode_length.mean():.0f}",
                    *(f"{name} {loss:.4f}" for name, loss in evaluation.losses.items()),
                    *([f"vault written to {recorder.num_timesteps:,}"] if recorder else []),
                ]
                tqdm.write(", ".join(parts), file=sys.stdout)
                bar.update()
                # The file is written whole: rarer as it grows, so that this stays linear in time.
                if saves_results and index % (1 + index // 200) == 0:
                    with optional("writing metrics.json"):
                        write_metrics(config, task, progress.evaluations)
                if index % vault.save_interval == 0:
                    save()
        finally:
            # Processes that are stopped at different evaluations go on from the last checkpoint.
            if is_alone or len(progress.evaluations) == arch.num_evaluation:
                save()
            recording.result()

        # ABSOLUTE METRIC of the best parameters
        actor = progress.state.actor.replace(params=progress.best_params.actor)
        if arch.absolute_metric:
            eval_key, returns = progress.eval_key, np.zeros(0, np.float32)
            while len(returns) < arch.num_absolute_metric_eval_episodes:
                eval_key, evaluated = call(evaluate_actor, actor, eval_key)
                returns = np.append(returns, evaluated.episode_return)
            absolute_metric = float(returns[: arch.num_absolute_metric_eval_episodes].mean())

    multihost_utils.sync_global_devices("recorded")
    num_timesteps, path = (recorder.num_timesteps, recorder.path) if recorder else (0, None)
    evaluations, params = progress.evaluations, jax.device_get(progress.best_params)
    result = ExperimentResult(config, path, num_timesteps, evaluations, params, absolute_metric)
    if recorder and not system.learn:
        mean_return = float(result.evaluation_returns.mean())
        with optional("writing metadata.json"):
            update_metadata(path, {"policy": {**metadata["policy"], "episode_return": mean_return}})
    if not is_first_process:
        return result
    seconds = round(time.perf_counter() - start_time)
    print(f"done in {datetime.timedelta(seconds=seconds)} (h:mm:ss)")
    if arch.absolute_metric:
        print(f"absolute metric: {absolute_metric:.2f} (mean episode return)")
    if recorder:
        paths = part_paths(run_path(vault.rel_dir, vault))
        files = (file for path in paths for file in path.rglob("*"))
        size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        print(f"vault: {num_timesteps:,} steps, {size:,.1f} MB in {', '.join(map(str, paths))}")
        opened = f"Vault({vault.name!r}, vault_uid={own_vault.uid!r}, rel_dir={vault.rel_dir!r})"
        print(f"read it with: from flashbax.vault import Vault; {opened}.read()")

    # EXPORT, and RESULTS
    if recorder and vault.og_marl:
        with optional("the export"):
            export = export_og_marl(vault.name, vault.uid, vault.rel_dir)
            print(f"in OG-MARL's layout: {export}")
    if saves_results:
        save_results(result, task, env, actor)
    return result


# ---- COMMAND LINE --------------------------------------------------------------------------------


def end_at_once(status: int, message: str) -> None:
    """End without waiting for what XLA computes, nor for other processes."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        print(message, file=sys.stderr, flush=True)
        if stderr_filter is not None:
            os.close(2)  # nobody can write to the filter any more, so it ends
            stderr_filter.wait(timeout=5)
    os._exit(status)


def main() -> None:
    """The command line: every field of `Config` is a flag, such as --system.num-updates 10."""
    config = tyro.cli(Config)
    in_notebook = "ipykernel" in sys.modules
    if not in_notebook:
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows how far it is
        # What Orbax and TensorStore say of an error that is reported in one line below.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(number, _):
        for each in signals:
            signal.signal(each, signal.SIG_DFL)  # a second signal stops at once
        raise KeyboardInterrupt(number)

    handlers = {each: signal.signal(each, stop) for each in signals}
    try:
        run_experiment(config)
        return
    except (ConfigError, RecordingError, TrainingError, FileNotFoundError) as error:
        problem = str(error)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            problem = "out of memory: lower arch.num_envs, or vault.max_length if it is set"
        elif jax.process_count() > 1:
            reason = str(error).splitlines()[0]
            problem = f"another process has ended ({reason}): use checkpoint.resume on all"
        else:
            raise
    except KeyboardInterrupt as interrupt:
        if in_notebook:
            raise
        number = interrupt.args[0]
        notes = getattr(interrupt, "__notes__", [])
        end_at_once(128 + number, " ".join([f"stopped by {signal.Signals(number).name}", *notes]))
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    if jax.process_count() == 1:
        sys.exit(f"error: {problem}")
    end_at_once(1, f"error: {problem}")


if __name__ == "__main__":
    if IS_SCRIPT:
        main()
    else:  # pasted into a notebook, whose command line is not this file's
        print("ready: result = run_experiment(Config()) trains and records")
