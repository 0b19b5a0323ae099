# SPDX-License-Identifier: Apache-2.0
"""Tests of ff_ippo_store_experience.py: `pytest test_script.py`."""

import os

# XLA compiles faster, for programs that are seldom run; the test of the original's data does not.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import ast
import asyncio
import builtins
import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import distrax
import gymnax
import jax
import jax.numpy as jnp
import jaxmarl
import nbformat
import numpy as np
import optax
import pytest
import tyro
from flashbax.vault import Vault
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxmarl.environments.smax import map_name_to_scenario
from jumanji import specs
from jumanji.env import Environment
from jumanji.environments import Cleaner, LevelBasedForaging, RobotWarehouse
from jumanji.types import StepType, restart
from matplotlib.image import imread
from nbclient import NotebookClient

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

# A run of a second or two: 2 evaluations of 2 updates, 2 batches of 4 environments, of `Walk`.
SMALL = """
    --system.num-updates 4 --system.rollout-length 16 --arch.num-evaluation 2 --arch.num-envs 4
    --arch.num-eval-episodes 4 --arch.num-absolute-metric-eval-episodes 8 --env.scenario walk
    --env.time-limit 10 --network.actor-layer-sizes 8 --network.critic-layer-sizes 8 --vault.uid a
"""
RESUME, RUN = " --checkpoint.resume ", "vaults/ff_ippo_walk/a"

WalkState = collections.namedtuple("WalkState", "position step_count key")  # (N,), (), (2,)
View = collections.namedtuple("View", "agents_view")  # (N, 3)


class Walk(Environment):
    """Your own environment: agents on a line, each paid for being near the middle.

    Actions 0, 1, 2 lead left, nowhere, right.  An episode terminates when the first agent reaches
    3, and is cut off at the time limit.  One feature is random.  An agent below -1 is lost: its own
    discount is 0, which says nothing of the others.  Of agents without a mask, every second one
    cannot go right; three of them have a global state.
    """

    time_limit = 10
    action_spec = observation_spec = None

    def __init__(self, num_agents, is_masked, is_team):
        self.num_agents, self.is_masked, self.is_team = num_agents, is_masked, is_team
        self.action_spec = specs.MultiDiscreteArray(3 - np.arange(num_agents) % 2)
        super().__init__()

    def observe(self, state):
        x = state.position
        key = jax.random.fold_in(state.key, state.step_count)
        view = jnp.stack([x, x**2, jax.random.randint(key, x.shape, 0, 9)], axis=1)  # integers
        legal = jnp.stack([x > -3, x == x, x < 3], axis=1)
        global_state = x if self.num_agents == 3 else None
        return ippo.Observation(view, legal, global_state) if self.is_masked else View(view)

    def reset(self, key):
        key, position_key = jax.random.split(key)
        position = jax.random.randint(position_key, (self.num_agents,), -1, 2)
        state = WalkState(position, jnp.int32(0), key)
        return state, restart(self.observe(state), shape=() if self.is_team else self.num_agents)

    def step(self, state, action):
        position = state.position + action - 1
        state = WalkState(position, state.step_count + 1, state.key)
        terminated = position[0] >= 3
        truncated = state.step_count >= Walk.time_limit
        reward = 2 - jnp.abs(position).astype(jnp.float32)
        discount = jnp.where(terminated, 0.0, (position >= -1).astype(jnp.float32))
        if self.is_team:
            reward, discount = reward.sum(), discount.max()
        step_type = jnp.where(terminated | truncated, StepType.LAST, StepType.MID)
        timestep = restart(self.observe(state))
        return state, timestep.replace(step_type=step_type, reward=reward, discount=discount)


TASKS = dict(ippo.TASKS)  # those of the script; here also two that are small
WALK = ippo.Task(lambda _: Walk(2, True, False), 10, "Walk", "walk")
ippo.TASKS["walk"] = WALK  # and one in which a random policy eats now and then
ippo.TASKS["tiny-lbf"] = ippo.lbf_task(grid_size=6, fov=2, num_agents=3, num_food=1)


# The configuration of the command line SMALL, changed by arguments.
small_config = lambda more="": tyro.cli(ippo.Config, args=[*SMALL.split(), *more.split()])


def experiment(folder, arguments="", env=None):
    """What `run_experiment` gives for SMALL and `arguments` in `folder`."""
    Path(folder).mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        return ippo.run_experiment(small_config(arguments), env)


assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)  # two trees
mean_returns = lambda result: [x.episode_return.mean() for x in result.evaluations]
snapshot = lambda path: {x: x.is_file() and x.read_bytes() for x in Path(path).rglob("*")}
where = lambda path: (path.parent.name, path.name, str(path.parents[1]))  # name, uid, rel_dir


def open_with_flashbax(path):
    """A vault as one who has only Flashbax opens it."""
    name, uid, rel_dir = where(Path(path))
    with contextlib.redirect_stdout(io.StringIO()):
        return Vault(name, vault_uid=uid, rel_dir=rel_dir)


def read_vault(path):
    """Leaves (D * NU * UB * NE, E * T, ...) of a vault, as NumPy arrays."""
    return jax.tree.map(np.asarray, open_with_flashbax(path).read().experience)


# Leaves (UB * NE, E * NU * T, ...) of a vault of one device: one environment a row.
read_streams = lambda path: ippo.restore_time_order(read_vault(path), 1, 2, 16)


def read_metrics(path):
    """What `metrics.json` in the folder of a run says of it, without the times."""
    times = r'"(elapsed_time|steps_per_second)": \[?[^],}]*\]?'
    return json.loads(re.sub(times, r'"\1": 0', (path / "metrics.json").read_text()))


def check_equal(path, other):
    """Two runs have the same recording, parameters and metrics."""
    assert_equal(read_vault(path), read_vault(other))
    assert_equal(ippo.load_params(path), ippo.load_params(other))
    assert read_metrics(path) == read_metrics(other)


def jumanji_env(scenario, time_limit):
    """Jumanji's own environment of a scenario, without anything of ours."""
    env = ippo.TASKS[scenario].make(time_limit).unwrapped
    make = RobotWarehouse if isinstance(env, RobotWarehouse) else LevelBasedForaging
    return make(env._generator, time_limit=time_limit)


