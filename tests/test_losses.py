"""The training losses against the official code's numbers, and what must hold for any scene.

`data/losses_golden.safetensors` holds a few of the official inputs and results (its header says where they come from),
so that parity is proved without the full golden files; those are used, too, where they are at hand.
"""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vggt_lora.geometry.cameras import centre_to_corner_intrinsics
from vggt_lora.reference_data import reference
from vggt_lora.training.losses import (
    LossConfig, camera_loss, depth_loss, normalise_batch, point_loss, prepare_batch, training_loss,
)
from vggt_lora.training.loss_terms import difference_term, normal_term, quantile_filter

SMALL = Path(__file__).parent / "data" / "losses_golden.safetensors"
SIZE = (56, 84)
OFFICIAL_CAMERA = {"rule": "first", "min_valid": 100}
OFFICIAL_DENSE = {"min_valid": 100, "confidence_on_invalid": True}


def close(name: str, value: float, wanted: float) -> None:
    """Compare at the tolerance the golden file states: relative 1e-5, sums of gradients and confidences 1e-4."""
    loose = "conf" in name or "grad" in name
    assert value == pytest.approx(wanted, rel=1e-4 if loose else 1e-5, abs=1e-9), name


def close_to_largest(value: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare tensors to 1e-6 of the largest wanted value."""
    assert (value - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def camera_numbers(data: dict, extrinsics: torch.Tensor, mask: torch.Tensor) -> dict:
    """Every camera number of the golden file."""
    row, none = mask.clone(), mask.clone()
    row[1, 0] = False
    row[1, 0, 20] = True
    none[:, 0] = False
    cases = {
        "l1": (mask, {}), "l2": (mask, {"kind": "l2"}), "l1.sample1_first_frame_84px": (row, {}),
        "l1.no_valid": (none, {}), "l1.gamma0.8_wT2_wR3_wF1": (mask, {"stage_gamma": 0.8, "weights": (2.0, 3.0, 1.0)}),
    }
    numbers = {}
    for case, (valid, options) in cases.items():
        result = camera_loss(
            [data[f"pred.pose_enc_list.{k}"] for k in range(4)], extrinsics, data["raw.intrinsics"], valid, SIZE,
            **OFFICIAL_CAMERA, **options,
        )
        named = {
            "camera": result.total, "T": result.terms["translation"], "R": result.terms["rotation"],
            "FL": result.terms["focal"],
        }
        numbers |= {f"camera.{case}.loss_{name}": value.item() for name, value in named.items()}
    return numbers


def filter_numbers(values: torch.Tensor) -> dict:
    """Every number of the quantile filter; the threshold is the smallest value that was dropped."""
    numbers = {}
    for q in (0.98, 0.5, 0.1):
        clamped, kept = quantile_filter(values, q)
        numbers |= {f"filter.{q}.n": int(kept.sum()), f"filter.{q}.mean": clamped[kept].mean().item()}
        if not kept.all():
            numbers[f"filter.{q}.threshold"] = clamped[~kept].min().item()
    return numbers


def stride_numbers(term, name: str, pred, target, mask, conf, strides: dict) -> dict:
    """One gradient term at single strides, without and with confidence; `strides` maps the official index to a step."""
    numbers = {}
    for k, step in strides.items():
        part = [t.flatten(0, 1)[:, ::step, ::step] for t in (pred, target, mask, conf)]
        numbers[f"{name}.scale{k}"] = term(*part[:3])[0].item()
        numbers[f"{name}_conf.scale{k}"] = term(*part, True)[0].item()
    return numbers


# ---------------------------------------------------------------- official numbers that travel with the tests

@pytest.fixture(scope="module")
def small():
    data = load_file(SMALL)
    bits = data["mask_bits"][:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    data["mask"] = bits.flatten()[:2 * 3 * SIZE[0] * SIZE[1]].bool().view(2, 3, *SIZE)
    data["depth"] = torch.zeros(2, 3, *SIZE)
    data["depth"][data["mask"]] = data["raw.depth_values"]
    K = centre_to_corner_intrinsics(data["raw.intrinsics"])
    data["truth"] = normalise_batch(data["raw.extrinsics"], K, data["depth"], data["mask"])
    data["moved"] = normalise_batch(data["raw.extrinsics"], K, data["depth"], data["mask"], scale_by_points=False)
    with safe_open(SMALL, "pt") as file:
        data["scalars"] = json.loads(file.metadata()["scalars"])
    return data


def test_small_normalisation(small):
    close_to_largest(small["truth"]["world_to_cam"][..., :3, :], small["norm.extrinsics"])
    close_to_largest(small["moved"]["world_to_cam"][..., :3, :], small["norm_noscale.extrinsics"])
    close_to_largest(small["truth"]["world_points"][:, :, ::8, ::8], small["norm.world_points.every8"])


def test_small_scalars(small):
    mask, every4 = small["mask"][:, :, ::4, ::4], {2: 1, 3: 2}
    conf = small["pred.depth_conf.every4"]
    truth = {name: small["truth"][name][:, :, ::4, ::4] for name in ("depth", "world_points")}
    numbers = camera_numbers(small, small["truth"]["world_to_cam"], small["mask"]) | filter_numbers(small["filter.in"])
    numbers |= stride_numbers(
        difference_term, "gradient_loss", small["pred.depth.every4"], truth["depth"][..., None], mask, conf, every4
    )
    numbers |= stride_numbers(
        normal_term, "normal_loss", small["pred.world_points.every4"], truth["world_points"], mask, conf, {2: 1}
    )
    wanted = {
        name: value
        for name, value in small["scalars"].items()
        if name != "filter.0.1.threshold" and not name.startswith("filter_short")
    }
    assert len(wanted) >= 31 and set(wanted) <= set(numbers)
    for name, value in wanted.items():
        close(name, numbers[name], value)


# ---------------------------------------------------------------- all official numbers, where they are at hand

@pytest.fixture(scope="module")
def full():
    tensors, scalars = reference("train_losses.safetensors"), reference("train_losses.json")
    if not (tensors and scalars):
        pytest.skip("the full golden files are absent; test_small_* prove parity on a part of them")
    return load_file(tensors), json.loads(scalars.read_text())["scalars"]


def dense_numbers(data: dict, prefix: str, what: str, mask=None, target=None, **options) -> dict:
    """The three terms of one depth or point case."""
    loss, pred = (depth_loss, "depth") if what == "depth" else (point_loss, "world_points")
    target = data["norm.depths" if what == "depth" else "norm.world_points"] if target is None else target
    result = loss(
        data[f"pred.{pred}"], data[f"pred.{pred}_conf"], target, data["raw.point_masks"] if mask is None else mask,
        **OFFICIAL_DENSE, **options,
    )
    return {f"{prefix}.loss_{term}_{what}": value.item() for term, value in result.terms.items()}


def dirty(data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The golden depth with three broken values that are marked valid."""
    depth, mask = data["norm.depths"].clone(), data["raw.point_masks"].clone()
    for place, value in (((0, 0, 10, 10), 250.0), ((0, 1, 11, 11), float("nan")), ((1, 2, 12, 12), float("inf"))):
        depth[place], mask[place] = value, True
    return depth, mask


def all_numbers(data: dict) -> dict:
    """Every golden number that needs no network."""
    mask, numbers = data["raw.point_masks"], {}
    for q in (-1, 0.98, 0.9):
        for name in ("grad", "grad_conf", "none"):
            numbers |= dense_numbers(
                data, f"depth.vr{q}.{name}", "depth", quantile=q, gradient=name.replace("none", "")
            )
    for q in (-1, 0.98):
        for name in ("normal", "normal_conf", "grad"):
            numbers |= dense_numbers(data, f"point.vr{q}.{name}", "point", quantile=q, gradient=name)
    numbers |= dense_numbers(data, "depth.vr0.98.grad.gamma0.5_alpha0.1", "depth", gamma=0.5, alpha=0.1)
    depth, dirty_mask = dirty(data)
    numbers |= dense_numbers(data, "depth.dirty_gt.vr-1.grad", "depth", dirty_mask, depth, quantile=-1)
    few = mask & (mask.flatten().cumsum(0).view_as(mask) <= 99)
    numbers |= {"depth.few_valid.n": int(few.sum())} | dense_numbers(data, "depth.few_valid.vr0.98.grad", "depth", few)
    numbers |= camera_numbers(data, data["norm.extrinsics"], mask) | filter_numbers(data["filter.in"])
    numbers["filter_short.0.98.n"] = int(quantile_filter(data["filter_short.in"])[1].sum())
    numbers |= stride_numbers(
        difference_term, "gradient_loss", data["pred.depth"], data["norm.depths"][..., None], mask,
        data["pred.depth_conf"], {k: 2**k for k in range(4)},
    )
    return numbers | stride_numbers(
        normal_term, "normal_loss", data["pred.world_points"], data["norm.world_points"], mask,
        data["pred.world_points_conf"], {k: 2**k for k in range(3)},
    )


def test_every_official_number(full):
    data, scalars = full
    numbers = all_numbers(data)
    needs_network = {name for name in scalars if name.startswith(("step.", "grad_norm."))}
    unseen = {"filter.0.1.threshold"}  # the filter keeps everything there, so that its threshold has no effect
    assert set(numbers) == set(scalars) - needs_network - unseen
    for name, value in numbers.items():
        close(name, value, scalars[name])


def test_official_normalisation(full):
    data, _ = full
    K = centre_to_corner_intrinsics(data["raw.intrinsics"])
    for scale, prefix, names in ((True, "norm", ("extrinsics", "depths", "cam_points", "world_points")),
                                 (False, "norm_noscale", ("extrinsics", "world_points"))):
        ours = normalise_batch(
            data["raw.extrinsics"], K, data["raw.depths"], data["raw.point_masks"], scale_by_points=scale
        )
        ours |= {"extrinsics": ours["world_to_cam"][..., :3, :], "depths": ours["depth"]}
        for name in names:
            close_to_largest(ours[name], data[f"{prefix}.{name}"])


# ---------------------------------------------------------------- a slow twin in numpy, from the specification alone

def twin(pred, conf, target, weight, quantile, gamma, alpha):
    """Confidence and regression term of depth on the valid pixels, one value after the other (spec 13.3)."""
    repaired = [min(max(t, -100.0), 100.0) if math.isfinite(t) else 0.0 for t in target]
    error = [min(abs(t - p), 100.0) for p, t in zip(pred, repaired)]
    terms = {
        "reg": error,
        "conf": [max(-100.0, min(100.0, gamma * e * k - alpha * math.log(k))) for e, k in zip(error, conf)],
    }
    means = {}
    for name, values in terms.items():
        kept = list(zip(values, weight))
        if len(values) > 1000 and quantile > 0:
            values = [min(v, 100.0) for v in values]
            threshold = sorted(values)[round(quantile * (len(values) - 1))]
            below = [(v, w) for v, w in zip(values, weight) if v < threshold]
            kept = below if len(below) > 1000 else list(zip(values, weight))
        means[name] = sum(v * w for v, w in kept) / sum(w for _, w in kept)
    return means


@pytest.mark.parametrize("pixels", [40, 1000, 1001, 1019, 1030, 4000])
@pytest.mark.parametrize("quantile, gamma, alpha", [(0.98, 1.0, 0.2), (0.6, 0.5, 0.1), (-1, 2.0, 0.3)])
def test_confidence_and_regression_agree_with_a_slow_twin(pixels, quantile, gamma, alpha):
    random = torch.Generator().manual_seed(pixels)
    pred, conf, target, weight = (torch.rand((1, 2, 50, 60), generator=random) * 3 for _ in range(4))
    target[0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), 1e4])
    conf, weight = conf + 1, weight + 0.1
    order = torch.rand(6000, generator=random)
    order.view(1, 2, 50, 60)[0, 0, :3, 0] = 0  # the broken targets are among the valid pixels
    valid = (order.argsort().argsort() < pixels).view(1, 2, 50, 60)
    for given in (weight, None):
        trust = torch.ones_like(weight) if given is None else given
        result = depth_loss(pred[..., None], conf, target, valid, given, quantile=quantile, gamma=gamma, alpha=alpha)
        wanted = twin(*(t[valid].double().tolist() for t in (pred, conf, target, trust)), quantile, gamma, alpha)
        for name, value in wanted.items():
            assert result.terms[name].item() == pytest.approx(value, rel=1e-5)
        assert result.counts["targets_clipped"] == 1


