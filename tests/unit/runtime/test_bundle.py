"""Bundles: opening, verifying, packing, and refusing whatever was changed."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from edgesd.engines.bundle import pack_bundle, update_manifest, write_manifest
from edgesd.errors import BundleError
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, GraphFile, checksum_line, open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest
from tests.support import assert_refused, run_cli

MUTATIONS = 200

SM = {"module": "tensorrt", "version": "10.3.0", "sm": "sm_87"}


@pytest.fixture
def folder(miniature: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle's folder that a test may damage."""
    return Path(shutil.copytree(miniature.path, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def reference(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image that the undamaged bundle makes."""
    out = tmp_path_factory.mktemp("reference") / "reference.png"
    assert run_cli("generate", miniature.path, "-p", "a cat", "--seed", 0, "-o", out).code == 0
    return out


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bit flipped at {at} of {path.name}"


def truncate(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size}"


def mutate_folder(folder: Path, rng: random.Random) -> str:
    """Damage a bundle folder in one random way; what was done."""
    files = files_of(folder)
    victim = rng.choice(files)
    kind = rng.choice(["flip", "flip", "truncate", "rename", "swap", "add", "delete"])
    if kind == "flip":
        return flip_bit(victim, rng)
    if kind == "truncate":
        return truncate(victim, rng)
    if kind == "rename":
        victim.rename(victim.with_name(victim.name + "x"))
    elif kind == "swap":
        other = rng.choice([path for path in files if path.read_bytes() != victim.read_bytes()])
        mine = victim.read_bytes()
        victim.write_bytes(other.read_bytes())
        other.write_bytes(mine)
    elif kind == "add":
        victim.with_name(f"extra{rng.randrange(1000)}").write_bytes(b"x")
    else:
        victim.unlink()
    return f"{kind} {victim.name}"


def mutate_file(path: Path, rng: random.Random) -> str:
    """Damage a one-file bundle in one random way; what was done."""
    kind = rng.choice(["flip", "flip", "flip", "truncate", "append", "swap", "rename"])
    if kind == "flip":
        return flip_bit(path, rng)
    if kind == "truncate":
        return truncate(path, rng)
    if kind == "append":
        path.write_bytes(path.read_bytes() + bytes(rng.choice([1, 512, 1024])))
        return kind
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    if kind == "swap":
        a, b = rng.sample(range(len(members)), 2)
        members[a], members[b] = members[b], members[a]
    else:
        members[rng.randrange(len(members))][0].name += "x"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return kind


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_every_mutation_is_refused(
    seed: int, miniature: Bundle, miniature_file: Path, reference: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    if seed % 2:
        victim = tmp_path / "bundle"
        shutil.copytree(miniature.path, victim)
        done = mutate_folder(victim, rng)
    else:
        victim = tmp_path / "bundle.edgesd"
        shutil.copy(miniature_file, victim)
        done = mutate_file(victim, rng)
    outcome = run_cli("inspect", victim)
    assert outcome.code == BundleError.exit_code, done
    assert_refused(outcome)

    out = tmp_path / "out.png"
    outcome = run_cli("generate", victim, "-p", "a cat", "--seed", 0, "-o", out)
    if outcome.code == 0:  # then the byte matters to no image
        assert "LICENSE" in done or not seed % 2
        assert out.read_bytes() == reference.read_bytes(), done
    else:
        assert outcome.code == BundleError.exit_code, done
        assert_refused(outcome)
        assert not out.exists()


@pytest.mark.parametrize("one_file", [False, True])
def test_inspect_verifies_an_intact_bundle(
    one_file: bool, miniature: Bundle, miniature_file: Path
) -> None:
    outcome = run_cli("inspect", miniature_file if one_file else miniature.path)
    assert outcome.code == 0
    assert "every byte" in outcome.out and "own kernels" not in outcome.out
    outcome = run_cli("inspect", miniature.path, "--json")
    assert json.loads(outcome.out)["manifest"]["name"] == "miniature"


def test_inspect_names_the_graph_for_our_kernels(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    unet = manifest.engines["unet"]
    second = "unet/kernels.onnx"
    shutil.copyfile(folder / unet.path, folder / second)
    engines = {**manifest.engines, "unet": msgspec.structs.replace(unet, kernels=second)}
    update_manifest(folder, msgspec.structs.replace(manifest, engines=engines), [second])
    named = [line for line in run_cli("inspect", folder).out.splitlines() if second in line]
    assert len(named) == 1
    assert named[0].startswith("unet ") and named[0].endswith(f"for edgesd's own kernels: {second}")


def test_pack_is_canonical_and_unpacks_with_tar(
    miniature: Bundle, miniature_file: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.edgesd"
    pack_bundle(open_bundle(miniature_file), again)
    assert again.read_bytes() == miniature_file.read_bytes()
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", again, "-C", tmp_path / "unpacked"], check=True)
    assert open_bundle(tmp_path / "unpacked").manifest == miniature.manifest


def test_one_file_weights_are_used_in_place(miniature: Bundle, miniature_file: Path) -> None:
    bundles = (miniature, open_bundle(miniature_file))
    assert np.array_equal(*(noise_pred(one, one.graph_file("unet")) for one in bundles))
    graph = open_bundle(miniature_file).graph_file("unet")
    (file,) = graph.files  # the weights are not copied out
    assert file.path == miniature_file and f"proc/self/fd/{file.fileno()}".encode() in graph.model


@pytest.mark.parametrize("one_file", [False, True])
def test_a_mapped_file_is_the_one_that_was_verified(
    one_file: bool, folder: Path, miniature_file: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(miniature_file, tmp_path / "one")) if one_file else folder
    bundle, name = open_bundle(path), "unet/model.onnx"
    wanted = bundle.read(name)
    with bundle.map(name) as found:
        replaced = path if one_file else folder / name
        replace_file(replaced, bytes(replaced.stat().st_size))
        assert found == wanted and found.readonly
    with pytest.raises(BundleError, match="lists no unet/none"):
        bundle.map("unet/none")


def test_an_altered_file_is_not_mapped(folder: Path) -> None:
    bundle, path = open_bundle(folder), folder / "unet" / "model.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BundleError, match=r"unet/model.onnx was altered"):
        bundle.map("unet/model.onnx")


def noise_pred(bundle: Bundle, graph: GraphFile) -> np.ndarray:
    """What the UNet makes of fixed inputs."""
    with OnnxRuntimeRunner(bundle.manifest.pipeline.components["unet"], graph) as unet:
        shape = (1, 4, 8, 8)
        unet.bind({"sample": shape, "timestep": (1,), "encoder_hidden_states": (1, 77, 8)})
        for array in unet.inputs.values():
            array[:] = np.linspace(-1, 1, array.size).reshape(array.shape)
        unet.run()
        return unet.outputs["noise_pred"].copy()


def replace_file(path: Path, data: bytes) -> None:
    """Put another file in the place of `path`, which stays what it is for whoever has it open."""
    path.with_name("new").write_bytes(data)
    path.rename(path.parent.parent / f"{path.name}.old")
    path.with_name("new").rename(path)


@pytest.mark.parametrize("one_file", [False, True])
def test_what_was_verified_is_what_is_mapped(
    one_file: bool, miniature: Bundle, folder: Path, miniature_file: Path, tmp_path: Path
) -> None:
    expected = noise_pred(miniature, miniature.graph_file("unet"))
    path = Path(shutil.copy(miniature_file, tmp_path / "one" if one_file else tmp_path / "unused"))
    bundle = open_bundle(path if one_file else folder)
    graph = bundle.graph_file("unet")
    swapped = path if one_file else folder / "unet" / "weights.bin"
    replace_file(swapped, bytes(swapped.stat().st_size))
    assert np.array_equal(noise_pred(bundle, graph), expected)


@pytest.mark.parametrize("how", ["replaced", "written into"])
def test_a_file_that_changes_after_it_was_verified_is_verified_again(
    how: str, folder: Path
) -> None:
    bundle = open_bundle(folder)
    bundle.verify()
    weights = folder / "unet" / "weights.bin"
    other = bytes(weights.stat().st_size)
    if how == "replaced":
        weights.unlink()
    weights.write_bytes(other)
    with pytest.raises(BundleError, match=r"unet/weights.bin was altered"):
        bundle.graph_file("unet")


def test_a_folder_that_is_renamed_stays_the_bundle_that_was_opened(
    folder: Path, miniature: Bundle
) -> None:
    bundle = open_bundle(folder)
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    bundle.verify()
    expected = noise_pred(miniature, miniature.graph_file("unet"))
    assert np.array_equal(noise_pred(bundle, bundle.graph_file("unet")), expected)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_only_regular_files_are_read(kind: str, when: str, folder: Path) -> None:
    victim = folder / "unet" / "weights.bin"
    bundle = open_bundle(folder) if when == "after" else None
    elsewhere = victim.rename(folder.with_name("elsewhere"))
    if kind == "link":
        victim.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(victim)  # reading it would wait for a writer for ever
    else:
        victim.mkdir()
    with pytest.raises(BundleError, match=r"unet/weights\.bin"):
        (bundle or open_bundle(folder)).graph_file("unet")


@pytest.mark.parametrize(
    "changes", [{"length": "99999"}, {"location": "../tokenizer/tokenizer.json"}]
)
def test_a_graph_refers_to_bytes_of_its_own_weights_only(
    changes: dict[str, str], folder: Path
) -> None:
    graph = folder / "unet" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.external_data)
    for entry in tensor.external_data:
        entry.value = changes.get(entry.key, entry.value)
    graph.write_bytes(model.SerializeToString())
    update_manifest(folder, open_bundle_unchecked(folder), ["unet/model.onnx"])
    with pytest.raises(BundleError, match="refers to"):
        open_bundle(folder).graph_file("unet")


def open_bundle_unchecked(folder: Path) -> BundleManifest:
    """The manifest of a folder whose files don't fit it any more."""
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=BundleManifest)


def test_manifest_round_trips(miniature: Bundle, tmp_path: Path) -> None:
    write_manifest(tmp_path, miniature.manifest)
    raw = (tmp_path / MANIFEST).read_bytes()
    assert msgspec.json.decode(raw, type=type(miniature.manifest)) == miniature.manifest
    assert (tmp_path / CHECKSUM).read_bytes() == checksum_line(raw)


def forge(folder: Path, **changes: object) -> None:
    """Change top-level fields of the manifest, and mend its checksum."""
    manifest = json.loads((folder / MANIFEST).read_bytes()) | changes
    raw = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_bytes(checksum_line(raw))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "unet/model.onnx"}, "doesn't say what unet/model.onnx was built for"),
        ({"built_for": SM}, "doesn't say what None was built for"),
        ({"plan": "plans/none.plan", "built_for": SM}, "doesn't list plans/none.plan"),
        ({"plan": 7, "built_for": SM}, "isn't valid"),
    ],
)
def test_a_plan_that_the_manifest_describes_wrongly(
    changes: dict[str, object], words: str, folder: Path
) -> None:
    engines = json.loads((folder / MANIFEST).read_bytes())["engines"]
    engines["unet"] |= changes
    forge(folder, engines=engines)
    with pytest.raises(BundleError, match=words):
        open_bundle(folder)


