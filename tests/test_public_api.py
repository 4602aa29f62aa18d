"""What users build on: the public names, how they are called, and what importing them costs."""

from __future__ import annotations

import inspect
import os
import statistics
import subprocess
import sys

import pytest

import distckpt

NAMES = [
    "AtMostOverhead",
    "AtSteps",
    "Best",
    "Checkpoint",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointNotFound",
    "CleanReport",
    "ConvertReport",
    "Coordinator",
    "CorruptCheckpoint",
    "Event",
    "EverySeconds",
    "EverySteps",
    "FlatShard",
    "IncompleteCheckpoint",
    "JsonLines",
    "KeepAt",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "LayoutError",
    "LazyArray",
    "LoadFailed",
    "LoadReport",
    "Manager",
    "MatchError",
    "Matching",
    "Mesh",
    "Net",
    "OnPreemption",
    "PendingCheckpoint",
    "PerRank",
    "Region",
    "SaveFailed",
    "SavePlan",
    "SaveStats",
    "Shard",
    "Solo",
    "Store",
    "StoreError",
    "StoredTensor",
    "TensorBoard",
    "Trace",
    "UnsupportedFormat",
    "YoungDaly",
    "clean",
    "convert",
    "load",
    "load_into",
    "match",
    "name_map",
    "open",
    "plan",
    "register_net",
    "save",
    "save_async",
    "watch",
]

# Parameters, in order; those behind * are passed by name. More may come, with defaults.
SIGNATURES = {
    "save": "url state * comm=None metadata=None overwrite=False replicas='check' timeout_s=600 "
    "storage_options=None",
    "save_async": "url state * lazy=False check_lazy=False staging_bytes=None comm=None "
    "metadata=None overwrite=False replicas='check' timeout_s=600 storage_options=None",
    "plan": "state * comm=None",
    "open": "url * storage_options=None",
    "load": "url * filter_prefix=() only_prefix=() select=None storage_options=None",
    "load_into": "url net * comm=None strict=False filter_prefix=() only_prefix=() select=None "
    "rename=None cast=True verify=True per_rank=None timeout_s=600",
    "watch": "root * start='new' every=False hold=True poll_s=1.0 timeout_s=None stop=None",
    "match": "saved wanted * strict=False filter_prefix=() only_prefix=() rename=None",
    "Shard": "array offset global_shape",
    "FlatShard": "array start global_shape region",
    "PerRank": "value",
    "Region": "start stop",
    "Mesh.region": "self spec global_shape * uneven='balanced'",
    "Mesh.shard": "self local spec global_shape * uneven='balanced'",
    "EverySteps": "steps",
    "KeepLast": "count",
    "AtMostOverhead": "fraction",
    "Best": "metric lowest=True min_delta=0.0",
    "EverySeconds": "seconds",
    "YoungDaly": "mtbf_s",
    "KeepBest": "metric count=1 lowest=True",
    "KeepEvery": "steps=None * seconds=None",
    "KeepFor": "seconds",
    "Manager": "root * comm=None save keep max_pending=1 lazy=False check_lazy=False "
    "staging_bytes=None state=None replicas='check' on_failure='raise' "
    "stop_signals=None max_seconds=None on_event=None progress=False timeout_s=600 "
    "storage_options=None",
    "Manager.load_latest_into": "self net * default=None strict=True filter_prefix=() "
    "only_prefix=() select=None rename=None cast=True verify=True per_rank=None",
    "Manager.load_best_into": "self net metric * lowest=True strict=True",
    "Manager.due": "self step",
    "Manager.best": "self metric * lowest=True",
    "Manager.pin": "self step reason",
    "Manager.unpin": "self step",
    "Manager.step": "self step state * metrics=None metadata=None",
    "Manager.save": "self step state * metrics=None metadata=None",
    "PendingCheckpoint.wait_staged": "self",
    "PendingCheckpoint.done": "self",
    "PendingCheckpoint.wait": "self timeout_s=None",
    "Checkpoint.verify": "self",
    "Checkpoint.hold": "self * lease_s=600.0",
    "Checkpoint.load_into": "self net * comm=None strict=False",
}