# ---------------------------------------------------------------- what must hold for any scene

def scene(valid_share: float = 0.5, scenes: int = 2, size: tuple[int, int] = (28, 42), seed: int = 0):
    """A random batch of scenes with three frames, and predictions that want gradients."""
    random = torch.Generator().manual_seed(seed)
    shape = (scenes, 3, *size)
    poses = torch.eye(4).repeat(scenes, 3, 1, 1)
    poses[..., :3, 3] = torch.rand((scenes, 3, 3), generator=random)
    K = torch.tensor([[40.0, 0, size[1] / 2], [0, 41.0, size[0] / 2], [0, 0, 1]]).repeat(scenes, 3, 1, 1)
    valid = torch.rand(shape, generator=random) < valid_share
    batch = {
        "images": torch.zeros(scenes, 3, 3, *size), "K": K, "world_to_cam": poses, "valid": valid, "metric": True,
        "depth": torch.where(valid, 4 + torch.rand(shape, generator=random), 0.0),
        "labels": torch.arange(size[1]).expand(shape).to(torch.uint8) // 10,
        "base_prediction": 0.5 + torch.rand(shape, generator=random),
    }
    outputs = {
        "depth": torch.rand((*shape, 1), generator=random),
        "depth_conf": 1 + torch.rand(shape, generator=random),
        "world_points": torch.rand((*shape, 3), generator=random),
        "world_points_conf": 1 + torch.rand(shape, generator=random),
    }
    outputs["pose_enc_list"] = [torch.rand((scenes, 3, 9), generator=random) for _ in range(4)]
    return outputs, batch


