"""From batch requests to tensors on the host: one DataLoader a phase, the next one started before the last is done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mgvideo.cpu.resources import available_cpus
from mgvideo.distributed.signals import Stopped, received
from mgvideo.errors import UserError
from mgvideo.plan.shards import BatchShard

from . import workers
from .requests import BatchRequest, ClipRequest, DecodeFailure, Sample
from .shared_memory import explain_queue_errors, full_shared_memory_message, is_shared_memory_error


class ClipDataset(Protocol):
    """What the core needs of a dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, request: ClipRequest) -> Sample: ...


class Batch(NamedTuple):
    """Clips uint8 `[n, t, s, s, 3]`, labels int64 `[n]` or float32 `[n, classes]`, indices int64 `[n]`.

    `failures` are the videos that could not be read, `bad_clips` the clips that were drawn for one of them: a clip's
    substitute may fail as well. A training batch carries its shard: the part of the global batch that the n clips are.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    failures: tuple[DecodeFailure, ...] = ()
    bad_clips: int = 0
    shard: BatchShard | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor sent between processes costs a handshake, half a millisecond: only the clips are worth it.
        return _received, (self.clips, self.labels.numpy(), self.indices.numpy(), *self[3:])


def _received(clips: Tensor, labels: np.ndarray, indices: np.ndarray, *others: Any) -> Batch:
    return Batch(clips, torch.from_numpy(labels), torch.from_numpy(indices), *others)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; the crops of a test view become clips of their own, next to each other."""
    clips = default_collate([sample.clip for sample in samples])  # in a worker, straight into shared memory
    crops = 1 if clips.dim() == 5 else clips.shape[1]
    labels = torch.stack([sample.label for sample in samples]).repeat_interleave(crops, dim=0)
    indices = torch.tensor([sample.index for sample in samples]).repeat_interleave(crops)
    failures = tuple(failure for sample in samples for failure in sample.failures)
    return Batch(clips.flatten(0, -5), labels, indices, failures, sum(bool(sample.failures) for sample in samples))


@dataclass(frozen=True)
class LoaderOptions:
    """How clips are loaded; none of it changes which clips a step sees."""

    num_workers: int = 2  # processes; 0 loads in the training process
    prefetch_factor: int = 2  # batches that each worker keeps ready
    start_method: str = "forkserver"  # fork, forkserver or spawn
    timeout: float = 45.0  # seconds, and one more a clip, after which silent workers count as hung
    low_priority: bool = (
        False  # workers, of a server, run when cores have nothing else to do, while that is often enough
    )


STARVATION_TIMEOUT_S = (
    10.0  # seconds to wait in all for workers that only idle cores run, before others take their place
)


class _StepDataset(Dataset):
    """Item `step` is the batch of that step. Workers make the requests, which costs the training process no time."""

    def __init__(
        self,
        dataset: ClipDataset,
        requests: Callable[[int], BatchRequest],
        collate: Callable[[Sequence[Sample]], Batch],
    ) -> None:
        self.dataset, self.requests, self.collate = dataset, requests, collate

    def __getitem__(self, step: int) -> Batch:
        clips, shard = self.requests(step)
        return self.collate([self.dataset[clip] for clip in clips])._replace(shard=shard)


def _unchanged(batch: Any) -> Any:
    return batch


def _with_timeout(
    batches: Iterator[Batch], workers: Sequence[BaseProcess], timeout: float, idle: bool
) -> Iterator[Batch]:
    """The same batches; a worker's error for people loses the traceback that torch wraps it in.

    Workers that let nothing be heard for `timeout` seconds are killed, which torch notices within five more; with a
    timeout of its own it would not look for dead workers before that is over. Of `idle` ones it raises TimeoutError.
    """
    hung = threading.Event()

    def give_up() -> None:
        hung.set()
        for worker in workers:
            worker.kill()

    while True:
        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:
            raise UserError(
                str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
            ) from None
        except (RuntimeError, OSError, EOFError) as error:
            if hung.is_set() and idle:
                raise TimeoutError from error
            if hung.is_set():
                told = f"a loader worker hangs (no batch for {timeout:g} s): is the disk slow?"
                raise UserError(f"{told} Raise loader.timeout or loader.num_workers") from error
            raise explain_dead_worker(_report_of_death(error)) from error
        finally:
            timer.cancel()
        yield batch


def _report_of_death(error: Exception) -> Exception:
    """Return torch's report where it follows an error that came of a worker's death: it is raised once, anywhere."""
    if isinstance(error, RuntimeError) and not str(error).startswith("Pin memory thread"):
        return error
    try:
        time.sleep(1)
    except RuntimeError as report:
        return report
    return error


