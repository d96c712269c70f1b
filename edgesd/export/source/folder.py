"""A model in a diffusers folder: its configs, weights, licence, prompts and hints."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError, unknown_name
from edgesd.export.families import Family, families, family_of
from edgesd.export.families.checkpoint import TRANSFORMERS_STEM, Embedding, Weights
from edgesd.export.source.pointers import check_no_pointer
from edgesd.export.source.tensor_file import TensorFile
from edgesd.files import expanded, sha256_file
from edgesd.runtime.images import read_prompts
from edgesd.spec.base import MAX_PIXELS, is_file_name
from edgesd.spec.build import VARIANTS, Variant
from edgesd.spec.bundle import Licence
from edgesd.textfiles import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgesd.export.lora.update import Lora

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
TEXT_FILE = (".json", ".txt", ".model")
LICENCES = "LICENSES"
NOTICE = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
MODEL_CARD = "README.md"
_LARGE = ("vocab_size", "max_position_embeddings", "model_max_length")
_LARGEST, _LARGEST_SIZE = 1 << 20, 1 << 14
"""Of those numbers in a component's config.json and of ids of tokens; of all others."""
_NONE = [None, None]
"""What model_index.json says of a component that a pipeline could have, and this one hasn't."""
HINTS = "edgesd.json"
INDEX = "model_index.json"
_LONGEST_CLASS = 200
"""Characters of a class's name."""
_NOT_HASHED = "0" * 64
_Stamp = tuple[Path, int, int, int]
"""A file, its inode, bytes, and when it was last written."""
_HINT_TYPES: dict[str, tuple[type, ...]] = {
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "clip_skip": (int,),
    "max_tokens": (int,),
    "variant": (str,),
    "height": (int,),
    "width": (int,),
}
_SIZE = ("height", "width")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. `name` is what the user called it; `index` is model_index.json.
    variant: what kind of model the user says that it is. others: component -> the model whose
    network stands in for it, or is added. embeddings: textual inversions that are added to it.
    loras: what is merged into its networks. clip_skip, max_tokens: what the user says of its text
    encoders (spec.build.BuildOptions). sides: ControlNets and adapters among `others`. hashed:
    whether its files are; a plan, which reads no weights, has no use for that."""

    name: str
    root: Path
    index: Mapping[str, Any]
    family: Family
    variant: Variant | None = None
    others: Mapping[str, ModelSource] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()
    loras: tuple[Lora, ...] = ()
    clip_skip: int | None = None
    max_tokens: int | None = None
    sides: tuple[str, ...] = ()
    hashed: bool = True

    def folder(self, name: str) -> Path:
        """The folder of a component, a tokenizer or the scheduler; it may be missing."""
        other = self.others.get(name)
        return self.root / name if other is None else other.folder(name)

    def config(self, path: str) -> dict[str, Any]:
        """The json object in the file `path`, relative to the model. Raises InputError."""
        name, _, file = path.rpartition("/")
        return read_json_object(self.folder(name) / file if name else self.root / file)

    def check_configs(self) -> None:
        """Raise InputError for a component whose config.json has a number that no model has, before
        a network of that size is made."""
        for component in self.networks:
            name = f"{component}/config.json"
            for key, value in _numbers(self.config(name)):
                large = key in _LARGE or key.endswith("_token_id")
                most = _LARGEST if large else _LARGEST_SIZE
                if abs(value) > most:
                    path = self.folder(component) / "config.json"
                    raise InputError(
                        f"{path}: {key} is {str(value)[:20]}, and {most} is the most that any "
                        "model has: download the model again"
                    )

    @property
    def networks(self) -> tuple[str, ...]:
        """The components of the family that this model has, and those that are added: a refiner
        has one encoder less."""
        return *self._present(self.family.weights), *self.sides

    def _present(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if self.index.get(name) != _NONE)

    def class_of(self, component: str) -> str:
        """The class that model_index.json gives for a component. Raises InputError."""
        return self._entry(component)[1]

    def library_of(self, component: str) -> str:
        """The library of that class: diffusers, transformers, or a file of the model's own."""
        return self._entry(component)[0]

    def _entry(self, component: str) -> tuple[str, str]:
        if other := self.others.get(component):
            return other._entry(component)
        entry = self.index.get(component)
        if (
            isinstance(entry, list)
            and [type(part) for part in entry] == [str, str]
            and max(map(len, entry)) <= _LONGEST_CLASS
        ):
            return entry[0], entry[1]
        raise InputError(f"{self.root / INDEX} has no {component}: is it complete?")

    def weights(self, component: str) -> Weights:
        """The best weight files of a component. Raises InputError when there are none."""
        if other := self.others.get(component):
            return other.weights(component)
        folder = self.folder(component)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        stem = self.family.weights[component]
        found = choose_weights(names, stem)
        if found is None:
            raise InputError(_lacking(folder, names, stem))
        return found

    def state(self, component: str, net: nn.Module) -> Mapping[str, Tensor] | None:
        """None: diffusers and transformers load the `weights` of a component."""
        other = self.others.get(component)
        return None if other is None else other.state(component, net)

    def check_shapes(self, component: str, net: nn.Module) -> None:
        """Nothing: the libraries tell when they load."""

    def check_network(self, component: str, net: nn.Module) -> None:
        """Nothing: a diffusers folder has no more than configs and weights."""
        if other := self.others.get(component):
            other.check_network(component, net)

    def parameters(self, component: str) -> int:
        """Number of weights of a component; for .bin files, as if they were stored in fp32.

        Raises InputError when a file can't be read.
        """
        weights = self.weights(component)
        paths = [self.folder(component) / name for name in weights.files]
        for path in paths:
            check_no_pointer(path)
        if not weights.safetensors:
            return sum(path.stat().st_size for path in paths) // 4
        # Beside shards is their index.
        files = [TensorFile(path) for path in paths if path.suffix == SAFETENSORS]
        return sum(file.parameters(file) for file in files)

    def papers(self, cards: bool = True) -> dict[str, Path]:
        """The model card and all licence files, by their names below the licences of a bundle;
        those of other components' models lie below the component's name there. cards: without
        them, licence files alone."""
        card = self.model_card() if cards else None
        own = [*([card] if card else []), *self.licence_files()]
        found = {path.relative_to(self.root).as_posix(): path for path in own}
        for component, other in self.others.items():
            found |= {f"{component}/{name}": path for name, path in other.papers(cards).items()}
        return found

    def licence_files(self) -> tuple[Path, ...]:
        """LICENSE, NOTICE and the like in the model's folder, and all files in its LICENSES/."""
        notices = [p for p in self.root.iterdir() if NOTICE.fullmatch(p.name)]
        found = sorted(p for p in [*notices, *(self.root / LICENCES).glob("*")] if p.is_file())
        for path in found:
            self._check_inside(path)
            if not is_file_name(path.name):
                raise InputError(f"{path.parent} has a file {path.name!a}: give it a plainer name")
        return tuple(found)

    def model_card(self) -> Path | None:
        """README.md, if there is one."""
        path = self.root / MODEL_CARD
        if not path.is_file():
            return None
        self._check_inside(path)
        return path

    def _check_inside(self, path: Path) -> None:
        """Raise InputError where a link leads out of the model, whose files go into bundles.

        The hub's cache is known: its snapshots are of links to the blobs beside them.
        """
        real, root = path.resolve(), self.root.resolve()
        folders = [root]
        if root.parent.name == "snapshots":
            folders.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(folder) for folder in folders):
            raise InputError(
                f"{path} is a link out of the model's folder, to {real}, and would be copied into "
                "the bundle: put the file itself there, or remove the link"
            )

    @property
    def public_name(self) -> str:
        """What bundles say: the hub's id, or the folder's own name, without where it lies."""
        if self.root != expanded(self.name):
            return self.name
        return self.root.resolve().name or "model"

    def licence_name(self) -> str:
        """`license` in the model card's front matter, or "unknown"."""
        card = self.model_card()
        text = ""
        if card:
            with card.open("rb") as file:  # its beginning says it
                text = file.read(1 << 20).decode("utf-8-sig", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        fields = dict(
            re.findall(r"^(license\w*):[ \t]*[\"']?([^\"'\n#]+)", front[1], re.MULTILINE)
            if front
            else []
        )
        name = fields.get("license", "").strip()
        if name in ("", "other"):
            name = fields.get("license_name", name).strip()
        return name or "unknown"

    def licence(self, folder: str) -> Licence:
        """The licence, its files taken to be copied to `folder`; with those of other components'
        models and of LoRAs, whose names say which."""
        names = [self.licence_name()]
        names += [f"{name}: {other.licence_name()}" for name, other in self.others.items()]
        names += [f"{lora.name}: {lora.licence or 'unknown'}" for lora in self.loras]
        files = tuple(f"{folder}/{name}" for name in self.papers(cards=False))
        return Licence("; ".join(names), files)

    def hints(self) -> dict[str, Any]:
        """Defaults that the model asks for in edgesd.json: num_inference_steps, guidance_scale,
        variant, clip_skip, max_tokens, and height and width in pixels. Those of a LoRA come before
        the model's. What the user says holds, and steps and guidance of another variant than that
        don't.

        Raises InputError for another field, or a value that makes no sense.
        """
        own = self._own_hints()
        said = {"clip_skip": self.clip_skip, "max_tokens": self.max_tokens}
        said |= dict.fromkeys(_SIZE)
        said = {name: own.get(name) if value is None else value for name, value in said.items()}
        found = self._lora_hints() or own
        if self.variant not in (None, found.get("variant")):
            found = {"variant": self.variant}
        return {**found, **{name: value for name, value in said.items() if value is not None}}

    def _lora_hints(self) -> dict[str, Any]:
        """What its LoRAs ask for. Raises InputError where two of them don't agree."""
        asking = [lora for lora in self.loras if lora.hints and lora.scale]
        for other in asking[1:]:
            if other.hints != asking[0].hints and self.variant is None:
                raise InputError(
                    f"{asking[0].name} and {other.name} ask for different steps or kinds of model "
                    f"({HINTS} or metadata): say which with --variant {'|'.join(VARIANTS)}"
                )
        return dict(asking[0].hints) if asking else {}

    def _own_hints(self) -> dict[str, Any]:
        path = self.root / HINTS
        return check_hints(path, read_json_object(path)) if path.exists() else {}

    def prompts(self, purpose: str) -> tuple[str, ...] | None:
        """The model's own prompts for "calibration" or "quality"; None if it has none.

        They are in prompts/PURPOSE.txt. Raises InputError for a file that isn't text or is empty.
        """
        path = self.root / "prompts" / f"{purpose}.txt"
        if not path.exists():
            return None
        self._check_inside(path)
        return tuple(read_prompts(path))

    def sha256(self) -> str:
        """Hash over the names and contents of all files that the pipeline is made from, as they
        were when it was first asked for, and over what is said of the model that its networks or
        its schedule depend on; zeros for one that isn't `hashed`."""
        return self._hashed[0] if self.hashed else _NOT_HASHED

    def check_unchanged(self) -> None:
        """Raise InputError unless all files are as they were when `sha256` was first asked for.

        Weights are read anew for as long as a build takes, and a bundle says which they were.
        """
        digest, stamps = self._hashed
        try:
            now = self._stamps()
            same = now == stamps or self._digest() == digest
        except (InputError, OSError):
            now, same = stamps, False
        if same:
            stamps[:] = now  # so that it isn't hashed again
        else:
            raise InputError(
                f"{self.name} was changed or removed while it was read: nothing is written of it; "
                "run again when it is complete"
            )

    @cached_property  # each spec of an export has it, and the files are gigabytes
    def _hashed(self) -> tuple[str, list[_Stamp]]:
        """The hash, and the files as they were before it was computed."""
        stamps = self._stamps()
        return self._digest(), stamps

    def _stamps(self) -> list[_Stamp]:
        paths = [path for _, path in sorted(self._files())]
        for component, other in sorted(self.others.items()):
            paths += other._network_files(component)
        paths += [path for lora in self.loras for path in lora.files]
        found = [(path, path.stat()) for path in paths]
        return [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, path in sorted(self._files()):
            digest.update(f"{name}\0{sha256_file(path)}\n".encode())
        for component, other in sorted(self.others.items()):
            digest.update(f"{component}\0{other.network_sha256(component)}\n".encode())
        for embedding in self.embeddings:
            digest.update(f"{embedding.token}\0{embedding.sha256}\n".encode())
        for lora in self.loras:
            lora.check_unchanged()
            digest.update(
                f"lora\0{lora.sha256}\0{lora.scale!r}\0{[*lora.hints.items()]}\n".encode()
            )
        hints = self.hints()
        said = {"variant": self.variant}
        said |= {name: hints.get(name) for name in ("clip_skip", "max_tokens")}
        for name, value in said.items():
            if value:
                digest.update(f"{name}\0{value}\n".encode())
        return digest.hexdigest()

    def network_sha256(self, component: str) -> str:
        """Hash over the config and the weights of one component."""
        digest = hashlib.sha256()
        for path in self._network_files(component):
            digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
        return digest.hexdigest()

    def _network_files(self, component: str) -> list[Path]:
        folder = self.folder(component)
        return [folder / name for name in ("config.json", *self.weights(component).files)]

    def _files(self) -> list[tuple[str, Path]]:
        """What the pipeline is made from: names within the model, and where the files are."""
        return [*self._config_files(), *self._weight_files(self._own_networks)]

    def _weight_files(self, components: Iterable[str]) -> list[tuple[str, Path]]:
        return self._named(
            self.folder(component) / name
            for component in components
            for name in self.weights(component).files
        )

    @property
    def _own_networks(self) -> list[str]:
        return [component for component in self.networks if component not in self.others]

    def _config_files(self) -> list[tuple[str, Path]]:
        """model_index.json, configs of networks, and what the folders without networks hold."""
        paths = [self.root / INDEX]
        paths += [self.root / component / "config.json" for component in self._own_networks]
        return [*self._named(paths), *self._text_files()]

    def _text_files(self) -> list[tuple[str, Path]]:
        """What tokenizers and the scheduler are made from."""
        paths = list[Path]()
        for folder_name in self._present(self.family.configs):
            folder = self.root / folder_name
            if not folder.is_dir():
                raise InputError(f"{folder} is missing: download the model again")
            paths += [p for p in folder.iterdir() if p.suffix in TEXT_FILE]
        return self._named(paths)

    def _named(self, paths: Iterable[Path]) -> list[tuple[str, Path]]:
        found = [(path.relative_to(self.root).as_posix(), path) for path in paths]
        for _, path in found:
            if not path.is_file():
                raise InputError(f"{path} is missing: download the model again")
        return found


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number within a JSON value, with the key that is nearest above it."""
    left = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, inner) for inner in value)
        elif isinstance(value, (int, float)):
            yield key, value


def check_hints(
    where: object, found: dict[str, Any], names: Collection[str] = tuple(_HINT_TYPES)
) -> dict[str, Any]:
    """`found`, of an edgesd.json, or of what stands for one. names: of the fields that it may have.

    Raises InputError for another field, or a value that makes no sense.
    """
    for name, value in found.items():
        if name not in names:
            raise InputError(f"{where}: {unknown_name('field', name, names)}")
        kinds = _HINT_TYPES[name]
        if kinds == (str,):
            if value not in VARIANTS:
                raise InputError(f"{where}: {unknown_name(name, str(value), VARIANTS)}")
            continue
        number = value if type(value) in kinds else math.nan
        least = 1 if kinds == (int,) else 0
        most = MAX_PIXELS if name in _SIZE else 1000
        if not least <= number <= most:
            raise InputError(
                f"{where}: {name} must be a number from {least} to {most}, not {value!r:.60}"
            )
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The json object in a file. Raises InputError when it is missing, broken, or no object."""
    if not path.exists():
        raise InputError(f"{path} is missing: is this a complete diffusers folder?")
    check_no_pointer(path)
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def choose_weights(names: Collection[str], stem: str) -> Weights | None:
    """The best complete set of weight files among `names`, or None.

    Full precision before fp16, as diffusers has it, and of one precision safetensors before pickles
    (whose transformers stem is pytorch_model); variants other than fp16 (non_ema, int8 ...) are
    left alone.
    """
    for variant in (None, "fp16"):
        for safetensors in (True, False):
            extension = "safetensors" if safetensors else "bin"
            base = "pytorch_model" if stem == TRANSFORMERS_STEM and not safetensors else stem
            infix = f".{variant}" if variant else ""
            single = f"{base}{infix}.{extension}"
            if single in names:
                return Weights((single,), variant, safetensors)
            index = f"{base}.{extension}.index{infix}.json"
            shard = re.compile(re.escape(f"{base}{infix}") + rf"-\d+-of-(\d+)\.{extension}")
            shards = sorted(name for name in names if shard.fullmatch(name))
            counts = {int(match[1]) for name in shards if (match := shard.fullmatch(name))}
            if index in names and counts == {len(shards)}:
                return Weights((index, *shards), variant, safetensors)
    return None


def _lacking(folder: Path, names: Collection[str], stem: str) -> str:
    """Why there are no weights of a network in `folder`, which holds files `names`."""
    if not folder.is_dir():
        return f"{folder} is missing: the pipeline isn't complete; download it again"
    expected = f"expected {stem}.safetensors, its .fp16 variant, its shards, or a .bin file"
    other = next((n for n in sorted(names) if n.endswith((".onnx", ".msgpack", ".gguf"))), None)
    variants = sorted(n for n in names if re.fullmatch(rf"{stem}\.\w+\.(safetensors|bin)", n))
    shards = sorted(n for n in names if re.search(r"-\d+-of-\d+\.", n))
    if shards:
        return (
            f"{folder} has {len(shards)} of the parts of its weights, or no index of them: "
            f"{expected}; download the others"
        )
    if variants:
        return f"{folder} has its weights as {variants[0]} only: {expected}"
    if other:
        return f"{folder} has {other}, and no weights for PyTorch: {expected}"
    return f"{folder} has no weights: {expected}; download the model again"


def is_pipeline(root: Path) -> bool:
    """Whether a folder holds a pipeline."""
    return (root / INDEX).is_file()


def open_folder(name: str, root: Path) -> ModelSource:
    """Open a folder that diffusers saved. Raises InputError for another one."""
    if not is_pipeline(root):
        raise InputError(_no_pipeline(root))
    index = read_json_object(root / INDEX)
    class_name = class_name_of(root / INDEX, index)
    return ModelSource(name, root, index, family_of(class_name, name))


def class_name_of(path: Path, index: Mapping[str, Any]) -> str:
    """The pipeline's class. Raises InputError where there is none, or code of the model's own."""
    name = index.get("_class_name")
    if isinstance(name, str):
        return name
    if isinstance(name, list) and len(name) == 2 and all(isinstance(part, str) for part in name):
        module, own = name
        known = {taken for family in families() for taken in family.class_names}
        advice = (
            f'if that does what diffusers\' own {own} does, write "_class_name": "{own}" there'
            if own in known
            else "only pipelines of diffusers itself are supported"
        )
        raise InputError(
            f"{path} asks for {own} of the model's own code ({module}.py), which edgesd doesn't "
            f"run: {advice}"
        )
    raise InputError(
        f"{path} names no pipeline class (its _class_name is {_brief(name)}): a pipeline that "
        "diffusers' save_pretrained wrote has one"
    )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_pipeline(root: Path) -> str:
    """What a folder without model_index.json is instead, and what to do with it."""
    names = sorted(path.name for path in root.iterdir())
    inner = [name for name in names if (root / name / INDEX).is_file()]
    snapshots = sorted((root / "snapshots").glob(f"*/{INDEX}"))
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    single = [name for name in names if Path(name).suffix.lower() == SAFETENSORS]
    if "bundle.json" in names:
        return f"{root} is a bundle already: edgesd inspect shows what it is"
    if inner or snapshots:
        nearest = snapshots[0].parent if snapshots else root / inner[0]
        return f"{root} has no model_index.json, but {nearest} has: give that folder"
    if "adapter_config.json" in names or any(
        "lora" in name.lower() for name in [*single, *pickles]
    ):
        return (
            f"{root} holds a LoRA, not a pipeline: give its base model as MODEL, and the "
            ".safetensors file in it as --lora"
        )
    if "config.json" in names:
        return (
            f"{root} holds one network (it has config.json, and no model_index.json): give the "
            "folder of the whole pipeline"
        )
    if single:
        return f"{root} has no model_index.json: give a file in it, such as {root / single[0]}"
    if pickles:
        return not_a_folder(root / pickles[0])
    return (
        f"{root} has no model_index.json: expected a diffusers pipeline folder, as "
        "save_pretrained writes it"
    )


def check_no_pickle(path: Path, page: str) -> None:
    """Raise InputError for a file that is named as pickles are. page: of docs/, that says more."""
    if path.suffix.lower() in PICKLES:
        raise InputError(_is_pickle(path, page))


def _is_pickle(path: Path, page: str) -> str:
    return (
        f"{path} is a pickle, and reading one can run code: convert it to .safetensors "
        f"(docs/{page} has a command that reads tensors alone), or download that"
    )


def not_a_folder(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return _is_pickle(path, "models.md")
    what = {
        ".edgesd": "a bundle already: edgesd inspect shows what it is",
        ".gguf": "a GGUF file, which isn't supported: give the diffusers folder it was made from",
        ".onnx": "an ONNX graph of one network: give the folder of the whole pipeline",
        ".json": "a file: give the folder that holds it",
        **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z"), "an archive: unpack it first"),
    }
    other = "a file: expected a diffusers folder or a .safetensors file"
    return f"{path} is {what.get(suffix, other)}"
