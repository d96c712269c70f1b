"""Put the trained parts together to a pipeline folder in fp16.

    python -m scripts.demo_model.assemble --work WORK --start PIPELINE --out models/emoji

Takes ``unet.pt``, ``decoder.pt`` and ``encoder.pt`` from the work folder (averaged weights) and
the tokenizer from ``--start``; a part without checkpoint stays as it is in ``--start``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import model
from .train_unet import Denoiser


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
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    vae.to(memory_format=torch.contiguous_format)
    return model.assemble(tokenizer, net.text, net.unet, vae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--start", type=Path, required=True, help="pipeline with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    arguments = parser.parse_args()
    model.save_pipeline(assemble(arguments.work, arguments.start), arguments.out)


if __name__ == "__main__":
    main()
