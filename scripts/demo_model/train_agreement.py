"""Train a small contrastive model on the emoji set: the offline judge of pictures and captions.

    python -m scripts.demo_model.train_agreement --data build/emoji-data --out models/emoji-judge

Two towers meet in one space, as CLIP's do (Radford et al. 2021, arXiv 2103.00020, fig. 3): a small
convolutional network for pictures and the mean of learned word vectors for captions. It knows what
the emoji set shows and nothing else. Pairs of kind `held` are kept out; how often such a picture
finds its caption among all is the figure in `judge.json`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.nn import functional

from edgesd.evaluate.agreement import MAX_WORDS, JudgeSpec, word_ids, words_of, write_judge

from . import dataset
from .captions import captions, pick_caption
from .dataset import Emoji
from .training import Budget, learning_rate, set_learning_rate

SIDE = 64
WIDTH = 128
WORD_WIDTH = 192


class PictureTower(nn.Module):
    """Pictures [N, 3, 64, 64] of 0 to 1 -> unit rows [N, 128]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in (32, 64, 128, 192):
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, channels), nn.SiLU()]
            before = channels
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * 16, WIDTH))

    def forward(self, pictures: Tensor) -> Tensor:
        return functional.normalize(self.body(pictures * 2 - 1), dim=1)


class CaptionTower(nn.Module):
    """Word ids [N, L], 0 for no word, -> unit rows [N, 128]."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WORD_WIDTH)
        self.body = nn.Sequential(nn.Linear(WORD_WIDTH, 256), nn.SiLU(), nn.Linear(256, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids > 0).float().unsqueeze(-1)
        mean = (self.words(ids) * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return functional.normalize(self.body(mean), dim=1)


def augment(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] moved, scaled, lit and blurred a little, each differently, on white."""
    count = len(pictures)
    turn = torch.zeros(count, 2, 3)
    scale = torch.empty(count).uniform_(0.85, 1.2)
    turn[:, 0, 0], turn[:, 1, 1] = scale, scale
    turn[:, :, 2] = torch.empty(count, 2).uniform_(-0.15, 0.15)
    places = functional.affine_grid(turn, list(pictures.shape), align_corners=False)
    moved = 1 - functional.grid_sample(1 - pictures, places, align_corners=False)
    blurred = functional.avg_pool2d(
        functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    part = torch.rand(count, 1, 1, 1)
    mixed = part * blurred + (1 - part) * moved
    light = torch.empty(count, 1, 1, 1).uniform_(0.9, 1.1)
    return (mixed * light + 0.03 * torch.randn_like(mixed)).clamp(0, 1)


def loss_of(pictures: Tensor, texts: Tensor, names: list[str], scale: Tensor) -> Tensor:
    """Symmetric cross entropy; all pairs of one name are right, in equal parts."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    own = torch.tensor([numbers[name] for name in names])
    wanted = (own[:, None] == own[None, :]).float()
    wanted = wanted / wanted.sum(dim=1, keepdim=True)
    logits = scale.exp().clamp(max=100) * pictures @ texts.T
    return (
        functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted)
    ) / 2


@torch.no_grad()
def recall(
    pictures: Tensor, emoji: list[Emoji], names: list[str], towers: nn.ModuleList, words: list[str]
) -> float:
    """How often a picture's own name is the nearest of all `names`."""
    texts = towers[1](torch.from_numpy(word_ids(names, words)))
    nearest = torch.cat([towers[0](part) @ texts.T for part in torch.split(pictures, 256)]).argmax(
        dim=1
    )
    right = [names[int(at)] == entry.name for at, entry in zip(nearest, emoji, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--cpu-minutes", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    chance = random.Random(arguments.seed)
    raw, emoji = dataset.load(arguments.data)
    pictures = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    pictures = functional.interpolate(pictures, (SIDE, SIDE), mode="area")
    spoken = {word for e in emoji for text in captions(e.name, e.style) for word in words_of(text)}
    words = sorted(spoken | {word for e in emoji for tag in e.tags for word in words_of(tag)})
    seen = [at for at, entry in enumerate(emoji) if entry.kind != "held"]
    unseen = [
        at for at, entry in enumerate(emoji) if entry.kind == "held" and entry.style == "flat"
    ]
    names = sorted({entry.name for entry in emoji})
    towers = nn.ModuleList([PictureTower(), CaptionTower(len(words) + 1)])
    scale = nn.Parameter(torch.tensor(np.log(20.0), dtype=torch.float32))
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], weight_decay=0.02)
    budget, step = Budget(arguments.cpu_minutes), 0
    while budget.progress < 1:
        rate = learning_rate(arguments.lr, step, budget.progress, warmup=100, flat=0.3)
        set_learning_rate(optimizer, rate)
        chosen = chance.sample(seen, arguments.batch)
        texts = [
            pick_caption(emoji[at].name, emoji[at].tags, emoji[at].style, chance) for at in chosen
        ]
        loss = loss_of(
            towers[0](augment(pictures[chosen])),
            towers[1](torch.from_numpy(word_ids(texts, words))),
            [emoji[at].name for at in chosen],
            scale,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            known = recall(pictures[unseen], [emoji[at] for at in unseen], names, towers, words)
            print(
                f"step {step} loss {float(loss.detach()):.3f} held-out recall {known:.3f}",
                flush=True,
            )
    towers.eval()
    flat = [at for at in seen if emoji[at].style == "flat"]
    spec = JudgeSpec(
        side=SIDE,
        words=tuple(words),
        images=len(seen),
        recall_seen=recall(pictures[flat], [emoji[at] for at in flat], names, towers, words),
        recall_held=recall(pictures[unseen], [emoji[at] for at in unseen], names, towers, words),
        held=len(unseen),
        captions=len(names),
    )
    write_judge(
        arguments.out,
        spec,
        exported(towers[0], torch.rand(2, 3, SIDE, SIDE)),
        exported(towers[1], torch.ones(2, MAX_WORDS, dtype=torch.long)),
    )
    print(json.dumps({"steps": step, "seen": spec.recall_seen, "held": spec.recall_held}))


def exported(tower: nn.Module, example: Tensor) -> bytes:
    """The tower as an ONNX model of one input "x" [N, ...] and one output "y" [N, 128]."""
    made = torch.onnx.export(
        tower,
        (example,),
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
        dynamo=True,
        verbose=False,
        opset_version=18,
    )
    assert made is not None
    ClearMetadataAndDocStringPass()(made.model)  # traces of this machine's files
    content: bytes = made.model_proto.SerializeToString()
    return content


if __name__ == "__main__":
    main()
