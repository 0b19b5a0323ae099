#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.7.0,<0.13",
#     "jaxlib>=0.7.0,<0.13",
#     "flashbax>=0.1.3,<0.2",
#     "flax>=0.11.0,<0.13",
#     "optax>=0.2.5,<0.3",
#     "distrax>=0.1.7,<0.2",
#     "jumanji>=1.1.2,<1.2",
#     "chex>=0.1.90,<0.2",
#     "tyro>=0.9.1,<2",
#     "tqdm>=4.66.1,<5",
# ]
# ///
"""Train independent PPO and record every transition into a Flashbax Vault.

    python ff_ippo_store_experience.py --system.num-updates 10 --arch.num-evaluation 2

or, from Python, `run_experiment(Config())`.  The system is Mava's Anakin IPPO
(https://github.com/instadeepai/Mava); the file reads in the order in which data flows.  In shapes:

    D   devices                          N   agents
    NU  updates per evaluation           O   features of one agent's observation
    UB  update batch size                A   actions
    T   timesteps per rollout            B   any batch of environments, within a device UB * NE
    NE  environments                     E   evaluations

Each device holds UB batches of NE environments, each with its own random key; the gradient is the
mean over all batches and devices.
"""

import builtins
import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import chex
import distrax
import flashbax as fbx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore
import tyro
from chex import Array, ArrayTree, PRNGKey
from flashbax.buffers.trajectory_buffer import TrajectoryBufferState
from flashbax.vault.vault import TIME_AXIS_MAX_LENGTH, Vault
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm


# ---- CONFIGURATION -------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Independent PPO, with Mava's defaults."""

    total_timesteps: int | None = None  # environment steps in all; if set, decides num_updates
    num_updates: int = 1000  # PPO updates in all, a multiple of arch.num_evaluation
    seed: int = 42  # seed of every random number
    learn: bool = True  # update the policy; without, it is recorded as it is
    add_agent_id: bool = True  # put a one-hot of the agent's index in front of its observation
    actor_lr: float = 2.5e-4  # Adam's learning rate for the actor
    critic_lr: float = 2.5e-4  # Adam's learning rate for the critic
    update_batch_size: int = 2  # batches of environments on each device (UB)
    rollout_length: int = 128  # timesteps of each environment between updates (T)
    ppo_epochs: int = 4  # passes over the transitions of a rollout
    num_minibatches: int = 2  # minibatches in each pass, dividing rollout_length * arch.num_envs
    gamma: float = 0.99  # discount per timestep
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_eps: float = 0.2  # clip range of the probability ratio and of the value
    ent_coef: float = 0.01  # entropy coefficient
    vf_coef: float = 0.5  # value loss coefficient
    max_grad_norm: float = 0.5  # global norm to which gradients are clipped


@dataclasses.dataclass(frozen=True)
class ArchConfig:
    """Anakin: how much runs side by side, and how often it is evaluated."""

    num_envs: int = 16  # environments in each of the system.update_batch_size batches (NE)
    num_evaluation: int = 200  # evaluations, evenly spaced over training (E)
    num_eval_episodes: int = 32  # episodes per evaluation
    num_absolute_metric_eval_episodes: int = 320  # episodes for the absolute metric
    absolute_metric: bool = True  # evaluate the best parameters at the end, as marl-eval needs it
    evaluation_greedy: bool = False  # evaluate the most probable action instead of a sampled one
    distributed: bool = False  # be one of several processes, each with devices of its own
    coordinator_address: str | None = None  # of process 0, host:port, if the cluster does not say
    num_processes: int | None = None  # processes in all, if the cluster does not say
    process_id: int | None = None  # which of them this is, from 0, if the cluster does not say


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The task."""

    scenario: str = "tiny-2ag"  # one of TASKS, such as small-4ag or 2s-8x8-2p-2f-coop
    time_limit: int | None = None  # timesteps until an episode is cut off; by default 500 or 100


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Torsos of the actor and the critic."""

    actor_layer_sizes: tuple[int, ...] = (128, 128)  # units of each ReLU layer of the actor
    critic_layer_sizes: tuple[int, ...] = (128, 128)  # units of each ReLU layer of the critic


@dataclasses.dataclass(frozen=True)
class VaultConfig:
    """The folder of the run, REL_DIR/NAME/UID: vault, checkpoints, metrics, pictures and card."""

    save: bool = True  # record the experience
    name: str | None = None  # name of the vault; by default ff_ippo_rware, ff_ippo_lbf, ...
    uid: str | None = None  # identifier of this run; by default date, time, random number
    rel_dir: str = "vaults"  # folder of all vaults, from the working directory
    save_interval: int = 5  # evaluations between writes to disk
    # recorded too: any of next_observation, log_prob, value, discount, step_count, truncation
    extra_leaves: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where training begins."""

    resume: bool = False  # go on where the run vault.uid stopped; a finished run may grow
    load_params: str | None = None  # begin with the best parameters of a run, vaults/NAME/UID


@dataclasses.dataclass(frozen=True)
class Config:
    """Train independent PPO and record the experience into a Flashbax Vault."""

    system: SystemConfig = SystemConfig()
    arch: ArchConfig = ArchConfig()
    env: EnvConfig = EnvConfig()
    network: NetworkConfig = NetworkConfig()
    vault: VaultConfig = VaultConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class ConfigError(ValueError):
    """A run that cannot be made as it is configured; one line says what to change."""


def require(condition: bool, message: str):
    """Raise a `ConfigError` with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


class Entries(dict):
    """A dictionary that tells all its names where it is asked for another one."""

    def __missing__(self, name):
        raise ConfigError(f"there is no {name!r}: there are {', '.join(self)}")


# Several processes find each other before one uses a device, as the import of Jumanji does.
if "--arch.distributed" in sys.argv and not jax.distributed.is_initialized():
    arch = tyro.cli(Config).arch
    try:
        jax.distributed.initialize(
            arch.coordinator_address,
            arch.num_processes,
            arch.process_id,
            heartbeat_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: arch.distributed: {' '.join(str(error).split())}")

# In a notebook, Jumanji switches matplotlib to a backend that may not be installed: hide the
# notebook from it.  A process that a notebook starts inherits such a backend: forget it.
with mock.patch.object(builtins, "__IPYTHON__", False, create=True), mock.patch.dict(os.environ):
    if importlib.util.find_spec("matplotlib_inline") is None:
        os.environ.pop("MPLBACKEND", None)
    from jumanji.env import Environment
    from jumanji.environments import LevelBasedForaging, RobotWarehouse
    from jumanji.environments.routing.lbf import generator as lbf
    from jumanji.environments.routing.robot_warehouse import constants
    from jumanji.environments.routing.robot_warehouse import generator as rware
    from jumanji.types import TimeStep
    from jumanji.wrappers import Wrapper
    from matplotlib.figure import Figure


IMPORT_PROCESS = os.getpid()  # in which the import of Jumanji has started JAX


def log(message, is_last=False):
    """Print a line, in process 0 alone; where stdout is gone, the last one goes to stderr."""
    if jax.process_index() > 0:
        return
    if sys.stdout:  # else it was closed
        try:
            if hasattr(sys.stdout, "reconfigure"):  # what it cannot print is escaped
                sys.stdout.reconfigure(errors="backslashreplace")
            tqdm.write(message)  # above the progress bar
            sys.stdout.flush()  # a log file shows how far it is
        except OSError:  # nobody reads it any more
            sys.stdout = None
    if is_last and not sys.stdout:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


def gather(tree):
    """Arrays that are spread over all devices, or of each process, as NumPy's; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


# ---- ENVIRONMENT ---------------------------------------------------------------------------------
class Task(NamedTuple):
    """What a scenario is made of."""

    make: Callable  # of the time limit
    time_limit: int  # timesteps, by default
    marl_eval_name: str  # marl-eval's name of the family
    og_marl_name: str  # OG-MARL's name of the family
    actions: tuple = ()  # for the pictures; by default numbers
    extra_leaves: tuple = ("truncation",)  # recorded by default


def warehouse_task(shelf_rows, num_agents, request_queue_size):
    """A RobotWarehouse, whose vault is the original's: no leaf but `done` tells of an end."""

    def make(time_limit):
        generator = rware.RandomGenerator(
            shelf_rows=shelf_rows,
            shelf_columns=3,
            column_height=8,
            num_agents=num_agents,
            sensor_range=1,
            request_queue_size=request_queue_size,
        )
        return CutOffWrapper(Warehouse(generator, time_limit))

    return Task(
        make=make,
        time_limit=500,
        marl_eval_name="RobotWarehouse",
        og_marl_name="rware",
        actions=("noop", "forward", "left", "right", "toggle load"),
        extra_leaves=(),
    )


def lbf_task(grid_size, num_agents, num_food, fov, force_coop=False):
    """A LevelBasedForaging, whose agents see `fov` cells far."""

    def make(time_limit):
        generator = lbf.RandomGenerator(grid_size, num_agents, num_food, fov, force_coop=force_coop)
        return Foraging(generator, time_limit=time_limit)

    return Task(
        make=make,
        time_limit=100,
        marl_eval_name="LevelBasedForaging",
        og_marl_name="lbf",
        actions=("noop", "up", "down", "left", "right", "load"),
    )


# To add a task is to add an entry.
TASKS = {
    # shelf rows, agents, requests
    "tiny-2ag": warehouse_task(1, 2, 2),
    "tiny-4ag": warehouse_task(1, 4, 4),
    "tiny-4ag-easy": warehouse_task(1, 4, 8),
    "small-4ag": warehouse_task(2, 4, 4),
    # cells, agents, food, sight: "2s" sees 2 cells far, the others the whole grid
    "2s-8x8-2p-2f-coop": lbf_task(8, 2, 2, 2, force_coop=True),
    "8x8-2p-2f-coop": lbf_task(8, 2, 2, 8, force_coop=True),
    "2s-10x10-3p-3f": lbf_task(10, 3, 3, 2),
    "10x10-3p-3f": lbf_task(10, 3, 3, 10),
    "15x15-3p-5f": lbf_task(15, 3, 5, 15),
    "15x15-4p-3f": lbf_task(15, 4, 3, 15),
    "15x15-4p-5f": lbf_task(15, 4, 5, 15),
}


def find_task(scenario, env=None):
    """The task of that name, or that of your own environment; else a `ConfigError`."""
    if env is None:
        return Entries(TASKS)[scenario]
    name = type(getattr(env, "unwrapped", env)).__name__  # and not that of a wrapper
    return Task(
        make=lambda time_limit: env,
        time_limit=env.time_limit,
        marl_eval_name=name,
        og_marl_name=name.lower(),
    )


def make_env(scenario, time_limit=None, add_agent_id=True):
    """One environment of a task, without auto-reset; raises what `find_task` does."""
    task = find_task(scenario)
    return AgentWrapper(task.make(time_limit or task.time_limit), add_agent_id)


class Observation(NamedTuple):
    """What the agents see."""

    agents_view: Array  # (..., N, O) float32
    action_mask: Array  # (..., N, A) bool, the action is legal
    global_state: Array | None = None  # (..., S) float32, of environments that have one


class AgentWrapper(Wrapper):
    """Gives each agent its `Observation` (N, .), reward and discount (N,) float32, as in Mava."""

    def __init__(self, env, add_agent_id):
        self._env = env
        self.add_agent_id = add_agent_id

    def reset(self, key):
        state, timestep = self._env.reset(key)
        return state, self._per_agent(timestep)

    def step(self, state, action):  # (N,) int32
        state, timestep = self._env.step(state, action)
        return state, self._per_agent(timestep)

    def _per_agent(self, timestep):
        observation = timestep.observation
        view = observation.agents_view
        num_agents = len(view)
        if self.add_agent_id:
            view = jnp.hstack([jnp.eye(num_agents), view])
        mask = getattr(observation, "action_mask", None)
        if mask is None:
            mask = self._all_actions(num_agents)
        global_state = getattr(observation, "global_state", None)
        to_float = functools.partial(jax.tree.map, jnp.float32)  # where there is something
        # What the team has in common is that of each agent.
        to_each = lambda x: jnp.broadcast_to(to_float(x), num_agents)
        return timestep.replace(
            observation=Observation(to_float(view), mask.astype(bool), to_float(global_state)),
            reward=to_each(timestep.reward),
            discount=to_each(timestep.discount),
        )

    def _all_actions(self, num_agents):
        """The mask (N, A) where all actions that an agent has are legal."""
        with jax.ensure_compile_time_eval():  # under `jit`, the specification would be traced
            spec = getattr(self._env, "action_spec", None)
            num_actions = getattr(spec, "num_values", ())
        require(
            np.size(num_actions) in (1, num_agents),
            f"{type(self._env).__name__} has no action_mask in its observation, nor an "
            f"action_spec of discrete actions of {num_agents} agents",
        )
        num_actions = np.resize(num_actions, num_agents)  # one for each agent
        return jnp.arange(num_actions.max()) < num_actions[:, None]


class EpisodeMetrics(NamedTuple):
    """Return and length of episodes so far: of whole ones where `done`."""

    episode_return: Array  # (...) float32, the agents' mean reward, summed
    episode_length: Array  # (...) int32, timesteps
    done: Array  # (...) bool, the step was the last of its episode


class EnvState(NamedTuple):
    """Where environments are, between two steps."""

    state: ArrayTree  # Jumanji's, of (...)
    observation: Observation  # (..., N, .), what the next action is chosen on
    metrics: EpisodeMetrics  # (...), of the last step's episode


def reset_environments(env, keys):
    """The `EnvState` (B, ...) of B environments at their first episodes, with the keys (B, 2)."""
    state, timestep = jax.vmap(env.reset)(keys)
    zeros = functools.partial(jnp.zeros, len(keys))
    metrics = EpisodeMetrics(zeros(jnp.float32), zeros(jnp.int32), zeros(bool))
    return EnvState(state, timestep.observation, metrics)


def step_environment(env, env_state, action):
    """Step an environment with the joint action (N,), and begin a new episode where one ended.

    Returns the new `EnvState` and the timestep.  The timestep is what the step led to, also where
    it ended: only the state is of the new episode.
    """
    state, timestep = env.step(env_state.state, action)
    done, last = timestep.last(), env_state.metrics
    metrics = EpisodeMetrics(
        episode_return=jnp.where(last.done, 0, last.episode_return) + timestep.reward.mean(),
        episode_length=jnp.where(last.done, 0, last.episode_length) + 1,
        done=done,
    )

    def reset(key):
        state, timestep = env.reset(jax.random.split(key)[0])  # the first of two keys, as in Mava
        return state, timestep.observation

    state, observation = rare_cond(done, reset, (state, timestep.observation), state.key)
    return EnvState(state, observation, metrics), timestep


def rare_cond(condition: Array, function: Callable, default: ArrayTree, *operands: ArrayTree):
    """`function(*operands)` where `condition` holds, else `default`: a cheap `cond` under `vmap`.

    Under `vmap` a `lax.cond` becomes a select: both branches run for every row.  Here the few rows
    that need `function` are gathered, mapped and scattered back, a chunk at a time.
    """

    @jax.custom_batching.custom_vmap
    def branch(condition, default, operands):
        return jax.lax.cond(condition, lambda: function(*operands), lambda: default)

    @branch.def_vmap
    def branch_batch(size, in_batched, *arguments):
        batch = lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *x.shape))
        condition, default, operands = jax.tree.map(batch, arguments, tuple(in_batched))
        chunk = min(size, max(8, size // 64))

        def map_chunk(carry):
            (rows,) = jnp.nonzero(carry[0], size=chunk, fill_value=size)  # `size` is no row
            mapped = jax.vmap(function)(*jax.tree.map(lambda x: x[rows], operands))
            new = (jnp.zeros(chunk, bool), mapped)  # of these rows, `condition` is done with
            return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), carry, new)

        _, result = jax.lax.while_loop(lambda x: x[0].any(), map_chunk, (condition, default))
        return result, jax.tree.map(lambda _: True, result)

    return branch(condition, default, operands)


