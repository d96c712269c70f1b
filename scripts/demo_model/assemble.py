"""Put the trained parts together to a pipeline folder in fp16.

    python -m scripts.demo_model.assemble --work WORK --start PIPELINE --out models/emoji

Takes ``unet.pt``, ``decoder.pt`` and ``encoder.pt`` from the work folder (averaged weights) and
the tokenizer from ``--start``; a part without checkpoint stays as it is in ``--start``. With
``--form xl`` or ``--form lcm`` it takes ``xl.pt`` or ``lcm.pt``; the rest, the notices and the
prompts included, is that of ``--start``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import model, train_lcm, train_xl, xl
from .train_unet import Denoiser

COPIED = (
    "LICENSES",
    "NOTICE",
    "prompts/calibration.txt",
    "prompts/quality.txt",
    "tokenizer",
    "vae",
)


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
    net = train_xl.start_of(start)
    net.load_state_dict(torch.load(work / "xl.pt")["average"])
    contiguous(net)
    tokenizers = (
        CLIPTokenizer.from_pretrained(start / "tokenizer"),
        CLIPTokenizer.from_pretrained(start / "tokenizer", pad_token=xl.PAD_2),
    )
    return xl.assemble(*tokenizers, net, AutoencoderTiny.from_pretrained(start / "vae"))


def assemble_lcm(work: Path, start: Path) -> LatentConsistencyModelPipeline:
    """The pipeline of ``lcm.pt``."""
    unet = train_lcm.student_of(UNet2DConditionModel.from_pretrained(start / "unet"))
    unet.load_state_dict(torch.load(work / "lcm.pt")["average"])
    contiguous(unet)
    return LatentConsistencyModelPipeline(
        vae=AutoencoderTiny.from_pretrained(start / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(start / "tokenizer"),
        unet=unet,
        scheduler=train_lcm.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def contiguous(net: nn.Module) -> None:
    """Lay the weights of ``net`` out in memory in their usual order again."""
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def save(pipeline: DiffusionPipeline, start: Path, out: Path) -> None:
    """Write the pipeline, with what the model it began with must bring along."""
    model.save_pipeline(pipeline, out)
    for name in COPIED:
        source, copy = start / name, out / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--start", type=Path, required=True, help="pipeline with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--form", choices=("sd", "xl", "lcm"), default="sd")
    arguments = parser.parse_args()
    work, start, out = arguments.work, arguments.start, arguments.out
    if arguments.form == "sd":
        model.save_pipeline(assemble(work, start), out)
    else:
        make = assemble_xl if arguments.form == "xl" else assemble_lcm
        save(make(work, start), start, out)


if __name__ == "__main__":
    main()
