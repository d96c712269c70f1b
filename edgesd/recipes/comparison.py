"""Images of a bundle beside its source's: the same prompts, seeds and steps."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgesd.evaluate import quality as quality_
from edgesd.export import examples
from edgesd.export.families import Component
from edgesd.export.torch_runner import TorchRunner
from edgesd.files import atomic_write
from edgesd.progress import Progress
from edgesd.recipes.gates import WORST, Judging
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.chunks import fixed_chunks
from edgesd.runtime.pictures import Picture
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import CompleteRequest, Completion, Request, painted_whole
from edgesd.runtime.settings import Settings
from edgesd.spec.pipeline import ENCODING_TASKS
from edgesd.spec.quality import Gate, ImageQuality, Quality

if TYPE_CHECKING:
    from PIL import Image

IMAGES = "quality"
"""Folder of a bundle for the images that a report shows."""

KEPT_IMAGES = 6
"""Pairs kept in the bundle, the worst ones: for the report."""

ENTRY_BYTES = 200
"""Bytes in the manifest of a kept image's file, of an image's figures, of a layer's reason."""


@dataclass(frozen=True)
class Measured:
    """Images of a bundle, in the requests' order, and how far they are from its source's."""

    images: Sequence[Image.Image]
    quality: Quality


class Comparison:
    """What bundles are compared with: images of their source, kept below `work`. Some of those that
    `requests` gives are pictures that other tasks of the pipeline begin with.

    components: the source's networks, which torch runs in fp32 from the checkpoint's own files.
    reference: the fp32 bundle of them, for all that isn't a network. judging: what measures images,
    and the gates that are noted beside the figures.
    """

    def __init__(
        self,
        components: Sequence[Component],
        reference: Bundle,
        requests: Sequence[Request],
        judging: Judging,
        work: Path,
        progress: Progress,
    ) -> None:
        self.reference, pipeline = reference, reference.manifest.pipeline
        self._from_prompts = [painted_whole(pipeline, request) for request in requests]
        self._further = examples.further_tasks(pipeline, len(requests))
        self._components = {component.name: component for component in components}
        self.judging, self._progress = judging, progress
        self._folder = work / f"pictures-{self._key()}"
        self.folder = self._folder
        """Its name says what all source images depend on."""
        if self._further:
            more = repr((self._further, sorted(pipeline.wiring.strengths.items())))
            key = hashlib.sha256(f"{self._folder.name} {more}".encode()).hexdigest()[:16]
            self.folder = work / f"pictures-{key}"

    @property
    def count(self) -> int:
        """Images that are compared."""
        return len(self._from_prompts) + len(self._further)

    @property
    def probes(self) -> tuple[int, ...]:
        """Places of a few requests, of all tasks."""
        first, count = len(self._from_prompts), min(WORST, self.count)
        tasks = [task for task, _ in self._further]
        others = [first + tasks.index(task) for task in dict.fromkeys(tasks)]
        return (*range(min(first, count - len(others))), *others)

    def encodes(self, places: Iterable[int]) -> bool:
        """Whether some of the requests at `places` begin with an image, or have one encoded."""
        first, own = len(self._from_prompts), self.reference.manifest.pipeline.wiring.tasks[0]
        if own in ENCODING_TASKS:
            return True
        return any(place >= first or self._from_prompts[place].image for place in places)

    @cached_property
    def requests(self) -> list[Request]:
        """All of them; to make those of other tasks, the source's images are generated."""
        if not self._further:
            return self._from_prompts
        further = examples.with_images(
            self.reference.manifest.pipeline, self._from_prompts, self._first_images, self._further
        )
        return [*self._from_prompts, *further]

    @cached_property
    def source_images(self) -> list[Image.Image]:
        """The source's images of all requests, generated once."""
        further = self.requests[len(self._from_prompts) :]
        return self._first_images + self._generated(further, self.folder)

    @cached_property
    def _first_images(self) -> list[Image.Image]:
        return self._generated(self._from_prompts, self._folder)

    def _generated(self, requests: Sequence[Request], folder: Path) -> list[Image.Image]:
        if not requests:
            return []
        with self.source_pipeline() as pipeline:
            return quality_.generate_cached(
                pipeline, requests, folder, self._progress, "source images"
            )

    def source_pipeline(self) -> Pipeline:
        """Generates with the source's own networks, whose weights stay in its files."""

        def runner(name: str) -> Runner:
            spec = self.reference.manifest.pipeline.components[name]
            return TorchRunner(spec, self._components[name].load())

        # What torch takes is no bundle's footprint: any amount is allowed.
        settings = Settings(memory="fast", max_memory=sys.maxsize, made_here=True)
        return Pipeline(self.reference, settings, runner)

    def measure(self, bundle: Bundle) -> Measured:
        """A bundle's images by the backend's own operators, all of them."""
        with Pipeline(bundle, Settings(kernels=False, made_here=True)) as pipeline:
            images = quality_.generate(pipeline, self.requests, self._progress, "quantized images")
            quality = quality_.summarise(
                self._compared(range(self.count), images),
                pipeline,
                self.requests[0],
                self.judging.perceptual,
                self.judging.gates,
            )
        return Measured(images, quality)

    def by_kernels(self, bundle: Bundle, places: Sequence[int]) -> tuple[ImageQuality, ...]:
        """Figures of the images at `places`, generated by edgesd's own kernels."""
        with Pipeline(bundle, Settings(made_here=True)) as pipeline:
            requests = [self.requests[place] for place in places]
            images = quality_.generate(pipeline, requests, self._progress, "images by kernels")
        return self._compared(places, images)

    def _compared(
        self, places: Sequence[int], images: Sequence[Image.Image]
    ) -> tuple[ImageQuality, ...]:
        """Images of the requests at `places` beside the source's."""
        requests = [self.requests[place] for place in places]
        source = [self.source_images[place] for place in places]
        judging = self.judging
        return quality_.compare(requests, source, images, judging.perceptual, judging.features)

    def keep_images(self, measured: Measured, root: Path, room: float) -> Quality:
        """Write the worst pairs, as many as `room` bytes hold, into the bundle folder `root`, for
        its report; the figures with their names."""
        images = list(measured.quality.images)
        for index in quality_.worst_first(images, self.judging.metric)[:KEPT_IMAGES]:
            files: dict[str, bytes] = {}
            pair = (("source", self.source_images[index]), ("ours", measured.images[index]))
            for side, image in pair:
                encoded = io.BytesIO()
                image.save(encoded, "WEBP", lossless=True, method=6)
                files[side] = encoded.getvalue()
            room -= sum(len(data) + ENTRY_BYTES for data in files.values())
            if room < 0:
                break
            names = {side: f"{IMAGES}/{index:03d}-{side}.webp" for side in files}
            for side, data in files.items():
                with atomic_write(root / names[side]) as file:
                    file.write(data)
            images[index] = msgspec.structs.replace(images[index], **names)
        return msgspec.structs.replace(measured.quality, images=tuple(images))

    def _key(self) -> str:
        """Hash of all that the source's images depend on."""
        pipeline = self.reference.manifest.pipeline
        complete = Completion(pipeline).complete
        requests = [
            msgspec.json.encode(_named(complete(request))) for request in self._from_prompts
        ]
        tools = {**self.reference.manifest.tools, "sha": pipeline.source_sha256}
        chunks = fixed_chunks(pipeline) or 1
        if chunks > 1:  # left out otherwise, as older pipelines have it
            tools["chunks"] = str(chunks)
        parts = (requests, sorted(tools.items()), pipeline.shape)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _named(request: CompleteRequest) -> dict[str, object]:
    """What an image depends on, of pictures their hashes. Fields with a default, which requests
    didn't always have, are left out where they have it, so that older images are found."""
    defaults = {one.name: one.default for one in fields(request)}
    named = {
        name: value.sha256 if isinstance(value, Picture) else value
        for name, value in vars(request).items()
        if value != defaults[name]
    }
    if request.controls:
        named["controls"] = [
            {**vars(one), "picture": one.picture.sha256} for one in request.controls
        ]
    return named


def worst_places(measured: Measured, gates: Sequence[Gate]) -> tuple[int, ...]:
    """Places of the worst images by each gate's metric, the worst first."""
    images = measured.quality.images
    found: dict[int, None] = {}
    for gate in gates:
        found |= dict.fromkeys(quality_.worst_first(images, gate.metric)[:WORST])
    return tuple(found)
