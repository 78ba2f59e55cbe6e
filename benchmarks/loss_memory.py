"""Peak bytes of output layer and loss, forward and backward, beside plain torch.

    python benchmarks/loss_memory.py --json build/loss_memory.json

On fake tensors of device `cuda`, 8,192 tokens of hidden size 1,024 in bf16, whatever torch's
operations hand out; and on this CPU by the process's resident memory, 4,096 tokens x 32,000. Plain
is `F.cross_entropy(F.linear(hidden, weight).float(), targets)`, as models are commonly written.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fake_cuda"))

BAR = 0.25
"""Ours over plain, at most."""
TOKENS, HIDDEN = 8192, 1024
VOCABULARIES = (32_000, 128_000, 256_000)
RESIDENT = (4096, 32_000)
"""Tokens and vocabulary of what is measured on the CPU."""


def _step(who: str, tokens: int, vocabulary: int, device: str) -> None:
    """One forward and backward pass; the inputs are made first."""
    import torch
    import torch.nn.functional as F

    from megagpt.kernels.linear_cross_entropy.contract import Vocabulary
    from megagpt.kernels.registry import Kernels

    place = torch.device(device)
    make = {"device": place, "dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = torch.randn(tokens, HIDDEN, **make), torch.randn(vocabulary, HIDDEN, **make)
    targets = torch.zeros(tokens, dtype=torch.int64, device=place)
    _begin()
    if who == "plain":
        loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    else:
        kernels = Kernels("auto", device=place, dtype=torch.bfloat16)
        function = kernels.choose("linear_cross_entropy", size=HIDDEN, rows=vocabulary)
        loss = function(hidden, weight, targets, vocabulary=Vocabulary(vocabulary)).sum()
    loss.backward()


def _begin() -> None:
    """Where counting begins; replaced by who counts."""


def counted(who: str, vocabulary: int) -> int:
    """The most bytes alive beyond hidden states and weight."""
    import weakref

    import torch
    from fake_device import fake_cuda
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Peak(TorchDispatchMode):
        now = most = 0
        seen: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
                    continue
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._free, key, size)
            return result

        def _free(self, key: int, size: int) -> None:
            self.seen.discard(key)
            self.now -= size

    with fake_cuda(), Peak() as peak:
        _step(who, TOKENS, vocabulary, "cuda")
    inputs = 2 * HIDDEN * (TOKENS + vocabulary) + 8 * TOKENS
    return peak.most - inputs


def resident(who: str) -> int:
    """The most that the process grows by, looked at every millisecond."""
    import psutil

    process, seen, done = psutil.Process(), [0], threading.Event()
    before = [0]

    def begin() -> None:
        before[0] = process.memory_info().rss

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.001)

    _step(who, 8, 128, "cpu")  # loads libraries, which are not the loss's
    globals()["_begin"] = begin
    watcher = threading.Thread(target=watch)
    watcher.start()
    _step(who, *RESIDENT, "cpu")
    done.set()
    watcher.join()
    return max(seen) - before[0]


def main() -> None:
    """Prints each ratio, writes the JSON; exit code 1 above the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    from fake_device import compile_guard

    found: dict[str, dict[str, float]] = {}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        guard = str(compile_guard(Path(directory)))
        with ProcessPoolExecutor(1, context, ctypes.CDLL, (guard,)) as worker:
            for vocabulary in VOCABULARIES:
                found[f"{TOKENS} x {vocabulary}, counted"] = {
                    who: worker.submit(counted, who, vocabulary).result()
                    for who in ("ours", "plain")
                }
    values = {}
    for who in ("ours", "plain"):  # a process each: memory that one has had is not seen again
        with ProcessPoolExecutor(1, context) as worker:
            values[who] = worker.submit(resident, who).result()
    found[f"{RESIDENT[0]} x {RESIDENT[1]}, resident"] = values
    for name, value in found.items():
        value["ratio"] = value["ours"] / value["plain"]
        ours, plain = (value[who] / 2**20 for who in ("ours", "plain"))
        print(f"{name}: ours {ours:,.0f} MiB, plain {plain:,.0f} MiB, ratio {value['ratio']:.3f}")
    ratio = max(value["ratio"] for value in found.values())
    print(f"loss_memory_ratio {ratio:.3f} (bar {BAR})")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"loss_memory_ratio": ratio, "bar": BAR, "bytes": found}, indent=1) + "\n"
        )
    sys.exit(ratio > BAR)


if __name__ == "__main__":
    main()
