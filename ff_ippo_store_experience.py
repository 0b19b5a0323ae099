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
#     "tyro>=0.9.0,<2",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Train independent PPO on RobotWarehouse and record every transition into a Flashbax Vault.

    python ff_ippo_store_experience.py --system.num-updates 10 --arch.num-evaluation 2

or, from Python, `run_experiment(Config())`.  The system is Mava's Anakin IPPO
(https://github.com/instadeepai/Mava); the file reads in the order in which data flows.

Shapes are given in these letters, on every array and in every docstring:

    D   devices                          N   agents
    NU  updates per evaluation           O   features of one agent's observation
    UB  update batch size (lanes)        A   actions
    T   timesteps per rollout            B   any batch of environments, within a device UB * NE
    NE  environments per lane
"""

import builtins
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import io
import json
import math
import operator
import os
import sys
import tempfile
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Union
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
from flashbax.buffers.trajectory_buffer import TrajectoryBuffer, TrajectoryBufferState
from flashbax.vault import Vault
from flashbax.vault.vault import TIME_AXIS_MAX_LENGTH
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tqdm import tqdm

# Imported in a notebook, Jumanji chooses a backend of matplotlib that may not be installed.
with mock.patch.object(builtins, "__IPYTHON__", False, create=True):
    from jumanji.env import Environment, State
    from jumanji.environments import RobotWarehouse
    from jumanji.environments.routing.robot_warehouse.constants import _SHELVES
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator
    from jumanji.environments.routing.robot_warehouse.types import Action
    from jumanji.environments.routing.robot_warehouse.viewer import RobotWarehouseViewer
    from jumanji.types import TimeStep
    from jumanji.wrappers import Wrapper

# ------------------------------------------------------------------------------------------------
# CONFIGURATION
# ------------------------------------------------------------------------------------------------

SCENARIOS = {
    "tiny-2ag": {"shelf_rows": 1, "num_agents": 2, "request_queue_size": 2},
    "tiny-4ag": {"shelf_rows": 1, "num_agents": 4, "request_queue_size": 4},
    "tiny-4ag-easy": {"shelf_rows": 1, "num_agents": 4, "request_queue_size": 8},
    "small-4ag": {"shelf_rows": 2, "num_agents": 4, "request_queue_size": 4},
}


@dataclass(frozen=True)
class SystemConfig:
    """Independent PPO, with Mava's defaults."""

    total_timesteps: Optional[int] = None
    """Environment steps in all. If set, it decides num_updates. At least 1."""
    num_updates: int = 1000
    """PPO updates in all. A multiple of arch.num_evaluation."""
    seed: int = 42
    """Seed of every random number. 0 to 2**32 - 1."""
    add_agent_id: bool = True
    """Put a one-hot of the agent's index in front of its observation."""
    actor_lr: float = 2.5e-4
    """Adam's learning rate for the actor. Above 0."""
    critic_lr: float = 2.5e-4
    """Adam's learning rate for the critic. Above 0."""
    update_batch_size: int = 2
    """Lanes on each device whose gradients are averaged (UB). At least 1."""
    rollout_length: int = 128
    """Timesteps of each environment between updates (T). At least 1."""
    ppo_epochs: int = 4
    """Passes over the transitions of a rollout. At least 1."""
    num_minibatches: int = 2
    """Minibatches in each pass. A divisor of rollout_length * arch.num_envs."""
    gamma: float = 0.99
    """Discount per timestep. 0 to 1."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate. 0 to 1."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio and of the value. Above 0."""
    ent_coef: float = 0.01
    """Entropy coefficient. At least 0."""
    vf_coef: float = 0.5
    """Value loss coefficient. At least 0."""
    max_grad_norm: float = 0.5
    """Global norm to which gradients are clipped. Above 0."""


@dataclass(frozen=True)
class ArchConfig:
    """Anakin: how much runs side by side, and how often it is evaluated."""

    num_envs: int = 16
    """Environments in each lane (NE). At least 1."""
    num_evaluation: int = 200
    """Evaluations, evenly spaced over training. At least 1."""
    num_eval_episodes: int = 32
    """Episodes in each evaluation. A multiple of the number of devices."""
    num_absolute_metric_eval_episodes: int = 320
    """Episodes for the absolute metric. At least 1."""
    absolute_metric: bool = True
    """Evaluate the best parameters once more at the end."""
    evaluation_greedy: bool = False
    """Evaluate the most probable action instead of a sampled one."""


@dataclass(frozen=True)
class EnvConfig:
    """Jumanji's RobotWarehouse."""

    scenario: str = "tiny-2ag"
    """One of tiny-2ag, tiny-4ag, tiny-4ag-easy, small-4ag."""
    time_limit: int = 500
    """Timesteps after which an episode is cut off. At least 1."""


@dataclass(frozen=True)
class NetworkConfig:
    """Torsos of the actor and the critic."""

    actor_layer_sizes: tuple[int, ...] = (128, 128)
    """Units of each ReLU layer of the actor. Each at least 1."""
    critic_layer_sizes: tuple[int, ...] = (128, 128)
    """Units of each ReLU layer of the critic. Each at least 1."""


@dataclass(frozen=True)
class VaultConfig:
    """Where and how the experience is recorded: REL_DIR/NAME/UID."""

    save: bool = True
    """Record the experience."""
    name: str = "ff_ippo_rware"
    """Name of the vault."""
    uid: Optional[str] = None
    """Identifier of this recording, one that does not exist yet; by default the date and time."""
    rel_dir: str = "vaults"
    """Folder of all vaults, from the working directory."""
    save_interval: int = 5
    """Evaluations between writes to disk. At least 1."""
    max_length: int = 500_000
    """Transitions that the buffer holds. At least save_interval + 1 rollouts of each row."""
    compression: Optional[dict[str, Union[int, str]]] = None
    """Compression as Flashbax takes it, such as id gzip level 5; by default zstd at level 1."""
    extra_leaves: tuple[str, ...] = ()
    """Recorded too: any of next_observation, log_prob, value, discount, step_count."""
    og_marl: bool = False
    """Also export the recording in OG-MARL's layout, to REL_DIR/NAME_UID/rware."""


@dataclass(frozen=True)
class ResultsConfig:
    """Metrics and pictures of the run: REL_DIR/NAME/UID, with the vault's name and uid."""

    save: bool = True
    """Save the metrics and, at the end, pictures of them and of the vault."""
    rel_dir: str = "results"
    """Folder of all results, from the working directory; not that of the vaults."""
    animation: bool = False
    """Save an animation too, of one episode of the best parameters: 40 ms a timestep."""


@dataclass(frozen=True)
class Config:
    """Train independent PPO on RobotWarehouse and record the experience into a Flashbax Vault."""

    system: SystemConfig = field(default_factory=SystemConfig)
    arch: ArchConfig = field(default_factory=ArchConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    vault: VaultConfig = field(default_factory=VaultConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)


# ------------------------------------------------------------------------------------------------
# ENVIRONMENT
# ------------------------------------------------------------------------------------------------


def map_where(
    function: Callable[..., chex.ArrayTree],
    mask: chex.Array,
    default: chex.ArrayTree,
    *operands: chex.ArrayTree,
) -> chex.ArrayTree:
    """`function` of the rows where `mask` holds and `default` elsewhere, at the cost of those rows.

    Under `vmap` a `lax.cond` becomes a select: both branches run for every row.  Here the few rows
    that need `function` are gathered, mapped and scattered back, a chunk at a time.

    Args:
        function: maps one row of `operands` to one row of a tree like `default`.
        mask: (B,) bool.
        default: tree of (B, ...).
        operands: trees of (B, ...).

    Returns:
        A tree like `default`, (B, ...).
    """
    size = mask.shape[0]
    chunk = min(size, max(8, size // 64))

    def map_chunk(carry: tuple[chex.Array, chex.ArrayTree]) -> tuple[chex.Array, chex.ArrayTree]:
        mask, result = carry
        (rows,) = jnp.nonzero(mask, size=chunk, fill_value=size)  # `size` is no row: dropped below
        mapped = jax.vmap(function)(*jax.tree.map(lambda x: x[rows], operands))
        result = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), result, mapped)
        return mask.at[rows].set(False, mode="drop"), result

    return jax.lax.while_loop(lambda carry: carry[0].any(), map_chunk, (mask, default))[1]


class Warehouse(RobotWarehouse):
    """Jumanji's RobotWarehouse, step for step, that draws a new request only where a shelf arrived.

    Deliveries are rare, yet under `vmap` Jumanji draws a request for every goal, environment and
    step: four fifths of its time.
    """

    def _update_reward_and_request_queue(
        self,
        key: chex.PRNGKey,
        reward: chex.Array,
        request_queue: chex.Array,
        grid: chex.Array,
        shelves: chex.ArrayTree,
        goal: chex.Array,
    ) -> tuple[chex.PRNGKey, chex.Array, chex.Array, chex.ArrayTree]:
        update = jax.custom_batching.custom_vmap(super()._update_reward_and_request_queue)

        @update.def_vmap
        def update_batch(size: int, in_batched: list[Any], *operands: Any) -> tuple[Any, Any]:
            operands = jax.tree.map(
                lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *jnp.shape(x))),
                operands,
                tuple(in_batched),
            )
            key, reward, request_queue, grid, shelves, goal = operands
            column, row = goal[:, 0], goal[:, 1]
            shelf_at_goal = grid[jnp.arange(size), _SHELVES, row, column]
            delivered = (request_queue + 1 == shelf_at_goal[:, None]).any(axis=1)
            default = (key, reward, request_queue, shelves)
            result = map_where(
                super(Warehouse, self)._update_reward_and_request_queue,
                delivered,
                default,
                *operands,
            )
            return result, jax.tree.map(lambda _: True, result)

        return update(key, reward, request_queue, grid, shelves, goal)


class Observation(NamedTuple):
    """What the agents see.

    Attributes:
        agents_view: (..., N, O) float32.
        action_mask: (..., N, A) bool, True where the action is legal.
        step_count: (..., N) int32, timesteps since the episode began.
    """

    agents_view: chex.Array
    action_mask: chex.Array
    step_count: chex.Array


