"""How an image was made, as the text in its PNG says it: written with every image, and read again.

Two forms are read: edgesd's own, a text for each value of the request, from which the same bundle
makes the same image; and the `parameters` of AUTOMATIC1111's web UI (a1111.py).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from edgesd.errors import InputError, UsageError
from edgesd.runtime import a1111
from edgesd.runtime.hints import (
    HINTS,
    MOST_LINE_WIDTH,
    MOST_THRESHOLD,
    USUAL,
    Hint,
    HintOptions,
)
from edgesd.runtime.lora import Used
from edgesd.runtime.pictures import MOST_BLUR, MOST_PADDING
from edgesd.runtime.requests import MOST_TOLD_PIXELS, CompleteRequest, Micro, Request
from edgesd.runtime.schedulers import SIGMA_KINDS
from edgesd.runtime.syntax import SYNTAXES
from edgesd.spec.base import (
    MAX_CONTROL_SCALE,
    MAX_GUIDANCE,
    MAX_PIXELS,
    MAX_SCORE,
    MAX_STEPS,
    is_file_name,
    is_sha256,
)
from edgesd.spec.bundle import BundleManifest
from edgesd.text import first_sentence

_MOST_BYTES = 4 << 20
"""Of a PNG, read from its beginning: what is said of an image stands before its pixels."""

_MOST_TEXT = 256_000
_MOST_TIMESTEPS, _MOST_SIGMA = 100_000, 1e6
_PAIR = "WIDTHxHEIGHT in pixels"


class _Field(NamedTuple):
    """A value of a request as text. names: of the attributes that it holds; of those that lie in
    another, such as micro.crop. read: the text -> their values; raises ValueError. between: the
    parts of a tuple."""

    names: tuple[str, ...]
    read: Callable[[str], tuple[Any, ...]]
    expected: str = "text"
    between: str = "x"


def _text(text: str) -> tuple[str]:
    return (text,)


def _whole(least: int, most: int) -> Callable[[str], tuple[int]]:
    def read(text: str) -> tuple[int]:
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise ValueError
        return (_within(int(text), least, most),)

    return read


def _real(least: float, most: float) -> Callable[[str], tuple[float]]:
    return lambda text: (_within(float(text), least, most),)


def _within(value: Any, least: float, most: float) -> Any:
    if not least <= value <= most or not math.isfinite(value):
        raise ValueError
    return value


def _pair(least: int, most: int) -> Callable[[str], tuple[int, int]]:
    one = _whole(least, most)

    def read(text: str) -> tuple[int, int]:
        width, height = text.split("x")
        return one(width)[0], one(height)[0]

    return read


def _as_one(least: int, most: int) -> Callable[[str], tuple[tuple[int, int]]]:
    both = _pair(least, most)
    return lambda text: (both(text),)


def _one_of(*names: str) -> Callable[[str], tuple[str]]:
    def read(text: str) -> tuple[str]:
        if text not in names:
            raise ValueError
        return (text,)

    return read


def _true(text: str) -> tuple[bool]:
    if text != "True":
        raise ValueError
    return (True,)


def _timesteps(text: str) -> tuple[tuple[int, ...]]:
    one = _whole(0, _MOST_TIMESTEPS)
    return (tuple(one(part)[0] for part in text.split(",")),)


def _sigmas(text: str) -> tuple[str | tuple[float, ...]]:
    if text in SIGMA_KINDS:
        return (text,)
    one = _real(0, _MOST_SIGMA)
    return (tuple(one(part)[0] for part in text.split(",")),)


def _sha256(text: str) -> tuple[str]:
    if not is_sha256(text):
        raise ValueError
    return (text,)


_FIELDS = {
    "prompt": _Field(("prompt",), _text),
    "prompt_2": _Field(("prompt_2",), _text),
    "negative_prompt": _Field(("negative_prompt",), _text),
    "negative_prompt_2": _Field(("negative_prompt_2",), _text),
    "prompt_syntax": _Field(("syntax",), _one_of(*SYNTAXES), " or ".join(SYNTAXES)),
    "seed": _Field(("seed",), _whole(0, 2**64 - 1), "0 to 18446744073709551615"),
    "steps": _Field(("num_inference_steps",), _whole(1, MAX_STEPS), f"1 to {MAX_STEPS}"),
    "guidance_scale": _Field(
        ("guidance_scale",),
        _real(-MAX_GUIDANCE, MAX_GUIDANCE),
        f"a number of at most {MAX_GUIDANCE}",
    ),
    "scheduler": _Field(("scheduler",), _text),
    "sigmas": _Field(("sigmas",), _sigmas, f"{', '.join(SIGMA_KINDS)}, or a list", ","),
    "timesteps": _Field(("timesteps",), _timesteps, "a list of timesteps", ","),
    "eta": _Field(("eta",), _real(0, 1), "0 to 1"),
    "size": _Field(("width", "height"), _pair(1, MAX_PIXELS), _PAIR),
    "guidance_rescale": _Field(("guidance_rescale",), _real(0, 1), "0 to 1"),
    "true_cfg_scale": _Field(("true_cfg_scale",), _real(1, MAX_GUIDANCE), f"1 to {MAX_GUIDANCE}"),
    "guess_mode": _Field(("guess_mode",), _true, "True"),
    "denoising_end": _Field(("denoising_end",), _real(0, 1), "a number between 0 and 1"),
    "image": _Field(("image.sha256",), _sha256, "a SHA-256"),
    "mask": _Field(("mask.sha256",), _sha256, "a SHA-256"),
    "strength": _Field(("strength",), _real(0, 1), "0 to 1"),
    "mask_blur": _Field(("mask_blur",), _real(0, MOST_BLUR), f"0 to {MOST_BLUR}"),
    "mask_padding": _Field(("mask_padding",), _whole(0, MOST_PADDING), f"0 to {MOST_PADDING}"),
    **{
        f"{prefix}{name}": _Field((f"{prefix}micro.{name}",), read, expected)
        for prefix in ("", "negative_")
        for name, read, expected in (
            ("original_size", _as_one(1, MOST_TOLD_PIXELS), _PAIR),
            ("crop", _as_one(0, MOST_TOLD_PIXELS), "LEFTxTOP in pixels"),
            ("target_size", _as_one(1, MOST_TOLD_PIXELS), _PAIR),
            ("aesthetic_score", _real(-MAX_SCORE, MAX_SCORE), "a number such as 6"),
        )
    },
}
"""All values of a request, by the names of their texts. Values that nobody asked for have none."""

_DEFAULTS = Request("", -1)

_PICTURES = "image", "mask"
"""Attributes of a Request whose files have hashes in an image's texts."""

