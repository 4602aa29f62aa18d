"""Peak memory and time of converting one large checkpoint to every format and back.

Each conversion runs in a process of its own, which first converts a small part, so that libraries
are counted before. What counts is resident memory, mapped pages of files among it. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import distckpt

FORMATS = {
    "distckpt": "distckpt",
    "safetensors": "x.safetensors",
    "safetensors-folder": "hf",
    "mindspore": "x.ckpt",
    "torch": "x.pth",
    "dcp": "dcp",
    "npz": "x.npz",
    "keras": "x.weights.h5",
}

ONE = """
import os, sys, threading, time
import distckpt
src, dst, form = sys.argv[1:]
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
distckpt.convert(src, dst + "-warm", format=form, only_prefix="small", overwrite=True)
before = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
started = time.monotonic()
distckpt.convert(src, dst, format=form, overwrite=True)
seconds = time.monotonic() - started
done = True
watcher.join()
print(seconds, peak - before)
"""


def convert(source: Path, target: Path, format: str) -> tuple[float, int]:
    """Convert in a process of its own; return seconds and bytes of memory that it took."""
    command = [sys.executable, "-c", ONE, str(source), str(target), format]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, grown = done.stdout.split()
    return float(seconds), int(grown)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--tensor-megabytes", type=int, default=128, help="size of a tensor")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    count = round(chosen.gigabytes * 1000 / chosen.tensor_megabytes)
    rows = chosen.tensor_megabytes * 1000000 // 4000
    block = np.random.default_rng(0).random((rows, 1000), np.float32)
    state = {f"layer{number}.weight": block for number in range(count)}
    try:
        source = folder / "source"
        distckpt.save(source, state | {"small": np.ones(3, np.float32)})
        total = count * block.nbytes
        print(f"{count} tensors of {block.nbytes / 1e6:.0f} MB, {total / 1e9:.2f} GB in all\n")
        print("| format | to it: s | MB resident | from it: s | MB resident |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for format, name in FORMATS.items():
            to_s, to_bytes = convert(source, folder / name, format)
            from_s, from_bytes = convert(folder / name, folder / "back", "distckpt")
            print(
                f"| {format} | {to_s:.1f} | {to_bytes / 1e6:.0f} | {from_s:.1f} | "
                f"{from_bytes / 1e6:.0f} |",
                flush=True,
            )
            for made in (folder / name, folder / "back"):
                if made.is_dir():
                    shutil.rmtree(made)
                else:
                    made.unlink()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
