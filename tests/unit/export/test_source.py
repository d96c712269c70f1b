"""Finding models: what is accepted, and what each refusal says. No torch, no network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from edgesd.errors import EdgesdError, InputError, UsageError
from edgesd.export import source as source_module
from edgesd.export.families.checkpoint import Weights
from edgesd.export.pipeline import export_spec
from edgesd.export.source import hub as hub_module
from edgesd.export.source import resolve_network, resolve_source
from edgesd.export.source.folder import choose_weights
from edgesd.spec.pipeline import stable_diffusion
from tests.models import EMOJI


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may break."""
    return Path(shutil.copytree(EMOJI, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, *_: str) -> Path:
        raise AssertionError(f"looked for {repo_id} on the network")

    monkeypatch.setattr(source_module, "download", refuse)
    monkeypatch.setattr(source_module, "download_file", refuse)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_embedded_model() -> None:
    source = resolve_source(EMOJI)
    export = source.family.export_spec(source, None)
    spec = export.pipeline
    assert [c.name for c in export.components] == ["text_encoder", "unet", "vae_decoder"]
    assert (spec.family, spec.scheduler.name) == ("sd", "ddim")
    assert spec.source == "emoji"  # not where it lies on this machine
    assert spec.wiring == stable_diffusion(77)
    written = source.config("scheduler/scheduler_config.json")
    assert spec.scheduler.config == {k: written[k] for k in written if k != "_diffusers_version"}
    assert (spec.num_inference_steps, spec.guidance_scale) == (20, 3.0)
    assert (spec.latent.channels, spec.latent.scale_factor, spec.latent.scaling_factor) == (4, 8, 1)
    shape = spec.shape
    assert (shape.height, shape.width, shape.multiple_of, shape.dynamic) == (128, 128, 32, True)
    assert source.licence("licence").name == "apache-2.0"
    files = source.licence("licence").files
    assert "licence/NOTICE" in files
    assert len(files) == 1 + len(list((EMOJI / "LICENSES").iterdir()))


def test_a_model_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, hashed = resolve_source(EMOJI), list[Path]()

    def sha256_file(path: Path) -> str:
        hashed.append(path)
        return "0" * 64

    monkeypatch.setattr("edgesd.export.source.folder.sha256_file", sha256_file)
    for size in (None, (128, 128)):
        source.family.export_spec(source, size)
    assert hashed and len(hashed) == len(set(hashed))


def test_a_model_that_changes_while_it_is_read(model: Path) -> None:
    source, weights = resolve_source(model), model / "unet" / "diffusion_pytorch_model.safetensors"
    source.sha256()
    os.utime(weights, (1, 1))
    source.check_unchanged()  # its content is the same
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="changed or removed while it was read"):
        source.check_unchanged()
    weights.unlink()
    with pytest.raises(InputError, match="changed or removed while it was read"):
        source.check_unchanged()


def test_static_size() -> None:
    source = resolve_source(EMOJI)
    export = source.family.export_spec(source, (192, 128))
    assert not export.pipeline.shape.dynamic
    assert export.pipeline.components["unet"].inputs[0].shape == (1, 4, 16, 24)
    assert export.pipeline.components["vae_decoder"].outputs[0].shape == (1, 3, 128, 192)
    with pytest.raises(UsageError, match="width 100 isn't a multiple of 8: the nearest is 96"):
        source.family.export_spec(source, (100, 64))


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none", "a/b/c", "", "x y/z"])
def test_what_looks_local_stays_local(name: str) -> None:
    with pytest.raises(InputError, match=r"doesn't exist|no model_index"):
        resolve_source(name)


