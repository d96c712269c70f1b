"""The value types that travel between rooms. No heavy import: this runs on every board.

All are frozen and compare by value. What is written to disk (`BundleManifest` and all below
it) decodes strictly: an unknown or missing field is an error.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 1
"""Version of `bundle.json`. A reader refuses a newer one; it is raised on any change of meaning."""

Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

Dim = int | str
"""A fixed size, or the name of a symbolic one: batch, height, width (in the tensor's own unit)."""


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of all specs: immutable, strict when decoded."""


class TensorSpec(Spec, frozen=True):
    """One input or output of a component. `dtype` is numpy's name (float32, int64 ...)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


class ComponentSpec(Spec, frozen=True):
    """One network of a pipeline: text_encoder, unet, vae_encoder, vae_decoder ..."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, or None."""
        return next((t for t in self.inputs if t.name == name), None)


class SchedulerSpec(Spec, frozen=True):
    """A noise schedule: our name for the sampler, and diffusers' scheduler_config.json."""

    name: str
    config: dict[str, Any]


class LatentSpec(Spec, frozen=True):
    """How latents relate to pictures: [B, channels, H / scale_factor, W / scale_factor].

    latents = (encoded - shift_factor) * scaling_factor, as in diffusers' AutoencoderKL.
    """

    channels: int
    scale_factor: int
    scaling_factor: float
    shift_factor: float = 0.0


class ShapeSpec(Spec, frozen=True):
    """Picture sizes in pixels that the graphs accept.

    dynamic: any multiple of `multiple_of`, height and width being the default, and up to `batch`
    rows of the denoiser. Otherwise this size only, and exactly `batch` rows.
    """

    height: int
    width: int
    batch: int
    dynamic: bool
    multiple_of: int


class PipelineSpec(Spec, frozen=True):
    """What a pipeline is, whatever the precision or backend of its graphs."""

    family: str
    source: str
    source_sha256: str
    components: dict[str, ComponentSpec]
    scheduler: SchedulerSpec
    latent: LatentSpec
    shape: ShapeSpec
    max_tokens: int
    num_inference_steps: int
    guidance_scale: float


class Parity(Spec, frozen=True):
    """How far a converted component is from its torch source, on the same inputs.

    max_abs: largest absolute difference over all outputs; rel_rms: RMS of the difference over
    RMS of the source (dimensionless); tolerance: the largest rel_rms that passes the gate.
    """

    max_abs: float
    rel_rms: float
    tolerance: float


class Graph(Spec, frozen=True):
    """A component as an ONNX file. Paths are relative to the folder that holds it."""

    component: str
    path: str
    precision: Precision
    parity: Parity


class GraphSet(Spec, frozen=True):
    """All graphs of a pipeline, in the folder `root`, with what else the pipeline needs.

    assets: further files (tokenizer.json, model card, licences), relative to `root`.
    """

    root: str
    pipeline: PipelineSpec
    precision: Precision
    graphs: dict[str, Graph]
    assets: tuple[str, ...]
    licence: Licence
    tools: dict[str, str]


class Licence(Spec, frozen=True):
    """Licence of the weights: SPDX-like name as the model card states it, and its files."""

    name: str
    files: tuple[str, ...] = ()


class Machine(Spec, frozen=True):
    """What a computer is, as far as it can be read from it.

    memory_bytes: RAM that this process may use at most (0: can't be read). target: the nearest
    registered one, or None. l4t: release of the Jetson's Linux (36.4.3), or None.
    """

    arch: str
    model: str
    target: str | None
    memory_bytes: int
    cpu_count: int
    capabilities: tuple[str, ...]
    l4t: str | None = None


class Target(Spec, frozen=True):
    """A board (or computer) that a bundle is built for.

    memory_bytes: RAM that the smallest such board has, shared with a GPU where there is one.
    memory_options: RAM of the other boards sold under this name; each makes a target NAME-8gb.
    capabilities: CPU or GPU features that a bundle may count on (dotprod, sm_87 ...).
    backends: engine backends, best first. flasher: how its storage is written, if edgesd can.
    families: names that stand for the smallest of their members. models, module_ids: how the board
    is recognised (starts of the device-tree model; p3767-0003). No models: any machine of `arch`.
    """

    name: str
    title: str
    arch: str
    backends: tuple[str, ...]
    memory_bytes: int
    cpu_count: int
    precisions: tuple[Precision, ...] = PRECISIONS
    capabilities: tuple[str, ...] = ()
    memory_options: tuple[int, ...] = ()
    families: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    module_ids: tuple[str, ...] = ()
    flasher: str | None = None


class Engine(Spec, frozen=True):
    """What a runner loads for one component. `built_for`: backend-specific environment or None."""

    component: str
    path: str
    backend: str
    precision: Precision
    parity: Parity
    built_for: str | None = None


class FileEntry(Spec, frozen=True):
    """One file of a bundle."""

    bytes: int
    sha256: str


class BundleManifest(Spec, frozen=True):
    """bundle.json: everything a board must know before it loads a byte of weights."""

    schema_version: int
    name: str
    target: str
    arch: str
    backend: str
    precision: Precision
    pipeline: PipelineSpec
    engines: dict[str, Engine]
    licence: Licence
    tools: dict[str, str]
    files: dict[str, FileEntry]
    required_capabilities: tuple[str, ...] = ()
