"""What families and the loader of networks read of a checkpoint, whatever its form on disk.

Forms are in export/source. Of each, configs and tokenizers lie in folders as save_pretrained writes
them; weights lie there, too, or are handed out as tensors (`state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgesd.export.lora.update import Lora

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
"""Of the weight files of a network that the library saved."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one network: names in its folder, and how diffusers must load them."""

    files: tuple[str, ...]
    variant: str | None
    safetensors: bool


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion (Gal et al. 2022, arXiv 2208.01618): a token, and the vectors that stand
    for it in text encoders.

    sha256: of its file. vectors: [n, C] in fp32, by the text encoder's name in the file (clip_l,
    clip_g), or "" where it has one.
    """

    token: str
    sha256: str
    vectors: Mapping[str, Tensor]

    @property
    def tokens(self) -> list[str]:
        """A token for each vector, with the names that diffusers gives them."""
        count = len(next(iter(self.vectors.values())))
        return [self.token, *(f"{self.token}_{number}" for number in range(1, count))]


class Checkpoint(Protocol):
    """A model on this machine. `name` is what the user called it,
    `public_name` what bundles say of it; `index` is model_index.json."""

    @property
    def name(self) -> str: ...

    @property
    def public_name(self) -> str: ...

    @property
    def index(self) -> Mapping[str, Any]: ...

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """Textual inversions that are added to its tokenizers and text encoders."""

    @property
    def loras(self) -> tuple[Lora, ...]:
        """LoRAs that are merged into its networks, one after another."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of ControlNets and adapters that are added to it, in order."""

    def folder(self, name: str) -> Path:
        """The folder of a component's config, of a tokenizer or of the scheduler; it may be
        missing."""

    def config(self, path: str) -> dict[str, Any]:
        """The json object in the file `path`, relative to the model. Raises InputError."""

    def class_of(self, component: str) -> str:
        """The class that model_index.json gives for a component. Raises InputError."""

    def library_of(self, component: str) -> str:
        """The library of that class: diffusers, transformers, or a file of the model's own."""

    def weights(self, component: str) -> Weights:
        """The best weight files in a component's folder. Raises InputError when there are none."""

    def state(self, component: str, net: nn.Module) -> Mapping[str, Tensor] | None:
        """The weights of a component whose folder has none: name in the state dict of `net` ->
        tensor, mapped where the file allows it, in the type that the file has it in.

        None where diffusers' and transformers' own loaders read them, from `weights` in `folder`.
        net: the network, made of the component's config alone, its parameters on torch's meta
        device. What comes back has each of them, in their shapes, and nothing else. Raises
        InputError.
        """

    def check_shapes(self, component: str, net: nn.Module) -> None:
        """Raise InputError where `state` would for weights of other names, shapes and types, as far
        as that is known without reading them. net: as there."""

    def check_network(self, component: str, net: nn.Module) -> None:
        """Hold a component's network, with its weights, to what the checkpoint has of it besides
        weights, such as graphs. Raises InputError where it computes something else."""

    def parameters(self, component: str) -> int:
        """Number of weights of a component. Raises InputError when a file can't be read."""

    def hints(self) -> dict[str, Any]:
        """Defaults that the model asks for: num_inference_steps, guidance_scale, variant (a kind
        of families/variants.py), clip_skip and max_tokens (spec.build.BuildOptions), height and
        width in pixels."""

    def sha256(self) -> str:
        """Hash over the names and contents of all files that the pipeline is made from."""
