"""The demo model's siblings: how they begin, what they are shown, and how they are judged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from scripts.demo_model import (
    assemble,
    judge_inpaint,
    judge_sketch,
    masks,
    model,
    sketch,
    styles,
    train_control,
    train_inpaint,
    train_lcm,
    train_lcm_lora,
    train_lora,
)
from scripts.demo_model.contact_sheet import tile, tiles
from scripts.demo_model.judge_style import styled
from scripts.demo_model.moved import moved, variants
from scripts.demo_model.sampling import BATCH, draw
from scripts.demo_model.train_unet import diffusion_loss

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji"


def the_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(EMOJI / "unet").requires_grad_(False).eval()


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The UNet that training begins with."""
    return the_unet()


def square(side: int = 64, colour: int = 40) -> Tensor:
    """uint8 [1, 3, S, S]: a dark square in the middle of white."""
    picture = torch.full((1, 3, side, side), 255, dtype=torch.uint8)
    picture[:, :, side // 4 : -side // 4, side // 4 : -side // 4] = colour
    return picture


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents [2, 4, 16, 16], timesteps and hidden states [2, 77, 128]."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    return noisy, torch.tensor([900, 200]), torch.randn(2, 77, 128, generator=generator)


@torch.no_grad()
def test_a_control_net_begins_by_adding_nothing(unet: UNet2DConditionModel) -> None:
    noisy, timesteps, hidden = example()
    control = train_control.control_of(unet).eval()
    hints = torch.ones(2, 3, 128, 128)
    drawn = train_control.controlled(unet, control, noisy, timesteps, (hidden, hints))
    assert torch.equal(drawn, unet(noisy, timesteps, hidden).sample)
    torch.nn.init.ones_(control.controlnet_mid_block.weight)
    other = train_control.controlled(unet, control, noisy, timesteps, (hidden, hints))
    assert not torch.equal(drawn, other)


@torch.no_grad()
def test_the_inpainting_unet_begins_without_regard_to_the_mask(unet: UNet2DConditionModel) -> None:
    noisy, timesteps, hidden = example()
    wide = train_inpaint.widened(unet).eval()
    told = torch.randn(2, 5, 16, 16)
    drawn = wide(torch.cat([noisy, told], dim=1), timesteps, hidden).sample
    torch.testing.assert_close(drawn, unet(noisy, timesteps, hidden).sample)


def test_what_is_left_of_a_picture_has_grey_under_the_mask() -> None:
    vae = AutoencoderTiny.from_pretrained(EMOJI / "vae")
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1.0
    white = torch.full((1, 3, 128, 128), 255, dtype=torch.uint8)
    half = white.clone()
    half[..., 64:] = 0
    told = train_inpaint.left(vae, white, mask)
    assert told.shape == (1, 5, 16, 16)
    assert torch.equal(told, train_inpaint.left(vae, half, mask))
    assert told[0, 0, :, :8].sum() == 0
    assert (told[0, 0, :, 8:] == 1).all()


def test_masks_are_boxes_blobs_and_whole_pictures() -> None:
    torch.manual_seed(0)
    made = masks.masks(200, 32)
    assert made.shape == (200, 1, 32, 32)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    shares = made.mean(dim=(1, 2, 3))
    whole = (shares == 1).float().mean().item()
    assert whole == pytest.approx(masks.WHOLE_SHARE, abs=0.06)
    assert shares.min() > 0
    box = masks.box(32)
    rows, columns = box.amax(dim=1), box.amax(dim=0)
    assert torch.equal(box, rows[:, None] * columns[None])


def test_moved_pictures_stay_on_white_and_differ() -> None:
    torch.manual_seed(0)
    made = moved(square().expand(8, -1, -1, -1))
    assert made.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in made}) == 8
    ink = (255 - made.float()).mean(dim=(1, 2, 3)) / (255 - square().float()).mean()
    assert ((ink > 0.3) & (ink < 1.2)).all()  # scaled by 0.6 to 1.05, hardly cut off
    several = variants(square(), 3)
    assert several.shape == (1, 3, 3, 64, 64)
    assert torch.equal(several[:, 0], square())


