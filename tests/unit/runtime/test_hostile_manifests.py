"""Manifests from anywhere: whatever they say, a bundle works or is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from edgesd.device.slots import Slots
from edgesd.engines.bundle import update_manifest
from edgesd.errors import BundleError, EdgesdError, InputError
from edgesd.files import sha256_file
from edgesd.runtime import tasks
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, checksum_line, open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.prompter import read_prompter
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings
from edgesd.spec.bundle import (
    CalibrationSpec,
    ComponentPart,
    LayerRecipe,
    PrompterSpec,
    QuantRecipe,
    SplitComponent,
)
from edgesd.spec.quality import Gate, ImageQuality, Quality
from tests.support import assert_refused, run_cli
from tests.unit.runtime import test_flow as fakes

QUICK, MANY = 120, 5000
MOST_PIXELS, MOST_STEPS = 1 << 16, 50
"""What is generated where a mutation left the bundle usable."""

Path_ = tuple[Any, ...]


def rich(bundle: Bundle, root: Path) -> Path:
    """A copy of the miniature whose manifest has every field that a manifest can have."""
    shutil.copytree(bundle.path, root)
    (root / "prompter").mkdir()
    added = ["prompter/base.gguf", "prompter/grammar.gbnf", "one.png", "vae_decoder/head.onnx"]
    for name in added:
        (root / name).write_bytes(b"x")
    manifest = bundle.manifest
    decoder = manifest.engines["vae_decoder"]
    spec = manifest.pipeline.components["vae_decoder"]
    features = msgspec.structs.replace(spec.inputs[0], name="features")
    head = msgspec.structs.replace(spec, outputs=(features,))
    flat = msgspec.structs.replace(features, name="statistics", shape=(1, 2, 4))
    tail = msgspec.structs.replace(
        spec,
        inputs=(
            features,
            flat,
            msgspec.structs.replace(flat, name="own", shape=(1,)),
            msgspec.structs.replace(flat, name="core", dtype="int64", shape=(4,)),
        ),
        outputs=(*spec.outputs, msgspec.structs.replace(flat, name="moments")),
    )
    split = SplitComponent(
        ComponentPart("vae_decoder/head.onnx", head, 1),
        ComponentPart("vae_decoder/head.onnx", tail, 1),
    )
    layer = LayerRecipe("conv_in", "unet", "conv", (4, 4, 3, 3), "fp16", "fp16", 0, 9, 0.1)
    calibration = CalibrationSpec(2, "0" * 64, 2, 3.0, "ddim", 16, 16)
    image = ImageQuality("a cat", 1, 30.0, 0.9, 0.1, "one.png", "one.png", features=0.2)
    gates = (Gate("lpips", 0.2, "option"), Gate("psnr", 18.0, "option"))
    latent = msgspec.structs.replace(manifest.pipeline.latent, halo=9, levels=(8, 4))
    update_manifest(
        root,
        msgspec.structs.replace(
            manifest,
            pipeline=msgspec.structs.replace(manifest.pipeline, latent=latent),
            engines=manifest.engines
            | {"vae_decoder": msgspec.structs.replace(decoder, split=split, checked="by nobody")},
            recipe=QuantRecipe("w8a16", False, (layer,), calibration),
            quality=Quality(
                *((image,), 2, 3.0, "ddim", 30.0, 29.0, 0.9, 0.1, "LPIPS", "here", 20.0, gates)
            ),
            prompter=PrompterSpec(
                "prompter/base.gguf", None, "cats", "{}", "MIT", "prompter/grammar.gbnf"
            ),
        ),
        added,
    )
    return root


class Forge(NamedTuple):
    """A bundle folder whose manifest can say anything."""

    folder: Path
    manifest: dict[str, Any]

    def write(self, raw: bytes) -> Path:
        """Make `raw` the manifest, with its right checksum."""
        (self.folder / MANIFEST).write_bytes(raw)
        (self.folder / CHECKSUM).write_bytes(checksum_line(raw))
        return self.folder


@pytest.fixture(scope="module")
def forge(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Forge:
    folder = rich(miniature, tmp_path_factory.mktemp("hostile") / "bundle")
    return Forge(folder, json.loads((folder / MANIFEST).read_bytes()))


def use(path: Path, look: bool = True) -> str:
    """Do with a bundle what the commands do; what became of it. Raises anything but EdgesdError."""
    done = "refused"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bundle = open_bundle(path)
            bundle.verify()
            done = "opened"
            for settings in (Settings(max_memory=10**9), Settings(memory="balanced")):
                with Pipeline(bundle, settings) as pipeline:
                    request = pipeline.complete(Request("a red cat", 1))
                    pipeline.guidance_mode(request, 1)
                    assert request.height and request.width and request.num_inference_steps
                    small = request.height * request.width <= MOST_PIXELS
                    if small and request.num_inference_steps <= MOST_STEPS:
                        pipeline.generate([request])
                        done = "generated"
    except EdgesdError as exc:
        assert len(str(exc).splitlines()) == 1 and len(str(exc)) < 2000, exc
    if look:
        outcome = run_cli("inspect", path)
        assert "internal fault" not in outcome.err and "Traceback" not in outcome.err
        assert outcome.code in (0, BundleError.exit_code), outcome.err
    return done


NUMBERS = (
    "0",
    "-1",
    "1",
    "7",
    "2147483648",
    "9223372036854775808",
    "1" + "0" * 400,
    "1e308",
    "1e999",
)
TOKENS = [
    *NUMBERS,
    *("-5e-324", "0.5", "NaN", "Infinity", "true", "null", '""', "[]", "{}", "[[[[]]]]"),
    *('"\\u0000"', '"../../x"', '"/etc/passwd"', '"a/../b"', '"\\ud800"', '"\\u202e\\u001b[31m"'),
    *('"{}"', '"{0.__class__}"', '"%s%s"', '"float99"', '"O"', '"fp32"', '"w4a8-g64"', '"batch"'),
    *(f'"{"x" * 5000}"', f'"{"0" * 64}"', f"[{','.join('1' * 1000)}]", "[1,2]", '["batch",4]'),
]
"""JSON that may stand anywhere."""


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where every value within `value` is."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*at, index))


def mutated(manifest: dict[str, Any], where: list[Path_], rng: random.Random) -> bytes:
    """The manifest with one to three values deleted, renamed, repeated, swapped or replaced."""
    found = json.loads(json.dumps(manifest))
    tokens: dict[str, str] = {}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, last = rng.choice(where)
        inner: Any = found
        try:
            for key in path:
                inner = inner[key]
            kind = rng.choice(["token"] * 6 + ["delete", "rename", "repeat", "swap"])
            if kind == "token":
                mark = f"@{len(tokens)}@"
                tokens[json.dumps(mark)] = rng.choice(TOKENS)
                inner[last] = mark
            elif kind == "delete":
                del inner[last]
            elif kind == "rename" and isinstance(inner, dict):
                inner[rng.choice(["", "../x", "x\0", "unet", str(last) + "x"])] = inner.pop(last)
            elif kind == "repeat" and isinstance(inner, list):
                inner += [inner[last]] * rng.choice([1, 300])
            else:
                *other, end = rng.choice(where)
                from_: Any = found
                for key in other:
                    from_ = from_[key]
                inner[last] = json.loads(json.dumps(from_[end]))
        except (KeyError, IndexError, TypeError):
            continue  # a mutation before took away what this one was for
    text = json.dumps(found)
    for mark, token in tokens.items():
        text = text.replace(mark, token)
    return text.encode("utf-8", "surrogatepass")


def count_mutations(forge: Forge, seeds: range) -> dict[str, int]:
    where = list(places(forge.manifest))
    counts: dict[str, int] = {}
    for seed in seeds:
        raw = mutated(forge.manifest, where, random.Random(seed))
        try:
            done = use(forge.write(raw), look=seed % 5 == 0)
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {raw[:3000]!r}") from exc
        counts[done] = counts.get(done, 0) + 1
    return counts


def test_mutated_manifests_work_or_are_refused(forge: Forge) -> None:
    counts = count_mutations(forge, range(QUICK))
    assert counts["refused"] > QUICK // 4 and len(counts) > 1, counts  # both were tried


@pytest.mark.slow
def test_many_mutated_manifests_work_or_are_refused(forge: Forge) -> None:
    counts = count_mutations(forge, range(QUICK, QUICK + MANY))
    print(counts)
    assert sum(counts.values()) == MANY


def test_mutated_wirings_work_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two encoders, sides and what tasks give: the rich wiring of the fakes."""
    monkeypatch.setitem(tasks.TASKS, "text", fakes.TASK)
    forge = Forge(fakes.write(tmp_path / "bundle", fakes.SPEC).path, {})
    manifest = json.loads((forge.folder / MANIFEST).read_bytes())
    where = [path for path in places(manifest) if path[:2] == ("pipeline", "wiring")]
    counts = {"refused": 0, "generated": 0}
    for seed in range(2 * QUICK):
        raw = mutated(manifest, where, random.Random(seed))
        try:
            bundle = open_bundle(forge.write(raw))
            with Pipeline(bundle, Settings(made_here=True), fakes.Fakes()) as pipeline:
                pipeline.generate([Request("a", 1), Request("b", 2)])
            counts["generated"] += 1
        except EdgesdError as exc:
            assert len(str(exc).splitlines()) == 1, exc
            counts["refused"] += 1
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {raw[:3000]!r}") from exc
    assert all(counts.values()), counts


