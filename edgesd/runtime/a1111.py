"""The text `parameters` that AUTOMATIC1111's web UI writes into its images, and many tools read.

    PROMPT
    Negative prompt: NEGATIVE PROMPT
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: "with: a colon"

Prompts have its syntax (syntax.py). The grammar is that of its version 1.10 (`infotext_utils.py`):
the last line holds pairs if it has three at least; a value with a comma, colon or line break is a
JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from edgesd.runtime.requests import CompleteRequest
from edgesd.runtime.schedulers import SCHEDULERS
from edgesd.runtime.schedulers.sigmas import SPREADS, option_of
from edgesd.runtime.syntax import escaped
from edgesd.spec.bundle import BundleManifest

KEY = "parameters"

_NEGATIVE = "Negative prompt:"
_FEWEST_PAIRS = 3
_PAIR = re.compile(r'\s{0,20}(\w[\w \-/]{1,60}):\s{0,20}("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "dpmpp-3m-sde": "DPM++ 3M SDE",
    "dpmpp-2s": "DPM++ 2S",
    "dpmpp-sde": "DPM++ SDE",
    "euler": "Euler",
    "euler-a": "Euler a",
    "flow-euler": "Euler",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
"""Our names of samplers -> the web UI's, and those that its forks and extensions add."""

_OURS = {theirs.lower(): ours for ours, theirs in reversed(_SAMPLERS.items())}

_SCHEDULES = {kind: kind.title() for kind in SPREADS}
"""How noise levels are spread -> the web UI's name of it."""

_USED = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size"}
"""The web UI's names -> those of edgesd's texts (recorded.py)."""

_SILENT = frozenset(("Model hash", "Model", "Version", "RNG", "Schedule type"))
"""What is said of a model and a program, or told otherwise."""


class Parsed(NamedTuple):
    """values: by the names of edgesd's texts. remarks: on what isn't used."""

    values: Mapping[str, str]
    remarks: tuple[str, ...]


def parameters(manifest: BundleManifest, request: CompleteRequest) -> str:
    """The text for an image that a bundle made of a request."""
    plain = request.syntax == "plain"
    prompt, negative = (
        _line_safe(escaped(text) if plain else text)
        for text in (request.prompt, request.negative_prompt or "")
    )
    config = manifest.pipeline.scheduler.config
    pairs = {
        "Steps": str(request.num_inference_steps),
        "Sampler": _SAMPLERS.get(request.scheduler, request.scheduler),
        "Schedule type": _schedule(config, request),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": str(request.seed),
        "Size": f"{request.width}x{request.height}",
        "Denoising strength": "" if request.strength is None else f"{request.strength:g}",
        "Mask blur": "" if request.mask_blur is None else f"{request.mask_blur:g}",
        "Model hash": manifest.pipeline.source_sha256[:10],
        "Model": manifest.name,
        "RNG": "CPU",
        "Version": f"edgesd {manifest.tools.get('edgesd', '')}".strip(),
    }
    lines = [prompt, *([f"{_NEGATIVE} {negative}"] if negative else [])]
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value)
    return "\n".join([*lines, last])


def _schedule(config: Mapping[str, Any], request: CompleteRequest) -> str:
    """The web UI's name of how noise levels are spread; "" where they aren't."""
    if isinstance(request.sigmas, tuple) or not SCHEDULERS[request.scheduler].spreads:
        return ""
    own = next((kind for kind in SPREADS if config.get(option_of(kind))), "")
    return _SCHEDULES.get(own if request.sigmas is None else request.sigmas, "")


def _line_safe(prompt: str) -> str:
    """A prompt no line of which is taken for the beginning of the negative one."""
    return re.sub(r"(?m)^([^\S\n]*Negative)(?= prompt:)", r"\1\\", prompt)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,\n:]", value) else value


def parsed(text: str) -> Parsed:
    """What a text says. It may be any text: what isn't understood is a part of the prompt."""
    *lines, last = text.strip().split("\n")
    pairs = dict(_pairs(last))
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], {}
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            negative, line = True, line.removeprefix(_NEGATIVE).strip()
        prompts[negative].append(line)
    values = {"prompt": "\n".join(prompts[0]), "negative_prompt": "\n".join(prompts[1])}
    values |= {ours: pairs[theirs] for theirs, ours in _USED.items() if theirs in pairs}
    sampler, schedule = _sampler(pairs)
    if ours := _ours(sampler):
        values["scheduler"] = ours
        if schedule in SPREADS and SCHEDULERS[ours].spreads:
            values["sigmas"], schedule = schedule, ""
    return Parsed(values, tuple(_remarks(pairs, sampler, schedule)))


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values, of which the last of one name counts."""
    at = 0
    while at < len(line):
        if not (pair := _PAIR.match(line, at)):
            at = line.find(",", at) + 1 or len(line)
            continue
        at = pair.end()
        value = pair[2].strip()
        if value.startswith('"'):
            with suppress(ValueError):  # as it is, like there
                value = str(json.loads(value))
        yield pair[1], value


def _sampler(pairs: Mapping[str, str]) -> tuple[str, str]:
    """Sampler and schedule in lower case; older versions have both in one name, such as
    "DPM++ 2M Karras"."""
    name, schedule = pairs.get("Sampler", "").lower(), pairs.get("Schedule type", "").lower()
    for kind in SPREADS:
        if name.endswith(f" {kind}"):
            return name.removesuffix(f" {kind}"), kind
    return name, schedule


def _ours(sampler: str) -> str | None:
    """Our name of a sampler; those that the web UI has no name for are written under it."""
    return _OURS.get(sampler, sampler if sampler in SCHEDULERS else None)


def _remarks(pairs: Mapping[str, str], sampler: str, schedule: str) -> Iterator[str]:
    if not pairs:
        yield "no settings are given beside the prompt: the bundle's own are used"
        return
    if sampler and not _ours(sampler):
        yield f"the sampler {sampler[:40]} isn't among edgesd's: the bundle's own is used"
    if schedule not in ("", "automatic"):
        yield f"the schedule {schedule[:40]} isn't used: the bundle has its own"
    if pairs.get("RNG", "GPU") != "CPU":
        yield "its noise was made on a GPU: another image comes of the same seed"
    used = {*_USED, *_SILENT, "Sampler"}
    if ignored := [name for name in pairs if name not in used]:
        more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
        yield f"not used: {', '.join(ignored[:8])}{more}"