class CutOffWrapper(Wrapper):
    """Makes the discount 1 at the time limit, where Jumanji says 0.

    The discount then is 0 only at a terminal state.  One that is reached in the very last step
    counts as cut off.
    """

    def step(self, state, action):
        state, timestep = self._env.step(state, action)
        is_cut_off = state.step_count >= self.time_limit
        return state, timestep.replace(discount=jnp.where(is_cut_off, 1.0, timestep.discount))


class Warehouse(RobotWarehouse):
    """Jumanji's RobotWarehouse, step for step, which draws new requests only after a delivery.

    Deliveries are rare, yet under `vmap` Jumanji draws one request for every goal, environment and
    step: four fifths of its time.
    """

    def _update_reward_and_request_queue(self, *arguments):
        key, reward, request_queue, grid, shelves, (column, row) = arguments
        delivered = (request_queue + 1 == grid[constants._SHELVES, row, column]).any()
        update = super()._update_reward_and_request_queue
        return rare_cond(delivered, update, (key, reward, request_queue, shelves), *arguments)


class Foraging(LevelBasedForaging):
    """Jumanji's LevelBasedForaging, whose reward is the team's, summed over the agents."""

    def get_reward(self, *food):  # () float32
        return super().get_reward(*food).sum()


# ---- NETWORKS ------------------------------------------------------------------------------------
class Layers(nn.Module):
    """Dense layers with orthogonal weights, (..., F) -> (rows, sizes[-1])."""

    sizes: tuple[int, ...]
    gain: float = math.sqrt(2)
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x: Array):
        # One matrix product over all rows is 2.6 times as fast as one with several batch axes.
        x = x.reshape(-1, x.shape[-1])
        for size in self.sizes:
            layer = nn.Dense(size, kernel_init=nn.initializers.orthogonal(self.gain))
            x = self.activation(layer(x))
        return x


# The names of the layers are Mava's: Flax draws the initial weights by the names.
class Actor(nn.Module):
    """Logits (..., N, A) of the agents' shared policy, float32's smallest for illegal actions."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation):
        mask = observation.action_mask
        x = Layers(self.layer_sizes, name="torso")(observation.agents_view)
        logits = Layers(mask.shape[-1:], 0.01, lambda x: x, name="action_head")(x)
        return jnp.where(mask, logits.reshape(mask.shape), jnp.finfo(jnp.float32).min)


class Critic(nn.Module):
    """Values (..., N) of each agent's own observation."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation):
        x = Layers(self.layer_sizes, name="torso")(observation.agents_view)
        value = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x)
        return value.reshape(observation.agents_view.shape[:-1])


def init_networks(
    network: NetworkConfig,
    observation,
    key,
    actor_lr=2.5e-4,
    critic_lr=2.5e-4,
    max_grad_norm=0.5,
):
    """The actor and the critic, each with its optimiser: Adam after clipping by the global norm.

    Both are `TrainState`s, for an `Observation` of any batch axes, from the same `key` (2,).
    """

    def init(network, learning_rate):
        optimiser = optax.chain(
            optax.clip_by_global_norm(max_grad_norm),
            optax.adam(learning_rate, eps=1e-5),
        )
        params = network.init(key, observation)  # one key for both networks, as in Mava
        return TrainState.create(apply_fn=network.apply, params=params, tx=optimiser)

    return (
        init(Actor(network.actor_layer_sizes), actor_lr),
        init(Critic(network.critic_layer_sizes), critic_lr),
    )


# ---- ROLLOUT -------------------------------------------------------------------------------------
def act(actor, observation, keys, greedy=False):
    """Actions (B, N) int32 on an `Observation` (B, N, .); each of K `keys` (K, 2) samples B / K.

    `actor` is Flax's `TrainState`, as `init_networks` makes it.
    """
    logits = actor.apply_fn(actor.params, observation)
    if greedy:  # the most probable actions
        return distrax.Categorical(logits).mode()
    sample = jax.vmap(lambda key, logits: distrax.Categorical(logits).sample(seed=key))
    action = sample(keys, logits.reshape(len(keys), -1, *logits.shape[1:]))
    return action.reshape(logits.shape[:-1]).astype(jnp.int32)


class Transition(NamedTuple):
    """One step of environments; `update` adds what the networks say of it."""

    done: Array  # (..., N) bool, the step ended the episode, for whatever reason
    action: Array  # (..., N) int32
    reward: Array  # (..., N) float32
    discount: Array  # (..., N) float32, 0 where a terminal state was reached
    observation: Observation  # (..., N, .), what the action was chosen on
    next_observation: Observation  # (..., N, .), what the step led to, also where it ended
    metrics: EpisodeMetrics  # (...)
    log_prob: Array | None = None  # (..., N) float32, of the action
    value: Array | None = None  # (..., N) float32, of the observation


def rollout(env, actor, keys, env_state, rollout_length):
    """Act with the policy for T = `rollout_length` timesteps, as Anakin does (Hessel et al., 2021).

    Returns the new keys (UB, 2) and states (UB * NE, ...), and transitions (T, UB * NE, ...).
    """

    def env_step(carry, _):
        keys, env_state = carry

        # SELECT ACTION
        keys, policy_keys = jax.vmap(jax.random.split, out_axes=1)(keys)  # each (UB, 2)
        observation = env_state.observation
        action = act(actor, observation, policy_keys)

        # STEP ENVIRONMENT
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

    return jax.lax.scan(env_step, (keys, env_state), None, rollout_length)


