"""Depth metrics against other people's code, and what must hold for any depth map."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_lora.core import ConfigError
from vggt_lora.evaluation.metrics import (
    ALIGNMENTS, ERRORS, FITTED_PIXELS, align_depth, depth_metrics, evaluate_frames, summarise,
)

SEEDS = st.integers(0, 2 ** 32 - 1)


def maps(seed: int, size: tuple[int, int] = (9, 14)):
    """A random truth with holes and a prediction that is wrong in scale, shift and detail."""
    random = np.random.default_rng(seed)
    truth = random.uniform(0.5, 30, size)
    valid = random.random(size) < random.uniform(0.1, 1)
    valid.flat[:FITTED_PIXELS] = True
    return 0.3 * truth * random.uniform(0.6, 1.6, size) + random.uniform(0, 2), truth, valid


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_errors_agree_with_torchmetrics(seed):
    import torch
    from torchmetrics.functional import mean_absolute_error, mean_absolute_percentage_error, mean_squared_error
    pred, truth, valid = maps(seed)
    ours = depth_metrics(pred, truth, valid)
    p, t = torch.from_numpy(pred[valid]), torch.from_numpy(truth[valid])
    assert ours["mae"] == pytest.approx(mean_absolute_error(p, t).item())
    assert ours["rmse"] == pytest.approx(mean_squared_error(p, t, squared=False).item())
    assert ours["absrel"] == pytest.approx(mean_absolute_percentage_error(p, t).item())
    assert ours["sqrel"] == pytest.approx((mean_squared_error(p / t.sqrt(), t.sqrt())).item())
    for k in (1, 2, 3):
        assert ours[f"d{k}"] == pytest.approx(((p / t).log().abs() < k * np.log(1.25)).double().mean().item())


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_least_squares_agrees_with_scipy(seed):
    from scipy.optimize import least_squares
    from scipy.stats import linregress
    pred, truth, valid = maps(seed)
    p, t = pred[valid], truth[valid]
    line, found = linregress(p, t), align_depth(pred, truth, valid, "scale+shift")[1]
    assert (found["scale"], found["shift"]) == pytest.approx((line.slope, line.intercept), rel=1e-9, abs=1e-9)
    best = least_squares(lambda s: s * p - t, x0=[1.0], xtol=1e-15, ftol=1e-15, gtol=1e-15).x[0]
    assert align_depth(pred, truth, valid, "scale")[1]["scale"] == pytest.approx(best, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(sorted(ALIGNMENTS)), st.floats(1e-3, 1e3))
def test_unit_of_the_prediction_does_not_matter_once_aligned(seed, how, unit):
    pred, truth, valid = maps(seed)
    here, there = (depth_metrics(align_depth(p, truth, valid, how)[0], truth, valid) for p in (pred, unit * pred))
    same = all(
        here[name] == pytest.approx(there[name], rel=1e-6, abs=1e-9) for name in ("mae", "rmse", "absrel", "sqrel")
    )
    assert same or how == "none"


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(sorted(ALIGNMENTS)), st.sampled_from([np.nan, np.inf, -np.inf, -5.0, 0.0, 1e9]))
def test_other_pixels_do_not_matter(seed, how, garbage):
    pred, truth, valid = maps(seed)
    aligned, found = align_depth(pred, truth, valid, how)
    bad_pred, bad_truth = np.where(valid, pred, garbage), np.where(valid, truth, garbage)
    with np.errstate(invalid="ignore"):
        aligned_too, found_too = align_depth(bad_pred, bad_truth, valid, how)
    assert found == found_too
    assert depth_metrics(aligned, truth, valid) == depth_metrics(aligned_too, bad_truth, valid)
    # marked valid, but without a truth: not counted either
    marked = valid | (np.arange(truth.size).reshape(truth.shape) % 2 == 0)
    if not garbage > 0 or not np.isfinite(garbage):
        assert depth_metrics(aligned, bad_truth, marked) == depth_metrics(aligned, truth, valid)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_more_freedom_never_gives_a_larger_squared_error(seed):
    pred, truth, valid = maps(seed)
    rmse = {how: depth_metrics(align_depth(pred, truth, valid, how)[0], truth, valid)["rmse"] for how in ALIGNMENTS}
    assert rmse["scale+shift"] <= rmse["scale"] * (1 + 1e-12) and rmse["scale"] <= min(rmse["median"], rmse["none"]) * (
        1 + 1e-12
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_small_types_are_computed_in_double(dtype):
    truth = np.full((200, 300), 50.0, dtype=dtype)
    pred = truth + dtype(0.5)
    numbers = depth_metrics(pred, truth, truth > 0)
    assert (numbers["mae"], numbers["pixels"]) == (0.5, 60000)
    assert align_depth(pred, truth, truth > 0, "scale")[1]["scale"] == pytest.approx(50 / 50.5)


def test_a_perfect_prediction():
    _, truth, valid = maps(5)
    for row in evaluate_frames([(truth, truth, valid, {})]):
        assert [row[name] for name in ERRORS] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1], abs=1e-12)


def test_a_negative_depth_fails_delta_and_is_counted():
    pred, truth = np.tile([1.0, 2.0, 3.0, 4.0], 3), np.tile([0.1, 0.1, 0.1, 8.0], 3)
    # by hand: 2.37 p - 3.85, so the nearest lies behind the camera
    aligned, found = align_depth(pred, truth, truth > 0, "scale+shift")
    assert (found["scale"], found["shift"]) == pytest.approx((2.37, -3.85))
    numbers = depth_metrics(aligned, truth, truth > 0)
    assert numbers["nonpositive"] == 3 and numbers["nonfinite"] == 0
    assert numbers["mae"] == pytest.approx((1.58 + 0.79 + 3.16 + 2.37) / 4)
    assert [numbers[f"d{k}"] for k in (1, 2, 3)] == [0, 0.25, 0.25]  # only 5.63 for 8 is near
    assert depth_metrics([-5.0], [5.0], [True])["d3"] == 0  # |p/t| would be a perfect ratio


def test_windows_share_one_alignment_and_rows_keep_their_order():
    random = np.random.default_rng(2)
    frames = []
    for number in range(6):
        truth = random.uniform(1, 9, (4, 5 + number))
        frames.append((truth * (number + 1), truth, truth > 2, {"frame": number, "sequence": number % 2}))
    rows = evaluate_frames(frames, ["scale", "median"], scope="sequence")
    assert [(row["frame"], row["alignment"]) for row in rows[:4]] == [
        (0, "scale per sequence"), (0, "median per sequence"), (1, "scale per sequence"), (1, "median per sequence"),
    ]
    for window in (0, 1):
        group = [row for row in rows if row["sequence"] == window and row["alignment"] == "scale per sequence"]
        mine = frames[window::2]
        p, t = (np.concatenate([f[i][f[2]] for f in mine]) for i in (0, 1))
        assert [row["scale"] for row in group] == pytest.approx([p @ t / (p @ p)] * 3)
        assert [row["alignment_pixels"] for row in group] == [len(p)] * 3
    alone = evaluate_frames(frames, ["scale"])
    assert [row["scale"] for row in alone] == pytest.approx([1 / (k + 1) for k in range(6)])
    assert {row["alignment"] for row in alone} == {"scale per image"}


def test_summary_keeps_alignments_apart_and_counts_frames():
    pred, truth, valid = maps(1)
    nowhere = np.zeros_like(valid)
    rows = evaluate_frames(
        [(pred, truth, valid, {}), (pred, truth, nowhere, {}), (np.full_like(pred, np.nan), truth, valid, {})]
    )
    table = {line["alignment"]: line for line in summarise(rows)}
    assert set(table) == {"none", "median per image", "scale per image", "scale+shift per image"}
    for line in table.values():
        assert (line["frames"], line["frames_left_out"], line["pixels"]) == (1, 2, 2 * valid.sum())
        assert line["nonfinite"] == (valid.sum())
        assert np.isfinite(line["mae"]) and line["mae"] == pytest.approx(line["mae_pixels"])


@pytest.mark.parametrize("how", sorted(ALIGNMENTS))
@pytest.mark.parametrize("pixels", [0, 1, 2, FITTED_PIXELS - 1, FITTED_PIXELS])
def test_a_fit_without_freedom_is_no_result(how, pixels):
    """One pixel can be scaled onto its truth, two can be shifted as well: such a frame would look perfect."""
    pred, truth, _ = maps(3)
    few = np.zeros(truth.shape, dtype=bool)
    few.flat[:pixels] = True
    measured = pixels >= (1 if how == "none" else FITTED_PIXELS)
    aligned, found = align_depth(pred, truth, few, how)
    assert found["pixels"] == pixels and np.isfinite([found["scale"], found["shift"]]).all() == (
        how == "none" and pixels > 0 or measured
    )
    assert np.isfinite(depth_metrics(aligned, truth, few)["absrel"]) == measured
    line, = summarise(evaluate_frames([(pred, truth, few, {}), (pred, truth, truth > 0, {})], [how]))
    assert (line["frames"], line["frames_left_out"]) == (1 + measured, 1 - measured)
    if measured:
        assert depth_metrics(aligned, truth, few)["absrel"] > 1e-3  # a real number, not a perfect one


def test_pixel_weighted_summary_is_that_of_all_pixels():
    frames = [maps(seed, (4, 6 + 5 * seed)) for seed in range(4)]
    line, = summarise(evaluate_frames([(*frame, {}) for frame in frames], ["none"]))
    pred, truth = (np.concatenate([frame[i][frame[2]] for frame in frames]) for i in (0, 1))
    together = depth_metrics(pred, truth, np.ones(len(pred), dtype=bool))
    assert [line[f"{name}_pixels"] for name in ERRORS] == pytest.approx([together[name] for name in ERRORS])


def test_unknown_names_list_the_choices():
    pred, truth, valid = maps(0)
    with pytest.raises(ConfigError, match="median, none, scale, scale\\+shift"):
        align_depth(pred, truth, valid, "affine")
    with pytest.raises(ConfigError, match="median, none, scale, scale\\+shift"):
        evaluate_frames([], ["affine"])
    with pytest.raises(ValueError, match="differ in shape"):
        align_depth(pred, truth.T, valid)