def leaves(outputs: dict) -> list[torch.Tensor]:
    """The tensors of the predictions, set to collect fresh gradients."""
    tensors = [t for value in outputs.values() for t in (value if isinstance(value, list) else [value])]
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_()
    return tensors


CONFIGS = {
    "default": LossConfig(),
    "points": LossConfig(point_conf=1, point_reg=1, point_grad=1),
    "official": LossConfig.official(point=True),
    "grad_conf": LossConfig(gradient="grad_conf", point_grad=1, point_gradient="normal_conf"),
    "scale": LossConfig(scale="base"),
}
KEEP = LossConfig(base_gradient=2, agreement=2, scale="base")


@pytest.mark.parametrize("name", CONFIGS)
def test_invalid_pixels_do_not_matter(name):
    outputs, batch = scene()
    config, wanted = CONFIGS[name], training_loss(outputs, batch, CONFIGS[name])
    hidden = ~batch["valid"]
    batch["depth"] = batch["depth"].masked_fill(hidden, float("nan"))
    if name != "grad_conf":
        outputs["depth"] = outputs["depth"].masked_fill(hidden[..., None], 1e6)
    tensors = leaves(outputs)
    result = training_loss(outputs, batch, config)
    assert {k: v.item() for k, v in result.terms.items()} == {k: v.item() for k, v in wanted.terms.items()}
    result.total.backward()
    assert (tensors[0].grad[..., 0][hidden] == 0).all() and (tensors[0].grad[..., 0][~hidden] != 0).any()