MEMBERS = {
    "Checkpoint": "metadata step created values per_rank load_into verify hold __len__ __iter__ "
    "__getitem__ __contains__",
    "StoredTensor": "shape dtype __getitem__ __array__",
    "PendingCheckpoint": "wait_staged done wait",
    "Manager": "load_latest_into load_best_into step save due wait close should_stop stop_reason "
    "steps latest best open pin unpin explain __enter__ __exit__",
    "Mesh": "region shard",
}


def found(path):
    thing = distckpt
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def test_the_public_names_are_these():
    assert sorted(distckpt.__all__) == sorted(NAMES)
    assert all(hasattr(distckpt, name) for name in NAMES)


def test_star_imports_exactly_the_public_names():
    space = {}
    exec("from distckpt import *", space)
    assert set(space) - {"__builtins__"} == set(NAMES)


def test_every_public_name_is_documented():
    assert [name for name in NAMES if not inspect.getdoc(getattr(distckpt, name))] == []


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_public_function_takes_what_it_is_promised_to_take(path):
    parameters = inspect.signature(found(path)).parameters
    kinds = inspect.Parameter
    by_name = False
    for promised in SIGNATURES[path].split():
        if promised == "*":
            by_name = True
            continue
        name, _, default = promised.partition("=")
        parameter = parameters[name]
        assert (parameter.kind == kinds.KEYWORD_ONLY) == by_name, name
        if default:
            assert repr(parameter.default) == default, name
    positional = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD}
    ]
    promised = SIGNATURES[path].split(" * ")[0].split()
    assert positional == [name.partition("=")[0] for name in promised]
    extra = set(parameters) - {word.partition("=")[0] for word in SIGNATURES[path].split()}
    variadic = {kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL}
    for name in extra:
        assert parameters[name].kind in variadic or parameters[name].default is not kinds.empty


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_public_class_has_what_it_is_promised_to_have(kind):
    missing = [name for name in MEMBERS[kind].split() if not hasattr(getattr(distckpt, kind), name)]
    assert missing == []


def test_the_version_is_the_packages_own():
    assert isinstance(distckpt.__version__, str)


# --------------------------------------------------------------------------------------- the import


def run(program, **environment):
    """Run a program in a fresh process and return what it prints."""
    command, environ = [sys.executable, "-c", program], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return done.stdout.strip()


def test_importing_starts_no_mpi_and_loads_no_framework():
    loaded = run(
        "import sys, distckpt; print(*{name.partition('.')[0] for name in sys.modules}, sep=' ')"
    ).split()
    assert "numpy" in loaded
    assert {"mpi4py", "torch", "jax", "s3fs", "rich", "aiohttp", "safetensors"} & {*loaded} == set()


def test_using_it_in_one_process_starts_no_mpi_and_loads_no_framework(tmp_path):
    program = (
        "import sys, numpy, distckpt\n"
        f"distckpt.save({str(tmp_path / 'a')!r}, {{'w': numpy.ones(3)}})\n"
        f"assert distckpt.load({str(tmp_path / 'a')!r})['w'].tolist() == [1, 1, 1]\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, sep=' ')"
    )
    assert {"mpi4py", "torch", "jax", "s3fs", "rich"} & {*run(program).split()} == set()


def test_importing_writes_nothing_and_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import distckpt"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_importing_takes_less_than_twice_what_its_libraries_take(tmp_path):
    # The processor's time, since others may want it, too; in turn, since it may change its pace.
    timed = (
        "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    )
    # Compiled, all of it, whatever the state of the installation.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    taken = {"distckpt": [], "numpy, fsspec, google.protobuf": []}
    for _ in range(6):
        for names, seconds in taken.items():
            seconds.append(float(run(timed.format(names), **compiled)))
    own, libraries = (statistics.median(seconds[1:]) for seconds in taken.values())
    assert own < 2 * libraries
