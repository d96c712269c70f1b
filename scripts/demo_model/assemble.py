"""Put the trained parts together to a pipeline folder in fp16.

    python -m scripts.demo_model.assemble --work WORK --start PIPELINE --out models/emoji

Takes ``unet.pt``, ``decoder.pt`` and ``encoder.pt`` from the work folder (averaged weights) and
the tokenizer from ``--start``; a part without checkpoint stays as it is in ``--start``. Another
``--form`` takes the checkpoint of its name. Where that makes a pipeline, the rest is that of
``--start``; a ControlNet or an adapter is written alone. All bring the notices of ``--start``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Tokenizer

from . import (
    flux,
    model,
    train_control,
    train_flux,
    train_inpaint,
    train_lcm,
    train_lcm_lora,
    train_lora,
    train_xl,
)
from . import xl as xl_parts
from .train_unet import Denoiser
from .training import Net

NOTICES = ("LICENSES", "NOTICE")
COPIED = (*NOTICES, "prompts/calibration.txt", "prompts/quality.txt", "tokenizer", "vae")
ADAPTER = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder


def assemble(work: Path, start: Path) -> StableDiffusionPipeline:
    """The pipeline of the newest checkpoints."""
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
    if (work / "unet.pt").exists():
        net = Denoiser(model.text_encoder(len(tokenizer)), model.unet())
        net.load_state_dict(torch.load(work / "unet.pt")["average"])
    else:
        net = Denoiser(
            CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(start / "unet"),
        )
    if (work / "decoder.pt").exists():
        vae = model.autoencoder()
        vae.decoder.load_state_dict(torch.load(work / "decoder.pt")["average"])
        if (work / "encoder.pt").exists():
            vae.encoder.load_state_dict(torch.load(work / "encoder.pt")["average"])
    else:
        vae = AutoencoderTiny.from_pretrained(start / "vae")
    contiguous(net)
    contiguous(vae)
    return model.assemble(tokenizer, net.text, net.unet, vae)


def assemble_xl(work: Path, start: Path) -> StableDiffusionXLPipeline:
    """The pipeline of ``xl.pt``."""
    net = trained(train_xl.start_of(start), work / "xl.pt")
    tokenizers = (
        CLIPTokenizer.from_pretrained(start / "tokenizer"),
        CLIPTokenizer.from_pretrained(start / "tokenizer", pad_token=xl_parts.PAD_2),
    )
    return xl_parts.assemble(*tokenizers, net, AutoencoderTiny.from_pretrained(start / "vae"))


def assemble_lcm(work: Path, start: Path) -> LatentConsistencyModelPipeline:
    """The pipeline of ``lcm.pt``."""
    unet = train_lcm.student_of(UNet2DConditionModel.from_pretrained(start / "unet"))
    unet = trained(unet, work / "lcm.pt")
    return LatentConsistencyModelPipeline(**parts_with(unet, train_lcm.scheduler(), start))


def assemble_inpaint(work: Path, start: Path) -> StableDiffusionInpaintPipeline:
    """The pipeline of ``inpaint.pt``."""
    unet = train_inpaint.widened(UNet2DConditionModel.from_pretrained(start / "unet"))
    unet = trained(unet, work / "inpaint.pt")
    return StableDiffusionInpaintPipeline(**parts_with(unet, model.scheduler(), start))


def assemble_flux(work: Path, start: Path, stage: str) -> FluxPipeline:
    """The pipeline of ``flux-STAGE.pt``."""
    tokenizer = T5Tokenizer.from_pretrained(work / train_flux.TOKENIZER)
    net = flux.Denoiser(flux.text_encoder(len(tokenizer)), flux.transformer(stage == "dev"))
    net = trained(net, work / f"flux-{stage}.pt")
    return flux.assemble(
        CLIPTokenizer.from_pretrained(start / "tokenizer"),
        CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
        tokenizer,
        net,
        AutoencoderTiny.from_pretrained(start / "vae"),
    )


def parts_with(
    unet: UNet2DConditionModel, scheduler: SchedulerMixin, start: Path
) -> dict[str, Any]:
    """Arguments of a pipeline's class: the UNet, the scheduler, and else the parts of ``start``."""
    return model.parts(
        CLIPTokenizer.from_pretrained(start / "tokenizer"),
        CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
        unet,
        AutoencoderTiny.from_pretrained(start / "vae"),
        scheduler,
    )


def save_control(work: Path, start: Path, out: Path) -> None:
    """Write the ControlNet of ``control.pt`` in fp16."""
    unet = UNet2DConditionModel.from_pretrained(start / "unet")
    control = trained(train_control.control_of(unet), work / "control.pt")
    control.to(torch.float16).save_pretrained(out)
    copy_from(start, out, NOTICES)


