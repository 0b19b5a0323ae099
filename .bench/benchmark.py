# SPDX-License-Identifier: Apache-2.0
"""Print the figures of this machine as a table: `python .bench/benchmark.py`.

It takes the flags of the script; `--checkpoint.load-params vaults/NAME/UID` adds the speed with the
parameters of that run.
"""
# ruff: noqa: E402

import time

START = time.perf_counter()  # "compile" counts from here

import collections
import dataclasses
import functools
import itertools
import logging
import math
import os
import re
import resource
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jumanji.environments import LevelBasedForaging, RobotWarehouse

import ff_ippo_store_experience as ippo

REPEATS = 20


def seconds(function, *arguments):
    """How long a call takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def medians(calls, repeats):
    """The median time of each call, all in turn, so that a slow moment meets them all."""
    times = collections.defaultdict(list)
    for _ in range(repeats + 1):
        for name, call in calls.items():
            times[name].append(seconds(*call))
    return {name: float(np.median(values[1:])) for name, values in times.items()}  # first: compiles


def original_env_steps(config, auto_reset):
    """Steps of Jumanji's environment alone, with random legal actions, as the original does them.

    Returns a function of nothing that makes T steps of UB * NE environments, on one device.
    """
    env = ippo.TASKS[config.env.scenario].make(config.env.time_limit).unwrapped
    original = RobotWarehouse if isinstance(env, RobotWarehouse) else LevelBasedForaging
    env = original(env._generator, time_limit=config.env.time_limit)
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


def make_learner(config):
    """What `run_experiment` builds before it trains: the progress, the learner and the mesh."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    env = ippo.make_env(**vars(config.env), add_agent_id=config.system.add_agent_id)
    num_updates = config.system.num_updates // config.arch.num_evaluation
    select = functools.partial(ippo.select_leaves, extra_leaves=config.vault.extra_leaves)
    learn = ippo.make_learn(env, config.system, num_updates, mesh, select)
    return ippo.init_progress(config, env, mesh), learn, mesh


def benchmark(config, load_params):
    """Print the figures, each the median of several repeats."""
    compiled, handler = [], logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    logging.getLogger("jax").propagate = False
    with jax.log_compiles():
        progress, learn, mesh = make_learner(config)
        state = jax.block_until_ready(learn(progress.state)).state
        first_update = time.perf_counter() - START
        for _ in range(3):
            state = jax.block_until_ready(learn(state)).state
    logging.getLogger("jax").removeHandler(handler)
    num_compiled = sum(bool(re.search(r"Compiling .*\blearn\b", text)) for text in compiled)

    system = config.system
    experience = jax.eval_shape(learn, state).experience
    num_updates, *_, num_agents, num_actions = experience["legal_action_mask"].shape[1:]
    metadata = ippo.make_metadata(config, ippo.find_task(config.env.scenario), state.env_state)
    path = ippo.check_folder(config.vault, resume=False)
    recorder = ippo.Recorder(path, metadata, experience, mesh)
    save_interval, num_rows = recorder.save_interval, recorder.rows["done"].shape[0]
    length = save_interval * system.rollout_length
    evaluation = ippo.Evaluation(10**6, 1.0, 1.0, np.zeros(32, np.float32), np.zeros(32), 0.0, {})
    evaluations = [evaluation] * 10_000

    def block(state, record=False):  # what lies between two writes, which is beside the later calls
        nonlocal progress
        stored = disk.submit(int)
        for _ in range(save_interval):
            output = jax.block_until_ready(learn(state))
            state = output.state
            if record:  # as `run_experiment` does
                done = [*progress.evaluations, evaluation]
                progress = progress._replace(state=state, evaluations=done)
                stored.result()
                stored = disk.submit(recorder.store, output.experience, progress)
        stored.result()

    def write(vault):
        ippo.append_to_vault(vault, recorder.writer.state.experience, length)

    x = jnp.ones((4096, 4096))
    calls = {
        "env": (original_env_steps(config, auto_reset=True),),
        "env, no reset": (original_env_steps(config, auto_reset=False),),
        "matmul": (jax.jit(jnp.matmul), x, x),
        "train": (block, state),  # each time from the state after a few updates
        "record": (block, state, True),
    }
    if load_params:
        trained = ippo.with_params(progress, load_params, mesh).state
        calls["trained"] = (block, state._replace(actor=trained.actor, critic=trained.critic))
    with recorder.open(progress) as progress, ThreadPoolExecutor(1) as disk:
        vault_path = recorder.path / "vault"
        vault = ippo.make_vault(vault_path, recorder.rows, system.rollout_length, {})
        calls["vault"] = (write, vault)
        calls["metrics"] = (ippo.write_metrics, recorder.path, metadata, evaluations)
        times = medians(calls, REPEATS)
    size = sum(file.stat().st_size for file in vault_path.rglob("*") if file.is_file())
    bytes_per_step = size / (vault.vault_index * num_rows)

    steps = dict.fromkeys(calls, length * num_rows)
    num_env_steps = system.rollout_length * system.update_batch_size * config.arch.num_envs
    steps |= {"env": num_env_steps, "env, no reset": num_env_steps}
    speed = {name: steps[name] / times[name] for name in calls}
    matmul_speed = 2 * 4096**3 / times["matmul"]
    num_features = experience["observation"].shape[-1]
    flops = count_update_flops(config, num_agents, num_actions, num_features)
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
    if load_params:
        rows["train, trained policy"] = (
            f"{speed['trained']:,.0f} steps/s with {load_params}, "
            f"{times['trained'] / times['train']:.2f} times the time"
        )

    def train_with(num_envs, learn, state):  # as many steps whatever the number of environments
        for _ in range(1024 // num_envs):
            state = jax.block_until_ready(learn(state)).state

    growing = {}
    for num_envs in (16, 64, 256, 1024):
        arch = dataclasses.replace(config.arch, num_envs=num_envs)
        larger = dataclasses.replace(system, num_updates=config.arch.num_evaluation)
        first, learn, _ = make_learner(dataclasses.replace(config, arch=arch, system=larger))
        state = learn(learn(first.state).state).state
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
    with tempfile.TemporaryDirectory() as folder:
        given = tyro.cli(ippo.Config)
        vault = dataclasses.replace(given.vault, rel_dir=folder)
        config = dataclasses.replace(given, vault=vault, checkpoint=ippo.CheckpointConfig())
        config = ippo.check_config(config, len(jax.devices()))
        benchmark(config, given.checkpoint.load_params)
