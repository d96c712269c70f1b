"""Options of a quantized build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgesd.files import environment_folder, user_cache


@dataclass(frozen=True)
class QuantOptions:
    """How to quantize, beyond the scheme's name.

    method: rtn, gptq or svdquant. static: recorded activation ranges instead of those at hand.
    calibration_prompts, quality_prompts: None takes the model's own, or general ones.
    steps: of the loop in calibration and comparison; None is the model's default. guidance: same.
    min_psnr: floor in dB for the worst image. max_size: of the bundle, as a part of the fp32 one.
    max_time: the same for the estimated time of an image. work: folder for intermediate results.
    lpips: folder with the weights of LPIPS. pool_attention: fewer keys and values in the largest
    self-attention, where images allow.
    """

    method: str = "svdquant"
    static: bool = False
    calibration_prompts: tuple[str, ...] | None = None
    quality_prompts: tuple[str, ...] | None = None
    steps: int | None = None
    guidance: float | None = None
    min_psnr: float | None = None
    max_size: float | None = None
    max_time: float | None = None
    work: Path | None = None
    lpips: Path | None = None
    pool_attention: bool = False


def cache_folder() -> Path:
    """EDGESD_CACHE, or edgesd in the user's cache folder."""
    return environment_folder("EDGESD_CACHE") or user_cache()
