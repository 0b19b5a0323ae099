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
import datetime
import fcntl
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_origin
from unittest import mock

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
from flashbax.buffers.trajectory_buffer import TrajectoryBuffer, TrajectoryBufferState
from flashbax.vault.vault import TIME_AXIS_MAX_LENGTH, Vault
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.training.train_state import TrainState
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
    num_eval_episodes: int = 32  # episodes per evaluation, a multiple of the number of devices
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
    """The folder of the run, REL_DIR/NAME/UID: vault, checkpoint, metrics and pictures."""

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
    """A run that cannot be started as it is configured; one line says what to change."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


# Several processes find each other before one touches a device, as importing Jumanji does.
if "--arch.distributed" in sys.argv and not jax.distributed.is_initialized():
    arch = tyro.cli(Config).arch
    this_process = (arch.coordinator_address, arch.num_processes, arch.process_id)
    jax.distributed.initialize(*this_process, heartbeat_timeout_seconds=30)

# The backends of matplotlib that Jumanji and notebooks choose may not be installed.
with mock.patch.object(builtins, "__IPYTHON__", False, create=True), mock.patch.dict(os.environ):
    if importlib.util.find_spec("matplotlib_inline") is None:
        os.environ.pop("MPLBACKEND", None)
    from jumanji.env import Environment, State
    from jumanji.environments import LevelBasedForaging, RobotWarehouse
    from jumanji.environments.routing.lbf import generator as lbf
    from jumanji.environments.routing.robot_warehouse import constants
    from jumanji.environments.routing.robot_warehouse import generator as rware
    from jumanji.types import TimeStep
    from jumanji.wrappers import Wrapper
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter


def gather(tree: ArrayTree) -> ArrayTree:
    """Arrays that are spread over all devices, or of each process, as NumPy's; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


# ---- ENVIRONMENT ---------------------------------------------------------------------------------
class Task(NamedTuple):
    """What a scenario is made of."""

    make: Callable[[int], Environment]  # of the time limit
    time_limit: int  # timesteps, by default
    marl_eval_name: str  # marl-eval's name of the family
    og_marl_name: str  # OG-MARL's name of the family
    actions: tuple[str, ...] = ()  # for the pictures; by default numbers
    extra_leaves: tuple[str, ...] = ("truncation",)  # recorded by default
    scenario: str = ""


def warehouse_task(**size: int) -> Task:
    """A RobotWarehouse, whose vault is the original's: no leaf but `done` tells of an end."""
    size = {"shelf_columns": 3, "column_height": 8, "sensor_range": 1, **size}
    make = lambda time_limit: Warehouse(rware.RandomGenerator(**size), time_limit)
    actions = ("noop", "forward", "left", "right", "toggle load")
    return Task(make, 500, "RobotWarehouse", "rware", actions, extra_leaves=())


def lbf_task(**size: int) -> Task:
    """A LevelBasedForaging."""
    make = lambda time_limit: Foraging(lbf.RandomGenerator(**size), time_limit=time_limit)
    actions = ("noop", "up", "down", "left", "right", "load")
    return Task(make, 100, "LevelBasedForaging", "lbf", actions)


# To add a task is to add an entry.  "2s" sees 2 cells far (`fov`), the others the whole grid.
TASKS: dict[str, Task] = {
    "tiny-2ag": warehouse_task(shelf_rows=1, num_agents=2, request_queue_size=2),
    "tiny-4ag": warehouse_task(shelf_rows=1, num_agents=4, request_queue_size=4),
    "tiny-4ag-easy": warehouse_task(shelf_rows=1, num_agents=4, request_queue_size=8),
    "small-4ag": warehouse_task(shelf_rows=2, num_agents=4, request_queue_size=4),
    "2s-8x8-2p-2f-coop": lbf_task(grid_size=8, fov=2, num_agents=2, num_food=2, force_coop=True),
    "8x8-2p-2f-coop": lbf_task(grid_size=8, fov=8, num_agents=2, num_food=2, force_coop=True),
    "2s-10x10-3p-3f": lbf_task(grid_size=10, fov=2, num_agents=3, num_food=3),
    "10x10-3p-3f": lbf_task(grid_size=10, fov=10, num_agents=3, num_food=3),
    "15x15-3p-5f": lbf_task(grid_size=15, fov=15, num_agents=3, num_food=5),
    "15x15-4p-3f": lbf_task(grid_size=15, fov=15, num_agents=4, num_food=3),
    "15x15-4p-5f": lbf_task(grid_size=15, fov=15, num_agents=4, num_food=5),
}


def find_task(config: EnvConfig, env: Environment | None = None) -> Task:
    """The task, by name or of your own environment; a `ConfigError` where there is no such task."""
    if env is None:
        name, names = config.scenario, ", ".join(TASKS)
        require(name in TASKS, f"env.scenario {name!r} is unknown: choose one of {names}")
        return TASKS[name]._replace(scenario=name)
    name = type(env).__name__
    limit = f"env.time_limit is {config.time_limit}, but that of {name} {env.time_limit}"
    require(config.time_limit in (None, env.time_limit), limit)
    scenario = name if config.scenario in TASKS else config.scenario
    return Task(lambda _: env, int(env.time_limit), name, name.lower(), scenario=scenario)


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
    global_state: Array | None = None  # (..., S) float32, of environments that have one


class AgentWrapper(Wrapper):
    """Gives each agent its `Observation` (N, .), reward and discount (N,) float32, as in Mava."""

    def __init__(self, env: Environment, add_agent_id: bool):
        self._env, self.add_agent_id = env, add_agent_id

    def reset(self, key: PRNGKey) -> tuple[State, TimeStep]:
        return self._per_agent(*self._env.reset(key))

    def step(self, state: State, action: Array) -> tuple[State, TimeStep]:  # (N,) int32
        return self._per_agent(*self._env.step(state, action))

    def _per_agent(self, state: State, timestep: TimeStep) -> tuple[State, TimeStep]:
        to_float = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        view = to_float(timestep.observation.agents_view)
        if self.add_agent_id:
            view = jnp.concatenate([jnp.eye(len(view), dtype=view.dtype), view], axis=1)
        mask = getattr(timestep.observation, "action_mask", None)
        if mask is None:  # all actions that an agent has are legal
            with jax.ensure_compile_time_eval():  # the specification would be traced, too
                num_actions = np.asarray(self._env.action_spec.num_values)  # (N,)
            mask = jnp.arange(num_actions.max()) < num_actions.reshape(-1, 1)
            mask = jnp.broadcast_to(mask, (len(view), mask.shape[1]))
        global_state = to_float(getattr(timestep.observation, "global_state", None))
        seen = {"observation": Observation(view, mask.astype(bool), global_state), "extras": {}}
        for name in ("reward", "discount"):  # what the team has in common is that of each agent
            seen[name] = to_float(jnp.broadcast_to(getattr(timestep, name), len(view)))
        return state, timestep.replace(**seen)


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
    return action.reshape(logits.shape[:-1]).astype(jnp.int32)


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
        done = jnp.broadcast_to(timestep.last()[:, None], action.shape)
        outcome = timestep.reward, timestep.discount, observation, timestep.observation
        return (keys, env_state), Transition(done, action, *outcome, env_state.metrics)

    return jax.lax.scan(step, (keys, env_state), None, rollout_length)