_SCHEDULE = "sigmas", "timesteps", "eta"
"""What belongs to a sampler."""

_MADE_BY = "model", "model_sha256", "precision", "target"
_REFINER = "refiner_"
"""Before the names of the same texts of a refiner."""
LORAS, _NAMES = "loras", "lora_names"


@dataclass(frozen=True)
class RecordedControl:
    """What an image says of a control: see requests.Control. sha256: of its picture's file."""

    name: str
    sha256: str
    scale: float
    start: float
    end: float
    kind: Hint
    options: HintOptions = USUAL


_CONTROLS = "controls"
"""The text on controls, a line for each; it ends with those of HintOptions that were asked for."""

_HINT_OPTIONS: dict[str, Callable[[str], tuple[Any]]] = {
    "low": _real(0, MOST_THRESHOLD),
    "high": _real(0, MOST_THRESHOLD),
    "lines": _one_of("dark", "light"),
    "line_width": _whole(1, MOST_LINE_WIDTH),
}

_MOST_CONTROLS = 16


def _controls_text(request: CompleteRequest) -> str:
    return "\n".join(
        f"{one.name} {one.picture.sha256} {one.scale} {one.start} {one.end} {one.kind}"
        + "".join(
            f" {name}={value}"
            for name, value in vars(one.options).items()
            if value != getattr(HintOptions, name)
        )
        for one in request.controls
    )


