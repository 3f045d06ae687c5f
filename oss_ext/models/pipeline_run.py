"""A diffusers pipeline, run by its own loop and asked for one evaluation at a time.

``pipe(...)`` runs in a thread of its own with a stand-in for its scheduler. ``step()`` hands over
what the pipeline made of the network's output, waits for the next request, and returns the state
that is wanted next; the timesteps that the pipeline loops over are one tensor that is overwritten
before it looks. So the pipeline does all that it usually does, guidance, packing, switching
between experts, offloading, and the requests need not be known beforehand. A run serves as many of
them as its loop has turns, less the first turn, which is the pipeline's own. It works on a shallow
copy: the caller's pipeline is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.hosts import Host, StandIn, StepOutput, check_step, read_host, stand_in


class Left(BaseException):
    """Raised in a pipeline's loop to leave it; no ``Exception``, which pipelines may catch."""


class Ended(RuntimeError):
    """A pipeline ended its loop: a new run can go on."""


@dataclass(frozen=True)
class Request:
    """What to evaluate next: a state as the network is shown it, and what hosts call the time."""

    state: Tensor
    timestep: float
    sigma: float


@dataclass(frozen=True)
class Answer:
    """What a pipeline handed to ``step``."""

    output: Tensor
    timestep: float
    sample: Tensor


class Recorder(StandIn):
    """The scheduler in the pipeline's loop; ``run`` is set from outside."""

    run: Run
    timesteps: Tensor
    sigmas: Tensor
    _given: Tensor | None = None
    _asked: float = 0.0
    _turns: int = 0
    _handed: tuple[Tensor, ...] = ()

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        super().set_timesteps(*args, **options)  # type: ignore[misc]
        self._handed = (*self._handed, self.timesteps)  # some pipelines loop over an earlier one
        self.run.mu = options.get("mu")
        self.run.host = read_host(self)  # now with the steps that the pipeline chose
        self.run.host_grid = self.run.host.grid()

    def scale_model_input(self, sample: Tensor, *args: Any, **options: Any) -> Tensor:
        # Requests are states as the network is to see them; only the first state is not one.
        # Those of flow models have no such method, which some pipelines find out by the class.
        own = getattr(super(), "scale_model_input", None)
        if self._given is None and own is not None:
            scaled: Tensor = own(sample, *args, **options)
            return scaled
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> StepOutput:
        timestep = cpu.as_tensor(timestep)
        check_step(options)
        if self._given is None:
            # Image-to-image pipelines start part-way.
            at = (self.timesteps - timestep.to(self.timesteps)).abs().argmin()
            self._turns = len(self.timesteps) - int(at)
        else:
            self._check(timestep, sample)
        self._turns -= 1
        answer = Answer(model_output, float(timestep.flatten()[0]), sample)
        request = self.run.exchange(answer, last=self._turns == 0)
        for timesteps in (*self._handed, self.timesteps):  # which pipelines may have replaced
            timesteps.fill_(request.timestep)
        if isinstance(getattr(self, "sigmas", None), Tensor):
            self.sigmas.fill_(request.sigma)
        self._asked = float(self.timesteps[-1])
        rows = request.state.shape[0]
        # Some pipelines keep the state once for each half of classifier-free guidance.
        state = request.state.repeat(len(sample) // rows, *[1] * (sample.dim() - 1))
        self._given = state.to(sample.dtype)
        return StepOutput((self._given.clone(),))  # pipelines may write into it

    def _check(self, timestep: Tensor, sample: Tensor) -> None:
        """The pipeline evaluated what it was given; else ``RuntimeError`` says how not."""
        got = float(timestep.flatten()[0])
        if abs(got - self._asked) > 1e-2 * max(1.0, abs(self._asked)):
            raise RuntimeError(
                f"{self.run.name} went to timestep {got:g} where it was given {self._asked:g}: it "
                "keeps its own copy of the timesteps, which is not supported"
            )
        given = self._given
        assert given is not None
        if sample.shape != given.shape or not torch.equal(sample, given.to(sample)):
            raise RuntimeError(
                f"{self.run.name} changed the state between two steps (as inpainting does): the "
                "steps then depend on each other in ways that a search cannot follow"
            )

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            f"{self.run.name} copies its scheduler to move a second state along, which is not "
            "supported"
        )