@pytest.fixture(scope="session", autouse=True)
def hang_up():
    """Do not ignore SIGHUP, even where the tests run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Many tests build the same learner: XLA compiles it once, also for other processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, with a folder of its own
        folder = folder.parent
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compilation_cache"))
    options = {"compilation_cache_dir": folder, "persistent_cache_min_compile_time_secs": 0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in options.items():
            jax.config.update(f"jax_{name}", value)
            monkeypatch.setenv(f"jax_{name}".upper(), str(value))
        monkeypatch.setenv("PYTHONPATH", str(FOLDER))
        yield


def evaluations(num_evaluations):
    """Arguments of a run of as many evaluations, two updates each, written two at a time."""
    count = f"--system.num-updates {2 * num_evaluations} --arch.num-evaluation {num_evaluations} "
    return count + "--vault.save-interval 2 --system.seed 2 "


FIVE, ENDLESS, EVALUATION_STEPS = evaluations(5), evaluations(10**5), 2 * 8 * 16


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """How an uninterrupted small run of 5 evaluations begins, and its result."""
    folder = tmp_path_factory.mktemp("whole")
    source = experiment(folder, evaluations(1) + "--vault.uid source --vault.no-save")
    begin = f"{FIVE} --checkpoint.load-params {source.path} "
    return begin, experiment(folder, begin)


# ---- RECORDINGS, at which many tests look --------------------------------------------------------
def replay(result, env):
    """Leaves (UB * NE, E * NU * T, ...) from the seed and the recorded actions, step by step."""
    config, actions = result.config, read_streams(result.path)["action"]
    num_rows, num_timesteps, num_agents = actions.shape
    key = jax.random.split(jax.random.PRNGKey(config.system.seed), 3)[0]
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    ids = np.eye(num_agents, dtype=np.float32)[:, : num_agents * config.system.add_agent_id]
    names = (*LEAVES, "next_observation", "discount", "step_count", "truncation")
    steps, states = [], []

    def see(timestep):
        seen, num_actions = timestep.observation, 3 - np.arange(num_agents) % 2
        mask = getattr(seen, "action_mask", np.arange(3) < num_actions[:, None])
        return np.hstack([ids, np.asarray(seen.agents_view, np.float32)]), np.asarray(mask)

    for row, row_key in enumerate(jax.random.split(key, num_rows + 1)[1:]):
        state, timestep = reset(jax.random.split(row_key)[1])
        step_count = 0
        for action in actions[row]:
            view, mask = see(timestep)
            assert mask[np.arange(num_agents), action].all(), "an illegal action"
            states.append(getattr(timestep.observation, "global_state", None))
            state, timestep = step(state, action)
            reward, discount, done = timestep.reward, timestep.discount, bool(timestep.last())
            if isinstance(env, LevelBasedForaging):  # the team's
                reward = reward.sum()
            if isinstance(env, RobotWarehouse) and step_count == config.env.time_limit - 1:
                discount = np.float32(1)  # Jumanji says 0
            truncation = done and bool(np.max(discount) > 0)
            more = (see(timestep)[0], discount, np.int32(step_count), truncation)
            steps.append((done, action, reward, view, mask, *more))
            step_count += 1
            if done:
                state, timestep = reset(jax.random.split(state.key)[0])
                step_count = 0

    def stack(*values):  # what the team has in common is that of each agent
        values = np.array([np.broadcast_to(x, (num_agents, *np.shape(x)[1:])) for x in values])
        return values.reshape(num_rows, num_timesteps, *values.shape[1:])

    leaves = dict(zip(names, map(stack, *steps), strict=True))
    if states[0] is not None:
        leaves["global_state"] = np.array(states, np.float32).reshape(num_rows, num_timesteps, -1)
    return leaves


LINE = "--env.scenario line --vault.extra-leaves "
LINE += "next_observation log_prob value discount step_count truncation"
# Arguments, OG-MARL's names of the environment and the scenario, your own environment.
RECORDINGS = {
    "warehouse": ("--env.scenario tiny-2ag", "rware/tiny-2ag", None),
    "foraging": ("--env.scenario tiny-lbf --vault.extra-leaves discount", "lbf/tiny-lbf", None),
    "three": (LINE, "walk/line", Walk(3, True, False)),
    "uneven": ("", "walk/Walk", Walk(2, False, False)),
    # More episodes end at once than are reset in one go.
    "one": ("--arch.num-envs 8 --system.no-add-agent-id", "walk/Walk", Walk(1, False, True)),
}


@pytest.fixture(scope="session", params=RECORDINGS)
def recording(request, tmp_path_factory):
    """The result of each run in turn, what its actions lead to, and where it is exported."""
    arguments, export, env = RECORDINGS[request.param]
    result = experiment(tmp_path_factory.mktemp("recording"), arguments, env)
    env = env or jumanji_env(result.config.env.scenario, result.config.env.time_limit)
    return result, replay(result, env), export


one_recording = lambda name: pytest.mark.parametrize("recording", [name], indirect=True)


def walk_episodes(done, first=0):
    """Complete episodes of streams whose dones are (B, time), which begin at `first` or later.

    Returns (end, stream, begin) of each, one stream after the other.
    """
    episodes = []
    for stream, ends in enumerate(done):
        begin = 0
        for end in np.flatnonzero(ends):
            if begin >= first:
                episodes.append((int(end), stream, begin))
            begin = int(end) + 1
    return episodes


def test_stepping_the_environments_by_hand_gives_the_recording_back(recording, request):
    result, replay, export = recording
    streams, arguments = read_streams(result.path), RECORDINGS[request.node.callspec.id][0]
    extra_leaves = arguments.partition("--vault.extra-leaves")[2].split()
    by_default = set() if export == "rware/tiny-2ag" else {"truncation"}  # as the original's
    by_default |= {"global_state"} & set(replay)
    assert set(streams) == {*LEAVES, *extra_leaves} | by_default
    for name, leaf in streams.items():
        if name in ("log_prob", "value"):  # see the test of what a policy says
            assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
        else:
            assert leaf.dtype == replay[name].dtype
            np.testing.assert_array_equal(leaf, replay[name], err_msg=name)
    reward, walked = replay["reward"].mean(-1), walk_episodes(streams["done"][..., 0])
    for number, evaluation in enumerate(result.evaluations):
        returns = [reward[i, a : b + 1].sum() for b, i, a in walked if b // 32 == number]
        assert evaluation.train_episode_return == pytest.approx(np.mean(returns), abs=1e-5)
    num_envs = result.config.arch.num_envs
    assert result.num_timesteps == result.evaluations[-1].step_count == 4 * 2 * 16 * num_envs
    for store in open_with_flashbax(result.path)._all_datastores.values():
        assert store.chunk_layout.write_chunk.shape[1] == 16  # no rollout is coded twice
        spec = store.spec().to_json()
        assert spec["metadata"]["compressor"]["id"] == "zstd"
        # A write does not store the whole index anew.
        assert spec["kvstore"]["config"]["max_decoded_node_bytes"] == 2**12


def test_exported_vault_has_og_marl_layout(recording, tmp_path):
    result, replay, name = recording
    leaves = {
        name: np.concatenate([x[i, a : b + 1] for b, i, a in walk_episodes(replay["done"][..., 0])])
        for name, x in replay.items()
    }
    num_ids = leaves["action"].shape[1] if result.config.system.add_agent_id else 0
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
    if "global_state" in leaves:
        expected["infos"]["state"] = leaves["global_state"]
    streams = read_streams(result.path)
    for extra in set(streams) - {*LEAVES, "truncation", "global_state"}:
        walked = walk_episodes(streams["done"][..., 0])
        leaf = np.concatenate([streams[extra][i, a : b + 1] for b, i, a in walked])
        expected["infos"][extra] = leaf[..., num_ids:] if extra == "next_observation" else leaf
    path = ippo.export_og_marl(*where(result.path), destination=tmp_path / "source")
    # As OG-MARL's `populate_from_vault(source, env, scenario, dataset, rel_dir)` builds the path.
    exported = read_vault(f"{tmp_path}/source/{name}.vlt/Replay")
    assert_equal(exported, jax.tree.map(lambda x: x[None], expected))
    dtypes = (jax.tree.map(lambda x: x.dtype.name, leaves) for leaves in (exported, expected))
    assert next(dtypes) == next(dtypes)
    options = {"export_name": "Ends", "destination": tmp_path / "source", "ends_as_terminals": True}
    ends = read_vault(ippo.export_og_marl(*where(result.path), **options))
    expected["terminals"], expected["truncations"] = leaves["done"], 0 * leaves["done"]
    assert_equal(ends, jax.tree.map(lambda x: x[None], expected))
    expected["terminals"] = leaves["done"] & ~leaves["truncation"]
    expected["truncations"] = leaves["truncation"]
    assert expected["terminals"].any() and expected["truncations"].any()
    metadata = json.loads((path / "metadata.json").read_text())["recording"]
    assert metadata["env"]["scenario"] == result.config.env.scenario


@one_recording("foraging")
def test_metadata_and_metrics_say_what_the_run_was(recording):
    result = recording[0]
    metadata = json.loads((result.path / "metadata.json").read_text())
    actions = ["noop", "up", "down", "left", "right", "load"]
    numbers = {"num_agents": 3, "num_actions": 6, "num_devices": 1, "num_updates_per_eval": 2}
    expected = {**json.loads(json.dumps(dataclasses.asdict(result.config))), **numbers}
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["task"]["og_marl_name"] == "lbf" and metadata["task"]["actions"] == actions
    assert metadata["versions"]["jax"] == jax.__version__
    metrics = json.loads((result.path / "metrics.json").read_text())
    run = metrics["LevelBasedForaging"]["tiny-lbf"]["ff_ippo"]["seed_42"]
    assert list(run) == ["step_0", "step_1", "absolute_metrics"]
    assert run["step_1"] == {
        "step_count": 512,
        "elapsed_time": result.evaluations[1].elapsed_time,
        "mean_episode_return": [float(result.evaluations[1].episode_return.mean())],
        "steps_per_second": [result.evaluations[1].steps_per_second],
    }
    assert run["absolute_metrics"] == {"mean_episode_return": [result.absolute_metric]}


@one_recording("foraging")
def test_pictures_show_the_run(recording):
    path = recording[0].path
    pictures = [imread(path / name) for name in ("learning_curve.png", "dataset.png")]
    assert all(len(np.unique(x.reshape(-1, 4), axis=0)) > 10 for x in pictures), "blank"
    description = ippo.describe(*where(path))
    returns, lengths, actions = ippo.plot_dataset(description).axes
    for number, part in enumerate(description.values()):
        five = [part["return_min"], *part["return_quartiles"], part["return_max"]]
        assert returns.lines[number].get_xdata().tolist() == five
        assert lengths.patches[number].get_width() == part["length_mean"]
        assert actions.lines[number].get_xdata().tolist() == part["actions"]
    names = ["noop", "up", "down", "left", "right", "load"]
    named = ippo.plot_dataset(description, names).axes[2]
    assert [label.get_text() for label in named.get_yticklabels()] == names


def plain_description(streams, time_limit, num_actions):
    """What `describe` must give of streams (B, time, ...), by plain NumPy."""
    num_timesteps = streams["done"].shape[1]
    episodes = []
    for end, row, begin in walk_episodes(streams["done"][..., 0]):
        leaves = {name: leaf[row, begin : end + 1] for name, leaf in streams.items()}
        if "truncation" in leaves:
            is_cut_off = leaves["truncation"][-1].any()
        else:
            is_cut_off = end + 1 - begin == time_limit
        total = np.float32(leaves["reward"].mean(axis=1, dtype=float).sum())
        third = math.floor(3 * begin / num_timesteps)
        episodes.append((third, leaves, is_cut_off, total))

    def summary(chosen):
        returns = np.array([total for *_, total in chosen], float)
        lengths = np.array([len(leaves["done"]) for _, leaves, _, _ in chosen])
        actions = np.concatenate([leaves["action"].ravel() for _, leaves, _, _ in chosen])
        return {
            "episodes": len(chosen),
            "transitions": int(lengths.sum()),
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "return_min": returns.min(),
            "return_quartiles": np.quantile(returns, [0.25, 0.5, 0.75]).tolist(),
            "return_max": returns.max(),
            "length_mean": lengths.mean(),
            "cut_off": np.mean([is_cut_off for _, _, is_cut_off, _ in chosen]),
            "actions": (np.bincount(actions, minlength=num_actions) / len(actions)).tolist(),
        }

    pairs = [
        np.hstack([x["observation"].reshape(len(x["action"]), -1), x["action"]])
        for _, x, _, _ in episodes
    ]
    pairs = np.concatenate(pairs)
    parts = {
        f"{word} third": summary([x for x in episodes if x[0] == number])
        for number, word in enumerate(("first", "second", "last"))
    }
    saco = {"joint_saco": len(np.unique(pairs, axis=0)) / len(pairs)}
    return parts | {"all": summary(episodes) | saco}


def check_description(described, expected):
    """Two descriptions have the same keys in the same order, and the same values."""
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert list(described) == list(expected)
    for part, values in expected.items():
        assert list(described[part]) == list(values)
        for key, value in values.items():
            assert described[part][key] == pytest.approx(value, rel=1e-12), (part, key)


def test_a_data_set_is_described_as_numpy_describes_it(recording):
    result, replay, _ = recording
    num_actions = replay["legal_action_mask"].shape[-1]
    streams = read_streams(result.path)
    expected = plain_description(streams, result.config.env.time_limit, num_actions)
    check_description(ippo.describe(*where(result.path)), expected)


def read_card(path):
    """The tables of the data card in the folder of a run, cell by cell, and its text."""
    text = (path / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M)
    return {name: cells.split(" | ") for name, cells in rows}, text


def check_card(path, config):
    """The card says what the vault holds and how it was recorded, in at most 60 lines."""
    cells, text = read_card(path)
    assert len(text.splitlines()) <= 60
    assert re.match(r"---\n(\w+: .+\n)+viewer: false\n---\n# ", text)
    round_4 = lambda x: [round(y, 4) for y in x] if isinstance(x, list) else round(x, 4)
    description = ippo.describe(*where(path))
    for key in description["first third"]:
        expected = [part[key] and round_4(part[key]) for part in description.values()]
        assert [None if x == "None" else json.loads(x) for x in cells.pop(key)] == expected
    saco = cells.pop("joint_saco")
    assert saco == ["", "", "", str(round_4(description["all"]["joint_saco"]))]
    leaves = read_vault(path)
    assert cells == {x: [str(leaf.shape[2:]), str(leaf.dtype)] for x, leaf in leaves.items()}
    assert f"({len(leaves['done'])}, timesteps)" in text
    command = re.search(r"^`python ff_ippo_store_experience.py (.*)`$", text, re.M)[1]
    recorded = tyro.cli(ippo.Config, args=shlex.split(command))
    own = dataclasses.replace(config.vault, rel_dir=recorded.vault.rel_dir)
    own = dataclasses.replace(config, vault=own, checkpoint=recorded.checkpoint)
    assert recorded == own
    for folder in (*path.parents[:-1], Path.home(), FOLDER):
        assert f"{folder}/" not in text
    for picture in re.findall(r"\((\w+\.png)\)", text):
        assert (path / picture).exists()
    return text


def test_a_finished_run_has_a_data_card(recording):
    result, _, _ = recording
    text = check_card(result.path, result.config)
    assert "began with: None." in text and f"jax {jax.__version__}," in text
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    with contextlib.chdir(result.path.parents[2]), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    mean = ippo.load_episodes(*where(result.path)).episode_return.mean()
    assert out.getvalue().splitlines()[-1].startswith(f"{mean!s} (")


def test_the_card_of_a_run_that_goes_on_is_written_again(whole, tmp_path):
    _, result = whole
    assert "began with: source." in check_card(result.path, result.config)
    path = Path(shutil.copytree(result.path, tmp_path / RUN))
    grown = experiment(tmp_path, evaluations(6) + RESUME)  # without `load_params`
    text = check_card(path, grown.config)
    assert text != (result.path / "README.md").read_text() and "began with: source." in text


def test_a_choice_of_episodes_is_whole_disjoint_and_the_same_each_time(whole):
    episodes = ippo.load_episodes(*where(whole[1].path))
    is_better = episodes.episode_return >= np.median(episodes.episode_return)
    is_chosen = jax.random.bernoulli(jax.random.PRNGKey(0), 0.3, is_better.shape)
    for mask in (is_better, is_chosen, list(np.asarray(is_chosen)), 0 * is_better > 0):
        chosen, others = episodes.select(mask), episodes.select(~np.asarray(mask))
        assert_equal(episodes.select(mask), chosen)
        for part, numbers in (
            (chosen, np.flatnonzero(mask)),
            (others, np.flatnonzero(~np.asarray(mask))),
        ):
            assert part.length.tolist() == episodes.length[numbers].tolist()
            assert part.episode_return.tolist() == episodes.episode_return[numbers].tolist()
            assert part.start_step.tolist() == episodes.start_step[numbers].tolist()
            for name, leaf in episodes.transitions.items():
                rows = [
                    leaf[a : a + n] for a, n in zip(episodes.start, episodes.length, strict=True)
                ]
                whole_rows = np.concatenate([leaf[:0], *(rows[number] for number in numbers)])
                np.testing.assert_array_equal(part.transitions[name], whole_rows)
                ends = part.start + part.length - 1
            assert part.transitions["done"][ends].all() and part.transitions["done"][
                :, 0
            ].sum() == len(ends)
    assert 0 < is_chosen.sum() < len(is_chosen)
    for mask in (np.argsort(episodes.length), np.ones(len(is_better), int)):
        with pytest.raises(ippo.ConfigError, match="must be of bool"):
            episodes.select(mask)
    with pytest.raises(ValueError, match="broadcast"):
        episodes.select(is_better[1:])


@pytest.mark.parametrize("num_steps", [1, 10**6])
def test_a_choice_of_episodes_is_exported_window_by_window(whole, tmp_path, num_steps):
    run, folder = where(whole[1].path), {"destination": tmp_path}
    iterate = functools.partial(ippo.iterate_episodes, num_steps=num_steps)
    with mock.patch.object(ippo, "iterate_episodes", iterate):
        episodes = ippo.load_episodes(*run)
        is_late = lambda episodes: (
            episodes.start_step >= EVALUATION_STEPS
        )  # none of the first window
        is_good = lambda episodes: episodes.episode_return >= 6
        no_one = lambda episodes: episodes.length < 0
        for name, choose in {"Late": is_late, "Best": is_good, "None": no_one}.items():
            path = ippo.export_og_marl(*run, export_name=name, choose=choose, **folder)
            expected = episodes.select(choose(episodes))
            vault = open_with_flashbax(path)
            assert vault.vault_index == expected.length.sum()
            if name != "None":
                leaves = read_vault(path)
                ends = leaves["terminals"] | leaves["truncations"]
                assert 0 < ends[0, :, 0].sum() == len(expected.length) < len(episodes.length)
                np.testing.assert_array_equal(leaves["actions"][0], expected.transitions["action"])
        parts = []
        for name, is_validation in (("Train", False), ("Validate", True), ("Again", True)):
            random = np.random.default_rng(0)
            choose = lambda x: (random.random(len(x.length)) < 0.3) == is_validation
            path = ippo.export_og_marl(*run, export_name=name, choose=choose, **folder)
            parts.append(read_vault(path))
    with pytest.raises(ippo.ConfigError, match="a name, by export_name"):
        ippo.export_og_marl(*run, choose=no_one, **folder)
    assert_equal(parts[1], parts[2])
    assert sum(part["actions"].shape[1] for part in parts[:2]) == episodes.length.sum()


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
        env = ippo.make_env(config.env.scenario, config.env.time_limit).unwrapped
        limit = 500 if isinstance(env, RobotWarehouse) else 100
        assert config.env.time_limit == env.time_limit == limit
        assert len(task.actions) == np.max(env.action_spec.num_values)
        if (size := re.search(r"(\d+)x\d+-(\d)p-(\d)f", scenario)) is None:
            assert env.num_agents == int(re.search(r"(\d)ag", scenario)[1])
            continue
        size, *others = map(int, size.groups())
        assert [env.grid_size, env.num_agents, env.num_food] == [size, *others]
        assert env.fov == (2 if scenario.startswith("2s") else size)
        assert env._generator.force_coop == scenario.endswith("coop")


def changed(reset=lambda *pair: pair, step=lambda *pair: pair, **attributes):
    """Your own environment, with a mistake in what `reset` and `step` return, or elsewhere."""
    env = Walk(2, True, False)
    old_reset, old_step = env.reset, env.step
    env.reset, env.step = lambda key: reset(*old_reset(key)), lambda *x: step(*old_step(*x))
    vars(env).update(attributes)
    return env


def with_step(**changes):
    """Your own environment, whose `step` returns a time step with other parts."""
    return changed(step=lambda state, timestep: (state, timestep.replace(**changes)))


def unmasked(**attributes):
    """Your own environment without a mask."""
    strip = lambda x: x.replace(observation=View(x.observation.agents_view))
    unmask = lambda state, timestep: (state, strip(timestep))
    return changed(unmask, unmask, **attributes)


def forget(state, timestep):
    """A mistake: the discount is 1 also where a terminal state was reached."""
    return state, timestep.replace(discount=jnp.ones(2))


def disarm(state, timestep):
    """A mistake: where the second agent is at 2, none of its actions is legal."""
    seen = timestep.observation
    stuck = (jnp.arange(2) == 1) & (state.position == 2)
    return state, timestep.replace(
        observation=seen._replace(action_mask=seen.action_mask & ~stuck[:, None])
    )


def blind(state, timestep):
    """A mistake, or at least rare: all episodes begin with the same observation."""
    seen = timestep.observation
    return state, timestep.replace(observation=seen._replace(agents_view=0 * seen.agents_view))


def total(state, timestep):
    """A mistake: the global state is one number, not an array of features."""
    seen = timestep.observation
    return state, timestep.replace(observation=seen._replace(global_state=state.position.sum()))


def flat_mask(state, timestep):
    """A mistake: the mask has no axis of agents."""
    seen = timestep.observation
    return state, timestep.replace(observation=seen._replace(action_mask=seen.action_mask[0]))


def as_dict(state, timestep):
    """A mistake: names are keys of a dictionary, not attributes."""
    return state, timestep.replace(observation=timestep.observation._asdict())


def see_images(state, timestep):
    """A mistake: what an agent sees has three axes."""
    seen = timestep.observation
    return state, timestep.replace(observation=seen._replace(agents_view=jnp.zeros((2, 4, 4, 3))))


def say_end(state, timestep):
    """What many public environments say: the discount is 0 also where only the time is over."""
    discount = jnp.where(timestep.last(), 0.0, timestep.discount)
    return state, timestep.replace(discount=discount)


swap = lambda state, timestep: (timestep, state)
later = lambda state, timestep: (state._replace(step_count=state.step_count + 0.5), timestep)
FLAT = ippo.Observation(np.zeros(3), np.ones((2, 3)))
NO_VIEW = ippo.Observation(None, np.ones((2, 3)))
BOX = specs.BoundedArray((2,), float, -1.0, 1.0)
MISTAKES = {
    "class": (Walk, r"Walk.* is a class: give an instance of it"),
    "no limit": (changed(time_limit=None), "time_limit of Walk is None: it must be an int"),
    "huge": (changed(time_limit=2**31), "time_limit of Walk is 2147483648: it must be an int"),
    "half a step": (changed(time_limit=9.5), "time_limit of Walk is 9.5: it must be an int"),
    "limit": (Walk(2, True, False), "time_limit is 9, but that of Walk 10"),
    "order": (changed(swap, swap), r"reset of Walk must return \(state, TimeStep\)"),
    "order of step": (changed(step=swap), r"step of Walk must return \(state, TimeStep\)"),
    "one thing": (changed(lambda state, y: y), r"reset of Walk must return \(state, TimeStep\)"),
    "five things": (changed(step=lambda x, y: (x, y, 0, 0, 0)), "step of Walk must return"),
    "no key": (
        changed(lambda state, timestep: (state[:2], timestep)),
        "the state of Walk, a tuple, has no attribute key",
    ),
    "state as dict": (
        changed(lambda state, timestep: (state._asdict(), timestep)),
        "the state of Walk, a dict, has no attribute key",
    ),
    "observation as dict": (
        changed(as_dict, as_dict),
        "the observation of Walk, a dict, has no attribute agents_view",
    ),
    "flat": (
        changed(lambda x, y: (x, y.replace(observation=FLAT))),
        r"agents_view of Walk has the shape \(3,\), not \(N, O\)",
    ),
    "no view": (
        changed(lambda x, y: (x, y.replace(observation=NO_VIEW))),
        r"agents_view of Walk has the shape \(\), not \(N, O\)",
    ),
    "images": (
        changed(see_images, see_images),
        r"agents_view of Walk has the shape \(2, 4, 4, 3\), not \(N, O\)",
    ),
    "mask": (
        changed(flat_mask, flat_mask),
        r"action_mask of Walk has the shape \(3,\), not \(N, A\)",
    ),
    "too few actions": (
        unmasked(action_spec=specs.MultiDiscreteArray(np.array([3, 3, 3]))),
        "Walk has no action_mask .* discrete actions of 2 agents",
    ),
    "three values": (
        changed(step=lambda state, timestep: (state, {}, timestep)),
        "step of Walk must return",
    ),
    "no values": (changed(reset=lambda *pair: ()), "reset of Walk must return"),
    "no actions": (unmasked(action_spec=None), "Walk has no action_mask .* discrete actions"),
    "continuous": (unmasked(action_spec=BOX), "Walk has no action_mask .* discrete actions"),
    "reward": (with_step(reward=jnp.zeros(3)), r"reward of Walk has the shape \(3,\), not"),
    "rewards": (with_step(reward={"a": 0.0}), "reward of Walk has the shape None, not"),
    "step_type": (with_step(step_type=jnp.zeros(2, int)), r"step_type of Walk .* \(2,\), not"),
    "global_state": (changed(total, total), r"global_state of Walk has the shape \(\), not \(S\)"),
    "state": (changed(step=later), r"'state/step_count': .* int32 != float32.*Walk returns"),
    "observation": (
        with_step(observation=ippo.Observation(jnp.zeros((2, 4)), jnp.ones((2, 3), bool))),
        r"'observation/agents_view': .* \(2, 3\) != \(2, 4\).*Walk returns the first by reset",
    ),
    "one key": (
        changed(lambda state, timestep: (state._replace(key=jax.random.PRNGKey(0)), timestep)),
        "16 states of Walk that began with 16 keys have 1 keys",
    ),
    "one key later": (
        changed(step=lambda state, y: (state._replace(key=jax.random.PRNGKey(0)), y)),
        "16 states of Walk that began with 16 keys have [12] keys",
    ),
    "not a number": (with_step(reward=jnp.full(2, jnp.nan)), "reward of Walk is not finite"),
    "no legal action": (changed(disarm, disarm), "agent 1 of Walk has no legal action"),
    "endless": (with_step(step_type=StepType.MID), "not ended at its time_limit, 10"),
    "endless and long": (
        changed(step=lambda x, y: (x, y.replace(step_type=StepType.MID)), time_limit=300),
        "not ended at its time_limit, 300",
    ),
    "too early": (changed(time_limit=9), "an episode of Walk has not ended at its time_limit, 9"),
    "discount": (
        changed(step=forget),
        "Walk ended before its time_limit, 10, with a discount not 0",
    ),
    "too late": (changed(time_limit=11), "Walk ended before its time_limit, 11, with a discount"),
    "far too late": (changed(time_limit=10**9), "before its time_limit, 1000000000, with a disc"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_your_own_environment_is_told_in_a_line_that_names_it(mistake, tmp_path):
    env, message = MISTAKES[mistake]
    with pytest.raises(ippo.ConfigError, match=message) as error:
        experiment(tmp_path, "--env.time-limit " + ("9" if mistake == "limit" else "None"), env)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mistake", "note"),
    [
        (changed(blind, blind), "all episodes of Walk begin with the same observation\n"),
        (
            changed(step=say_end),
            r"of (\d+) episodes of Walk that lasted time_limit timesteps, all \1 ended with "
            r"discount 0, .* it must be 1\n",
        ),
    ],
)
def test_what_may_be_a_mistake_is_told_of_and_recorded(mistake, note, tmp_path, capsys):
    result = experiment(tmp_path, env=mistake)
    assert re.match(note, capsys.readouterr().out)
    assert "discount" not in note or not read_vault(result.path)["truncation"].any()
    experiment(tmp_path, "--vault.uid b", Walk(2, True, False))
    assert not re.search("episodes of Walk", capsys.readouterr().out)


def test_an_agent_without_a_legal_action_in_training_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ippo, "check_episodes", lambda *_: None)  # as if it had not come so far

    def seldom_disarm(state, timestep):
        is_drawn = jax.random.randint(state.key, (), 0, 25) == 0
        wrong = disarm(state, timestep)[1]
        return state, jax.tree.map(lambda x, y: jnp.where(is_drawn, x, y), wrong, timestep)

    error = command_line(tmp_path, FIVE, changed(seldom_disarm, seldom_disarm))
    pattern = r"error: agent 1 had no legal action before step ([\d,]+): .*action_mask.*"
    step = int(re.fullmatch(pattern, error)[1].replace(",", ""))
    rows = read_vault(tmp_path / RUN)  # what came before
    assert rows["legal_action_mask"].any(axis=-1).all()
    num_steps = rows["done"].shape[1] // 16 * EVALUATION_STEPS
    assert num_steps > 0, "choose another number than 25"
    assert step - num_steps in (EVALUATION_STEPS // 2, EVALUATION_STEPS)


class IntThenFloat(Walk):
    """Your own environment, whose view is of integers after `reset`, of floats after `step`."""

    def step(self, state, action):
        state, timestep = super().step(state, action)
        seen = timestep.observation
        view = seen.agents_view.astype(jnp.float32)
        return state, timestep.replace(observation=seen._replace(agents_view=view))


def test_a_view_of_integers_and_floats_is_recorded_as_floats(tmp_path):
    rows = read_vault(experiment(tmp_path, env=IntThenFloat(2, True, False)).path)
    expected = read_vault(experiment(tmp_path, "--vault.uid b", Walk(2, True, False)).path)
    assert_equal(rows, expected)


class Unmasked(Walk):
    """Your own environment without a mask, which makes its specification anew each time."""

    def __init__(self):
        self.num_agents, self.is_masked, self.is_team = 2, False, False

    @property
    def action_spec(self):
        return specs.MultiDiscreteArray(jnp.array([3, 2]))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1), (1, 2)])
def test_numbers_of_actions_of_any_shape_make_the_mask(shape):
    spec = mock.Mock(num_values=np.full(shape, 3))
    mask = ippo.AgentWrapper(unmasked(action_spec=spec), False)._all_actions(2)
    assert_equal(mask, np.ones((2, 3), bool))


def test_a_specification_that_is_a_property_says_which_actions_there_are(tmp_path):
    rows = read_vault(experiment(tmp_path, env=Unmasked()).path)
    expected = np.broadcast_to([[1, 1, 1], [1, 1, 0]], rows["legal_action_mask"].shape)
    np.testing.assert_array_equal(rows["legal_action_mask"], expected)


@pytest.mark.parametrize("scenario", ["smac/3m", "map#1"])
def test_a_scenario_that_no_folder_can_have_is_refused_before_the_run(tmp_path, scenario):
    with pytest.raises(ippo.ConfigError, match=scenario) as error:
        experiment(tmp_path, f"--env.scenario {scenario}", Walk(2, True, False))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_working_directory_may_have_any_name(tmp_path):
    result = experiment(tmp_path / "a#b", f"--vault.rel-dir {tmp_path}/plain")
    assert result.path == tmp_path / "plain/ff_ippo_walk/a"


def test_a_wrapped_environment_keeps_its_name():
    assert ippo.find_task("", ippo.CutOffWrapper(Walk(2, True, False))).og_marl_name == "walk"


def test_an_evaluation_ends_at_the_time_limit():
    env = ippo.AgentWrapper(with_step(step_type=StepType.MID), add_agent_id=True)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, _ = ippo.init_networks(ippo.NetworkConfig(), observation, jax.random.PRNGKey(0))
    evaluate = ippo.make_evaluate(env, 4, False, Mesh(np.array(jax.devices()), ("device",)))
    with pytest.raises(ippo.ConfigError, match="not ended at its environment's time_limit, 10"):
        evaluate(actor, jax.random.PRNGKey(0))


class Wide(Walk):
    """The environment of the task `walk`, but for one more feature of the observation."""

    def __init__(self, time_limit):
        super().__init__(2, True, False)

    def observe(self, state):
        seen = super().observe(state)
        return seen._replace(agents_view=jnp.pad(seen.agents_view, ((0, 0), (0, 1))))


class Typed(Walk):
    """Your own environment, with typed keys in its state, whatever key it is given."""

    def reset(self, key):
        return super().reset(jax.random.key(jax.random.bits(key)))


def test_typed_keys_in_a_state_are_saved_and_resumed(tmp_path):
    whole = experiment(tmp_path / "whole", FIVE, Typed(2, True, False))
    experiment(tmp_path, evaluations(2), Typed(2, True, False))
    resumed = experiment(tmp_path, FIVE + RESUME, Typed(2, True, False))
    check_equal(resumed.path, whole.path)
    assert len(np.unique(read_streams(whole.path)["observation"][..., 4])) == 9, "not random"


def test_a_run_does_not_depend_on_how_jax_is_set_up(tmp_path):
    expected = read_vault(experiment(tmp_path / "plain", "--env.scenario 2s-8x8-2p-2f-coop").path)
    lbf = "--env.scenario 2s-8x8-2p-2f-coop"
    settings = {"JAX_ENABLE_CUSTOM_PRNG": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    for folder, x64 in (("0", "0"), ("1", "1")):
        process = start(tmp_path / folder, lbf, JAX_ENABLE_X64=x64, **settings)
        assert process.wait(120) == 0, (tmp_path / folder / "log").read_text()
        actual = read_vault(tmp_path / folder / "vaults/ff_ippo_lbf/a")
        dtypes = (jax.tree.map(lambda x: x.dtype, leaves) for leaves in (actual, expected))
        assert next(dtypes) == next(dtypes)
        assert x64 == "1" or assert_equal(actual, expected)


# ---- NETWORKS, ADVANTAGE, LOSSES, LEARNER --------------------------------------------------------
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
    ones = jnp.ones((2, 1))
    transition = EMPTY._replace(
        action=jnp.int32(ones) - 1, log_prob=jnp.log(0.4 * ones), value=ones
    )
    logits = jnp.log(jnp.array([[[0.5, 0.5]], [[0.8, 0.2]]]))
    advantage, target = jnp.array([[1.0], [-1.0]]), jnp.array([[3.0], [0.0]])
    total, losses = ippo.actor_loss(logits, FIXED, transition, advantage, 0.2, ent_coef=0.1)
    loss = -(1.2 * 1 + 2 * -1) / 2  # a negative advantage takes the larger ratio
    entropy = (math.log(2) - 0.8 * math.log(0.8) - 0.2 * math.log(0.2)) / 2
    assert jax.device_get(losses) == pytest.approx({"actor_loss": loss, "entropy": entropy})
    assert total == pytest.approx(loss - 0.1 * entropy, rel=1e-5)
    total, losses = ippo.critic_loss(2 * ones, FIXED, transition, target, 0.2, 0.5)
    assert jax.device_get(losses) == pytest.approx({"value_loss": 0.5 * (1.8**2 + 2**2) / 2})
    assert total == pytest.approx(0.5 * float(losses["value_loss"]))


def test_update_minibatch_follows_the_mean_of_the_batches_gradients():
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    shape = (48, 2)  # twice as many as are in the minibatch of three batches
    mask = jax.random.bernoulli(keys[0], 0.5, (*shape, 5)).at[..., 0].set(True)
    observation = ippo.Observation(jax.random.normal(keys[0], (*shape, 6)), mask)
    index = jax.random.permutation(keys[1], 48)[:24].reshape(3, 8)
    scale = jnp.ones((48, 1)).at[index].set(jnp.array([1.0, 10.0, 100.0])[:, None, None])
    normal = jax.random.normal
    transition = EMPTY._replace(observation=observation, action=jnp.zeros(shape, jnp.int32))
    transition = transition._replace(log_prob=-jnp.ones(shape), value=normal(keys[2], shape))
    advantage = normal(keys[3], shape) * scale + scale  # batches normalise differently
    target = 10 * normal(keys[4], shape)  # gradients that are clipped
    batch = (transition, advantage, target)
    system = ippo.SystemConfig()
    actor, critic = ippo.init_networks(
        ippo.NetworkConfig(), observation, keys[5], actor_lr=1e-3, critic_lr=2e-3, max_grad_norm=0.4
    )
    mesh, specs = Mesh(np.array(jax.devices()[:1]), ("device",)), (PartitionSpec(),)
    update = functools.partial(ippo.update_minibatch, config=system)
    update = jax.shard_map(update, mesh=mesh, in_specs=specs * 4, out_specs=specs[0])
    updated, _ = jax.jit(update)(actor, critic, batch, index)
    parts = [jax.tree.map(lambda x: x[rows], batch) for rows in index]
    goals = [(advantage - advantage.mean()) / advantage.std() for _, advantage, _ in parts]
    for before, after, call, targets, coefficient, learning_rate in (
        (actor, updated[0], ippo.actor_loss, goals, system.ent_coef, 1e-3),
        (critic, updated[1], ippo.critic_loss, [x[2] for x in parts], system.vf_coef, 2e-3),
    ):
        # The mean over the batches.
        one = lambda *x: call(x[0], before.apply_fn, x[1][0], x[2], 0.2, coefficient)[0]
        loss = lambda params: sum(map(one, [params] * 3, parts, targets)) / 3
        grads = jax.jit(jax.grad(loss))(before.params)
        assert before is actor or optax.global_norm(grads) > 0.4
        optimiser = optax.chain(optax.clip_by_global_norm(0.4), optax.adam(learning_rate, eps=1e-5))
        changes, _ = optimiser.update(grads, optimiser.init(before.params))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, after.params, jax.tree.map(jnp.add, before.params, changes))


def actor_with(params, config):
    """The actor of a run, with these parameters, and what its critic calls."""
    env = ippo.make_env(**vars(config.env), add_agent_id=config.system.add_agent_id)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, critic = ippo.init_networks(config.network, observation, jax.random.PRNGKey(0))
    return env, actor.replace(params=params.actor), critic.apply_fn


def test_a_short_run_learns_and_its_policy_is_recorded_as_it_is(tmp_path):
    learn = "--system.num-updates 60 --system.actor-lr 0.01 --system.critic-lr 0.01 --vault.no-save"
    trained = experiment(tmp_path, f"{learn} --vault.uid trained")
    assert trained.num_timesteps == 0 and not (trained.path / "metadata.json").exists()
    assert_equal(ippo.load_params(trained.path), trained.params)
    load = f"--checkpoint.load-params {trained.path}"
    record = "--system.no-learn --vault.extra-leaves log_prob value --arch.num-eval-episodes 64 "
    mean_returns = []
    for uid, options in (("first", ""), ("best", load)):
        run = experiment(tmp_path, f"{record} --vault.uid {uid} {options}")
        if options:
            assert_equal(run.params, trained.params)
        assert run.evaluations[0].losses == {}
        rows = read_vault(run.path)  # of the last update as of the first
        seen = ippo.Observation(rows["observation"], rows["legal_action_mask"])
        _, actor, value = actor_with(run.params, run.config)
        log_prob = distrax.Categorical(actor.apply_fn(actor.params, seen)).log_prob(rows["action"])
        np.testing.assert_allclose(rows["log_prob"], log_prob, atol=1e-4)
        np.testing.assert_allclose(rows["value"], value(run.params.critic, seen), atol=1e-4)
        evaluated = np.concatenate([x.episode_return for x in run.evaluations])
        recorded = ippo.load_episodes(*where(run.path), leaves=("done",)).episode_return
        error = math.hypot(*(x.std() / math.sqrt(len(x)) for x in (evaluated, recorded)))
        assert abs(recorded.mean() - evaluated.mean()) < 4 * error
        mean_returns.append(evaluated.mean())
    first, best = mean_returns
    assert best > first + 2, "nothing was learned"
    params = experiment(tmp_path, f"--system.actor-lr 1e-9 --system.critic-lr 1e-9 {load}").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), params, trained.params)
    with pytest.raises(ippo.ConfigError, match=r"load_params .* has other networks"):
        experiment(tmp_path, f"{load} --network.actor-layer-sizes 9 --vault.uid other")


# ---- EVALUATION ----------------------------------------------------------------------------------
def test_an_evaluation_in_several_rounds_is_compiled_once(caplog):
    env = ippo.AgentWrapper(Walk(2, True, False), add_agent_id=True)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, _ = ippo.init_networks(
        ippo.NetworkConfig((8,), (8,)), observation, jax.random.PRNGKey(0)
    )
    mesh = Mesh(np.array(jax.devices()), ("device",))
    actor = jax.device_put(actor, NamedSharding(mesh, PartitionSpec()))  # as the learner's are
    evaluate = ippo.make_evaluate(env, 4, False, mesh)
    with jax.log_compiles():
        key, metrics = evaluate(actor, np.asarray(jax.random.PRNGKey(0)), 10)
        evaluate(actor, key)
    compiled = [x for x in caplog.messages if re.search(r"Compiling .*evaluate_on_device", x)]
    assert len(metrics.done) == 10 and len(compiled) == 1, compiled


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_against_playing_the_episodes_by_hand(greedy):
    num_episodes, key = 12, jax.random.PRNGKey(5)
    theirs = Walk(3, True, False)
    env = ippo.AgentWrapper(theirs, add_agent_id=False)
    observation = env.reset(jax.random.PRNGKey(0))[1].observation
    actor, _ = ippo.init_networks(ippo.NetworkConfig(), observation, jax.random.PRNGKey(9))
    metrics = jax.jit(lambda key: ippo.evaluate(env, actor, key, num_episodes, greedy))(key)

    reset, step = jax.jit(jax.vmap(theirs.reset)), jax.jit(jax.vmap(theirs.step))
    key, reset_key = jax.random.split(key)
    state, timestep = reset(jax.random.split(reset_key, num_episodes))
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, int)
    ended = np.zeros(num_episodes, bool)
    for _ in range(theirs.time_limit):
        key, policy_key = jax.random.split(key)
        seen = timestep.observation
        seen = seen._replace(agents_view=seen.agents_view.astype(np.float32))
        policy = distrax.Categorical(actor.apply_fn(actor.params, seen))
        state, timestep = step(state, policy.mode() if greedy else policy.sample(seed=policy_key))
        returns += np.where(ended, 0, timestep.reward.mean(axis=-1))
        lengths += ~ended
        ended |= np.asarray(timestep.last())
    assert metrics.done.all() and metrics.episode_length.tolist() == lengths.tolist()
    np.testing.assert_allclose(metrics.episode_return, returns, atol=1e-5)
    assert min(lengths) < max(lengths), "all episodes ended at once: the test shows nothing"


def test_two_devices_record_and_evaluate_as_one_with_two_batches_does(tmp_path):
    # A rate at which who leaves out the other device's gradients soon acts otherwise.
    arguments = "--arch.num-evaluation 1 --system.actor-lr 0.01 "
    arguments += "--arch.num-absolute-metric-eval-episodes 10 --arch.num-eval-episodes 3 "
    one_batch = f"{arguments} --system.update-batch-size 1"
    assert start(tmp_path, one_batch, JAX_NUM_CPU_DEVICES="2").wait(120) == 0
    one, two = experiment(tmp_path / "one", arguments), tmp_path / RUN
    recorded = read_vault(two)
    for name, rows in read_vault(one.path).items():  # (NU * UB * NE, ...)
        expected = rows.reshape(4, 2, 4, *rows.shape[1:]).swapaxes(0, 1)  # (D, NU, NE, ...)
        assert_equal(recorded[name].reshape(expected.shape), expected)
    # The streams of two devices are put together as those of two batches.
    assert_equal(ippo.load_episodes(*where(two)), ippo.load_episodes(*where(one.path)))
    # Two episodes are on each device, with a key of its own, and the fourth is left out.
    params = ippo.load_params(two)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, tuple(params), tuple(one.params))
    env, actor, _ = actor_with(params, one.config)
    evaluate = jax.jit(lambda key: ippo.evaluate(env, actor, key, 2).episode_return)
    key, returns = jax.random.split(jax.random.PRNGKey(42), 3)[1], []
    for _ in range(5):  # the evaluation, and the absolute metric in four parts
        key, *device_keys = jax.random.split(key, 3)
        returns.append(np.concatenate([evaluate(key) for key in device_keys]))
    metrics = read_metrics(two)["Walk"]["walk"]["ff_ippo"]["seed_42"]
    assert metrics["step_0"]["mean_episode_return"] == [pytest.approx(returns[0][:3].mean())]
    absolute = np.concatenate(returns[1:])[:10].mean()
    assert metrics["absolute_metrics"]["mean_episode_return"] == [pytest.approx(absolute)]


# ---- OFFLINE -------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 2, 100])  # evaluations
def test_every_complete_episode_comes_back_once(whole, window):
    path, streams = whole[1].path, read_streams(whole[1].path)
    num_envs, options = len(streams["done"]), {"num_steps": window * 256 + 255}
    for first, last in itertools.combinations(range(6), 2):
        # Half an evaluation more, as both ends are rounded down.
        percentiles = tuple(100 * min((x + 0.5) / 5, 1.0) for x in (first, last))
        walked = walk_episodes(streams["done"][:, : last * 32, 0], first * 32)
        # Window by window, environment by environment, in the order of time.
        walked.sort(key=lambda x: ((x[0] // 32 - first) // window, x[1], x[0]))
        length = np.array([end + 1 - begin for end, _, begin in walked], np.int64)
        pick = lambda x: np.concatenate([x[0, :0], *(x[i, a : b + 1] for b, i, a in walked)])
        transitions = jax.tree.map(pick, streams)
        reward = np.split(transitions["reward"].mean(axis=1, dtype=float), np.cumsum(length)[:-1])
        expected = ippo.Episodes(
            transitions=transitions,
            length=length,
            episode_return=np.float32([x.sum() for x in reward][: len(length)]),
            start_step=np.array([begin * num_envs for *_, begin in walked], np.int64),
        )
        windows = list(ippo.iterate_episodes(*where(path), percentiles, **options))
        assert len(windows) == math.ceil((last - first) / window)
        iterate = functools.partial(ippo.iterate_episodes, **options)
        with mock.patch.object(ippo, "iterate_episodes", iterate):
            episodes = ippo.load_episodes(*where(path), percentiles)
        whole = jax.tree.map(lambda *x: np.concatenate(x), *windows)
        for actual in (episodes, whole):
            assert_equal(actual, expected)
            assert [x.dtype for x in actual[1:]] == [x.dtype for x in expected[1:]]
        assert episodes.start.tolist() == (np.cumsum(length) - length).tolist()
    assert walked, "no episode was complete: the test shows nothing"


@one_recording("warehouse")
def test_parts_and_leaves_that_were_asked_for_are_loaded_and_exported(recording):
    path = recording[0].path
    whole, leaves = ippo.load_episodes(*where(path)), ("observation", "action")
    some = ippo.load_episodes(*where(path), leaves=leaves).transitions
    assert_equal(some, {name: whole.transitions[name] for name in leaves})
    for leaves in ("action", ("obs",)):
        with pytest.raises(ippo.ConfigError, match=r"there are .*action"):
            ippo.load_episodes(*where(path), leaves=leaves)
    with pytest.raises(ippo.ConfigError, match="there are Replay, Poor, Medium, Good"):
        ippo.export_og_marl(*where(path), part="good")
    for percentiles in [(0, 49), (60, 40), (50, 101), (-30, 50)]:
        with pytest.raises(ippo.ConfigError, match="percentiles"):
            ippo.load_episodes(*where(path), percentiles)

    async def export():  # as in a notebook, within a running event loop
        return ippo.export_og_marl(*where(path), part="Good", export_name="Expert")

    exported = asyncio.run(export())
    assert exported == path / "og_marl/rware/tiny-2ag.vlt/Expert"
    last = ippo.load_episodes(*where(path), ippo.OG_MARL_PARTS["Good"])
    assert_equal(read_vault(exported)["actions"][0], last.transitions["action"])
    with pytest.raises(ippo.ConfigError, match=r"tiny-2ag\.vlt/Expert exists already"):
        ippo.export_og_marl(*where(path), export_name="Expert")
    with pytest.raises(FileNotFoundError, match="ff_ippo_rware/nobody"):
        ippo.load_episodes(*where(path.with_name("nobody")))


def test_a_read_only_run_is_exported_elsewhere(whole, tmp_path):
    with small_disk(tmp_path / "disk", "100m") as remount:
        path = shutil.copytree(whole[1].path, tmp_path / "disk/vaults/moved/b")
        remount("ro")
        fails = mock.patch.object(Vault, "write", side_effect=KeyboardInterrupt)
        with fails, pytest.raises(KeyboardInterrupt):
            ippo.export_og_marl(*where(path), destination=tmp_path)
        exported = ippo.export_og_marl(*where(path), destination=tmp_path)
    assert list((tmp_path / "walk/walk.vlt").iterdir()) == [exported]
    expected = ippo.load_episodes(*where(whole[1].path)).transitions["action"]
    assert_equal(read_vault(exported)["actions"][0], expected)


def test_a_recording_without_a_complete_episode_is_exported_and_drawn_all_the_same(tmp_path):
    arguments = "--system.rollout-length 1 --system.num-minibatches 1 --system.num-updates 1 "
    arguments += "--vault.save-interval 1 "
    result = experiment(tmp_path, arguments + "--arch.num-evaluation 1")
    assert len(ippo.load_episodes(*where(result.path)).length) == 0
    assert open_with_flashbax(ippo.export_og_marl(*where(result.path))).vault_index == 0
    assert math.isnan(result.evaluations[0].train_episode_return)
    assert (result.path / "dataset.png").exists()
    description = ippo.describe(*where(result.path))
    for part in description.values():
        assert part["episodes"] == part["transitions"] == 0 and part["actions"] == [None] * 3
        assert part["return_mean"] is part["cut_off"] is None
        assert part["return_quartiles"] == [None] * 3 and part.get("joint_saco") is None
    assert (
        "| `return_mean` | None | None | None | None |" in (result.path / "README.md").read_text()
    )


# ---- CONFIGURATION -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("env.scenario", "huge-9ag", "there is no 'huge-9ag': there are tiny-2ag, .*15x15-4p-5f"),
        ("system.num_updates", 5, r"num_updates is 5: .* arch.num_evaluation, 2: set that to 1"),
        ("system.num_minibatches", 5, r"num_minibatches is 5: it must divide .* 64"),
        ("system.seed", -1, "system.seed is -1: it must be from 0 to 4294967295"),
        ("system.gamma", 1.5, "system.gamma is 1.5: it must be from 0 to 1"),
        ("system.actor_lr", math.nan, "system.actor_lr is nan: it must be from 0"),
        ("network.actor_layer_sizes", (8, 0), r"actor_layer_sizes is \(8, 0\): it must be from 1"),
        ("vault.extra_leaves", ("q_value",), "no 'q_value': there are .*log_prob, value"),
        ("vault.uid", "../x", r"ff_ippo_walk/../x' must be made of plain names"),
        ("arch.distributed", True, "come after jax.distributed.initialize"),
        ("checkpoint.resume", True, r"vault.uid is None: .* checkpoint.resume"),
        ("checkpoint.load_params", "no", "there is no checkpoint in .*/no"),
    ],
)
def test_bad_configuration_is_refused_in_one_line(name, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, (group, field) = small_config("--vault.uid None"), name.split(".")
    settings = dataclasses.replace(getattr(config, group), **{field: value})
    with pytest.raises((ippo.ConfigError, FileNotFoundError), match=message) as error:
        ippo.run_experiment(dataclasses.replace(config, **{group: settings}))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, whole):
    home, work, run = tmp_path / "home", tmp_path / "work", ("ff_ippo_walk", "a", "~/vaults")
    shutil.copytree(whole[1].path, home / RUN)
    monkeypatch.setenv("HOME", str(home))
    arguments = evaluations(1) + f"--vault.rel-dir ~/data --checkpoint.load-params ~/{RUN}"
    assert experiment(work, arguments).path == home / "data/ff_ippo_walk/a"
    monkeypatch.chdir(work)
    assert_equal(ippo.load_params(f"~/{RUN}"), whole[1].params)
    ippo.write_card(*run)
    assert len(ippo.load_episodes(*run).length)
    assert ippo.export_og_marl(*run) == home / RUN / "og_marl/walk/walk.vlt/Replay"
    path = ippo.export_og_marl(*run, destination="~/exported")
    assert path == home / "exported/walk/walk.vlt/Replay"
    ippo.make_vault("~/made", {"done": np.zeros((2, 16), bool)}, 16, {})
    assert {x.name for x in home.iterdir()} == {"vaults", "data", "exported", "made"}
    assert not list(work.iterdir())


def test_a_link_to_nowhere_is_told_of(tmp_path):
    (tmp_path / "vaults").symlink_to(tmp_path / "gone")
    with pytest.raises(ippo.ConfigError, match=f"{tmp_path}/vaults ") as error:
        experiment(tmp_path)
    assert "\n" not in str(error.value)


def test_a_process_that_was_forked_from_one_that_used_jax_is_told_to_spawn(tmp_path):
    context = multiprocessing.get_context("fork")  # the default on Linux before Python 3.14
    receiver, sender = context.Pipe(duplex=False)

    def run():
        with pytest.raises(ippo.ConfigError) as error:
            experiment(tmp_path)
        sender.send(str(error.value))

    process = context.Process(target=run)
    process.start()
    process.join(60)
    process.kill()
    assert receiver.poll() and re.fullmatch(".*spawn.*", receiver.recv())
    assert not list(tmp_path.iterdir())


def test_a_run_needs_no_backend_but_that_of_the_accelerator(tmp_path, monkeypatch, whole):
    def only(function):  # as with JAX_PLATFORMS=cuda
        def call(*arguments, backend=None, **options):
            if "cpu" in (backend, *arguments):
                raise RuntimeError("Unknown backend cpu")
            return function(*arguments, backend=backend, **options)

        return call

    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, only(getattr(jax, name)))
    recorded = read_vault(experiment(tmp_path, whole[0] + evaluations(2)).path)
    assert_equal(recorded, jax.tree.map(lambda x: x[:, :32], read_vault(whole[1].path)))


def test_learning_and_evaluating_can_be_compiled_for_accelerators():
    config, mesh = small_config(), Mesh(np.array(jax.devices()), ("device",))
    env = ippo.AgentWrapper(Walk(2, True, False), add_agent_id=True)
    learn = ippo.make_learn(env, config.system, 2, mesh, ippo.select_leaves)
    state = ippo.init_progress(config, env, mesh).state
    evaluate = lambda actor, key: ippo.evaluate(env, actor, key, 4)
    traced = [learn.trace(state), jax.jit(evaluate).trace(state.actor, jax.random.PRNGKey(0))]
    for platform in ("cuda", "tpu"):
        for each in traced:
            each.lower(lowering_platforms=(platform,))


def test_configuration_is_completed():
    # An update is 2 batches * 4 environments * 16 timesteps = 128 steps; each evaluation has one.
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


def test_requirements_are_those_in_the_head_of_the_script():
    head = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S).group(1)
    in_script = re.findall(r'^#     "(.+)",$', head, re.M)
    lines = (FOLDER / "requirements.txt").read_text().split("# To run test_script.py")[0]
    in_file = [line for line in lines.splitlines() if line and not line.startswith("#")]
    assert in_script == in_file and len(in_file) > 8


# ---- COMMAND LINE --------------------------------------------------------------------------------
def test_the_command_line_records_the_original_data(tmp_path):
    arguments = "--system.num-updates 5 --arch.num-evaluation 1 --arch.no-absolute-metric"
    arguments += " --vault.uid golden --vault.rel-dir somewhere"
    command = [sys.executable, SCRIPT, *arguments.split()]
    environment = {**os.environ, "JAX_THREEFRY_PARTITIONABLE": "0", "XLA_FLAGS": ""}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    experience = read_vault(tmp_path / "somewhere/ff_ippo_rware/golden")
    rows = len(experience["done"]) // len(GOLDEN)
    for update, digests in enumerate(GOLDEN):
        for name, digest in zip(LEAVES, digests.split(), strict=True):
            part = np.ascontiguousarray(experience[name][update * rows : (update + 1) * rows])
            assert hashlib.sha256(part.tobytes()).hexdigest()[:16] == digest, (update, name)


def command_line(folder, arguments, env=None):
    """What the command line ends with: an exit status, an error's line, or KeyboardInterrupt."""
    argv = mock.patch.object(sys, "argv", [str(SCRIPT), *SMALL.split(), *arguments.split()])
    with contextlib.chdir(folder), argv:
        try:
            ippo.main(env)
        except (SystemExit, KeyboardInterrupt) as end:
            return getattr(end, "code", KeyboardInterrupt)
    return 0


