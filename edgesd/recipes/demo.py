"""The embedded pipelines, small models that come with the source checkout, and what the demo draws
with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import edgesd
from edgesd.device.detect import describe_machine, detect_machine, runnable_targets
from edgesd.errors import InputError, TargetError
from edgesd.spec.build import EMBEDDED
from edgesd.spec.pipeline import ImageTask

if TYPE_CHECKING:
    from edgesd.runtime.requests import Request

_MODELS = Path(edgesd.__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Demo:
    """What `edgesd demo` builds and draws.

    model: the embedded pipeline. controlnet: the folder of one that is added to it. tasks: what the
    bundle is built for beside text to image. pictures: option of `edgesd generate` -> the file that
    it is given. Folders and files are named from the models' folder. strength, mask_blur: as in
    `Request`.
    """

    model: str
    prompts: tuple[str, ...]
    controlnet: str | None = None
    tasks: tuple[ImageTask, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    strength: float | None = None
    mask_blur: float | None = None

    @property
    def controlnets(self) -> tuple[str, ...]:
        """Folders of ControlNets that the bundle is built with. Raises InputError where they aren't
        there."""
        return () if self.controlnet is None else (str(_embedded(self.controlnet)),)

    def sha256(self) -> str:
        """Hash of the model that the bundle is built of, with what is added to it. Raises
        InputError."""
        from edgesd.recipes.options import sides_of
        from edgesd.recipes.sources import open_model

        return open_model(
            str(demo_model(self.model)), sides=sides_of(self.controlnets, ())
        ).sha256()

    @property
    def files(self) -> dict[str, Path]:
        """Option of `edgesd generate` -> the picture's file. Raises InputError where it isn't
        there."""
        return {option: _embedded(name) for option, name in self.pictures.items()}

    def request(self, seed: int) -> Request:
        """What is asked for beside the prompt. Raises as `files` and `read_picture`."""
        from edgesd.runtime.pictures import read_picture
        from edgesd.runtime.requests import Control, Request

        read = {option: read_picture(file) for option, file in self.files.items()}
        return Request(
            "",
            seed,
            image=read.get("image"),
            mask=read.get("mask"),
            strength=self.strength,
            mask_blur=self.mask_blur,
            controls=(Control(read["control"]),) if "control" in read else (),
        )


TASK_DEMOS = {
    "image": Demo(
        EMBEDDED[0],
        (
            "a red apple",
            "a purple apple",
            "grapes",
            "an eggplant",
            "a purple star",
            "a tomato",
            "a purple heart",
        ),
        tasks=("image",),
        pictures={"image": "emoji/example/image.png"},
        strength=0.6,
    ),
    "inpaint": Demo(
        "emoji-inpaint",
        (
            "smiling face with sunglasses",
            "smiling face with heart-eyes",
            "winking face",
            "nerd face",
            "star-struck",
            "angry face",
        ),
        pictures={
            "image": "emoji-inpaint/example/image.png",
            "mask": "emoji-inpaint/example/mask.png",
        },
        mask_blur=4.0,
    ),
    "sketch": Demo(
        EMBEDDED[0],
        (
            "a purple apple",
            "a pear",
            "a tomato",
            "a lemon",
            "a blue heart",
            "a strawberry",
            "a red balloon",
        ),
        controlnet="emoji-sketch",
        pictures={"control": "emoji-sketch/example/sketch.png"},
    ),
}
"""What `edgesd demo --task` takes -> what it draws."""


def _embedded(name: str) -> Path:
    """A folder or a file of the embedded models. Raises InputError where it isn't there."""
    path = _MODELS / name
    if not path.exists():
        raise InputError(
            f"{name} of the embedded models is part of the source checkout, not of the installed "
            "package: clone edgesd and run there"
        )
    return path


def demo_judge() -> Path | None:
    """Folder of the judge of the embedded pipeline's images, or None outside a checkout."""
    folder = _MODELS / "emoji-judge"
    return folder if folder.is_dir() else None


def demo_model(name: str = EMBEDDED[0]) -> Path:
    """Folder of an embedded pipeline. Raises InputError where it isn't there."""
    folder = _MODELS / name
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"the embedded pipeline {name} is part of the source checkout, not of the installed "
            "package: clone edgesd and run there, or give the folder of a diffusers pipeline"
        )
    return folder


def demo_target() -> str:
    """The target that this machine is, or the plainest one of its architecture.

    Raises TargetError on a machine that no target fits.
    """
    machine = detect_machine()
    if machine.target:
        return machine.target
    runnable = runnable_targets(machine)
    if not runnable:
        raise TargetError(describe_machine(machine))
    return runnable[0].name