def test_newer_schema_is_refused_even_with_unknown_fields(folder: Path) -> None:
    forge(folder, schema_version=SCHEMA_VERSION + 1, novelty=True)
    with pytest.raises(BundleError, match=rf"schema version {SCHEMA_VERSION + 1}.*upgrade edgesd"):
        open_bundle(folder)


def old_pipeline(folder: Path) -> dict[str, Any]:
    """The pipeline of a bundle as schemas before 8 have it."""
    pipeline: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["pipeline"]
    del pipeline["wiring"]
    return {**pipeline, "max_tokens": 77}


def test_a_bundle_of_version_1_is_read(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for field in ("recipe", "quality"):
        del manifest[field]
    older = {"schema_version": 1, "pipeline": old_pipeline(folder)}
    raw = json.dumps(manifest | older).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_bytes(checksum_line(raw))
    found = open_bundle(folder).manifest
    assert found.schema_version == 1 and found.recipe is None and found.quality is None


def test_capabilities_that_bundles_before_version_8_list_are_ignored(folder: Path) -> None:
    pipeline = json.loads((folder / MANIFEST).read_bytes())["pipeline"]
    forge(folder, schema_version=7, pipeline=old_pipeline(folder), required_capabilities=[])
    assert open_bundle(folder).manifest.schema_version == 7
    forge(folder, schema_version=SCHEMA_VERSION, pipeline=pipeline, required_capabilities=[])
    with pytest.raises(BundleError, match="required_capabilities"):
        open_bundle(folder)


def test_a_bundle_of_version_5_has_no_halves(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for engine in manifest["engines"].values():
        del engine["halves"]
    pipeline = old_pipeline(folder)
    del pipeline["latent"]["levels"]
    raw = json.dumps(manifest | {"schema_version": 5, "pipeline": pipeline}).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / CHECKSUM).write_bytes(checksum_line(raw))
    bundle = open_bundle(folder)
    assert bundle.manifest.engines["vae_decoder"].split is None
    with Pipeline(bundle, Settings(memory="stream")) as pipeline:
        assert pipeline.decode(np.zeros((1, 4, 40, 40), np.float32))[0].size == (80, 80)


@pytest.mark.parametrize("beside", ["vae_decoder/tail.onnx", "unet/model.onnx"])
def test_halves_lie_beside_the_whole(beside: str, folder: Path) -> None:
    engines = json.loads((folder / MANIFEST).read_bytes())["engines"]
    spec = {"name": "half", "inputs": [], "outputs": []}
    half = {"path": "vae_decoder/model.onnx", "spec": spec, "weight_bytes": 1, "kernels": None}
    engines["vae_decoder"]["halves"] = {"head": half, "tail": half | {"path": beside}}
    forge(folder, engines=engines)
    with pytest.raises(BundleError, match=f"doesn't list {beside}"):
        open_bundle(folder)


def test_an_unknown_precision_is_refused(folder: Path) -> None:
    forge(folder, precision="w3a3")
    with pytest.raises(BundleError, match="unknown precision 'w3a3'"):
        Pipeline(open_bundle(folder))


def test_unknown_field_is_refused_by_name(folder: Path) -> None:
    forge(folder, novelty=True)
    with pytest.raises(BundleError, match="novelty"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "unet/../../x", "unet//model.onnx"])