def test_confidence_on_invalid_pixels_is_rewarded_only_on_request():
    for everywhere in (False, True):
        outputs, batch = scene()
        leaves(outputs)
        config = LossConfig(camera=0, depth_conf=0, depth_reg=0, gradient="grad_conf", confidence_on_invalid=everywhere)
        training_loss(outputs, batch, config).total.backward()
        assert (outputs["depth_conf"].grad[~batch["valid"]] != 0).any() == everywhere


def test_weights():
    outputs, batch = scene()
    plain = training_loss(outputs, batch)
    random = torch.rand(batch["depth"].shape, generator=torch.Generator().manual_seed(3)) + 0.01
    ones, one, ten = (
        training_loss(outputs, batch | {"weight": w}) for w in (torch.ones_like(random), random, 10 * random)
    )
    for name, value in plain.terms.items():
        assert torch.equal(ones.terms[name], value)  # weights of 1 change no bit
        assert one.terms[name].item() == pytest.approx(ten.terms[name].item(), rel=1e-6)  # only their ratio matters
        # every depth term honours them, no camera term does
        assert (one.terms[name] != value) == name.startswith("depth_")
    half = batch["valid"] & (random > 0.5)
    dropped = training_loss(outputs, batch | {"weight": half.float()})
    masked = training_loss(outputs, batch | {"valid": half})
    assert dropped.total.item() == masked.total.item()
    assert dropped.counts["pixels_without_weight"] == int(batch["valid"].sum() - half.sum())