def _controls(text: str) -> tuple[RecordedControl, ...]:
    """Raises ValueError."""
    number, part = _real(-MAX_CONTROL_SCALE, MAX_CONTROL_SCALE), _real(0, 1)
    kinds: dict[str, Hint] = {kind: kind for kind in HINTS}
    found = []
    for line in text.split("\n"):
        name, sha256, scale, start, end, kind, *options = line.split(" ")
        if not (is_file_name(name) and is_sha256(sha256) and kind in kinds):
            raise ValueError
        values = *number(scale), *part(start), *part(end), kinds[kind], _hint_options(options)
        found.append(RecordedControl(name, sha256, *values))
    if len(found) > _MOST_CONTROLS:
        raise ValueError
    return tuple(found)


def _hint_options(words: Sequence[str]) -> HintOptions:
    """Raises ValueError."""
    values = dict(word.split("=") for word in words)
    if not values.keys() <= _HINT_OPTIONS.keys():
        raise ValueError
    try:
        return HintOptions(**{name: _HINT_OPTIONS[name](text)[0] for name, text in values.items()})
    except UsageError as exc:
        raise ValueError from exc


@dataclass(frozen=True)
class Recorded:
    """What an image says of its making.

    values: of the attributes of a Request. made_by: what it says of the bundle, by the names of the
    texts. remarks: on what it says that isn't used. pictures: of the images that it was made from,
    by their names in a Request, the hash of the file. controls: what was shown to ControlNets and
    adapters; the pictures themselves aren't in it.
    """

    values: Mapping[str, Any]
    made_by: Mapping[str, str]
    pictures: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    controls: tuple[RecordedControl, ...] = ()

    def request(self, given: Request) -> Request:
        """The request that the image was made of, with what is `given` in place of it. Another
        sampler has a schedule of its own, and so have other steps than those of a list."""
        other = {n: value for n, value in vars(given).items() if value != getattr(_DEFAULTS, n)}
        known = {
            name: value
            for name, value in self.values.items()
            if name not in _SCHEDULE
            or not (
                "scheduler" in other
                or ("num_inference_steps" in other and isinstance(value, tuple))
            )
        }
        return replace(given, **{**known, **other})

    def differing(
        self,
        manifest: BundleManifest,
        refiner: BundleManifest | None = None,
        loras: Sequence[Used] = (),
    ) -> list[str]:
        """Which of what is said of the bundle, of a refiner's, and of LoRAs, isn't so of others."""
        own = _bundle_texts(manifest, refiner) | _lora_texts(loras)
        return [name for name, text in self.made_by.items() if own.get(name) != text]


def texts_of(
    manifest: BundleManifest,
    request: CompleteRequest,
    refiner: BundleManifest | None = None,
    loras: Sequence[Used] = (),
) -> dict[str, str]:
    """The texts of an image that a bundle makes of a request with LoRAs, and a refiner's bundle
    finishes: all that is needed to make it again."""
    found = {"Software": f"edgesd {manifest.tools.get('edgesd', '')}".strip()}
    for key, field in _FIELDS.items():
        values = [_value(request, name) for name in field.names]
        if values[0] is not None and values[0] != getattr(CompleteRequest, field.names[0], None):
            parts = values[0] if isinstance(values[0], tuple) else values
            found[key] = field.between.join(map(str, parts))
    if request.controls:
        found[_CONTROLS] = _controls_text(request)
    parameters = a1111.parameters(manifest, request)
    made_by = _bundle_texts(manifest, refiner) | _lora_texts(loras)
    return {**found, **made_by, a1111.KEY: parameters}


def _value(request: CompleteRequest, name: str) -> Any:
    outer, _, inner = name.partition(".")
    found = getattr(request, outer)
    return getattr(found, inner) if inner and found is not None else found


def _bundle_texts(manifest: BundleManifest, refiner: BundleManifest | None) -> dict[str, str]:
    pipeline = manifest.pipeline
    values = manifest.name, pipeline.source_sha256, manifest.precision, manifest.target
    found = dict(zip(_MADE_BY, values, strict=True))
    if refiner is not None:
        found |= {_REFINER + name: text for name, text in _bundle_texts(refiner, None).items()}
    return found