def factors_of(
    checkpoint: Path, start: Path, targets: list[str], rank: int, alpha: int
) -> dict[str, Tensor]:
    """The averaged factors of an adapter in fp16, by PEFT's names below ``unet.``."""
    unet = UNet2DConditionModel.from_pretrained(start / "unet")
    train_lora.adapted(unet, targets, rank, alpha)
    unet.load_state_dict(torch.load(checkpoint)["average"])
    named = get_peft_model_state_dict(unet)
    return {f"unet.{name}": value.half().contiguous() for name, value in named.items()}


def save_peft(factors: dict[str, Tensor], scale: float, out: Path) -> None:
    """Write an adapter as diffusers does. The scale goes into the factors: the names have none."""
    scaled = {
        name: (value.float() * scale).half() if "lora_B" in name else value
        for name, value in factors.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(scaled, out / ADAPTER, {"format": "pt"})


def save_kohya(factors: dict[str, Tensor], alpha: int, out: Path) -> None:
    """Write an adapter by Kohya's names, with the alpha of each layer beside its factors."""
    renamed = convert_state_dict_to_kohya(factors)
    for name in renamed:
        if name.endswith(".alpha"):
            renamed[name] = torch.tensor(alpha, dtype=torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(renamed, out / ADAPTER, {"format": "pt"})


def save_duotone(work: Path, start: Path, out: Path) -> None:
    """Write the style ``duotone`` by PEFT's names."""
    targets, rank, alpha = train_lora.TARGETS["duotone"], train_lora.RANK, train_lora.ALPHA
    save_peft(factors_of(work / "duotone.pt", start, targets, rank, alpha), alpha / rank, out)
    copy_from(start, out, NOTICES)


def save_line_art(work: Path, start: Path, out: Path) -> None:
    """Write the style ``line-art`` by Kohya's names."""
    targets, rank, alpha = train_lora.TARGETS["line-art"], train_lora.RANK, train_lora.ALPHA
    save_kohya(factors_of(work / "line-art.pt", start, targets, rank, alpha), alpha, out)
    copy_from(start, out, NOTICES)


def save_lcm_lora(work: Path, start: Path, out: Path) -> None:
    """Write the adapter of few steps by PEFT's names."""
    rank, alpha = train_lcm_lora.RANK, train_lcm_lora.ALPHA
    factors = factors_of(work / "lcm-lora.pt", start, train_lcm_lora.TARGETS, rank, alpha)
    save_peft(factors, alpha / rank, out)
    hints = {"variant": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
    (out / "edgesd.json").write_text(json.dumps(hints) + "\n", encoding="utf-8")
    copy_from(start, out, NOTICES)


def trained(net: Net, checkpoint: Path) -> Net:
    """``net`` with the averaged weights of a checkpoint."""
    net.load_state_dict(torch.load(checkpoint)["average"])
    contiguous(net)
    return net


def contiguous(net: nn.Module) -> None:
    """Lay the weights of ``net`` out in memory in their usual order again."""
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def copy_from(start: Path, out: Path, names: tuple[str, ...]) -> None:
    """Copy files and folders of ``start``."""
    for name in names:
        source, copy = start / name, out / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, copy)


def save(pipeline: DiffusionPipeline, start: Path, out: Path) -> None:
    """Write the pipeline, with what the model it began with must bring along."""
    model.save_pipeline(pipeline, out)
    copy_from(start, out, COPIED)


FORMS: dict[str, Callable[[Path, Path, Path], None]] = {
    "sd": lambda work, start, out: model.save_pipeline(assemble(work, start), out),
    "xl": lambda work, start, out: save(assemble_xl(work, start), start, out),
    "lcm": lambda work, start, out: save(assemble_lcm(work, start), start, out),
    "inpaint": lambda work, start, out: save(assemble_inpaint(work, start), start, out),
    "flux-dev": lambda work, start, out: save(assemble_flux(work, start, "dev"), start, out),
    "flux-schnell": lambda work, start, out: save(
        assemble_flux(work, start, "schnell"), start, out
    ),
    "control": save_control,
    "duotone": save_duotone,
    "line-art": save_line_art,
    "lcm-lora": save_lcm_lora,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--start", type=Path, required=True, help="pipeline with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--form", choices=FORMS, default="sd")
    arguments = parser.parse_args()
    FORMS[arguments.form](arguments.work, arguments.start, arguments.out)


if __name__ == "__main__":
    main()