def start(folder, arguments, setup="", env="", before=(), stdout=None, **environment):
    """Begin a small run in a process of its own in `folder`, where its output is in `log`.

    `before` is a command that starts it, and `stdout` takes what is not to be in `log`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    # The script comes first: several processes have to find each other first.
    program = f"import ff_ippo_store_experience as ippo, test_script\n{setup}\nippo.main({env})"
    command = [*before, sys.executable, "-c", program, *SMALL.split(), *arguments.split()]
    with Path(folder, "log").open("w") as log:
        to_log = {"stdout": stdout or log, "stderr": log, "env": {**os.environ, **environment}}
        return subprocess.Popen(command, cwd=folder, **to_log)


def wait_for(condition):
    """Wait until `condition()` holds."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def logged(text):
    """The steps of the evaluations that are in the text of a log."""
    return [int(x.replace(",", "")) for x in re.findall(r"^step ([\d,]+):.*\n", text, re.M)]


def one_error(folder):
    """The last line of the log in `folder`, the only one that tells of an error."""
    lines = (folder / "log").read_text().splitlines()
    assert not any("Traceback" in line or "rror:" in line for line in lines[:-1]), lines
    return lines[-1]


def test_training_that_diverges_stops_with_what_came_before_recorded(tmp_path, capsys):
    arguments = f"{FIVE} --system.actor-lr 1e30 --vault.extra-leaves log_prob value"
    error = command_line(tmp_path, arguments)
    pattern = r"error: .* at step ([\d,]+): .*system.actor_lr.*"
    step = int(re.fullmatch(pattern, error)[1].replace(",", ""))
    leaves, steps = read_vault(tmp_path / RUN), logged(capsys.readouterr().out)
    assert leaves["done"].shape[1] == 16 * len(steps)
    assert step - (0, *steps)[-1] in (EVALUATION_STEPS // 2, EVALUATION_STEPS)
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_of_two_runs_that_begin_with_one_uid_at_once_one_records(tmp_path):
    arguments, own = f"{ENDLESS} --vault.rel-dir {tmp_path}/v", "test_script.Walk(2, True, False)"
    folders = [tmp_path / "0", tmp_path / "1"]
    processes = [start(folder, arguments, env=own) for folder in folders]
    wait_for(lambda: processes[0].poll() == 1 or processes[1].poll() == 1)
    recording = processes.index(next(each for each in processes if each.poll() is None))
    assert re.match("error: .*/v/ff_ippo_walk/a", one_error(folders[1 - recording]))
    path, log = tmp_path / "v/ff_ippo_walk/a", folders[recording] / "log"
    wait_for(lambda: len(logged(log.read_text())) > 2)  # a line is in the file once it is printed
    with pytest.raises(ippo.ConfigError, match=f"another process is recording into {path}"):
        experiment(tmp_path, arguments + RESUME)
    processes[recording].terminate()
    assert processes[recording].wait(60) == 128 + signal.SIGTERM
    metrics = read_metrics(path)["Walk"]["Walk"]["ff_ippo"]["seed_2"]
    assert len(metrics) == len(logged(log.read_text())) == open_with_flashbax(path).vault_index / 16
    before = snapshot(path)
    with pytest.raises(ippo.ConfigError, match=r"a exists already: choose another vault\.uid"):
        experiment(tmp_path, arguments)
    assert snapshot(path) == before


class Broken(io.StringIO):
    """A stdout of which nobody reads any more, as one of its methods tells."""

    def __init__(self, name, number):
        super().__init__()
        setattr(self, name, mock.Mock(side_effect=OSError(number, os.strerror(number))))


OUTPUTS = {
    "the reader has gone": Broken("flush", errno.EPIPE),
    "the terminal has gone": Broken("write", errno.EIO),
    "closed": None,
    "ascii": io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_stdout_that_does_not_work_is_in_no_ones_way(tmp_path, monkeypatch, capsys, output):
    stdout, arguments = OUTPUTS[output], f"{evaluations(2)} --vault.rel-dir Mój"
    monkeypatch.setattr(sys, "stdout", stdout)
    with at_evaluation(0, functools.partial(signal.raise_signal, signal.SIGINT)):
        assert command_line(tmp_path, arguments) == 128 + signal.SIGINT
    told = "stopped after 1 of 2 evaluations: to go on, run the same with"
    errors = capsys.readouterr().err
    if isinstance(stdout, Broken):
        assert re.fullmatch(rf"{told} .*--vault.uid a\n", errors)
    assert command_line(tmp_path, arguments + RESUME) == 0
    path = tmp_path / "Mój/ff_ippo_walk/a"
    assert open_with_flashbax(path).vault_index == 2 * 16 and (path / "dataset.png").exists()
    assert capsys.readouterr().err == ""
    if output == "ascii":  # what it cannot print is escaped
        stdout.flush()
        printed = stdout.buffer.getvalue().decode()
        assert logged(printed) == [EVALUATION_STEPS, 2 * EVALUATION_STEPS]
        assert told in printed and re.search(r"^recorded: .*/M\\xf3j/", printed, re.M)


def test_an_interrupt_of_a_run_and_of_what_reads_its_output_says_how_to_go_on(tmp_path):
    process = start(tmp_path, ENDLESS, stdout=subprocess.PIPE)
    assert any(logged(line.decode()) for line in process.stdout)
    process.stdout.close()  # as `tee` does, to which a terminal sends the interrupt, too
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    # That and nothing else is on stderr.
    assert re.fullmatch("stopped after .*--vault.uid a\n", (tmp_path / "log").read_text())


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path):  # as `nohup` and `disown` make it
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with at_evaluation(0, functools.partial(signal.raise_signal, signal.SIGHUP)):
        assert command_line(tmp_path, evaluations(2)) == 0
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_an_interrupt_is_heeded_also_in_the_background_of_a_shells_script(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with at_evaluation(0, functools.partial(signal.raise_signal, signal.SIGINT)):
        assert command_line(tmp_path, evaluations(2)) == 128 + signal.SIGINT
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN


# Process 1, as in a container, is sent no signal that would have its default action.
@pytest.mark.parametrize("before", [(), ("unshare", "--pid", "--fork")], ids=["", "container"])
def test_a_second_signal_ends_a_run_at_once(tmp_path, before):
    if before and subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("a namespace of processes takes root's rights")
    slow_disk = "test_script.Vault.write = lambda *_, **__: test_script.send_twice()"
    assert start(tmp_path, ENDLESS, slow_disk, before=before).wait(120) in (-15, 128 + 15)
    log = (tmp_path / "log").read_text()
    assert "the first" in log and "at once" not in log and "stopped" not in log


def send_twice():
    """Send SIGTERM to this process, which is to end by the second one."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)
    os.write(1, b"the first did not end it\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)
    os.write(1, b"the second did not end it at once\n")


def test_a_second_interrupt_in_a_notebook_does_not_end_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # as a kernel has it, also in the background
    twice = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with at_evaluation(1, twice):
        assert command_line(tmp_path, evaluations(2)) is KeyboardInterrupt
    assert signal.signal(signal.SIGINT, before) == handler
    assert open_with_flashbax(tmp_path / RUN).vault_index == 16  # what was logged is saved


# ---- RESUMING ------------------------------------------------------------------------------------
def at_call(number, act, function):
    """The function, which calls `act` first in its call of this number, counted from 0."""
    count = itertools.count()

    def call(*arguments, **options):
        if next(count) == number:
            act()
        return function(*arguments, **options)

    return call


def at_evaluation(number, act, make_evaluate=ippo.make_evaluate):
    """A context in which a run calls `act` within its evaluation of this number."""
    make = lambda *arguments: at_call(number, act, make_evaluate(*arguments))
    return mock.patch.object(ippo, "make_evaluate", make)


def kill_in_checkpoint(number, seconds=0):
    """A setup: the run is killed before this checkpoint, from 0, `seconds` after the vault."""
    kill = f"lambda: (test_script.time.sleep({seconds}), test_script.signal.raise_signal(9))"
    return f"ippo.save_checkpoint = test_script.at_call({number}, {kill}, ippo.save_checkpoint)"


def failing(owner, name, error):
    """A context in which the second call of a function finds no room on the disk."""
    fill = mock.Mock(side_effect=error)
    return mock.patch.object(owner, name, at_call(1, fill, getattr(owner, name)))


interrupt = mock.Mock(side_effect=KeyboardInterrupt)
FULL = "error: .*Disk quota exceeded.*: make room, then use checkpoint.resume"
quota = OSError(errno.EDQUOT, "Disk quota exceeded")
# As TensorStore says it.
exceeded = ValueError("Error writing d/7f: [OS error 122: EDQUOT Disk quota exceeded]\n  [source")
# A context in which a run ends early, what it ends with, how many evaluations are then on disk.
WAYS = {
    "interrupted": (at_evaluation(3, interrupt), KeyboardInterrupt, 3),
    "interrupted in the first evaluation": (at_evaluation(0, interrupt), KeyboardInterrupt, 0),
    "SIGINT": (at_evaluation(1, functools.partial(signal.raise_signal, 2)), 130, 2),
    "SIGTERM": (at_evaluation(2, functools.partial(signal.raise_signal, 15)), 143, 3),
    "copied": (at_evaluation(4, interrupt), KeyboardInterrupt, 4),
    "finished": (contextlib.nullcontext(), 0, 2),
    # A shell sends one, and its terminal another.
    "SIGHUP": (at_evaluation(2, lambda: [signal.raise_signal(1) for _ in range(2)]), 129, 3),
    "vault failed": (failing(Vault, "write", exceeded), FULL, 3),
    "checkpoint failed": (failing(ippo, "save_checkpoint", quota), FULL, 1),
    "killed": (None, None, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, whole, way, capsys):
    (context, end, num_done), path, expected = WAYS[way], tmp_path / RUN, whole[1]
    # How often is written, and where parameters were loaded from, need not be the same.
    more = f"{RESUME} --vault.save-interval 3 --checkpoint.load-params gone"
    if way == "killed":
        assert start(tmp_path, whole[0], kill_in_checkpoint(2)).wait(120) == -signal.SIGKILL
        assert (tmp_path / "log").read_text().endswith(f"saved to {EVALUATION_STEPS}\n")
        assert open_with_flashbax(path).vault_index == 3 * 16
    else:
        with context:
            begin = whole[0] + evaluations(2) if end == 0 else whole[0]
            ended = command_line(tmp_path, begin)
        assert ended == end or re.fullmatch(str(end), str(ended))
        assert open_with_flashbax(path).vault_index == num_done * 16
    assert max(int(file.suffix[1:]) for file in path.glob("checkpoint.*")) == num_done
    if end in (129, 130, 143, KeyboardInterrupt):
        log = capsys.readouterr().out
        assert logged(log) == [(x + 1) * EVALUATION_STEPS for x in range(num_done)]
        told = f"stopped after {num_done} of 5 evaluations: to go on, run the same with "
        assert log.endswith(f"\n{told}--checkpoint.resume --vault.uid a\n")
    if way == "copied":
        # What a killed write leaves, into which TensorStore would write.
        (path / "manifest.ocdbt.__lock").write_bytes(bytes(3000))
        copy = shutil.copytree(path, tmp_path / "other/name/b")
        metadata = (copy / "metadata.json").read_text()
        (copy / "metadata.json").write_text(metadata.replace(jax.__version__, "0.0.1"))
        more += " --vault.rel-dir other --vault.name name --vault.uid b"
    result = experiment(tmp_path, FIVE + more)
    check_equal(result.path, expected.path)
    assert_equal(result.params, expected.params)
    assert_equal(mean_returns(result), mean_returns(expected))
    assert len(list(result.path.glob("checkpoint.*"))) == 3
    assert not list(result.path.parent.glob(".*")) + list(result.path.rglob(".*"))
    # Where the run has grown, or goes on with other versions, this is true of the whole.
    metadata = json.loads((result.path / "metadata.json").read_text())
    assert metadata["system"]["num_updates"] == 2 * metadata["arch"]["num_evaluation"] == 10
    assert metadata["versions"]["jax"] == jax.__version__


def test_the_best_parameters_are_kept_and_evaluated_once_more(whole):
    result = whole[1]
    assert 0 < (best := np.argmax(mean_returns(result))) < 4, "choose another seed"
    env, actor, _ = actor_with(result.params, result.config)
    evaluate = ippo.make_evaluate(env, 4, False, Mesh(np.array(jax.devices()), ("device",)))
    key = np.asarray(jax.random.split(jax.random.PRNGKey(2), 3)[1])
    for index, evaluation in enumerate(result.evaluations):
        key, metrics = evaluate(actor, key, 4)
        assert index != best or np.allclose(metrics.episode_return, evaluation.episode_return)
    _, metrics = evaluate(actor, key, 8)
    assert result.absolute_metric == pytest.approx(metrics.episode_return.mean())


def test_a_mean_return_that_is_no_number_is_not_the_best():
    evaluation = lambda mean: ippo.Evaluation(1, 1.0, 1.0, np.array([mean]), np.array([1]), 0.0, {})
    progress = ippo.Progress(None, None, 0, [])
    with pytest.warns(RuntimeWarning, match="All-NaN"):
        progress = ippo.add_evaluation(progress, mock.Mock(params=1), None, evaluation(math.nan))
    for params, mean, best in ((2, 1.0, 2), (3, 0.0, 2), (4, 1.0, 4), (5, math.nan, 4)):
        progress = ippo.add_evaluation(progress, mock.Mock(params=params), None, evaluation(mean))
        assert progress.best_params == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--system.seed 7", "system.seed is 7, but 2 in the run that is to go on"),
        ("--network.actor-layer-sizes 16", r"network.actor_layer_sizes is \[16\], but \[8\] in"),
        ("--arch.num-eval-episodes 8", "arch.num_eval_episodes is 8, but 4 in"),
        ("--system.num-updates 5", "num_updates_per_eval is 1, but 2 in the run that is to go on"),
        ("--vault.no-save", "vault.save is False, but True in"),
        (evaluations(2), "arch.num_evaluation is 2, but 5 are done already"),
        ("--vault.uid=", "vault.uid is .* must be given"),  # as of a variable that is not set
        ("", "jax_threefry_partitionable is False, but True in"),
    ],
)
def test_a_run_with_other_data_is_not_resumed(whole, arguments, message):
    folder = whole[1].path.parents[2]
    before, random = snapshot(folder), jax.threefry_partitionable(bool(arguments))
    with random, pytest.raises(ippo.ConfigError, match=message) as error:
        experiment(folder, FIVE + RESUME + arguments)
    assert "\n" not in str(error.value) and snapshot(folder) == before


def test_a_run_is_not_resumed_with_numbers_of_other_widths(whole):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", not before)
    try:
        with pytest.raises(ippo.ConfigError, match="jax_enable_x64 is True, but False in the run"):
            experiment(whole[1].path.parents[2], FIVE + RESUME)
    finally:
        jax.config.update("jax_enable_x64", before)


def truncate_newest(path, size=0):
    """What a power cut may leave of the newest checkpoint."""
    newest = path / "checkpoint.5"
    newest.write_bytes(newest.read_bytes()[:size])


def set_vault_back(path):
    """Give the vault fewer timesteps than the newest checkpoint, as an older copy of it has."""
    open_with_flashbax(path)._vault_index_ds.write(3 * 16).result()


def delete_checkpoints(path):
    """Leave the vault alone."""
    for file in path.glob("checkpoint.*"):
        file.unlink()


class Longer(Walk):
    """The environment of the task `walk`, but for one more field of its state."""

    State = collections.namedtuple("State", (*WalkState._fields, "more"))

    def __init__(self, time_limit):
        super().__init__(2, True, False)

    def reset(self, key):
        state, timestep = super().reset(key)
        return self.State(*state, jnp.zeros(3)), timestep

    def step(self, state, action):
        new, timestep = super().step(WalkState(*state[:3]), action)
        return self.State(*new, state.more), timestep


class Larger(Longer):
    """The same, but one field of its state has another size."""

    State = WalkState

    def reset(self, key):
        state, timestep = Walk.reset(self, key)
        return state._replace(step_count=jnp.zeros(2, jnp.int32)), timestep

    def step(self, state, action):
        new, timestep = Walk.step(self, state._replace(step_count=state.step_count[0]), action)
        return new._replace(step_count=state.step_count + 1), timestep


# What has happened to a folder or to the environment, and what the error tells.
HALF = functools.partial(truncate_newest, size=999)
DAMAGES = {
    "older vault": (set_vault_back, None, r"vault.*checkpoint|checkpoint.*vault"),
    "empty checkpoint": (truncate_newest, None, r"checkpoint\.5 .*delete"),
    "no dictionary": (
        lambda path: (path / "checkpoint.5").write_bytes(b"\0"),
        None,
        r"checkpoint\.5 .*delete",
    ),
    "half a checkpoint": (HALF, None, r"checkpoint\.5 .*delete"),
    "no checkpoint": (delete_checkpoints, None, "no checkpoint"),
    "another observation": (None, Wide, "observation|agents_view"),
    "one more field": (None, Longer, "state"),
    "another state": (None, Larger, "state"),
    "another agent": (None, lambda _: Walk(3, True, False), "num_agents is 3, but 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path, whole, monkeypatch, name):
    damage, make, message = DAMAGES[name]
    path = shutil.copytree(whole[1].path, tmp_path / RUN)
    if damage:
        damage(path)
    else:
        monkeypatch.setitem(ippo.TASKS, "walk", WALK._replace(make=make))
    before = snapshot(tmp_path)
    with pytest.raises(ippo.ConfigError, match=message) as error:
        experiment(tmp_path, evaluations(6) + RESUME)
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before


def test_the_newest_checkpoint_is_deleted_and_the_run_goes_on_from_the_one_before(tmp_path, whole):
    path = shutil.copytree(whole[1].path, tmp_path / RUN)
    truncate_newest(path)
    with pytest.raises(ippo.ConfigError, match=r"checkpoint\.5 .*delete"):
        ippo.load_params(path)
    (path / "checkpoint.5").unlink()
    names = ("checkpoint.9.bak", "checkpoint.old.9", "checkpoint.x", "checkpoint.")
    for name in names:  # are no checkpoints
        (path / name).touch()
    ippo.load_params(path)
    check_equal(experiment(tmp_path, FIVE + RESUME).path, whole[1].path)
    assert (path / "checkpoint.9.bak").exists()


def test_processes_go_on_from_the_newest_checkpoint_that_all_of_them_have(tmp_path, whole):
    shutil.copytree(whole[1].path, tmp_path / RUN)
    before = snapshot(tmp_path)
    gather = ippo.gather

    def held_by(other):  # as if another process had these checkpoints
        stack = lambda x: (
            np.stack([x[0], other]) if getattr(x, "shape", None) == (1, 3) else gather(x)
        )
        return mock.patch.object(ippo, "gather", stack)

    message = r"no checkpoint in .*/a that all processes have: \[1, 3, 5\]"
    with held_by([-1, 0, 2]), pytest.raises(ippo.ConfigError, match=message):
        experiment(tmp_path, FIVE + RESUME)
    assert snapshot(tmp_path) == before
    seen = []
    look = lambda: seen.append((tmp_path / RUN / "checkpoint.5").exists())
    with held_by([2, 3, 4]), at_evaluation(0, look):
        check_equal(experiment(tmp_path, FIVE + RESUME).path, whole[1].path)
    assert seen == [False]  # it went back to the third, and forgot the newer one


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path):
    file, seen = tmp_path / "checkpoint.1", []
    file.write_bytes(b"old")
    flush = lambda number: seen.append((os.fstat(number).st_size, file.read_bytes()))
    with mock.patch.object(os, "fsync", flush):
        ippo.write_file(file, b"longer")
    assert seen[0] == (6, b"old") and file.read_bytes() == b"longer"


@pytest.mark.parametrize("name", ["make_vault", "save_checkpoint", "killed"])
def test_a_run_that_fails_while_it_begins_is_in_the_way_of_none(tmp_path, whole, name):
    if name == "killed":
        assert start(tmp_path, whole[0], kill_in_checkpoint(0)).wait(120) == -signal.SIGKILL
    else:
        failing = mock.patch.object(ippo, name, side_effect=OSError(28, "No space left on device"))
        with failing, pytest.raises(OSError, match="No space left"):
            experiment(tmp_path, whole[0])
        assert not list(tmp_path.glob("vaults/*/*"))
    check_equal(experiment(tmp_path, whole[0]).path, whole[1].path)


@contextlib.contextmanager
def small_disk(path, size):
    """A disk of `size` at `path`, while the context is open; gives what mounts it otherwise."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    try:
        remount = lambda option: ["mount", "-o", f"remount,{option}", str(path)]
        yield lambda option: subprocess.run(remount(option), check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_after_room_is_made(tmp_path, whole, capsys):
    with small_disk(tmp_path / "vaults", "8k") as remount:
        (tmp_path / "vaults/other").write_bytes(bytes(8192))
        told = "error: .*No space left on device.*: make room, then use checkpoint.resume"
        assert re.fullmatch(told, command_line(tmp_path, whole[0]))  # full from the beginning
        (tmp_path / "vaults/other").unlink()
        remount("size=160k")
        assert re.fullmatch(told, command_line(tmp_path, whole[0]))
        assert logged(capsys.readouterr().out)
        remount("size=100m")
        result = experiment(tmp_path, FIVE + RESUME)
        check_equal(result.path, whole[1].path)


# ---- PROCESSES -----------------------------------------------------------------------------------
def start_together(folder, *arguments, setup="", env=""):
    """Begin two processes that train together; `setup` and `env` are of the second."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--arch.coordinator-address localhost:{free.getsockname()[1]}"
    found = f"--arch.distributed --arch.num-processes 2 {address} --arch.process-id"
    first = start(folder / "0", f"{found} 0 {arguments[0]}")
    return [first, start(folder / "1", f"{found} 1 {arguments[1]}", setup, env)]


def test_processes_record_and_go_on_as_one_process_with_all_their_devices(tmp_path):
    assert start(tmp_path, evaluations(40), JAX_NUM_CPU_DEVICES="2").wait(300) == 0
    log = tmp_path / "0/log"
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        # The first process then has two checkpoints more than the second.
        setup = kill_in_checkpoint(2, 5) if number == signal.SIGKILL else ""
        processes = start_together(tmp_path, *[evaluations(40) + RESUME] * 2, setup=setup)
        if number == signal.SIGTERM:
            wait_for(lambda: len(logged(log.read_text())) >= 4)
            processes[1].terminate()
        statuses = [process.wait(300) for process in processes]
        if number == signal.SIGKILL:
            assert statuses[0] != 0 and statuses[1] == -signal.SIGKILL
            continue
        assert statuses == [128 + number if number else 0] * 2
        assert number is None or re.search("\nstopped after .*\n$", log.read_text())
    assert not re.search("step|metric", (tmp_path / "1/log").read_text())  # process 0 alone prints
    returns = re.compile(r"step [\d,]+:|absolute metric.*|episode return [\d.]+, length \d+")
    printed, expected = (returns.findall(x.read_text()) for x in (log, tmp_path / "log"))
    assert len(printed) > 3 and printed == expected[-len(printed) :]
    assert re.search(
        "README.md and dataset.png are not made: ff_ippo_walk has a-p0of2, ", log.read_text()
    )
    # Where one of them does not find its folder, none begins anew, and nothing is deleted.
    path = tmp_path / "1/vaults/ff_ippo_walk/a-p1of2"
    path.rename(path.with_name("away"))
    before = snapshot(tmp_path / "0/vaults")
    processes = start_together(tmp_path, *[evaluations(41) + RESUME] * 2)
    assert [process.wait(60) for process in processes] == [1, 1]
    assert re.match("error: .*a-p0of2 is there, unlike", one_error(tmp_path / "0"))
    assert re.match("error: .*a-p1of2 is not there, unlike", one_error(tmp_path / "1"))
    assert snapshot(tmp_path / "0/vaults") == before
    path.with_name("away").rename(path)
    # Nothing was shared.  To be read as one, the parts are brought together.
    together, whole = tmp_path / "0/vaults/ff_ippo_walk", tmp_path / RUN
    path, split = together / "a", "bring together"
    with pytest.raises(ippo.ConfigError, match=rf"has a-p0of2, of a run of 2 processes: {split}"):
        ippo.load_episodes(*where(path))
    shutil.copytree(tmp_path / "1/vaults/ff_ippo_walk/a-p1of2", together / "a-p1of2")
    for name in ("a-profile", "a-p0of2-backup"):  # are no parts of it
        shutil.copytree(together / "a-p0of2", together / name)
    parts = [together / f"a-p{index}of2" for index in range(2)]
    leaves = jax.tree.map(lambda *x: np.concatenate(x), *map(read_vault, parts))
    assert_equal(leaves, read_vault(whole))
    assert_equal(ippo.load_episodes(*where(path)), ippo.load_episodes(*where(whole)))
    streams = ippo.restore_time_order(read_vault(whole), 2, 2, 16)
    check_description(ippo.describe(*where(path)), plain_description(streams, 10, 3))
    # Process 0 did not see the other part: there is no card until the parts are together.
    assert not (parts[0] / "README.md").exists()
    ippo.write_card(*where(path))
    cells, text = read_card(parts[0])
    assert cells["joint_saco"] == read_card(whole)[0]["joint_saco"] and "(32, timesteps)" in text
    ippo.load_params(path)
    assert read_metrics(parts[0]) == read_metrics(whole)
    with pytest.raises(ippo.ConfigError, match="of another number of processes than 1"):
        experiment(tmp_path / "0", evaluations(40) + RESUME)
    shutil.copytree(parts[1], together / "a-p2of3")
    with pytest.raises(ippo.ConfigError, match=rf"has a-p0of2, a-p1of2, a-p2of3, of .*{split}"):
        ippo.load_episodes(*where(path))


WIDE = "ippo.TASKS['walk'] = test_script.WALK._replace(make=test_script.Wide)"


@pytest.mark.parametrize(
    ("more", "setup", "env", "message"),
    [
        ("--arch.num-envs 8", "", "", "arch.num_envs"),
        ("--checkpoint.load-params gone", "", "", "checkpoint.load_params"),
        ("", "", "test_script.Walk(3, True, False)", "give all"),
        ("", WIDE, "", "give all"),
    ],
)
def test_processes_that_were_given_different_runs_all_end_with_one_line(
    tmp_path, more, setup, env, message
):
    processes = start_together(tmp_path, "", more, setup=setup, env=env)
    assert [process.wait(60) for process in processes] == [1, 1]
    for index in "01":
        assert re.match(f"error: .*{message}", one_error(tmp_path / index))
        assert not (tmp_path / index / "vaults").exists()


def test_where_one_process_fails_the_others_end_too(tmp_path):
    full = "test_script.mock.Mock(side_effect=OSError(28, 'No space left on device'))"
    setup = f"ippo.save_checkpoint = test_script.at_call(1, {full}, ippo.save_checkpoint)\n"
    setup += "timer = ippo.threading.Timer\n"
    setup += "ippo.threading.Timer = lambda seconds, *rest: timer(seconds / 10, *rest)"  # sooner
    processes = start_together(tmp_path, *[ENDLESS] * 2, setup=setup)
    try:
        assert processes[1].wait(120) == 1
        assert re.match("error: .*No space left.*: make room", one_error(tmp_path / "1"))
        assert processes[0].wait(120) != 0
    finally:
        for process in processes:
            process.kill()


def test_a_process_that_is_told_of_no_others_says_so(tmp_path):
    assert start(tmp_path, "--arch.distributed").wait(60) == 1
    assert re.match("error: .*coordinator", one_error(tmp_path))


# ---- README --------------------------------------------------------------------------------------
PAGES = (FOLDER / "README.md").read_text() + (FOLDER / ".github/GUIDE.md").read_text()


def readme_code(heading, language="python"):
    """The code blocks of a section of the README, or of the guide."""
    (section,) = [x for x in re.split(r"^##+ ", PAGES, flags=re.M) if x.startswith(heading)]
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


def execute(folder, *cells):
    """The notebook of these cells, run in a fresh kernel in `folder`."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def test_readmes_cells_percent_run_and_the_pasted_file_work_in_a_notebook(tmp_path):
    (cell,) = readme_code("In a notebook")
    (adapter,) = readme_code("An environment of JaxMARL")
    execute(tmp_path, adapter.partition("smax = ")[0] + "JaxMARL(jaxmarl.make('switch_riddle'), 6)")
    requirements = (FOLDER / "requirements.txt").read_text().splitlines()
    installed = re.findall(r"^%pip install -q (.*)\n", cell, re.M)
    assert set(re.findall(r'"(.+?)"', " ".join(installed))) <= set(requirements) and installed
    cell = re.sub(r"^%pip.*\n", "", cell, flags=re.M)
    cell = assign(cell, num_updates=1, num_evaluation=1)
    small = SMALL.replace("walk", "tiny-2ag").replace("\n", " ")
    cells = [cell, f"%run {SCRIPT} {small} --vault.uid percent", "%reset -f"]
    # The file in a cell, and the last three lines of the README's cell in the next.
    last = "\n".join(cell.splitlines()[-3:])
    cells += [SCRIPT.read_text(), last, "print(result.config.system.seed)"]
    cells.append(f"run_experiment(tyro.cli(Config, args='{small} --vault.uid pasted'.split()))")
    cells.append("export_og_marl('ff_ippo_rware', 'pasted')")
    notebook = execute(tmp_path, *cells)
    outputs = ["".join(x.get("text", "") for x in cell.outputs) for cell in notebook.cells]
    assert outputs[3] == "" and outputs[5] == "42\n"
    assert "2/2" in outputs[-2], "no progress bar"
    for index in (0, 4):
        assert "image/png" in notebook.cells[index].outputs[-1]["data"], "no learning curve"
    vaults = tmp_path / "vaults/ff_ippo_rware"
    for uid in ("percent", "pasted"):
        assert read_vault(vaults / uid)["done"].shape == (16, 32, 2)
    assert len(list(vaults.iterdir())) == 4  # those of the README's cells, too
    assert (vaults / "pasted/og_marl/rware/tiny-2ag.vlt/Replay").is_dir()


def test_percent_run_in_a_terminal_is_stopped_and_the_session_lives(tmp_path):
    monitor, terminal = pty.openpty()
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner"]
    environment = {**os.environ, "TERM": "dumb", "IPYTHONDIR": str(tmp_path / "ipython")}
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "env": environment}
    session = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **ends)

    def wait_for_text(text, shown=""):
        end = time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < end, shown
            if select.select([monitor], [], [], 0.1)[0]:
                shown += os.read(monitor, 65536).decode()

    wait_for_text("In [1]")
    small = ENDLESS + SMALL.replace("walk", "tiny-2ag").replace("\n", " ")
    small = f"{small} --system.num-updates 200000 --arch.num-evaluation 100000"
    os.write(monitor, f"%run {SCRIPT} {small}\n".encode())
    wait_for_text("step 1,024")
    session.send_signal(signal.SIGINT)
    wait_for_text("run the same with --checkpoint.resume")
    os.write(monitor, b"print(6 * 7)\n")
    wait_for_text("42")
    session.kill()
    session.wait()


def test_a_notebooks_backend_of_matplotlib_need_not_be_installed():
    program = "import sys; sys.modules['matplotlib_inline'] = None\n"
    program += "import ff_ippo_store_experience as ippo; print(ippo.os.environ['MPLBACKEND'])"
    environment = {**os.environ, "MPLBACKEND": "nowhere"}  # a name that matplotlib refuses
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", program], **options).stdout == "nowhere\n"


def test_vaults_are_opened_in_threads(whole):
    stdout = sys.stdout
    with ThreadPoolExecutor(2) as threads:
        paths = [where(whole[1].path)] * 40
        assert len(list(threads.map(lambda path: ippo.open_recording(*path), paths))) == 40
    assert sys.stdout is stdout


def test_pages_commands_record_policies_and_their_code_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = WALK._replace(og_marl_name="rware")
    monkeypatch.setitem(ippo.TASKS, "tiny-2ag", quick)
    rware = "--env.scenario tiny-2ag "
    (commands,) = readme_code("Recording a policy", "sh")
    for command in commands.splitlines():
        arguments = command.split(SCRIPT.name)[1]
        arguments = rware + re.sub("--system.num-updates .*", "", arguments)
        policy = ippo.run_experiment(small_config(arguments)).config.checkpoint.load_params
    assert policy == "vaults/ff_ippo_rware/long"
    ippo.run_experiment(small_config(rware + "--vault.uid demo"))  # of "1. Record"
    variables = {}
    for code in readme_code("2. Read"):
        exec(code, variables)
    assert len(variables["episodes"].length) == len(ippo.load_episodes("ff_ippo_rware", "demo")[1])
    assert variables["pair"].first["observation"].shape == (32, 2, 5)
    (sequences,) = readme_code("Changing the algorithm")
    exec(sequences, variables)
    assert variables["batch"]["observation"].shape == (32, 20, 2, 5)
    (choices,) = readme_code("Choosing episodes")
    exec(choices.replace("10_000", "50"), variables)
    whole, chosen = variables["episodes"], variables["sample"]
    for one, other in (("better", "others"), ("training", "validation")):
        parts = [len(variables[name].length) for name in (one, other)]
        assert sum(parts) == len(whole.length) and min(parts) > 0
    assert 30 < chosen.length.sum() <= 50
    num_best = (whole.episode_return >= 2).sum()
    leaves = read_vault(variables["path"])
    assert (leaves["terminals"] | leaves["truncations"])[0, :, 0].sum() == num_best > 0
    (code,) = readme_code("3. Train")
    exec(assign(code, NUM_STEPS=20), {})
    assert re.search(r"cloned: -?[\d.]+\n$", capsys.readouterr().out)


def test_guide_animates_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ippo.run_experiment(small_config("--env.scenario tiny-2ag --vault.uid demo"))
    (code,) = readme_code("An animation of the policy")
    exec(assign(code, RUN='"demo"').replace("states[:200]", "states[:3]"), {})
    assert Path("policy.gif").read_bytes()[:3] == b"GIF"


def check_raw(path, begin, step):
    """The vault holds what its actions lead to in a raw environment.  Returns its leaves.

    `begin(key)` gives the state in which an episode begins; `step(state, action)` the next state,
    the key of the next episode, and the leaves of this timestep.
    """
    leaves = read_vault(path)
    actions = leaves["action"]  # (rows, time, N)
    key = jax.random.split(jax.random.PRNGKey(42), 3)[0]
    keys = jax.random.split(key, len(actions) + 1)[1:]

    @jax.jit
    @jax.vmap
    def play(state, action):
        state, key, step_leaves = step(state, action)
        new = begin(jax.random.split(key)[0])
        is_over = step_leaves["done"]
        return jax.tree.map(lambda x, y: jnp.where(is_over, x, y), new, state), step_leaves

    state, steps = jax.jit(jax.vmap(lambda key: begin(jax.random.split(key)[1])))(keys), []
    for action in actions.swapaxes(0, 1):
        state, step_leaves = play(state, action)
        steps.append(step_leaves)
    expected = jax.tree.map(lambda *x: np.stack(x, axis=1), *steps)
    assert set(expected) == set(leaves) - {"action"}
    ids = leaves["observation"][..., : actions.shape[2]]
    assert (ids == np.eye(actions.shape[2])).all()
    leaves["observation"] = leaves["observation"][..., actions.shape[2] :]
    for name, x in expected.items():
        if name in ("done", "truncation"):  # of all agents alike
            x = np.broadcast_to(x[..., None], actions.shape)
        np.testing.assert_allclose(leaves[name], x, atol=1e-5, err_msg=name)
    mask = leaves["legal_action_mask"]
    assert np.take_along_axis(mask, actions[..., None], axis=-1).all(), "an illegal action"
    return leaves


def raw_jaxmarl(env, endless):
    """`begin` and `step` of JaxMARL's environment; `endless` is the same without a time limit."""
    rows = lambda values: jnp.stack([jnp.ravel(values[agent]) for agent in env.agents])
    all_legal = jnp.ones((env.num_agents, env.action_space(env.agents[0]).n), bool)
    find_mask = {
        "Hanabi": lambda state: rows(env.get_legal_moves(state)).astype(bool),
        "HeuristicEnemySMAX": lambda state: rows(env.get_avail_actions(state)).astype(bool),
    }.get(env.name, lambda state: all_legal)

    def begin(key):
        key, reset_key = jax.random.split(key)
        return key, *env.reset(reset_key)

    def step(state, action):
        key, seen, state = state
        leaves = {"observation": rows(seen), "legal_action_mask": find_mask(state)}
        if "world_state" in seen:
            leaves["global_state"] = seen["world_state"]
        key, step_key = jax.random.split(key)
        actions = dict(zip(env.agents, action, strict=True))
        is_terminal = endless.step_env(step_key, state, actions)[3]["__all__"]
        seen, state, reward, dones, _ = env.step_env(step_key, state, actions)
        done = dones["__all__"]
        leaves |= {"reward": rows(reward)[:, 0], "done": done, "truncation": done & ~is_terminal}
        return (key, seen, state), key, leaves

    return begin, step


def ends_of(leaves):
    """Whether episodes were cut off, and which: (cut off, length) of each."""
    done, truncation = leaves["done"][..., 0], leaves["truncation"][..., 0]
    return {(bool(truncation[i, b]), b - a + 1) for b, i, a in walk_episodes(done)}


# How JaxMARL's environments are made, and their time limits.
JAXMARL = {
    "3m": ("HeuristicEnemySMAX", {"scenario": map_name_to_scenario("3m")}, 101),
    "simple_spread": ("MPE_simple_spread_v3", {}, 26),
    "riddle": ("switch_riddle", {}, 6),
    "overcooked": ("overcooked", {"max_steps": 20}, 20),
    "hanabi": ("hanabi", {}, 89),
}
QUICK = ippo.Config(
    ippo.SystemConfig(num_updates=1),
    ippo.ArchConfig(num_evaluation=1, num_eval_episodes=8, absolute_metric=False),
)


def guides_adapter(heading, until):
    """The names that the guide's adapter defines, without the run that follows it."""
    (code,) = readme_code(heading)
    variables = {}
    adapter, found, _ = code.partition(until)
    assert found
    exec(compile(adapter, "GUIDE.md", "exec"), variables)
    return variables


@pytest.mark.parametrize(
    "scenarios", [("3m", "simple_spread"), ("riddle",), ("overcooked",), ("hanabi",)], ids="-".join
)
def test_the_guides_adapter_records_what_jaxmarls_environments_do(
    scenarios, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    heading = "An environment of JaxMARL"
    if len(scenarios) > 1:  # those of the guide
        (code,) = readme_code(heading)
        code = assign(code, num_updates=1, num_evaluation=1)
        exec(compile(code, "GUIDE.md", "exec"), {})
    else:
        name, options, time_limit = JAXMARL[scenarios[0]]
        adapter = guides_adapter(heading, "smax = ")["JaxMARL"]
        config = dataclasses.replace(QUICK, vault=ippo.VaultConfig(uid=scenarios[0]))
        ippo.run_experiment(config, adapter(jaxmarl.make(name, **options), time_limit))
    assert "same observation" not in capsys.readouterr().out
    for scenario in scenarios:
        name, options, time_limit = JAXMARL[scenario]
        env, endless = jaxmarl.make(name, **options), jaxmarl.make(name, **options)
        getattr(endless, "_env", endless).max_steps = 10**6
        leaves = check_raw(f"vaults/ff_ippo_jaxmarl/{scenario}", *raw_jaxmarl(env, endless))
        ends = ends_of(leaves)
        is_cut_off, lengths = zip(*ends, strict=True)
        has_both = {"3m": {False}, "hanabi": {False}, "riddle": {True, False}}
        assert set(is_cut_off) == has_both.get(scenario, {True})
        assert max(lengths) <= time_limit
        if True in is_cut_off:
            assert {length for cut, length in ends if cut} == {time_limit}
        assert ("global_state" in leaves) == (scenario == "3m")
        assert leaves["legal_action_mask"].all() == (scenario not in ("3m", "hanabi"))
        if scenario == "riddle":  # some answer in the last timestep
            assert (False, time_limit) in ends


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("storm", {}, "InTheGrid: .*observations"),
        ("MPE_simple_facmac_v1", {}, "SimpleFacmacMPE: .*actions"),
        ("MPE_simple_speaker_listener_v4", {}, "SimpleSpeakerListenerMPE: .*observations"),
        ("jaxnav", {"act_type": "Discrete"}, "JaxNav: .*2 in the mask, 15 actions"),
        # The two sides of SMAX see as much, but one has more to shoot at.
        ("SMAX", {"scenario": map_name_to_scenario("5m_vs_6m")}, "SMAX: .*actions"),
    ],
    ids=lambda x: x if isinstance(x, str) and ":" not in x else "",
)
def test_the_guides_adapter_refuses_what_it_cannot_record(name, options, reason):
    adapter = guides_adapter("An environment of JaxMARL", "smax = ")["JaxMARL"]
    with pytest.raises(ippo.ConfigError, match=reason) as error:
        adapter(jaxmarl.make(name, **options), 10)
    assert "not with this adapter" in str(error.value) and "\n" not in str(error.value)


