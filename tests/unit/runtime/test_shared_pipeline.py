"""Threads may share a pipeline, and have pipelines of their own: every image is what it would be
alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgesd.errors import UsageError
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.denoise import Step
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings

LIMIT_S = 60
"""For every wait here; none takes a second."""

PROMPTS = ("a red apple", "a blue cat", "a cat", "red", "blue apple", "a")
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture
def pipeline(miniature: Bundle) -> Iterator[Pipeline]:
    with Pipeline(miniature, Settings(threads=1, memory="fast")) as pipeline:
        yield pipeline


def pixels(pipeline: Pipeline, request: Request) -> bytes:
    (image,) = pipeline.generate([request])
    return image.tobytes()


def lone(bundle: Bundle, requests: list[Request]) -> list[bytes]:
    """Each image by a pipeline of its own."""
    found = []
    for request in requests:
        with Pipeline(bundle, Settings(threads=1)) as pipeline:
            found.append(pixels(pipeline, request))
    return found


def within_a_step(pipeline: Pipeline, act: Callable[[Step], object]) -> None:
    """Generate, and call `act` after the first step."""

    def on_step(step: Step) -> None:
        if step.index == 0:
            act(step)

    pipeline.generate(REQUESTS[:1], on_step)


def test_nothing_is_generated_where_nothing_is_asked_for(pipeline: Pipeline) -> None:
    assert pipeline.generate([]) == []


@pytest.mark.parametrize("memory", ["fast", "balanced", "stream"])
def test_threads_that_share_a_pipeline_get_their_own_images(
    memory: MemoryMode, miniature: Bundle
) -> None:
    requests = [
        replace(request, height=size, width=size + 2, num_inference_steps=6)
        for request in REQUESTS
        for size in (16, 22)
    ]
    wanted = lone(miniature, requests)
    with (
        Pipeline(miniature, Settings(threads=1, memory=memory)) as pipeline,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(lambda r: pixels(pipeline, r), requests, timeout=LIMIT_S))
    assert found == wanted


def test_pipelines_of_two_threads_generate_side_by_side(miniature: Bundle) -> None:
    """Each is inside an image of its own while the other is: neither waits for the other's end."""
    wanted = lone(miniature, REQUESTS[:2])
    both = threading.Barrier(2, timeout=LIMIT_S)

    def generate(request: Request, memory: MemoryMode) -> bytes:
        with Pipeline(miniature, Settings(threads=1, memory=memory)) as pipeline:
            (image,) = pipeline.generate([request], lambda _: both.wait() and None)
            return image.tobytes()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(generate, REQUESTS[:2], ("fast", "stream"), timeout=LIMIT_S))
    assert found == wanted


def test_close_waits_for_the_image_of_another_thread(pipeline: Pipeline, miniature: Bundle) -> None:
    drawing, closing = threading.Event(), threading.Event()

    def on_step(step: Step) -> None:
        drawing.set()
        assert closing.wait(LIMIT_S), "nobody closes"

    with ThreadPoolExecutor(2) as pool:
        image = pool.submit(pipeline.generate, REQUESTS[:1], on_step)
        assert drawing.wait(LIMIT_S), "no step was generated"
        closed = pool.submit(pipeline.close)
        assert not closed.done()
        closing.set()
        assert image.result(LIMIT_S)[0].tobytes() == lone(miniature, REQUESTS[:1])[0]
        closed.result(LIMIT_S)
    with pytest.raises(UsageError, match="closed"):
        pipeline.generate(REQUESTS[:1])


def test_what_waited_for_its_turn_is_told_that_the_pipeline_was_closed(pipeline: Pipeline) -> None:
    started = threading.Event()

    def generate() -> object:
        started.set()
        return pipeline.decode(np.zeros((1, 4, 8, 8), np.float32))

    with ThreadPoolExecutor(1) as pool:
        with pipeline._turns._lock:
            later = pool.submit(generate)
            assert started.wait(LIMIT_S), "the thread didn't start"
            pipeline.close()
        with pytest.raises(UsageError, match="closed"):
            later.result(LIMIT_S)


USES: dict[str, Callable[[Pipeline], object]] = {
    "generate": lambda p: p.generate(REQUESTS[:1]),
    "decode": lambda p: p.decode(np.zeros((1, 4, 8, 8), np.float32)),
    "complete": lambda p: p.complete(REQUESTS[0]),
    "images_per_run": lambda p: p.images_per_run(REQUESTS[0]),
    "open_runner": lambda p: p.open_runner("unet"),
    "replace": lambda p: p.replace("unet", FakeRunner(p.spec.components["unet"], dict)),
    "restore": lambda p: p.restore("unet"),
    "forget": lambda p: p.forget(),
    "with": lambda p: p.__enter__(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_is_done_after_close(use: Callable[[Pipeline], object], miniature: Bundle) -> None:
    with Pipeline(miniature, Settings(threads=1)) as pipeline:
        pipeline.generate(REQUESTS[:1])
    with pytest.raises(UsageError, match="was closed") as caught:
        use(pipeline)
    assert "\n" not in str(caught.value)
    assert not pipeline.loaded, "a component was loaded again"
    pipeline.close()  # twice is as good as once


@pytest.mark.parametrize("memory", ["fast", "balanced", "stream"])
def test_previews_within_a_step_change_no_image(memory: MemoryMode, miniature: Bundle) -> None:
    wanted = lone(miniature, REQUESTS[:1])
    previews = []
    with Pipeline(miniature, Settings(threads=1, memory=memory)) as pipeline:
        (image,) = pipeline.generate(
            REQUESTS[:1], lambda step: previews.append(pipeline.decode(step.latents))
        )
    assert [image.tobytes()] == wanted
    assert previews[-1][0].tobytes() == image.tobytes()


@pytest.mark.parametrize("use", ["generate", "replace", "restore", "forget", "close"])
def test_networks_that_generate_are_left_alone(
    use: str, pipeline: Pipeline, miniature: Bundle
) -> None:
    act = Pipeline.close if use == "close" else USES[use]
    with pytest.raises(UsageError, match="is generating"):
        within_a_step(pipeline, lambda _: act(pipeline))
    assert pixels(pipeline, REQUESTS[1]) == lone(miniature, REQUESTS[1:2])[0]


@pytest.mark.parametrize("memory", ["fast", "balanced", "stream"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_within_a_step_leaves_the_pipeline_usable(
    error: type[BaseException], memory: MemoryMode, miniature: Bundle
) -> None:
    def fail(step: Step) -> None:
        raise error("enough")

    with Pipeline(miniature, Settings(threads=1, memory=memory)) as pipeline:
        with pytest.raises(error, match="enough"):
            within_a_step(pipeline, fail)
        assert memory == "fast" or not pipeline.loaded, "its memory wasn't given back"
        with ThreadPoolExecutor(1) as pool:  # the turn is free, for other threads as well
            found = pool.submit(pixels, pipeline, REQUESTS[1]).result(LIMIT_S)
    assert found == lone(miniature, REQUESTS[1:2])[0]