def test_a_target_without_trust_moves_no_term():
    outputs, batch = scene(0.9)
    # the filter looks at values, whatever their weight
    config = LossConfig(point_conf=1, point_reg=1, point_grad=1, quantile=0)
    trust = torch.where(torch.arange(42) < 21, 1.0, 1e-9).expand(batch["depth"].shape)
    wrong = torch.where(trust < 1, batch["depth"] * 1.3, batch["depth"])
    sound, spoilt = (
        training_loss(outputs, batch | {"weight": trust, "depth": depth, "scale": 4.0}, config)
        for depth in (batch["depth"], wrong)
    )
    for name, value in sound.terms.items():
        assert spoilt.terms[name].item() == pytest.approx(value.item(), rel=2e-3), name


def test_a_pair_counts_as_its_worse_end():
    pred, truth, mask = torch.tensor([[[[0.0], [1.0]]]]), torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, dtype=torch.bool)
    assert difference_term(pred, truth, mask, trust=torch.tensor([[[1.0, 3.0]]]))[0].item() == pytest.approx(1 * 1 / 4)


def test_the_edges_of_the_base_are_held_everywhere_and_its_scale_nowhere():
    outputs, batch = scene()
    leaves(outputs)
    alone = {"camera": 0, "depth_conf": 0, "depth_reg": 1e-9, "depth_grad": 0}
    training_loss(outputs, batch, LossConfig(**alone, base_gradient=1)).total.backward()
    assert (outputs["depth"].grad[..., 0].abs() > 1e-9).float().mean() > 0.6  # a pixel between two others pulls evenly
    for factor in (0.3, 1.0, 5.0):
        scaled = {**outputs, "depth": batch["base_prediction"] * factor}
        kept = training_loss(scaled, batch, LossConfig(base_gradient=1))
        assert kept.terms["base_gradient"].item() == pytest.approx(0, abs=1e-5)
    bent = {**outputs, "depth": batch["base_prediction"] ** 1.5}
    assert training_loss(bent, batch, LossConfig(base_gradient=1)).terms["base_gradient"] > 0.01


def facing_a_wall(scenes: int = 2) -> tuple[dict, dict]:
    """Photos from three places, side by side, of a wall at depth 4: the exact depth as prediction, and the batch."""
    outputs, batch = scene(1.0, scenes)
    batch["world_to_cam"] = torch.eye(4).repeat(scenes, 3, 1, 1)
    batch["world_to_cam"][:, :, 0, 3] = torch.tensor([0.0, -0.8, 0.5])
    batch["world_to_cam"][:, :, 2, 3] = torch.tensor([0.0, 0.4, -0.6])  # steps towards the wall
    batch["depth"] = (4 + batch["world_to_cam"][:, :, 2, 3])[..., None, None].expand(batch["depth"].shape).clone()
    batch["base_prediction"] = batch["depth"] / 4
    return {**outputs, "depth": batch["depth"][..., None] / 4}, batch