def test_the_guides_adapter_records_what_gymnaxs_cartpole_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = readme_code("An environment of gymnax")
    code = assign(code, num_updates=1, num_evaluation=1, max_steps_in_episode=20)
    variables = {}
    exec(compile(code, "GUIDE.md", "exec"), variables)
    env, params = gymnax.make("CartPole-v1")
    params = params.replace(max_steps_in_episode=20)

    def begin(key):
        key, reset_key = jax.random.split(key)
        return key, *env.reset(reset_key, params)

    def step(state, action):
        key, seen, state = state
        leaves = {"observation": seen[None], "legal_action_mask": jnp.ones((1, 2), bool)}
        key, step_key = jax.random.split(key)
        seen, state, reward, done, _ = env.step_env(step_key, state, action[0], params)
        has_fallen = (jnp.abs(state.x) > 2.4) | (jnp.abs(state.theta) > jnp.deg2rad(12))
        leaves |= {"reward": reward[None], "done": done, "truncation": done & ~has_fallen}
        return (key, seen, state), key, leaves

    (path,) = Path("vaults/ff_ippo_gymnax").iterdir()
    ends = ends_of(check_raw(path, begin, step))
    # Some fall in the last timestep, which the time limit would end as well.
    assert {(True, 20), (False, 20), (False, 12)} <= ends
    with pytest.raises(ippo.ConfigError, match=r"^Pendulum-v1: not with this adapter: .*discrete$"):
        variables["Gymnax"](*gymnax.make("Pendulum-v1"))


