"""A failed save never goes unnoticed, and a rank that is interrupted leaves nobody waiting."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import distckpt
from distckpt import SaveFailed, StoreError
from distckpt.failures import EXIT_STATUS
from distckpt.testing import FaultyStore, MemoryStore, run_ranks


def failing(store, *, on=True):
    def fail(kind, name, number):
        if on and kind == "commit":
            raise StoreError("full", refused=True)

    return FaultyStore(store, on_operation=fail)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_next_save_raises_what_nobody_waited_for_on_all_ranks(ranks):
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(
            failing(store, on=comm.rank == comm.size - 1), {"w": np.zeros(9)}, comm=comm
        )
        pending.close()
        with pytest.raises(SaveFailed, match="1 earlier asynchronous save failed") as caught:
            distckpt.save(store, {"w": np.zeros(9)}, comm=comm)
        distckpt.save(store, {"w": np.zeros(9)}, comm=comm)  # told once
        return str(caught.value)

    texts = run_ranks(ranks, go)
    assert len(set(texts)) == 1
    assert "full" in texts[0]
    assert "Save again to go on" in texts[0]


def test_it_is_raised_once_also_where_a_rank_learns_of_it_late():
    """One rank knows of the failure when the next save begins, the other only afterwards."""
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(failing(store), {"w": np.zeros(9)}, comm=comm)
        if comm.rank == 0:
            pending.close()
        raised = 0
        for _ in range(3):
            try:
                distckpt.save(store, {"w": np.zeros(9)}, comm=comm, overwrite=True)
            except SaveFailed:
                raised += 1
        pending.close()
        distckpt.save(store, {"w": np.zeros(9)}, comm=comm, overwrite=True)
        return raised

    assert run_ranks(2, go) == [1, 1]


def test_a_failure_that_was_waited_for_is_not_raised_again():
    def go(comm):
        store = MemoryStore()
        pending = distckpt.save_async(failing(store), {"w": np.zeros(9)}, comm=comm)
        with pytest.raises(SaveFailed):
            pending.wait()
        distckpt.save(store, {"w": np.zeros(9)}, comm=comm)

    run_ranks(1, go)


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_warn_the_next_save_goes_on(ranks, caplog):
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(
            failing(store), {"w": np.zeros(9)}, comm=comm, on_failure="warn"
        )
        pending.close()
        distckpt.save(store, {"w": np.zeros(9)}, comm=comm)
        with pytest.raises(SaveFailed):
            pending.wait()

    run_ranks(ranks, go)
    assert "full" in caplog.text


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="on_failure='ignore'"):
        distckpt.save_async(MemoryStore(), {}, comm=distckpt.Solo(), on_failure="ignore")


def test_a_librarys_panic_in_the_background_fails_the_save():
    def panic(kind, name, number):
        if kind == "commit":
            raise SystemExit("panic")

    inner = MemoryStore()

    def go(comm):
        store = FaultyStore(inner, on_operation=panic)
        pending = distckpt.save_async(store, {"w": np.zeros(9)}, comm=comm)
        with pytest.raises(SaveFailed, match="panic"):
            pending.wait(30)

    run_ranks(2, go)


def test_a_panic_in_the_commit_fails_the_save():
    def panic(kind, name, number):
        if kind == "put":
            raise SystemExit("panic")

    inner = MemoryStore()

    def go(comm):
        store = FaultyStore(inner, on_operation=panic)
        pending = distckpt.save_async(store, {"w": np.zeros(9)}, comm=comm)
        with pytest.raises(SaveFailed, match="panic"):
            pending.wait(30)

    run_ranks(2, go)


# ----------------------------------------------------------------------------- at the program's end


def run_program(text, folder):
    program = "import sys, numpy as np, distckpt\nfolder = sys.argv[1]\n" + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


FAILS = """
    from distckpt.store import open_store
    from distckpt.testing import FaultyStore
    def fail(kind, name, number):
        if kind == "commit":
            raise distckpt.StoreError("full", refused=True)
    store = FaultyStore(open_store(folder), on_operation=fail)
"""


def test_a_program_whose_last_save_failed_ends_with_a_status_that_says_so(tmp_path):
    ended = run_program(
        FAILS + "    pending = distckpt.save_async(store, {'w': np.zeros(9)})\n    print('done')\n",
        tmp_path / "c",
    )
    assert ended.returncode == EXIT_STATUS
    assert ended.stdout == "done\n"
    assert "1 earlier asynchronous save failed" in ended.stderr
    assert "full" in ended.stderr


@pytest.mark.parametrize(
    "what",
    [
        "distckpt.save_async(store, {'w': np.zeros(9)}, on_failure='warn')",
        "distckpt.save_async(folder, {'w': np.zeros(9)})",
        "distckpt.save_async(folder, {'w': np.zeros(9)}).wait()",
    ],
    ids=["warn", "good", "good-and-waited-for"],
)
def test_otherwise_it_ends_as_it_would(tmp_path, what):
    ended = run_program(FAILS + f"    {what}\n", tmp_path / "c")
    assert ended.returncode == 0


def test_a_failure_that_the_program_has_handled_does_not_change_its_status(tmp_path):
    ended = run_program(
        FAILS
        + """
    try:
        distckpt.save_async(store, {'w': np.zeros(9)}).wait()
    except distckpt.SaveFailed:
        print('handled')