def test_exact_depth_agrees_and_scaled_depth_does_not():
    outputs, batch = facing_a_wall()
    config = LossConfig(agreement=1, scale="base")
    exact = training_loss(outputs, batch, config)
    assert exact.terms["agreement"].item() == pytest.approx(0, abs=1e-6) and exact.counts["pixels_that_meet"] > 500
    for factor in (0.8, 1.25):
        scaled = training_loss({**outputs, "depth": outputs["depth"] * factor}, batch, config)
        assert scaled.terms["agreement"].item() > 0.02
    # the scene's own unit does not matter
    larger = batch | {"depth": batch["depth"] * 7, "world_to_cam": batch["world_to_cam"].clone(), "metric": False}
    larger["world_to_cam"][..., :3, 3] *= 7
    assert training_loss(outputs, larger, config).terms["agreement"].item() == pytest.approx(0, abs=1e-6)


def test_a_step_along_the_gradient_makes_photos_agree():
    outputs, batch = facing_a_wall()
    wrong = outputs["depth"].clone()
    wrong[:, 1] *= 1.1  # one photo of three is off
    config = LossConfig(camera=0, depth_conf=0, depth_reg=1e-9, depth_grad=0, agreement=1, scale="base")
    outputs = {**outputs, "depth": wrong.requires_grad_()}
    training_loss(outputs, batch, config).total.backward()
    assert wrong.grad[:, 1].sum() > 0  # too far: descent brings it nearer
    # what is hidden from the other photos moves nothing
    hiding = outputs["depth"].detach().clone()
    hiding[:, 1] = 0.3
    hiding.requires_grad_()
    training_loss({**outputs, "depth": hiding}, batch, config).total.backward()
    assert (hiding.grad[:, 1].abs() < 1e-9).all() and (hiding.grad[:, 0].abs() > 1e-9).any()


def test_photos_without_length_or_cameras_need_not_agree():
    outputs, batch = facing_a_wall()
    outputs["depth"] = outputs["depth"] * 1.25
    config = LossConfig(agreement=1, scale="base")
    both = training_loss(outputs, batch, config).counts["pixels_that_meet"]
    for name, value in (("valid", False), ("world_to_cam", torch.nan), ("K", torch.nan)):
        damaged = batch | {name: batch[name].clone()}
        damaged[name][0] = value
        tensors = leaves(outputs)
        result = training_loss(outputs, damaged, config)
        result.total.backward()
        assert 0 < result.counts["pixels_that_meet"] < both
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in tensors)
        damaged[name][:] = value
        assert "agreement" in training_loss(outputs, damaged, config).left_out


def test_the_unit_of_the_base_does_not_depend_on_what_supervises():
    outputs, batch = scene(1.0)
    batch["depth"] = batch["base_prediction"] * 7  # the base is right, in another unit
    near = batch["valid"] & (batch["depth"] < 7)
    for valid in (batch["valid"], near, batch["valid"] & ~near):
        truth, _ = prepare_batch(batch | {"valid": valid}, LossConfig(scale="base"))
        assert truth["scale"].tolist() == pytest.approx([7, 7], rel=1e-5)
    lengths = [
        prepare_batch(batch | {"valid": valid}, LossConfig())[0]["scale"][0].item()
        for valid in (near, batch["valid"] & ~near)
    ]
    assert lengths[1] > 1.3 * lengths[0]  # the mean distance of the points does


def test_unit_of_the_scene_does_not_matter():
    outputs, batch = scene()
    batch["metric"] = False
    wanted = training_loss(outputs, batch).total.item()
    larger = batch | {"depth": batch["depth"] * 50, "world_to_cam": batch["world_to_cam"].clone()}
    larger["world_to_cam"][..., :3, 3] *= 50
    assert training_loss(outputs, larger).total.item() == pytest.approx(wanted, rel=1e-4)
    assert training_loss(outputs, larger | {"metric": True}).counts["pixels_out_of_range"] == int(batch["valid"].sum())
    assert training_loss(outputs, larger | {"metric": [True, False]}).counts["pixels_out_of_range"] == int(
        batch["valid"][0].sum()
    )
    assert training_loss(outputs, larger | {"metric": True}, LossConfig.official()).counts["pixels_out_of_range"] == 0