def test_the_guides_adapter_records_what_jumanjis_cleaner_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = readme_code("An environment of Jumanji with images")
    size = {"num_rows": 3, "num_cols": 3, "num_agents": 3}
    code = assign(code, num_updates=1, num_evaluation=1, time_limit=8, **size)
    variables = {}
    exec(compile(code, "GUIDE.md", "exec"), variables)
    generator = type(variables["cleaner"].generator)(**size)
    env, endless = (Cleaner(generator, time_limit=limit) for limit in (8, 10**6))

    def see(seen):  # agent by agent and layer by layer
        views = []
        for agent in range(3):
            at = [jnp.zeros((3, 3)).at[*seen.agents_locations[i]].set(1) for i in range(3)]
            others = sum(at[i] for i in range(3) if i != agent)
            layers = [seen.grid == 0, seen.grid == 1, seen.grid == 2, at[agent], others]
            views.append(jnp.concatenate([jnp.ravel(layer) for layer in layers]))
        return {"observation": jnp.stack(views), "legal_action_mask": seen.action_mask}

    def begin(key):
        state, timestep = env.reset(key)
        return state, timestep.observation

    def step(state, action):
        state, seen = state
        leaves = see(seen)
        is_terminal = endless.step(state, action)[1].last()
        state, timestep = env.step(state, action)
        done, is_last = timestep.last(), state.step_count == 8  # which counts as cut off
        leaves |= {"reward": jnp.full(3, timestep.reward), "done": done}
        leaves["truncation"] = done & (is_last | ~is_terminal)
        return (state, timestep.observation), state.key, leaves

    (path,) = Path("vaults/ff_ippo_cleaner").iterdir()
    ends = ends_of(check_raw(path, begin, step))
    assert {(True, 8), (False, 6)} <= ends