def test_a_typo_beside_a_folder_stays_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="models/emojy doesn't exist"):
        resolve_source("models/emojy")


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "download", lambda repo_id, weights: EMOJI)
    source = resolve_source("owner/name")
    assert source.name == "owner/name"
    assert source.family.export_spec(source, None).pipeline.source == "owner/name"


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        InputError,
        match=r"cannot read .*header|is a file: expected a diffusers folder or a",
    ):
        resolve_source(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", "{}", '{"_class_name": 3}'])
def test_broken_index(model: Path, content: str) -> None:
    (model / "model_index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"model_index\.json"):
        resolve_source(model)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (
            ["lcm_pipeline", "LatentConsistencyModelPipeline"],
            r'own code \(lcm_pipeline\.py\).*write "_class_name": "LatentConsistencyModelPipeline"',
        ),
        (["my_pipeline", "MyPipeline"], r"MyPipeline of the model's own code \(my_pipeline\.py\)"),
        (None, "names no pipeline class"),
        (["a", "b", "c"], "names no pipeline class"),
        ("StableDiffusion3Pipeline", r"is a Stable Diffusion 3 pipeline.*yet"),
        ("FluxKontextPipeline", r"is a FLUX pipeline.*yet"),
        ("KandinskyInpaintPipeline", r"is an inpainting pipeline.*yet"),
        (
            "StableDiffusionControlNetPipeline",
            r"is a pipeline with a ControlNet.*base model as MODEL, .* controlnet .* --controlnet",
        ),
        ("StableDiffusionXLAdapterPipeline", r"is a pipeline with a T2I-Adapter.* as --adapter"),
        ("StableDiffusion3ControlNetPipeline", r"is a pipeline with a ControlNet.*yet"),
        ("ORTStableDiffusionPipeline", r"ONNX Runtime.*give its folder, with a model\.onnx"),
        ("OVStableDiffusionPipeline", r"OpenVINO.*give the diffusers folder"),
        ("SomethingElsePipeline", r"SomethingElsePipeline.*takes Flux.*LatentConsistency"),
    ],
)
def test_advice_on_a_pipeline_fits_its_class(model: Path, name: object, advice: str) -> None:
    edit(model / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=advice) as error:
        resolve_source(model)
    assert "is it complete" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["bundle.json"], "is a bundle already"),
        (["inner/model_index.json"], r"inner has: give that folder"),
        (["snapshots/abc/model_index.json", "refs/main"], r"snapshots/abc has: give that folder"),
        (["pytorch_lora_weights.safetensors"], "holds a LoRA"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds a LoRA"),
        (["config.json", "diffusion_pytorch_model.safetensors"], "holds one network"),
        (["v1-5-pruned.ckpt", "notes.txt"], "v1-5-pruned.ckpt is a pickle"),
        (["a.safetensors", "b.ckpt"], r"give a file in it, such as .*a\.safetensors"),
        (["notes.txt"], "expected a diffusers pipeline folder"),
        ([], "expected a diffusers pipeline folder"),
    ],
)
def test_advice_on_a_folder_that_is_no_pipeline_fits_what_it_is(
    tmp_path: Path, files: list[str], advice: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match=advice):
        resolve_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.CKPT", r"is a pickle.*convert it to \.safetensors"),
        ("demo.edgesd", "is a bundle already"),
        ("model.gguf", "GGUF"),
        ("unet.onnx", "an ONNX graph"),
        ("model_index.json", "give the folder that holds it"),
        ("model.zip", "unpack it"),
    ],
)
def test_advice_on_a_file_fits_what_it_is(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=advice):
        resolve_source(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ([], r"no weights: expected model\.safetensors"),
        (["model-00001-of-00003.safetensors"], "1 of the parts"),
        (["model.onnx"], "has model.onnx, and no weights for PyTorch"),
        (["model.non_ema.safetensors"], r"as model\.non_ema\.safetensors only"),
    ],
)
def test_advice_on_weights_fits_what_is_there(model: Path, files: list[str], advice: str) -> None:
    folder = model / "text_encoder"
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=advice):
        resolve_source(model).weights("text_encoder")


def test_a_pointer_of_git_lfs_is_told_as_one(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"unet.*pointer of Git LFS.*git lfs pull"):
        resolve_source(model).parameters("unet")
    (model / "model_index.json").write_text(pointer)
    with pytest.raises(InputError, match=r"model_index.*pointer of Git LFS"):
        resolve_source(model)