def test_what_is_left_out_is_counted():
    outputs, batch = scene()
    batch["valid"][0, 0] = False  # a first frame without depth
    batch["valid"][1] = False  # a scene without depth
    default, strict = training_loss(outputs, batch), training_loss(outputs, batch, LossConfig.official())
    assert default.counts["frames_without_depth"] == 4 and default.counts["frames"] == 6
    assert (default.counts["scenes_with_camera"], default.counts["scenes_without_camera"]) == (1, 1)
    assert (strict.counts["scenes_with_camera"], set(strict.left_out)) == (0, {"camera"})
    assert strict.counts["terms_left_out"] == 1 and default.counts["terms_left_out"] == 0
    assert all(isinstance(count, int) for count in default.counts.values())


def test_isolated_pixels_leave_the_gradient_term_out():
    outputs, batch = scene()
    batch["valid"] = torch.zeros_like(batch["valid"])
    batch["valid"][:, :, 1::9, 1::9] = True  # no two are neighbours at stride 1, 2, 4 or 8
    batch["depth"] = torch.full_like(batch["depth"], 5.0)
    result = training_loss(outputs, batch)
    assert result.counts["depth_gradient_pairs"] == 0 and set(result.left_out) == {"depth_grad"}
    assert result.terms["depth_grad"].item() == 0 and result.terms["depth_reg"].item() > 0


@pytest.mark.parametrize("config", [*CONFIGS.values(), KEEP], ids=[*CONFIGS, "keep"])
@pytest.mark.parametrize(
    "damage",
    [
        "nothing valid", "one pixel", "one frame", "depth nan", "depth inf", "depth 0", "depth negative", "poses nan",
        "poses inf", "K nan", "weight 0", "weight nan", "size 1x1",
    ],
)
def test_degenerate_input_gives_finite_numbers(damage, config):
    outputs, batch = scene(size=(1, 1) if damage == "size 1x1" else (28, 42))
    kind, _, value = damage.partition(" ")
    if damage == "nothing valid":
        batch["valid"] = torch.zeros_like(batch["valid"])
    elif damage == "one pixel":
        batch["valid"] = batch["valid"] & (batch["valid"].flatten().cumsum(0).view_as(batch["valid"]) == 1)
    elif damage == "one frame":
        batch["valid"][:, 1:] = False
    elif kind == "depth":
        batch["depth"] = -batch["depth"] if value == "negative" else torch.full_like(batch["depth"], float(value))
    elif kind == "weight":
        batch["weight"] = torch.full_like(batch["depth"], float(value))
    elif kind in ("poses", "K"):
        batch["K" if kind == "K" else "world_to_cam"][0, 1] = float(value)
    tensors = leaves(outputs)
    result = training_loss(outputs, batch, config)
    result.total.backward()
    assert result.total.isfinite() and all(term.isfinite() for term in result.terms.values())
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors)
    assert outputs["depth"].grad is not None and outputs["pose_enc_list"][0].grad is not None  # the graph stays whole
    assert bool(result.left_out) or damage in ("one frame", "poses nan", "poses inf", "K nan")
    if kind in ("poses", "K"):
        assert result.counts["scenes_with_broken_cameras"] == 1 and result.counts["scenes_with_camera"] == 1


def test_half_precision_predictions_are_computed_in_float32():
    outputs, batch = scene()
    halved = {name: [t.bfloat16() for t in v] if isinstance(v, list) else v.bfloat16() for name, v in outputs.items()}
    widened = {name: [t.float() for t in v] if isinstance(v, list) else v.float() for name, v in halved.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = training_loss(halved, batch)
    assert result.total.dtype == torch.float32
    assert result.total.item() == training_loss(widened, batch).total.item()


def test_nonfinite_predictions_are_counted():
    outputs, batch = scene()
    outputs["depth"][batch["valid"].nonzero()[0].split(1)] = float("nan")
    outputs["pose_enc_list"][2][0, 0, 0] = float("inf")
    counts = training_loss(outputs, batch).counts
    assert (counts["depth_nonfinite_pixels"], counts["nonfinite_poses"]) == (1, 1)