def explain_dead_worker(error: Exception) -> BaseException:
    """Return what to raise for an error that the death of a worker caused, and any other error as it is.

    That is Stopped once a signal has arrived, else a UserError. torch reports a dead worker wherever the training
    process is; a batch that is being fetched from it raises an OSError or an EOFError.
    """
    text = str(error).splitlines()[0] if str(error) else ""
    if is_shared_memory_error(error):
        return UserError(full_shared_memory_message())
    of_a_process = text.startswith(("DataLoader worker", "Pin memory thread"))  # the latter ends with its workers
    reported = of_a_process and ("killed" in text or "exited" in text)
    raised_in_worker = text.startswith("Caught ")  # torch's words for an error of the dataset
    fetching = isinstance(error, ConnectionError | FileNotFoundError | EOFError) and not raised_in_worker
    if reported or fetching:
        if received():
            return Stopped(received())
        if "Bus error" in text or workers.any_worker_killed_by(signal.SIGBUS):
            return UserError(f"a loader worker was killed by SIGBUS: {full_shared_memory_message()}")
        when = text or "as it sent a batch"
        return UserError(
            f"a loader worker died ({when}): out of memory? Lower loader.num_workers or loader.prefetch_factor"
        )
    return error


class Loader:
    """Loads the clips that `requests(step)` returns, for any range of steps.

    Worker processes call `requests`, which pickle must therefore be able to send: a function of a module, a
    `functools.partial`, a method of a dataclass.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        options: LoaderOptions,
        pin_memory: bool = False,
        collate: Callable[[Sequence[Sample]], Batch] = collate,
    ) -> None:
        self.dataset, self.options, self.pin_memory, self.collate = dataset, options, pin_memory, collate
        served = options.num_workers > 0 and options.start_method == "forkserver"
        self.low_priority = options.low_priority and served and workers.SUPPORTS_LOW_PRIORITY
        if options.num_workers:
            workers.use_short_socket_paths()
        if served:
            workers.start_fork_server([type(dataset).__module__])

    def load_steps(self, requests: Callable[[int], BatchRequest], steps: range) -> Iterator[Batch]:
        """Start the workers on `steps` at once; the iterator yields one batch a step."""
        if not steps:
            return iter(())
        batches, started = self._open(requests, steps)
        return self._fall_back_if_starved(batches, started, requests, steps) if self.low_priority else batches

    def _fall_back_if_starved(
        self,
        batches: Iterator[Batch],
        started: Sequence[BaseProcess],
        requests: Callable[[int], BatchRequest],
        steps: range,
    ) -> Iterator[Batch]:
        """Batches of workers that only idle cores run; where those are waited for most of the time, of others."""
        step, begun, waited = steps.start, time.monotonic(), 0.0
        while step < steps.stop and waited < max(STARVATION_TIMEOUT_S, (time.monotonic() - begun) / 2):
            asked = time.monotonic()
            try:
                batch = next(batches)
            except TimeoutError:
                break
            waited += time.monotonic() - asked
            step += 1
            yield batch
        if step < steps.stop:
            self.low_priority = False
            for worker in started:
                worker.kill()
            del batches  # and with it what waits for the killed ones
            yield from self.load_steps(requests, range(step, steps.stop))

    def _open(self, requests: Callable[[int], BatchRequest], steps: range) -> tuple[Iterator[Batch], list[BaseProcess]]:
        count = min(self.options.num_workers, len(steps))
        largest = max(len(requests(step).clips) for step in steps[:3])  # a short cycle has up to three batch sizes
        loader = DataLoader(
            _StepDataset(self.dataset, requests, self.collate),
            sampler=steps,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=count,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(workers.init_worker, self.low_priority, available_cpus()),
            prefetch_factor=self.options.prefetch_factor if count else None,
            multiprocessing_context=self.options.start_method if count else None,
            # drawing the workers' base seed must not touch the generator that dropout draws from
            generator=torch.Generator(),
        )
        with workers.track_new_workers() as started, explain_queue_errors():
            batches = iter(loader)
        if not count:
            return batches, started
        timeout = STARVATION_TIMEOUT_S + largest / 50 if self.low_priority else self.options.timeout + largest
        return _with_timeout(batches, started, timeout, self.low_priority), started

    def load_phases(self, requests: Callable[[int], BatchRequest], stretches: Sequence[range]) -> Iterator[Batch]:
        """Yield one batch a step through consecutive stretches of steps, with a new DataLoader for each.

        The next stretch's workers start as soon as a worker has the last batch of this one to load, so that a boundary
        costs no wait. They start in a thread, beside the step that runs then. Forked workers do not: a fork copies the
        locks that other threads hold.
        """
        options = self.options
        ahead, beside = (
            max(1, options.num_workers * options.prefetch_factor),
            options.num_workers and options.start_method != "fork",
        )
        # A new thread's current CUDA device is 0, and the pin-memory thread inherits that of the thread that starts it.
        set_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if self.pin_memory else None
        with ThreadPoolExecutor(1, initializer=set_device) as thread:
            following: Iterator[Batch] | Future[Iterator[Batch]] = self.load_steps(requests, stretches[0])
            for steps, after in pairwise([*stretches, range(0)]):
                current = following.result() if isinstance(following, Future) else following
                for step in steps:
                    if step == max(steps.start, steps.stop - ahead):
                        following = (
                            thread.submit(self.load_steps, requests, after)
                            if beside
                            else self.load_steps(requests, after)
                        )
                    yield next(current)