def test_a_pickle_with_more_than_tensors_is_told_as_one(model: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = model / "text_encoder"
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": PurePosixPath("x")}, folder / "pytorch_model.bin")
    source = resolve_source(model)
    (component, *_) = source.family.export_spec(source, None, None, 1).components
    with pytest.raises(InputError) as error:
        component.load()
    text = str(error.value)
    assert "pytorch_model.bin isn't loaded: it holds Python objects besides tensors" in text
    assert "pathlib.PurePosixPath" in text and text.isprintable()


def test_another_family_names_those_supported(model: Path) -> None:
    edit(model / "model_index.json", _class_name="FluxKontextPipeline")
    with pytest.raises(InputError, match=r"FluxKontextPipeline.*StableDiffusionPipeline"):
        resolve_source(model)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "VQModel.*AutoencoderKL"),
        ("model_index.json", {"unet": [None, None]}, "no unet"),
        ("model_index.json", {"unet": ["diffusers", "x" * 9999]}, "has no unet"),
        ("model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}, "NoSuchScheduler"),
        ("unet/config.json", {"in_channels": 5}, "5 channels and returns 4: depth"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "width 1024.*128"),
        ("vae/config.json", {"latent_channels": 16}, "16 latent channels"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
    ],
)
def test_variants_that_are_not_supported(
    model: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit(model / file, **fields)
    source = resolve_source(model)
    with pytest.raises(InputError, match=message):
        source.family.export_spec(source, None)


@pytest.mark.parametrize(
    "missing",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae",
        "scheduler",
        "tokenizer",
    ],
)
def test_missing_files(model: Path, missing: str) -> None:
    path = model / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    source = resolve_source(model)
    with pytest.raises(InputError, match=missing.split("/")[0]):
        source.family.export_spec(source, None)


@pytest.mark.parametrize(
    "hints",
    [
        "[",
        "{}",
        '{"steps": 3}',
        '{"guidance_scale": "4"}',
        '{"guidance_scale": NaN}',
        '{"guidance_scale": -1}',
        '{"num_inference_steps": 2.5}',
        '{"num_inference_steps": true}',
        '{"variant": "turbu"}',
        '{"variant": 1}',
        '{"variant": null}',
    ],
)
def test_hints(model: Path, hints: str) -> None:
    (model / "edgesd.json").write_text(hints)
    if hints == "{}":
        assert resolve_source(model).hints() == {}
        return
    with pytest.raises(InputError, match=r"edgesd\.json"):
        resolve_source(model).hints()


def test_the_hash_covers_weights_and_configs(model: Path) -> None:
    before = resolve_source(model).sha256()
    assert before == resolve_source(EMOJI).sha256()
    (model / "README.md").write_text("another card")
    assert resolve_source(model).sha256() == before
    assert resolve_source(model).licence_name() == "unknown"
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = resolve_source(model).sha256()
    assert changed != before
    edit(model / "unet" / "config.json", dropout=0.5)
    assert resolve_source(model).sha256() not in (before, changed)