class AgentWrapper(Wrapper):
    """Gives every agent its own observation, reward and discount, as Mava's systems expect them."""

    def __init__(self, env: Environment, add_agent_id: bool):
        super().__init__(env)
        self.add_agent_id = add_agent_id

    def reset(self, key: chex.PRNGKey) -> tuple[State, TimeStep]:
        """See `Environment.reset`; the timestep is that of `step`."""
        state, timestep = self._env.reset(key)
        return state, self._per_agent(timestep)

    def step(self, state: State, action: chex.Array) -> tuple[State, TimeStep]:
        """Step one environment with the joint action (N,) int32.

        Returns:
            The state, and a timestep of an `Observation` (N, .), reward and discount (N,) float32.
        """
        state, timestep = self._env.step(state, action)
        return state, self._per_agent(timestep)

    def _per_agent(self, timestep: TimeStep) -> TimeStep:
        agents_view = timestep.observation.agents_view.astype(jnp.float32)
        num_agents = agents_view.shape[0]
        if self.add_agent_id:
            agents_view = jnp.concatenate(
                [jnp.eye(num_agents, dtype=jnp.float32), agents_view], axis=1
            )
        return timestep.replace(
            observation=Observation(
                agents_view,
                timestep.observation.action_mask,
                jnp.repeat(timestep.observation.step_count, num_agents),
            ),
            reward=jnp.repeat(timestep.reward, num_agents),
            discount=jnp.repeat(timestep.discount, num_agents),
        )


def make_env(config: EnvConfig, add_agent_id: bool) -> Environment:
    """One RobotWarehouse, without auto-reset.

    Raises:
        KeyError: where `config.scenario` is not one of `SCENARIOS`.
    """
    generator = RandomGenerator(
        shelf_columns=3, column_height=8, sensor_range=1, **SCENARIOS[config.scenario]
    )
    return AgentWrapper(Warehouse(generator, time_limit=config.time_limit), add_agent_id)


def observation_shape(env: Environment) -> Observation:
    """Shapes and dtypes of one environment's observation, without leading axes."""
    return jax.eval_shape(env.reset, jax.random.PRNGKey(0))[1].observation


class EnvState(NamedTuple):
    """State of a batch of environments, and of the episodes under way in them.

    Attributes:
        state: Jumanji's state, tree of (B, ...).
        episode_return: (B,) float32, the agents' mean reward, summed over the episode so far.
        episode_length: (B,) int32, timesteps.
    """

    state: State
    episode_return: chex.Array
    episode_length: chex.Array


class EpisodeMetrics(NamedTuple):
    """Return and length (timesteps) of episodes, to be read only where `ended`.

    Attributes:
        episode_return: (...) float32.
        episode_length: (...) int32.
        ended: (...) bool, whether the step was the last of its episode.
    """

    episode_return: chex.Array
    episode_length: chex.Array
    ended: chex.Array


def reset_environments(env: Environment, keys: chex.PRNGKey) -> tuple[EnvState, TimeStep]:
    """Reset a batch of environments, one with each of the keys (B, 2)."""
    state, timestep = jax.vmap(lambda key: env.reset(jax.random.split(key)[1]))(keys)
    batch_size = keys.shape[0]
    return EnvState(
        state, jnp.zeros(batch_size, jnp.float32), jnp.zeros(batch_size, jnp.int32)
    ), timestep


def step_environments(
    env: Environment, env_state: EnvState, action: chex.Array
) -> tuple[EnvState, TimeStep, EpisodeMetrics]:
    """Step a batch of environments, and begin a new episode in those whose episode ended.

    Args:
        env: from `make_env`.
        env_state: of B environments.
        action: (B, N) int32.

    Returns:
        The new state; the timestep, (B, ...), whose observation is the new episode's first where
        one ended, whose reward, discount and step type are those of the step, and whose
        `extras["next_observation"]` is what the step led to; the episode metrics, (B,).
    """
    state, timestep = jax.vmap(env.step)(env_state.state, action)
    ended = timestep.last()
    episode_return = env_state.episode_return + timestep.reward.mean(axis=-1)
    episode_length = env_state.episode_length + 1

    def reset(key: chex.PRNGKey) -> tuple[State, Observation]:
        state, timestep = env.reset(jax.random.split(key)[0])
        return state, timestep.observation

    # Deciding under `vmap` would pay for a reset of every environment at every step.
    next_observation = timestep.observation
    state, observation = map_where(reset, ended, (state, next_observation), state.key)
    return (
        EnvState(state, jnp.where(ended, 0.0, episode_return), jnp.where(ended, 0, episode_length)),
        timestep.replace(observation=observation, extras={"next_observation": next_observation}),
        EpisodeMetrics(episode_return, episode_length, ended),
    )


# ------------------------------------------------------------------------------------------------
# NETWORKS
# ------------------------------------------------------------------------------------------------


class Torso(nn.Module):
    """ReLU layers with orthogonal weights of gain sqrt(2): (..., O) -> (..., layer_sizes[-1])."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        for size in self.layer_sizes:
            x = nn.relu(nn.Dense(size, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))(x))
        return x


class ActionHead(nn.Module):
    """Logits of the actions: (..., F) -> (..., A)."""

    num_actions: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        return nn.Dense(self.num_actions, kernel_init=nn.initializers.orthogonal(0.01))(x)


class Actor(nn.Module):
    """Policy that the agents share; each acts on its own observation alone."""

    num_actions: int
    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: Observation) -> chex.Array:
        """Logits (..., N, A) of an observation, float32's smallest value for illegal actions."""
        # One matrix product over all rows is 2.6 times as fast as one with several batch axes.
        x = observation.agents_view.reshape(-1, observation.agents_view.shape[-1])
        x = Torso(self.layer_sizes, name="torso")(x)
        logits = ActionHead(self.num_actions, name="action_head")(x).reshape(
            observation.action_mask.shape
        )
        return jnp.where(observation.action_mask, logits, jnp.finfo(jnp.float32).min)


class Critic(nn.Module):
    """Value of each agent's own observation."""

    layer_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: Observation) -> chex.Array:
        """Values (..., N) of an observation."""
        x = observation.agents_view.reshape(-1, observation.agents_view.shape[-1])
        x = Torso(self.layer_sizes, name="torso")(x)
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x).reshape(
            observation.agents_view.shape[:-1]
        )


class Params(NamedTuple):
    """Parameters of the two networks, or their optimisers' states."""

    actor: chex.ArrayTree
    critic: chex.ArrayTree


class Agent(NamedTuple):
    """The networks and the optimisers: what learns, without its parameters."""

    actor: Actor
    critic: Critic
    actor_optim: optax.GradientTransformation
    critic_optim: optax.GradientTransformation


def make_agent(config: Config, num_actions: int) -> Agent:
    """Networks and optimisers of `config`: Adam after clipping by the global norm."""

    def optimiser(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.system.max_grad_norm),
            optax.adam(learning_rate, eps=1e-5),
        )

    return Agent(
        Actor(num_actions, config.network.actor_layer_sizes),
        Critic(config.network.critic_layer_sizes),
        optimiser(config.system.actor_lr),
        optimiser(config.system.critic_lr),
    )


