"""``python -m distckpt info|ls|verify|convert|halt URL``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest

import distckpt
from distckpt import Manager, PerRank, Shard
from distckpt.cli import main, size_text
from distckpt.manager.halt import parse_halt
from distckpt.manifest import MANIFEST_NAME
from distckpt.testing import run_ranks


def save(url, **options):
    """A checkpoint of two ranks."""

    def go(comm):
        state = {
            "net": {"weight": Shard(np.zeros((300, 4), "f4"), (300 * comm.rank, 0), (600, 4))},
            "scale": np.float64(2),
            "none": np.zeros((0, 3), np.int8),
            "epoch": 3,
            "name": "digits",
            "rng": PerRank(comm.rank),
        }
        distckpt.save(url, state, comm=comm, **options)

    run_ranks(2, go)


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path / "run", metadata={"git": "c0ffee", "list": [1, 2]})
    return tmp_path / "run"


@pytest.fixture
def run(tmp_path):
    with Manager(tmp_path / "run", comm=distckpt.Solo()) as manager:
        for step in (100, 200):
            metrics = {"loss": 1 / step, "accuracy": 0.75}
            manager.save(step, {"w": np.zeros(1000)}, metrics=metrics)
    return tmp_path / "run"


@pytest.fixture(params=["plain", "rich"])
def printed(request, capsys, monkeypatch):
    """What a command prints, read back without the spaces that align it: (status, lines, error)."""

    def call(*arguments):
        if request.param == "rich":
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            monkeypatch.setenv("COLUMNS", "200")  # heeded by terminals that aren't dumb only
            monkeypatch.setenv("TERM", "xterm")
        status = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        text = re.sub(r"\x1b\[[0-9;]*m", "", found.out)  # bold, for the header
        lines = [re.sub(r" {2,}", " | ", line.strip()) for line in text.splitlines()]
        return status, lines, found.err

    return call


# ------------------------------------------------------------------------------------------- info


def test_info_says_what_a_checkpoint_is(checkpoint, printed):
    status, lines, error = printed("info", checkpoint)
    assert (status, error) == (0, "")
    held = dict(line.split(" | ", 1) for line in lines)
    opened = distckpt.open(checkpoint)
    assert held["url"] == str(checkpoint)
    assert held["created"] == f"{opened.created:%Y-%m-%d %H:%M:%S} UTC"
    assert held["step"] == "-"
    assert held["saved by"] == "2 ranks"
    assert held["save id"] == f"{opened.manifest.save_id:016x}"
    assert held["tensors"] == "3, 9.6 kB"
    assert re.fullmatch(r"2, \d+\.\d kB", held["files"])
    assert held["value epoch"] == "3"
    assert held["value name"] == "'digits'"
    assert held["per rank rng"] == "one a rank"
    assert held["metadata git"] == "'c0ffee'"
    assert held["metadata list"] == "[1, 2]"


def test_info_of_a_step_says_its_step_and_metrics(run, printed):
    status, lines, _ = printed("info", run / "step-00000200")
    assert status == 0
    for line in (
        "step | 200",
        "saved by | 1 rank",
        "metric loss | 0.005",
        "metric accuracy | 0.75",
    ):
        assert line in lines


def test_a_long_value_is_cut(tmp_path, printed):
    distckpt.save(tmp_path, {"text": "x" * 1000})
    _, lines, _ = printed("info", tmp_path)
    (line,) = [line for line in lines if line.startswith("value text")]
    assert line == "value text | '" + "x" * 59


def test_what_python_refuses_to_print_is_named(tmp_path, printed):
    huge = 1 << 20_000
    distckpt.save(tmp_path, {"n": huge}, metadata={"deep": [huge]})
    status, lines, _ = printed("info", tmp_path)
    assert status == 0
    assert "value n | int of too many digits to print" in lines
    assert "metadata deep | list of too many digits to print" in lines


# --------------------------------------------------------------------------------------------- ls


def test_a_name_cant_drive_the_terminal(tmp_path, printed):
    distckpt.save(tmp_path, {"w\x1b[2J\n": np.zeros(2)})
    assert printed("ls", tmp_path)[1][1].startswith(r"w\x1b[2J\n | float64")


@pytest.mark.parametrize("name", ["layer[0].w", "[bold]w", "[/]", "a[/red]", r"back\slash"])
def test_any_name_is_printed_as_it_is(tmp_path, name, printed):
    distckpt.save(tmp_path, {name: np.zeros(2), "value of " + name: name})
    assert printed("ls", tmp_path)[1][1].startswith(f"{name} | float64")
    assert f"value value of {name} | {name!r}" in printed("info", tmp_path)[1]


def test_ls_lists_the_tensors(checkpoint, printed):
    status, lines, error = printed("ls", checkpoint)
    assert (status, error) == (0, "")
    assert lines == [
        "tensor | dtype | shape | size | pieces in files",
        "net.weight | float32 | 600 × 4 | 9.6 kB | 2 in 2",
        "scale | float64 | scalar | 8 B | 1 in 1",
        "none | int8 | 0 × 3 | 0 B | 1 in 1",
        "and 3 values: see `info`",
    ]


def test_ls_of_a_run_lists_its_checkpoints(run, printed):
    status, lines, error = printed("ls", run)
    assert (status, error) == (0, "")
    assert lines[0] == "step | created | ranks | size | metrics"
    assert [re.sub(r"\| [-0-9]+ [:0-9]+ \|", "| when |", line) for line in lines[1:]] == [
        "100 | when | 1 | 8.0 kB | loss 0.01, accuracy 0.75",
        "200 | when | 1 | 8.0 kB | loss 0.005, accuracy 0.75",
    ]


def test_ls_leaves_out_what_was_never_committed(run, printed):
    (run / "step-00000200" / MANIFEST_NAME).unlink()
    (run / "notes").mkdir()
    _, lines, _ = printed("ls", run)
    assert [line.split(" | ")[0] for line in lines] == ["step", "100"]


# ----------------------------------------------------------------------------------------- verify


def test_verify_of_a_good_checkpoint_says_so(checkpoint, printed):
    status, lines, error = printed("verify", checkpoint)
    assert (status, error) == (0, "")
    assert len(lines) == 1
    assert re.fullmatch(rf"{checkpoint}: good: \d+\.\d kB in 2 files", lines[0])


def test_verify_names_the_damage(checkpoint, printed):
    first, second = sorted(checkpoint.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[5000] ^= 1
    first.write_bytes(bytes(data))
    second.unlink()
    status, lines, error = printed("verify", checkpoint)
    assert (status, lines) == (1, [])
    assert error.startswith(f"CorruptCheckpoint: {checkpoint}: 2 damaged places:\n")
    assert f"{first.name}: bytes 0:" in error
    assert "net.weight[0:300, 0:4]" in error
    assert f"{second.name}: the file is not there" in error


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("command", ["info", "ls", "verify"])
def test_where_nothing_is_every_command_fails(tmp_path, command, printed):
    status, lines, error = printed(command, tmp_path / "none")
    assert (status, lines) == (1, [])
    assert error == (
        f"CheckpointNotFound: {tmp_path / 'none'}: expected a checkpoint (manifest.binpb), or "
        "a file of another format, found nothing\n"
    )


@pytest.mark.parametrize("command", ["info", "ls", "verify"])
@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lambda path: path.unlink(), "IncompleteCheckpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "CorruptCheckpoint"),
        (lambda path: path.write_bytes(b"something else"), "UnsupportedFormat"),
    ],
    ids=["missing", "cut short", "foreign"],
)
def test_a_damaged_manifest_fails_every_command(checkpoint, command, harm, kind, printed):
    harm(checkpoint / MANIFEST_NAME)
    status, lines, error = printed(command, checkpoint)
    assert (status, lines) == (1, [])
    assert error.startswith(f"{kind}: ")
    assert error.count("\n") == 1


def test_an_unknown_scheme_fails(printed):
    status, _, error = printed("info", "nosuch://bucket")
    assert status == 1
    assert error.startswith("StoreError: nosuch://bucket: can't open this URL")


@pytest.mark.parametrize("arguments", [[], ["info"], ["look", "x"], ["info", "x", "y"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: distckpt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the program


def test_the_module_is_a_program(checkpoint):
    def run(*arguments):
        command = [sys.executable, "-W", "error", "-m", "distckpt", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run("verify", checkpoint)
    assert (good.returncode, good.stderr) == (0, "")
    assert ": good: " in good.stdout
    bad = run("verify", checkpoint / "none")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("CheckpointNotFound")
    assert "Traceback" not in bad.stderr
    assert run("verify").returncode == 2


def test_a_terminal_gets_a_table_of_richs(checkpoint):
    leader, follower = os.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "distckpt", "ls", str(checkpoint)],
            stdout=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        ) as program:
            assert program.wait(60) == 0
        found = os.read(leader, 1 << 16).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert "\x1b[1m" in found  # a bold header
    assert "600 × 4" in found


def test_without_rich_a_terminal_gets_a_plain_table(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("distckpt.cli.find_spec", lambda name: None)
    assert main(["ls", str(checkpoint)]) == 0
    assert "net.weight  float32  600 × 4" in capsys.readouterr().out


def test_the_installed_command_is_this_one():
    scripts = {entry.value for entry in entry_points(group="console_scripts", name="distckpt")}
    assert scripts <= {"distckpt.cli:main"}


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (10**17, "100.0 PB")],
)
def test_sizes_are_written_in_powers_of_1000(size, told):
    assert size_text(size) == told


# ---------------------------------------------------------------------------------------- convert


def test_convert_writes_the_format_of_the_ending_and_says_what_it_did(
    checkpoint, tmp_path, printed
):
    target = tmp_path / "all.safetensors"
    status, lines, error = printed("convert", checkpoint, target, "--dtype", "float16")
    assert (status, error) == (0, "")
    assert lines[0].startswith("distckpt → safetensors: 3 tensors, 4.8 kB")
    assert "left out (a value of each rank): rng" in lines
    assert printed("info", target)[1][1] == "format | safetensors"
    assert "net.weight | float16" in printed("ls", target)[1][1]
    assert printed("verify", target)[1] == [
        f"{target}: readable: 4.8 kB in 3 tensors (safetensors)"
    ]


def test_convert_replaces_nothing_unless_told_to(checkpoint, tmp_path, printed):
    (tmp_path / "map").write_text("net.weight w\n")
    arguments = ["convert", checkpoint, tmp_path / "x.ckpt", "--rename", tmp_path / "map"]
    assert printed(*arguments)[0] == 0
    status, _, error = printed(*arguments)
    assert status == 1
    assert error.startswith("CheckpointExists: ")
    assert printed(*arguments, "--overwrite", "--format", "safetensors")[0] == 0
    assert printed("info", tmp_path / "x.ckpt")[1][1] == "format | safetensors"


# -------------------------------------------------------------------------------------------- halt


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "now"),
        (["--at", "2030-01-31T18:00+01:00"], "at 2030-01-31T18:00+01:00"),
        (["--after", "3"], "after 3 saves"),
    ],
)
def test_halt_leaves_a_file_that_the_run_will_understand(tmp_path, capsys, options, text):
    assert main(["halt", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/halt: the run will save and stop {text}\n"
    assert (tmp_path / "halt").read_text() == text
    parse_halt(text)


def test_halt_can_be_taken_back(run):
    before = sorted(run.iterdir())
    main(["halt", str(run)])
    assert sorted(run.iterdir()) == sorted([*before, run / "halt"])
    assert main(["halt", str(run), "--cancel"]) == 0
    assert sorted(run.iterdir()) == before
    assert main(["halt", str(run), "--cancel"]) == 0


@pytest.mark.parametrize("options", [["--at", "noon"], ["--after", "0"]])
def test_halt_refuses_what_the_run_would_not_understand(tmp_path, capsys, options):
    assert main(["halt", str(tmp_path), *options]) == 1
    assert f"can't halt '{options[0][2:]} {options[1]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
