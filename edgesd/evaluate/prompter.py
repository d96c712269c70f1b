"""Does the prompter help? Compares images of held-out short prompts with those of its prompts.

For each short prompt the pairs give the wanted prompt. Two judges: one that holds an image
against the text of that prompt (CLIP, or the small one of evaluate.agreement), and the image model
itself: its image of that prompt, generated from another seed, is what an image should be like, by
perceptual distance, and by whether of all such images it is the nearest. Neither measures
aesthetics.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgesd.errors import UsageError
from edgesd.evaluate.agreement import Agreement
from edgesd.evaluate.perceptual import Perceptual
from edgesd.evaluate.psnr import ImageLike
from edgesd.evaluate.quality import generate, requests_for
from edgesd.progress import SILENT, Progress
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.prompter import enhance, prompter_of
from edgesd.runtime.requests import Request
from edgesd.runtime.tokenizer import tokenizer_of
from edgesd.spec.base import Spec

_RESAMPLES = 10_000
_OTHER_SEEDS = 1_000_000
"""Added to a seed for the image that others are compared with."""


class Interval(Spec, frozen=True):
    """A mean, and the interval that holds it with 95 % (bootstrap over short prompts, percentiles:
    Efron and Tibshirani 1993, ch. 13)."""

    mean: float
    low: float
    high: float


class PromptJudged(Spec, frozen=True):
    """One short prompt. wanted: the prompt that its pair has; distances: of its image and of the
    prompter's to that prompt's; nearest: whether that is the nearest of all. seconds: the model's.
    """

    user_prompt: str
    wanted: str
    prompt: str
    distance_user_prompt: float
    distance_prompt: float
    nearest_user_prompt: bool
    nearest_prompt: bool
    seconds: float
    problem: str | None


class Agreed(Spec, frozen=True):
    """What a text-image judge says, of the images of short prompts, of prompts, and of the wanted
    prompts themselves (the most there is to be had of this image model).

    score_: 100 times the cosine with the wanted prompt's text, at least 0; found_: share whose
    wanted text is the nearest of all wanted ones; gain: the prompts' scores less the short
    prompts'. chance: score of the wanted images with others' texts.
    """

    judge: str
    score_user_prompt: Interval
    score_prompt: Interval
    score_wanted: Interval
    gain: Interval
    found_user_prompt: Interval
    found_prompt: Interval
    found_wanted: Interval
    chance: float


class PrompterJudged(Spec, frozen=True):
    """All short prompts. exact: share of prompts that are the wanted ones. gain: of a short prompt,
    its distance less the prompt's: above 0 where the prompter helps. words, wish_words: of prompts
    and of short prompts, mean. seconds: the model's for a short prompt, median; process_bytes: most
    memory of its process. agreement: by a judge of images and texts, if there was one."""

    metric: str
    user_prompts: tuple[PromptJudged, ...]
    distance_user_prompt: Interval
    distance_prompt: Interval
    gain: Interval
    nearest_user_prompt: Interval
    nearest_prompt: Interval
    exact: Interval
    words: float
    user_prompt_words: float
    seconds: float
    process_bytes: int
    agreement: Agreed | None


def judge(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    perceptual: Perceptual,
    agreement: Agreement | None = None,
    progress: Progress = SILENT,
) -> PrompterJudged:
    """Generate every short prompt of `pairs` (short prompt, wanted prompt) as it is and enhanced,
    and judge.

    Raises UsageError for fewer than two different prompts, BundleError for a bundle without a
    prompter.
    """
    if len({wanted for _, wanted in pairs}) < 2:
        raise UsageError("fewer than two different prompts: give more pairs")
    user_prompts = [user_prompt for user_prompt, _ in pairs]
    found = enhance(prompter_of(bundle), user_prompts, tokenizer_of(bundle))
    prompts = [result.prompt for result in found]
    generated = {}
    with Pipeline(bundle) as pipeline:
        for what, texts in (
            ("wanted", [wanted for _, wanted in pairs]),
            ("user_prompts", user_prompts),
            ("prompts", prompts),
        ):
            requests = requests_for(texts)
            if what == "wanted":
                requests = [_other(request) for request in requests]
            generated[what] = generate(pipeline, requests, progress, what)
    features = {
        what: np.stack([perceptual.features(image) for image in images])
        for what, images in generated.items()
    }
    near = {
        what: _nearest(features[what], features["wanted"], [wanted for _, wanted in pairs])
        for what in ("user_prompts", "prompts")
    }
    judged = [
        PromptJudged(
            user_prompt=user_prompt,
            wanted=wanted,
            prompt=result.prompt,
            distance_user_prompt=perceptual.distance(
                generated["user_prompts"][at], generated["wanted"][at]
            ),
            distance_prompt=perceptual.distance(generated["prompts"][at], generated["wanted"][at]),
            nearest_user_prompt=near["user_prompts"][at],
            nearest_prompt=near["prompts"][at],
            seconds=result.seconds,
            problem=result.problem,
        )
        for at, ((user_prompt, wanted), result) in enumerate(zip(pairs, found, strict=True))
    ]
    return PrompterJudged(
        metric=perceptual.name,
        user_prompts=tuple(judged),
        distance_user_prompt=interval([w.distance_user_prompt for w in judged]),
        distance_prompt=interval([w.distance_prompt for w in judged]),
        gain=interval([w.distance_user_prompt - w.distance_prompt for w in judged]),
        nearest_user_prompt=interval([w.nearest_user_prompt for w in judged]),
        nearest_prompt=interval([w.nearest_prompt for w in judged]),
        exact=interval([w.prompt.casefold() == w.wanted.casefold() for w in judged]),
        words=statistics.fmean(len(w.prompt.split()) for w in judged),
        user_prompt_words=statistics.fmean(len(w.user_prompt.split()) for w in judged),
        seconds=statistics.median(w.seconds for w in judged),
        process_bytes=max(result.bytes for result in found),
        agreement=agreed(agreement, generated, [wanted for _, wanted in pairs])
        if agreement
        else None,
    )


def agreed(
    judge: Agreement, generated: Mapping[str, Sequence[ImageLike]], wanted: Sequence[str]
) -> Agreed:
    """Compare images with texts. generated: "user_prompts", "prompts" and "wanted", one image for
    each of the texts `wanted`."""
    names = list(dict.fromkeys(wanted))
    own = np.array([names.index(name) for name in wanted])
    texts = judge.texts(names)
    score, found = {}, {}
    for what, images in generated.items():
        cosines = judge.images(images) @ texts.T
        score[what] = 100 * np.maximum(cosines[np.arange(len(own)), own], 0)
        found[what] = cosines.argmax(axis=1) == own
        if what == "wanted":
            other = own[:, None] != np.arange(len(names))[None, :]
            chance = float(100 * np.maximum(cosines, 0)[other].mean())
    return Agreed(
        judge=judge.name,
        score_user_prompt=interval(score["user_prompts"]),
        score_prompt=interval(score["prompts"]),
        score_wanted=interval(score["wanted"]),
        gain=interval(score["prompts"] - score["user_prompts"]),
        found_user_prompt=interval(found["user_prompts"]),
        found_prompt=interval(found["prompts"]),
        found_wanted=interval(found["wanted"]),
        chance=chance,
    )


def interval(values: npt.ArrayLike) -> Interval:
    """Mean of `values` and its 95 % bootstrap interval; the same for the same values."""
    array = np.asarray(values, np.float64)
    chosen = np.random.default_rng(0).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def _nearest(
    found: npt.NDArray[np.floating], wanted: npt.NDArray[np.floating], names: Sequence[str]
) -> list[bool]:
    """For each row of `found` [n, D] whether of `wanted` [n, D] one of its own name is nearest, by
    the cosine of their angle."""
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, wanted))
    best = (first @ second.T).argmax(axis=1)
    return [names[int(there)] == name for there, name in zip(best, names, strict=True)]


def _other(request: Request) -> Request:
    return replace(request, seed=request.seed + _OTHER_SEEDS)