# ------------------------------------------------------------------------------------------------
# ROLLOUT
# ------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of a batch of environments.

    Attributes:
        done: (..., N) bool, whether the step ended the episode, for whatever reason.
        action: (..., N) int32.
        reward: (..., N) float32.
        discount: (..., N) float32, 0 where `done`, else 1.
        observation: of (..., N, .), what the action was chosen on.
        next_observation: of (..., N, .), what the step led to, also where it ended the episode.
        metrics: of (...).
        log_prob: (..., N) float32, of the action; None until `update` computes it.
        value: (..., N) float32, of the observation; None until `update` computes it.
    """

    done: chex.Array
    action: chex.Array
    reward: chex.Array
    discount: chex.Array
    observation: Observation
    next_observation: Observation
    metrics: EpisodeMetrics
    log_prob: Optional[chex.Array] = None
    value: Optional[chex.Array] = None


# What is recorded of a transition: the name of a leaf of the vault, and where it comes from.
LEAVES: dict[str, Callable[[Transition], chex.Array]] = {
    "done": lambda transition: transition.done,
    "action": lambda transition: transition.action,
    "reward": lambda transition: transition.reward,
    "observation": lambda transition: transition.observation.agents_view,
    "legal_action_mask": lambda transition: transition.observation.action_mask,
}
EXTRA_LEAVES: dict[str, Callable[[Transition], chex.Array]] = {
    "next_observation": lambda transition: transition.next_observation.agents_view,
    "log_prob": lambda transition: transition.log_prob,
    "value": lambda transition: transition.value,
    "discount": lambda transition: transition.discount,
    "step_count": lambda transition: transition.observation.step_count,
}


class RolloutState(NamedTuple):
    """Where a rollout left off, on one device.

    Attributes:
        keys: (UB, 2) uint32, one random key for each lane.
        env_state: of B = UB * NE environments, lane after lane.
        observation: of (B, N, .), what the next action is chosen on.
    """

    keys: chex.PRNGKey
    env_state: EnvState
    observation: Observation


def rollout(
    env: Environment,
    actor: Actor,
    actor_params: chex.ArrayTree,
    state: RolloutState,
    rollout_length: int,
) -> tuple[RolloutState, Transition]:
    """Act with the policy for T = `rollout_length` timesteps, as Anakin does (Hessel et al., 2021).

    Returns:
        Where it left off, and the transitions, (T, B, ...).
    """
    num_lanes = state.keys.shape[0]

    def step(state: RolloutState, _: None) -> tuple[RolloutState, Transition]:
        keys, env_state, observation = state
        keys, policy_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        logits = actor.apply(actor_params, observation)
        action = jax.vmap(lambda key, logits: distrax.Categorical(logits).sample(seed=key))(
            policy_keys, logits.reshape(num_lanes, -1, *logits.shape[1:])
        ).reshape(logits.shape[:-1])
        env_state, timestep, metrics = step_environments(env, env_state, action)
        done = jnp.broadcast_to(timestep.last()[:, None], action.shape)
        transition = Transition(
            done=done,
            action=action,
            reward=timestep.reward,
            discount=timestep.discount,
            observation=observation,
            next_observation=timestep.extras["next_observation"],
            metrics=metrics,
        )
        return RolloutState(keys, env_state, timestep.observation), transition

    return jax.lax.scan(step, state, None, rollout_length)


# ------------------------------------------------------------------------------------------------
# ADVANTAGE
# ------------------------------------------------------------------------------------------------


def calculate_advantage(
    reward: chex.Array,
    done: chex.Array,
    value: chex.Array,
    last_value: chex.Array,
    gamma: float,
    gae_lambda: float,
) -> tuple[chex.Array, chex.Array]:
    """Generalised advantage estimate (Schulman et al., 2016) and the values' targets.

    Args:
        reward: (T, ...) float32.
        done: (T, ...) bool, whether the step ended the episode: nothing is bootstrapped past it.
        value: (T, ...) float32, of the observation that the action was chosen on.
        last_value: (...) float32, of the observation after the last step.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        The advantages and the lambda-returns, both (T, ...) float32.
    """

    def backward(carry: tuple[chex.Array, chex.Array], step: tuple) -> tuple[tuple, chex.Array]:
        advantage, next_value = carry
        reward, done, value = step
        delta = reward + gamma * next_value * (1 - done) - value
        advantage = delta + gamma * gae_lambda * (1 - done) * advantage
        return (advantage, value), advantage

    carry = (jnp.zeros_like(last_value), last_value)
    _, advantage = jax.lax.scan(backward, carry, (reward, done, value), reverse=True, unroll=16)
    return advantage, advantage + value


# ------------------------------------------------------------------------------------------------
# LOSSES
# ------------------------------------------------------------------------------------------------


class Minibatch(NamedTuple):
    """What the losses see of M transitions; value and log-probability are from before the update.

    Attributes:
        observation: of (..., M, N, .).
        action: (..., M, N) int32.
        log_prob: (..., M, N) float32, of the action.
        value: (..., M, N) float32.
        advantage: (..., M, N) float32.
        target: (..., M, N) float32, lambda-returns.
    """

    observation: Observation
    action: chex.Array
    log_prob: chex.Array
    value: chex.Array
    advantage: chex.Array
    target: chex.Array


def actor_loss(
    actor_params: chex.ArrayTree, actor: Actor, batch: Minibatch, clip_eps: float, ent_coef: float
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """PPO's clipped objective (Schulman et al., 2017), less the entropy bonus.

    Args:
        actor_params: of `actor`.
        actor: the policy.
        batch: of (..., M, N, .), its advantages normalised.
        clip_eps: clip range of the probability ratio.
        ent_coef: entropy coefficient.

    Returns:
        The loss, and its two parts before the coefficient, each () float32.
    """
    policy = distrax.Categorical(actor.apply(actor_params, batch.observation))
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    clipped_ratio = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = -jnp.minimum(ratio * batch.advantage, clipped_ratio * batch.advantage).mean()
    entropy = policy.entropy().mean()
    return loss - ent_coef * entropy, {"actor_loss": loss, "entropy": entropy}


def critic_loss(
    critic_params: chex.ArrayTree, critic: Critic, batch: Minibatch, clip_eps: float, vf_coef: float
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Squared error of the value, or of the value clipped around the old one where that is larger.

    Args:
        critic_params: of `critic`.
        critic: the value network.
        batch: of (..., M, N, .).
        clip_eps: how far the value may move from the old one.
        vf_coef: value loss coefficient.

    Returns:
        The loss, and the value loss before the coefficient, each () float32.
    """
    value = critic.apply(critic_params, batch.observation)
    clipped_value = batch.value + (value - batch.value).clip(-clip_eps, clip_eps)
    squared_error = jnp.maximum(
        jnp.square(value - batch.target), jnp.square(clipped_value - batch.target)
    )
    loss = 0.5 * squared_error.mean()
    return vf_coef * loss, {"value_loss": loss}


# ------------------------------------------------------------------------------------------------
# UPDATE
# ------------------------------------------------------------------------------------------------


class LearnerState(NamedTuple):
    """Everything that training carries from one update to the next.

    Attributes:
        params: the same on every device.
        opt_states: the same on every device.
        rollout: of each device; outside `learn`, every leaf has a leading axis D.
    """

    params: Params
    opt_states: Params
    rollout: RolloutState


def shuffle(
    keys: chex.PRNGKey, num_epochs: int, num_transitions: int
) -> tuple[chex.PRNGKey, chex.Array]:
    """An order of the transitions for each epoch and lane.

    Args:
        keys: (UB, 2).
        num_epochs: E.
        num_transitions: T * NE, of one lane.

    Returns:
        New keys, and the permutations (E, UB, T * NE) int32.
    """

    def split(keys: chex.PRNGKey, _: None) -> tuple[chex.PRNGKey, chex.PRNGKey]:
        return tuple(jax.vmap(jax.random.split, out_axes=1)(keys))

    def permutation(key: chex.PRNGKey) -> chex.Array:
        return jax.random.permutation(key, num_transitions)

    keys, shuffle_keys = jax.lax.scan(split, keys, None, num_epochs)
    return keys, jax.vmap(jax.vmap(permutation))(shuffle_keys)


# On a CPU, the observations that pass through the networks at a time, so that what the layers put
# out stays in the cache: with 1024 environments an update is 1.3 times as fast.
CACHE_ROWS = 8192


def count_parts(length: int, num_rows: int) -> int:
    """Into how many equal parts to divide `length` items that hold `num_rows` observations."""
    if jax.default_backend() != "cpu":
        return 1  # an accelerator wants all rows at once
    return math.gcd(length, max(1, num_rows // CACHE_ROWS))


def update_minibatch(
    params: Params,
    opt_states: Params,
    batch: Minibatch,
    index: chex.Array,
    agent: Agent,
    config: SystemConfig,
) -> tuple[Params, Params, dict[str, chex.Array]]:
    """One step of both optimisers, along the gradient's mean over lanes and devices.

    Args:
        params: of the actor and the critic.
        opt_states: of their optimisers.
        batch: all transitions of the rollout, (T * UB * NE, N, ...).
        index: (UB, M) int32, the transitions of each lane's minibatch.
        agent: from `make_agent`.
        config: of the system.

    Returns:
        New parameters, new optimiser states, and the losses, each () float32.
    """
    advantage = batch.advantage[index]  # (UB, M, N), normalised over each lane's minibatch
    mean, std = (
        statistic(advantage, axis=(-2, -1), keepdims=True) for statistic in (jnp.mean, jnp.std)
    )
    advantage = (advantage - mean) / (std + 1e-8)

    # The lanes hold the same parameters, so the mean of their gradients is the gradient of their
    # mean loss: one copy of the parameters and one matrix product for all lanes.
    def calculate_gradients(part: tuple[chex.Array, chex.Array]) -> tuple:
        index, advantage = part
        minibatch = jax.tree.map(lambda x: x[index], batch)._replace(advantage=advantage)
        actor_grads, actor_losses = jax.grad(actor_loss, has_aux=True)(
            params.actor, agent.actor, minibatch, config.clip_eps, config.ent_coef
        )
        critic_grads, critic_losses = jax.grad(critic_loss, has_aux=True)(
            params.critic, agent.critic, minibatch, config.clip_eps, config.vf_coef
        )
        return actor_grads, critic_grads, {**actor_losses, **critic_losses}

    # (UB, M, ...) -> (parts, UB, M / parts, ...)
    num_parts = count_parts(index.shape[1], 2 * advantage.size)  # forward and backward
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0], num_parts, -1, *x.shape[2:]).swapaxes(0, 1),
        (index, advantage),
    )
    gradients = jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(calculate_gradients, parts))
    # One message for all arrays: two CPU devices learn 8 % faster than with one for each.  (Without
    # the barrier, one device is 2 % slower.)
    flat, unravel = ravel_pytree(jax.lax.optimization_barrier(gradients))
    actor_grads, critic_grads, losses = unravel(jax.lax.pmean(flat, axis_name="device"))
    actor_updates, actor_opt_state = agent.actor_optim.update(actor_grads, opt_states.actor)
    critic_updates, critic_opt_state = agent.critic_optim.update(critic_grads, opt_states.critic)
    params = Params(
        optax.apply_updates(params.actor, actor_updates),
        optax.apply_updates(params.critic, critic_updates),
    )
    return params, Params(actor_opt_state, critic_opt_state), losses


def update(
    state: LearnerState, env: Environment, agent: Agent, config: SystemConfig
) -> tuple[LearnerState, tuple[Transition, dict[str, chex.Array]]]:
    """One PPO update, on one device: a rollout, its advantages, and the epochs of minibatches.

    Independent PPO as in Mava: the agents share the networks, each on its own observation.

    Returns:
        The new state; the transitions, (T, UB * NE, ...), and the mean losses, each () float32.
    """
    # ROLLOUT
    rollout_state, transitions = rollout(
        env, agent.actor, state.params.actor, state.rollout, config.rollout_length
    )

    # ADVANTAGE.  Choosing an action needs neither its value nor its log-probability: here they are
    # computed for the whole rollout, many timesteps at once.
    def judge(part: tuple[Observation, chex.Array]) -> tuple[chex.Array, chex.Array]:
        observation, action = part
        policy = distrax.Categorical(agent.actor.apply(state.params.actor, observation))
        value = agent.critic.apply(state.params.critic, observation)
        return policy.log_prob(action), value

    # (T, ...) -> (parts, T / parts, ...) -> (T, ...)
    num_parts = count_parts(config.rollout_length, transitions.action.size)
    parts = jax.tree.map(
        lambda x: x.reshape(num_parts, -1, *x.shape[1:]),
        (transitions.observation, transitions.action),
    )
    log_prob, value = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(judge, parts))
    transitions = transitions._replace(log_prob=log_prob, value=value)
    last_value = agent.critic.apply(state.params.critic, rollout_state.observation)
    advantage, target = calculate_advantage(
        transitions.reward,
        transitions.done,
        transitions.value,
        last_value,
        config.gamma,
        config.gae_lambda,
    )
    batch = Minibatch(
        transitions.observation,
        transitions.action,
        transitions.log_prob,
        transitions.value,
        advantage,
        target,
    )

    # MINIBATCHES: each lane shuffles its own transitions, which it counts in the order of (T, NE).
    num_lanes = config.update_batch_size
    num_envs = advantage.shape[1] // num_lanes
    keys, order = shuffle(rollout_state.keys, config.ppo_epochs, config.rollout_length * num_envs)
    timestep, env_index = order // num_envs, order % num_envs  # (E, UB, T * NE)
    lane = jnp.arange(num_lanes)[:, None]
    order = (timestep * num_lanes + lane) * num_envs + env_index  # in (T, UB, NE)
    order = order.reshape(config.ppo_epochs, num_lanes, config.num_minibatches, -1)
    order = order.swapaxes(1, 2).reshape(-1, num_lanes, order.shape[-1])  # (minibatches, UB, M)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # (T * UB * NE, ...)

    # UPDATE
    def step(carry: tuple[Params, Params], index: chex.Array) -> tuple[tuple[Params, Params], dict]:
        params, opt_states, losses = update_minibatch(*carry, batch, index, agent, config)
        return (params, opt_states), losses

    (params, opt_states), losses = jax.lax.scan(step, (state.params, state.opt_states), order)
    state = LearnerState(params, opt_states, rollout_state._replace(keys=keys))
    return state, (transitions, jax.tree.map(jnp.mean, losses))