def test_edges_are_thin_lines_where_the_colour_changes() -> None:
    levels = sketch.edge_levels(square())[0]
    assert levels.max() == len(sketch.THRESHOLDS)
    rows, columns = levels.nonzero(as_tuple=True)
    inside = (rows > 17) & (rows < 46) & (columns > 17) & (columns < 46)
    assert not inside.any()
    assert (levels[32] > 0).sum() == 2
    assert (levels[:, 32] > 0).sum() == 2
    faint = sketch.edge_levels(square(colour=230))[0]  # a slope of 12.5
    assert faint.max() == 1
    assert not sketch.edge_levels(square(colour=250)).any()


def test_lines_are_widened_to_the_pixel() -> None:
    lines = torch.zeros(1, 1, 9, 9)
    lines[..., 4] = 1
    for width in (1, 2, 3):
        made = sketch.widened(lines, width)
        assert made.shape == lines.shape
        assert made[0, 0, 4].sum() == width


def test_a_hand_leaves_out_and_shakes_but_invents_nothing() -> None:
    torch.manual_seed(0)
    levels = sketch.edge_levels(square().expand(16, -1, -1, -1))
    hints = sketch.drawn_by_hand(levels)
    assert hints.shape == (16, 3, 64, 64)
    assert set(hints.unique().tolist()) == {0.0, 1.0}
    near = torch.nn.functional.max_pool2d((levels > 0).float()[:, None], 17, 1, 8)
    assert (hints * (1 - near)).sum() == 0
    assert (hints.sum(dim=(1, 2, 3)) > 0).all()
    assert not sketch.drawn_by_hand(torch.zeros_like(levels)).any()


def test_line_art_has_no_colour_and_duotone_one() -> None:
    picture = square()
    picture[:, 0][picture[:, 0] == 40] = 240  # red
    drawn = styles.line_art(picture)
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    assert (drawn[0, :, 32, 32] == 255).all()
    assert drawn.min() < 100
    blue = styles.duotone(picture)
    assert (blue[0, :, 0, 0] == 255).all()
    assert blue[0, 2, 32, 32] > blue[0, 0, 32, 32] + 80


@pytest.mark.parametrize("style", styles.STYLES)
def test_styled_pictures_are_told_from_plain_ones(style: str) -> None:
    torch.manual_seed(0)
    plain = square().repeat(9, 1, 1, 1)
    plain[:, :, 16:48, 16:48] = torch.randint(256, (9, 3, 1, 1), dtype=torch.uint8)
    filtered = styles.STYLES[style](plain)
    known = [each.permute(0, 2, 3, 1).numpy() for each in (plain, filtered)]
    assert styled(known[1], *known) == 9
    assert styled(known[0], *known) < 4