# ---- ADVANTAGE -----------------------------------------------------------------------------------
def calculate_advantage(reward, done, value, last_value, gamma, gae_lambda):
    """Generalised advantage estimate (Schulman et al., 2016) and lambda-returns, (T, ...) float32.

    All are (T, ...) float32 but `done`, bool, past which nothing is bootstrapped, and `last_value`,
    (...), of the observation after the last step; `value` is of those that were acted on.
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
def actor_loss(params, apply, transition, advantage, clip_eps, ent_coef):
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


def critic_loss(params, apply, transition, target, clip_eps, vf_coef):
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
    """What training carries on, here on one device; outside `learn`, axes of UB have D * UB."""

    actor: TrainState
    critic: TrainState
    keys: PRNGKey  # (UB, 2) uint32
    env_state: EnvState  # (UB * NE, ...)

    @property
    def params(self):
        return Params(self.actor.params, self.critic.params)


STATE_SPECS = LearnerState(REPLICATED, REPLICATED, SHARDED, SHARDED)


def init_learner(key, config: Config, env, mesh):
    """The initial state on the mesh's devices, from the key of the run's seed."""
    system = config.system
    num_batches = mesh.size * system.update_batch_size

    def init(key):
        # The keys are split as Mava splits them: the same seed then records the same data.
        key, _, params_key = jax.random.split(key, 3)
        keys = jax.random.split(key, num_batches * config.arch.num_envs + 1)
        policy_keys = jax.random.split(keys[0], num_batches + 1)[1:]
        env_state = reset_environments(env, jax.vmap(jax.random.split)(keys[1:])[:, 1])
        actor, critic = init_networks(
            config.network,
            env_state.observation,
            params_key,
            actor_lr=system.actor_lr,
            critic_lr=system.critic_lr,
            max_grad_norm=system.max_grad_norm,
        )
        return LearnerState(actor, critic, policy_keys, env_state)

    # Placed as `learn` places its outputs: otherwise its second call would compile it again.
    shardings = LearnerState(*(NamedSharding(mesh, spec) for spec in STATE_SPECS))
    return jax.jit(init, out_shardings=shardings)(key)


def update_minibatch(actor, critic, batch, indices, config: SystemConfig):
    """One step of both optimisers, along the gradient's mean over UB and over the devices.

    `batch` holds transitions, advantages and lambda-returns of the rollout, (T * UB * NE, N, ...),
    and `indices` (UB, M) those of the minibatch.  Returns also the losses, each () float32.
    """
    transition, advantage, target = jax.tree.map(lambda x: x[indices], batch)  # (UB, M, N, ...)
    # Each of the UB batches is normalised by itself.
    mean = advantage.mean(axis=(1, 2), keepdims=True)
    std = advantage.std(axis=(1, 2), keepdims=True)
    advantage = (advantage - mean) / (std + 1e-8)

    # GRADIENTS of the mean loss of the UB batches, which are the mean of their gradients: one copy
    # of the parameters and one matrix product serve them all
    actor_grads, actor_losses = jax.grad(actor_loss, has_aux=True)(
        actor.params,
        actor.apply_fn,
        transition,
        advantage,
        config.clip_eps,
        config.ent_coef,
    )
    critic_grads, critic_losses = jax.grad(critic_loss, has_aux=True)(
        critic.params,
        critic.apply_fn,
        transition,
        target,
        config.clip_eps,
        config.vf_coef,
    )

    # MEAN OVER THE DEVICES.  All arrays go as one, behind a barrier: two CPU devices then learn 8 %
    # faster, one 2 %.
    means = (actor_grads, critic_grads, actor_losses | critic_losses)
    flat, unravel = ravel_pytree(jax.lax.optimization_barrier(means))
    actor_grads, critic_grads, losses = unravel(jax.lax.pmean(flat, "device"))

    # STEP
    actor = actor.apply_gradients(grads=actor_grads)
    critic = critic.apply_gradients(grads=critic_grads)
    return (actor, critic), losses


def update(state: LearnerState, env, config: SystemConfig):
    """One update of independent PPO, as in Mava, on one device.

    Returns also the transitions, (T, UB * NE, ...), and the mean losses, each () float32.
    """
    actor, critic, keys, env_state = state

    # ROLLOUT
    (keys, env_state), transitions = rollout(env, actor, keys, env_state, config.rollout_length)
    # The rollout needs no values and no log-probabilities: one call computes them all at once.
    policy = distrax.Categorical(actor.apply_fn(actor.params, transitions.observation))
    transitions = transitions._replace(
        log_prob=policy.log_prob(transitions.action),
        value=critic.apply_fn(critic.params, transitions.observation),
    )
    if not config.learn:
        return LearnerState(actor, critic, keys, env_state), transitions, {}

    # ADVANTAGE
    advantage, target = calculate_advantage(
        transitions.reward,
        transitions.done,
        transitions.value,
        critic.apply_fn(critic.params, env_state.observation),
        config.gamma,
        config.gae_lambda,
    )

    # MINIBATCHES are drawn from all transitions, (T, UB * NE, ...) -> (T * UB * NE, ...)
    flatten = lambda x: x.reshape(-1, *x.shape[2:])
    batch = jax.tree.map(flatten, (transitions, advantage, target))
    # Where the transitions of each of the UB batches are: (T, UB, NE) -> (UB, T * NE)
    num_batches = config.update_batch_size
    positions = jnp.arange(len(batch[1])).reshape(config.rollout_length, num_batches, -1)
    positions = positions.swapaxes(0, 1).reshape(num_batches, -1)

    def update_epoch(carry, _):
        actor, critic, keys = carry
        keys, shuffle_keys = jax.vmap(jax.random.split, out_axes=1)(keys)  # each (UB, 2)
        shuffled = jax.vmap(jax.random.permutation)(shuffle_keys, positions)
        # (UB, minibatches * M) -> (minibatches, UB, M)
        minibatches = shuffled.reshape(num_batches, config.num_minibatches, -1).swapaxes(0, 1)
        step = lambda networks, indices: update_minibatch(*networks, batch, indices, config)
        (actor, critic), losses = jax.lax.scan(step, (actor, critic), minibatches)
        return (actor, critic, keys), losses

    (actor, critic, keys), losses = jax.lax.scan(
        update_epoch, (actor, critic, keys), length=config.ppo_epochs
    )
    state = LearnerState(actor, critic, keys, env_state)
    return state, transitions, jax.tree.map(jnp.mean, losses)


class LearnerOutput(NamedTuple):
    """What one call of `learn` returns."""

    state: LearnerState  # for the next call
    experience: ArrayTree  # leaves (D, NU, UB, T, NE, ...)
    metrics: EpisodeMetrics  # of the training episodes, (D, NU, UB, T, NE)
    losses: ArrayTree  # (NU,) float32, mean over devices, batches and minibatches
    finite: Array  # (NU,) bool, no loss and no parameter is infinite or not a number


def make_learn(env, config: SystemConfig, num_updates, mesh, select: Callable):
    """The learner of NU updates on each of the D devices, compiled at its first call.

    It makes a `LearnerOutput` of a `LearnerState`.  `select`, such as `select_leaves`, says what is
    recorded of a `Transition`.
    """

    def split_batches(x):  # (T, UB * NE, ...) -> (UB, T, NE, ...)
        return x.reshape(len(x), config.update_batch_size, -1, *x.shape[2:]).swapaxes(0, 1)

    def update_step(state, _):
        state, transitions, losses = update(state, env, config)
        recorded = (select(transitions), transitions.metrics)
        total = optax.tree.sum((losses, state.params))
        return state, (jax.tree.map(split_batches, recorded), losses, jnp.isfinite(total))

    def learn(state):
        state, (recorded, *rest) = jax.lax.scan(update_step, state, None, num_updates)
        # Each device adds an axis of length 1: together they have D.
        return LearnerOutput(state, *jax.tree.map(lambda x: x[None], recorded), *rest)

    learn = jax.shard_map(
        learn,
        mesh=mesh,
        in_specs=(STATE_SPECS,),
        out_specs=LearnerOutput(STATE_SPECS, SHARDED, SHARDED, REPLICATED, REPLICATED),
        check_vma=False,
    )
    return jax.jit(learn)


# ---- EVALUATION ----------------------------------------------------------------------------------
def evaluate(env, actor, key, num_episodes, greedy=False):
    """Play whole episodes side by side, until the last has ended, as Gorsane et al. (2022) advise.

    `actor` is that of `act`, and `key` (2,).  Returns their returns and lengths, (num_episodes,),
    done but for those past `env.time_limit`.
    """

    def is_running(carry):
        metrics = carry[1].metrics
        return (~metrics.done & (metrics.episode_length < env.time_limit)).any()

    def step(carry):
        key, (state, observation, metrics) = carry
        key, policy_key = jax.random.split(key)
        action = act(actor, observation, policy_key[None], greedy)
        state, timestep = jax.vmap(env.step)(state, action)
        # An environment whose episode has ended is stepped on, but not counted.
        reward = jnp.where(metrics.done, 0.0, timestep.reward.mean(axis=-1))
        metrics = EpisodeMetrics(
            episode_return=metrics.episode_return + reward,
            episode_length=metrics.episode_length + ~metrics.done,
            done=metrics.done | timestep.last(),
        )
        return key, EnvState(state, timestep.observation, metrics)

    key, reset_key = jax.random.split(key)
    env_state = reset_environments(env, jax.random.split(reset_key, num_episodes))
    _, env_state = jax.lax.while_loop(is_running, step, (key, env_state))
    return env_state.metrics


class Evaluation(NamedTuple):
    """What is known after one evaluation."""

    step_count: int  # environment steps of training so far
    elapsed_time: float  # seconds of training and evaluating so far
    steps_per_second: float  # of the training since the evaluation before
    episode_return: np.ndarray  # (num_eval_episodes,) float32
    episode_length: np.ndarray  # (num_eval_episodes,) int32, timesteps
    train_episode_return: float  # mean of the training episodes that ended since, nan if none did
    losses: dict[str, float]  # mean since, of "actor_loss", "value_loss" and "entropy"

    def __str__(self):
        losses = "".join(f", {name} {loss:.4g}" for name, loss in self.losses.items())
        return (
            f"step {self.step_count:,}: {self.steps_per_second:,.0f} steps/s, "
            f"episode return {self.episode_return.mean():.4g}, "
            f"length {self.episode_length.mean():.4g}{losses}"
        )


def make_evaluate(env, num_parallel, greedy, mesh):
    """A function that evaluates an actor with a key (2,), `num_parallel` episodes at a time.

    It takes the number of episodes, too, and returns the next key, and the metrics on the host.
    """

    def evaluate_on_device(actor, key):
        keys = jax.random.split(key, mesh.size + 1)  # the next key, and one for each device
        own_key = keys[1 + jax.lax.axis_index("device")]
        return keys[0], evaluate(env, actor, own_key, math.ceil(num_parallel / mesh.size), greedy)

    evaluate_in_parallel = jax.jit(
        jax.shard_map(
            evaluate_on_device,
            mesh=mesh,
            in_specs=REPLICATED,
            out_specs=(REPLICATED, SHARDED),
            check_vma=False,
        )
    )

    def evaluate_all(actor, key, num_episodes=num_parallel):
        parts = []
        for _ in range(0, num_episodes, num_parallel):
            # The key goes in from the host each time: one that is on the devices compiles it again.
            key, metrics = evaluate_in_parallel(actor, np.asarray(key))
            parts.append(gather(metrics))
            require(
                parts[-1].done.all(),
                f"an episode has not ended at its environment's time_limit, {env.time_limit}",
            )
        return np.asarray(key), jax.tree.map(lambda *x: np.concatenate(x)[:num_episodes], *parts)

    return evaluate_all


# ---- RECORDING -----------------------------------------------------------------------------------
def select_leaves(transition, extra_leaves=()):
    """What is recorded of a transition, by name.

    `extra_leaves` are any of next_observation, log_prob, value, discount, step_count, truncation;
    others are told by a `ConfigError`.
    """
    seen = transition.observation
    leaves = {
        "done": transition.done,
        "action": transition.action,
        "reward": transition.reward,
        "observation": seen.agents_view,
        "legal_action_mask": seen.action_mask,
    }
    if seen.global_state is not None:
        leaves["global_state"] = seen.global_state
    step_count = transition.metrics.episode_length[..., None] - 1
    extra = Entries(
        next_observation=transition.next_observation.agents_view,
        log_prob=transition.log_prob,
        value=transition.value,
        discount=transition.discount,
        step_count=jnp.broadcast_to(step_count, transition.action.shape),
        truncation=transition.done & (transition.discount != 0).any(axis=-1, keepdims=True),
    )
    return leaves | {name: extra[name] for name in extra_leaves}


def reshape_experience(experience):
    """Rows of consecutive timesteps, as a buffer wants them, of what the learner returns."""
    # (D, NU, UB, T, NE, ...) -> (D, NU, UB, NE, T, ...) -> (D * NU * UB * NE, T, ...)
    rows = lambda x: x.swapaxes(3, 4).reshape(-1, x.shape[3], *x.shape[5:])
    return jax.tree.map(rows, experience)


def make_buffer(num_rows, num_timesteps):
    """Flashbax's flat buffer, of `num_rows` rows of `num_timesteps` timesteps, at least two."""
    return fbx.make_flat_buffer(
        max_length=num_rows * max(2, num_timesteps),
        min_length=num_rows,
        sample_batch_size=1,
        add_sequences=True,
        add_batch_size=num_rows,
    )


