"""Runs of a pipeline's loop: left as it was found, begun again, interrupted, and never stuck."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import oss_ext as oss
from driver_cases import dp_search, one_thread  # noqa: F401
from oss_ext.models import from_pipeline
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.pipeline import _close_all
from pipeline_runs import own_latents, quiet
from pipelines import CASES, PROMPTS, clip, stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:diffusers")

NETWORKS = {"sd": "unet", "sdxl": "unet"}  # the others call it "transformer"


Runs = Callable[[], list[threading.Thread]]


@pytest.fixture
def runs() -> Runs:
    """Lists the runs that this test has begun and that have not ended."""
    gc.collect()  # what other tests have forgotten
    before = set(threading.enumerate())

    def begun() -> list[threading.Thread]:
        # Libraries have threads of their own.
        own = [thread for thread in threading.enumerate() if thread.name.startswith("oss ")]
        return [thread for thread in own if thread not in before]

    return begun


def network(name: str, pipe: Any) -> nn.Module:
    return getattr(pipe, NETWORKS.get(name, "transformer"))


def make(name: str, steps: int = 6, **options: Any) -> tuple[Any, Any]:
    """A pipeline and a model of it."""
    case = CASES[name]()
    return case.pipe, from_pipeline(case.pipe, **case.call, num_inference_steps=steps, **options)


def velocities(model: Any, *times: float, samples: int = PROMPTS) -> Tensor:
    """At one state and each of the times, ``[T, B, *dims]``."""
    x = torch.randn(samples, *model.shape, generator=torch.Generator().manual_seed(8))
    evaluator = Evaluator(model, samples)
    return torch.stack([evaluator.at(x, t) for t in times or [0.6]])


def failing(module: nn.Module, turn: int, error: BaseException) -> Callable[[], None]:
    """Make ``module`` raise in its ``turn``-th call from now; returns what undoes it."""
    calls = 0
    forward = module.forward

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            raise error
        return forward(*args, **options)

    module.forward = fail
    return lambda: vars(module).pop("forward")


def found(pipe: Any) -> tuple[Any, ...]:
    """Everything about a pipeline that someone else could have changed."""
    modules = {
        f"{name}.{path}": module
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for path, module in part.named_modules()
    }
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in modules.items()
    }
    attributes = {name: id(value) for name, value in vars(pipe).items()}
    scheduler = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in vars(pipe.scheduler).items()
        if name != "_internal_dict"
    }
    config = dict(pipe.config), dict(pipe.scheduler.config), type(pipe.scheduler)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    return attributes, hooks, scheduler, config, bar


def assert_untouched(before: tuple[Any, ...], pipe: Any) -> None:
    attributes, hooks, scheduler, config, bar = found(pipe)
    assert (attributes, hooks, config, bar) == (before[0], before[1], before[3], before[4])
    assert scheduler.keys() == before[2].keys()
    for name, value in before[2].items():
        same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
        assert same(scheduler[name], value), name


# --- the pipeline is the caller's ---------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_is_left_as_it_was_found(name: str) -> None:
    case = CASES[name]()
    case.pipe.set_progress_bar_config(desc="mine", disable=True)
    own = own_latents(case.pipe, case.call | {"num_inference_steps": 3})
    before = found(case.pipe)
    model = from_pipeline(case.pipe, **case.call, num_inference_steps=6)
    assert_untouched(before, case.pipe)
    trajectory = oss.teacher(model, model.noise(3, 0), steps=6)
    schedule = dp_search(model, trajectory, steps=2).schedule(2)
    assert_untouched(before, case.pipe)
    with oss.export.attach(schedule, case.pipe):
        pass
    model.close()
    assert_untouched(before, case.pipe)
    assert torch.equal(own_latents(case.pipe, case.call | {"num_inference_steps": 3}), own)


@pytest.mark.parametrize(
    ("name", "part"), [("sd3", "time_text_embed"), ("sd", "mid_block"), ("wan_two_experts", "")]
)
@pytest.mark.parametrize("turn", [1, 2, 5])
def test_an_error_in_the_network_leaves_nothing_behind(
    name: str, part: str, turn: int, runs: Runs
) -> None:
    pipe, model = make(name)
    expected = velocities(model, 0.9)
    before = found(pipe)
    undo = failing(network(name, pipe).get_submodule(part), turn, OSError("disk on fire"))
    with pytest.raises(OSError, match=r"^disk on fire$"):
        velocities(model, *[0.9] * 10)
    assert runs() == []
    undo()
    assert_untouched(before, pipe)
    assert torch.equal(velocities(model, 0.9), expected)


@pytest.mark.parametrize("turn", [1, 2])
def test_an_error_in_the_first_step_is_the_callers(turn: int, runs: Runs) -> None:
    case = CASES["wan"]()  # guidance: two calls a step
    before = found(case.pipe)
    undo = failing(case.pipe.transformer, turn, ValueError("no such layer"))
    with pytest.raises(ValueError, match=r"^no such layer$"):
        from_pipeline(case.pipe, **case.call)
    undo()
    assert runs() == []
    assert_untouched(before, case.pipe)


def test_an_error_of_the_call_itself_is_the_callers() -> None:
    case = CASES["sd3"]()
    with pytest.raises(ValueError, match="divisible by"):
        from_pipeline(case.pipe, **(case.call | {"height": 17}))


# --- the run's thread ---------------------------------------------------------------------------


def test_a_closed_model_has_no_thread(runs: Runs) -> None:
    _, model = make("sd3", batch=1)
    velocities(model)
    assert len(runs()) == PROMPTS  # one run for every call that differs
    model.close()
    model.close()
    assert runs() == []


def test_a_closed_model_begins_again_when_asked_and_can_be_closed_again(runs: Runs) -> None:
    _, model = make("sd3")
    expected = velocities(model)
    model.close()
    try:
        for _ in range(2):
            assert torch.equal(velocities(model), expected)
            assert len(runs()) == 1
            model.close()
            assert runs() == []
    finally:
        _close_all(model._runs)


@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_is_forgotten_leaves_no_thread(used: bool, runs: Runs) -> None:
    _, model = make("sd", batch=1)
    if used:
        velocities(model)
    assert runs()
    del model
    gc.collect()
    assert runs() == []


def test_the_pipeline_can_be_used_while_a_model_waits_in_it() -> None:
    pipe, model = make("sd3")
    case = CASES["sd3"]()
    expected = velocities(model)
    call = case.call | {"num_inference_steps": 3}
    assert torch.equal(own_latents(pipe, call), own_latents(case.pipe, call))
    assert torch.equal(velocities(model), expected)


def test_two_models_of_a_pipeline_do_not_disturb_each_other() -> None:
    case = CASES["sd3"]()
    one, other = (
        from_pipeline(case.pipe, **(case.call | {"guidance_scale": scale})) for scale in (2.0, 6.0)
    )
    expected = [velocities(model) for model in (one, other)]
    assert not torch.equal(*expected)
    for _ in range(3):
        assert torch.equal(velocities(one), expected[0])
        assert torch.equal(velocities(other), expected[1])


# --- runs that end ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("name", ["sd3", "sd", "dit"])
def test_more_is_evaluated_than_the_loop_has_turns(name: str, steps: int) -> None:
    pipe, model = make(name, steps)
    _, roomy = make(name, 40)
    decoded: list[object] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args))
    for t in (0.9, 0.5, 0.7, 0.2, 0.8, 0.3, 0.5):
        got, expected = velocities(model, t), velocities(roomy, t)
        assert torch.equal(got, expected)
    assert decoded == []
    assert model.nfe_probe > roomy.nfe_probe


def test_a_single_step_is_a_teacher_too() -> None:
    _, model = make("sd3", steps=1)
    _, roomy = make("sd3")
    assert torch.equal(velocities(model), velocities(roomy))


def test_evaluations_of_the_search_are_told_from_those_that_set_up() -> None:
    pipe, model = make("sd3", steps=5)
    calls: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    probe = model.nfe_probe
    evaluator = Evaluator(model, 3)
    for t in (0.9, 0.7, 0.5, 0.3):
        evaluator.at(torch.zeros(3, *model.shape), t)
    assert evaluator.nfe == 12
    rows = 2 * PROMPTS * 4  # every call of the model has all prompts; 3 samples are 2 calls
    assert PROMPTS * len(calls) == rows + model.nfe_probe - probe


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "asked"), [(None, 2), (1, 4), (2, 2), (3, 4)])
def test_a_text_is_encoded_once_however_many_runs_there_are(
    batch: int | None, asked: int, tmp_path: Path
) -> None:
    case = stable_diffusion(*clip(tmp_path))
    calls: list[object] = []
    case.pipe.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(args))
    model = from_pipeline(
        case.pipe, batch=batch, prompt=["a b", "c"], negative_prompt="d", **case.call,
        num_inference_steps=3,
    )  # fmt: skip
    for t in (0.9, 0.7, 0.5, 0.3, 0.1):
        velocities(model, t, samples=6)
    model.noise(6, 1)
    model.times(5)
    # The prompts and the negative prompt of every call that differs.
    assert len(calls) == asked


def test_prompts_say_what_their_samples_are(tmp_path: Path) -> None:
    case = stable_diffusion(*clip(tmp_path))
    both = from_pipeline(case.pipe, prompt=["a b", "c"], **case.call)
    swapped = from_pipeline(case.pipe, prompt=["c", "a b"], **case.call)
    x = torch.randn(1, *both.shape).expand(2, *both.shape)
    expected = Evaluator(both, 2).at(x, 0.6)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3
    torch.testing.assert_close(Evaluator(swapped, 2).at(x, 0.6).flip(0), expected)


# --- interrupts ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A test run in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(module: nn.Module) -> Any:
    """Ctrl-C once, while the main thread waits for ``module``."""

    def press(hooked: nn.Module, args: Any) -> None:
        handle.remove()
        time.sleep(0.05)
        _thread.interrupt_main()
        time.sleep(0.05)

    handle = module.register_forward_pre_hook(press)
    return handle


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_an_interrupt_leaves_a_model_that_works(name: str, runs: Runs) -> None:
    pipe, model = make(name)
    expected = {t: velocities(model, t) for t in (0.3, 0.6, 0.9)}
    for t in (0.3, 0.6):
        interrupting(network(name, pipe))
        with pytest.raises(KeyboardInterrupt):
            velocities(model, t)
        for other in (0.9, 0.6):
            assert torch.equal(velocities(model, other), expected[other])
        assert len(runs()) == 1


def test_an_interrupt_in_the_first_step_leaves_no_thread(runs: Runs) -> None:
    case = CASES["sd3"]()
    interrupting(case.pipe.transformer)
    with pytest.raises(KeyboardInterrupt):
        from_pipeline(case.pipe, **case.call)
    deadline = time.monotonic() + 10
    while runs() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs() == []


def test_an_interrupt_between_question_and_answer_is_no_wrong_answer() -> None:
    _, model = make("sd3")
    expected = {t: velocities(model, t) for t in (0.3, 0.6)}
    (run,) = model._runs.values()
    requests = run._requests

    class Interrupted:
        """Hands the request over, and is interrupted before the answer is waited for."""

        get = staticmethod(requests.get)

        def put(self, request: Any) -> None:
            run._requests = requests
            requests.put(request)
            raise KeyboardInterrupt

    run._requests = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        velocities(model, 0.3)
    got = velocities(model, 0.6)
    model.close()
    assert torch.equal(got, expected[0.6])


# --- the caller's modes -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_never_recorded(mode: Any) -> None:
    case = CASES["sd3"]()
    pipe = quiet(case.pipe)
    seen: list[bool] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_grad_enabled())
    )
    with mode():
        model = from_pipeline(pipe, **case.call)
        assert not velocities(model).requires_grad
    assert set(seen) == {False}


def test_autocast_holds_in_the_pipeline_as_it_would_without_a_model() -> None:
    case = CASES["sd3"]()
    seen: list[bool] = []
    case.pipe.transformer.register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        model = from_pipeline(case.pipe, **case.call)
        velocities(model)
    model.close()
    assert set(seen) == {True}