# ---- ADVANTAGE -----------------------------------------------------------------------------------
def calculate_advantage(
    reward: Array, done: Array, value: Array, last_value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
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
    """What training carries on, here on one device; outside `learn`, axes of UB have D * UB."""

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
    num_batches = mesh.size * config.system.update_batch_size

    def init(key, params_key):
        keys = jax.random.split(key, num_batches * config.arch.num_envs + 1)
        policy_keys = jax.random.split(keys[0], num_batches + 1)[1:]
        env_state = reset_environments(env, jax.vmap(jax.random.split)(keys[1:])[:, 1])
        # With a dtype of their own also where an environment puts Python's numbers into its state.
        env_state = jax.tree.map(lambda x: x.astype(x.dtype), env_state)
        actor, critic = init_networks(config, env_state.observation, params_key)
        return LearnerState(actor, critic, policy_keys, env_state)

    # Placed as `learn` places its outputs: otherwise its second call would compile it again.
    shardings = LearnerState(*(NamedSharding(mesh, spec) for spec in STATE_SPECS))
    return jax.jit(init, out_shardings=shardings)(key, params_key)


def update_minibatch(
    actor: TrainState, critic: TrainState, batch: tuple, indices: Array, config: SystemConfig
) -> tuple[tuple[TrainState, TrainState], dict[str, Array]]:
    """One step of both optimisers, along the gradient's mean over UB and over the devices.

    `batch` holds transitions, advantages and lambda-returns of the rollout, (T * UB * NE, N, ...),
    and `indices` (UB, M) those of the minibatch.  Returns also the losses, each () float32.
    """
    transition, advantage, target = jax.tree.map(lambda x: x[indices], batch)  # (UB, M, N, ...)
    mean = advantage.mean(axis=(1, 2), keepdims=True)  # each batch by itself
    advantage = (advantage - mean) / (advantage.std(axis=(1, 2), keepdims=True) + 1e-8)

    # The mean of the batches' gradients is the gradient of their mean loss: one copy of the
    # parameters and one matrix product serve them all.
    actor_grads, actor_losses = jax.grad(actor_loss, has_aux=True)(
        actor.params, actor.apply_fn, transition, advantage, config.clip_eps, config.ent_coef
    )
    critic_grads, critic_losses = jax.grad(critic_loss, has_aux=True)(
        critic.params, critic.apply_fn, transition, target, config.clip_eps, config.vf_coef
    )
    gradients = actor_grads, critic_grads, {**actor_losses, **critic_losses}
    # One message for all arrays, behind a barrier: two CPU devices learn 8 % faster, one 2 %.
    flat, unravel = ravel_pytree(jax.lax.optimization_barrier(gradients))
    actor_grads, critic_grads, losses = unravel(jax.lax.pmean(flat, axis_name="device"))
    actor = actor.apply_gradients(grads=actor_grads)
    return (actor, critic.apply_gradients(grads=critic_grads)), losses


def update(
    state: LearnerState, env: Environment, config: SystemConfig
) -> tuple[LearnerState, tuple[Transition, dict[str, Array]]]:
    """One update of independent PPO, as in Mava, on one device.

    Returns also the transitions, (T, UB * NE, ...), and the mean losses, each () float32.
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

    # MINIBATCHES: each of the UB batches shuffles the positions of its own transitions
    num_batches = config.update_batch_size
    flatten = lambda x: x.reshape(-1, *x.shape[2:])  # (T, UB * NE, ...) -> (T * UB * NE, ...)
    batch = jax.tree.map(flatten, (transitions, advantage, target))
    position = jnp.arange(len(batch[1])).reshape(config.rollout_length, num_batches, -1)
    position = position.swapaxes(0, 1).reshape(num_batches, -1)  # (T, UB, NE) -> (UB, T * NE)
    split = lambda keys, _: tuple(jax.vmap(jax.random.split, out_axes=1)(keys))
    keys, shuffle_keys = jax.lax.scan(split, keys, None, config.ppo_epochs)
    indices = jax.vmap(jax.vmap(jax.random.permutation), (0, None))(shuffle_keys, position)
    # (epochs, UB, minibatches * M) -> (epochs * minibatches, UB, M)
    indices = indices.reshape(config.ppo_epochs, num_batches, config.num_minibatches, -1)
    indices = indices.swapaxes(1, 2).reshape(-1, num_batches, indices.shape[-1])

    # UPDATE
    step = lambda networks, indices: update_minibatch(*networks, batch, indices, config)
    (actor, critic), losses = jax.lax.scan(step, (actor, critic), indices)
    losses = jax.tree.map(jnp.mean, losses)
    return LearnerState(actor, critic, keys, env_state), (transitions, losses)


class LearnerOutput(NamedTuple):
    """What one call of `learn` returns."""

    state: LearnerState  # for the next call
    experience: dict[str, Array]  # leaves (D, NU, UB, T, NE, ...)
    metrics: EpisodeMetrics  # of the training episodes, (D, NU, UB, T, NE)
    losses: dict[str, Array]  # (NU,) float32, mean over devices, batches and minibatches
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
    """Play whole episodes side by side, until the last has ended, as Gorsane et al. (2022) advise.

    Returns their returns and lengths, (num_episodes,), done but for those past `env.time_limit`.
    """

    def step(carry):
        key, (state, observation, metrics) = carry
        key, policy_key = jax.random.split(key)
        action = act(actor, observation, policy_key[None], greedy)
        state, timestep = jax.vmap(env.step)(state, action)
        # An environment whose episode has ended is stepped on, but not counted.
        reward = jnp.where(metrics.done, 0.0, timestep.reward.mean(axis=-1))
        episode_length = metrics.episode_length + ~metrics.done
        done = metrics.done | timestep.last()
        metrics = EpisodeMetrics(metrics.episode_return + reward, episode_length, done)
        return key, EnvState(state, timestep.observation, metrics)

    key, reset_key = jax.random.split(key)
    env_state = reset_environments(env, jax.random.split(reset_key, num_episodes))
    going_on = lambda x: (~x[1].metrics.done & (x[1].metrics.episode_length < env.time_limit)).any()
    return jax.lax.while_loop(going_on, step, (key, env_state))[1].metrics


class Evaluation(NamedTuple):
    """What is known after one evaluation."""

    step_count: int  # environment steps of training so far
    elapsed_time: float  # seconds of training and evaluating so far
    steps_per_second: float  # of the training since the evaluation before
    episode_return: np.ndarray  # (num_eval_episodes,) float32
    episode_length: np.ndarray  # (num_eval_episodes,) int32, timesteps
    train_episode_return: float  # mean of the training episodes that ended since, nan if none did
    losses: dict[str, float]  # mean since, of "actor_loss", "value_loss" and "entropy"

    def __str__(self) -> str:
        means = {"episode return": self.episode_return.mean(), "length": self.episode_length.mean()}
        parts = [f", {name} {value:.4g}" for name, value in {**means, **self.losses}.items()]
        return f"step {self.step_count:,}: {self.steps_per_second:,.0f} steps/s{''.join(parts)}"


def make_evaluate(
    env: Environment, num_parallel: int, greedy: bool, mesh: Mesh
) -> Callable[..., tuple[np.ndarray, EpisodeMetrics]]:
    """A function that evaluates an actor with a key (2,), `num_parallel` episodes at a time.

    It takes the number of episodes, too, and returns the next key, and the metrics on the host.
    """
    part = lambda actor, keys: evaluate(env, actor, keys[0], num_parallel // mesh.size, greedy)
    specs = {"in_specs": (REPLICATED, SHARDED), "out_specs": SHARDED}
    evaluate_parts = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))

    def evaluate_all(actor, key, num_episodes=num_parallel):
        metrics = []
        for _ in range(0, num_episodes, num_parallel):
            key, *keys = np.asarray(jax.random.key_data(jax.random.split(key, mesh.size + 1)))
            metrics.append(gather(evaluate_parts(actor, np.stack(keys))))
            problem = f"an episode of {type(env._env).__name__} has not ended at its time_limit"
            require(metrics[-1].done.all(), f"{problem}, {env.time_limit}")
        return key, jax.tree.map(lambda *x: np.concatenate(x)[:num_episodes], *metrics)

    return evaluate_all


# ---- RECORDING -----------------------------------------------------------------------------------
# The leaves of the vault, of which the last is not always there, and those that may be asked for.
LEAVES = ("done", "action", "reward", "observation", "legal_action_mask", "global_state")
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
        "global_state": transition.observation.global_state,
        "truncation": transition.done & (transition.discount != 0).any(axis=-1, keepdims=True),
    }
    return {name: leaves[name] for name in (*LEAVES, *extra_leaves) if leaves[name] is not None}


def reshape_experience(experience: dict[str, Array]) -> dict[str, Array]:
    """Rows of consecutive timesteps, as a buffer wants them, of what the learner returns."""
    # (D, NU, UB, T, NE, ...) -> (D, NU, UB, NE, T, ...) -> (D * NU * UB * NE, T, ...)
    rows = lambda x: x.swapaxes(3, 4).reshape(-1, x.shape[3], *x.shape[5:])
    return jax.tree.map(rows, experience)


def make_buffer(num_rows: int, num_timesteps: int) -> TrajectoryBuffer:
    """Flashbax's flat buffer, of `num_rows` rows of `num_timesteps` timesteps."""
    lengths = {"max_length": num_rows * num_timesteps, "min_length": num_rows}
    options = {"sample_batch_size": 1, "add_sequences": True, "add_batch_size": num_rows}
    return fbx.make_flat_buffer(**lengths, **options)


def run_path(name: str, uid: str, rel_dir: str = "vaults") -> Path:
    """The folder REL_DIR/NAME/UID, absolute; a `ConfigError` where Flashbax would mistake it."""
    path = Path(os.path.abspath(rel_dir), name, uid)
    plain = path.parts[-2:] == (name, uid) and "." not in (name[0], uid[0])
    plain = plain and str(path).isprintable() and not set(str(path)) & set("#%?|\\")
    require(plain, f"{str(path)!r} must be made of plain names, without # % ? | \\")
    return path


def part_paths(path: Path, count: int) -> list[Path]:
    """The folders of a run of `count` processes: `path`, or of several UID-p0of2 and so on."""
    parts = [path.with_name(f"{path.name}-p{index}of{count}") for index in range(count)]
    return parts if count > 1 else [path]


def find_parts(path: Path) -> set[Path]:
    """Those of the folders of a run that exist, whatever the number of processes."""
    is_part = re.compile(rf"{re.escape(path.name)}(-p\d+of\d+)?").fullmatch  # and not UID-profile
    return {folder for folder in path.parent.glob("*") if is_part(folder.name)}


def own_path(config: VaultConfig) -> Path:
    """The folder of this process."""
    path = run_path(config.name, config.uid, config.rel_dir)
    return part_paths(path, jax.process_count())[jax.process_index()]


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole at any time: a new one takes the place of the old one at once."""
    temporary = path.with_name(f".{path.stem}")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to make and to fill, which is moved to `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        yield folder
        require(not path.exists(), f"{path} exists already: choose another name")
        folder.rename(path)


def make_vault(path: Path, experience: Any, chunk_length: int, metadata: dict[str, Any]) -> Vault:
    """Create a vault at `path`, with zstd: three times as fast as Flashbax's gzip, and smaller.

    It is for leaves (rows, any, ...), arrays or shapes, in chunks of `chunk_length` timesteps.
    That should divide what each write brings: otherwise the next one codes the last chunk again.
    """

    class NewVault(Vault):
        def _init_leaf(self, name, shape, dtype, create_ds):
            spec = self._get_base_spec(name)
            # A write stores anew each node of the index that it changes: by default, of up to 8 MB.
            spec["kvstore"]["config"] = {"max_decoded_node_bytes": 2**12}
            num_rows = min(shape[0], max(1, 2**22 // (chunk_length * math.prod(shape[2:]))))
            chunks = [num_rows, chunk_length, *shape[2:]]  # some 16 MB of float32, or one row
            spec["metadata"] = {"compressor": {"id": "zstd", "level": 1}, "chunks": chunks}
            shape = (shape[0], TIME_AXIS_MAX_LENGTH, *shape[2:])
            return tensorstore.open(spec, dtype=dtype, shape=shape, create=create_ds).result()

    with mock.patch("flashbax.vault.vault.print", create=True):  # its advice is for other buffers
        return NewVault(str(path.parent), experience, vault_uid=path.name, metadata=metadata)


def open_vault(name: str, uid: str, rel_dir: str = "vaults") -> tuple[Vault, dict[str, Any]]:
    """A vault that exists, and its metadata; a FileNotFoundError where there is none."""
    path = run_path(name, uid, rel_dir)
    metadata = json.loads((path / "metadata.json").read_text())
    return Vault(vault_name=name, vault_uid=uid, rel_dir=rel_dir), metadata


# ---- CHECKPOINT: what a run needs to go on where it stopped --------------------------------------
class Progress(NamedTuple):
    """A run between two evaluations."""

    state: LearnerState
    eval_key: np.ndarray  # (2,) uint32
    best_params: Params  # of the evaluation with the highest mean return
    best_return: float
    evaluations: list[Evaluation]

    def add(self, state: LearnerState, key: np.ndarray, evaluation: Evaluation) -> "Progress":
        """The progress after one more evaluation, with the key of the next."""
        best, mean_return = self[2:4], float(evaluation.episode_return.mean())
        if mean_return >= self.best_return:
            best = state.params, mean_return
        return Progress(state, key, *best, [*self.evaluations, evaluation])


def raw(x: Array) -> Array:
    """An array as it is, and the data of typed keys, which `jax.random.key` makes."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def place(tree: ArrayTree, like: ArrayTree) -> ArrayTree:
    """NumPy arrays of this process, on the devices as those of the tree `like` lie there."""
    put = lambda new, old: jax.make_array_from_process_local_data(raw(old).sharding, new)
    wrap = lambda new, old: jax.random.wrap_key_data(put(new, old), impl=jax.random.key_impl(old))
    return jax.tree.map(lambda new, old: (put if raw(old) is old else wrap)(new, old), tree, like)


def init_progress(config: Config, env: Environment, mesh: Mesh) -> Progress:
    """The beginning of a run, with the parameters that are to be loaded."""
    key, eval_key, params_key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    state = init_learner(key, params_key, env, config, mesh)
    exists = gather(np.array([own_path(config.vault).exists()])).all()
    if config.checkpoint.load_params and not exists:
        params = load_params(config.checkpoint.load_params)
        same = jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, params)
        require(same, f"checkpoint.load_params {config.checkpoint.load_params} has other networks")
        actor, critic = place(multihost_utils.broadcast_one_to_all(params), state.params)
        actor, critic = state.actor.replace(params=actor), state.critic.replace(params=critic)
        state = state._replace(actor=actor, critic=critic)
    return Progress(state, np.asarray(raw(eval_key)), state.params, -math.inf, [])