def test_unsafe_paths_are_refused(folder: Path, name: str) -> None:
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    forge(folder, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="unsafe path"):
        open_bundle(folder)


def test_symbolic_links_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "weights.bin"
    weights.rename(folder.parent / "elsewhere")
    weights.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"unet/weights\.bin isn't a regular file"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no bundle at"), (b"", "truncated"), (b"hello" * 1000, "isn't a bundle")],
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.edgesd"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=words):
        open_bundle(path)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(tmp_path)


def test_wrong_target_is_refused_by_name(miniature: Bundle, folder: Path, tmp_path: Path) -> None:
    other = ("x86-64-cpu", "x86_64")
    if miniature.manifest.arch == "x86_64":
        other = ("raspberry-pi-5", "aarch64")
    forge(folder, target=other[0], arch=other[1])
    out = tmp_path / "a.png"
    outcome = run_cli("generate", folder, "-p", "a cat", "-o", out)
    assert_refused(outcome, *other)
    assert run_cli("generate", folder, "-p", "a cat", "--any-machine", "-o", out).code == 0


def test_pack_refuses_a_damaged_bundle(folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / "unet" / "weights.bin", random.Random(0))
    out = tmp_path / "x.edgesd"
    assert_refused(run_cli("pack", folder, out), "unet/weights.bin")
    assert not list(tmp_path.glob("*x.edgesd*"))


def test_pack_wants_the_suffix(miniature: Bundle, tmp_path: Path) -> None:
    assert_refused(run_cli("pack", miniature.path, tmp_path / "x.tar"), "x.tar.edgesd")