def _lora_texts(loras: Sequence[Used]) -> dict[str, str]:
    """SHA256:SCALE of each file, and the names of what they were made of."""
    if not loras:
        return {}
    names = ", ".join(lora.about.name for lora, _ in loras)
    return {LORAS: ",".join(f"{lora.sha256}:{scale!r}" for lora, scale in loras), _NAMES: names}


def recorded(path: Path) -> Recorded:
    """How the image in a PNG file was made. Raises InputError where it can't be read, doesn't say,
    or says what no image can be made of."""
    texts = _texts_in(path)
    if texts.get("Software", "").startswith("edgesd") and "seed" in texts:
        return _own(path, texts)
    if a1111.KEY in texts:
        return _foreign(texts[a1111.KEY])
    raise InputError(
        f"{path} doesn't say how it was made: expected an image of edgesd, or the text "
        f"{a1111.KEY!r} that AUTOMATIC1111's web UI writes"
    )


def _own(path: Path, texts: Mapping[str, str]) -> Recorded:
    values: dict[str, Any] = {}
    for key, field in _FIELDS.items():
        if key in texts:
            try:
                values |= _read(field, texts[key])
            except ValueError:
                raise InputError(
                    f"{path} says {key} {texts[key][:60]!r}: expected {field.expected}"
                ) from None
    if "prompt" not in values:
        raise InputError(f"{path} says no prompt: expected an image of edgesd")
    names = *_MADE_BY, LORAS, *(_REFINER + name for name in _MADE_BY)
    made_by = {name: texts[name] for name in names if name in texts}
    try:
        controls = _controls(texts[_CONTROLS]) if _CONTROLS in texts else ()
    except ValueError:
        raise InputError(
            f"{path} says {_CONTROLS} {texts[_CONTROLS][:60]!r}: expected lines of a name, a "
            "SHA-256, three numbers and a kind"
        ) from None
    pictures = {name: values[f"{name}.sha256"] for name in _PICTURES if f"{name}.sha256" in values}
    return Recorded(_nested(values), made_by, pictures, controls=controls)


def _foreign(text: str) -> Recorded:
    found, values = a1111.parsed(text), {"syntax": "a1111"}
    remarks = list(found.remarks)
    for key, value in found.values.items():
        try:
            values |= _read(_FIELDS[key], value)
        except ValueError:
            remarks.append(f"{key} {value[:60]!r} isn't used: expected {_FIELDS[key].expected}")
    return Recorded(values, {}, {}, tuple(remarks))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of micro.NAME together."""
    found = {name: value for name, value in values.items() if "." not in name}
    for outer in ("micro", "negative_micro"):
        inner = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{outer}.")}
        if inner:
            found[outer] = Micro(**inner)
    return found


def _read(field: _Field, text: str) -> dict[str, Any]:
    """The values of a text. Raises ValueError."""
    return dict(zip(field.names, field.read(text), strict=True))


def _texts_in(path: Path) -> dict[str, str]:
    """The texts of a PNG that stand before its pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with path.open("rb") as file:
            head = io.BytesIO(file.read(_MOST_BYTES))
    except OSError as exc:
        raise InputError(f"{path} can't be read: {exc.strerror or exc}") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, whose pixels aren't read
            with Image.open(head, formats=("PNG",)) as image:
                texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    except UnidentifiedImageError as exc:  # whose words name an object of ours
        raise InputError(
            f"{path} isn't a PNG image: expected one that edgesd or AUTOMATIC1111's web UI wrote"
        ) from exc
    except Exception as exc:  # pillow raises errors of many kinds
        raise InputError(f"{path} isn't a PNG image: {first_sentence(exc)}") from exc
    for key, text in texts.items():
        if len(text) > _MOST_TEXT:
            raise InputError(
                f"{path} has a text {key[:40]!r} of {len(text)} characters, and {_MOST_TEXT} are "
                "the most: is it the right file?"
            )
    return texts