def at(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def put(manifest: dict[str, Any], value: Any) -> None:
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return put


NO_NOISE = {
    "num_train_timesteps": 4,
    "trained_betas": [1e-30] * 4,
    "prediction_type": "sample",
}
"""Betas that vanish in float32: what is predicted is divided by the noise that there is."""
UNET = ("pipeline", "components", "unet")
TAIL = ("engines", "vae_decoder", "halves", "tail", "spec")
REFUSED: dict[str, tuple[tuple[Any, ...], Any]] = {
    f"{'.'.join(map(str, path[-2:]))} {str(value)[:30]}": (path, value)
    for path, values in [
        (("pipeline", "shape", "multiple_of"), [0, -8]),
        (("pipeline", "shape", "height"), [0, -128, 10**12]),
        (("pipeline", "shape", "batch"), [0, -1, 10**9]),
        (("pipeline", "latent", "scale_factor"), [0, -8, 10**6]),
        (("pipeline", "latent", "channels"), [-4, 0, 3, 10**6]),
        (("pipeline", "latent", "levels"), [[], [0], [10**18] * 3, [8] * 100]),
        (("pipeline", "latent", "mean"), [[0.0] * 4, [], [1e300], "0"]),
        (("pipeline", "latent", "std"), [[1.0] * 4, [0.0] * 4, [1e300]]),
        (("pipeline", "latent", "halo"), [-100, 10**9]),
        (("pipeline", "latent", "scaling_factor"), [0.0, -1.0, 1e300]),
        (("pipeline", "scheduler", "config", "num_train_timesteps"), [0, -5, 3 * 10**9, 10**18]),
        (("pipeline", "scheduler", "config", "trained_betas"), [[0.5] * 200_000, "x"]),
        (("pipeline", "scheduler", "config"), [NO_NOISE]),
        (("pipeline", "scheduler", "name"), ["../x", ""]),
        (("pipeline", "num_inference_steps"), [0, -1, 10**9]),
        (("pipeline", "guidance_scale"), [1e308, -1e308]),
        (("pipeline", "wiring", "tokenizers", "tokenizer", "max_tokens"), [-1, 10**9, 64]),
        ((*UNET, "inputs"), [[]]),
        ((*UNET, "outputs"), [[]]),
        ((*UNET, "inputs", 0, "dtype"), ["O", "float99", "datetime64", "int64"]),
        ((*UNET, "inputs", 0, "shape"), [[], [-1, 4, 1, 1], [0, 4, 8, 8], ["batch", 4]]),
        ((*UNET, "inputs", 0, "name"), ["\0", "", "nope"]),
        ((*UNET, "outputs", 0, "name"), ["nope"]),
        (("pipeline", "components", "vae_decoder", "outputs"), [[]]),
        (("pipeline", "components", "vae_decoder", "outputs", 0, "shape"), [[1]]),
        (("files", "LICENSE", "sha256"), ["../../.ssh/id", "A" * 64, "0" * 63, "0" * 64 + "\n"]),
        (("files", "LICENSE", "bytes"), [-1, 10**30]),
        (("prompter", "base"), ["/etc/passwd", "../x"]),
        (("engines", "unet", "path"), ["../x", "/x", "unet/../x"]),
        (("licence", "files"), [["../../.bashrc"]]),
        (("recipe", "layers", 0, "shape"), [[-1], [10**400]]),
        (("engines", "vae_decoder", "halves", "head", "weight_bytes"), [-(10**18)]),
        ((*TAIL, "inputs", 1, "shape", 2), ["moments"]),  # at once: no search among all sizes
        (("target",), ["a\x1b[31m", ""]),
        (("schema_version",), [-1, 10**400]),
    ]
    for value in values
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_out_of_range_is_refused_in_one_line(name: str, forge: Forge) -> None:
    path, value = REFUSED[name]
    manifest = json.loads(json.dumps(forge.manifest))
    at(*path)(manifest, value)
    assert use(forge.write(json.dumps(manifest).encode()), look=False) in ("refused", "opened")
    outcome = run_cli("generate", forge.folder, "-p", "a cat", "-o", forge.folder.parent / "x.png")
    assert outcome.code not in (0, 1), outcome.err
    assert len(outcome.err.splitlines()) == 1 and "internal fault" not in outcome.err


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "other"


def other_type(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Cast", ["before"], [name], to=TensorProto.INT32))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32


def other_rank(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("ReduceMax", ["before"], [name], keepdims=0))
    model.graph.output[0].type.tensor_type.ClearField("shape")


def twice_as_large(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "before"
    twice = helper.make_node("Concat", ["before", "before"], [name], axis=2)
    model.graph.node.append(twice)
    model.graph.output[0].type.tensor_type.ClearField("shape")


def rename_input(model: onnx.ModelProto) -> None:
    old = model.graph.input[0].name
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = "other"
    model.graph.input[0].name = "other"


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize(
    "change",
    [rename_output, other_type, other_rank, twice_as_large, rename_input, no_graph],
)
def test_a_graph_that_is_not_what_its_manifest_says_is_refused(
    change: Callable[[onnx.ModelProto], None], component: str, miniature: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(miniature.path, tmp_path / "bundle"))
    name = f"{component}/model.onnx"
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    update_manifest(folder, miniature.manifest, [name])
    outcome = run_cli("generate", folder, "-p", "a cat", "-o", tmp_path / "x.png")
    assert_refused(outcome)
    assert outcome.code in (InputError.exit_code, BundleError.exit_code), outcome.err
    assert "internal fault" not in outcome.err and not (tmp_path / "x.png").exists()


TOKENIZERS = {
    "no model": b"{}",
    "nested": b"[" * 100_000,
    "another kind": b'{"model":7}',
    "not UTF-8": b"\xff",
    "no vocabulary": b'{"added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(name: str, miniature: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature.path, tmp_path / "bundle"))
    (folder / "tokenizer/tokenizer.json").write_bytes(TOKENIZERS[name])
    update_manifest(folder, miniature.manifest, ["tokenizer/tokenizer.json"])
    with pytest.raises(BundleError, match="tokenizer") as caught:
        Pipeline(open_bundle(folder))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", ["manifest", "file"])
def test_a_hash_that_is_a_path_reaches_no_file(
    field: str, miniature: Bundle, tmp_path: Path
) -> None:
    victim = tmp_path / "authorized_keys"
    victim.write_text("the owner\n")
    slots = Slots(tmp_path / "edgesd")
    objects = tmp_path / "edgesd" / "objects"
    objects.mkdir(parents=True)
    folder = Path(shutil.copytree(miniature.path, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_bytes())
    shutil.copy(victim, folder / "LICENSE")
    manifest["files"]["LICENSE"] = {"bytes": victim.stat().st_size, "sha256": str(victim)}
    Forge(folder, manifest).write(json.dumps(manifest).encode())
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copy(path, objects / sha256_file(path))
    told = [sha256_file(folder / name) for name in (MANIFEST, CHECKSUM)]
    if field == "manifest":
        told[0] = str(victim)
    with pytest.raises(BundleError, match="SHA-256"):
        slots.install(*told, self_test=False)
    assert victim.read_text() == "the owner\n" and victim.stat().st_nlink == 1
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(folder)  # so that it is never sent


RAW = {
    "empty": b"",
    "null": b"null",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested configuration": b'{"schema_version":6,"pipeline":{"scheduler":{"config":{"a":'
    + b"[" * 100_000,
    "a long number": b'{"schema_version":' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"schema_version":1,"name":"\xff\xfe"}',
    "another encoding": '{"schema_version":1}'.encode("utf-16"),
    "cut": b'{"schema_version":6,"name":"x',
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_manifest_is_refused(name: str, forge: Forge) -> None:
    assert use(forge.write(RAW[name])) == "refused"


@pytest.mark.parametrize("name", ["../../.bashrc", "/etc/passwd", "sub/base.gguf", "", ".", "a\nb"])
@pytest.mark.parametrize("field", ["base", "adapter", "grammar"])
def test_a_prompter_names_files_of_its_folder_only(field: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "prompter"
    folder.mkdir(parents=True)
    (folder / "base.gguf").write_bytes(b"GGUF")
    (tmp_path / "a" / ".bashrc").write_text("echo\n")
    spec = {"base": "base.gguf", "adapter": None, "domain": "d", "form": "{}", "licence": "l"}
    (folder / "prompter.json").write_text(json.dumps(spec | {field: name}))
    with pytest.raises(InputError, match=r"prompter\.json"):
        read_prompter(folder)