def make_vault(path: Path, experience, chunk_length, metadata):
    """Create and return a vault at `path` for leaves (rows, any, ...), arrays or shapes.

    `metadata` is a dictionary, as JSON has it.  The vault is compressed by zstd: three times as
    fast as Flashbax's gzip, and smaller.  A chunk has `chunk_length` timesteps, which should divide
    what each write brings: otherwise the next write codes the last chunk again.  Raises a
    FileExistsError where `path` exists.
    """
    path = Path(path).expanduser().absolute()  # Flashbax would put "vaults" in front of others
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name")

    class ZstdVault(Vault):
        def _init_leaf(self, name, shape, dtype, create_ds):
            rows, _, *rest = shape
            chunk_rows = max(1, 2**22 // (chunk_length * math.prod(rest)))  # 16 MB of float32
            spec = self._get_base_spec(name)
            spec["metadata"] = {
                "compressor": {"id": "zstd", "level": 1},
                "chunks": [min(rows, chunk_rows), chunk_length, *rest],
            }
            # A write stores anew each node of the index that it changes: by default, of up to 8 MB.
            spec["kvstore"]["config"] = {"max_decoded_node_bytes": 2**12}
            return tensorstore.open(
                spec,
                dtype=dtype,
                shape=(rows, TIME_AXIS_MAX_LENGTH, *rest),
                create=create_ds,
            ).result()

    # Flashbax prints an advice that is for other buffers.
    with mock.patch("flashbax.vault.vault.print", create=True):
        return ZstdVault(str(path.parent), experience, vault_uid=path.name, metadata=metadata)


def append_to_vault(vault, experience, num_timesteps):
    """Write the first timesteps of leaves (rows, any, ...) behind `vault.vault_index`."""
    state = TrajectoryBufferState(experience=experience, current_index=0, is_full=False)
    # In a thread: Flashbax starts an event loop, where a notebook's own is running.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(vault.write, state, source_interval=(0, num_timesteps)).result()


class VaultWriter:
    """A flat buffer of what is new, and the vault into which it is written.

    In your own loop, for leaves (D, NU, UB, T, NE, ...), where D, NU and UB may be 1:

        rows = jax.eval_shape(reshape_experience, experience)
        writer = VaultWriter(make_vault(path, rows, T, metadata), rows)
        writer.add(experience)
        writer.write()
    """

    def __init__(self, vault, rows, num_adds=1):
        """For rows (D * NU * UB * NE, T, ...), of which `num_adds` are added between two writes."""
        num_rows, rollout_length = jax.tree.leaves(rows)[0].shape[:2]
        self.vault = vault
        self.room = num_adds * rollout_length  # timesteps
        self.num_timesteps = 0  # in the buffer, from its beginning, and not yet written
        buffer = make_buffer(num_rows, self.room)
        transition = jax.tree.map(lambda x: np.zeros(x.shape[2:], x.dtype), rows)
        try:  # on the host, where it takes none of an accelerator's memory
            devices = jax.local_devices(backend="cpu")
        except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
            devices = jax.local_devices()
        host = jax.sharding.SingleDeviceSharding(devices[0])
        self.state = jax.jit(buffer.init, out_shardings=host)(transition)
        self._add = jax.jit(buffer.add, donate_argnums=0)  # in place: there is no second buffer

    def add(self, experience):
        """Add leaves (D, NU, UB, T, NE, ...); a buffer that is full is written first."""
        length = jax.tree.leaves(experience)[0].shape[3]
        if self.num_timesteps + length > self.room:
            self.write()
        state = self.state.replace(current_index=self.num_timesteps)
        self.state = self._add(state, reshape_experience(jax.device_get(experience)))
        self.num_timesteps += length

    def write(self):
        """Write what is new behind what the vault holds."""
        append_to_vault(self.vault, self.state.experience, self.num_timesteps)
        self.num_timesteps = 0


# ---- FILES: the folder of a run ------------------------------------------------------------------
def run_path(name, uid, rel_dir="vaults"):
    """The folder REL_DIR/NAME/UID, absolute; a `ConfigError` where Flashbax would mistake it."""
    path = Path(os.path.abspath(Path(rel_dir).expanduser()), name, uid)
    is_whole = re.fullmatch("[^./][^/]*/[^./][^/]*", f"{name}/{uid}")
    is_plain = is_whole and not re.search(r"[#%?|\\\t\n]", str(path))
    require(is_plain, f"{str(path)!r} must be made of plain names, without # % ? | \\")
    return path


def find_names(folder, pattern):
    """What is in a folder by a name that is wholly of a pattern: not UID-profile, nor N.bak."""
    return [path for path in folder.glob("*") if re.fullmatch(pattern, path.name)]


def find_parts(path):
    """The folder of a run, or those of its processes, in their order, absolute."""
    path = path.expanduser().absolute()
    return sorted(find_names(path.parent, rf"{re.escape(path.name)}-p\d+of\d+")) or [path]


def write_file(path, content):
    """Write a file that is whole at any time: a new one takes the place of the old one at once."""
    temporary = path.with_name(f".{path.stem}")
    temporary.write_bytes(content)
    with temporary.open() as file:
        os.fsync(file.fileno())  # otherwise it may be empty where the power fails next
    temporary.replace(path)


@contextlib.contextmanager
def whole_folder(path):
    """A folder to make and to fill, which is moved to `path` once it is whole."""
    for parent in path.parents:
        require(parent.exists() or not parent.is_symlink(), f"{parent} is a link to nothing")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        yield folder
        require(not path.exists(), f"{path} exists already: choose another name")
        folder.rename(path)


# ---- CHECKPOINT: what a run needs to go on where it stopped --------------------------------------
class Progress(NamedTuple):
    """A run between two evaluations."""

    state: LearnerState
    eval_key: np.ndarray  # (2,) uint32, of the next evaluation
    best_params: Params  # of the evaluation with the highest mean return
    evaluations: list[Evaluation]


def add_evaluation(progress, state, eval_key, evaluation):
    """The progress after one more evaluation, of `state`, with the key of the next."""
    evaluations = [*progress.evaluations, evaluation]
    returns = [each.episode_return.mean() for each in evaluations]
    best_params = state.params if returns[-1] == np.nanmax(returns) else progress.best_params
    return Progress(state, eval_key, best_params, evaluations)


def init_progress(config, env, mesh):
    """The beginning of a run."""
    key = jax.random.PRNGKey(config.system.seed)
    state = init_learner(key, config, env, mesh)
    eval_key = np.asarray(jax.random.split(key, 3)[1])  # the key that `init_learner` leaves
    return Progress(state, eval_key, state.params, evaluations=[])


def with_params(progress, path, mesh):
    """The beginning of a run with the best parameters of the run at `path`."""
    params = multihost_utils.broadcast_one_to_all(load_params(path))
    shapes, expected = (jax.tree.map(jnp.shape, x) for x in (params, progress.best_params))
    require(shapes == expected, f"checkpoint.load_params {path} has other networks")
    params = multihost_utils.host_local_array_to_global_array(params, mesh, REPLICATED)
    state = progress.state._replace(
        actor=progress.state.actor.replace(params=params.actor),
        critic=progress.state.critic.replace(params=params.critic),
    )
    return progress._replace(state=state, best_params=params)


# Settings that may change where a run goes on: the others determine the data, or the best
# parameters.
FREE_SETTINGS = (
    "system.total_timesteps",
    "system.num_updates",
    "arch.num_evaluation",
    "arch.num_absolute_metric_eval_episodes",
    "arch.absolute_metric",
    "arch.distributed",
    "arch.coordinator_address",
    "arch.num_processes",
    "arch.process_id",
    "vault.name",
    "vault.uid",
    "vault.rel_dir",
    "vault.save_interval",
    "checkpoint.",
    "versions.",
)
# Settings that may be different in the processes of a run.
OWN_SETTINGS = ("arch.coordinator_address", "arch.process_id", "vault.rel_dir")


def settings_without(metadata, prefixes):
    """What the metadata say by names such as system.seed, but those that begin with a prefix."""
    settings = flatten_dict(metadata, sep=".")
    return {name: settings[name] for name in settings if not name.startswith(prefixes)}


def own_part(tree, mesh, specs):
    """The part of arrays that is on this process's devices, as NumPy's."""
    return jax.device_get(multihost_utils.global_array_to_host_local_array(tree, mesh, specs))


def raw(x):
    """An array as it is, and the data of typed keys, which `jax.random.key` makes."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def save_checkpoint(path, metadata, progress, mesh):
    """Save this process's part of `progress` in the folder `path`; the two before are kept."""
    content = {
        "settings": settings_without(metadata, FREE_SETTINGS),
        "state": jax.tree.leaves(own_part(jax.tree.map(raw, progress.state), mesh, STATE_SPECS)),
        "eval_key": progress.eval_key,
        "params": own_part(progress.best_params, mesh, REPLICATED)._asdict(),
        "evaluations": [evaluation._asdict() for evaluation in progress.evaluations],
    }
    write_file(path / f"checkpoint.{len(progress.evaluations)}", msgpack_serialize(content))
    # Of several processes, one that is not killed may save two more than one that is.
    for _, old in sorted(find_checkpoints(path).items())[:-3]:
        old.unlink()


def find_checkpoints(path):
    """The checkpoints in the folder of a run, by the number of evaluations done."""
    return {int(file.suffix[1:]): file for file in find_names(path, r"checkpoint\.\d+")}


def read_checkpoint(file):
    """What is in a checkpoint; a `ConfigError` where it is damaged."""
    try:
        return dict(msgpack_restore(file.read_bytes()))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} is damaged: delete it, to go on from the checkpoint before it"
        ) from error


def load_checkpoint(file, metadata, like, mesh):
    """The progress that was saved, placed as `like`; a `ConfigError` names what does not fit."""
    saved = read_checkpoint(file)
    settings = settings_without(metadata, FREE_SETTINGS)
    for name in settings | saved["settings"]:
        new, old = settings.get(name), saved["settings"].get(name)
        require(new == old, f"{name} is {new}, but {old} in the run that is to go on")
    given, num_done = metadata["arch"]["num_evaluation"], len(saved["evaluations"])
    require(num_done <= given, f"arch.num_evaluation is {given}, but {num_done} are done already")

    def wrap(new, old):  # keys that were typed
        if raw(old) is old:
            return new
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))

    place = multihost_utils.host_local_array_to_global_array
    state = jax.tree.structure(like.state).unflatten(saved["state"])
    return Progress(
        state=jax.tree.map(wrap, place(state, mesh, STATE_SPECS), like.state),
        eval_key=saved["eval_key"],
        best_params=place(Params(**saved["params"]), mesh, REPLICATED),
        evaluations=[Evaluation(**evaluation) for evaluation in saved["evaluations"]],
    )


