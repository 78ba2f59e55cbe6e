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
from functools import lru_cache
from multiprocessing.connection import Connection

from megagpt.data.preprocessing.encoder import DocumentEncoder
from megagpt.data.preprocessing.shards import EncodedShard, EncodingJob, Shard, encode_shard
from megagpt.data.tokenizers.load import load_tokenizer


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
        encoder = _load_encoder(job)
        for shard in shards:
            yield encode_shard(job, shard, encoder)
        return
    # Not forked: the parent may have threads of its own.
    context = multiprocessing.get_context("spawn")
    # The workers hear of the parent's end, however it ends, by the end of this pipe.
    hearing, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(hearing,)
    )
    pending: deque[Future[EncodedShard]] = deque()
    is_done = False
    try:
        for shard in shards:
            pending.append(pool.submit(_encode_in_worker, job, shard))
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


def _load_encoder(job: EncodingJob) -> DocumentEncoder:
    return DocumentEncoder(
        load_tokenizer(job.tokenizer_path, eod=job.eod), slow_reason=job.slow_reason
    )


def _start_worker(hearing: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(hearing,), daemon=True).start()


def _end_with_parent(hearing: Connection) -> None:
    hearing.poll(None)  # nothing is ever sent: this is the end
    os._exit(1)


# Once in each worker, and in its first task: what fails in an initializer is not told.
_encoder_of_worker = lru_cache(_load_encoder)


def _encode_in_worker(job: EncodingJob, shard: Shard) -> EncodedShard:
    return encode_shard(job, shard, _encoder_of_worker(job))
