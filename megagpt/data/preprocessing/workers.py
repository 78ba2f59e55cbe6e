"""Processes that encode shards, in order, and that never outlive or outwait their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megagpt.data.preprocessing.encoder import DocumentEncoder
from megagpt.data.preprocessing.faults import OnError
from megagpt.data.preprocessing.shards import EncodedShard, Shard, encode_shard
from megagpt.data.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class EncodingJob:
    """What every worker must know."""

    directory: Path
    """Where the files of shards go."""
    tokenizer_path: str
    slow_reason: str | None
    """Why the compiled encoder is left out, see `DocumentEncoder`."""
    json_key: str
    on_error: OnError

    def encode(self, shard: Shard, encoder: DocumentEncoder) -> EncodedShard:
        """Encodes one shard into the job's folder."""
        return encode_shard(
            shard, self.directory, encoder, json_key=self.json_key, on_error=self.on_error
        )

    def load_encoder(self) -> DocumentEncoder:
        """The encoder of a process of its own."""
        return DocumentEncoder(load_tokenizer(self.tokenizer_path), slow_reason=self.slow_reason)


def encode_in_order(
    job: EncodingJob, shards: Sequence[Shard], *, workers: int
) -> Iterator[EncodedShard]:
    """Encodes shards on several processes and gives the results in the shards' order.

    At most 2 * workers shards are ahead of the one that is given out.

    Args:
        job: What to do.
        shards: In order.
        workers: Processes; 1 is this one.

    Raises:
        ValueError: What a shard raised, or if a worker was killed.
    """
    if workers == 1:
        encoder = job.load_encoder()
        for shard in shards:
            yield job.encode(shard, encoder)
        return
    # Not forked: the parent may have threads of its own.
    context = multiprocessing.get_context("spawn")
    # The workers hear of the parent's end, however it ends, by the end of this pipe.
    hearing, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(job, hearing)
    )
    pending: deque[Future[EncodedShard]] = deque()
    is_done = False
    try:
        for shard in shards:
            pending.append(pool.submit(_encode_in_worker, shard))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        is_done = True
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of workers={workers} was killed, mostly for want of memory; give fewer --workers"
        ) from error
    finally:
        if not is_done:
            alive.close()  # a worker in the middle of a shard ends at once
        pool.shutdown(cancel_futures=True)
        alive.close()
        hearing.close()


_job: EncodingJob | None = None
_encoder: DocumentEncoder | None = None


def _start_worker(job: EncodingJob, hearing: Connection) -> None:
    # A process pool hands nothing else to its tasks.
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(hearing,), daemon=True).start()
    _job = job


def _end_with_parent(hearing: Connection) -> None:
    hearing.poll(None)  # nothing is ever sent: this is the end
    os._exit(1)


def _encode_in_worker(shard: Shard) -> EncodedShard:
    # Once in each worker, and here: what fails in a task is told, in an initializer it is not.
    global _encoder
    assert _job is not None
    if _encoder is None:
        _encoder = _job.load_encoder()
    return _job.encode(shard, _encoder)