def init_learner(
    key: chex.PRNGKey,
    params_key: chex.PRNGKey,
    env: Environment,
    agent: Agent,
    config: Config,
    mesh: Mesh,
) -> LearnerState:
    """Initial parameters, optimiser states, environments and keys.

    Args:
        key: for the environments and the lanes.
        params_key: for the networks.
        env: from `make_env`.
        agent: from `make_agent`.
        config: of the run.
        mesh: of the D devices, with the axis "device".

    Returns:
        The state, in `rollout` with a leading axis D that is spread over the devices.
    """
    num_devices, num_lanes = mesh.size, config.system.update_batch_size
    num_envs = config.arch.num_envs
    observation = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), observation_shape(env))

    def init(key: chex.PRNGKey, params_key: chex.PRNGKey) -> LearnerState:
        actor_params = agent.actor.init(params_key, observation)
        critic_params = agent.critic.init(params_key, observation)
        actor_opt_state = agent.actor_optim.init(actor_params)
        critic_opt_state = agent.critic_optim.init(critic_params)
        key, *env_keys = jax.random.split(key, num_devices * num_lanes * num_envs + 1)
        key, *lane_keys = jax.random.split(key, num_devices * num_lanes + 1)
        env_state, timestep = reset_environments(env, jnp.stack(env_keys))
        rollout_state = RolloutState(jnp.stack(lane_keys), env_state, timestep.observation)
        return LearnerState(
            Params(actor_params, critic_params),
            Params(actor_opt_state, critic_opt_state),
            jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), rollout_state),
        )

    # Placed as `learn` places its outputs: otherwise its second call would compile it again.
    same, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("device",)))
    return jax.jit(init, out_shardings=LearnerState(same, same, spread))(key, params_key)


class LearnerOutput(NamedTuple):
    """What one call of `learn` returns.

    Attributes:
        state: for the next call.
        experience: from the name of a leaf to (D, NU, UB, T, NE, ...).
        metrics: of the training episodes, (D, NU, UB, T, NE).
        losses: (NU,) float32 each, mean over devices, lanes and minibatches.
    """

    state: LearnerState
    experience: dict[str, chex.Array]
    metrics: EpisodeMetrics
    losses: dict[str, chex.Array]


def make_learn(
    env: Environment,
    agent: Agent,
    config: SystemConfig,
    num_updates: int,
    mesh: Mesh,
    extra_leaves: tuple[str, ...] = (),
) -> Callable[[LearnerState], LearnerOutput]:
    """The learner, compiled at its first call.

    Args:
        env: from `make_env`.
        agent: from `make_agent`.
        config: of the system.
        num_updates: NU, on every device at each call.
        mesh: of the D devices, with the axis "device".
        extra_leaves: names in `EXTRA_LEAVES` that the experience is to have too.
    """
    leaves = {**LEAVES, **{name: EXTRA_LEAVES[name] for name in extra_leaves}}

    def split_lanes(x: chex.Array) -> chex.Array:  # (T, UB * NE, ...) -> (UB, T, NE, ...)
        return x.reshape(x.shape[0], config.update_batch_size, -1, *x.shape[2:]).swapaxes(0, 1)

    def step(state: LearnerState, _: None) -> tuple[LearnerState, tuple]:
        state, (transitions, losses) = update(state, env, agent, config)
        experience = {name: leaf(transitions) for name, leaf in leaves.items()}
        return state, (*jax.tree.map(split_lanes, (experience, transitions.metrics)), losses)

    def learn(state: LearnerState) -> LearnerOutput:
        state = state._replace(
            rollout=jax.tree.map(lambda x: x[0], state.rollout)
        )  # this device's part
        state, (experience, metrics, losses) = jax.lax.scan(step, state, None, num_updates)
        rollout_state, experience, metrics = jax.tree.map(
            lambda x: x[None], (state.rollout, experience, metrics)
        )
        return LearnerOutput(state._replace(rollout=rollout_state), experience, metrics, losses)

    same, spread = PartitionSpec(), PartitionSpec("device")
    state_spec = LearnerState(same, same, spread)
    output_spec = LearnerOutput(state_spec, spread, spread, same)
    return jax.jit(
        jax.shard_map(
            learn, mesh=mesh, in_specs=(state_spec,), out_specs=output_spec, check_vma=False
        )
    )


# ------------------------------------------------------------------------------------------------
# EVALUATION
# ------------------------------------------------------------------------------------------------


def evaluate(
    env: Environment,
    actor: Actor,
    actor_params: chex.ArrayTree,
    key: chex.PRNGKey,
    num_episodes: int,
    greedy: bool,
) -> EpisodeMetrics:
    """Play `num_episodes` whole episodes side by side, until the last has ended.

    How often, and the absolute metric, follow Gorsane et al. (2022).

    Args:
        env: from `make_env`.
        actor: the policy.
        actor_params: its parameters.
        key: (2,).
        num_episodes: E.
        greedy: take the most probable action, not a sampled one.

    Returns:
        Returns and lengths, (E,), all of them ended.
    """

    def step(carry: tuple) -> tuple:
        key, state, observation, metrics = carry
        key, policy_key = jax.random.split(key)
        policy = distrax.Categorical(actor.apply(actor_params, observation))
        action = policy.mode() if greedy else policy.sample(seed=policy_key)
        state, timestep = jax.vmap(env.step)(state, action)
        # An environment whose episode has ended is stepped on, but not counted.
        reward = jnp.where(metrics.ended, 0.0, timestep.reward.mean(axis=-1))
        metrics = EpisodeMetrics(
            metrics.episode_return + reward,
            metrics.episode_length + jnp.where(metrics.ended, 0, 1),
            metrics.ended | timestep.last(),
        )
        return key, state, timestep.observation, metrics

    key, reset_key = jax.random.split(key)
    state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    metrics = EpisodeMetrics(
        *(jnp.zeros(num_episodes, dtype) for dtype in (jnp.float32, jnp.int32, bool))
    )
    carry = (key, state, timestep.observation, metrics)
    return jax.lax.while_loop(lambda carry: ~carry[-1].ended.all(), step, carry)[-1]


def make_evaluate(
    env: Environment, actor: Actor, num_episodes: int, greedy: bool, mesh: Mesh
) -> Callable[[chex.ArrayTree, chex.PRNGKey], EpisodeMetrics]:
    """`evaluate` of parameters and keys (D, 2), with the episodes spread over the devices."""

    def evaluate_on_device(actor_params: chex.ArrayTree, keys: chex.PRNGKey) -> EpisodeMetrics:
        return evaluate(env, actor, actor_params, keys[0], num_episodes // mesh.size, greedy)

    same, spread = PartitionSpec(), PartitionSpec("device")
    return jax.jit(
        jax.shard_map(
            evaluate_on_device,
            mesh=mesh,
            in_specs=(same, spread),
            out_specs=spread,
            check_vma=False,
        )
    )


# ------------------------------------------------------------------------------------------------
# EXPERIENCE
# ------------------------------------------------------------------------------------------------


def reshape_experience(experience: dict[str, chex.Array]) -> dict[str, chex.Array]:
    """Rows of consecutive timesteps, as a buffer wants them.

    Args:
        experience: leaves (D, NU, UB, T, NE, ...), as the learner returns them.

    Returns:
        Leaves (D * NU * UB * NE, T, ...).
    """
    # (D, NU, UB, T, NE, ...) -> (D, NU, UB, NE, T, ...)
    experience = jax.tree.map(lambda x: x.swapaxes(3, 4), experience)
    # (D, NU, UB, NE, T, ...) -> (D * NU * UB * NE, T, ...)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[4:]), experience)


def make_buffer(max_length: int, add_batch_size: int) -> TrajectoryBuffer:
    """Flashbax's flat buffer of `max_length` transitions, in `add_batch_size` rows."""
    return fbx.make_flat_buffer(
        max_length=max_length,
        min_length=add_batch_size,
        sample_batch_size=1,
        add_sequences=True,
        add_batch_size=add_batch_size,
    )


def init_buffer(
    buffer: TrajectoryBuffer, experience: dict[str, chex.Array], mesh: Mesh
) -> TrajectoryBufferState:
    """An empty buffer for leaves (D, NU, UB, T, NE, ...), with its rows spread over the devices."""
    transition = jax.tree.map(lambda x: jnp.zeros(x.shape[5:], x.dtype), experience)
    same, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("device",)))
    shardings = TrajectoryBufferState(experience=spread, current_index=same, is_full=same)
    return jax.jit(buffer.init, out_shardings=shardings)(transition)


@functools.partial(jax.jit, static_argnames="length")
def read_buffer(
    buffer_state: TrajectoryBufferState, start: chex.Array, length: int
) -> dict[str, chex.Array]:
    """A copy of `length` timesteps from `start` on, none beyond the end of the time axis.

    Returns:
        Leaves (D * NU * UB * NE, length, ...).
    """
    # A slice of a default rollout takes 1 ms, indexing with an array of timesteps 36.
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis=1), buffer_state.experience
    )


# Elements in a chunk of the vault on disk, at most: 16 MB of float32.
MAX_CHUNK_SIZE = 2**22