def test_readmes_environment_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = readme_code("Your own environment")
    variables = {}
    exec(assign(code, num_updates=2, num_evaluation=1), variables)
    (path,) = Path("vaults/ff_ippo_corridor").iterdir()
    episodes = ippo.load_episodes(*where(path.resolve()))
    last = np.cumsum(episodes.length) - 1
    # All that ends before the time limit has reached the end of the corridor, and is paid for.
    truncation = episodes.transitions["truncation"][last, 0]
    assert {True, False} == set(truncation) and episodes.length.max() == 20
    assert_equal(episodes.episode_return, np.float32(~truncation))


def test_each_name_in_the_table_for_those_who_know_mava_is_there():
    tree = ast.parse(SCRIPT.read_text())
    inner = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
    used = {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute)}
    (section,) = [x for x in re.split(r"^## ", PAGES, flags=re.M) if x.startswith("Coming from")]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section, re.M)[2:]
    names = re.findall(r"`([\w.]+)`", " ".join(right for _, right in rows))
    assert len(rows) > 20 and len(names) > 40
    for name in names:
        first, *fields = name.split(".")
        owner = getattr(ippo, first, None)
        assert owner is not None or first in inner | used, name
        assert all(field in dir(owner) for field in fields), name


def test_readme_names_no_option_that_is_not_there():
    options = re.findall(r"--(\w+)\.(?:no-)?([\w-]+)", PAGES)
    groups = dataclasses.asdict(ippo.Config())
    assert len(options) > 5 and all(y.replace("-", "_") in groups[x] for x, y in options)


