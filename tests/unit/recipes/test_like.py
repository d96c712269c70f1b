"""Options that a bundle was built with: checked, written, read from strangers, and built again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgesd.engines.bundle import update_manifest
from edgesd.errors import InputError, UsageError
from edgesd.evaluate.perceptual import STAND_IN
from edgesd.recipes.like import Like
from edgesd.recipes.options import model_reference
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.spec.base import check_ranges, decode_json
from edgesd.spec.build import BuildOptions, BuildRecord, ModelReference, QuantOptions
from edgesd.spec.bundle import BundleManifest, PrompterSpec
from edgesd.spec.quality import Gate, ImageQuality, Quality
from tests.support import assert_refused, run_cli, write_bundle

SHA = "0123456789abcdef" * 4
OPTIONS = BuildOptions(
    target="x86-64-cpu",
    precision="w4a8-g64-lr32",
    backend="onnxruntime",
    size=(64, 128),
    batch=2,
    scheduler="ddim",
    variant="turbo",
    clip_skip=1,
    max_tokens=128,
    prompt_chunks=2,
    tasks=("inpaint",),
    lora_slots=16,
    quantization=QuantOptions(
        method="rtn",
        static=True,
        calibration_prompts=("a red apple", 'quotes " and\ttabs'),
        quality_prompts=("pizza",),
        steps=4,
        guidance=1.5,
        min_psnr=30.5,
        max_lpips=0.25,
        max_feature_distance=0.75,
        max_size=0.21,
        max_time=0.9,
        pool_attention=True,
        measures=("split", "joint"),
    ),
)
Rebuild = Callable[[ModelReference], Like]


@pytest.fixture
def like(miniature: Bundle) -> Rebuild:
    def make(model: ModelReference) -> Like:
        record = BuildRecord(model, OPTIONS)
        manifest = msgspec.structs.replace(miniature.manifest, build=record)
        return Like(Path("other"), manifest, record)

    return make


def test_options_survive_their_json() -> None:
    record = BuildRecord(ModelReference("folder", "sd15", SHA), OPTIONS)
    assert decode_json(msgspec.json.encode(record), BuildRecord) == record
    OPTIONS.check()
    check_ranges(OPTIONS)


def test_every_option_of_a_record_differs_from_its_default() -> None:
    """So that a new option can't be left out of the test above."""
    for ours, default in (
        (OPTIONS, BuildOptions("jetson-orin")),
        (OPTIONS.quantization, QuantOptions()),
    ):
        for name in ours.__struct_fields__:
            assert getattr(ours, name) != getattr(default, name), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int3"}, "unknown precision 'int3'"),
        ({"precision": "fp16"}, "--max-lpips, .* are for quantized bundles, and fp16 isn't one"),
        ({"size": None}, "--batch is for static graphs"),
        ({"quantization": QuantOptions(quality_prompts=(), min_psnr=3.0)}, "leave --no-quality"),
        ({"quantization": QuantOptions(quality_prompts=(), max_lpips=0.3)}, "leave --no-quality"),
        (
            {"quantization": QuantOptions(quality_prompts=(), max_feature_distance=0.3)},
            "leave --no-quality",
        ),
        ({"quantization": QuantOptions(calibration_prompts=("a",) * 10_001)}, "at most 10000"),
        ({"quantization": QuantOptions(quality_prompts=("a" * 60_000,) * 99)}, "at most 10000"),
    ],
)
def test_options_that_nothing_can_build_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        msgspec.structs.replace(OPTIONS, **change).check()