@pytest.mark.parametrize("style", styles.STYLES)
def test_an_adapter_begins_by_adding_nothing_and_alone_learns(
    style: str, unet: UNet2DConditionModel
) -> None:
    noisy, timesteps, hidden = example()
    net = train_lora.adapted(the_unet(), train_lora.TARGETS[style], 2, 1)
    with torch.no_grad():
        assert torch.equal(net(noisy, timesteps, hidden).sample, unet(noisy, timesteps, hidden)[0])
    loss = diffusion_loss(
        lambda *given: net(*given).sample, model.scheduler().alphas_cumprod, noisy, hidden
    )
    loss.backward()
    learning = {name for name, value in net.named_parameters() if value.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert all(
        (value.grad is not None) == (name in learning) for name, value in net.named_parameters()
    )


@torch.no_grad()
@pytest.mark.parametrize("form", ["duotone", "line-art", "lcm-lora"])
def test_a_saved_adapter_draws_as_the_trained_one(form: str, tmp_path: Path) -> None:
    few = form == "lcm-lora"
    targets = train_lcm_lora.TARGETS if few else train_lora.TARGETS[form]
    rank, alpha = (
        (train_lcm_lora.RANK, train_lcm_lora.ALPHA) if few else (train_lora.RANK, train_lora.ALPHA)
    )
    torch.manual_seed(3)
    trained = train_lora.adapted(the_unet(), targets, rank, alpha)
    for name, value in trained.named_parameters():
        if "lora_" in name:
            value.copy_((torch.randn_like(value) * 0.05).half().float())
    torch.save({"average": trained.state_dict()}, tmp_path / f"{form}.pt")
    assemble.FORMS[form](tmp_path, EMOJI, tmp_path / "out")
    names = load_file(tmp_path / "out" / assemble.ADAPTER)
    assert any(name.endswith(".alpha") for name in names) == (form == "line-art")
    assert (tmp_path / "out" / "NOTICE").is_file()

    loaded = the_unet()
    wrapped = model.assemble(None, None, loaded, None)
    wrapped.load_lora_weights(tmp_path / "out")
    noisy, timesteps, hidden = example()
    plain = the_unet()(noisy, timesteps, hidden).sample
    wanted = trained(noisy, timesteps, hidden).sample
    given = loaded(noisy, timesteps, hidden).sample
    change = (wanted - plain).abs().max()
    assert change > 0.01
    assert (given - wanted).abs().max() < 0.02 * change


@torch.no_grad()
def test_an_adapter_of_few_steps_learns_one_guidance_scale(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    solver = train_lcm.Solver()
    noisy, _, hidden = example()
    empty = torch.zeros_like(hidden)
    losses = []
    for scale in (3.0, 3.0, 6.0):
        torch.manual_seed(1)
        losses.append(
            train_lcm.distillation_loss(unet, unet, unet, solver, noisy, hidden, empty, scale)
        )
    assert losses[0] == losses[1] != losses[2]


def test_edges_agree_within_two_pixels() -> None:
    lines = torch.zeros(1, 20, 20, dtype=torch.bool)
    lines[:, :, 8] = True
    for shift, wanted in ((0, 1.0), (2, 1.0), (3, 0.0)):
        score = judge_sketch.agreement(lines, lines.roll(shift, dims=2))
        assert score.item() == pytest.approx(wanted, abs=1e-5)
    more = lines.clone()
    more[:, :, 15] = True
    assert judge_sketch.agreement(more, lines).item() == pytest.approx(2 / 3)
    assert judge_sketch.agreement(torch.zeros_like(lines), lines).item() == 0


def test_errors_are_told_by_place() -> None:
    wanted = torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    drawn = wanted + 25.5 * mask
    assert judge_inpaint.decibels(drawn - wanted, mask).item() == pytest.approx(20, abs=1e-3)
    assert judge_inpaint.decibels(drawn - wanted, 1 - mask).item() == pytest.approx(100, abs=0.1)
    assert judge_inpaint.seams(drawn, wanted, mask).item() == pytest.approx(20, abs=1e-3)
    assert judge_inpaint.seams(wanted + 9, wanted, mask).item() == pytest.approx(100, abs=0.1)


def test_each_prompt_is_drawn_with_its_row_and_its_seed() -> None:
    def pipeline(batch: list[str], generator: list[torch.Generator], image: Tensor) -> object:
        seeds = [each.initial_seed() for each in generator]
        return SimpleNamespace(images=[*zip(batch, seeds, image.tolist(), strict=True)])

    count = BATCH + 2
    drawn = draw(pipeline, [str(i) for i in range(count)], {"image": torch.arange(count)}, seed=5)
    assert drawn == [(str(i), 5 + i, i) for i in range(count)]


def test_a_contact_sheet_is_taken_apart() -> None:
    torch.manual_seed(0)
    pictures = judge_sketch.as_images(torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8))
    taken = tiles(tile(pictures))
    assert [each.tobytes() for each in taken] == [each.tobytes() for each in pictures]