def apply_diff(source, diff):
    """The source changed by hunks that each begin with its top-level definition: @@ def NAME @@."""
    _, *parts = re.split(r"^@@ (.*) @@\n", diff, flags=re.M)
    for name, hunk in zip(parts[::2], parts[1::2], strict=True):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" -+")
        old, new = ("\n" + "".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
        (definition,) = re.findall(rf"^{name}\b.*?(?=^[^\s)]|\Z)", source, re.M | re.S)
        assert definition.count(old) == 1, f"{name} does not have once:{old}"
        source = source.replace(definition, definition.replace(old, new))
    return source


def check_central_critic(module, result, env):
    num_agents, params = env.num_agents, result.params.critic
    has_state = num_agents == 3
    num_features = 3 if has_state else num_agents * (num_agents + 3)
    assert params["params"]["torso"]["Dense_0"]["kernel"].shape[0] == num_features
    critic = module.Critic(result.config.network.critic_layer_sizes)
    view = np.random.default_rng(0).normal(size=(4, 3, 5, num_agents, num_agents + 3))
    see = lambda view: module.Observation(view, None, view[..., 3] if has_state else None)
    value = lambda view: np.asarray(critic.apply(params, see(view)))
    before, after = value(view), value(view + np.eye(num_agents)[-1][:, None])
    assert before.shape == (4, 3, 5, num_agents)  # as (T, B, N) and (UB, M, N)
    changed = before != after  # by what the last agent sees
    assert changed[..., 0].mean() > 0.5
    np.testing.assert_allclose(value(view[0]), before[0], atol=1e-5)
    np.testing.assert_allclose(value(view[0, 0]), before[0, 0], atol=1e-5)


def check_layer_norm(module, result, env):
    layers = {name: tree["params"] for name, tree in result.params._asdict().items()}
    assert all(set(x["torso"]) == {"Dense_0", "LayerNorm_0"} for x in layers.values())
    assert set(layers["actor"]["action_head"]) == {"Dense_0"}
    x = np.random.default_rng(0).normal(size=(5, 6))
    norm = module.Layers((8,))
    params = norm.init(jax.random.PRNGKey(0), x)
    assert_close = functools.partial(np.testing.assert_allclose, atol=1e-3)
    assert_close(norm.apply(params, 100 * x), norm.apply(params, x))  # of any scale


def check_schedule(module, result, env):
    config, mesh = result.config, Mesh(np.array(jax.devices()[:1]), ("device",))
    agents = module.AgentWrapper(env, config.system.add_agent_id)
    key = jax.random.PRNGKey(0)
    num_steps = config.system.ppo_epochs * config.system.num_minibatches  # of one update
    for network in module.init_learner(key, config, agents, mesh)[:2]:
        changes = []
        for _ in range(num_steps + 1):  # along the same gradient, Adam's step is the learning rate
            before = network.params
            network = network.apply_gradients(grads=jax.tree.map(jnp.ones_like, before))
            step = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), before, network.params)
            changes.append(float(max(jax.tree.leaves(step))))
        expected = 2.5e-4 * np.linspace(1, 0, num_steps + 1)
        np.testing.assert_allclose(changes, expected, rtol=0.01, atol=1e-6)


def check_next_mask(module, result, env):
    leaves = ippo.restore_time_order(read_vault(result.path), 1, 1, 16)
    goes_on = ~leaves["done"][:, :-1, 0]
    now, after = leaves["next_legal_action_mask"][:, :-1], leaves["legal_action_mask"][:, 1:]
    np.testing.assert_array_equal(now[goes_on], after[goes_on])
    assert (now != after).any() and not after.all()


CHECKS = [check_central_critic, check_layer_norm, check_schedule, check_next_mask]