class Run:
    """One ``pipe(...)`` call, suspended at the first evaluation of its loop.

    Args:
        pipe: the pipeline; left alone.
        scheduler: the scheduler to stand in for.
        arguments: of the call.
        encoded: prompts that runs before this one have encoded; this one adds to it.

    Attributes:
        host: what the scheduler means, with the steps that the pipeline set in it.
        host_grid: the flow times of these steps, all of them.
        mu: the resolution shift that the pipeline gave to its scheduler, if any.
        first: the answer of the first evaluation, at the pipeline's own state and time.

    Raises:
        Whatever the pipeline raises.
    """

    host: Host
    host_grid: Tensor

    def __init__(
        self, pipe: Any, scheduler: Any, arguments: Mapping[str, Any], encoded: dict[str, Any]
    ) -> None:
        self.name = type(pipe).__name__
        self.mu: float | None = None
        self.closed = False
        self._answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        recorder = stand_in(Recorder, scheduler)
        recorder.run = self
        call = _Call(pipe, recorder, encoded)
        # These are a thread's own: what holds where the run is asked for is to hold in it.
        device = torch.device(getattr(call.pipe, "_execution_device", "cpu"))
        self._gpu: int | None = None
        if device.type == "cuda":
            self._gpu = torch.cuda.current_device() if device.index is None else device.index
        self._autocasts = [
            torch.autocast(kind, torch.get_autocast_dtype(kind))
            for kind in ("cuda", "cpu")
            if torch.is_autocast_enabled(kind)
        ]
        self._thread = threading.Thread(
            target=self._work, args=(call, dict(arguments)), name=f"oss {self.name}", daemon=True
        )
        self._thread.start()
        try:
            self.first = self._ask(None)
        except Ended:
            raise RuntimeError(
                f"{self.name} took no step of its own scheduler: search each pipeline that it is "
                "made of"
            ) from None
        if not hasattr(self, "host"):
            self.close()
            raise RuntimeError(f"{self.name} did not set its scheduler's timesteps")

    def exchange(self, answer: Answer, last: bool) -> Request:
        """In the pipeline's thread: hand over an answer, wait for the next request.

        The ``last`` turn of the loop has none: beyond it the pipeline would decode.
        """
        self._answers.put(answer)
        if last:
            self._answers.put(Ended(f"{self.name} has ended its loop"))
            raise Left
        request = self._requests.get()
        if request is None:
            raise Left
        return request

    def evaluate(self, request: Request) -> Tensor:
        """What the pipeline makes of the network's output at ``request``.

        Raises:
            Ended: the pipeline has left its loop; a new run can go on.
            Whatever the pipeline raises.
        """
        return self._ask(request).output

    def close(self) -> None:
        """Leave the loop, if that has not happened yet."""
        self.closed = True
        self._requests.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask(self, request: Request | None) -> Answer:
        """The answer to ``request``, or to the pipeline's own first turn."""
        try:
            if request is not None:
                self._requests.put(request)
            answer = self._answers.get()
        except BaseException:  # interrupted: an answer still to come would be taken for another's
            self.closed = True
            self._requests.put(None)
            raise
        if isinstance(answer, BaseException):
            self.closed = True
            self._thread.join()  # it leaves the pipeline, and offloads, before the caller goes on
            raise answer
        return answer

    def _work(self, call: Any, arguments: dict[str, Any]) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            with torch.no_grad(), contextlib.ExitStack() as casts:
                for autocast in self._autocasts:
                    casts.enter_context(autocast)
                call(**arguments)
            self._answers.put(Ended(f"{self.name} has left its loop"))
        except Left:
            pass
        except BaseException as error:  # it belongs to the thread that asked
            self._answers.put(error)
        finally:
            call.release()


class _Call:
    """A shallow copy of ``pipe`` with another scheduler and no progress bar, ready to be called."""

    def __init__(self, pipe: Any, scheduler: Any, encoded: dict[str, Any]) -> None:
        self.pipe = copy.copy(pipe)
        # Not by attribute: setting a component rewrites configurations.
        members = vars(self.pipe)
        members["scheduler"] = scheduler
        members["_progress_bar_config"] = {"disable": True}
        if hasattr(pipe, "encode_prompt"):
            members["encode_prompt"] = _remembering(self.pipe.encode_prompt, encoded)
        # Offloading hooks are the original's to take off and put on.
        self.release = getattr(pipe, "maybe_free_model_hooks", lambda: None)
        members["maybe_free_model_hooks"] = lambda: None

    def __call__(self, **arguments: Any) -> Any:
        return self.pipe(**arguments)


def _is_plain(value: Any) -> bool:
    """Whether the text that stands for ``value`` says all about it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    plain = (str, int, float, bool, type(None), torch.device, torch.dtype)
    return isinstance(value, plain)


def _remembering(encode: Any, encoded: dict[str, Any]) -> Any:
    """``encode``, but the same texts only once: text encoders can be larger than denoisers."""

    def remember(*args: Any, **options: Any) -> Any:
        if not all(map(_is_plain, (*args, *options.values()))):
            return encode(*args, **options)  # images, or embeddings that were given
        key = repr((args, sorted(options.items())))
        if key not in encoded:
            encoded[key] = encode(*args, **options)
        return encoded[key]

    remember.__signature__ = inspect.signature(encode)  # type: ignore[attr-defined]
    return remember