def fixed_settings(config: Config) -> dict[str, Any]:
    """What must be the same where a run goes on: it determines the data, or the best parameters."""
    groups = json.loads(json.dumps(dataclasses.asdict(config)))  # with lists in place of tuples
    names = {group: list(groups[group]) for group in ("system", "env", "network")}
    names["system"] = [x for x in names["system"] if x not in ("total_timesteps", "num_updates")]
    names["arch"] = ["num_envs", "num_eval_episodes", "evaluation_greedy"]
    names["vault"] = ["save", "extra_leaves"]
    random = ("jax_threefry_partitionable", "jax_default_prng_impl", "jax_enable_x64")
    return {
        **{f"{group}.{name}": groups[group][name] for group in names for name in names[group]},
        **{name: getattr(jax.config, name) for name in random},
        "updates per evaluation": config.system.num_updates // config.arch.num_evaluation,
        "number of devices": jax.device_count(),
        "number of processes": jax.process_count(),
    }


def save_checkpoint(path: Path, config: Config, progress: Progress, mesh: Mesh) -> None:
    """Save this process's part of `progress` in the folder `path`; the two before are kept."""
    own_part = multihost_utils.global_array_to_host_local_array
    state = own_part(jax.tree.map(raw, progress.state), mesh, STATE_SPECS)
    content = {
        "settings": fixed_settings(config),
        "state": [np.asarray(x) for x in jax.tree.leaves(state)],
        "eval_key": progress.eval_key,
        "params": jax.device_get(own_part(progress.best_params, mesh, REPLICATED))._asdict(),
        "best_return": progress.best_return,
        "evaluations": [evaluation._asdict() for evaluation in progress.evaluations],
    }
    write_file(path / f"checkpoint.{len(progress.evaluations)}", msgpack_serialize(content))
    # Of several processes, one that is not killed may save two more than one that is.
    for _, old in sorted(find_checkpoints(path).items())[:-3]:
        old.unlink()


