"""A pipeline with a full autoencoder: its decoder and encoder whole and in tiles, from a bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from edgesd.evaluate.psnr import psnr  # noqa: E402
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build  # noqa: E402
from edgesd.runtime.autoencoding import encoded  # noqa: E402
from edgesd.runtime.bundle import Bundle  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.settings import Settings  # noqa: E402
from tests.e2e.test_export import variant  # noqa: E402

LATENTS = np.random.default_rng(0).standard_normal((1, 4, 40, 28), dtype=np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    # The denoiser counts for nothing here: one without attention is exported in half the time.
    unet = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return variant(tmp_path_factory.mktemp("source"), unet, vae, scheduler)


@pytest.fixture(scope="module", params=[pytest.param("fp16", marks=pytest.mark.slow), "w8a8"])
def bundle(
    request: pytest.FixtureRequest,
    source: Path,
    own_kernels: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    work = tmp_path_factory.mktemp("work")
    how = QuantOptions(calibration_prompts=("red apple",), quality_prompts=(), steps=2)
    options = BuildOptions("x86-64-cpu", request.param, quantization=how, tasks=("image",))
    out = work / "bundle.edgesd"
    return build(str(source), options, out, LocalFolders(work)).bundle


def image(height: int, width: int) -> np.ndarray:
    """Values [1, 3, H, W] that aren't alike everywhere."""
    down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    return np.stack([down * across, np.sin(4 * down) + 0 * across, np.cos(3 * across * down)])[
        None
    ].astype("f4")


def decoded(bundle: Bundle, settings: Settings) -> np.ndarray:
    with Pipeline(bundle, settings) as pipeline:
        return np.asarray(pipeline.decode(LATENTS)[0])


def test_a_streamed_image_is_the_whole_one(bundle: Bundle) -> None:
    latent, engine = bundle.manifest.pipeline.latent, bundle.manifest.engines["vae_decoder"]
    assert latent.levels == (32, 32, 16, 16) and latent.halo is None
    assert engine.split is not None
    assert (engine.split.tail.kernels is None) == (engine.kernels is None)
    for kernels in (False, True):
        whole = decoded(bundle, Settings(memory="fast", kernels=kernels))
        tiled = decoded(bundle, Settings(memory="stream", kernels=kernels))
        assert whole.shape == tiled.shape == (320, 224, 3)
        assert not (whole == tiled).all()
        # Of 8 bits each tile has formats of its own.
        least = 30 if bundle.manifest.precision == "w8a8" else 45
        assert psnr(whole, tiled) > least


def test_a_streamed_encoding_is_the_whole_one(bundle: Bundle) -> None:
    engine = bundle.manifest.engines["vae_encoder"]
    assert engine.split is not None and len(engine.split.parts) == 4
    given = image(344, 328)
    for kernels in (False, True):
        means = []
        for memory in ("fast", "stream"):
            with Pipeline(bundle, Settings(memory=memory, kernels=kernels)) as pipeline:
                mean, spread = encoded(pipeline._loaded, given)
                assert mean.shape == spread.shape == (1, 4, 43, 41)
                means.append(mean)
        whole, tiled = means
        assert not (whole == tiled).all()
        error = np.sqrt(np.mean((whole - tiled) ** 2)) / whole.std()
        # Of 8 bits each tile has formats of its own.
        assert error < (0.1 if bundle.manifest.precision == "w8a8" else 1e-3)


_ENCODE = """
import sys
import numpy as np
from pathlib import Path
from edgesd.runtime.autoencoding import encoded
from edgesd.runtime.bundle import open_bundle
from edgesd.runtime.footprint import Generation, with_margin
from edgesd.runtime.memory import peak_bytes
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings

with Pipeline(open_bundle(Path(sys.argv[1])), Settings(memory="stream")) as pipeline:
    costs = pipeline._loaded._fitting().costs
    parts = costs.need("stream", Generation(128, 128, 8, encodes=True)).parts
    encoded(pipeline._loaded, np.zeros((1, 3, 1024, 1024), np.float32))
    print(peak_bytes(), with_margin(parts["vae_encoder"], costs.process), costs.process)
"""


def test_a_streamed_encoding_takes_no_more_than_estimated(bundle: Bundle) -> None:
    command = [sys.executable, "-c", _ENCODE, str(bundle.path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    taken, bound, process = map(int, said.split())
    assert process < taken <= bound
    assert taken - process > 0.1 * (bound - process)  # which counts a picture's copies, too