@pytest.mark.parametrize(
    ("index", "num_agents"),
    [(0, 2), (0, 3), (1, 2), (2, 2), (3, 2)],  # three have a global state
)
def test_guides_changes_of_the_algorithm_do_what_they_say(index, num_agents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diffs = readme_code("Changing the algorithm", "diff")
    assert len(diffs) == len(CHECKS)
    name = f"changed_{index}_{num_agents}"
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    Path(spec.origin).write_text(apply_diff(SCRIPT.read_text(), diffs[index]))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    arguments = "--system.num-updates 1 --arch.num-evaluation 1 --arch.no-absolute-metric"
    if CHECKS[index] is check_next_mask:
        arguments += " --vault.extra-leaves next_observation next_legal_action_mask"
    env = Walk(num_agents, True, False)
    CHECKS[index](module, module.run_experiment(small_config(arguments), env), env)


def test_guides_seeds_side_by_side_record_what_each_records_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ippo.TASKS, "tiny-2ag", WALK._replace(og_marl_name="rware"))
    (code,) = readme_code("Several seeds side by side")
    assert len(code.splitlines()) <= 25
    variables = {}
    exec(assign(code, num_seeds=3, num_updates=4, num_evaluation=2), variables)
    config = variables["config"]
    config = dataclasses.replace(
        config,
        system=dataclasses.replace(config.system, seed=1),
        vault=dataclasses.replace(config.vault, uid="alone"),
    )
    alone = ippo.run_experiment(config).path
    # Rounding makes the parameters of many updates differ, but the actions of a few do not.
    assert_equal(read_vault(alone.with_name("seed-1")), read_vault(alone))
    with pytest.raises(AssertionError):
        assert_equal(read_vault(alone.with_name("seed-2")), read_vault(alone))
    episodes = [ippo.load_episodes(*where(alone.with_name(uid))) for uid in ("seed-1", "alone")]
    assert_equal(*episodes)
    metadata = ippo.open_recording("ff_ippo_rware", "seed-2")[2]
    assert metadata["system"]["seed"] == 2 and metadata["num_updates_per_eval"] == 2


# ---- YOUR OWN LOOP: blocks and tables of the guide -----------------------------------------------
OWN_LOOP = re.search(r"## Recording from your own training loop\n.*?(?=\n## )", PAGES, re.S)[0]
IMPORTS, BLOCK = re.findall(r"```python\n(.*?)```", OWN_LOOP, re.S)
TABLES = [
    [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]
    for table in re.findall(r"(?:^\|.*\|\n)+", OWN_LOOP, re.M)
]
PLAIN, ONE_AGENT, SCANNED, BATCHIFIED = (row[1].strip("`") for row in TABLES[0])
RECORDER = ("reshape_experience", "make_buffer", "make_vault", "append_to_vault", "VaultWriter")
T, NE, N, NU, NUM_UPDATES = 5, 3, 2, 2, 14  # 14: with 10 rollouts in memory, two writes


LoopState = collections.namedtuple("LoopState", "params position clock key")
LoopTransition = collections.namedtuple("LoopTransition", "done reward obs action value")


def loop_reset(shape):
    return jnp.full(shape, 3)


def loop_step(position, clock, action):
    """Agents walk from 3; the episode ends when one is at 0 or at 6, or after 7 timesteps."""
    position = jnp.clip(position + 2 * action - 1, 0, 6)
    reward = jnp.where(position == 6, 1.0, -0.125) - position / 16  # sixteenths: sums are exact
    is_end = ((position == 0) | (position == 6)).reshape(NE, -1).any(axis=1)
    done = is_end | (clock + 1 >= 7)  # (NE,)
    all_done = jnp.broadcast_to(done.reshape(NE, *[1] * (position.ndim - 1)), position.shape)
    new_position = jnp.where(all_done, loop_reset(position.shape), position)
    return new_position, jnp.where(done, 0, clock + 1), reward, all_done


def loop_rollout(state):
    def env_step(state, _):
        key, action_key = jax.random.split(state.key)
        obs = jax.nn.one_hot(state.position, 7)
        action = jax.random.categorical(action_key, obs @ state.params["actor"])
        position, clock, reward, done = loop_step(state.position, state.clock, action)
        seen = LoopTransition(done, reward, obs, action, obs @ state.params["critic"])
        return LoopState(state.params, position, clock, key), seen

    return jax.lax.scan(env_step, state, None, T)


@jax.jit
def train_step(state):
    """One update; leaves (T, NE, ...) or (T, NE, N, ...)."""
    state, seen = loop_rollout(state)

    def backward(following, x):
        following = x.reward + 0.9 * following * (1 - x.done)
        return following, following

    _, target = jax.lax.scan(backward, jnp.zeros_like(seen.reward[0]), seen, reverse=True)

    def loss(params):
        log_prob = jax.nn.log_softmax(seen.obs @ params["actor"])
        log_prob = jnp.take_along_axis(log_prob, seen.action[..., None], -1)[..., 0]
        value_loss = jnp.square(seen.obs @ params["critic"] - target)
        return (value_loss - log_prob * (target - seen.value)).mean()

    grads = jax.grad(loss)(state.params)
    return state._replace(params=jax.tree.map(lambda x, g: x - 0.1 * g, state.params, grads)), seen


def loop_init(agents):
    params = {"actor": jnp.zeros((7, 2)), "critic": jnp.zeros(7)}
    return LoopState(params, loop_reset((NE, *agents)), jnp.zeros(NE, int), jax.random.PRNGKey(0))


def record_loop(agents=(), write=PLAIN, convert=lambda x: x, change=None, block=BLOCK, **metadata):
    """Run the page's block in the working directory; returns what the loop produced, by rollout."""
    produced = []

    def train(state):
        outputs = []
        for _ in range(NU if write == SCANNED else 1):
            state, seen = train_step(state)
            if change is not None:
                seen = change(seen._asdict())
            leaves = seen if change is not None else seen._asdict()
            produced.append(jax.tree.map(np.asarray, leaves))
            outputs.append(jax.tree.map(convert, seen))
        stack = lambda *x: jnp.stack(x) if write == SCANNED else x[0]
        return state, jax.tree.map(stack, *outputs)

    assert block.count("x[None, None, None]") == 1
    block = block.replace("x[None, None, None]", write)
    calls = NUM_UPDATES // (NU if write == SCANNED else 1)
    names = {
        "T": T,
        "NE": NE,
        "N": N,
        "num_updates": calls,
        "state": loop_init(agents),
        "train_step": train,
    }
    found = re.search(r"^metadata = (.*)$", block, re.M)
    written = eval(found[1], {"T": T})
    if write == SCANNED:
        written["num_updates_per_eval"] = NU  # as the page's table says
    written["system"] |= metadata.pop("system", {})
    block = block.replace(found[0], f"metadata = {written | metadata}")
    exec(block, names)
    assert len(produced) == NUM_UPDATES
    return produced


def loop_episodes(produced):
    """What `load_episodes` must give, by plain Python: (start, length, return, rows of leaves)."""
    start, length, returns, steps = [], [], [], []
    for env in range(NE):
        stream = [(rollout, t) for rollout in produced for t in range(T)]
        begin = 0
        for i, (rollout, t) in enumerate(stream):
            if np.ravel(rollout["done"][t, env])[0]:
                episode = stream[begin : i + 1]
                start.append(len(steps))
                length.append(len(episode))
                returns.append(sum(float(np.mean(r["reward"][s, env])) for r, s in episode))
                steps += [(r, s, env) for r, s in episode]
                begin = i + 1
    leaves = {name: np.stack([r[name][s, e] for r, s, e in steps]) for name in produced[0]}
    return start, length, returns, leaves


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The working directory is an empty one."""
    monkeypatch.chdir(tmp_path)


in_empty_folder = pytest.mark.usefixtures("in_folder")


def one_by_one(x):  # as JaxMARL's `batchify`: agent after agent
    return x.swapaxes(1, 2).reshape(T, N * NE, *x.shape[3:])


@in_empty_folder
@pytest.mark.parametrize(
    ("agents", "write", "convert"),
    [
        ((N,), PLAIN, lambda x: x),
        ((), PLAIN, lambda x: x),
        ((), ONE_AGENT, lambda x: x),
        ((N,), SCANNED, lambda x: x),
        ((), SCANNED, lambda x: x),
        ((N,), BATCHIFIED, one_by_one),
    ],
    ids=["agents", "no-agents", "axis-of-one-agent", "scan", "scan-no-agents", "batchify"],
)
def test_the_vault_holds_what_the_loop_produced(agents, write, convert):
    produced = record_loop(agents, write, convert)
    if write == ONE_AGENT:
        produced = [{name: x[:, :, None] for name, x in rollout.items()} for rollout in produced]

    # By Flashbax alone: row (u, env) has every NU-th rollout of an environment, end to end.
    experience = Vault("my_ppo", vault_uid="run-1").read().experience
    every = NU if write == SCANNED else 1
    assert set(experience) == set(LoopTransition._fields)
    for name, x in experience.items():
        rows = [
            np.concatenate([rollout[name][:, env] for rollout in produced[u::every]])
            for u in range(every)
            for env in range(NE)
        ]
        assert x.dtype == produced[0][name].dtype
        np.testing.assert_array_equal(x, np.stack(rows))

    start, length, returns, leaves = loop_episodes(produced)
    assert len(length) > 20 and min(length) < T < max(length)  # some go on into the next rollout
    episodes = ippo.load_episodes("my_ppo", "run-1")
    np.testing.assert_array_equal(episodes.start, start)
    np.testing.assert_array_equal(episodes.length, length)
    np.testing.assert_array_equal(episodes.episode_return, np.float32(returns))
    assert set(episodes.transitions) == set(leaves)
    for name, x in leaves.items():
        np.testing.assert_array_equal(episodes.transitions[name], x)


@in_empty_folder
def test_the_block_is_short_and_does_not_go_into_a_vault_that_exists():
    assert len(BLOCK.splitlines()) <= 15
    record_loop()
    with pytest.raises(FileExistsError, match="run-1 exists already: choose another name"):
        record_loop()


@in_empty_folder
def test_the_recorder_can_be_copied_without_the_script():
    source = inspect.getsource(ippo)
    nodes = [x for x in ast.parse(source).body if getattr(x, "name", None) in RECORDER]
    copied = [ast.get_source_segment(source, node) for node in nodes]
    num_lines = sum(len(text.splitlines()) for text in copied)
    num_imports = len(IMPORTS.splitlines())
    assert f"They are {num_lines} lines, and need these {num_imports} lines of imports" in OWN_LOOP
    assert all(f"`{name}`" in OWN_LOOP for name in RECORDER) and len(copied) == len(RECORDER)
    block = BLOCK.replace("import ff_ippo_store_experience as ippo\n", IMPORTS + "\n".join(copied))
    block = block.replace("ippo.", "")
    produced = record_loop(block=block)
    assert "ippo" not in block.replace("my_ppo", "")
    reward = Vault("my_ppo", vault_uid="run-1").read().experience["reward"]
    np.testing.assert_array_equal(reward, np.concatenate([x["reward"] for x in produced]).T)


FULL = {
    "system": {"add_agent_id": True},
    "num_agents": N,
    "num_actions": 2,
    "env": {"scenario": "corridor", "time_limit": 7},
    "task": {"og_marl_name": "walks", "actions": ["left", "right"]},
}
READERS = (ippo.load_episodes, ippo.export_og_marl, ippo.describe)
LAYOUT = {"observation": "obs", "action": "action", "reward": "reward", "done": "done"}


def full_leaves(seen, without=None):
    leaves = {name: seen[mine] for name, mine in LAYOUT.items()}
    leaves["legal_action_mask"] = jnp.ones((*seen["action"].shape, 2), bool)
    return {name: x for name, x in leaves.items() if name != without}


def drop_entry(entry):
    """Take an entry out of the recording's metadata, on disk."""
    file = Path("vaults/my_ppo/run-1/metadata.json")
    metadata = json.loads(file.read_text())
    *levels, last = entry.split(".")
    inner = metadata
    for level in levels:
        inner = inner[level]
    del inner[last]
    file.write_text(json.dumps(metadata))


@in_empty_folder
@pytest.mark.parametrize("row", TABLES[1], ids=lambda row: row[0].replace("`", ""))
def test_what_is_missing_is_told_in_one_line(row):
    entry = row[0].split("`")[1]
    if row[0].startswith("leaf"):
        record_loop((N,), change=lambda x: full_leaves(x, without=entry), **FULL)
    else:
        record_loop((N,), change=full_leaves, **FULL)
        drop_entry(entry)
    for read, needed in zip(READERS, row[2:], strict=True):
        if needed == "no":
            read("my_ppo", "run-1")
            continue
        assert needed == "yes" or needed.startswith("if ")
        with pytest.raises(ippo.ConfigError) as error:
            read("my_ppo", "run-1")
        assert re.fullmatch(
            f"there is no '{entry.split('.')[-1]}': there are [^\n]*", str(error.value)
        )


@in_empty_folder
def test_the_two_conditions_of_the_table():
    with_leaf = lambda x: full_leaves(x) | {"truncation": x["done"]}
    metadata = FULL | {"env": {"scenario": "corridor"}, "system": {"add_agent_id": False}}
    del metadata["num_agents"]
    record_loop((N,), change=with_leaf, **metadata)
    assert ippo.export_og_marl("my_ppo", "run-1").exists()


@in_empty_folder
def test_the_message_that_the_page_quotes():
    record_loop()
    quoted = re.search(r"```\n(there is no .*)\n```", OWN_LOOP)[1]
    with pytest.raises(ippo.ConfigError) as error:
        ippo.export_og_marl("my_ppo", "run-1")
    assert str(error.value) == quoted


@in_empty_folder
def test_a_rollout_length_that_does_not_divide_is_refused():
    record_loop()
    file = Path("vaults/my_ppo/run-1/metadata.json")
    metadata = json.loads(file.read_text())
    assert metadata["system"]["rollout_length"] == T
    for wrong in (3, 4, 6, 9, 71, 140):
        metadata["system"]["rollout_length"] = wrong
        file.write_text(json.dumps(metadata))
        with pytest.raises(ippo.ConfigError) as error:
            ippo.load_episodes("my_ppo", "run-1")
        told = f"rollout_length {wrong} does not divide the vault's {NUM_UPDATES * T} steps"
        assert str(error.value) == told


@in_empty_folder
def test_one_agent_with_an_axis_is_exported_and_described():
    produced = record_loop((), ONE_AGENT, change=full_leaves, **FULL | {"num_agents": 1})
    path = ippo.export_og_marl("my_ppo", "run-1")
    exported = Vault(str(path.parent), vault_uid=path.name).read().experience
    _, length, _, leaves = loop_episodes(produced)
    assert exported["terminals"].shape == exported["rewards"].shape == (1, sum(length), 1)
    ends = (exported["terminals"] | exported["truncations"])[0, :, 0]
    np.testing.assert_array_equal(ends, leaves["done"])
    np.testing.assert_array_equal(exported["rewards"][0, :, 0], leaves["reward"])
    described = list(ippo.describe("my_ppo", "run-1").values())[:3]
    share = [100 * part["actions"][1] for part in described]
    np.testing.assert_allclose(share, share_of_right(produced), rtol=1e-12)


def share_of_right(produced):
    """Percent of action 1 in the episodes that began in each third of training, by plain Python."""
    chosen = [[], [], []]
    for env in range(NE):
        done = np.concatenate([x["done"][:, env] for x in produced])
        action = np.concatenate([x["action"][:, env] for x in produced])
        begin = 0
        for end in np.flatnonzero(done):
            chosen[3 * begin // len(done)] += list(action[begin : end + 1])
            begin = end + 1
    return [100 * np.mean(actions) for actions in chosen]


@in_empty_folder
def test_one_agent_without_an_axis_is_described_and_not_exported():
    produced = record_loop((), PLAIN, change=full_leaves, **FULL)
    described = list(ippo.describe("my_ppo", "run-1").values())[:3]
    share = [100 * part["actions"][1] for part in described]
    np.testing.assert_allclose(share, share_of_right(produced), rtol=1e-12)
    with pytest.raises(ippo.ConfigError, match="needs an axis of agents"):
        ippo.export_og_marl("my_ppo", "run-1")
