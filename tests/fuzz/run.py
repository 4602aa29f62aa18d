"""Fuzz readers with atheris: ``python tests/fuzz/run.py SECONDS READER…``; see `make fuzz`.

What breaks a promise is kept in ``tests/fuzz/corpus/READER/`` as ``crash-…`` or ``timeout-…``,
where ``tests/test_hostile.py`` replays it from then on. What only reaches new code is collected in
``build/fuzz/READER/``, beside what libFuzzer says; ``--merge`` brings the few inputs of it that
matter into the corpus.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import resource
import sys
import traceback
from contextlib import redirect_stderr
from pathlib import Path
from random import Random

import atheris

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT)]

with (
    redirect_stderr(io.StringIO()),  # a line for each module
    atheris.instrument_imports(include=["distckpt", "zipfile", "pickle", "json"]),
):
    from fuzz.readers import CORPUS, READERS, corpus

    from distckpt.formats import each

    list(each())  # each is a module that is imported when it is asked for

_FOUND = _ROOT / "build" / "fuzz"
_MEMORY_BYTES = 8 << 30  # of addresses: far more than is ever used, far less than a bomb takes
_LONGEST_BYTES = 1 << 16
_LONGEST_S = 25


def main() -> int:
    """Fuzz each reader in a process of its own, as many at once as there are cores.

    The processes are forked, for to instrument the code takes longer than a short run.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seconds", type=int)
    parser.add_argument("readers", nargs="+", choices=READERS)
    parser.add_argument("--merge", action="store_true", help="only merge what was found before")
    chosen = parser.parse_args()
    waiting, running, broken = list(chosen.readers), dict[int, str](), 0
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            reader = waiting.pop(0)
            running[_start(reader, chosen.seconds, merge=chosen.merge)] = reader
        process, status = os.wait()
        reader = running.pop(process)
        said = _log(reader).read_text(errors="replace")
        count = re.search(r"number_of_executed_units: (\d+)", said)
        print(f"{reader}: {count[1] if count else 0} inputs in {chosen.seconds} s", flush=True)
        if status or not (count or chosen.merge):
            code = os.waitstatus_to_exitcode(status)
            print(f"{reader} broke a promise, or its fuzzer did ({code}):\n{said}", file=sys.stderr)
            broken += 1
    return 1 if broken else 0


def _log(reader: str) -> Path:
    return _FOUND / f"{reader}.log"


def _start(reader: str, seconds: int, *, merge: bool) -> int:
    """Fork a process that fuzzes a reader, and return its id."""
    (_FOUND / reader).mkdir(parents=True, exist_ok=True)
    (CORPUS / reader).mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if not process:
        try:
            with _log(reader).open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            _fuzz(reader, seconds, merge=merge)  # ends the process
        except BaseException:  # noqa: BLE001  nobody else would hear of it
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    return process


def _fuzz(name: str, seconds: int, *, merge: bool) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable()
    reader = READERS[name]
    reader.warm(corpus(name).values())

    def changed(data: bytes, limit_bytes: int, seed: int) -> bytes:
        random = Random(seed)
        if not random.randrange(8):
            return atheris.Mutate(data, limit_bytes)
        return reader.mutate(data, random)[:limit_bytes]

    found, kept = _FOUND / name, CORPUS / name
    options = [
        f"-artifact_prefix={kept}/",
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST_BYTES}",
        f"-timeout={_LONGEST_S}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    folders = [kept, found] if merge else [found, kept]
    if merge:
        options.append("-merge=1")
    atheris.Setup([sys.argv[0], *options, *map(str, folders)], reader.check, custom_mutator=changed)
    atheris.Fuzz()


sys.exit(main())
