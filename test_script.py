# SPDX-License-Identifier: Apache-2.0
"""Tests of ff_ippo_store_experience.py: `pytest test_script.py`.

Run as a program, `python test_script.py`, it prints the benchmark instead.
"""

import time

START = time.perf_counter()  # the benchmark counts from here

import asyncio
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import distrax
import jax
import jax.numpy as jnp
import matplotlib
import nbformat
import numpy as np
import pytest
from flashbax.vault import Vault
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from jumanji.environments import RobotWarehouse
from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator
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


# The command line of `small_config()`.
SMALL_ARGUMENTS = (
    "--system.num-updates 4 --system.rollout-length 16 --arch.num-evaluation 2 --arch.num-envs 4 "
    "--arch.num-eval-episodes 4 --arch.no-absolute-metric --env.time-limit 10"
).split()


def small_config(**groups):
    """A run of a few seconds: 2 evaluations of 2 updates, short episodes, 8 environments."""
    defaults = {
        "system": dict(num_updates=4, rollout_length=16),
        "arch": dict(num_envs=4, num_evaluation=2, num_eval_episodes=4, absolute_metric=False),
        "env": dict(time_limit=10),
        "vault": dict(uid="small"),
        "results": dict(save=False),
    }
    config = ippo.Config()
    for group in dataclasses.fields(config):
        changes = {**defaults.get(group.name, {}), **groups.get(group.name, {})}
        part = dataclasses.replace(getattr(config, group.name), **changes)
        config = dataclasses.replace(config, **{group.name: part})
    return config


def jumanji_env(scenario="tiny-2ag", time_limit=500):
    """Jumanji's own RobotWarehouse, without anything of ours."""
    generator = RandomGenerator(
        shelf_columns=3, column_height=8, sensor_range=1, **ippo.SCENARIOS[scenario]
    )
    return RobotWarehouse(generator, time_limit=time_limit)


def read_vault(result):
    """Leaves (D * NU * UB * NE, E * T, ...) of a result's vault, as NumPy arrays."""
    vault = result.config.vault
    state = Vault(vault.name, vault_uid=vault.uid, rel_dir=vault.rel_dir).read()
    return jax.tree.map(np.asarray, state.experience)


def read_streams(result):
    """Leaves (D * UB * NE, E * NU * T, ...) of a result's vault: one environment a row."""
    _, metadata = ippo.open_vault("ff_ippo_rware", "small", result.config.vault.rel_dir)
    return ippo.restore_time_order(
        read_vault(result),
        metadata["num_devices"],
        metadata["num_updates_per_eval"],
        metadata["system"]["rollout_length"],
    )


def run_script(*arguments, cwd, **environment):
    """The script as a user would run it."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Many tests build the same learner: within this process, XLA compiles it once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The result of a small run in a folder of its own."""
    rel_dir = tmp_path_factory.mktemp("small_run") / "vaults"
    return ippo.run_experiment(small_config(vault=dict(rel_dir=str(rel_dir), og_marl=True)))