""",
        tmp_path / "c",
    )
    assert (ended.returncode, ended.stdout) == (0, "handled\n")


def test_a_save_in_flight_at_the_end_is_finished(tmp_path):
    ended = run_program("distckpt.save_async(folder, {'w': np.arange(1e6)})\n", tmp_path / "c")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert distckpt.load(tmp_path / "c")["w"][-1] == 999_999


# ------------------------------------------------------------------------------------------ Ctrl-C


def test_an_interrupted_save_cleans_up_and_raises(tmp_path):
    """The signal comes in the middle of the writing of a file of several blocks."""
    ended = run_program(
        """
        import os, signal
        from distckpt.store import open_store
        from distckpt.testing import FaultyStore
        writes = []
        def interrupt(kind, name, number):
            writes.extend([name] if kind == "write" else [])
            if kind == "write" and len(writes) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        store = FaultyStore(open_store(folder), on_operation=interrupt)
        try:
            distckpt.save(store, {"w": np.zeros(4_000_000)})
        except KeyboardInterrupt as exc:
            print("interrupted:", exc.__cause__)
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """,
        tmp_path / "c",
    )
    assert ended.returncode == 0, ended.stderr
    assert "interrupted:" in ended.stdout
    assert "interrupted (Ctrl-C)" in ended.stdout
    assert ended.stdout.endswith("True\n")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_a_handler_of_the_programs_own_is_not_replaced():
    import signal

    from distckpt.waiting import deferred_interrupt

    def mine(number, frame):
        del number, frame

    before = signal.signal(signal.SIGINT, mine)
    try:
        with deferred_interrupt():
            assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_is_raised_at_once():
    import signal

    from distckpt.waiting import deferred_interrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupt:  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            assert interrupt.came
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one was held back, too")
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_save_says_what_it_cost(ranks):
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(store, {"w": np.zeros(10_000)}, comm=comm)
        assert 0 <= pending.bytes_done <= pending.bytes_total
        return pending.wait().stats, pending.bytes_done, pending.bytes_total

    found = run_ranks(ranks, go)
    stats = found[0][0]
    assert sorted(stats.ranks) == list(range(ranks))
    assert stats.nbytes == sum(len(d) for n, d in store.objects.items() if "shard" in n)
    assert [one.nbytes for one in stats.ranks.values()] == [done for _, done, _ in found]
    assert all(done == total for _, done, total in found)
    names = [phase.name for phase in stats.ranks[0].phases]
    assert names == ["plan", "check", "stage", "write", "sync", "commit"]
    assert all(phase.seconds >= 0 for one in stats.ranks.values() for phase in one.phases)
    assert stats.seconds >= stats.stall_s > 0
    assert stats.slowest_rank in stats.ranks
    assert "stall" in str(stats)
    assert all(list(one.ranks) == [rank] for rank, (one, _, _) in enumerate(found) if rank)


def test_a_checkpoint_that_was_opened_has_no_stats():
    store = MemoryStore()
    saved = distckpt.save(store, {"w": np.zeros(3)}, comm=distckpt.Solo())
    assert saved.stats.nbytes > 0
    assert distckpt.open(store).stats is None


def test_a_save_that_is_begun_at_the_very_end_is_made_all_the_same(tmp_path):
    """When an exit handler runs, no thread works any more."""
    ended = run_program(
        """
        import atexit
        distckpt.save_async(folder + "/1", {"w": np.ones(9)}).wait()
        def last():
            pending = distckpt.save_async(folder + "/2", {"w": np.full(9, 2.0)})
            print(pending.done())
        atexit.register(last)
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")
    assert distckpt.load(tmp_path / "2")["w"].tolist() == [2.0] * 9


@pytest.mark.parametrize("leaves", ["finish_saves(); os._exit(0)", "sys.exit()"])
def test_a_forked_process_saves_with_threads_of_its_own(tmp_path, leaves):
    ended = run_program(
        f"""
        import os, warnings
        from distckpt.pending import finish_saves
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and forks
        distckpt.save_async(folder + "/parent", {{"w": np.ones(9)}}).wait()
        child = os.fork()
        if not child:
            distckpt.save_async(folder + "/child", {{"w": np.full(9, 2.0)}})
            {leaves}
        print(os.waitpid(child, 0)[1])
        distckpt.save_async(folder + "/again", {{"w": np.full(9, 3.0)}})
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")
    found = [distckpt.load(tmp_path / name)["w"][0] for name in ("parent", "child", "again")]
    assert found == [1.0, 2.0, 3.0]