def find_checkpoints(path: Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run, by the number of evaluations done."""
    return {int(file.suffix[1:]): file for file in path.glob("checkpoint.*")}


def load_checkpoint(file: Path, config: Config, like: Progress) -> Progress:
    """The progress that was saved, placed as `like`; a `ConfigError` names what does not fit."""
    saved = msgpack_restore(file.read_bytes())
    for name, value in fixed_settings(config).items():
        old = saved["settings"].get(name)
        require(value == old, f"{name} is {value}, but {old} in the run that is to go on")
    num_done, num_evaluation = len(saved["evaluations"]), config.arch.num_evaluation
    problem = f"arch.num_evaluation is {num_evaluation}, but {num_done} are done already"
    require(num_done <= num_evaluation, problem)
    state = place(jax.tree.structure(like.state).unflatten(saved["state"]), like.state)
    best = place(Params(**saved["params"]), like.best_params), saved["best_return"]
    evaluations = [Evaluation(**evaluation) for evaluation in saved["evaluations"]]
    return Progress(state, saved["eval_key"], *best, evaluations)


def load_params(path: str | Path) -> Params:
    """The best parameters of a run, vaults/NAME/UID; a FileNotFoundError where there are none."""
    path = Path(path).absolute()
    files = find_checkpoints(min(find_parts(path), default=path))
    if not files:
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    return Params(**msgpack_restore(files[max(files)].read_bytes())["params"])


# ---- OFFLINE: episodes from a vault, OG-MARL's layout --------------------------------------------
def restore_time_order(
    experience: ArrayTree, num_devices: int, num_updates_per_eval: int, rollout_length: int
) -> ArrayTree:
    """Each environment's own stream of timesteps, unbroken, from the rows of a vault.

    With NU > 1 a row of the vault holds every NU-th rollout of an environment, end to end: time
    jumps where one ends.  Leaves (D * NU * UB * NE, E * T, ...), of NumPy or JAX, come back as
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
    """Leaves (D * NU * UB * NE, any, ...) on disk, the timesteps that they hold, and the metadata.

    The parts of several processes are read as one; there is a `ConfigError` where one is missing,
    and a FileNotFoundError where there is no vault.
    """
    path = run_path(name, uid, rel_dir)
    found = find_parts(path) or {path}
    parts, names = part_paths(path, len(found)), ", ".join(sorted(part.name for part in found))
    require(found == set(parts), f"{path.parent} has {names}: bring together all parts of one run")
    vaults, metadata = zip(*(open_vault(name, part.name, rel_dir) for part in parts), strict=True)
    join = lambda *stores: tensorstore.concat(stores, axis=0)
    leaves = jax.tree.map(join, *(vault._all_datastores for vault in vaults))
    num_devices = sum(part["num_devices"] for part in metadata)
    length = min(vault.vault_index for vault in vaults)
    return leaves, length, {**metadata[0], "num_devices": num_devices}


class Episodes(NamedTuple):
    """K complete episodes, S transitions in all.

    They lie end to end along one axis, not padded: what followed transition i is transition i + 1,
    unless `done`; `np.repeat(np.arange(K), length)` gives the ids for a `jax.ops.segment_sum`.
    """

    transitions: dict[str, np.ndarray]  # leaves of the vault, (S, ...)
    start: np.ndarray  # (K,) int64, index of the first transition
    length: np.ndarray  # (K,) int64, timesteps
    episode_return: np.ndarray  # (K,) float32, the agents' mean reward, summed
    start_step: np.ndarray  # (K,) int64, environment steps of training before the episode's first


def iterate_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: tuple[float, float] = (0, 100),
    leaves: tuple[str, ...] | None = None,
    num_steps: int = 50_000,
) -> Iterator[Episodes]:
    """Every complete episode of a vault, exactly once, a window of the vault at a time.

    A window has `num_steps` environment steps, in whole evaluations, at least one; the episodes
    that end in it come one environment after the other.  `percentiles` of training are read, in
    whole evaluations, both ends rounded down, and these `leaves`, by default all.  Raises what
    `open_recording` does, and a `ConfigError` where the percentiles hold nothing.
    """
    stores, length, metadata = open_recording(name, uid, rel_dir)
    rollout_length = metadata["system"]["rollout_length"]
    sizes = metadata["num_devices"], metadata["num_updates_per_eval"], rollout_length
    num_rows, num_evaluations = stores["done"].shape[0], length // rollout_length
    first, last = (int(num_evaluations * percentile / 100) for percentile in percentiles)
    problem = f"percentiles {percentiles} of {num_evaluations} evaluations hold none"
    require(0 <= percentiles[0] <= percentiles[1] <= 100 and first < last, problem)
    leaves = tuple(stores) if leaves is None else leaves
    num_envs, evaluation_length = num_rows // sizes[1], sizes[1] * rollout_length
    window = max(1, num_steps // (num_rows * rollout_length))
    # When the open episode of each environment began, on the environment's own clock.  Where the
    # recording begins, episodes begin; elsewhere the first that is known to begin follows a `done`.
    begin = np.full(num_envs, 0.0 if first == 0 else math.inf)
    for start in range(first, last, window):
        stop = min(start + window, last)
        start = int(min(start * evaluation_length, begin.min()) // evaluation_length)
        times = slice(start * rollout_length, stop * rollout_length)
        # `Vault.read` would read all of all leaves, onto the accelerator.
        part = {x: stores[x][:, times].read().result() for x in {"done", "reward", *leaves}}
        part = restore_time_order(part, *sizes)
        done = part["done"][..., 0]  # (B, time), B here of all devices
        ends, time = done.any(axis=1), start * evaluation_length + np.arange(done.shape[1])
        begin = np.where(ends & np.isinf(begin), time[done.argmax(axis=1)] + 1, begin)
        has_ended = np.cumsum(done[:, ::-1], axis=1)[:, ::-1] > 0
        complete = (time >= begin[:, None]) & has_ended
        begin = np.where(ends, time[-1] + 1 - done[:, ::-1].argmax(axis=1), begin)
        end = np.flatnonzero(done[complete]) + 1
        first_index = np.append(0, end)[:-1]
        reward = part["reward"][complete].mean(axis=1, dtype=np.float64)
        episode_return = np.add.reduceat(reward, first_index).astype(np.float32)
        start_step = time[np.nonzero(complete)[1][first_index]] * num_envs
        transitions = {leaf: part[leaf][complete] for leaf in leaves}
        yield Episodes(transitions, first_index, end - first_index, episode_return, start_step)


def load_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: tuple[float, float] = (0, 100),
    leaves: tuple[str, ...] | None = None,
) -> Episodes:
    """What `iterate_episodes` gives, in one; to join it takes twice the memory of the result."""
    windows = iterate_episodes(name, uid, rel_dir, percentiles, leaves)
    episodes = jax.tree.map(lambda *x: np.concatenate(x), *windows)
    return episodes._replace(start=np.cumsum(episodes.length) - episodes.length)


# OG-MARL's names of the parts of a recording, and the percentiles of training that are in them.
OG_MARL_PARTS = {"Replay": (0, 100), "Poor": (0, 33), "Medium": (33, 67), "Good": (67, 100)}


def to_og_marl(episodes: Episodes, metadata: dict[str, Any]) -> dict[str, ArrayTree]:
    """The transitions of complete episodes, with all their leaves, as OG-MARL has them.

    Returns leaves (1, S, N, ...); in `infos`, the legal actions (1, S, N, A) bool, and the global
    state, or else the agents' observations side by side, (1, S, N * O).  Observations come without
    the one-hot of the agent's index: OG-MARL's systems put their own in front.
    """
    transitions = episodes.transitions
    num_ids = metadata["num_agents"] if metadata["system"]["add_agent_id"] else 0
    observation = transitions["observation"][..., num_ids:]
    side_by_side = observation.reshape(len(observation), math.prod(observation.shape[1:]))
    state = transitions.get("global_state", side_by_side)
    truncated = transitions.get("truncation")
    if truncated is None:
        # RobotWarehouse's vault, as the original's, has no leaf that tells: an episode as long as
        # the time limit was cut off, even if its very last step also brought a collision.
        is_cut_off = episodes.length == metadata["env"]["time_limit"]  # (K,)
        truncated = np.repeat(is_cut_off, episodes.length)[:, None]  # (S, 1)
    experience = {
        "observations": observation,
        "actions": transitions["action"],
        "rewards": transitions["reward"],
        "terminals": transitions["done"] & ~truncated,
        "truncations": transitions["done"] & truncated,
        "infos": {"legals": transitions["legal_action_mask"], "state": state},
    }
    return jax.tree.map(lambda x: x[None], experience)


def export_og_marl(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    part: str = "Replay",
    export_name: str | None = None,
    destination: str | Path | None = None,
) -> Path:
    """Write a part of a vault as a vault that OG-MARL reads, episodes end to end in one row.

    `part` is one of `OG_MARL_PARTS`, of which "Replay" is everything.  Returns the folder of the
    export, DESTINATION/ENV/SCENARIO.vlt/NAME: the destination is by default og_marl in the folder
    of the run, the name that of the part.  Where it exists already, there is a `ConfigError`.
    """
    *_, metadata = open_recording(name, uid, rel_dir)
    source = destination or min(find_parts(run_path(name, uid, rel_dir))) / "og_marl"
    scenario, folder = metadata["env"]["scenario"], Path(source, metadata["task"]["og_marl_name"])
    path = run_path(f"{scenario}.vlt", export_name or part, str(folder))
    vault = None
    # The disk has a thread: Flashbax starts an event loop, where a notebook's own is running.
    with whole_folder(path) as folder, ThreadPoolExecutor(1) as disk:
        for episodes in iterate_episodes(name, uid, rel_dir, OG_MARL_PARTS[part]):
            experience = to_og_marl(episodes, metadata)
            # Chunks of 10,000 timesteps: about 5 MB of observations.
            vault = vault or make_vault(folder, experience, 10_000, {"recording": metadata})
            state = TrajectoryBufferState(experience=experience, current_index=0, is_full=False)
            interval = (0, experience["actions"].shape[1])
            disk.submit(vault.write, state, source_interval=interval).result()
    return path


# ---- RESULTS: metrics and pictures ---------------------------------------------------------------
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
    seed, scenario = f"seed_{config.system.seed}", config.env.scenario
    metrics = {task.marl_eval_name: {scenario: {"ff_ippo": {seed: metrics}}}}
    write_file(own_path(config.vault) / "metrics.json", json.dumps(metrics).encode())


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
        axes.set(title=name.replace("_", " ").capitalize(), xlabel="Environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def plot_dataset(name: str, uid: str, rel_dir: str = "vaults") -> Figure:
    """What is in a vault: returns, lengths and actions, in each third of the training."""
    stores, num_timesteps, metadata = open_recording(name, uid, rel_dir)
    num_steps, num_actions = num_timesteps * stores["done"].shape[0], metadata["num_actions"]
    episodes, actions = [], np.zeros((3, num_actions), np.int64)
    for window in iterate_episodes(name, uid, rel_dir, leaves=("action",)):
        third = 3 * window.start_step // num_steps  # of the training, in which an episode began
        for part in range(3):
            chosen = window.transitions["action"][np.repeat(third == part, window.length)]
            actions[part] += np.bincount(chosen.ravel(), minlength=num_actions)
        episodes.append((window.episode_return, window.length, third))
    returns, length, third = map(np.concatenate, zip(*episodes, strict=True))
    low, high = float(returns.min(initial=0)), float(returns.max(initial=0))
    if (returns == returns.round()).all():  # a whole number in the middle of each bar
        low, high = low - 0.5, low - 0.5 + 12 * math.ceil((high - low + 1) / 12)
    figure = Figure(figsize=(8.5, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[4, 4, 5])
    colors = ("#A6CEE3", "#4292C6", "#08306B")  # their lightness tells them apart
    parts = {name: third == part for part, name in enumerate(("first", "second", "last"))}
    labels = [f"{name} third of training: {x.sum():,} episodes" for name, x in parts.items()]
    values = [[x[part] for part in parts.values()] for x in (returns, length)]
    shares = [[np.full(x.size, 100 / max(1, x.size)) for x in value] for value in values]
    values.append([np.arange(num_actions)] * 3)
    shares.append([100 * x / max(1, x.sum()) for x in actions])
    bins = np.linspace(low, high, 13), np.linspace(0, length.max(initial=1), 11)
    bins = *bins, np.arange(num_actions + 1) - 0.5
    for axes, value, share, edges in zip(panels, values, shares, bins, strict=True):
        axes.hist(value, edges, weights=share, color=colors, label=labels)
    panels[0].set(xlabel="Episode return", ylabel="Share of episodes (%)")
    panels[1].set(xlabel="Episode length (timesteps)", ylabel="Share of episodes (%)")
    panels[2].set(xlabel="Action of an agent", ylabel="Share of actions (%)")
    names = [str(x).replace(" ", "\n") for x in metadata["task"]["actions"] or range(num_actions)]
    panels[2].set_xticks(range(len(names)), names, fontsize="small")
    entries = panels[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=3, fontsize="small")
    return figure


# ---- RUN -----------------------------------------------------------------------------------------
def check_environment(env: Environment) -> None:
    """Raise a `ConfigError` if your own environment is wrong; 16 copies of it act at random."""
    name, limit, key = type(env).__name__, getattr(env, "time_limit", None), jax.random.PRNGKey(0)
    require(not isinstance(env, type), f"{env} is a class: give an instance of it")
    is_count = isinstance(limit, int | np.integer) and limit > 0
    require(is_count, f"time_limit of {name} is {limit!r}: it must be an int, of timesteps")

    def trace(function: str, *arguments: Any) -> tuple[State, TimeStep]:
        pair = jax.eval_shape(getattr(env, function), *arguments)
        fits = isinstance(pair, tuple) and [isinstance(x, TimeStep) for x in pair] == [False, True]
        require(fits, f"{function} of {name} must return (state, TimeStep), as Jumanji's does")
        return pair

    state, first = trace("reset", key)
    require(hasattr(state, "key"), f"the state of {name} has no key to begin the next episode with")
    parts = [getattr(first.observation, part, None) for part in Observation._fields]
    view, mask, global_state = map(np.shape, parts)  # that of None is ()
    require(len(view) == 2, f"the observation of {name} has no agents_view of shape (N, O)")
    num_values = np.shape(getattr(getattr(env, "action_spec", None), "num_values", [[]]))
    fits = mask[:-1] == view[:1] if mask else num_values in ((), view[:1])
    lacks = "no action_mask (N, A) in its observation, nor an action_spec of discrete actions"
    require(fits, f"{name} has {lacks}, with num_values () or (N,)")
    fits = parts[2] is None or len(global_state) == 1
    require(fits, f"the global_state of {name} is not of shape (S,)")
    next_state, second = trace("step", state, jnp.zeros(view[0], jnp.int32))
    own = {(), view[:1]}  # of all agents, or of each
    for part, fitting in {"step_type": {()}, "reward": own, "discount": own}.items():
        shapes = {getattr(getattr(x, part), "shape", None) for x in (first, second)}
        require(shapes <= fitting, f"{part} of {name} has the shapes {shapes}, not {fitting}")
    form = lambda x: f"{x.dtype}{x.shape}"
    before = jax.tree.map(form, {"state": state, "observation": first.observation})
    after = jax.tree.map(form, {"state": next_state, "observation": second.observation})
    before, after = (dict(jax.tree.leaves_with_path(tree)) for tree in (before, after))
    for path in before | after:
        x, y, part = before.get(path), after.get(path), jax.tree_util.keystr(path[1:])
        require(x == y, f"{path[0].key}{part} of {name} is {x} after reset, but {y} after step")

    @jax.jit
    def play(key: PRNGKey) -> tuple:
        agents, uniform = AgentWrapper(env, False), lambda _, x: jnp.where(x.action_mask, 0.0, -1e9)
        actor = TrainState.create(apply_fn=uniform, params={}, tx=optax.identity())
        begin = reset_environments(agents, jax.random.split(key, 16))
        (_, end), played = rollout(agents, actor, key[None], begin, limit)
        has_action = played.observation.action_mask.any(axis=-1).all(axis=(0, 1))
        is_cut_off = select_leaves(played, ("truncation",))["truncation"][..., 0]
        is_finite = [jnp.isfinite(x).all() for x in (played.observation.agents_view, played.reward)]
        first = (raw(begin.state.key), raw(end.state.key)), begin.observation.agents_view
        return *first, has_action, is_finite, is_cut_off, *played.metrics[1:]

    keys, views, has_action, is_finite, is_cut_off, length, done = jax.device_get(play(key))
    num_keys = min(len(np.unique(x, axis=0)) for x in keys)
    require(num_keys == 16, f"16 states of {name} that began with 16 keys have {num_keys} keys")
    require(all(is_finite), f"agents_view or reward of {name} is not finite")
    if (count := len(np.unique(views, axis=0))) < 16 and jax.process_index() == 0:
        print(f"16 resets of {name} with 16 keys began with {count} different observations")
    require(has_action.all(), f"agent {has_action.argmin()} of {name} has no legal action")
    problem = f"an episode of {name} has not ended at its time_limit, {limit}"
    require((done | (length < limit)).all(), problem)
    problem = f"an episode of {name} ended before its time_limit, {limit}, with a discount not 0"
    require((~is_cut_off | (length == limit)).all(), f"{problem}: at a terminal state it must be 0")


def check_config(config: Config, num_devices: int, env: Environment | None = None) -> Config:
    """The configuration with nothing left open; a `ConfigError` before anything is created."""

    def check(name: str, fits: bool, must: str) -> None:
        group, field = name.split(".")
        require(fits, f"{name} is {getattr(getattr(config, group), field)!r}: it must {must}")

    for group, settings in vars(config).items():
        for field in dataclasses.fields(settings):
            name, value, kind = f"{group}.{field.name}", getattr(settings, field.name), field.type
            kind = {float: float | int}.get(kind, tuple if get_origin(kind) is tuple else kind)
            check(name, isinstance(value, kind), f"be {getattr(kind, '__name__', kind)}")
            numbers = [x for x in (value if kind is tuple else [value]) if type(x) in (int, float)]
            least = 0 if field.type is float or field.name in ("seed", "process_id") else 1
            most = {"seed": 2**32 - 1, "gamma": 1, "gae_lambda": 1}.get(field.name, math.inf)
            check(name, all(least <= x <= most for x in numbers), f"be from {least} to {most}")

    system, arch, vault, resume = config.system, config.arch, config.vault, config.checkpoint.resume
    transitions = system.rollout_length * arch.num_envs
    must = f"divide system.rollout_length * arch.num_envs, {transitions}"
    check("system.num_minibatches", transitions % system.num_minibatches == 0, must)
    must = f"be a multiple of the number of devices, {num_devices}"
    check("arch.num_eval_episodes", arch.num_eval_episodes % num_devices == 0, must)
    updates, evaluations = system.num_updates, arch.num_evaluation
    if system.total_timesteps is not None:
        steps = num_devices * system.update_batch_size * transitions * evaluations
        updates = math.ceil(system.total_timesteps / steps) * evaluations
    say = f"set that to {math.gcd(updates, evaluations)}, say"
    must = f"be a multiple of arch.num_evaluation, {evaluations}: {say}"
    check("system.num_updates", updates % evaluations == 0, must)
    known = set(vault.extra_leaves) <= set(EXTRA_LEAVES)
    check("vault.extra_leaves", known, f"have some of {', '.join(EXTRA_LEAVES)}")
    is_set_up = jax.distributed.is_initialized() or not arch.distributed
    check("arch.distributed", is_set_up, "come after jax.distributed.initialize")
    has_uid = vault.uid is not None or not (resume or arch.distributed)
    check("vault.uid", has_uid, "be given with checkpoint.resume and arch.distributed")
    if env is not None:
        check_environment(env)
    task = find_task(config.env, env)
    vault = dataclasses.replace(
        vault,
        name=vault.name or f"ff_ippo_{task.og_marl_name}",
        uid=vault.uid or f"{datetime.datetime.now():%Y%m%d%H%M%S}-{secrets.token_hex(4)}",
        extra_leaves=tuple(dict.fromkeys((*task.extra_leaves, *vault.extra_leaves))),
    )
    path, count = run_path(vault.name, vault.uid, vault.rel_dir), jax.process_count()
    others = find_parts(path) - set(part_paths(path, count))
    require(not others, f"{path} is of another number of processes than {count}")
    is_taken = gather(np.array([own_path(vault).exists()])).any() and not resume
    remedy = "choose another vault.uid, or go on by checkpoint.resume"
    require(not is_taken, f"{own_path(vault)} exists already: {remedy}")
    system = dataclasses.replace(system, num_updates=updates)
    env_config = EnvConfig(task.scenario, config.env.time_limit or task.time_limit)
    config = dataclasses.replace(config, system=system, env=env_config, vault=vault)

    # All processes learn of it if one of them was given something else.
    first = jax.eval_shape(make_env(env_config, False, env).reset, jax.random.PRNGKey(0))
    arch = dataclasses.replace(arch, process_id=None, coordinator_address=None)
    given = fixed_settings(config), system, arch, vault.uid, vault.save_interval, resume
    digests = gather(np.uint32([zlib.crc32(repr((given, jax.tree.leaves(first))).encode())]))
    differ = "the processes were given different settings or environments: give all the same"
    require(len(set(digests.tolist())) == 1, differ)
    return config


class Recorder:
    """What a process keeps on disk: vault, checkpoints and metrics, in a folder of its own."""

    def __init__(self, config: Config, task: Task, experience: dict[str, Any], mesh: Mesh):
        """For leaves (D, NU, UB, T, NE, ...), of which it keeps those of its own devices."""
        self.config, self.task, self.mesh, self.path = config, task, mesh, own_path(config.vault)
        own = lambda x: jax.ShapeDtypeStruct((jax.local_device_count(), *x.shape[1:]), x.dtype)
        experience = jax.tree.map(own, experience)
        mask = experience["legal_action_mask"]
        num_devices, num_updates, *_, num_agents, num_actions = mask.shape
        packages = ("jax", "jaxlib", "flashbax", "flax", "optax", "distrax", "jumanji", "chex")
        self.metadata = {
            **dataclasses.asdict(config),
            "task": {"og_marl_name": task.og_marl_name, "actions": task.actions},
            **{"num_agents": num_agents, "num_actions": num_actions},
            **{"num_devices": num_devices, "num_updates_per_eval": num_updates},
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        self.rows = jax.eval_shape(reshape_experience, experience)
        num_rows, self.rollout_length = self.rows["done"].shape[:2]
        most = 2**30 // sum(x.size * x.dtype.itemsize for x in self.rows.values())  # in 1 GB
        self.save_interval = max(1, min(config.vault.save_interval, most))
        self.num_new = self.num_written = 0  # evaluations
        if config.vault.save:
            buffer = make_buffer(num_rows, max(2, self.save_interval * self.rollout_length))
            transition = jax.tree.map(lambda x: np.zeros(x.shape[2:], x.dtype), self.rows)
            # On the host, it takes none of an accelerator's memory.
            host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            self.buffer_state = jax.jit(buffer.init, out_shardings=host)(transition)
            add = lambda state, new: buffer.add(state, reshape_experience(new))
            self.add = jax.jit(add, donate_argnums=0)  # in place: there is no second buffer

    @contextlib.contextmanager
    def open(self, progress: Progress) -> Iterator[Progress]:
        """Begin in a new folder, or go on from the checkpoint in the one that is there."""
        vault = self.config.vault
        if not self.path.exists():
            with whole_folder(self.path) as folder:
                if vault.save:
                    make_vault(folder, self.rows, self.rollout_length, self.metadata)
                folder.mkdir(exist_ok=True)
                save_checkpoint(folder, self.config, progress, self.mesh)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another process is recording into {self.path}") from error
            # Of several processes that were killed, one may have a checkpoint more than another.
            files = find_checkpoints(self.path)
            self.num_written = int(gather(np.array([max(files)])).min())
            for newer in set(files) - set(range(self.num_written + 1)):
                files[newer].unlink()
            self.progress = load_checkpoint(files[self.num_written], self.config, progress)
            if vault.save:
                # TensorStore's next write would go into such a file of a process that was killed,
                # without truncating it, and make the vault unreadable.
                for stale in self.path.rglob("*.__lock"):
                    stale.unlink()
                self.vault, _ = open_vault(vault.name, self.path.name, vault.rel_dir)
            yield self.progress

    def store(self, experience: dict[str, Array], progress: Progress) -> None:
        """Add what led to `progress` to the buffer, and write what is new if that is due."""
        if self.config.vault.save:
            own_part = multihost_utils.global_array_to_host_local_array
            experience = jax.device_get(own_part(experience, self.mesh, SHARDED))
            index = self.num_new * self.rollout_length  # from the beginning, once written
            self.buffer_state = self.add(self.buffer_state.replace(current_index=index), experience)
        self.num_new, self.progress = self.num_new + 1, progress
        if (len(progress.evaluations) - 1) % self.save_interval == 0:
            self.write()

    def write(self) -> None:
        """Write what is new, the vault first: no checkpoint knows of more than it holds."""
        num_done, length = len(self.progress.evaluations), self.num_new * self.rollout_length
        if self.num_new == 0:
            return
        if self.config.vault.save:
            # Neither after what failed, nor after what a run that was killed had written too much.
            self.vault.vault_index = num_done * self.rollout_length - length
            self.vault.write(self.buffer_state, source_interval=(0, length))
        save_checkpoint(self.path, self.config, self.progress, self.mesh)
        write_metrics(self.config, self.task, self.progress.evaluations)
        self.num_new, self.num_written = 0, num_done


class ExperimentResult(NamedTuple):
    """What `run_experiment` returns."""

    config: Config  # of the run, with nothing left open
    path: Path  # folder of the run: vault, checkpoint, metrics and pictures
    num_timesteps: int  # environment steps recorded, by all processes
    evaluations: list[Evaluation]  # in the order of training
    params: Params  # of the evaluation with the highest mean return
    absolute_metric: float | None  # mean return of `params` over more episodes, if asked for


def save_results(result: ExperimentResult, task: Task) -> None:
    """Write the metrics and draw the pictures of a finished run."""
    vault, path = result.config.vault, result.path
    write_metrics(result.config, task, result.evaluations, result.absolute_metric)
    plot_learning_curve(result.evaluations).savefig(path / "learning_curve.png")
    if vault.save:
        try:
            plot_dataset(vault.name, vault.uid, vault.rel_dir).savefig(path / "dataset.png")
        except ConfigError as error:  # of several processes, each with a disk of its own
            print(f"dataset.png is not drawn: {error}")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    print(f"recorded: {result.num_timesteps:,} steps, with all else {size:,.1f} MB, in {path}")


@jax.numpy_dtype_promotion("standard")  # Optax and Jumanji do not work with "strict"
def run_experiment(
    config: Config = Config(), env: Environment | None = None, stop: threading.Event | None = None
) -> ExperimentResult:
    """Train, evaluate and record; `env` is your own environment, and `stop` ends the run early.

    Raises a `ConfigError` before anything is recorded, and a FloatingPointError where it diverges.
    """
    mesh, is_first = Mesh(np.array(jax.devices()), ("device",)), jax.process_index() == 0
    config, stop = check_config(config, mesh.size, env), stop or threading.Event()
    system, arch, vault, task = config.system, config.arch, config.vault, find_task(config.env, env)
    env = make_env(config.env, system.add_agent_id, env)
    log = functools.partial(tqdm.write, file=sys.stdout if is_first else io.StringIO())

    # INITIALISE
    num_updates = system.num_updates // arch.num_evaluation  # NU
    learn = make_learn(env, system, num_updates, mesh, vault.extra_leaves)
    evaluate = make_evaluate(env, arch.num_eval_episodes, arch.evaluation_greedy, mesh)
    progress = init_progress(config, env, mesh)
    experience = jax.eval_shape(learn, progress.state).experience
    num_steps = math.prod(experience["done"].shape[:5])  # environment steps in an evaluation
    recorder = Recorder(config, task, experience, mesh)

    # BEGIN in a new folder, or RESUME
    with recorder.open(progress) as progress, ThreadPoolExecutor(1) as disk:
        run = f"{config.env.scenario}, seed {system.seed}, {mesh.size} {jax.default_backend()}"
        log(f"{run}: {arch.num_evaluation * num_steps:,} steps, in {recorder.path}")
        num_done, stopped, stored = len(progress.evaluations), False, disk.submit(int)
        is_hidden = not is_first or not (sys.stdout.isatty() or "ipykernel" in sys.modules)
        bar = tqdm(total=arch.num_evaluation, initial=num_done, file=sys.stdout, disable=is_hidden)
        try:
            for index in range(num_done, arch.num_evaluation):
                # TRAIN
                start = time.perf_counter()
                output = jax.block_until_ready(learn(progress.state))
                speed = num_steps / (time.perf_counter() - start)
                if not (finite := jax.device_get(output.finite)).all():
                    step = (index + (finite.argmin() + 1) / num_updates) * num_steps
                    remedy = "lower system.actor_lr and system.critic_lr"
                    raise FloatingPointError(f"a loss is not finite at step {step:,.0f}: {remedy}")

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
                progress = progress.add(output.state, eval_key, evaluation)

                # RECORD it, beside the next one's training
                stored.result()  # raises what failed
                stored = disk.submit(recorder.store, output.experience, progress)
                del output  # so that its experience is not held while the next is made

                # LOG
                log(f"{evaluation}, saved to {recorder.num_written * num_steps:,}")
                bar.update()
                if stopped := bool(stops.any()):
                    break
        finally:  # whatever ended the run, what was logged is written
            bar.close()
            for future in (stored, disk.submit(recorder.write)):
                future.result()
            if stopped or isinstance(sys.exception(), KeyboardInterrupt):  # of a notebook
                done = f"{len(progress.evaluations)} of {arch.num_evaluation} evaluations"
                flags = f"--checkpoint.resume --vault.uid {vault.uid}"
                log(f"stopped after {done}: to go on, run the same with {flags}")

    # ABSOLUTE METRIC of the best parameters, PICTURES
    absolute_metric = None
    if arch.absolute_metric and not stopped:
        actor = progress.state.actor.replace(params=progress.best_params.actor)
        _, evaluated = evaluate(actor, progress.eval_key, arch.num_absolute_metric_eval_episodes)
        absolute_metric = float(evaluated.episode_return.mean())
        log(f"absolute metric: {absolute_metric:.2f} (mean episode return)")
    multihost_utils.sync_global_devices("recorded")
    num_timesteps = vault.save * len(progress.evaluations) * num_steps
    recorded, params = (recorder.path, num_timesteps), jax.device_get(progress.best_params)
    result = ExperimentResult(config, *recorded, progress.evaluations, params, absolute_metric)
    if is_first and not stopped:
        save_results(result, task)
    return result


# ---- COMMAND LINE --------------------------------------------------------------------------------
def main(env: Environment | None = None) -> None:
    """The command line: every field of `Config` is a flag, such as --system.num-updates 10."""
    config, stop, caught = tyro.cli(Config), threading.Event(), []

    def catch(number, _):
        caught.append(number)
        stop.set()
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the process at once

    handlers = {each: signal.signal(each, catch) for each in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows how far it is
    try:
        result = run_experiment(config, env, stop)
        if len(result.evaluations) == config.arch.num_evaluation and not caught:
            return
        sys.exit(128 + (*caught, signal.SIGTERM)[0])  # of several processes, another caught it
    except (ValueError, FloatingPointError, OSError) as error:
        problem, is_full = str(error).partition("\n")[0], "No space left" in str(error)
        if type(error) is ValueError and not is_full:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    sys.exit(f"error: {problem}{': make room, then use checkpoint.resume' if is_full else ''}")


if __name__ == "__main__" and "__file__" in globals():  # not pasted into a notebook
    main()