def test_what_is_said_of_a_model_is_part_of_its_hash(model: Path) -> None:
    """Its graphs, statistics and images are kept under it, and depend on that."""
    plain = resolve_source(model)
    said = [replace(plain, clip_skip=1), replace(plain, clip_skip=2), replace(plain, variant="lcm")]
    assert len({plain.sha256(), *(one.sha256() for one in said)}) == 4
    assert replace(plain, clip_skip=0).sha256() == plain.sha256()
    edit(model / "edgesd.json", clip_skip=1)
    assert resolve_source(model).sha256() == said[0].sha256()
    assert replace(resolve_source(model), clip_skip=0).sha256() == plain.sha256()


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags: [a]\nlicense: 'creativeml-openrail-m'  # x\n---\n", "creativeml-openrail-m"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: other\n---\n", "other"),
        ("license: mit\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_licence_name(model: Path, card: str, name: str) -> None:
    (model / "README.md").write_text(card)
    assert resolve_source(model).licence_name() == name


def test_choose_weights() -> None:
    stem = "diffusion_pytorch_model"
    full, half, pickle = f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin"
    assert choose_weights([pickle, half, full], stem) == Weights((full,), None, True)
    assert choose_weights([pickle, half], stem) == Weights((pickle,), None, False)
    assert choose_weights([f"{stem}.fp16.bin", half], stem) == Weights((half,), "fp16", True)
    assert choose_weights([pickle, f"{stem}.non_ema.safetensors"], stem) == Weights(
        (pickle,), None, False
    )
    assert choose_weights(["pytorch_model.bin"], "model") == Weights(
        ("pytorch_model.bin",), None, False
    )
    index = f"{stem}.safetensors.index.json"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert choose_weights([index, *shards], stem) == Weights((index, *shards), None, True)
    assert choose_weights([index, shards[0]], stem) is None
    assert choose_weights([], stem) is None


reachable = hub_module.reachable


class TestDownload:
    """What the hub's failures turn into: one line that says what to do."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.undo()
        monkeypatch.setattr(hub_module, "reachable", lambda url: True)
        return pytest.importorskip("huggingface_hub")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            ("GatedRepoError", "is gated: accept its terms"),
            ("RepositoryNotFoundError", "neither a folder here nor a public model"),
            ("LocalEntryNotFoundError", "the connection to the hub was lost"),
            ("RemoteEntryNotFoundError", "has no model_index.json"),
            ("", "cannot download some-owner/none: socket closed and more"),
        ],
    )
    def test_failures(
        self, hub: Any, monkeypatch: pytest.MonkeyPatch, error: str, message: str
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> str:
            cls = getattr(hub.errors, error) if error else RuntimeError
            raised = cls.__new__(cls)
            raised.args = ("socket closed\nand more",)
            raise raised

        monkeypatch.setattr(hub, "hf_hub_download", fail)
        with pytest.raises(EdgesdError, match=message) as caught:
            resolve_source("some-owner/none")
        assert "\n" not in str(caught.value)

    def test_offline_a_model_in_the_cache_is_used_and_another_is_one_quick_line(
        self, hub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def snapshot(repo_id: str, local_files_only: bool) -> str:
            assert local_files_only
            if repo_id == "some-owner/cached":
                return str(EMOJI)
            raise hub.errors.LocalEntryNotFoundError("none")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("the hub was asked")

        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        monkeypatch.setattr(hub, "hf_hub_download", fail)
        with socket.socket() as server:  # a port that nobody listens at
            server.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            assert not reachable(endpoint)
            monkeypatch.setattr(hub_module, "reachable", lambda url: reachable(endpoint))
            assert resolve_source("some-owner/cached").root == EMOJI
            with pytest.raises(InputError, match=r"none is not .* the hub can't be reached"):
                resolve_source("some-owner/none")
            monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set"):
                resolve_source("some-owner/none")
            server.listen()
            assert reachable(endpoint)
        assert not caplog.records

    def test_a_name_server_that_doesn_t_answer_is_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given_up = threading.Event()
        monkeypatch.setattr(
            socket, "create_connection", lambda address: given_up.wait(60) and socket.socket()
        )
        assert not reachable("https://huggingface.co", seconds=0.05)
        given_up.set()

    @pytest.mark.parametrize(
        "proxy",
        ["http://[::1", "http://127.0.0.1:99999", "http://a..b:80", "http://:80", "http://"],
    )
    def test_a_proxy_that_is_no_address_is_one_that_is_not_reached(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        proxy: str,
    ) -> None:
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": proxy})
        assert not reachable("https://huggingface.co", seconds=60)
        assert capfd.readouterr() == ("", "")

    def test_only_what_is_needed_is_fetched(
        self, hub: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [p.relative_to(EMOJI).as_posix() for p in EMOJI.rglob("*") if p.is_file()]
        extra = ["unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors"]
        asked: list[str] = []

        def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
            asked.extend(allow_patterns)
            return str(EMOJI)

        monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: str(EMOJI / name))
        monkeypatch.setattr(hub, "list_repo_files", lambda repo: [*files, *extra])
        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        assert resolve_source("some-owner/model").root == EMOJI
        assert "unet/diffusion_pytorch_model.safetensors" in asked
        assert "tokenizer/*.json" in asked and "NOTICE" in asked
        assert not set(extra) & set(asked)
        whole = set(asked)
        asked.clear()
        resolve_source("some-owner/model", weights=False)
        assert whole - set(asked) == {name for name in whole if name.endswith(".safetensors")}

    @pytest.mark.parametrize("prefix", ["", "vae/"])
    def test_of_a_network_only_its_own_files_are_fetched(
        self, hub: Any, monkeypatch: pytest.MonkeyPatch, prefix: str
    ) -> None:
        """Those of a repository of one network, and of a pipeline."""
        weights = "diffusion_pytorch_model.safetensors"
        files = [f"{prefix}config.json", f"{prefix}{weights}", "taesd_decoder.pth", "README.md"]
        files += ["model_index.json", f"unet/{weights}"] if prefix else []
        asked: list[str] = []

        def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
            asked.extend(allow_patterns)
            return str(EMOJI if prefix else EMOJI / "vae")

        monkeypatch.setattr(hub, "list_repo_files", lambda repo: files)
        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        source = resolve_network("some-owner/taesd", "vae")
        assert source.class_of("vae") == "AutoencoderTiny" and source.parameters("vae") > 1000
        assert source.public_name == "some-owner/taesd"
        assert {*files[:2], "README.md"} <= {*asked} and not {*files[2:3], *files[5:]} & {*asked}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_scheduler_options_are_those_of_diffusers_pipeline(model: Path) -> None:
    pipeline_class = pytest.importorskip("diffusers").StableDiffusionPipeline
    path = model / "scheduler" / "scheduler_config.json"
    edit_json(path, steps_offset=0, clip_sample=True, timestep_spacing="leading")
    with pytest.warns(FutureWarning, match="should be set to"):
        expected = pipeline_class.from_pretrained(str(model)).scheduler.config
    found = export_spec(resolve_source(model)).pipeline.scheduler.config
    assert {name: found[name] for name in found if name != "_class_name"} == {
        name: expected[name] for name in found if name != "_class_name"
    }
    assert (found["steps_offset"], found["clip_sample"]) == (1, False)


def test_a_scheduler_that_there_is_no_sampler_for_is_refused_with_those_that_there_are(
    model: Path,
) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "KarrasVeScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"KarrasVeScheduler.*--scheduler takes ddim, ddpm"):
        export_spec(resolve_source(model))
    export = export_spec(resolve_source(model), None, "dpmpp-2m")
    assert export.pipeline.scheduler.name == "dpmpp-2m"
    with pytest.raises(UsageError, match="did you mean 'dpmpp-2m'"):
        export_spec(resolve_source(model), None, "dpmpp")


@pytest.mark.parametrize(
    ("class_name", "taken"),
    [("LMSDiscreteScheduler", "lms"), ("DPMSolverSDEScheduler", "dpmpp-sde")],
)
def test_a_scheduler_whose_packages_diffusers_lacks_is_taken_all_the_same(
    class_name: str, taken: str, model: Path
) -> None:
    edit_json(model / "model_index.json", scheduler=["diffusers", class_name])
    edit_json(model / "scheduler" / "scheduler_config.json", _class_name=class_name)
    assert export_spec(resolve_source(model)).pipeline.scheduler.name == taken
    assert export_spec(resolve_source(model), None, "ddim").pipeline.scheduler.name == "ddim"


@pytest.mark.parametrize("class_name", ["StableDiffusionPipeline", "UNet2DConditionModel", "utils"])
def test_no_other_class_than_a_scheduler_reads_the_scheduler(class_name: str, model: Path) -> None:
    """Neither where the user says which sampler, nor where the model says of what kind it is."""
    edit_json(model / "model_index.json", scheduler=["diffusers", class_name])
    edit_json(model / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    (model / "scheduler" / "model_index.json").write_text(json.dumps({"unet": ["own", "Code"]}))
    source = resolve_source(model)
    assert export_spec(source, None, "ddim").pipeline.scheduler.name == "ddim"
    with pytest.raises(InputError, match="there is no sampler for"):
        export_spec(source)
    (model / "edgesd.json").write_text(json.dumps({"variant": "turbo"}))
    assert export_spec(resolve_source(model)).pipeline.scheduler.name == "euler"


def test_an_option_for_which_diffusers_needs_a_package_is_refused_with_its_name(
    model: Path,
) -> None:
    if importlib.util.find_spec("scipy"):
        pytest.skip("diffusers has it here")
    edit_json(model / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit_json(model / "scheduler" / "scheduler_config.json", use_beta_sigmas=True)
    with pytest.raises(InputError, match="Make sure to install scipy"):
        export_spec(resolve_source(model))


@pytest.mark.parametrize("gone", [["."], ["tokenizer.json", "vocab.json"]])
def test_a_tokenizer_without_its_files_is_told_as_one(gone: list[str], model: Path) -> None:
    for name in gone:
        path = model / "tokenizer" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=r"tokenizer lacks .* tokenizer.json or vocab.json and"):
        export_spec(resolve_source(model))


def test_what_the_board_would_refuse_is_refused_at_once(model: Path) -> None:
    edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="noise")
    with pytest.raises(InputError, match="prediction_type"):
        export_spec(resolve_source(model))


def test_parameters_are_counted_without_loading(model: Path) -> None:
    pytest.importorskip("safetensors")
    source = resolve_source(model)
    stored = (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 0.9 * stored < 2 * source.parameters("unet") < stored  # stored in fp16
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot read"):
        source.parameters("unet")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": -1e30}),
        ("vae/config.json", {"latent_channels": 10**9}),
        ("unet/config.json", {"sample_size": 10**9}),
        ("unet/config.json", {"block_out_channels": [10**9, 10**9, 10**9]}),
        ("unet/config.json", {"cross_attention_dim": 10**400}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 0}),
        ("text_encoder/config.json", {"hidden_size": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**30}),
        ("edgesd.json", {"num_inference_steps": 0}),
        ("edgesd.json", {"guidance_scale": 10**400}),
    ],
    ids=str,
)
def test_absurd_numbers_are_refused_at_once(file: str, fields: dict[str, Any], model: Path) -> None:
    edit(model / file, **fields)
    with pytest.raises(EdgesdError) as caught:
        export_spec(resolve_source(model))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("raw", ["[" * 100_000, '{"a":' * 100_000, '{"a":1e999,"b":NaN', "\ud800"])
def test_a_config_that_is_no_json_is_refused(raw: str, model: Path) -> None:
    (model / "unet/config.json").write_bytes(raw.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"unet/config\.json") as caught:
        export_spec(resolve_source(model))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "LICENSES/MIT.txt", "LICENSES"])
def test_a_link_out_of_the_model_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id_ed25519").write_text("private")
    link = model / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if name == "LICENSES" else secret / "id_ed25519")
    source = resolve_source(model)
    with pytest.raises(InputError, match="link out of the model's folder"):
        source.licence("licence")


def test_links_of_the_hubs_cache_and_within_the_model_are_followed(
    model: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "models--owner--name"
    (cached / "blobs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    snapshot = cached / "snapshots" / "0123"
    model.rename(snapshot)
    for number, name in enumerate(["README.md", "NOTICE"]):
        (snapshot / name).rename(cached / "blobs" / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "COPYING").symlink_to("NOTICE")
    expected = resolve_source(EMOJI).licence("licence")
    found = resolve_source(snapshot).licence("licence")
    assert found.name == expected.name
    assert set(found.files) == {*expected.files, "licence/COPYING"}