def load_params(path):
    """The best parameters of a run, vaults/NAME/UID; a FileNotFoundError where there are none."""
    folder = find_parts(Path(path))[0]
    files = find_checkpoints(folder)
    if not files:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    return Params(**read_checkpoint(files[max(files)])["params"])


# ---- OFFLINE: episodes from a vault, OG-MARL's layout --------------------------------------------
def restore_time_order(experience, num_devices, num_updates_per_eval, rollout_length):
    """Each environment's own stream of timesteps, unbroken, from the rows of a vault.

    With NU > 1 a row of the vault holds every NU-th rollout of an environment, end to end: time
    jumps where one ends.  Leaves (D * NU * UB * NE, E * T, ...), of NumPy or JAX, come back as
    (D * UB * NE, E * NU * T, ...), one row for each environment.
    """

    def restore(x):
        _, num_timesteps, *rest = x.shape
        num_evaluations = num_timesteps // rollout_length
        # (D * NU * UB * NE, E * T, ...) -> (D, NU, UB * NE, E, T, ...)
        x = x.reshape(num_devices, num_updates_per_eval, -1, num_evaluations, rollout_length, *rest)
        # (D, NU, UB * NE, E, T, ...) -> (D, UB * NE, E, NU, T, ...)
        x = x.swapaxes(1, 2).swapaxes(2, 3)
        return x.reshape(-1, num_timesteps * num_updates_per_eval, *rest)

    return jax.tree.map(restore, experience)


def open_recording(name, uid, rel_dir="vaults"):
    """Leaves (D * NU * UB * NE, any, ...) on disk, the timesteps they hold, metadata and folder.

    The parts of several processes are read as one; there is a `ConfigError` where one is missing,
    and a FileNotFoundError where there is no vault.
    """
    parts = find_parts(Path(rel_dir, name, uid))
    metadata = json.loads((parts[0] / "metadata.json").read_text(), object_hook=Entries)
    num_processes = metadata.get("num_processes", len(parts))
    require(
        len(parts) == num_processes,
        f"{name} has {', '.join(part.name for part in parts)}, of a run of {num_processes} "
        "processes: bring together all its parts, and nothing else of their names",
    )
    vaults = [Vault(str(part.parent), vault_uid=part.name) for part in parts]
    join = lambda *stores: tensorstore.concat(stores, axis=0)
    leaves = jax.tree.map(join, *(vault._all_datastores for vault in vaults))
    num_timesteps = min(vault.vault_index for vault in vaults)
    metadata["num_devices"] *= num_processes
    return Entries(leaves), num_timesteps, metadata, parts[0]


class Episodes(NamedTuple):
    """K complete episodes, S transitions in all.

    They lie end to end along one axis, not padded: what followed transition i is transition i + 1,
    unless `done`; `np.repeat(np.arange(K), length)` gives the ids for a `jax.ops.segment_sum`.
    """

    transitions: dict[str, np.ndarray]  # leaves of the vault, (S, ...)
    length: np.ndarray  # (K,) int64, timesteps
    episode_return: np.ndarray  # (K,) float32, the agents' mean reward, summed
    start_step: np.ndarray  # (K,) int64, environment steps of training before the episode's first

    @property
    def start(self):
        """The index of each episode's first transition, (K,) int64."""
        return np.cumsum(self.length) - self.length

    def select(self, mask):
        """The episodes, whole and in their order, for which `mask`, (K,) bool, is true."""
        require(np.asarray(mask).dtype == bool, "a mask over episodes must be of bool")
        in_episode = np.repeat(mask, self.length)
        transitions = {name: leaf[in_episode] for name, leaf in self.transitions.items()}
        return Episodes(transitions, *(values[mask] for values in self[1:]))