def learner_parts(config):
    """What `run_experiment` builds before it trains."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    env = ippo.make_env(config.env, config.system.add_agent_id)
    agent = ippo.make_agent(config, num_actions=5)
    key, _, params_key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    state = ippo.init_learner(key, params_key, env, agent, config, mesh)
    num_updates = config.system.num_updates // config.arch.num_evaluation
    return env, agent, state, ippo.make_learn(env, agent, config.system, num_updates, mesh), mesh


# ------------------------------------------------------------------------------------------------
# ENVIRONMENT
# ------------------------------------------------------------------------------------------------


def test_map_where_maps_just_the_rows_of_the_mask():
    mapped = []
    for size, share in ((1, 1.0), (7, 0.0), (7, 1.0), (40, 0.5), (1000, 0.02)):
        mask = np.random.default_rng(size).random(size) < share
        x = jnp.arange(size, dtype=jnp.float32)
        result = jax.jit(lambda mask, x: ippo.map_where(lambda y: y * 10, mask, x, x))(mask, x)
        np.testing.assert_array_equal(result, np.where(mask, x * 10, x))
        mapped.append(mask.sum())
    assert 0 in mapped and max(mapped) > 8  # no row, and more than one chunk


@pytest.mark.parametrize("scenario", ["tiny-2ag", "small-4ag"])
def test_warehouse_is_jumanjis_step_for_step(scenario):
    theirs, num_envs = jumanji_env(scenario), 256
    ours = ippo.Warehouse(theirs._generator, time_limit=500)

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
        return jax.lax.scan(step, carry, None, 100)

    key = jax.random.PRNGKey(0)
    expected, actual = (jax.jit(functools.partial(play, env))(key) for env in (theirs, ours))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert expected[1][0].reward.sum() > 0, "nothing was delivered: the test shows nothing"


def test_environment_stack_against_stepping_jumanji_by_hand():
    scenario, num_agents, time_limit, num_envs, num_steps = "tiny-4ag", 4, 9, 6, 30
    env = ippo.make_env(ippo.EnvConfig(scenario, time_limit), add_agent_id=True)
    keys = jax.random.split(jax.random.PRNGKey(3), num_envs)
    actions = jax.random.randint(jax.random.PRNGKey(4), (num_steps, num_envs, num_agents), 0, 3)
    env_state, timestep = jax.jit(lambda keys: ippo.reset_environments(env, keys))(keys)
    observations, steps = [timestep.observation], []
    step = jax.jit(lambda state, action: ippo.step_environments(env, state, action))
    for action in actions:
        env_state, timestep, metrics = step(env_state, action)
        observations.append(timestep.observation)
        steps.append((timestep, metrics))

    theirs = jumanji_env(scenario, time_limit)
    reset, step = jax.jit(theirs.reset), jax.jit(theirs.step)
    lengths = []
    for i in range(num_envs):
        state, expected = reset(jax.random.split(keys[i])[1])
        episode_return, episode_length = 0.0, 0
        for t in range(num_steps):
            seen = jax.tree.map(lambda x: np.asarray(x[i]), observations[t])
            one_hot = np.eye(num_agents, dtype=np.float32)
            view = np.concatenate([one_hot, expected.observation.agents_view], axis=1)
            np.testing.assert_array_equal(seen.agents_view, view)
            assert seen.agents_view.dtype == np.float32
            np.testing.assert_array_equal(seen.action_mask, expected.observation.action_mask)
            assert seen.step_count.tolist() == [expected.observation.step_count] * num_agents
            state, expected = step(state, actions[t, i])
            timestep, metrics = jax.tree.map(lambda x: np.asarray(x[i]), steps[t])
            episode_return, episode_length = episode_return + expected.reward, episode_length + 1
            assert timestep.reward.tolist() == [expected.reward] * num_agents
            assert timestep.discount.tolist() == [expected.discount] * num_agents
            assert timestep.step_type == expected.step_type
            np.testing.assert_array_equal(
                timestep.extras["next_observation"].agents_view[:, num_agents:],
                expected.observation.agents_view,
            )
            assert metrics.ended == expected.last()
            assert metrics.episode_return == episode_return
            assert metrics.episode_length == episode_length
            if expected.last():
                lengths.append(episode_length)
                state, expected = reset(jax.random.split(state.key)[0])
                episode_return, episode_length = 0.0, 0
    assert max(lengths) == time_limit and min(lengths) < time_limit  # both ways to end


def test_agent_id_is_optional():
    env = ippo.make_env(ippo.EnvConfig(scenario="tiny-4ag"), add_agent_id=False)
    assert ippo.observation_shape(env).agents_view.shape == (4, 66)
    env = ippo.make_env(ippo.EnvConfig(scenario="tiny-4ag"), add_agent_id=True)
    assert ippo.observation_shape(env).agents_view.shape == (4, 70)


# ------------------------------------------------------------------------------------------------
# NETWORKS, ROLLOUT, ADVANTAGE, LOSSES, UPDATE
# ------------------------------------------------------------------------------------------------


def random_observation(key, shape, num_actions=5, num_features=6):
    """An observation of (*shape, .) in which the first action is always legal."""
    view_key, mask_key = jax.random.split(key)
    mask = jax.random.bernoulli(mask_key, 0.5, (*shape, num_actions)).at[..., 0].set(True)
    view = jax.random.normal(view_key, (*shape, num_features))
    return ippo.Observation(view, mask, jnp.zeros(shape, jnp.int32))


def test_networks_have_the_original_names_shapes_and_gains():
    observation = random_observation(jax.random.PRNGKey(0), (3, 4, 2))
    agent = ippo.make_agent(ippo.Config(), num_actions=5)
    actor_params = agent.actor.init(jax.random.PRNGKey(1), observation)
    critic_params = agent.critic.init(jax.random.PRNGKey(1), observation)
    logits = agent.actor.apply(actor_params, observation)
    assert logits.shape == (3, 4, 2, 5)
    assert agent.critic.apply(critic_params, observation).shape == (3, 4, 2)
    illegal = np.asarray(logits)[~np.asarray(observation.action_mask)]
    assert (illegal == np.finfo(np.float32).min).all() and len(illegal)

    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for params in (actor_params, critic_params)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if x.ndim == 2
    }
    gains = {  # singular values of an orthogonal kernel are all its gain
        "params/torso/Dense_0/kernel": math.sqrt(2),
        "params/torso/Dense_1/kernel": math.sqrt(2),
        "params/action_head/Dense_0/kernel": 0.01,
        "params/Dense_0/kernel": 1.0,
    }
    assert kernels.keys() == gains.keys()
    for name, kernel in kernels.items():
        singular_values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
        np.testing.assert_allclose(singular_values, gains[name], rtol=1e-4)


def test_advantage_against_a_plain_loop():
    rng = np.random.default_rng(0)
    shape, gamma, gae_lambda = (20, 3, 2), 0.9, 0.8
    reward, value = rng.normal(size=(2, *shape)).astype(np.float32)
    done = rng.random(shape) < 0.2
    last_value = rng.normal(size=shape[1:]).astype(np.float32)
    advantage, target = ippo.calculate_advantage(reward, done, value, last_value, gamma, gae_lambda)
    expected = np.zeros(shape)
    for index in np.ndindex(*shape[1:]):
        for t in range(shape[0]):  # the definition: a discounted sum of temporal differences
            weight = 1.0
            for k in range(t, shape[0]):
                at = (k, *index)
                after = last_value[index] if k == shape[0] - 1 else value[(k + 1, *index)]
                delta = reward[at] + (0 if done[at] else gamma * after) - value[at]
                expected[(t, *index)] += weight * delta
                weight *= gamma * gae_lambda
                if done[at]:
                    break
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, expected + value, rtol=1e-4, atol=1e-5)


class FixedNetwork:
    """Stands for a network: its output is its parameters."""

    @staticmethod
    def apply(params, observation):
        return params


def test_actor_loss_against_hand_worked_numbers():
    # One lane, two transitions, one agent, two actions.  Probabilities 0.5/0.5 and 0.8/0.2; the
    # first action was taken both times, when its probability was 0.4.  Ratios 1.25 and 2 are both
    # clipped to 1.2 where that is less.
    logits = jnp.log(jnp.array([[[0.5, 0.5]], [[0.8, 0.2]]]))
    batch = ippo.Minibatch(
        observation=None,
        action=jnp.array([[0], [0]]),
        log_prob=jnp.log(jnp.array([[0.4], [0.4]])),
        value=None,
        advantage=jnp.array([[1.0], [-1.0]]),
        target=None,
    )
    total, losses = ippo.actor_loss(logits, FixedNetwork, batch, clip_eps=0.2, ent_coef=0.1)
    loss = -(1.2 * 1 + 2 * -1) / 2  # a negative advantage takes the larger ratio
    entropy = (math.log(2) - 0.8 * math.log(0.8) - 0.2 * math.log(0.2)) / 2
    assert losses["actor_loss"] == pytest.approx(loss, rel=1e-5)
    assert losses["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert total == pytest.approx(loss - 0.1 * entropy, rel=1e-5)


def test_critic_loss_against_hand_worked_numbers():
    # From 1 to 2, towards 3: clipped to 1.2, error 1.8 instead of 1.  From 1 to 2, towards 0:
    # error 2, more than the clipped 1.2.
    batch = ippo.Minibatch(
        None, None, None, jnp.array([[1.0], [1.0]]), None, jnp.array([[3.0], [0.0]])
    )
    values = jnp.array([[2.0], [2.0]])
    total, losses = ippo.critic_loss(values, FixedNetwork, batch, clip_eps=0.2, vf_coef=0.5)
    assert losses["value_loss"] == pytest.approx(0.5 * (1.8**2 + 2**2) / 2, rel=1e-5)
    assert total == pytest.approx(0.5 * 0.5 * (1.8**2 + 2**2) / 2, rel=1e-5)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_update_minibatch_follows_the_mean_of_the_lanes_gradients(monkeypatch, num_parts):
    num_lanes, num_transitions = 3, 8
    num_rows = 2 * num_lanes * num_transitions * 2  # forward and backward, of two agents
    monkeypatch.setattr(ippo, "CACHE_ROWS", num_rows // num_parts)
    assert ippo.count_parts(num_transitions, num_rows) == num_parts
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    shape = (2 * num_lanes * num_transitions, 2)  # twice as many as are in the minibatch
    observation = random_observation(keys[0], shape)
    index = jax.random.permutation(keys[1], shape[0])[: shape[0] // 2].reshape(num_lanes, -1)
    lane_of = jnp.zeros(shape[0], int).at[index].set(jnp.arange(num_lanes)[:, None])
    scale = jnp.array([1.0, 10.0, 100.0])[lane_of][:, None]  # lanes that normalise differently
    batch = ippo.Minibatch(
        observation,
        jnp.zeros(shape, jnp.int32),
        -jnp.ones(shape),
        jax.random.normal(keys[2], shape),
        jax.random.normal(keys[3], shape) * scale + scale,
        jax.random.normal(keys[4], shape),
    )
    config = ippo.Config()
    agent = ippo.make_agent(config, num_actions=5)
    params = ippo.Params(
        agent.actor.init(keys[5], observation), agent.critic.init(keys[6], observation)
    )
    opt_states = ippo.Params(
        agent.actor_optim.init(params.actor), agent.critic_optim.init(params.critic)
    )
    update = functools.partial(ippo.update_minibatch, agent=agent, config=config.system)
    same = PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:1]), ("device",))
    update = jax.shard_map(update, mesh=mesh, in_specs=(same,) * 4, out_specs=same, check_vma=False)
    actual, _, losses = jax.jit(update)(params, opt_states, batch, index)

    lanes = [jax.tree.map(lambda x: x[index[i]], batch) for i in range(num_lanes)]
    lanes = [
        lane._replace(advantage=(lane.advantage - lane.advantage.mean()) / lane.advantage.std())
        for lane in lanes
    ]
    for name, loss, network, optim, coefficient in (
        ("actor", ippo.actor_loss, agent.actor, agent.actor_optim, config.system.ent_coef),
        ("critic", ippo.critic_loss, agent.critic, agent.critic_optim, config.system.vf_coef),
    ):
        before = getattr(params, name)
        outcomes = [
            jax.grad(loss, has_aux=True)(before, network, lane, config.system.clip_eps, coefficient)
            for lane in lanes
        ]
        grads = jax.tree.map(lambda *x: sum(x) / num_lanes, *(grads for grads, _ in outcomes))
        updates, _ = optim.update(grads, getattr(opt_states, name))
        expected = jax.tree.map(jnp.add, before, updates)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
            getattr(actual, name),
            expected,
        )
        for part, value in outcomes[0][1].items():
            mean = np.mean([outcome[1][part] for outcome in outcomes])
            assert losses[part] == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("length, num_rows, expected", [(8, 99, 1), (8, 400, 4), (7, 400, 1)])
def test_a_cpu_takes_equal_parts_that_fit_into_its_cache(monkeypatch, length, num_rows, expected):
    monkeypatch.setattr(ippo, "CACHE_ROWS", 100)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert ippo.count_parts(length, num_rows) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ippo.count_parts(length, num_rows) == 1


def test_values_and_log_probabilities_do_not_depend_on_the_parts(monkeypatch):
    def first_rollout():
        config = small_config()
        env, agent, state, _, mesh = learner_parts(config)
        extra = ("log_prob", "value")
        return ippo.make_learn(env, agent, config.system, 1, mesh, extra)(state).experience

    whole = first_rollout()
    monkeypatch.setattr(ippo, "CACHE_ROWS", 16)
    assert ippo.count_parts(16, 16 * 8) > 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), first_rollout(), whole)


def test_shuffle_permutes_each_lane_and_epoch_with_the_original_keys():
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    new_keys, order = ippo.shuffle(keys, num_epochs=3, num_transitions=10)
    assert order.shape == (3, 2, 10)
    for lane in range(2):
        key = keys[lane]
        for epoch in range(3):
            key, shuffle_key = jax.random.split(key)
            expected = jax.random.permutation(shuffle_key, 10)
            np.testing.assert_array_equal(order[epoch, lane], expected)
        np.testing.assert_array_equal(new_keys[lane], key)


def test_learner_is_compiled_once(caplog):
    env, agent, state, learn, mesh = learner_parts(small_config())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            state = learn(state).state
    compiled = [r for r in caplog.records if re.search(r"Compiling .*\blearn\b", r.getMessage())]
    assert len(compiled) == 1, [record.getMessage()[:200] for record in caplog.records]


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
    env = ippo.make_env(ippo.EnvConfig("tiny-4ag", time_limit), add_agent_id=True)
    env = PaidByTheStep(env)
    actor = ippo.make_agent(ippo.Config(), num_actions=5).actor
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape), ippo.observation_shape(env))
    params = actor.init(jax.random.PRNGKey(6), observation)
    bias = params["params"]["action_head"]["Dense_0"]["bias"]
    params["params"]["action_head"]["Dense_0"]["bias"] = bias.at[1].set(1.0)  # forward: collisions
    evaluate = jax.jit(lambda key: ippo.evaluate(env, actor, params, key, num_episodes, greedy))
    metrics = evaluate(key)
    assert metrics.ended.all()

    theirs = jumanji_env("tiny-4ag", time_limit)
    reset, step = jax.jit(jax.vmap(theirs.reset)), jax.jit(jax.vmap(theirs.step))
    key, reset_key = jax.random.split(key)
    state, timestep = reset(jax.random.split(reset_key, num_episodes))
    returns, lengths = [None] * num_episodes, [None] * num_episodes
    rewards = np.zeros(num_episodes)
    for t in range(time_limit):
        key, policy_key = jax.random.split(key)
        one_hot = np.broadcast_to(np.eye(4), (num_episodes, 4, 4))
        view = np.concatenate([one_hot, timestep.observation.agents_view], axis=-1)
        mask = timestep.observation.action_mask
        logits = actor.apply(params, ippo.Observation(view.astype(np.float32), mask, None))
        policy = distrax.Categorical(logits)
        state, timestep = step(state, policy.mode() if greedy else policy.sample(seed=policy_key))
        rewards += 1
        for i in np.flatnonzero(timestep.last()):
            if returns[i] is None:
                returns[i], lengths[i] = rewards[i], t + 1
    assert metrics.episode_return.tolist() == returns
    assert metrics.episode_length.tolist() == lengths
    assert min(lengths) < time_limit, "no episode ended before the others: the test shows nothing"


def test_evaluation_is_of_the_parameters_that_the_update_has_just_produced():
    config = small_config(
        system=dict(num_updates=2, actor_lr=0.1),  # parameters that are far from those before
        arch=dict(num_evaluation=1, num_eval_episodes=8),
        env=dict(time_limit=40),
        vault=dict(save=False),
    )
    result = ippo.run_experiment(config)
    env, agent, state, learn, _ = learner_parts(config)
    after = learn(state).state.params
    jax.tree.map(np.testing.assert_array_equal, result.params, after)

    _, key, _ = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)
    _, key = jax.random.split(key)
    evaluate = jax.jit(lambda params: ippo.evaluate(env, agent.actor, params, key, 8, False))
    expected = evaluate(after.actor)
    assert result.evaluations[0].episode_length.tolist() == expected.episode_length.tolist()
    assert expected.episode_length.tolist() != evaluate(state.params.actor).episode_length.tolist()


def test_absolute_metric_is_of_the_best_parameters_over_its_own_number_of_episodes(monkeypatch):
    evaluations = []
    returns = iter([1.0, 3.0, 2.0, 7.0, 8.0])

    def make_evaluate(env, actor, num_episodes, greedy, mesh):
        def evaluate(actor_params, keys):
            evaluations.append(jax.device_get(actor_params))
            episodes = np.full(num_episodes, next(returns), np.float32)
            return ippo.EpisodeMetrics(episodes, episodes.astype(np.int32), episodes > 0)

        return evaluate

    monkeypatch.setattr(ippo, "make_evaluate", make_evaluate)
    config = small_config(
        system=dict(num_updates=3),
        arch=dict(num_evaluation=3, absolute_metric=True, num_absolute_metric_eval_episodes=6),
        vault=dict(save=False),
    )
    result = ippo.run_experiment(config)
    assert len(evaluations) == 5 and result.absolute_metric == pytest.approx((4 * 7 + 2 * 8) / 6)
    assert result.evaluation_returns.tolist() == [1.0, 3.0, 2.0]
    best = evaluations[1]
    jax.tree.map(np.testing.assert_array_equal, evaluations[3], best)
    jax.tree.map(np.testing.assert_array_equal, evaluations[4], best)
    jax.tree.map(np.testing.assert_array_equal, result.params.actor, best)


# ------------------------------------------------------------------------------------------------
# EXPERIENCE
# ------------------------------------------------------------------------------------------------


def test_reshape_experience():
    shape = D, NU, UB, T, NE, N = 2, 3, 2, 4, 5, 2
    x = jnp.arange(math.prod(shape)).reshape(shape)
    rows = ippo.reshape_experience({"x": x})["x"]
    assert rows.shape == (D * NU * UB * NE, T, N)
    for d, nu, ub, t, ne, n in np.ndindex(*shape):
        assert rows[((d * NU + nu) * UB + ub) * NE + ne, t, n] == x[d, nu, ub, t, ne, n]


def test_the_vault_holds_what_the_learner_returned(small_run):
    experience = read_vault(small_run)
    _, _, state, learn, _ = learner_parts(small_run.config)
    expected = []
    for _ in range(small_run.config.arch.num_evaluation):
        output = learn(state)
        state = output.state
        expected.append(ippo.reshape_experience(output.experience))
    expected = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *expected)
    assert set(experience) == set(LEAVES)
    for name in LEAVES:
        assert experience[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(experience[name], expected[name])
    rows, timesteps = experience["done"].shape[:2]
    assert rows * timesteps == small_run.num_timesteps == 4 * 2 * 16 * 4
    assert small_run.evaluations[-1].step_count == small_run.num_timesteps


def test_jumanji_gives_the_recording_back_from_the_seed_and_the_actions(small_run):
    config = small_run.config
    arch, system = config.arch, config.system
    num_rows = system.update_batch_size * arch.num_envs
    streams = read_streams(small_run)
    env = jumanji_env(time_limit=config.env.time_limit)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    key, _, _ = jax.random.split(jax.random.PRNGKey(system.seed), 3)
    keys = jax.random.split(key, num_rows + 1)[1:]
    for row in range(num_rows):
        state, timestep = reset(jax.random.split(keys[row])[1])
        for t in range(streams["done"].shape[1]):
            recorded = {name: x[row, t] for name, x in streams.items()}
            np.testing.assert_array_equal(recorded["observation"][:, :2], np.eye(2))
            view, mask = timestep.observation.agents_view, timestep.observation.action_mask
            np.testing.assert_array_equal(recorded["observation"][:, 2:], view)
            np.testing.assert_array_equal(recorded["legal_action_mask"], mask)
            assert all(mask[agent, recorded["action"][agent]] for agent in range(2))
            state, timestep = step(state, recorded["action"])
            assert recorded["reward"].tolist() == [timestep.reward] * 2
            assert recorded["done"].tolist() == [timestep.last()] * 2
            if timestep.last():
                state, timestep = reset(jax.random.split(state.key)[0])


def test_extra_leaves_are_what_they_say(tmp_path, small_run):
    names = tuple(ippo.EXTRA_LEAVES)
    config = small_config(vault=dict(rel_dir=str(tmp_path), extra_leaves=names))
    experience = read_vault(ippo.run_experiment(config))
    plain = read_vault(small_run)
    assert set(plain) == set(LEAVES) and set(experience) == {*LEAVES, *names}
    for name in LEAVES:
        np.testing.assert_array_equal(experience[name], plain[name])
    done = experience["done"][..., 0]
    np.testing.assert_array_equal(experience["discount"], 1.0 - experience["done"])
    # Within a rollout, what a step led to is what the next action was chosen on, and time goes on.
    rollout_length = config.system.rollout_length
    following = np.arange(done.shape[1] - 1) % rollout_length != rollout_length - 1
    going_on = ~done[:, :-1] & following
    ending = done[:, :-1] & following
    observation, next_observation = experience["observation"], experience["next_observation"]
    now, then = next_observation[:, :-1], observation[:, 1:]
    np.testing.assert_array_equal(now[going_on], then[going_on])
    assert (now[ending] != then[ending]).any(axis=(1, 2)).all()
    step_count = experience["step_count"]
    np.testing.assert_array_equal(step_count[:, 1:][ending], 0)
    np.testing.assert_array_equal(step_count[:, 1:][going_on], step_count[:, :-1][going_on] + 1)

    # The first update's parameters are the initial ones.
    _, agent, state, _, _ = learner_parts(config)
    first = jax.tree.map(lambda x: x[:8, :rollout_length], experience)
    seen = ippo.Observation(first["observation"], first["legal_action_mask"], None)
    policy = distrax.Categorical(agent.actor.apply(state.params.actor, seen))
    value = agent.critic.apply(state.params.critic, seen)
    np.testing.assert_allclose(first["log_prob"], policy.log_prob(first["action"]), atol=1e-5)
    np.testing.assert_allclose(first["value"], value, atol=1e-5)


def test_metadata_holds_configuration_what_follows_from_it_and_versions(small_run):
    metadata = json.loads((small_run.vault_path / "metadata.json").read_text())
    expected = json.loads(json.dumps(dataclasses.asdict(small_run.config)))
    assert {name: metadata[name] for name in expected} == expected
    derived = {"num_agents": 2, "num_actions": 5, "num_devices": 1, "num_updates_per_eval": 2}
    assert {name: metadata[name] for name in derived} == derived
    assert metadata["versions"]["jax"] == jax.__version__
    assert set(ippo.PACKAGES) == set(metadata["versions"])


def test_training_returns_are_of_the_episodes_that_ended(small_run):
    experience = read_vault(small_run)
    returns = np.concatenate([e.train_episode_return for e in small_run.evaluations])
    assert len(returns) == experience["done"][..., 0].sum()
    for evaluation in small_run.evaluations:
        assert (evaluation.episode_length > 0).all()


def test_a_wrapping_buffer_loses_nothing(tmp_path):
    # The buffer's time axis holds 3 rollouts; writes come every 2 evaluations, 11 in all.
    config = small_config(
        system=dict(num_updates=11),
        arch=dict(num_evaluation=11),
        vault=dict(rel_dir=str(tmp_path), save_interval=2, max_length=8 * 3 * 16 + 7),
    )
    result = ippo.run_experiment(config)
    large = small_config(
        system=dict(num_updates=11),
        arch=dict(num_evaluation=11),
        vault=dict(rel_dir=str(tmp_path), uid="large"),
    )
    expected = read_vault(ippo.run_experiment(large))
    actual = read_vault(result)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert actual["done"].shape[1] == 11 * 16


def test_a_chunk_on_disk_is_a_rollout_of_as_many_rows_as_its_size_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(ippo, "MAX_CHUNK_SIZE", 6 * 16 * 2 * 3)
    rng = np.random.default_rng(0)
    experience = {"a": rng.random((8, 64, 2, 3), np.float32), "b": rng.random((8, 64)) > 0.5}
    config = ippo.VaultConfig(uid="uid", rel_dir=str(tmp_path), compression={"id": "zlib"})
    ippo.write_vault(ippo.make_vault(config, experience, 16, {}), experience)
    vault = Vault(config.name, vault_uid="uid", rel_dir=str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, vault.read().experience, experience)
    stores = vault._all_datastores
    chunks = {name: store.chunk_layout.write_chunk.shape for name, store in stores.items()}
    assert chunks == {"a": (6, 16, 2, 3), "b": (8, 16)}
    for store in stores.values():
        assert store.spec().to_json()["metadata"]["compressor"]["id"] == "zlib"


@pytest.mark.parametrize("failing", ["_add", "_write"])
def test_an_error_while_recording_ends_the_run_at_the_next_rollout_with_its_message(
    tmp_path, monkeypatch, failing
):
    method, num_calls, evaluations = getattr(ippo.Recorder, failing), itertools.count(), []

    def fail_second_time(*args):
        if next(num_calls) == 1:
            raise OSError("No space left on device")
        return method(*args)

    monkeypatch.setattr(ippo.Recorder, failing, fail_second_time)
    monkeypatch.setattr(ippo, "AFTER_EVALUATION", [lambda *args: evaluations.append(args)])
    config = small_config(
        arch=dict(num_evaluation=4), vault=dict(save_interval=1, rel_dir=str(tmp_path))
    )
    with pytest.raises(ippo.VaultError, match="No space left on device"):
        ippo.run_experiment(config)
    assert len(evaluations) == 2
    vault = Vault(config.vault.name, vault_uid="small", rel_dir=str(tmp_path))
    assert vault.vault_index == 16  # of the first rollout; what was not added is not written


def test_an_interrupted_run_keeps_what_was_recorded(tmp_path, monkeypatch):
    def interrupt(config, evaluations):
        if len(evaluations) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ippo, "AFTER_EVALUATION", [interrupt])
    config = small_config(arch=dict(num_evaluation=4), vault=dict(rel_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        ippo.run_experiment(config)
    vault = Vault(config.vault.name, vault_uid="small", rel_dir=str(tmp_path))
    assert vault.read().experience["done"].shape[1] == 3 * 16


def test_nothing_is_saved_where_that_is_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ippo.run_experiment(small_config(vault=dict(save=False)))
    assert result.vault_path is None and result.num_timesteps == 0
    assert not (tmp_path / "vaults").exists()
    assert len(result.evaluation_returns) == 2


# ------------------------------------------------------------------------------------------------
# OFFLINE
# ------------------------------------------------------------------------------------------------

NUM_AGENTS = 2


@pytest.fixture(scope="module")
def recorded(small_run):
    """The small run, and the folder of its vaults."""
    return small_run, small_run.config.vault.rel_dir


def load(rel_dir, *args, **kwargs):
    return ippo.load_episodes("ff_ippo_rware", "small", rel_dir, *args, **kwargs)


def write_synthetic_vault(rel_dir, done, num_updates, rollout_length):
    """A vault of streams whose dones are `done` (D, UB, NE, E * NU * T), as the learner records it.

    Each transition's `observation` is its number in (D, UB, NE, time).
    """
    num_devices, num_timesteps = done.shape[0], done.shape[-1]
    number = np.arange(done.size, dtype=np.int32).reshape(done.shape)
    leaves = {
        "done": np.repeat(done[..., None], NUM_AGENTS, axis=-1),
        "reward": np.repeat(number[..., None] % 7, NUM_AGENTS, axis=-1).astype(np.float32),
        "observation": number,
        "extra": {"nested": np.stack([number, -number], axis=-1)},
    }
    num_evaluations = num_timesteps // (num_updates * rollout_length)

    def evaluation(x, index):  # (D, UB, NE, time, ...) -> (D, NU, UB, T, NE, ...)
        x = x.reshape(*x.shape[:3], num_evaluations, num_updates, rollout_length, *x.shape[4:])
        return np.moveaxis(x[:, :, :, index], (3, 1, 4, 2), (1, 2, 3, 4))

    config = ippo.VaultConfig(name="synthetic", uid="uid", rel_dir=str(rel_dir))
    vault = None
    for index in range(num_evaluations):
        experience = jax.tree.map(lambda x: evaluation(x, index), leaves)
        experience = ippo.reshape_experience(experience)
        if vault is None:
            metadata = {
                "num_devices": num_devices,
                "num_updates_per_eval": num_updates,
                "system": {"rollout_length": rollout_length},
            }
            vault = ippo.make_vault(config, experience, rollout_length, metadata)
        ippo.write_vault(vault, experience)


def concatenate(parts):
    """The parts that `iterate_episodes` yields, as `load_episodes` is to give them."""
    steps = jax.tree.map(lambda *x: np.concatenate(x), *(part.steps for part in parts))
    length, episode_return, recorded_at = (
        np.concatenate([getattr(part, field) for part in parts])
        for field in ("length", "episode_return", "recorded_at")
    )
    num_cut_off = sum(part.num_cut_off for part in parts)
    start = np.cumsum(length) - length
    return ippo.Episodes(steps, start, length, episode_return, recorded_at, num_cut_off)


sizes = st.integers(1, 3)


@settings(max_examples=50, deadline=None)
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
    tmp_path_factory,
    axes,
    num_updates,
    rollout_length,
    num_evaluations,
    density,
    num_steps,
    seed,
    data,
):
    num_timesteps = num_evaluations * num_updates * rollout_length
    done = np.random.default_rng(seed).random((*axes, num_timesteps)) < density
    rel_dir = tmp_path_factory.mktemp("synthetic")
    write_synthetic_vault(rel_dir, done, num_updates, rollout_length)

    first = data.draw(st.integers(0, num_evaluations - 1), label="first evaluation")
    last = data.draw(st.integers(first + 1, num_evaluations), label="end of the evaluations")
    # Half an evaluation more, as both ends are rounded down.
    percentiles = tuple(100 * min((x + 0.5) / num_evaluations, 1.0) for x in (first, last))
    first_step, last_step = (x * num_updates * rollout_length for x in (first, last))

    # What is expected, by walking through every stream.
    expected, num_cut_off = {}, 0
    streams = done.reshape(-1, num_timesteps)
    for stream, ends in enumerate(streams):
        begin = 0 if first_step == 0 else None
        for step in range(first_step, last_step):
            if ends[step]:
                if begin is None:
                    num_cut_off += 1
                else:
                    ids = stream * num_timesteps + np.arange(begin, step + 1)
                    expected[step, stream] = begin, ids
                begin = step + 1
        num_cut_off += begin != last_step
    expected = [expected[key] for key in sorted(expected)]

    arguments = ("synthetic", "uid", str(rel_dir), percentiles)
    episodes = ippo.load_episodes(*arguments)
    parts = list(ippo.iterate_episodes(*arguments, num_steps=num_steps))
    jax.tree.map(np.testing.assert_array_equal, episodes, concatenate(parts))

    ids = np.concatenate([np.zeros(0, int), *(ids for _, ids in expected)])
    np.testing.assert_array_equal(episodes.steps["observation"], ids)
    np.testing.assert_array_equal(episodes.steps["extra"]["nested"][:, 1], -ids)
    np.testing.assert_array_equal(episodes.length, [len(ids) for _, ids in expected])
    np.testing.assert_array_equal(
        episodes.recorded_at, [begin * len(streams) for begin, _ in expected]
    )
    np.testing.assert_array_equal(episodes.episode_return, [(ids % 7).sum() for _, ids in expected])
    np.testing.assert_array_equal(episodes.start, np.cumsum(episodes.length) - episodes.length)
    assert episodes.num_cut_off == num_cut_off
    assert episodes.start.dtype == episodes.length.dtype == np.int32
    assert episodes.episode_return.dtype == np.float32


@pytest.mark.parametrize("module", [np, jnp])
def test_restore_time_order_undoes_the_interleaving(module):
    axes = num_devices, num_lanes, num_envs, num_evaluations, num_updates, length = 2, 3, 4, 5, 6, 7
    streams = np.arange(np.prod(axes)).reshape(axes)
    rows = np.moveaxis(streams, 4, 1).reshape(-1, num_evaluations * length)
    experience = {"a": module.asarray(rows), "b": {"c": module.asarray(rows)[..., None]}}
    restored = ippo.restore_time_order(experience, num_devices, num_updates, length)
    streams = streams.reshape(num_devices * num_lanes * num_envs, -1)
    assert type(restored["a"]) is type(experience["a"])
    np.testing.assert_array_equal(restored["a"], streams)
    np.testing.assert_array_equal(restored["b"]["c"], streams[..., None])


def test_streams_do_not_depend_on_the_updates_per_evaluation(recorded, tmp_path):
    result, _ = recorded
    every_update = ippo.run_experiment(
        small_config(arch=dict(num_evaluation=4), vault=dict(rel_dir=str(tmp_path)))
    )
    jax.tree.map(np.testing.assert_array_equal, read_streams(result), read_streams(every_update))


def test_episodes_are_those_that_training_logged(recorded):
    result, rel_dir = recorded
    logged = np.concatenate([evaluation.train_episode_return for evaluation in result.evaluations])
    episodes = load(rel_dir)
    np.testing.assert_array_equal(np.sort(episodes.episode_return), np.sort(logged))

    rewards = np.split(episodes.steps["reward"].mean(axis=1), episodes.start[1:])
    np.testing.assert_array_equal([x.sum() for x in rewards], episodes.episode_return)
    ends = np.flatnonzero(episodes.steps["done"][:, 0])
    np.testing.assert_array_equal(ends, episodes.start + episodes.length - 1)
    assert episodes.length.max() == result.config.env.time_limit

    second_half = load(rel_dir, (50, 100))
    assert second_half.recorded_at.min() >= result.num_timesteps // 2
    assert second_half.num_cut_off > 0


def test_only_the_leaves_asked_for_are_returned(recorded):
    _, rel_dir = recorded
    episodes = load(rel_dir, leaves=("action",))
    assert set(episodes.steps) == {"action"}
    np.testing.assert_array_equal(episodes.episode_return, load(rel_dir).episode_return)


@pytest.mark.parametrize("percentiles", [(0, 49), (60, 40), (50, 101), (-60, 50)])
def test_percentiles_without_an_evaluation_are_refused(recorded, percentiles):
    _, rel_dir = recorded
    with pytest.raises(ippo.ConfigError, match="percentiles"):
        load(rel_dir, percentiles)


def test_a_missing_vault_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="ff_ippo_rware/small"):
        load(str(tmp_path))


def test_exported_vault_has_og_marl_layout(recorded):
    result, rel_dir = recorded
    episodes = load(rel_dir)
    num_steps = len(episodes.steps["done"])
    vault = Vault(
        vault_name="tiny-2ag.vlt",
        rel_dir=f"{rel_dir}/ff_ippo_rware_small/rware",
        vault_uid="Replay",
    )
    exported = vault.read().experience
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), exported) == {
        "observations": ((1, num_steps, 2, 66), "float32"),
        "actions": ((1, num_steps, 2), "int32"),
        "rewards": ((1, num_steps, 2), "float32"),
        "terminals": ((1, num_steps, 2), "bool"),
        "truncations": ((1, num_steps, 2), "bool"),
        "infos": {
            "legals": ((1, num_steps, 2, 5), "bool"),
            "state": ((1, num_steps, 132), "float32"),
        },
    }
    exported = jax.tree.map(lambda x: np.asarray(x[0]), exported)
    observation = episodes.steps["observation"]
    np.testing.assert_array_equal(
        observation[..., :2], np.broadcast_to(np.eye(2), (num_steps, 2, 2))
    )
    np.testing.assert_array_equal(exported["observations"], observation[..., 2:])
    np.testing.assert_array_equal(exported["infos"]["state"][:, 66:], observation[:, 1, 2:])
    np.testing.assert_array_equal(exported["actions"], episodes.steps["action"])
    np.testing.assert_array_equal(exported["rewards"], episodes.steps["reward"])
    np.testing.assert_array_equal(exported["infos"]["legals"], episodes.steps["legal_action_mask"])

    # An episode of 10 timesteps ran into the time limit, a shorter one ended in a collision.
    last = episodes.start + episodes.length - 1
    np.testing.assert_array_equal(exported["truncations"][last, 0], episodes.length == 10)
    np.testing.assert_array_equal(exported["terminals"][last, 0], episodes.length < 10)
    assert exported["terminals"].sum() + exported["truncations"].sum() == 2 * len(last)
    assert exported["terminals"].any() and exported["truncations"].any()
    metadata = json.loads((ippo.Path(vault._base_path) / "metadata.json").read_text())
    assert metadata["recording"]["system"]["seed"] == result.config.system.seed


def test_existing_export_is_refused(recorded):
    _, rel_dir = recorded
    with pytest.raises(ippo.ConfigError, match="tiny-2ag.vlt/Replay"):
        ippo.export_og_marl("ff_ippo_rware", "small", rel_dir)


def test_parts_are_exported_within_a_running_event_loop(recorded):
    _, rel_dir = recorded

    async def export():
        return ippo.export_og_marl("ff_ippo_rware", "small", rel_dir, part="Good")

    path = asyncio.run(export())
    good = Vault(vault_name=path.parent.name, rel_dir=str(path.parent.parent), vault_uid="Good")
    steps = load(rel_dir, ippo.OG_MARL_PARTS["Good"]).steps
    np.testing.assert_array_equal(good.read().experience["actions"][0], steps["action"])


def test_joint_saco_counts_distinct_pairs(recorded):
    _, rel_dir = recorded
    steps = load(rel_dir).steps
    num_steps = len(steps["done"])
    pairs = np.concatenate(
        [steps[leaf].reshape(num_steps, -1) for leaf in ("observation", "action")], axis=1
    )
    expected = len(np.unique(pairs, axis=0)) / num_steps
    assert ippo.joint_saco("ff_ippo_rware", "small", rel_dir) == expected
    assert 0 < expected < 1


def test_nothing_is_exported_unless_asked_for(recorded):
    result, rel_dir = recorded
    config = dataclasses.replace(
        result.config, vault=dataclasses.replace(result.config.vault, og_marl=False)
    )
    ippo.export_after_run(result._replace(config=config))  # would be refused


# ------------------------------------------------------------------------------------------------
# RESULTS
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results_run(tmp_path_factory):
    """A short run with all results, the metrics on disk after each evaluation, and the states."""
    folder = tmp_path_factory.mktemp("results_run")
    config = small_config(
        arch=dict(absolute_metric=True, num_absolute_metric_eval_episodes=8),
        vault=dict(rel_dir=str(folder / "vaults")),
        results=dict(save=True, animation=True, rel_dir=str(folder / "results")),
    )
    seen, states = [], []
    play_episode = ippo.play_episode

    def keep_states(config, actor_params):
        states.extend(play_episode(config, actor_params))
        return states

    def read_metrics(config, evaluations):
        seen.append(json.loads((ippo.results_path(config) / "metrics.json").read_text()))

    backend = matplotlib.get_backend(auto_select=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ippo, "AFTER_EVALUATION", [*ippo.AFTER_EVALUATION, read_metrics])
        monkeypatch.setattr(ippo, "play_episode", keep_states)
        result = ippo.run_experiment(config)
    assert matplotlib.get_backend(auto_select=False) == backend
    assert pyplot.get_fignums() == []
    return result, ippo.results_path(result.config), seen, states


def test_results_lie_beside_the_vault(results_run):
    result, path, *_ = results_run
    names = {"metrics.json", "learning_curve.png", "dataset.png", "episode.gif"}
    assert {file.name for file in path.iterdir()} == names
    assert path.parts[-3:] == ("results", "ff_ippo_rware", result.config.vault.uid)
    assert result.vault_path not in (path, *path.parents)
    assert [folder.name for folder in result.vault_path.parent.iterdir()] == [path.name]


def test_metrics_are_those_of_the_evaluations(results_run):
    result, path, *_ = results_run
    metrics = json.loads((path / "metrics.json").read_text())
    run = metrics["RobotWarehouse"]["tiny-2ag"]["ff_ippo"]["seed_42"]
    assert run.pop("absolute_metrics") == {"mean_episode_return": [result.absolute_metric]}
    assert list(run) == ["step_0", "step_1"]
    for step, evaluation in zip(run.values(), result.evaluations, strict=True):
        assert step == {
            "step_count": evaluation.step_count,
            "elapsed_time": evaluation.elapsed_time,
            "mean_episode_return": [float(evaluation.episode_return.mean())],
            "steps_per_second": [evaluation.steps_per_second],
        }


def test_metrics_can_be_read_after_each_evaluation(results_run):
    _, _, seen, _ = results_run
    steps = [list(x["RobotWarehouse"]["tiny-2ag"]["ff_ippo"]["seed_42"]) for x in seen]
    assert steps == [["step_0"], ["step_0", "step_1"]]


def test_metrics_are_never_half_written(results_run, tmp_path, monkeypatch):
    result, *_ = results_run
    results = ippo.ResultsConfig(rel_dir=str(tmp_path))
    config = dataclasses.replace(result.config, results=results)
    ippo.write_metrics(config, result.evaluations[:1])
    path = ippo.results_path(config) / "metrics.json"
    before = path.read_text()

    def dump_half(metrics, file):
        file.write(json.dumps(metrics)[:20])
        raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(ippo.json, "dump", dump_half)
        with pytest.raises(OSError, match="No space"):
            ippo.write_metrics(config, result.evaluations)
    assert path.read_text() == before
    ippo.write_metrics(config, result.evaluations)
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_pictures_have_their_size(results_run):
    _, path, *_ = results_run
    for name, size in {"learning_curve.png": (1275, 825), "dataset.png": (1275, 570)}.items():
        with Image.open(path / name) as picture:
            assert picture.size == size
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10  # not blank


def test_animation_is_one_episode(results_run):
    result, path, _, states = results_run
    assert [int(state.step_count) for state in states] == list(range(1, len(states) + 1))
    assert len(states) <= result.config.env.time_limit
    with Image.open(path / "episode.gif") as gif:
        assert 1 < gif.n_frames <= len(states)  # frames alike are merged


def test_nothing_is_saved_where_results_are_off(results_run, tmp_path, monkeypatch):
    result, *_ = results_run
    monkeypatch.chdir(tmp_path)
    results = ippo.ResultsConfig(save=False, animation=True)
    result = result._replace(config=dataclasses.replace(result.config, results=results))
    ippo.write_metrics(result.config, result.evaluations)
    ippo.save_results(result)
    assert list(tmp_path.iterdir()) == []


def test_results_without_a_vault(results_run, tmp_path, monkeypatch):
    result, *_ = results_run
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(result.config, results=ippo.ResultsConfig())
    ippo.save_results(result._replace(config=config, vault_path=None, absolute_metric=None))
    names = {file.name for file in ippo.results_path(config).iterdir()}
    assert names == {"metrics.json", "learning_curve.png"}
    assert "absolute_metrics" not in (ippo.results_path(config) / "metrics.json").read_text()


# ------------------------------------------------------------------------------------------------
# CONFIGURATION
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(env=dict(scenario="huge-9ag")), "env.scenario 'huge-9ag' is unknown: .*tiny-2ag"),
        (dict(system=dict(num_updates=5)), "num_updates is 5: .* multiple of arch.num_evaluation"),
        (dict(system=dict(num_updates=1)), "num_updates is 1: .* multiple of arch.num_evaluation"),
        (dict(system=dict(num_updates=0)), "system.num_updates is 0: it must be at least 1"),
        (dict(system=dict(total_timesteps=0)), "system.total_timesteps is 0"),
        (dict(system=dict(num_minibatches=5)), "num_minibatches is 5: it must divide .* 64"),
        (dict(system=dict(rollout_length=-1)), "system.rollout_length is -1"),
        (dict(system=dict(seed=-1)), "system.seed is -1: it must be from 0 to"),
        (dict(system=dict(gamma=1.5)), "system.gamma is 1.5: it must be from 0 to 1"),
        (dict(system=dict(actor_lr=0.0)), "system.actor_lr is 0.0: it must be above 0"),
        (dict(arch=dict(num_envs=0)), "arch.num_envs is 0"),
        (dict(arch=dict(num_eval_episodes=0)), "arch.num_eval_episodes is 0"),
        (dict(env=dict(time_limit=0)), "env.time_limit is 0"),
        (dict(network=dict(actor_layer_sizes=(8, 0))), "network.actor_layer_sizes is"),
        (dict(vault=dict(save_interval=0)), "vault.save_interval is 0"),
        # 16 rows of (5 + 1) * 16 timesteps
        (dict(vault=dict(max_length=1535)), "vault.max_length is 1535: .* at least 1536"),
        (dict(vault=dict(compression={"id": "zip"})), "vault.compression .* is unknown"),
        (dict(vault=dict(rel_dir=__file__ + "/x")), "vault.rel_dir .* cannot be written"),
        (dict(vault=dict(extra_leaves=("q_value",))), "'q_value' is unknown: .*log_prob, value"),
        (
            dict(results=dict(save=True, rel_dir=__file__ + "/x")),
            "results.rel_dir .* cannot be written",
        ),
        (dict(results=dict(save=True, rel_dir="vaults")), "is that of the vaults"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_created(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ippo, "make_env", None)  # would be the first thing to be called
    with pytest.raises(ippo.ConfigError, match=message) as error:
        ippo.run_experiment(small_config(**changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_smallest_buffer_that_loses_nothing_is_accepted():
    config = small_config(vault=dict(max_length=1536))
    assert ippo.check_config(config, num_devices=1).vault.max_length == 1536


def test_an_existing_vault_is_left_untouched(small_run):
    files = {file: file.read_bytes() for file in small_run.vault_path.rglob("*") if file.is_file()}
    with pytest.raises(ippo.ConfigError, match="vault.uid 'small' exists already"):
        ippo.run_experiment(small_run.config)
    assert all(file.read_bytes() == content for file, content in files.items())


def test_total_timesteps_is_rounded_up_to_whole_evaluations(tmp_path, capsys):
    # An update is 2 lanes * 4 environments * 16 timesteps = 128 steps, an evaluation at least one.
    config = small_config(
        system=dict(total_timesteps=257, num_updates=999), vault=dict(rel_dir=str(tmp_path))
    )
    result = ippo.run_experiment(config)
    assert result.config.system.num_updates == 4 and result.num_timesteps == 512
    assert "system.total_timesteps 257 is rounded up to whole evaluations: 512" in (
        capsys.readouterr().out
    )


def test_devices_must_divide_the_evaluation_episodes():
    with pytest.raises(ippo.ConfigError, match="multiple of the number of devices, 3"):
        ippo.check_config(small_config(arch=dict(num_eval_episodes=4)), num_devices=3)


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
    run = run_script(
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
        for name, digest in zip(LEAVES, digests.split()):
            part = np.ascontiguousarray(experience[name][update * rows : (update + 1) * rows])
            assert hashlib.sha256(part.tobytes()).hexdigest()[:16] == digest, (update, name)


def test_the_command_line_refuses_in_one_line(tmp_path):
    run = run_script("--env.scenario", "huge-9ag", cwd=tmp_path)
    assert run.returncode != 0
    assert run.stderr.splitlines() == [
        "error: env.scenario 'huge-9ag' is unknown: choose one of "
        "tiny-2ag, tiny-4ag, tiny-4ag-easy, small-4ag"
    ]


def test_without_its_optional_sections_the_script_trains_and_records(tmp_path):
    text = SCRIPT.read_text()
    rule = "# " + "-" * 96 + "\n"
    kept, optional = text.split(f"{rule}# OFFLINE")
    command_line = optional.split(f"{rule}# COMMAND LINE")[1]
    script = tmp_path / "script.py"
    script.write_text(f"{kept}{rule}# COMMAND LINE{command_line}")
    assert len(script.read_text().splitlines()) < 0.9 * len(text.splitlines())
    run = subprocess.run(
        [sys.executable, str(script), *SMALL_ARGUMENTS, "--vault.uid", "cut"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    vault = Vault("ff_ippo_rware", vault_uid="cut", rel_dir=str(tmp_path / "vaults"))
    assert vault.read().experience["done"].shape == (16, 32, 2)


def test_two_devices_of_one_lane_record_what_one_device_of_two_lanes_records(tmp_path):
    learning_rate = 0.01  # so that who leaves out the other device's gradients soon acts otherwise
    run = run_script(
        *SMALL_ARGUMENTS,
        *f"--system.actor-lr {learning_rate} --system.update-batch-size 1 --vault.uid two".split(),
        cwd=tmp_path,
        JAX_NUM_CPU_DEVICES="2",
    )
    assert run.returncode == 0, run.stderr
    vault = Vault("ff_ippo_rware", vault_uid="two", rel_dir=str(tmp_path / "vaults"))
    two = vault.read().experience
    one = ippo.run_experiment(
        small_config(
            system=dict(actor_lr=learning_rate),
            vault=dict(uid="one", rel_dir=str(tmp_path / "vaults")),
        )
    )
    for name, rows in read_vault(one).items():
        expected = rows.reshape(2, 2, 4, *rows.shape[1:]).swapaxes(0, 1)  # (NU, UB, NE, ...)
        np.testing.assert_array_equal(np.asarray(two[name]).reshape(expected.shape), expected)


# ------------------------------------------------------------------------------------------------
# NOTEBOOK AND README
# ------------------------------------------------------------------------------------------------


def readme_code(heading, language="python"):
    """The code blocks of a section of the README."""
    section = re.split(r"^## ", (FOLDER / "README.md").read_text(), flags=re.M)
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
    config = (
        "Config(SystemConfig(num_updates=4, rollout_length=16), "
        "ArchConfig(num_envs=4, num_evaluation=2, num_eval_episodes=4, absolute_metric=False), "
        "EnvConfig(time_limit=10), vault=VaultConfig(uid='pasted'))"
    )
    pasted, run, shown = run_notebook(
        tmp_path,
        SCRIPT.read_text(),
        f"result = run_experiment({config})",
        "print(result.num_timesteps, len(result.evaluation_returns))",
    )
    assert "run_experiment(Config())" in pasted
    assert "2/2" in run, "no progress bar"
    assert shown.split() == ["512", "2"]
    vault = Vault("ff_ippo_rware", vault_uid="pasted", rel_dir=str(tmp_path / "vaults"))
    assert vault.read().experience["done"].shape == (16, 32, 2)


def test_percent_run_and_import_work_in_a_notebook(tmp_path):
    *_, shown = run_notebook(
        tmp_path,
        f"%run {SCRIPT} {' '.join(SMALL_ARGUMENTS)} --vault.uid percent",
        "from ff_ippo_store_experience import Config, run_experiment",
        "from flashbax.vault import Vault\n"
        "vault = Vault('ff_ippo_rware', vault_uid='percent')\n"
        "print(vault.read().experience['done'].shape)",
    )
    assert "(16, 32, 2)" in shown


def test_readme_notebook_cells(tmp_path):
    run_notebook(tmp_path, *readme_code("In a notebook"))
    assert len(list(tmp_path.glob("vaults/*/*/metadata.json"))) == 1


def test_readme_reads_the_vault_back(small_run):
    vault = small_run.config.vault
    (code,) = readme_code("Reading the vault")
    code = code.replace('"demo"', repr(vault.uid))
    run = subprocess.run(
        [sys.executable, "-c", code + "\nassert experience['done'].shape == (16, 32, 2)"],
        cwd=Path(vault.rel_dir).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "(16, 32, 2, 68)" in run.stdout


def test_readme_learns_offline(recorded, monkeypatch, capsys):
    _, rel_dir = recorded
    monkeypatch.chdir(Path(rel_dir).parent)
    code = readme_code("Training offline")[-1]
    for name, value in (("UID", '"small"'), ("NUM_STEPS", "20"), ("NUM_EPISODES", "4")):
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", code, flags=re.M)
        assert count == 1, name
    code = re.sub(r"^PERCENTILES = .*$", "PERCENTILES = (50, 100)", code, flags=re.M)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "behaviour" in printed and printed.count("cloning_loss") == 3


def test_readme_names_every_field_of_the_configuration():
    (section,) = [
        text
        for text in re.split(r"^## ", (FOLDER / "README.md").read_text(), flags=re.M)
        if text.startswith("Configuration")
    ]
    in_readme = dict(re.findall(r"^\| `(\w+\.\w+)` \| `(.*?)` \|", section, re.M))
    config = dataclasses.asdict(ippo.Config())
    expected = {
        f"{group}.{name}": str(value)
        for group, fields in config.items()
        for name, value in fields.items()
    }
    assert in_readme == expected


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

    def products(sizes):  # multiplications and additions of the layers, forward, for one row
        return 2 * sum(math.prod(pair) for pair in zip(sizes, sizes[1:]))

    system, network = config.system, config.network
    rows = system.rollout_length * system.update_batch_size * config.arch.num_envs * num_agents
    flops = 0
    for layers, outputs in (
        (network.actor_layer_sizes, num_actions),
        (network.critic_layer_sizes, 1),
    ):
        sizes = (num_features, *layers, outputs)
        # Backward it is the same again for the weights, and for all inputs but the observation.
        backward = products(sizes) + products(sizes[1:])
        flops += rows * (products(sizes) + system.ppo_epochs * (products(sizes) + backward))
    return flops + rows * products((num_features, *network.actor_layer_sizes, num_actions))


def benchmark(config):
    """Print the figures of this machine, each the median of several repeats, as a table."""
    compiled = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    logging.getLogger("jax").propagate = False
    with jax.log_compiles():
        env, agent, state, learn, mesh = learner_parts(config)
        state = jax.block_until_ready(learn(state)).state
        first_update = time.perf_counter() - START
        for _ in range(3):
            state = jax.block_until_ready(learn(state)).state
    logging.getLogger("jax").removeHandler(handler)
    num_compiled = sum(bool(re.search(r"Compiling .*\blearn\b", text)) for text in compiled)

    output = learn(state)
    num_updates = output.experience["done"].shape[1]
    steps_per_call = math.prod(output.experience["done"].shape[:5])
    env_steps, env_steps_no_reset = (original_env_steps(config, x) for x in (True, False))
    x = jnp.ones((4096, 4096))
    matmul = jax.jit(jnp.matmul)
    folder = tempfile.TemporaryDirectory()
    vault = dataclasses.replace(config.vault, rel_dir=folder.name)
    recorder = ippo.Recorder(vault, output.experience, {}, mesh)
    rollout = jax.device_get(ippo.reshape_experience(output.experience))
    written = jax.tree.map(
        lambda x: np.concatenate([x] * config.vault.save_interval, axis=1), rollout
    )

    def block(record):  # what lies between two writes, which is beside the calls after the first
        nonlocal state
        for index in range(config.vault.save_interval):
            output = jax.block_until_ready(learn(state))
            state = output.state
            if record:
                recorder.add(output.experience)
                if index == 0:
                    recorder.write()
        if record:
            recorder.wait()

    measured = {
        "env": (env_steps,),
        "env, no reset": (env_steps_no_reset,),
        "matmul": (matmul, x, x),
        "train": (block, False),
        "record": (block, True),
        "vault": (ippo.write_vault, recorder.vault, written),
    }
    times = collections.defaultdict(list)
    for _ in range(REPEATS + 1):  # all figures in turn, so that a slow moment meets them all
        for name, call in measured.items():
            times[name].append(seconds(*call))
    size = sum(file.stat().st_size for file in recorder.path.rglob("*") if file.is_file())
    bytes_per_step = size / (recorder.vault.vault_index * recorder.num_rows)
    times = {name: np.median(values[1:]) for name, values in times.items()}  # the first compiles

    num_env_steps = (
        config.system.rollout_length * config.system.update_batch_size * config.arch.num_envs
    )
    block_steps = config.vault.save_interval * steps_per_call
    train, record = block_steps / times["train"], block_steps / times["record"]
    env_speed = num_env_steps / times["env"]
    matmul_speed = 2 * 4096**3 / times["matmul"]
    observation = ippo.observation_shape(env)
    flops = mesh.size * count_update_flops(
        config, *observation.action_mask.shape, observation.agents_view.shape[1]
    )
    update_time = times["train"] / (config.vault.save_interval * num_updates)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    device_memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    rows = {
        "train": f"{train:,.0f} steps/s",
        "record": f"{record:,.0f} steps/s",
        "env": f"{env_speed:,.0f} steps/s",
        "env, no reset": f"{num_env_steps / times['env, no reset']:,.0f} steps/s",
        "matmul": f"{matmul_speed / 1e9:,.0f} GFLOP/s; the update "
        f"{flops / update_time / 1e9:,.0f}, "
        f"{100 * flops / update_time / matmul_speed:.0f} % of that",
        "train / env": f"{train / env_speed:.2f}",
        "record / train": f"{record / train:.3f}",
        "compile": f"{first_update:.1f} s from start to the first update, "
        f"learner compiled {num_compiled} time(s)",
        "memory": f"{memory / 1e9:.2f} GB resident"
        + (f", {device_memory / 1e9:.2f} GB on the device" if device_memory else ""),
        "vault": f"{block_steps / times['vault']:,.0f} steps/s "
        f"written, {bytes_per_step:.1f} bytes per step on disk",
    }
    growing = {}
    for num_envs in (16, 64, 256, 1024):
        arch = dataclasses.replace(config.arch, num_envs=num_envs)
        system = dataclasses.replace(config.system, num_updates=config.arch.num_evaluation)
        larger = dataclasses.replace(config, arch=arch, system=system)
        _, _, state, learn, _ = learner_parts(larger)
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
    steps = mesh.size * config.system.rollout_length * config.system.update_batch_size * 1024
    for num_envs in growing:
        rows[f"train, num_envs {num_envs}"] = f"{steps / np.median(times[num_envs]):,.0f} steps/s"
    folder.cleanup()
    print(
        f"{os.cpu_count()} cores, {mesh.size} x {jax.devices()[0].device_kind}, "
        f"JAX {jax.__version__}\n"
    )
    print("| figure | |\n| --- | --- |")
    for name, text in rows.items():
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    import tyro

    benchmark(ippo.check_config(tyro.cli(ippo.Config), len(jax.devices())))
