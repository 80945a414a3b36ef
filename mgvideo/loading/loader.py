"""Load batches on the host, with one DataLoader per phase. The next phase's workers start before a phase ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mgvideo.cpu import low_priority
from mgvideo.cpu.resources import available_cpus
from mgvideo.distributed.signals import Stopped, received_signal
from mgvideo.errors import UserError
from mgvideo.plan.shards import BatchShard

from . import workers
from .requests import BatchRequest, ClipRequest, DecodeFailure, Sample
from .shared_memory import explain_queue_errors, full_shared_memory_message, is_shared_memory_error


class ClipDataset(Protocol):
    """The interface that the core requires of a dataset.

    A dataset may also have `load_repeats(requests)`, which returns `self[request]` of each of several requests with the
    same `index` and `repeats`, and decodes the video once.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, request: ClipRequest) -> Sample: ...


class Batch(NamedTuple):
    """Clips uint8 `[n, t, s, s, 3]`, labels int64 `[n]` or float32 `[n, classes]`, indices int64 `[n]`.

    `failures` lists the videos that could not be read. `bad_clips` counts the requested clips whose video could not be
    read; a clip can have several failures, because its substitute can fail too. Set in training: `shard`, the part of
    the global batch that the n clips are, and `seeds`, uint64 `[n]`, the seeds of their requests.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    failures: tuple[DecodeFailure, ...] = ()
    bad_clips: int = 0
    shard: BatchShard | None = None
    seeds: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor sent between processes costs a handshake of 0.5 ms. Only the clips are large enough to need it.
        return _rebuild_batch, (self.clips, self.labels.numpy(), self.indices.numpy(), *self[3:])


def _rebuild_batch(clips: Tensor, labels: np.ndarray, indices: np.ndarray, *other_fields: Any) -> Batch:
    return Batch(clips, torch.from_numpy(labels), torch.from_numpy(indices), *other_fields)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch. The crops of a test view become separate clips, next to each other."""
    clips = default_collate([sample.clip for sample in samples])  # in a worker, directly into shared memory
    crops = 1 if clips.dim() == 5 else clips.shape[1]
    labels = torch.stack([sample.label for sample in samples]).repeat_interleave(crops, dim=0)
    indices = torch.tensor([sample.index for sample in samples]).repeat_interleave(crops)
    failures = tuple(failure for sample in samples for failure in sample.failures)
    return Batch(clips.flatten(0, -5), labels, indices, failures, sum(bool(sample.failures) for sample in samples))


@dataclass(frozen=True)
class LoaderOptions:
    """How clips are loaded. No option changes the clips of a step."""

    num_workers: int = 2  # worker processes; 0 loads in the training process
    prefetch_factor: int = 2  # batches that each worker keeps ready
    start_method: str = "forkserver"  # fork, forkserver or spawn
    timeout: float = 45.0  # seconds to wait for a batch, plus 1 s per clip in it, before its workers are killed as hung
    # Run the workers of a fork server only on idle cores. If they are too slow, they restart at normal priority.
    low_priority: bool = False


class _StepDataset(Dataset):
    """Item `step` is the batch of that step. Workers compute the requests, so the training process does not."""

    def __init__(
        self,
        dataset: ClipDataset,
        requests: Callable[[int], BatchRequest],
        collate: Callable[[Sequence[Sample]], Batch],
    ) -> None:
        self.dataset, self.requests, self.collate = dataset, requests, collate

    def __getitem__(self, step: int) -> Batch:
        clips, shard = self.requests(step)
        batch = self.collate(_load_clips(self.dataset, clips))
        return batch._replace(shard=shard, seeds=np.array([clip.seed for clip in clips], np.uint64))


def _load_clips(dataset: ClipDataset, clips: Sequence[ClipRequest]) -> list[Sample]:
    """Load clips in order. Successive clips of a repeated video are loaded together if the dataset can do that."""
    samples: list[Sample] = []
    for (_, repeats), group in groupby(clips, key=lambda clip: (clip.index, clip.repeats)):
        requests = list(group)
        if repeats and len(requests) > 1 and hasattr(dataset, "load_repeats"):
            samples += dataset.load_repeats(requests)
        else:
            samples += [dataset[request] for request in requests]
    return samples