HOSTILE = [
    ("target", "../../etc/passwd"),
    ("target", "a b"),
    ("precision", "w" * 65),
    ("backend", "/bin/sh"),
    ("size", [0, 64]),
    ("size", [1 << 40, 64]),
    ("size", [64]),
    ("batch", 0),
    ("batch", 1 << 40),
    ("scheduler", "a\x1b[2J"),
    ("variant", "Turbo"),
    ("work", "/tmp"),
    ("quantization", {"method": "rtn; rm"}),
    ("quantization", {"steps": 0}),
    ("quantization", {"guidance": 1e300}),
    ("quantization", {"min_psnr": -1}),
    ("quantization", {"max_lpips": 0}),
    ("quantization", {"max_lpips": 1e300}),
    ("quantization", {"max_feature_distance": -1}),
    ("quantization", {"max_size": 0}),
    ("quantization", {"max_size": 1.5}),
    ("quantization", {"max_time": 1e16}),
    ("quantization", {"calibration_prompts": ["a"] * 10_001}),
    ("quantization", {"quality_prompts": ["a" * 64_001]}),
    ("quantization", {"lpips": "/home"}),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_hostile_options_are_refused_when_read(name: str, value: object) -> None:
    raw = msgspec.json.encode({"target": "x86-64-cpu", name: value})
    with pytest.raises(InputError):
        decode_json(raw, BuildOptions)


def test_a_bundle_keeps_no_path_of_the_machine_that_built_it(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    found = model_reference(str(folder), SHA)
    assert found == ModelReference("folder", "my-model", SHA)
    assert model_reference("demo", SHA) == ModelReference("demo", "demo", SHA)
    assert model_reference("owner/name", SHA) == ModelReference("hub", "owner/name", SHA)


def test_another_judge_is_told(like: Rebuild) -> None:
    image = ImageQuality("a cat", 1, 30.0, 0.9, 0.1, features=0.2)
    lpips = Quality(
        *((image,), 2, 3.0, "ddim", 30.0, 29.0, 0.9, 0.1, "LPIPS (AlexNet, v0.1)", "here"),
        gates=(Gate("lpips"), Gate("features", 0.5, "option")),
    )
    replace = msgspec.structs.replace
    stand_in = replace(
        lpips,
        images=(replace(image, features=None),),
        metric="EfficientNet",
        gates=(Gate("features"),),
    )
    other = like(ModelReference("demo", "demo", SHA))
    there, none = (replace(other.manifest, quality=one) for one in (lpips, None))
    one = Like(other.path, there, other.record)
    assert one.judged_otherwise(there) is None and one.judged_otherwise(none) is None
    here = replace(there, quality=stand_in)
    assert one.judged_otherwise(here) == (
        f"images were judged by EfficientNet here, and by LPIPS (AlexNet, v0.1) and {STAND_IN} "
        "there: they may differ for that"
    )
    vgg = replace(there, quality=replace(lpips, metric="LPIPS (VGG16, v0.1)"))
    assert one.judged_otherwise(vgg) is not None
    # The metric only measures where all is judged by PSNR.
    plain = [replace(there, quality=replace(q, gates=())) for q in (lpips, stand_in)]
    assert Like(other.path, plain[0], other.record).judged_otherwise(plain[1]) is None


def test_the_embedded_model_and_hub_ids_are_found_again(
    like: Rebuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert like(ModelReference("demo", "demo", SHA)).model() == "demo"
    assert like(ModelReference("hub", "owner/name", SHA)).model() == "owner/name"


@pytest.mark.parametrize(
    "model",
    [
        ModelReference("folder", "sd15", SHA),
        ModelReference("folder", "/etc", SHA),
        ModelReference("hub", "/etc", SHA),
        ModelReference("hub", "../up", SHA),
        ModelReference("hub", "here/model", SHA),
        ModelReference("hub", "checkpoint.safetensors", SHA),
        ModelReference("unheard-of", "owner/name", SHA),
    ],
)
def test_a_path_in_a_bundle_is_never_opened(
    like: Rebuild, model: ModelReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="say where it is: edgesd build MODEL --like other"):
        like(model).model()


def test_an_autoencoder_of_another_model_is_found_again_on_the_hub_alone(like: Rebuild) -> None:
    same = like(ModelReference("demo", "demo", SHA))
    assert same.vae() is None

    def built_with(kind: str, name: str) -> Like:
        record = msgspec.structs.replace(same.record, vae=ModelReference(kind, name, SHA))
        assert decode_json(msgspec.json.encode(record), BuildRecord) == record
        return Like(same.path, same.manifest, record)

    assert built_with("hub", "owner/taesd").vae() == "owner/taesd"
    for kind, name in (("folder", "taesd"), ("hub", "/etc"), ("hub", "../up"), ("demo", "demo")):
        with pytest.raises(UsageError, match="say where it is: --vae MODEL"):
            built_with(kind, name).vae()


def test_differences_are_expected_where_model_tools_or_prompter_differ(like: Rebuild) -> None:
    same = like(ModelReference("demo", "demo", SHA))
    tools = dict(same.manifest.tools)
    assert not same.expected_differences(SHA, tools, prompter=False)
    (line,) = same.expected_differences("f" * 64, tools, prompter=False)
    assert "0123456789abcdef... there" in line and "will differ" in line
    (line,) = same.expected_differences(SHA, {**tools, "torch": "9.9"}, prompter=False)
    assert "other releases of torch" in line
    prompter = PrompterSpec("prompter/base.gguf", None, "emoji", "{}", "apache-2.0")
    manifest = msgspec.structs.replace(same.manifest, prompter=prompter)
    other = Like(same.path, manifest, same.record)
    (line,) = other.expected_differences(SHA, tools, prompter=False)
    assert "give --prompter FOLDER" in line
    assert not other.expected_differences(SHA, tools, prompter=True)


def test_files_that_differ_are_named(like: Rebuild) -> None:
    other = like(ModelReference("demo", "demo", SHA))
    ours: BundleManifest = other.manifest
    assert other.differing_files(ours) == []
    name = next(name for name in ours.files if name.startswith("unet/"))
    without = {key: entry for key, entry in ours.files.items() if key not in (name, "extra")}
    changed = msgspec.structs.replace(ours, files=without)
    assert other.differing_files(changed) == [name]


def test_the_command_says_what_it_needs(miniature: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run_cli("build", "--like", miniature.path, "-o", out), "how it was built")
    assert_refused(run_cli("build", "-o", out), "'--target'")
    assert_refused(run_cli("build", "--target", "x86-64-cpu", "-o", out), "'MODEL'")
    bundle = write_bundle(tmp_path / "foreign")
    record = BuildRecord(ModelReference("folder", "\x1b[31m/root", SHA), OPTIONS)
    update_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, build=record))
    assert open_bundle(bundle.path).manifest.build == record
    refused = run_cli("build", "--like", bundle.path, "-o", out)
    assert_refused(refused, "say where it is")
    assert "\x1b" not in refused.err and not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "unheard-of"}, "unheard-of"),
        ({"backend": "unheard-of"}, "unheard-of"),
        ({"scheduler": "unheard-of"}, "unheard-of"),
        ({"precision": "w9a9"}, "w9a9"),
        ({"quantization": QuantOptions(method="unheard-of")}, "unheard-of"),
        ({"quantization": QuantOptions(quality_prompts=(), max_lpips=0.3)}, "leave --no-quality"),
        (
            {"quantization": QuantOptions(quality_prompts=(), max_feature_distance=0.3)},
            "leave --no-quality",
        ),
        ({"quantization": QuantOptions(calibration_prompts=("a\0b",))}, "NUL"),
        ({"quantization": QuantOptions(quality_prompts=("cat", "\0"))}, "NUL"),
    ],
)
def test_what_only_a_bundle_says_is_refused_before_long_work(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    bundle, out = write_bundle(tmp_path / "foreign"), tmp_path / "out"
    options = msgspec.structs.replace(BuildOptions("x86-64-cpu", "w8a8"), **change)
    record = BuildRecord(ModelReference("demo", "demo", SHA), options)
    update_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, build=record))
    assert_refused(run_cli("build", "--like", bundle.path, "-o", out), words)
    assert not out.exists()