def iterate_episodes(
    name, uid, rel_dir="vaults", percentiles=(0, 100), leaves=(), num_steps=50_000
):
    """Every complete episode of a vault, exactly once, a window of the vault at a time.

    A window has `num_steps` environment steps, in whole evaluations, at least one; the episodes
    that end in it come one environment after the other.  `percentiles` of training are read, in
    whole evaluations, both ends rounded down, and these `leaves`, or all where none are given.
    Raises what `open_recording` does, and a `ConfigError` where the percentiles hold nothing.
    """
    stores, num_timesteps, metadata, _ = open_recording(name, uid, rel_dir)
    rollout_length = metadata["system"]["rollout_length"]  # T
    num_updates = metadata["num_updates_per_eval"]  # NU
    num_envs = stores["done"].shape[0] // num_updates  # D * UB * NE
    evaluation_length = num_updates * rollout_length  # timesteps of each environment
    require(
        num_timesteps % rollout_length == 0,
        f"rollout_length {rollout_length} does not divide the vault's {num_timesteps} steps",
    )

    num_evaluations = num_timesteps // rollout_length  # E
    whole = (num_evaluations * np.array(percentiles) // 100).astype(int)  # evaluations
    first, last = evaluation_length * whole  # timesteps
    require(
        0 <= first < last and percentiles[1] <= 100,
        f"percentiles {percentiles} of {num_evaluations} evaluations hold none",
    )

    def read(store, start, stop):  # whole evaluations of a leaf, as (D * UB * NE * time, ...)
        # `Vault.read` would read all of all leaves, onto the accelerator.
        rows = store[:, start // num_updates : stop // num_updates].read().result()
        rows = restore_time_order(rows, metadata["num_devices"], num_updates, rollout_length)
        return rows.reshape(-1, *rows.shape[2:])

    # FIND all episodes, one environment after the other: `done` of one agent is small
    done = stores["done"]
    ends = np.flatnonzero(read(done if done.ndim == 2 else done[..., 0], 0, last))
    row, end = divmod(ends, last)
    lengths = np.minimum(np.diff(ends, prepend=-1), end + 1)  # one may be the first of its row
    begin = end + 1 - lengths

    # READ those that end in a window
    window = evaluation_length * max(1, num_steps // (num_envs * evaluation_length))
    for start in range(first, last, window):
        stop = min(start + window, last)
        is_here = (first <= begin) & (start <= end) & (end < stop)
        length = lengths[is_here]
        episode_start = np.cumsum(length) - length

        # Where their transitions are in what is read, from the timestep `oldest` on.
        oldest = begin[is_here].min(initial=start) // evaluation_length * evaluation_length
        shift = (row * (stop - oldest) - oldest + begin)[is_here] - episode_start
        index = np.arange(length.sum()) + np.repeat(shift, length)
        pick = lambda leaf: read(stores[leaf], oldest, stop)[index]
        reward = np.atleast_2d(pick("reward").T).mean(axis=0, dtype=float)
        yield Episodes(
            transitions={leaf: pick(leaf) for leaf in leaves or stores},
            length=length,
            episode_return=np.add.reduceat(reward, episode_start).astype(np.float32),
            start_step=begin[is_here] * num_envs,
        )


def load_episodes(name, uid, rel_dir="vaults", percentiles=(0, 100), leaves=()):
    """What `iterate_episodes` gives, in one; to join it takes twice the memory of the result."""
    windows = iterate_episodes(name, uid, rel_dir, percentiles, leaves)
    return jax.tree.map(lambda *x: np.concatenate(x), *windows)


# OG-MARL's names of the parts of a recording, and the percentiles of training that are in them.
OG_MARL_PARTS = {"Replay": (0, 100), "Poor": (0, 33), "Medium": (33, 67), "Good": (67, 100)}


def find_cut_offs(episodes, metadata):
    """Which episodes the time limit cut off, (K,) bool; the others reached a terminal state."""
    if "truncation" in episodes.transitions:
        truncation = np.atleast_2d(episodes.transitions["truncation"].T).any(axis=0)
        return truncation[np.cumsum(episodes.length) - 1]
    # RobotWarehouse's vault, as the original's, has no leaf that tells: an episode as long as the
    # time limit was cut off, even if its very last step also brought a collision.
    return episodes.length == metadata["env"]["time_limit"]


def to_og_marl(episodes, metadata, ends_as_terminals=False):
    """The transitions of complete episodes, with all their leaves, as OG-MARL has them.

    Returns leaves (1, S, N, ...); in `infos`, the legal actions (1, S, N, A) bool, the global
    state, or else the agents' observations side by side, (1, S, N * O), and all extra leaves.
    Observations come without the one-hot of the agent's index: OG-MARL's systems put their own in
    front.  `ends_as_terminals` is that of `export_og_marl`.
    """
    transitions = Entries(episodes.transitions)
    require(
        transitions["done"].ndim == transitions["action"].ndim == 2,
        "OG-MARL's layout needs an axis of agents in done and action",
    )
    if metadata["system"]["add_agent_id"]:
        for name in transitions.keys() & {"observation", "next_observation"}:
            transitions[name] = transitions[name][..., metadata["num_agents"] :]
    observation = transitions["observation"]
    side_by_side = observation.reshape(len(observation), math.prod(observation.shape[1:]))
    is_cut_off = find_cut_offs(episodes, metadata) & (not ends_as_terminals)  # (K,)
    is_cut_off = np.repeat(is_cut_off, episodes.length)[:, None]  # (S, 1)
    known = {
        "done",
        "action",
        "reward",
        "observation",
        "legal_action_mask",
        "global_state",
        "truncation",
    }
    experience = {
        "observations": observation,
        "actions": transitions["action"],
        "rewards": transitions["reward"],
        "terminals": transitions["done"] & ~is_cut_off,
        "truncations": transitions["done"] & is_cut_off,
        "infos": {
            **{name: transitions[name] for name in transitions.keys() - known},
            "legals": transitions["legal_action_mask"],
            "state": transitions.get("global_state", side_by_side),
        },
    }
    return jax.tree.map(lambda x: x[None], experience)


def export_og_marl(
    name,
    uid,
    rel_dir="vaults",
    part="Replay",
    export_name=None,
    destination=None,
    choose=None,
    ends_as_terminals=False,
):
    """Write a part of a vault as a vault that OG-MARL reads, episodes end to end in one row.

    `part` is one of `OG_MARL_PARTS`, of which "Replay" is everything.  `choose` gets the `Episodes`
    of a window, and gives a mask (K,) bool of those that are written.  `ends_as_terminals` is for
    learners that read no `truncations`, and would join an episode that was cut off to the next one.
    It costs what follows a cut-off: nothing is bootstrapped there, as if a terminal state was
    reached, as in the training of this file.

    Returns the folder of the export, DESTINATION/ENV/SCENARIO.vlt/NAME: the destination is by
    default og_marl in the folder of the run, the name that of the part.  There is a `ConfigError`
    where it exists already, and where what was chosen has no `export_name`.
    """
    require(export_name or choose is None, "give what is chosen a name, by export_name")
    *_, metadata, folder = open_recording(name, uid, rel_dir)
    path = run_path(
        f"{metadata['env']['scenario']}.vlt",
        export_name or part,
        Path(destination or folder / "og_marl", metadata["task"]["og_marl_name"]),
    )
    percentiles = Entries(OG_MARL_PARTS)[part]
    vault = None
    with whole_folder(path) as folder:
        for episodes in iterate_episodes(name, uid, rel_dir, percentiles):
            if choose is not None:
                episodes = episodes.select(choose(episodes))
            experience = to_og_marl(episodes, metadata, ends_as_terminals)
            if vault is None:  # in chunks of 10,000 timesteps: about 5 MB of observations
                metadata = json.loads(json.dumps(metadata))  # plain dictionaries, as JAX knows them
                vault = make_vault(folder, experience, 10_000, {"recording": metadata})
            append_to_vault(vault, experience, experience["actions"].shape[1])
            del episodes, experience  # before the next window is read
    return path


# ---- RESULTS: metrics, pictures and the data card ------------------------------------------------
def write_metrics(path, metadata, evaluations, absolute_metric=None):
    """Write all evaluations so far to `metrics.json` in `path`, in the format of marl-eval."""
    run = {}
    for index, evaluation in enumerate(evaluations):
        run[f"step_{index}"] = {
            "step_count": evaluation.step_count,
            "elapsed_time": evaluation.elapsed_time,
            "mean_episode_return": [float(evaluation.episode_return.mean())],
            "steps_per_second": [evaluation.steps_per_second],
        }
    if absolute_metric is not None:
        run["absolute_metrics"] = {"mean_episode_return": [absolute_metric]}
    metrics = {
        metadata["task"]["marl_eval_name"]: {
            metadata["env"]["scenario"]: {"ff_ippo": {f"seed_{metadata['system']['seed']}": run}}
        }
    }
    write_file(path / "metrics.json", json.dumps(metrics).encode())


def plot_learning_curve(evaluations: list[Evaluation]):
    """Return, losses and entropy against environment steps."""
    steps = [evaluation.step_count for evaluation in evaluations]
    returns = np.stack([evaluation.episode_return for evaluation in evaluations])
    training = [evaluation.train_episode_return for evaluation in evaluations]
    figure = Figure(figsize=(8.5, 7.5), dpi=150, layout="constrained")
    names = ["episode return", *evaluations[0].losses]  # no loss where nothing was learned
    panels = figure.subplot_mosaic([[name] for name in names], sharex=True)
    for name, axes in panels.items():
        axes.set_ylabel(name)
    axes.set_xlabel("Environment steps")
    for name in names[1:]:
        panels[name].plot(steps, [evaluation.losses[name] for evaluation in evaluations], ",-")
    axes = panels["episode return"]
    low, high = np.percentile(returns, [10, 90], axis=1)
    axes.fill_between(
        steps, low, high, label="evaluation: 10th to 90th percentile", color="#0072B2", alpha=0.2
    )
    axes.plot(steps, training, ",-", label="training: mean", color="#E69F00")
    axes.plot(steps, returns.mean(axis=1), ",-", label="evaluation: mean", color="#0072B2")
    axes.legend()
    return figure


def describe(name, uid, rel_dir="vaults"):
    """What is in the complete episodes of a vault, in each third of training and in all.

    Returns a dictionary of dictionaries, of plain values as JSON has them: None where there is no
    episode, shares from 0 to 1, lengths in timesteps.  An episode counts in the third in which it
    began.  `joint_saco` is OG-MARL's: the number of different pairs of joint observation and joint
    action, per transition.  Pairs are told apart by hashes of 64 bits, which are held, 8 bytes a
    step.  Raises what `iterate_episodes` does.
    """
    stores, num_timesteps, metadata, _ = open_recording(name, uid, rel_dir)
    num_steps = num_timesteps * stores["done"].shape[0]
    num_chosen = np.zeros((3, metadata["num_actions"]))  # of each action, in each third
    parts = []
    hashes = np.zeros(num_steps, np.int64)  # of the pairs of complete episodes
    num_pairs = 0
    for episodes in iterate_episodes(name, uid, rel_dir, num_steps=100_000):
        transitions = Entries(episodes.transitions)
        third = 3 * episodes.start_step // num_steps
        cut_off = find_cut_offs(episodes, metadata)
        parts.append([third, episodes.length, cut_off, episodes.episode_return])
        action = transitions["action"]
        in_third = np.repeat(third, episodes.length)
        np.add.at(num_chosen, (in_third, np.atleast_2d(action.T)), 1)  # (N, S), or of one agent
        for seen, chosen in zip(transitions["observation"], action, strict=True):
            hashes[num_pairs] = hash((seen.tobytes(), chosen.tobytes()))
            num_pairs += 1
    values = np.concatenate(parts, axis=1, dtype=float)

    description = {}
    for index, part in enumerate(("first third", "second third", "last third", "all")):
        in_part = [0, 1, 2] if part == "all" else [index]
        here = values[:, np.isin(values[0], in_part)]
        _, length, cut_off, episode_return = here if here.size else np.full((4, 1), math.nan)
        chosen = num_chosen[in_part].sum(axis=0)
        description[part] = {
            "episodes": here.shape[1],
            "transitions": int(here[1].sum()),
            "return_mean": episode_return.mean(),
            "return_std": episode_return.std(),
            "return_min": episode_return.min(),
            "return_quartiles": np.percentile(episode_return, [25, 50, 75]),
            "return_max": episode_return.max(),
            "length_mean": length.mean(),
            "cut_off": cut_off.mean(),
            "actions": chosen / (chosen.sum() or math.nan),
        }
    hashes[:num_pairs].sort()  # in place: there are as many as transitions
    ordered = memoryview(hashes[:num_pairs])
    num_repeated = sum(map(operator.eq, ordered, ordered[1:]))
    description["all"]["joint_saco"] = 1 - num_repeated / (num_pairs or math.nan)
    text = json.dumps(description, default=list)
    return json.loads(text, parse_constant=lambda _: None)  # of nan


def plot_dataset(description, actions=None):
    """The returns, lengths and actions that `describe` gives, a colour for each part of training.

    The marks of a return are its minimum, quartiles and maximum; `actions` are names of actions.
    """
    figure = Figure(figsize=(8.5, 3), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3)
    for part, values in description.items():
        five = [values["return_min"], *values["return_quartiles"], values["return_max"]]
        axes[0].plot(five, [part] * 5, "|-", markersize=20)
        axes[1].barh(part, values["length_mean"] or 0)
        shares = values["actions"]
        axes[2].plot(shares, actions or range(len(shares)), "o")
    axes[0].set_xlabel("Episode return, quartiles")
    axes[1].set_xlabel("Mean length (timesteps)")
    axes[2].set_xlabel("Share of each action")
    return figure


# The data card, as Hugging Face's hub reads it; a line that ends with a backslash goes on.
CARD = """---
license: apache-2.0
pretty_name: "Independent PPO in {env[scenario]}"
task_categories: [reinforcement-learning]
tags: [multi-agent-reinforcement-learning, offline-reinforcement-learning, flashbax]
viewer: false
---
# Independent PPO in {env[scenario]}
Every transition of a training run in {task[marl_eval_name]}, scenario `{env[scenario]}`: \
{num_agents} agents with {num_actions} actions, episodes of at most {env[time_limit]} timesteps, \
{all[transitions]:,} transitions in {all[episodes]:,} complete episodes. The folder is a \
[Flashbax](https://github.com/instadeepai/flashbax) Vault, recorded by {num_processes} \
process(es): of several, each has a folder `{uid}-p...`, and together they are the data set.

![Return over training](learning_curve.png)
![What the data set holds](dataset.png)

| | first third | second third | last third | all |
| --- | --- | --- | --- | --- |
{table}

An episode counts in the third of training in which it began. Its return is the sum over time of \
the agents' mean reward. `cut_off` is the share of the episodes that the time limit cut off, and \
`actions` is the share of each action. `joint_saco` is the number of different pairs of joint \
observation and joint action, per transition.

| leaf | axes, without ({num_rows}, timesteps) | dtype |
| --- | --- | --- |
{leaves}

An action was chosen on the `observation` of its own timestep. `done` is true where a step ended \
the episode: it reached a terminal state, after which nothing follows, or the time limit cut it \
off. A leaf `truncation` is true at a cut-off. Where there is no such leaf, the episodes of \
{env[time_limit]} timesteps were cut off.

Rows join pieces of time that do not follow each other. This puts them in order:
```python
import ff_ippo_store_experience as ippo  # with this folder, or all of them, in vaults/{name}
episodes = ippo.load_episodes("{name}", "{uid}")
print(episodes.episode_return.mean(), episodes.transitions["observation"].shape)
```
It was recorded by independent PPO, after Mava's Anakin system, with the seed {system[seed]}, and \
with jax {versions[jax]}, jaxlib {versions[jaxlib]}, flashbax {versions[flashbax]}, \
flax {versions[flax]}, optax {versions[optax]}, distrax {versions[distrax]}, \
jumanji {versions[jumanji]} and chex {versions[chex]}, on {num_devices} device(s), where \
`jax_threefry_partitionable` was {jax_threefry_partitionable}. Run whose parameters it began \
with: {first_run}. The command, with all settings; for a task that is not the file's own, it is \
that of a script that gives its environment to `ippo.main`:

`{command}`

Licence: Apache-2.0.
"""


def write_card(name, uid, rel_dir="vaults"):
    """Write the data card, `README.md`, and the picture `dataset.png` into the folder of a run.

    Raises what `iterate_episodes` does.
    """
    stores, _, metadata, path = open_recording(name, uid, rel_dir)
    description = describe(name, uid, rel_dir)
    plot_dataset(description, metadata["task"]["actions"]).savefig(path / "dataset.png")
    # THE TABLES, with four digits behind the point
    rounded = json.loads(json.dumps(description), parse_float=lambda x: round(float(x), 4))
    table = [
        f"| `{key}` | {' | '.join(str(part.get(key, '')) for part in rounded.values())} |"
        for key in rounded["all"]
    ]
    leaves = [f"| `{leaf}` | {x.shape[2:]} | {x.dtype.name} |" for leaf, x in stores.items()]
    # THE COMMAND, with all settings but those of a machine
    settings = {group: metadata[group] for group in vars(Config())}
    command = ["python", "ff_ippo_store_experience.py"]
    for setting, value in settings_without(settings, (*OWN_SETTINGS, "checkpoint.")).items():
        flag = setting.replace(".", ".no-") if value is False else setting
        command.append(f"--{flag.replace('_', '-')}")
        if not isinstance(value, bool):
            command += map(str, np.atleast_1d(value))
    card = CARD.format(
        **metadata,
        all=description["all"],
        name=name,
        uid=uid,
        table="\n".join(table),
        leaves="\n".join(leaves),
        command=shlex.join(command),
        num_rows=stores["done"].shape[0],
        first_run=Path(str(metadata["checkpoint"]["load_params"])).name,
    )
    write_file(path / "README.md", card.encode())


# ---- CHECKS: every mistake is told in one line, before anything is recorded ----------------------
def check_environment(env):
    """Raise a `ConfigError` if your own environment is wrong."""
    name = type(env).__name__
    limit = getattr(env, "time_limit", None)
    require(not isinstance(env, type), f"{env} is a class: give an instance of it")
    require(
        isinstance(limit, int | np.integer) and 0 < limit < 2**31,
        f"time_limit of {name} is {limit!r}: it must be an int, of timesteps",
    )
    check_interface(env, name)
    check_episodes(env, name)


def check_interface(env, name):
    """What `reset` and `step` return: traced, not run."""

    def trace(method, *arguments):
        returned = jax.eval_shape(getattr(env, method), *arguments)
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        require(
            is_pair and isinstance(returned[1], TimeStep),
            f"{method} of {name} must return (state, TimeStep)",
        )
        return returned

    key = jax.random.PRNGKey(0)
    state, first = trace("reset", key)
    seen = first.observation
    require(
        hasattr(state, "key"),
        f"the state of {name}, a {type(state).__name__}, has no attribute key",
    )
    require(
        hasattr(seen, "agents_view"),
        f"the observation of {name}, a {type(seen).__name__}, has no attribute agents_view",
    )
    shape = np.shape(seen.agents_view)
    require(len(shape) == 2, f"agents_view of {name} has the shape {shape}, not (N, O)")
    num_agents = shape[:1]
    action = jnp.zeros(num_agents, jnp.int32)
    _, second = trace("step", state, action)
    for part in ("step_type", "reward", "discount"):
        fitting = [()] if part == "step_type" else [(), num_agents]  # of all agents, or each
        shape = getattr(getattr(second, part), "shape", None)
        require(shape in fitting, f"{part} of {name} has the shape {shape}, not one of {fitting}")

    agents = AgentWrapper(env, add_agent_id=False)
    _, first = jax.eval_shape(agents.reset, key)
    next_state, second = jax.eval_shape(agents.step, state, action)
    _, mask, global_state = jax.tree.map(jnp.shape, first.observation)
    is_fit = len(mask) == 2 and mask[:1] == num_agents
    require(is_fit, f"action_mask of {name} has the shape {mask}, not (N, A)")
    is_fit = global_state is None or len(global_state) == 1
    require(is_fit, f"global_state of {name} has the shape {global_state}, not (S)")
    chex.assert_trees_all_equal_shapes_and_dtypes(
        {"state": state, "observation": first.observation},
        {"state": next_state, "observation": second.observation},
        custom_message=f"{name} returns the first by reset, the second by step",
        exception_type=ConfigError,
    )


def check_episodes(env, name):
    """16 copies of the environment act at random for `time_limit` timesteps, at most 2**14."""
    agents = AgentWrapper(env, add_agent_id=False)
    limit = env.time_limit

    def play_step(carry, _):  # of which a few facts are held
        uniform = lambda params, x: jnp.where(x.action_mask, 0.0, -1e9)
        actor = TrainState.create(apply_fn=uniform, params={}, tx=optax.identity())
        carry, played = rollout(agents, actor, *carry, 1)
        seen = played.observation
        is_finite = jnp.isfinite(seen.agents_view).all() & jnp.isfinite(played.reward).all()
        has_action = seen.action_mask.any(axis=-1)
        return carry, (is_finite, has_action, played.discount, played.metrics)

    @jax.jit
    def play(key):
        begin = reset_environments(agents, jax.random.split(key, 16))
        steps = min(limit, 2**14)
        (_, end), facts = jax.lax.scan(play_step, (key[None], begin), length=steps)
        return raw(end.state.key), begin.observation.agents_view, facts

    keys, views, facts = jax.device_get(play(jax.random.PRNGKey(0)))
    num_keys = len(np.unique(keys, axis=0))
    require(num_keys == 16, f"16 states of {name} that began with 16 keys have {num_keys} keys")
    if (views == views[0]).all():
        log(f"all episodes of {name} begin with the same observation")
    is_finite, has_action, discount, metrics = facts  # (steps, 1, 16, ...)
    require(is_finite.all(), f"agents_view or reward of {name} is not finite")
    has_action = has_action.all(axis=(0, 1, 2))  # (N,)
    require(has_action.all(), f"agent {has_action.argmin()} of {name} has no legal action")
    is_full = metrics.episode_length >= limit
    is_terminal = (discount == 0).all(axis=-1)
    is_over = metrics.done | ~is_full
    require(is_over.all(), f"an episode of {name} has not ended at its time_limit, {limit}")
    is_end = is_terminal | is_full | ~metrics.done
    require(
        is_end.all(),
        f"an episode of {name} ended before its time_limit, {limit}, with a discount not 0: at a "
        "terminal state it must be 0",
    )
    num_full = is_full.sum()
    if 0 < num_full == (is_full & is_terminal).sum():
        log(
            f"of {num_full} episodes of {name} that lasted time_limit timesteps, all {num_full} "
            "ended with discount 0, as at a terminal state: where only the time was over, it must "
            "be 1"
        )


def check_config(config: Config, num_devices, env=None):
    """The configuration with nothing left open; a `ConfigError` before anything is created."""
    system, arch, vault = config.system, config.arch, config.vault
    require(os.getpid() == IMPORT_PROCESS, "after a fork, JAX hangs: use multiprocessing's spawn")

    # EACH NUMBER by itself
    defaults = flatten_dict(dataclasses.asdict(Config()), sep=".")
    highest = {"system.seed": 2**32 - 1, "system.gamma": 1, "system.gae_lambda": 1}
    for name, value in flatten_dict(dataclasses.asdict(config), sep=".").items():
        numbers = np.asarray(value)
        is_from_0 = type(defaults[name]) is float or name in ("system.seed", "arch.process_id")
        least = 0 if is_from_0 else 1
        most = highest.get(name, math.inf)
        is_fit = numbers.dtype.kind not in "iuf" or ((least <= numbers) & (numbers <= most)).all()
        require(is_fit, f"{name} is {value!r}: it must be from {least} to {most}")

    # SETTINGS THAT GO TOGETHER
    transitions = system.rollout_length * arch.num_envs
    require(
        transitions % system.num_minibatches == 0,
        f"system.num_minibatches is {system.num_minibatches}: it must divide "
        f"system.rollout_length * arch.num_envs, {transitions}",
    )
    num_updates = system.num_updates
    if system.total_timesteps is not None:
        steps = num_devices * system.update_batch_size * transitions * arch.num_evaluation
        num_updates = math.ceil(system.total_timesteps / steps) * arch.num_evaluation
    require(
        num_updates % arch.num_evaluation == 0,
        f"system.num_updates is {num_updates}: it must be a multiple of arch.num_evaluation, "
        f"{arch.num_evaluation}: set that to {math.gcd(num_updates, arch.num_evaluation)}, say",
    )
    require(
        jax.distributed.is_initialized() or not arch.distributed,
        "arch.distributed is True: it must come after jax.distributed.initialize",
    )
    require(
        vault.uid or not (config.checkpoint.resume or arch.distributed),
        f"vault.uid is {vault.uid!r}: it must be given with checkpoint.resume and arch.distributed",
    )

    # THE TASK
    scenario = config.env.scenario
    if env is not None:
        check_environment(env)
    task = find_task(scenario, env)
    if env is not None and scenario in TASKS:
        scenario = task.marl_eval_name
    time_limit = config.env.time_limit or task.time_limit
    require(
        env is None or time_limit == task.time_limit,
        f"env.time_limit is {time_limit}, but that of {task.marl_eval_name} {task.time_limit}",
    )
    # An export makes a folder of the scenario's name.
    run_path(task.og_marl_name, f"{scenario}.vlt", vault.rel_dir)

    # WHAT WAS LEFT OPEN
    return dataclasses.replace(
        config,
        system=dataclasses.replace(system, num_updates=num_updates),
        env=EnvConfig(scenario, time_limit),
        vault=dataclasses.replace(
            vault,
            name=vault.name or f"ff_ippo_{task.og_marl_name}",
            uid=vault.uid or time.strftime("%Y%m%d%H%M%S-") + secrets.token_hex(4),
            extra_leaves=tuple(dict.fromkeys((*task.extra_leaves, *vault.extra_leaves))),
        ),
    )


def check_processes(metadata):
    """Raise a `ConfigError`, in all processes, if one of them was given something else."""
    # The environments are compared as one, for they may have another number of arrays.
    as_one = {"environment": [metadata["environment"]]}
    given = settings_without(metadata | as_one, OWN_SETTINGS)
    digests = [zlib.crc32(repr(value).encode()) for value in given.values()]
    differing = np.array(list(given))[np.ptp(gather(np.array([digests])), axis=0) != 0]
    require(
        not differing.size,
        f"the processes were given different {', '.join(differing)}: give all the same",
    )


def check_folder(vault, resume):
    """The folder of this process; a `ConfigError`, in all processes, where it is taken."""
    path = run_path(vault.name, vault.uid, vault.rel_dir)
    count = jax.process_count()
    parts = [f"{vault.uid}-p{index:0{len(str(count))}}of{count}" for index in range(count)]
    names = [vault.uid] if count == 1 else parts
    found = {part.name for part in find_parts(path) if part.exists()}
    require(found <= set(names), f"{path} is of another number of processes than {count}")
    own = path.with_name(names[jax.process_index()])
    exists = gather(np.array([own.exists()]))
    require(
        resume or not exists.any(),
        f"{own} exists already: choose another vault.uid, or go on by checkpoint.resume",
    )
    # A process that began anew would make the others forget what they have.
    require(
        exists.all() == exists.any(),
        f"{own} {'is' if own.exists() else 'is not'} there, unlike that of another process: bring "
        "it back, or choose another vault.uid",
    )
    return own


# ---- RUN -----------------------------------------------------------------------------------------
def make_metadata(config, task, env_state):
    """What `metadata.json` says of environments (B, ...)."""
    num_agents, num_actions = env_state.observation.action_mask.shape[-2:]
    packages = ("jax", "jaxlib", "flashbax", "flax", "optax", "distrax", "jumanji", "chex")
    metadata = {
        **dataclasses.asdict(config),
        "task": task._replace(make=None)._asdict(),
        "num_agents": num_agents,
        "num_actions": num_actions,
        "num_devices": jax.local_device_count(),
        "num_processes": jax.process_count(),
        "num_updates_per_eval": config.system.num_updates // config.arch.num_evaluation,
        "jax_threefry_partitionable": jax.config.jax_threefry_partitionable,
        "jax_default_prng_impl": jax.config.jax_default_prng_impl,
        "jax_enable_x64": jax.config.jax_enable_x64,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "environment": {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{x.shape[1:]}"
            for path, x in jax.tree_util.tree_leaves_with_path(env_state)
        },
    }
    plain = lambda x: x.item() if isinstance(x, np.generic) else str(x)  # a number, or a path
    return json.loads(json.dumps(metadata, default=plain))


class Recorder:
    """What a process keeps on disk: vault, checkpoints and metrics, in a folder of its own."""

    def __init__(self, path, metadata, experience, mesh):
        """For leaves (D, NU, UB, T, NE, ...), of which it keeps those of its own devices."""
        self.path = path
        self.metadata = metadata
        self.mesh = mesh
        self.is_saving = metadata["vault"]["save"]
        own = lambda x: x[: jax.local_device_count()]
        self.rows = jax.eval_shape(lambda x: reshape_experience(jax.tree.map(own, x)), experience)
        self.rollout_length = self.rows["done"].shape[1]
        # No more than a buffer of 2**28 numbers holds: of float32, 1 GB.
        most = max(1, 2**28 // sum(x.size for x in self.rows.values()))
        self.save_interval = min(metadata["vault"]["save_interval"], most)

    @contextlib.contextmanager
    def open(self, progress):
        """Begin in a new folder, or go on from the checkpoint in the one that is there."""
        if not self.path.exists():
            load_from = self.metadata["checkpoint"]["load_params"]
            begin = with_params(progress, load_from, self.mesh) if load_from else progress
            with whole_folder(self.path) as folder:
                if self.is_saving:
                    make_vault(folder, self.rows, self.rollout_length, self.metadata)
                folder.mkdir(exist_ok=True)
                save_checkpoint(folder, self.metadata, begin, self.mesh)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another process is recording into {self.path}") from error
            # Of several processes that were killed, one may have newer checkpoints than another.
            files = find_checkpoints(self.path)
            newest = ([-1] * 3 + sorted(files))[-3:]
            held = gather(np.array([newest])).tolist()  # by each process
            common = set.intersection(*map(set, held)) - {-1}
            require(
                common,
                f"there is no checkpoint in {self.path} that all processes have: {sorted(files)}",
            )
            self.num_written = max(common)  # evaluations on disk
            self.progress = load_checkpoint(
                files[self.num_written], self.metadata, progress, self.mesh
            )
            for number, newer in files.items():
                if number > self.num_written:
                    newer.unlink()
            if self.is_saving:
                # TensorStore's next write would go into such a file of a process that was killed,
                # without truncating it, and make the vault unreadable.
                for stale in self.path.rglob("*.__lock"):
                    stale.unlink()
                # Flashbax prints in each process.
                with mock.patch("flashbax.vault.vault.print", create=True):
                    vault = Vault(str(self.path.parent), vault_uid=self.path.name)
                require(
                    vault.vault_index >= self.num_written * self.rollout_length,
                    f"the vault of {self.path} holds less than its checkpoint.{self.num_written} "
                    "knows of: they are of two copies",
                )
                file = self.path / "metadata.json"
                old = json.loads(file.read_text())
                # A run that has grown has other numbers, but began with the same parameters.
                metadata = old | self.metadata | {"checkpoint": old["checkpoint"]}
                write_file(file, json.dumps(metadata).encode())
                self.writer = VaultWriter(vault, self.rows, self.save_interval)
            yield self.progress

    def store(self, experience, progress):
        """Add what led to `progress` to the buffer, and write what is new if that is due."""
        if self.is_saving:
            self.writer.add(own_part(experience, self.mesh, SHARDED))
        self.progress = progress
        if (len(progress.evaluations) - 1) % self.save_interval == 0:
            self.write()

    def write(self):
        """Write what is new, the vault first: no checkpoint knows of more than it holds."""
        num_done = len(self.progress.evaluations)
        if num_done == self.num_written:
            return
        if self.is_saving:
            # What a run that was killed had written behind its checkpoint is overwritten.
            self.writer.vault.vault_index = self.num_written * self.rollout_length
            self.writer.write()
        save_checkpoint(self.path, self.metadata, self.progress, self.mesh)
        write_metrics(self.path, self.metadata, self.progress.evaluations)
        self.num_written = num_done


def check_update(output: LearnerOutput, first_step, num_steps):
    """Raise an error that tells where updates went wrong."""
    finite = jax.device_get(output.finite)
    if not finite.all():
        step = first_step + (finite.argmin() + 1) * num_steps // len(finite)
        raise FloatingPointError(
            f"a loss is not finite at step {step:,}: lower system.actor_lr and system.critic_lr"
        )
    legal = output.experience["legal_action_mask"].any(axis=-1)  # (D, NU, UB, T, NE, N)
    has_action = jax.device_get(legal.all(axis=range(5)))
    require(
        has_action.all(),
        f"agent {has_action.argmin()} had no legal action before step {first_step + num_steps:,}: "
        "let its action_mask always have one",
    )


class ExperimentResult(NamedTuple):
    """What `run_experiment` returns."""

    config: Config  # of the run, with nothing left open
    path: Path  # folder of the run: vault, checkpoint, metrics and pictures
    num_timesteps: int  # environment steps recorded, by all processes
    evaluations: list[Evaluation]  # in the order of training
    params: Params  # of the evaluation with the highest mean return
    absolute_metric: float | None  # mean return of `params` over more episodes, if asked for


def save_results(result, metadata):
    """Write the metrics, the pictures and the data card of a finished run."""
    vault, path = result.config.vault, result.path
    write_metrics(path, metadata, result.evaluations, result.absolute_metric)
    plot_learning_curve(result.evaluations).savefig(path / "learning_curve.png")
    if vault.save:
        try:
            write_card(vault.name, vault.uid, vault.rel_dir)
        except ConfigError as error:  # of several processes, each with a disk of its own
            log(f"README.md and dataset.png are not made: {error}")
    size = sum(file.stat().st_size for file in path.rglob("*")) / 1e6
    log(f"recorded: {result.num_timesteps:,} steps, with all else {size:,.1f} MB, in {path}")


@jax.numpy_dtype_promotion("standard")  # Optax and Jumanji do not work with "strict"
@jax.enable_custom_prng(False)  # the keys of a run are arrays, as checkpoints hold them
def run_experiment(
    config: Config = Config(), env: Environment | None = None, stop: threading.Event | None = None
):
    """Train, evaluate and record; `env` is your own environment, and `stop` ends the run early.

    Raises a `ConfigError` that says what to change, and a FloatingPointError where it diverges.
    """
    # INITIALISE
    stop = stop or threading.Event()
    mesh = Mesh(np.array(jax.devices()), ("device",))
    config = check_config(config, mesh.size, env)
    system, arch, vault = config.system, config.arch, config.vault
    task = find_task(config.env.scenario, env)
    env = AgentWrapper(task.make(config.env.time_limit), system.add_agent_id)
    num_evaluation = arch.num_evaluation  # E
    num_updates = system.num_updates // num_evaluation  # NU
    select = functools.partial(select_leaves, extra_leaves=vault.extra_leaves)
    learn = make_learn(env, system, num_updates, mesh, select)
    evaluate = make_evaluate(env, arch.num_eval_episodes, arch.evaluation_greedy, mesh)
    progress = init_progress(config, env, mesh)
    experience = jax.eval_shape(learn, progress.state).experience
    num_steps = math.prod(experience["done"].shape[:5])  # environment steps in an evaluation
    metadata = make_metadata(config, task, progress.state.env_state)
    check_processes(metadata)
    path = check_folder(vault, config.checkpoint.resume)
    recorder = Recorder(path, metadata, experience, mesh)
    run = f"{config.env.scenario}, seed {system.seed}, {mesh.size} {jax.default_backend()}"
    log(f"{run}: {num_evaluation * num_steps:,} steps, in {path}")
    # BEGIN in a new folder, or RESUME
    with recorder.open(progress) as progress, ThreadPoolExecutor(1) as disk:
        num_done = len(progress.evaluations)
        is_seen = "ipykernel" in sys.modules or (sys.stdout and sys.stdout.isatty())
        is_shown = is_seen and jax.process_index() == 0
        bar = tqdm(total=num_evaluation, initial=num_done, file=sys.stdout, disable=not is_shown)
        stopped = False
        storing = disk.submit(recorder.write)  # what the disk is doing; there is nothing new yet
        try:
            for index in range(num_done, num_evaluation):
                # TRAIN
                start = time.perf_counter()
                output = jax.block_until_ready(learn(progress.state))
                speed = num_steps / (time.perf_counter() - start)
                check_update(output, index * num_steps, num_steps)

                # EVALUATE the parameters that the update has just produced
                eval_key, evaluated = evaluate(output.state.actor, progress.eval_key)
                metrics, stops = gather((output.metrics, np.array([stop.is_set()])))
                train_returns = metrics.episode_return[metrics.done].tolist()
                past = progress.evaluations[-1].elapsed_time if index else 0.0
                evaluation = Evaluation(
                    step_count=(index + 1) * num_steps,
                    elapsed_time=past + time.perf_counter() - start,
                    steps_per_second=speed,
                    episode_return=evaluated.episode_return,
                    episode_length=evaluated.episode_length,
                    train_episode_return=float(np.mean(train_returns or math.nan)),
                    losses={name: float(loss.mean()) for name, loss in output.losses.items()},
                )
                progress = add_evaluation(progress, output.state, eval_key, evaluation)

                # RECORD it, beside the next one's training
                storing.result()  # raises what failed
                storing = disk.submit(recorder.store, output.experience, progress)
                del output  # so that its experience is not held while the next is made

                # LOG
                log(f"{evaluation}, saved to {recorder.num_written * num_steps:,}")
                bar.update()
                if stopped := bool(stops.any()):
                    break
        finally:  # whatever ended the run, what was logged is written
            bar.close()
            for future in (storing, disk.submit(recorder.write)):
                future.result()
            if stopped or isinstance(sys.exception(), KeyboardInterrupt):  # of a notebook
                flags = f"--checkpoint.resume --vault.uid {vault.uid}"
                done = f"{len(progress.evaluations)} of {num_evaluation} evaluations"
                log(f"stopped after {done}: to go on, run the same with {flags}", is_last=True)

    # ABSOLUTE METRIC of the best parameters, RESULT
    absolute_metric = None
    if arch.absolute_metric and not stopped:
        actor = progress.state.actor.replace(params=progress.best_params.actor)
        _, evaluated = evaluate(actor, progress.eval_key, arch.num_absolute_metric_eval_episodes)
        absolute_metric = float(evaluated.episode_return.mean())
        log(f"absolute metric: {absolute_metric:.2f} (mean episode return)")

    multihost_utils.sync_global_devices("recorded")
    result = ExperimentResult(
        config=config,
        path=path,
        num_timesteps=len(progress.evaluations) * num_steps if vault.save else 0,
        evaluations=progress.evaluations,
        params=jax.device_get(progress.best_params),
        absolute_metric=absolute_metric,
    )
    if jax.process_index() == 0 and not stopped:
        save_results(result, metadata)
    multihost_utils.sync_global_devices("drawn")  # a process that ended would not wait for long
    return result


# ---- COMMAND LINE --------------------------------------------------------------------------------
def main(env: Environment | None = None):
    """The command line: every field of `Config` is a flag, such as --system.num-updates 10."""
    config = tyro.cli(Config)

    # SIGNALS: the first ends the run after the evaluation under way, a second at once
    stop, caught = threading.Event(), []

    def catch(number, frame):
        if caught:  # where a signal has no default action, see below
            os._exit(128 + number)
        caught.append(number)
        stop.set()
        for each, handler in handlers.items():
            if hasattr(builtins, "__IPYTHON__"):
                signal.signal(each, handler)  # the session lives on
            elif each == signal.SIGHUP:  # a shell and its terminal send one each
                signal.signal(each, signal.SIG_IGN)
            elif os.getpid() > 1:  # process 1 of a container has no default action
                signal.signal(each, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as `nohup` makes it
        numbers.pop()
    handlers = {number: signal.signal(number, catch) for number in numbers}
    try:
        result = run_experiment(config, env, stop)
    except (FloatingPointError, OSError, ValueError) as error:
        # A ValueError, if TensorStore raises it.
        is_full = re.search("No space left|quota exceeded", str(error))
        if type(error) is ValueError and not is_full:
            raise
        # The other processes may wait for this one for minutes, and this one for them.
        exit_later = threading.Timer(30, os._exit, [1])
        exit_later.daemon = True
        if jax.process_count() > 1:
            exit_later.start()
        remedy = ": make room, then use checkpoint.resume" if is_full else ""
        sys.exit(f"error: {' '.join(str(error).split())}{remedy}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # Another process may have caught it.
    if caught or len(result.evaluations) < config.arch.num_evaluation:
        sys.exit(128 + [*caught, signal.SIGTERM][0])


if __name__ == "__main__" and "__file__" in globals():  # not pasted into a notebook
    main()