def _identity(batch: Any) -> Any:
    return batch


def _with_timeout(
    batches: Iterator[Batch], workers: Sequence[BaseProcess], timeout_s: float, low_priority: bool
) -> Iterator[Batch]:
    """Yield the items of `batches`, but kill the workers if none arrives for `timeout_s` seconds.

    torch notices killed workers within five seconds. DataLoader's own `timeout` is not used, because with it torch does
    not check for dead workers before the timeout is over.

    Raises:
        UserError: a worker hangs, dies, or raises a UserError. torch adds a traceback to its message, which is removed.
        Stopped: a worker dies after this process has received a stop signal.
        TimeoutError: a worker hangs and `low_priority` is set.
    """
    hung = threading.Event()

    def kill_workers() -> None:
        hung.set()
        for worker in workers:
            worker.kill()

    while True:
        timer = threading.Timer(timeout_s, kill_workers)
        timer.daemon = True
        timer.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise UserError(last_line.removeprefix(f"{UserError.__module__}.UserError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:
            if hung.is_set() and low_priority:
                raise TimeoutError from error
            if hung.is_set():
                message = f"a loader worker hangs (no batch for {timeout_s:g} s): is the disk slow?"
                raise UserError(f"{message} Raise loader.timeout or loader.num_workers") from error
            raise explain_dead_worker(_wait_for_worker_report(error)) from error
        finally:
            timer.cancel()
        yield batch


def _wait_for_worker_report(error: Exception) -> Exception:
    """Return torch's report that a worker died if it follows `error` within a second, else `error`.

    torch raises the report once, from a signal handler, wherever the main thread is. It can follow another error that
    the death of the worker caused.
    """
    if isinstance(error, RuntimeError) and not str(error).startswith("Pin memory thread"):
        return error
    try:
        time.sleep(1)
    except RuntimeError as report:
        return report
    return error


def explain_dead_worker(error: Exception) -> BaseException:
    """Return the exception to raise for `error`: another one if a worker's death caused it, else `error` itself.

    For a dead worker that is Stopped if this process has received a stop signal, else a UserError. torch reports a dead
    worker with a RuntimeError wherever the training process is. Fetching a batch from a dead worker raises an OSError
    or an EOFError.
    """
    text = str(error).splitlines()[0] if str(error) else ""
    if is_shared_memory_error(error):
        return UserError(full_shared_memory_message())
    names_process = text.startswith(("DataLoader worker", "Pin memory thread"))  # the thread exits with its workers
    reported_death = names_process and ("killed" in text or "exited" in text)
    raised_by_dataset = text.startswith("Caught ")  # torch's prefix of errors that a worker passes on
    fetch_failed = isinstance(error, ConnectionError | FileNotFoundError | EOFError) and not raised_by_dataset
    if reported_death or fetch_failed:
        if received_signal():
            return Stopped(received_signal())
        if "Bus error" in text or workers.any_worker_killed_by(signal.SIGBUS):
            return UserError(f"a loader worker was killed by SIGBUS: {full_shared_memory_message()}")
        details = text or "while it sent a batch"
        return UserError(
            f"a loader worker died ({details}): out of memory? Lower loader.num_workers or loader.prefetch_factor"
        )
    return error


class Loader:
    """Loads the clips that `requests(step)` returns, for any range of steps.

    Worker processes call `requests`, so it must be picklable: a module-level function, a `functools.partial`, or a
    method of a dataclass.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        options: LoaderOptions,
        pin_memory: bool = False,
        collate: Callable[[Sequence[Sample]], Batch] = collate,
    ) -> None:
        self.dataset, self.options, self.pin_memory, self.collate = dataset, options, pin_memory, collate
        uses_fork_server = options.num_workers > 0 and options.start_method == "forkserver"
        self.low_priority = options.low_priority and uses_fork_server and low_priority.IS_SUPPORTED
        if options.num_workers:
            workers.use_short_socket_paths()
        if uses_fork_server:
            workers.start_fork_server([type(dataset).__module__])

    def load_steps(self, requests: Callable[[int], BatchRequest], steps: range) -> Iterator[Batch]:
        """Start the workers at once and return an iterator over the batches of `steps`, one per step."""
        if not steps:
            return iter(())
        batches, processes = self._start_workers(requests, steps)
        return self._fall_back_if_starved(batches, processes, requests, steps) if self.low_priority else batches

    def _fall_back_if_starved(
        self,
        batches: Iterator[Batch],
        processes: Sequence[BaseProcess],
        requests: Callable[[int], BatchRequest],
        steps: range,
    ) -> Iterator[Batch]:
        """Yield the batches of low-priority workers, and restart them at normal priority if they starve."""
        step = steps.start
        for batch in low_priority.until_starved(batches):
            step += 1
            yield batch
        if step < steps.stop:
            self.low_priority = False
            for process in processes:
                process.kill()
            del batches  # frees the DataLoader iterator, which waits for the killed workers
            yield from self.load_steps(requests, range(step, steps.stop))

    def _start_workers(
        self, requests: Callable[[int], BatchRequest], steps: range
    ) -> tuple[Iterator[Batch], list[BaseProcess]]:
        """Start a DataLoader over `steps`. Return its batches and its worker processes."""
        count = min(self.options.num_workers, len(steps))
        max_clips = max(len(requests(step).clips) for step in steps[:3])  # a short cycle has up to three batch sizes
        loader = DataLoader(
            _StepDataset(self.dataset, requests, self.collate),
            sampler=steps,
            batch_size=None,
            collate_fn=_identity,
            num_workers=count,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(workers.init_worker, self.low_priority, available_cpus()),
            prefetch_factor=self.options.prefetch_factor if count else None,
            multiprocessing_context=self.options.start_method if count else None,
            # DataLoader draws the workers' base seed. Without this it would change the state of dropout's generator.
            generator=torch.Generator(),
        )
        with workers.track_new_workers() as processes, explain_queue_errors():
            batches = iter(loader)
        if not count:
            return batches, processes
        timeout_s = low_priority.batch_timeout_s(max_clips) if self.low_priority else self.options.timeout + max_clips
        return _with_timeout(batches, processes, timeout_s, self.low_priority), processes

    def load_phases(self, requests: Callable[[int], BatchRequest], phases: Sequence[range]) -> Iterator[Batch]:
        """Yield one batch per step of consecutive phases, with a new DataLoader for each phase.

        The next phase's workers start as soon as the last batch of this phase is assigned to a worker, so a phase
        boundary causes no wait. They start in a thread, in parallel with the current step. With start method `fork`
        they start in this thread, because a fork copies locks that other threads hold.

        Args:
            requests: returns the clips of a step.
            phases: the steps of each phase.
        """
        options = self.options
        batches_ahead = max(1, options.num_workers * options.prefetch_factor)
        in_thread = options.num_workers and options.start_method != "fork"
        # A new thread's CUDA device is 0, and the pin-memory thread inherits the device of the thread that starts it.
        set_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if self.pin_memory else None
        with ThreadPoolExecutor(1, initializer=set_device) as thread:
            upcoming: Iterator[Batch] | Future[Iterator[Batch]] = self.load_steps(requests, phases[0])
            for steps, next_steps in pairwise([*phases, range(0)]):
                batches = upcoming.result() if isinstance(upcoming, Future) else upcoming
                for step in steps:
                    if step == max(steps.start, steps.stop - batches_ahead):
                        upcoming = (
                            thread.submit(self.load_steps, requests, next_steps)
                            if in_thread
                            else self.load_steps(requests, next_steps)
                        )
                    yield next(batches)