class ChunkedVault(Vault):
    """Flashbax's Vault, stored in chunks of `chunk_length` timesteps.

    Otherwise TensorStore chooses the chunks, across rollouts: each write then decodes and encodes
    again some of what earlier ones wrote, which takes 1.5 times the processor time, and leaves 30 %
    more on disk.
    """

    def __init__(self, chunk_length: int, **kwargs: Any):
        self.chunk_length = chunk_length
        super().__init__(**kwargs)

    def _init_leaf(
        self, name: str, shape: tuple[int, ...], dtype: str, create_ds: bool = False
    ) -> tensorstore.TensorStore:
        if create_ds:
            row_size = self.chunk_length * math.prod(shape[2:])
            num_rows = min(shape[0], max(1, MAX_CHUNK_SIZE // row_size))
            tensorstore.open(
                {**self._get_base_spec(name), "metadata": {"compressor": self._compression}},
                shape=(shape[0], TIME_AXIS_MAX_LENGTH, *shape[2:]),
                dtype=dtype,
                create=True,
                chunk_layout=tensorstore.ChunkLayout(
                    write_chunk_shape=(num_rows, self.chunk_length, *shape[2:])
                ),
            ).result()
        return super()._init_leaf(name, shape, dtype)


def make_vault(
    config: VaultConfig,
    experience: dict[str, chex.Array],
    chunk_length: int,
    metadata: dict[str, Any],
) -> Vault:
    """Create the vault; by default with zstd, three times as fast as Flashbax's gzip, and smaller.

    Args:
        config: of the vault, whose `uid` is not None and does not exist yet.
        experience: the buffer's, leaves (D * NU * UB * NE, max_length, ...).
        chunk_length: timesteps in a chunk on disk; best a divisor of what each write brings.
        metadata: what is kept beside the data, in `metadata.json`.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # its advice on how often to write is followed
        return ChunkedVault(
            chunk_length,
            vault_name=config.name,
            experience_structure=experience,
            rel_dir=config.rel_dir,
            vault_uid=config.uid,
            compression=config.compression or {"id": "zstd", "level": 1},
            metadata=metadata,
        )


def write_vault(vault: Vault, experience: dict[str, chex.Array]) -> int:
    """Append leaves (D * NU * UB * NE, any, ...) to the vault.

    Returns:
        How many timesteps were written.
    """
    length = jax.tree.leaves(experience)[0].shape[1]
    state = TrajectoryBufferState(experience=experience, current_index=length, is_full=False)
    return vault.write(state, source_interval=(0, length))


class VaultError(RuntimeError):
    """The vault could not be written."""


def vault_path(config: VaultConfig) -> Path:
    """The folder of the vault: REL_DIR/NAME/UID."""
    return Path(os.path.abspath(config.rel_dir), config.name, config.uid)


class Recorder:
    """Gathers experience in a buffer, and writes what is new in it to a vault.

    It does so in a thread of its own, in order, beside the training that follows: nothing else
    touches the buffer.  (There, `Vault.write` can start the event loop that it needs also in a
    notebook, whose own is already running.)  Leaving the `with` block writes what is left.

    Attributes:
        path: of the vault's folder.
    """

    def __init__(self, config: VaultConfig, experience: Any, metadata: dict[str, Any], mesh: Mesh):
        """Create the buffer and the vault for leaves (D, NU, UB, T, NE, ...), arrays or shapes."""
        *axes, self.rollout_length, num_envs = jax.tree.leaves(experience)[0].shape[:5]
        self.num_rows = math.prod(axes) * num_envs
        # A whole number of rollouts, so that none lies around the end of the time axis.
        self.capacity = config.max_length // (self.num_rows * self.rollout_length)
        max_length = self.capacity * self.num_rows * self.rollout_length
        buffer = make_buffer(max_length, self.num_rows)
        self.buffer_state = init_buffer(buffer, experience, mesh)
        self.add_to_buffer = jax.jit(  # in place: the buffer is much larger than what is added
            lambda state, experience: buffer.add(state, reshape_experience(experience)),
            donate_argnums=0,
        )
        experience = self.buffer_state.experience
        self.vault = make_vault(config, experience, self.rollout_length, metadata)
        self.path = vault_path(config)
        # What is being written: to copy 60 MB takes 8 ms, but 70 into memory that is new each time.
        self.host_experience = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), experience)
        self.num_added = self.num_written = 0  # rollouts of every row
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.tasks: list[Future] = []

    @property
    def num_timesteps(self) -> int:
        """Environment steps that are in the vault, or on their way to it."""
        return self.num_written * self.num_rows * self.rollout_length

    def add(self, experience: dict[str, chex.Array]) -> None:
        """Begin to add leaves (D, NU, UB, T, NE, ...) to the buffer, when all before has ended.

        Raises:
            VaultError: where that failed.
        """
        self.wait()
        self.tasks.append(self.thread.submit(self._add, experience))
        self.num_added += 1

    def write(self) -> None:
        """Begin to write what was added since the last write."""
        if self.num_written < self.num_added:
            rollouts = range(self.num_written, self.num_added)
            self.tasks.append(self.thread.submit(self._write, rollouts, self.tasks[:]))
            self.num_written = self.num_added

    def wait(self) -> None:
        """Wait until all that was begun has ended.

        Raises:
            VaultError: where it failed.
        """
        tasks, self.tasks = self.tasks, []
        try:
            for task in tasks:
                task.result()
        except Exception as error:
            raise VaultError(f"writing to the vault at {self.path} failed: {error}") from error

    def _add(self, experience: dict[str, chex.Array]) -> None:
        self.buffer_state = self.add_to_buffer(self.buffer_state, experience)

    def _write(self, rollouts: range, tasks: list[Future]) -> None:
        for task in tasks:
            task.result()  # where adding failed, the buffer lacks what is to be written
        length = self.rollout_length
        for index, rollout in enumerate(rollouts):
            experience = read_buffer(self.buffer_state, rollout % self.capacity * length, length)
            jax.tree.map(
                lambda host, x: np.copyto(host[:, index * length : (index + 1) * length], x),
                self.host_experience,
                experience,
            )
        length *= len(rollouts)
        write_vault(self.vault, jax.tree.map(lambda x: x[:, :length], self.host_experience))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        try:
            if error_type is not VaultError:
                self.write()
                self.wait()
        finally:
            self.thread.shutdown()


# ------------------------------------------------------------------------------------------------
# RUN
# ------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that says what to change."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def check_config(config: Config, num_devices: int) -> Config:
    """The configuration with nothing left open: `num_updates` is decided, and the vault's `uid`.

    Raises:
        ConfigError: before anything is compiled or created.
    """
    system, arch, vault = config.system, config.arch, config.vault

    require(
        config.env.scenario in SCENARIOS,
        f"env.scenario {config.env.scenario!r} is unknown: choose one of {', '.join(SCENARIOS)}",
    )
    bounds = {
        "at least 1": (
            lambda value: value >= 1,
            ["system.update_batch_size", "system.rollout_length", "system.ppo_epochs"]
            + ["system.num_minibatches", "arch.num_envs", "arch.num_evaluation"]
            + ["arch.num_eval_episodes", "arch.num_absolute_metric_eval_episodes"]
            + ["env.time_limit", "vault.save_interval", "vault.max_length"]
            + [
                "system.num_updates" if system.total_timesteps is None else "system.total_timesteps"
            ],
        ),
        "above 0": (
            lambda value: value > 0,
            ["system.actor_lr", "system.critic_lr", "system.clip_eps", "system.max_grad_norm"],
        ),
        "at least 0": (lambda value: value >= 0, ["system.ent_coef", "system.vf_coef"]),
        "from 0 to 1": (lambda value: 0 <= value <= 1, ["system.gamma", "system.gae_lambda"]),
        "from 0 to 2**32 - 1": (lambda value: 0 <= value < 2**32, ["system.seed"]),
        "layers of at least 1 unit": (
            lambda sizes: all(size >= 1 for size in sizes),
            ["network.actor_layer_sizes", "network.critic_layer_sizes"],
        ),
        f"a multiple of the number of devices, {num_devices}": (
            lambda value: value % num_devices == 0,
            ["arch.num_eval_episodes"],
        ),
    }
    for bound, (holds, names) in bounds.items():
        for name in names:
            value = operator.attrgetter(name)(config)
            require(holds(value), f"{name} is {value}: it must be {bound}")

    transitions = system.rollout_length * arch.num_envs
    require(
        transitions % system.num_minibatches == 0,
        f"system.num_minibatches is {system.num_minibatches}: it must divide "
        f"system.rollout_length * arch.num_envs, {transitions}",
    )
    if system.total_timesteps is not None:
        steps_per_update = num_devices * system.update_batch_size * transitions
        updates = math.ceil(system.total_timesteps / (steps_per_update * arch.num_evaluation))
        system = dataclasses.replace(system, num_updates=updates * arch.num_evaluation)
    require(
        system.num_updates % arch.num_evaluation == 0,
        f"system.num_updates is {system.num_updates}: it must be a multiple of "
        f"arch.num_evaluation, {arch.num_evaluation}",
    )

    vault = dataclasses.replace(
        vault, uid=vault.uid or datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    )
    config = dataclasses.replace(config, system=system, vault=vault)
    if vault.save:
        check_vault_config(config, num_devices)
    if config.results.save:
        require(
            os.path.abspath(config.results.rel_dir) != os.path.abspath(vault.rel_dir),
            f"results.rel_dir {config.results.rel_dir!r} is that of the vaults: choose another",
        )
        check_writable("results.rel_dir", config.results.rel_dir)
    return config


def check_vault_config(config: Config, num_devices: int) -> None:
    """The part of `check_config` that matters only where experience is saved.

    Raises:
        ConfigError: where a write could lose data, or could not be made.
    """
    system, arch, vault = config.system, config.arch, config.vault
    updates = system.num_updates // arch.num_evaluation
    rows = num_devices * updates * system.update_batch_size * arch.num_envs
    timesteps = (vault.save_interval + 1) * system.rollout_length
    require(
        vault.max_length // rows >= timesteps,
        f"vault.max_length is {vault.max_length}: the buffer would wrap between writes and lose "
        f"data; it must be at least {rows * timesteps}, (vault.save_interval + 1) rollouts of "
        f"{system.rollout_length} timesteps in {rows} rows",
    )
    try:
        tensorstore.Spec({"driver": "zarr", "metadata": {"compressor": vault.compression}})
    except ValueError as error:
        reason = str(error).splitlines()[0].split('"compressor": ')[-1]
        raise ConfigError(f"vault.compression {vault.compression} is unknown: {reason}") from error

    for name in vault.extra_leaves:
        require(
            name in EXTRA_LEAVES,
            f"vault.extra_leaves {name!r} is unknown: choose from {', '.join(EXTRA_LEAVES)}",
        )
    path = vault_path(vault)
    require(not path.exists(), f"vault.uid {vault.uid!r} exists already, at {path}: choose another")
    check_writable("vault.rel_dir", vault.rel_dir)


def check_writable(name: str, rel_dir: str) -> None:
    """Whether files can be made in `rel_dir`, or in what exists of the folders above it.

    Raises:
        ConfigError: where they cannot.
    """
    folder = Path(os.path.abspath(rel_dir))
    try:
        tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())).close()
    except OSError as error:
        raise ConfigError(
            f"{name} {rel_dir!r} cannot be written: {error.strerror}: choose another"
        ) from error


class Evaluation(NamedTuple):
    """What is known after one evaluation.

    Attributes:
        step_count: environment steps of training so far.
        elapsed_time: seconds since the first evaluation.
        steps_per_second: of the training since the evaluation before.
        episode_return: (num_eval_episodes,) float32.
        episode_length: (num_eval_episodes,) int32, timesteps.
        train_episode_return: (any,) float32, of the training episodes that ended since.
        losses: mean since the evaluation before, of "actor_loss", "value_loss" and "entropy".
    """

    step_count: int
    elapsed_time: float
    steps_per_second: float
    episode_return: np.ndarray
    episode_length: np.ndarray
    train_episode_return: np.ndarray
    losses: dict[str, float]


class ExperimentResult(NamedTuple):
    """What `run_experiment` returns.

    Attributes:
        config: of the run, with nothing left open.
        vault_path: folder of the vault, None where nothing was saved.
        num_timesteps: environment steps that the vault holds.
        evaluations: in the order of training.
        params: of the evaluation with the highest mean return.
        absolute_metric: mean return of `params` over more episodes, None if not asked for.
    """

    config: Config
    vault_path: Optional[Path]
    num_timesteps: int
    evaluations: list[Evaluation]
    params: Params
    absolute_metric: Optional[float]

    @property
    def evaluation_returns(self) -> np.ndarray:
        """Mean episode return of each evaluation, (num_evaluation,) float32."""
        return np.array([evaluation.episode_return.mean() for evaluation in self.evaluations])


# Whose versions are kept in the vault's metadata.
PACKAGES = ("jax", "jaxlib", "flashbax", "flax", "optax", "distrax", "jumanji", "chex")

# Bytes in memory for each byte on disk, as measured on the default run; for an estimate.
COMPRESSION_RATIO = 50


def is_interactive() -> bool:
    """Whether somebody watches: in a terminal or in a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def describe_run(config: Config, experience: dict[str, Any]) -> str:
    """What is about to happen: the configuration, the devices, and what will be recorded where.

    Args:
        config: from `check_config`.
        experience: leaves (D, NU, UB, T, NE, ...), arrays or shapes.
    """
    groups = {
        group: " ".join(f"{name}={value}" for name, value in fields.items())
        for group, fields in dataclasses.asdict(config).items()
    }
    groups["devices"] = ", ".join(str(device) for device in jax.devices())
    *axes, num_timesteps, num_envs = experience["done"].shape[:5]
    num_rows, num_timesteps = math.prod(axes) * num_envs, num_timesteps * config.arch.num_evaluation
    steps = num_rows * num_timesteps
    bytes_per_step = sum(math.prod(x.shape[5:]) * x.dtype.itemsize for x in experience.values())
    groups["records"] = (
        f"{steps:,} environment steps, {num_rows:,} rows of {num_timesteps:,} timesteps, about "
        f"{steps * bytes_per_step / COMPRESSION_RATIO / 1e6:,.1f} MB, in {vault_path(config.vault)}"
        if config.vault.save
        else "nothing, as vault.save is off"
    )
    return "\n".join(
        textwrap.fill(text, 100, initial_indent=f"{group:9}", subsequent_indent=" " * 9)
        for group, text in groups.items()
    )


def describe_evaluation(evaluation: Evaluation, vault_timesteps: int) -> str:
    """One line about an evaluation."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.losses.items())
    return (
        f"step {evaluation.step_count:,}: {evaluation.steps_per_second:,.0f} steps/s, "
        f"episode return {evaluation.episode_return.mean():.2f}, "
        f"length {evaluation.episode_length.mean():.0f}, "
        f"{losses}, vault {vault_timesteps:,} steps"
    )


def describe_result(result: ExperimentResult, seconds: float) -> str:
    """What came of it: the absolute metric, and how to read the vault."""
    lines = [f"done in {datetime.timedelta(seconds=round(seconds))} (h:mm:ss)"]
    if result.absolute_metric is not None:
        lines.append(f"absolute metric: {result.absolute_metric:.2f} (mean episode return)")
    if result.vault_path is not None:
        vault = result.config.vault
        size = sum(file.stat().st_size for file in result.vault_path.rglob("*") if file.is_file())
        lines += [
            f"vault: {result.num_timesteps:,} steps, {size / 1e6:,.1f} MB in {result.vault_path}",
            "read it with: from flashbax.vault import Vault; "
            f"Vault({vault.name!r}, vault_uid={vault.uid!r}, rel_dir={vault.rel_dir!r}).read()",
        ]
    return "\n".join(lines)


# The optional sections below add themselves here, so that the file also runs without them.
AFTER_EVALUATION: list[Callable[[Config, list[Evaluation]], None]] = []
AFTER_RUN: list[Callable[[ExperimentResult], None]] = []


def run_experiment(config: Config = Config()) -> ExperimentResult:
    """Train, evaluate and record.

    Raises:
        ConfigError: where `config` cannot be run, before anything is compiled or created.
        VaultError: where the vault could not be written.
    """
    start_time = time.perf_counter()
    mesh = Mesh(np.array(jax.devices()), ("device",))
    total_timesteps = config.system.total_timesteps
    config = check_config(config, mesh.size)
    system, arch = config.system, config.arch
    num_updates_per_eval = system.num_updates // arch.num_evaluation

    key, eval_key, params_key = jax.random.split(jax.random.PRNGKey(system.seed), 3)
    env = make_env(config.env, system.add_agent_id)
    num_agents, num_actions = observation_shape(env).action_mask.shape
    agent = make_agent(config, num_actions)
    state = init_learner(key, params_key, env, agent, config, mesh)
    learn = make_learn(env, agent, system, num_updates_per_eval, mesh, config.vault.extra_leaves)
    evaluate_params = make_evaluate(
        env, agent.actor, arch.num_eval_episodes, arch.evaluation_greedy, mesh
    )
    experience = jax.eval_shape(learn, state).experience
    steps_per_evaluation = math.prod(experience["done"].shape[:5])
    print(describe_run(config, experience))
    if total_timesteps not in (None, arch.num_evaluation * steps_per_evaluation):
        print(
            f"system.total_timesteps {total_timesteps:,} is rounded up to whole evaluations: "
            f"{arch.num_evaluation * steps_per_evaluation:,}"
        )

    evaluations: list[Evaluation] = []
    best_params, best_return = state.params, -math.inf
    first_time = None
    with contextlib.ExitStack() as stack:
        recorder = None
        if config.vault.save:
            metadata = {
                **dataclasses.asdict(config),
                "num_agents": num_agents,
                "num_actions": num_actions,
                "num_devices": mesh.size,
                "num_updates_per_eval": num_updates_per_eval,
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
            recorder = stack.enter_context(Recorder(config.vault, experience, metadata, mesh))
        progress = stack.enter_context(
            tqdm(
                total=arch.num_evaluation,
                unit="evaluation",
                file=sys.stdout,
                disable=not is_interactive(),
                dynamic_ncols=True,
            )
        )
        for index in range(arch.num_evaluation):
            # TRAIN
            train_time = time.perf_counter()
            state, experience, metrics, losses = jax.block_until_ready(learn(state))
            train_time = time.perf_counter() - train_time

            # RECORD
            if recorder:
                recorder.add(experience)
                if index % config.vault.save_interval == 0:
                    recorder.write()

            # EVALUATE the parameters that the update has just produced
            eval_key, *keys = jax.random.split(eval_key, mesh.size + 1)
            eval_metrics = evaluate_params(state.params.actor, jnp.stack(keys))
            eval_metrics, metrics, losses = jax.device_get((eval_metrics, metrics, losses))
            if eval_metrics.episode_return.mean() >= best_return:
                best_params, best_return = state.params, eval_metrics.episode_return.mean()

            # LOG
            now = time.perf_counter()
            first_time = first_time or now
            evaluations.append(
                Evaluation(
                    step_count=(index + 1) * steps_per_evaluation,
                    elapsed_time=now - first_time,
                    steps_per_second=steps_per_evaluation / train_time,
                    episode_return=eval_metrics.episode_return,
                    episode_length=eval_metrics.episode_length,
                    train_episode_return=metrics.episode_return[metrics.ended],
                    losses={name: float(loss.mean()) for name, loss in losses.items()},
                )
            )
            num_timesteps = recorder.num_timesteps if recorder else 0
            tqdm.write(describe_evaluation(evaluations[-1], num_timesteps), file=sys.stdout)
            progress.set_postfix_str(
                f"return {eval_metrics.episode_return.mean():.2f}, "
                f"{evaluations[-1].steps_per_second:,.0f} steps/s, vault {num_timesteps:,} steps",
                refresh=False,
            )
            progress.update()
            for hook in AFTER_EVALUATION:
                hook(config, evaluations)

        # ABSOLUTE METRIC of the best parameters
        absolute_metric = None
        if arch.absolute_metric:
            episode_return = np.zeros(0)
            while len(episode_return) < arch.num_absolute_metric_eval_episodes:
                eval_key, *keys = jax.random.split(eval_key, mesh.size + 1)
                eval_metrics = evaluate_params(best_params.actor, jnp.stack(keys))
                episode_return = np.append(episode_return, eval_metrics.episode_return)
            episode_return = episode_return[: arch.num_absolute_metric_eval_episodes]
            absolute_metric = float(episode_return.mean())

    result = ExperimentResult(
        config=config,
        vault_path=recorder.path if recorder else None,
        num_timesteps=recorder.num_timesteps if recorder else 0,
        evaluations=evaluations,
        params=best_params,
        absolute_metric=absolute_metric,
    )
    print(describe_result(result, time.perf_counter() - start_time))
    for hook in AFTER_RUN:
        hook(result)
    return result


# ------------------------------------------------------------------------------------------------
# OFFLINE: episodes from a vault, OG-MARL's layout
# ------------------------------------------------------------------------------------------------


def restore_time_order(
    experience: chex.ArrayTree, num_devices: int, num_updates_per_eval: int, rollout_length: int
) -> chex.ArrayTree:
    """Each environment's own stream of timesteps, unbroken, from the rows of a vault.

    With NU > 1 a row of the vault holds every NU-th rollout of an environment, end to end: read
    along a row, time jumps wherever one rollout ends and the next begins.

    Args:
        experience: leaves (D * NU * UB * NE, E * T, ...) of E evaluations, NumPy or JAX.
        num_devices: D.
        num_updates_per_eval: NU.
        rollout_length: T.

    Returns:
        Leaves (D * UB * NE, E * NU * T, ...), one row for each environment.
    """

    def restore(x: chex.Array) -> chex.Array:
        num_evaluations, rest = x.shape[1] // rollout_length, x.shape[2:]
        # (D * NU * UB * NE, E * T, ...) -> (D, NU, UB * NE, E, T, ...)
        x = x.reshape(num_devices, num_updates_per_eval, -1, num_evaluations, rollout_length, *rest)
        # (D, NU, UB * NE, E, T, ...) -> (D, UB * NE, E, NU, T, ...)
        x = x.swapaxes(1, 2).swapaxes(2, 3)
        num_timesteps = num_evaluations * num_updates_per_eval * rollout_length
        return x.reshape(-1, num_timesteps, *rest)

    return jax.tree.map(restore, experience)


class Episodes(NamedTuple):
    """K complete episodes, in the order in which they ended; S transitions in all.

    The episodes lie end to end along one axis, not padded to one length.  That suits JAX: every
    array has a static shape, a transition is sampled with one gather of a random index below S, and
    `jnp.repeat(jnp.arange(K), length, total_repeat_length=S)` gives the ids for a `segment_sum`.
    What followed transition i is transition i + 1, unless `done`.

    Attributes:
        steps: from the name of a leaf of the vault to (S, ...).
        start: (K,) int32, index of the first timestep.
        length: (K,) int32, timesteps.
        episode_return: (K,) float32, the agents' mean reward, summed.
        recorded_at: (K,) int64, environment steps of training before the episode's first: its
            timestep on its environment's own clock, times the D * UB * NE environments.
        num_cut_off: episodes left out, as their beginning or end is not in the part that was read.
    """

    steps: dict[str, np.ndarray]
    start: np.ndarray
    length: np.ndarray
    episode_return: np.ndarray
    recorded_at: np.ndarray
    num_cut_off: int


def open_vault(name: str, uid: str, rel_dir: str = "vaults") -> tuple[Vault, dict[str, Any]]:
    """A vault that exists, and what `run_experiment` kept beside it: its metadata.

    Raises:
        FileNotFoundError: where there is no such vault.
    """
    path = vault_path(VaultConfig(name=name, uid=uid, rel_dir=rel_dir))
    metadata = json.loads((path / "metadata.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        return Vault(vault_name=name, vault_uid=uid, rel_dir=rel_dir), metadata


def iterate_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: Optional[tuple[float, float]] = None,
    leaves: Optional[tuple[str, ...]] = None,
    num_steps: int = 250_000,
) -> Iterator[Episodes]:
    """Every complete episode of a vault, exactly once, a part of the vault at a time.

    Episodes that a part breaks off are carried over to the next, so how the vault is divided
    changes neither the episodes nor their order.

    Args:
        name: of the vault.
        uid: of the recording.
        rel_dir: folder of all vaults.
        percentiles: the part of training to read, in whole evaluations, both ends rounded down;
            by default all of it.
        leaves: what `steps` holds; by default all leaves.
        num_steps: environment steps to read at a time, in whole evaluations, at least one.

    Raises:
        FileNotFoundError: where there is no such vault.
        ConfigError: where `percentiles` hold no evaluation.
    """
    vault, metadata = open_vault(name, uid, rel_dir)
    num_devices, num_updates = metadata["num_devices"], metadata["num_updates_per_eval"]
    rollout_length = metadata["system"]["rollout_length"]
    stores = vault._all_datastores
    leaves = tuple(stores) if leaves is None else tuple(leaves)
    num_rows = stores["done"].shape[0]
    num_environments = num_rows // num_updates
    num_evaluations = vault.vault_index // rollout_length
    low, high = percentiles or (0, 100)
    first, last = (int(num_evaluations * percentile / 100) for percentile in (low, high))
    require(
        0 <= low <= high <= 100 and first < last,
        f"percentiles {low} to {high} hold none of the vault's {num_evaluations} evaluations",
    )

    def read(start: int, stop: int) -> dict[str, chex.ArrayTree]:
        # `Vault.read` would read all leaves, whatever is asked for, onto the accelerator.
        futures = jax.tree.map(
            lambda store: store[:, start * rollout_length : stop * rollout_length].read(),
            {leaf: stores[leaf] for leaf in {"done", "reward", *leaves}},
        )
        experience = jax.tree.map(lambda future: future.result(), futures)
        return restore_time_order(experience, num_devices, num_updates, rollout_length)

    # All times are on an environment's own clock.  Where the recording begins, episodes begin too;
    # elsewhere an environment's first episode is known to begin only after its first `done`.
    window, window_start = None, first * num_updates * rollout_length
    begin = np.full(num_environments, 0 if first == 0 else -1)  # of the episodes under way
    interval = max(1, num_steps // (num_rows * rollout_length))
    for start in range(first, last, interval):
        stop = min(start + interval, last)
        parts = filter(None, (window, read(start, stop)))
        window = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
        size = window["done"].shape[1]
        window_stop = window_start + size

        # EPISODES that end in this window
        done = window["done"][..., 0] & (np.arange(window_start, window_stop) >= begin[:, None])
        row, end = np.nonzero(done)  # in the order of the rows
        end = end + window_start + 1
        is_first = np.diff(row, prepend=-1) > 0
        episode_begin = np.where(is_first, begin[row], np.roll(end, 1))
        np.maximum.at(begin, row, end)
        complete = episode_begin >= 0
        num_cut_off = np.sum(~complete) + (np.sum(begin < window_stop) if stop == last else 0)

        # GATHER their timesteps, end to end
        order = np.lexsort((row, end))
        order = order[complete[order]]
        row, episode_begin, length = row[order], episode_begin[order], (end - episode_begin)[order]
        offset = np.cumsum(length) - length
        index = row * size + episode_begin - window_start - offset
        index = np.repeat(index, length) + np.arange(length.sum())
        steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[index], window)
        yield Episodes(
            steps={leaf: steps[leaf] for leaf in leaves},
            start=offset.astype(np.int32),
            length=length.astype(np.int32),
            episode_return=np.add.reduceat(
                steps["reward"].mean(axis=1, dtype=np.float64), offset
            ).astype(np.float32),
            recorded_at=episode_begin * num_environments,
            num_cut_off=int(num_cut_off),
        )

        # CARRY the episodes under way
        window_start = np.min(begin, where=begin >= 0, initial=window_stop)
        kept = window_stop - window_start
        window = jax.tree.map(lambda x: x[:, x.shape[1] - kept :].copy(), window)


def load_episodes(
    name: str,
    uid: str,
    rel_dir: str = "vaults",
    percentiles: Optional[tuple[float, float]] = None,
    leaves: Optional[tuple[str, ...]] = None,
) -> Episodes:
    """The complete episodes of a vault, in memory: see `iterate_episodes`, also for the arguments.

    It takes the memory of what it returns and of one part of the vault, not of a second copy.
    """
    read = functools.partial(iterate_episodes, name, uid, rel_dir, percentiles)
    parts = list(read(leaves=()))  # cheap, and tells how much room the leaves need
    _, _, *fields, num_cut_off = zip(*parts)
    length, episode_return, recorded_at = map(np.concatenate, fields)
    steps, stop = None, 0
    for part in read(leaves=leaves):
        if steps is None:
            steps = jax.tree.map(
                lambda x: np.empty((length.sum(), *x.shape[1:]), x.dtype), part.steps
            )
        start, stop = stop, stop + part.length.sum()
        jax.tree.map(lambda x, y: operator.setitem(x, slice(start, stop), y), steps, part.steps)
    start = (np.cumsum(length) - length).astype(np.int32)
    return Episodes(steps, start, length, episode_return, recorded_at, sum(num_cut_off))


def joint_saco(
    name: str, uid: str, rel_dir: str = "vaults", percentiles: Optional[tuple] = None
) -> float:
    """OG-MARL's Joint SACo: distinct pairs of joint observation and joint action per transition.

    The arguments are those of `iterate_episodes`; nothing is kept of a pair but a hash.
    """
    seen, num_transitions = set(), 0  # hashes of the pairs
    leaves = ("observation", "action")
    for episodes in iterate_episodes(name, uid, rel_dir, percentiles, leaves):
        observation, action = (episodes.steps[leaf] for leaf in leaves)
        pairs = np.concatenate([observation, action[..., None]], axis=-1)  # (S, N, O + 1)
        seen.update(hash(pair.tobytes()) for pair in pairs)
        num_transitions += len(pairs)
    return len(seen) / num_transitions


# What OG-MARL calls the parts of a recording, and the percentiles of training that are in them.
OG_MARL_PARTS = {"Replay": (0, 100), "Poor": (0, 33), "Medium": (33, 67), "Good": (67, 100)}


def to_og_marl(episodes: Episodes, metadata: dict[str, Any]) -> dict[str, chex.ArrayTree]:
    """The transitions of complete episodes under OG-MARL's names and in its shapes.

    RobotWarehouse ends an episode alike for a collision and for the time limit.  Here an episode of
    `env.time_limit` timesteps was truncated, a shorter one ended in a terminal state.  (One whose
    very last timestep also brought a collision counts as truncated.)

    Args:
        episodes: with the leaves of `LEAVES`.
        metadata: of the vault that they are from.

    Returns:
        Leaves (1, S, N, ...) and, in `infos`, the legal actions (1, S, N, A) bool and the state
        (1, S, N * O), the agents' observations side by side.  Observations come without the one-hot
        of the agent's index: OG-MARL's systems put their own in front.
    """
    steps = episodes.steps
    num_ids = metadata["num_agents"] if metadata["system"]["add_agent_id"] else 0
    observation = steps["observation"][..., num_ids:]
    truncated = episodes.length == metadata["env"]["time_limit"]
    truncated = np.repeat(truncated, episodes.length)[:, None]  # (S, 1)
    experience = {
        "observations": observation,
        "actions": steps["action"],
        "rewards": steps["reward"],
        "terminals": steps["done"] & ~truncated,
        "truncations": steps["done"] & truncated,
        "infos": {
            "legals": steps["legal_action_mask"],
            "state": observation.reshape(len(observation), -1),
        },
    }
    return jax.tree.map(lambda x: x[None], experience)


def export_og_marl(name: str, uid: str, rel_dir: str = "vaults", part: str = "Replay") -> Path:
    """Write a part of a vault as a vault that OG-MARL reads, episodes end to end in one row.

    It lies in REL_DIR/SOURCE/ENV/SCENARIO.vlt/UID, by OG-MARL's names; the source is NAME_UID of
    the recording, so that no two recordings meet in one folder.

    Args:
        name: of the vault.
        uid: of the recording.
        rel_dir: folder of all vaults.
        part: one of `OG_MARL_PARTS`: "Replay" is everything, the others are thirds of training.

    Returns:
        The folder of the export.

    Raises:
        KeyError: where `part` is not one of `OG_MARL_PARTS`.
        FileNotFoundError: where there is no such vault.
        ConfigError: where the export exists already, or the vault is too short for the part.
    """
    _, metadata = open_vault(name, uid, rel_dir)
    config = VaultConfig(
        rel_dir=os.path.join(rel_dir, f"{name}_{uid}", "rware"),
        name=f"{metadata['env']['scenario']}.vlt",
        uid=part,
    )
    path = vault_path(config)
    require(not path.exists(), f"the export exists already, at {path}: move it or delete it")
    vault = None
    # In a thread, `Vault.write` can start the event loop that it needs also in a notebook.
    with ThreadPoolExecutor(max_workers=1) as thread:
        for episodes in iterate_episodes(name, uid, rel_dir, OG_MARL_PARTS[part]):
            experience = to_og_marl(episodes, metadata)
            chunk_length = 10_000  # about 5 MB of observations
            vault = vault or make_vault(config, experience, chunk_length, {"recording": metadata})
            thread.submit(write_vault, vault, experience).result()
    return path


def export_after_run(result: ExperimentResult) -> None:
    """Export the whole recording, where `vault.og_marl` asks for it."""
    vault = result.config.vault
    if vault.og_marl and result.vault_path:
        path = export_og_marl(vault.name, vault.uid, vault.rel_dir)
        print(f"vault in OG-MARL's layout: {path}")


AFTER_RUN.append(export_after_run)


# ------------------------------------------------------------------------------------------------
# RESULTS: metrics, pictures and animation
# ------------------------------------------------------------------------------------------------


def results_path(config: Config) -> Path:
    """The folder of the results: REL_DIR/NAME/UID, with the vault's name and uid."""
    return Path(os.path.abspath(config.results.rel_dir), config.vault.name, config.vault.uid)


def write_metrics(
    config: Config, evaluations: list[Evaluation], absolute_metric: Optional[float] = None
) -> None:
    """Write all evaluations so far to `metrics.json`, in the format that marl-eval reads.

    Who reads the file during training finds it whole: a new one takes its place at once.
    """
    if not config.results.save:
        return
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
    for key in (f"seed_{config.system.seed}", "ff_ippo", config.env.scenario, "RobotWarehouse"):
        metrics = {key: metrics}

    path = results_path(config) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w") as file:
        json.dump(metrics, file)
    os.replace(file.name, path)


def plot_learning_curve(evaluations: list[Evaluation]) -> Figure:
    """Return, losses and entropy against environment steps."""
    steps = [evaluation.step_count for evaluation in evaluations]
    returns = np.stack([evaluation.episode_return for evaluation in evaluations])
    training = [  # there may be no training episode that ended since the evaluation before
        evaluation.train_episode_return.mean() if evaluation.train_episode_return.size else math.nan
        for evaluation in evaluations
    ]
    style = {"marker": "o" if len(evaluations) == 1 else None}  # there is no line through one point

    figure = Figure(figsize=(8.5, 5.5), dpi=150, layout="constrained")
    panels = figure.subplot_mosaic(
        [["return"] * 3, ["actor_loss", "value_loss", "entropy"]], height_ratios=[2, 1], sharex=True
    )
    axes = panels.pop("return")
    axes.fill_between(
        steps,
        *np.percentile(returns, [10, 90], axis=1),
        label="evaluation: 10th to 90th percentile of the episodes",
        color="#0072B2",
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(steps, training, "#E69F00", label="training: mean", linewidth=1, **style)
    axes.plot(steps, returns.mean(axis=1), "#0072B2", label="evaluation: mean", **style)
    axes.set(ylabel="Episode return\n(shelves delivered)", xlabel="Environment steps")
    axes.locator_params(axis="x", nbins=5)  # the panels below share these ticks, with less room
    axes.tick_params(labelbottom=True)
    axes.legend(loc="upper left")
    for name, axes in panels.items():
        losses = [evaluation.losses[name] for evaluation in evaluations]
        axes.plot(steps, losses, "#555555", linewidth=1, **style)
        title = {"entropy": "Entropy of the policy (nats)"}
        axes.set_title(title.get(name, name.replace("_", " ").capitalize()), fontsize="medium")
        axes.set_xlabel("Environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def plot_dataset(config: Config) -> Figure:
    """What is in the vault: returns, lengths and actions, in each third of the training."""
    vault = config.vault
    episodes = load_episodes(vault.name, vault.uid, vault.rel_dir, leaves=("action",))
    third = 3 * episodes.recorded_at // (episodes.recorded_at.max(initial=0) + 1)
    width = math.ceil((episodes.episode_return.max(initial=0) + 1) / 12)  # a dozen bars
    bins = (
        np.arange(13) * width - 0.5,
        np.linspace(0, config.env.time_limit, 11),
        np.arange(len(Action) + 1) - 0.5,
    )
    names = ("first", "second", "last")
    colors = ("#A6CEE3", "#4292C6", "#08306B")  # their lightness tells them apart

    figure = Figure(figsize=(8.5, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[4, 4, 5])
    for part in range(3):
        chosen = third == part
        label = f"{names[part]} third of training: {chosen.sum():,} episodes"
        action = episodes.steps["action"][np.repeat(chosen, episodes.length)]
        values = (episodes.episode_return[chosen], episodes.length[chosen], action)
        for axes, value, edges in zip(panels, values, bins):
            percent = 100 * np.histogram(value, edges)[0] / max(1, value.size)
            bar = 0.28 * np.diff(edges)
            center = (edges[:-1] + edges[1:]) / 2
            axes.bar(center + (part - 1) * bar, percent, bar, color=colors[part], label=label)
    panels[0].set(xlabel="Episode return\n(shelves delivered)", ylabel="Share of episodes (%)")
    panels[1].set(xlabel="Episode length\n(timesteps)", ylabel="Share of episodes (%)")
    panels[2].set(xlabel="Action of an agent", ylabel="Share of actions (%)")
    labels = [action.name.lower().replace("_", "\n") for action in Action]
    panels[2].set_xticks(range(len(Action)), labels, fontsize="small")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize="small")
    return figure


def play_episode(config: Config, actor_params: chex.ArrayTree) -> list[State]:
    """Jumanji's state after each step of one evaluation episode."""
    env = make_env(config.env, config.system.add_agent_id)
    num_actions = observation_shape(env).action_mask.shape[-1]
    actor = Actor(num_actions, config.network.actor_layer_sizes)

    def step(carry: tuple, key: chex.PRNGKey) -> tuple[tuple, tuple]:
        state, observation = carry
        policy = distrax.Categorical(actor.apply(actor_params, observation))
        greedy = config.arch.evaluation_greedy
        action = policy.mode() if greedy else policy.sample(seed=key)
        state, timestep = env.step(state, action)
        return (state, timestep.observation), (state, timestep.last())

    @jax.jit
    def play(key: chex.PRNGKey) -> tuple[State, chex.Array]:
        state, timestep = env.reset(key)
        keys = jax.random.split(key, config.env.time_limit)
        return jax.lax.scan(step, (state, timestep.observation), keys)[1]

    states, last = jax.device_get(play(jax.random.PRNGKey(config.system.seed)))
    return [jax.tree.map(lambda x: x[index], states) for index in range(last.argmax() + 1)]


def animate_episode(config: Config, states: list[State], path: Path) -> None:
    """Write the states to a GIF, ten a second, with Jumanji's viewer; each takes about 40 ms."""
    warehouse = make_env(config.env, config.system.add_agent_id).unwrapped
    rows, columns = warehouse.grid_size
    viewer = RobotWarehouseViewer(warehouse.grid_size, warehouse.goals)
    # Its own figure is eight times as large, and may need a display or appear in a notebook.
    figure = Figure(figsize=(columns * 0.4, rows * 0.4), dpi=80)
    viewer._get_fig_ax = lambda **_: (figure, figure.add_axes((0, 0, 1, 1)))
    viewer.animate(states, interval=100).save(path, writer="pillow")


def save_results(result: ExperimentResult) -> None:
    """Write the last metrics and the pictures."""
    config = result.config
    if not config.results.save:
        return
    path = results_path(config)
    write_metrics(config, result.evaluations, result.absolute_metric)
    plot_learning_curve(result.evaluations).savefig(path / "learning_curve.png")
    if result.vault_path is not None:
        plot_dataset(config).savefig(path / "dataset.png")
    if config.results.animation:
        animate_episode(config, play_episode(config, result.params.actor), path / "episode.gif")
    print(f"results: {', '.join(sorted(file.name for file in path.iterdir()))} in {path}")


AFTER_EVALUATION.append(write_metrics)
AFTER_RUN.append(save_results)


# ------------------------------------------------------------------------------------------------
# COMMAND LINE
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """The command line: every field of `Config` is a flag, such as --system.num-updates 10."""
    import tyro

    config = tyro.cli(Config)
    try:
        run_experiment(config)
    except (ConfigError, VaultError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the vault holds what was recorded until then")


if __name__ == "__main__":
    if "__file__" in globals():
        main()
    else:  # pasted into a notebook, whose command line is not this file's
        print("ready: result = run_experiment(Config()) trains and records")
