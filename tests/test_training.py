import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa.masking import MaskConfig, sample_masks
from ijepa.model import PredictorConfig
from ijepa.training import (
    TrainConfig,
    color_jitter,
    crop_and_flip,
    derive_seed,
    ema_momentum,
    embed,
    epoch_order,
    evaluate,
    init_state,
    learning_rate,
    prediction_loss,
    spread_loss,
    standardize,
    train,
    train_step,
    update_target,
    weight_decay,
)

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture
def config(tiny_vit):
    """Three updates per epoch on the ten images of `images`, one of which is left out."""
    return TrainConfig(
        epochs=3,
        batch_size=3,
        lr=2e-3,
        warmup_share=0.2,
        ema_start=0.9,
        ema_window=5.0,
        vit=tiny_vit,
        predictor=PredictorConfig(embed_dim=8, depth=1, num_heads=2),
    )


@pytest.fixture
def images():
    return make_images(10)


def make_images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_bit_for_bit(first, second):
    """Compare nested plain data; NaN would not equal itself, which is right here."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal_bit_for_bit(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal_bit_for_bit(one, other)
    else:
        assert first == second


# --- schedules


def test_the_learning_rate_warms_up_and_then_follows_half_a_cosine():
    config = TrainConfig(lr=2.0, warmup_share=0.05, final_lr_share=0.01)
    rate = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rate[0] == pytest.approx(2.0 / 50)
    assert rate[24] == pytest.approx(1.0)
    assert rate[49] == rate[50] == 2.0
    assert rate[525] == pytest.approx((2.0 + 0.02) / 2)  # half way down
    assert rate[999] == pytest.approx(0.02 + 1.98 * math.sin(math.pi / 950 / 2) ** 2)
    np.testing.assert_allclose(np.diff(rate[:50]), 2.0 / 50)
    assert (np.diff(rate[50:]) < 0).all()


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 30, 33])
def test_the_learning_rate_stays_within_its_range_in_runs_of_any_length(total_steps):
    config = TrainConfig(lr=1.0)
    rate = [learning_rate(config, step, total_steps) for step in range(total_steps)]
    assert all(0.01 < value <= 1.0 for value in rate)
    assert max(rate) == 1.0


def test_weight_decay_follows_half_a_cosine_between_its_two_values():
    config = TrainConfig(weight_decay=(0.04, 0.4))
    assert weight_decay(config, 0, 100) == pytest.approx(0.04)
    assert weight_decay(config, 25, 100) == pytest.approx(0.22 - 0.18 * math.sqrt(0.5))
    assert weight_decay(config, 50, 100) == pytest.approx(0.22)
    assert weight_decay(config, 99, 100) == pytest.approx(0.4 - 0.36 * math.sin(math.pi / 200) ** 2)


def test_momentum_rises_linearly_to_a_memory_that_is_a_share_of_the_run():
    config = TrainConfig(ema_start=0.99, ema_window=0.05)
    total = 100_000  # a memory of 5,000 steps at the end
    values = [ema_momentum(config, step, total) for step in (0, 25_000, 50_000, 99_999)]
    slope = (1 - 1 / 5_000 - 0.99) / total
    expected = [0.99, 0.99 + 25_000 * slope, 0.99 + 50_000 * slope, 0.99 + 99_999 * slope]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize(("total_steps", "last"), [(10, 0.99), (1, 0.99), (10_000_000, 0.9999)])
def test_momentum_never_falls_and_never_passes_its_limit(total_steps, last):
    config = TrainConfig()
    assert ema_momentum(config, 0, total_steps) == 0.99
    assert ema_momentum(config, total_steps - 1, total_steps) == pytest.approx(last, abs=1e-8)


# --- the moving average


def test_the_target_is_the_closed_form_of_the_moving_average(config):
    state = init_state(config, CPU)
    start = {name: value.clone() for name, value in state.target_encoder.named_parameters()}
    with torch.no_grad():
        for parameter in state.context_encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator()))
    for _ in range(20):
        update_target(state.target_encoder, state.context_encoder, 0.9)
    current = dict(state.context_encoder.named_parameters())
    for name, averaged in state.target_encoder.named_parameters():
        expected = 0.9**20 * start[name] + (1 - 0.9**20) * current[name]
        torch.testing.assert_close(averaged, expected, atol=1e-6, rtol=1e-5)


def test_a_step_moves_the_target_towards_the_context_as_it_is_after_the_step(config, images):
    config = dataclasses.replace(config, ema_start=0.75)
    state = init_state(config, CPU)
    before = {name: value.clone() for name, value in state.target_encoder.named_parameters()}
    train_step(state, config, images[:4], 9, FLOAT)
    for name, averaged in state.target_encoder.named_parameters():
        current = state.context_encoder.get_parameter(name)
        torch.testing.assert_close(averaged, 0.75 * before[name] + 0.25 * current)
        assert name.endswith("bias") or not torch.equal(averaged, before[name])


def test_no_gradient_reaches_the_target_encoder_and_all_others_get_one(config, images):
    state = init_state(config, CPU)
    train_step(state, config, images[:4], 9, FLOAT)
    assert all(p.grad is None and not p.requires_grad for p in state.target_encoder.parameters())
    for network in (state.context_encoder, state.predictor):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


# --- the losses


def test_the_loss_is_smooth_l1_on_tokens_gathered_by_hand(config, images):
    state = init_state(config, CPU)
    with torch.no_grad():
        networks = (state.context_encoder, state.target_encoder, state.predictor)
        for parameter in [parameter for one in networks for parameter in one.parameters()]:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator()))
    context_view = standardize(images[:3].float() / 255)
    target_view = context_view.flip(3)
    masks = sample_masks(config.mask, 8, 3, 0, CPU)
    loss, context = prediction_loss(state, context_view, target_view, masks)

    expected = []
    for image in range(3):
        with torch.no_grad():
            tokens = state.target_encoder(target_view[image : image + 1])[0]
            tokens = (tokens - tokens.mean(1, keepdim=True)) / torch.sqrt(
                tokens.var(1, correction=0, keepdim=True) + 1e-5
            )
            visible = state.context_encoder(
                context_view[image : image + 1], masks.context[image : image + 1]
            )
        torch.testing.assert_close(context[image : image + 1], visible, atol=1e-5, rtol=0)
        for block in masks.targets[image]:
            predicted = state.predictor(
                visible, masks.context[image : image + 1], block[None, None]
            )[0, 0]
            for prediction, patch in zip(predicted, block.tolist(), strict=True):
                expected.append(F.smooth_l1_loss(prediction, tokens[patch]).item())
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert loss.item() > 0.1


@pytest.mark.parametrize(("n", "d", "scale"), [(40, 6, 0.3), (5, 12, 2.0)])
def test_the_spread_loss_equals_numpy_covariances(n, d, scale):
    rng = np.random.default_rng(0)
    embeddings = (scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d + 7).astype("f4")
    covariance = np.cov(embeddings.T.astype(float))
    hinge = sum(max(0.0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(d)) / d
    together = sum(covariance[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    ours = spread_loss(torch.from_numpy(embeddings)).item()
    assert ours == pytest.approx(hinge + 0.04 * together, rel=1e-4)


def test_the_spread_loss_is_nothing_for_independent_dimensions_of_unit_deviation():
    axes = torch.eye(4) * math.sqrt(7) * 1.001
    assert spread_loss(torch.cat([axes, -axes]) / math.sqrt(2)).item() == pytest.approx(0, abs=1e-3)


def test_the_spread_loss_of_one_image_is_finite_with_a_finite_gradient():
    embedding = torch.randn(1, 5, requires_grad=True)
    loss = spread_loss(embedding)
    loss.backward()
    assert loss.item() == pytest.approx(1 - 0.01)
    assert embedding.grad.isfinite().all()


# --- augmentation


def test_crops_and_flips_are_those_of_a_loop_over_every_position():
    pad, size = 1, 6
    image = torch.arange(1, 3 * size**2 + 1, dtype=torch.uint8).reshape(3, size, size)
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    candidates = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + size, left : left + size]
            candidates[crop.tobytes()] = (top, left, False)
            candidates[crop[..., ::-1].tobytes()] = (top, left, True)
    seen = crop_and_flip(image.expand(3600, -1, -1, -1), pad, generator())
    assert seen.dtype == torch.uint8
    drawn = [candidates[one.contiguous().numpy().tobytes()] for one in seen]  # KeyError: none fits
    counts = np.unique(np.array(drawn, dtype=int), axis=0, return_counts=True)[1]
    assert len(counts) == 18
    assert (abs(counts - 200) < 5 * math.sqrt(200)).all()


def test_images_of_a_batch_keep_their_places(images):
    seen = crop_and_flip(images, 0, generator())
    flipped = 0
    for before, after in zip(images, seen, strict=True):
        turned = torch.equal(after, before.flip(2))
        assert turned or torch.equal(after, before)
        flipped += turned
    assert 0 < flipped < len(images)


def test_jitter_of_strength_zero_is_the_identity(images):
    view = images.float() / 255
    assert torch.equal(color_jitter(view, 0.0, generator()), view)


def test_jitter_equals_a_loop_with_the_same_factors(images):
    view = images.float() / 255
    seen = color_jitter(view, 0.4, generator(5)).numpy()
    factors = (1 + 0.4 * (2 * torch.rand(3, 10, 1, 1, 1, generator=generator(5)) - 1)).squeeze()
    for row, (brightness, contrast, saturation) in enumerate(factors.T.tolist()):
        expected = view[row].numpy().astype(float) * brightness
        expected = expected.mean() + contrast * (expected - expected.mean())
        grey = expected.mean(axis=0)
        expected = np.clip(grey + saturation * (expected - grey), 0, 1)
        np.testing.assert_allclose(seen[row], expected, atol=1e-5)


def test_jitter_leaves_grey_images_grey_and_differs_between_images():
    grey = torch.linspace(0.2, 0.6, 64).reshape(1, 1, 8, 8).expand(5, 3, -1, -1)
    seen = color_jitter(grey, 0.4, generator())
    torch.testing.assert_close(seen[:, 0], seen[:, 1])
    torch.testing.assert_close(seen[:, 0], seen[:, 2])
    assert len({round(one.mean().item(), 4) for one in seen}) == 5


def test_standardizing_maps_black_to_minus_one_and_white_to_one():
    ends = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    assert standardize(ends).flatten().tolist() == [-1.0, 0.0, 1.0]


# --- one update


def test_gradients_are_clipped_per_network(config, images):
    config = dataclasses.replace(config, clip_norm=1e-3)
    state = init_state(config, CPU)
    train_step(state, config, images[:4], 9, FLOAT)
    for network in (state.context_encoder, state.predictor):
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_weights_decay_on_matrices_alone(config):
    state = init_state(config, CPU)
    decaying, fixed = state.optimizer.param_groups
    assert fixed["weight_decay"] == 0.0
    networks = (state.context_encoder, state.predictor)
    for name, parameter in [pair for one in networks for pair in one.named_parameters()]:
        is_vector = name.endswith("bias") or "norm" in name
        assert any(parameter is p for p in (fixed if is_vector else decaying)["params"]), name


def test_an_update_uses_the_rate_and_decay_of_its_step(config, images):
    state = init_state(config, CPU)
    state.step = 4
    train_step(state, config, images[:4], 9, FLOAT)
    decaying, fixed = state.optimizer.param_groups
    assert decaying["lr"] == fixed["lr"] == learning_rate(config, 4, 9)
    assert decaying["weight_decay"] == weight_decay(config, 4, 9)
    assert fixed["weight_decay"] == 0.0
    assert state.step == 5


def test_the_first_update_of_adam_moves_each_weight_by_the_rate_and_the_decay(config, images):
    # AdamW's first update is lr * (sign of the gradient + decay * weight), where the gradient is
    # far above epsilon (Kingma and Ba 2015, section 2.1; Loshchilov and Hutter 2019, algorithm 2).
    state = init_state(config, CPU)
    weight = state.context_encoder.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    train_step(state, config, images[:4], 9, FLOAT)
    rate, decay = learning_rate(config, 0, 9), weight_decay(config, 0, 9)
    large = weight.grad.abs() > 1e-5
    expected = before * (1 - rate * decay) - rate * weight.grad.sign()
    assert large.sum() > 100
    torch.testing.assert_close(weight[large], expected[large], atol=rate * 2e-3, rtol=0)


def test_bfloat16_gives_nearly_the_loss_of_float32(config, images):
    losses = [
        train_step(init_state(config, CPU), config, images[:4], 9, dtype).item()
        for dtype in (FLOAT, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


# --- whole runs


def test_one_batch_is_learned_by_heart(config, images):
    config = dataclasses.replace(
        config,
        epochs=150,
        batch_size=4,
        lr=5e-3,
        weight_decay=(0.0, 0.0),
        spread_weight=0.0,
        predictor=PredictorConfig(embed_dim=16, depth=1, num_heads=2),
    )
    logs = list(train(init_state(config, CPU), config, images[:4], FLOAT))
    assert logs[-1].mean_loss < logs[0].mean_loss / 2


def test_a_run_is_a_loop_of_updates_over_shuffled_batches(config, images):
    state, by_hand = init_state(config, CPU), init_state(config, CPU)
    logs = list(train(state, config, images, FLOAT))
    losses = []
    for epoch in range(3):
        order = epoch_order(config.seed, epoch, 10)
        for first in (0, 3, 6):
            batch = images[order[first : first + 3]]
            losses.append(train_step(by_hand, config, batch, 9, FLOAT).item())
    by_hand.loss_sum = state.loss_sum
    assert_equal_bit_for_bit(state.state_dict(), by_hand.state_dict())
    assert [log.step for log in logs] == list(range(1, 10))
    assert [log.epoch for log in logs] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [log.end_of_epoch for log in logs] == [False, False, True] * 3
    for number, log in enumerate(logs):
        since = 3 * (number // 3)
        assert log.mean_loss == pytest.approx(np.mean(losses[since : number + 1]), rel=1e-12)
        assert log.lr == learning_rate(config, number, 9)
        assert log.momentum == ema_momentum(config, number, 9)
        assert log.weight_decay == weight_decay(config, number, 9)


def test_epochs_see_every_image_once_in_orders_of_their_own():
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[0] == epoch_order(0, 0, 50).tolist()


def test_seeds_differ_between_steps_runs_and_uses():
    paths = [(run, step) for run in range(20) for step in range(50)]
    paths += [(run, epoch, 1) for run in range(20) for epoch in range(50)]
    seeds = {derive_seed(*path) for path in paths}
    assert len(seeds) == len(paths)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) > 2**60


def test_two_runs_are_equal_bit_for_bit_whatever_the_global_seed(config, images):
    states, logs = [], []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        states.append(init_state(config, CPU))
        logs.append(list(train(states[-1], config, images, FLOAT)))
        assert torch.equal(torch.get_rng_state(), before)
    assert logs[0] == logs[1]
    assert_equal_bit_for_bit(states[0].state_dict(), states[1].state_dict())


@pytest.mark.parametrize("stops", [(3,), (1,), (4, 5), (8,), (9,)])
def test_a_stopped_and_resumed_run_is_the_undisturbed_run_bit_for_bit(config, images, stops):
    straight = init_state(config, CPU)
    expected = list(train(straight, config, images, FLOAT))

    logs, saved = [], None
    for stop in (*stops, None):
        state = init_state(config, CPU)
        if saved is not None:
            state.load_state_dict(saved)
        for log in train(state, config, images, FLOAT):
            logs.append(log)
            if log.step == stop:
                break
        saved = through_a_file(state.state_dict())
    assert logs == expected
    assert_equal_bit_for_bit(saved, through_a_file(straight.state_dict()))


FIELDS = {
    "epochs": 4,
    "batch_size": 4,
    "lr": 1e-3,
    "warmup_share": 0.5,
    "final_lr_share": 0.5,
    "weight_decay": (0.1, 0.4),
    "ema_start": 0.8,
    "ema_window": 200.0,
    "clip_norm": 0.01,
    "pad": 2,
    "jitter": 0.1,
    "spread_weight": 0.5,
    "seed": 1,
    "predictor": PredictorConfig(embed_dim=8, depth=2, num_heads=2),
    "mask": MaskConfig(context_patches=19),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_changes_the_run(config, images, name):
    assert FIELDS.keys() | {"vit"} == {one.name for one in dataclasses.fields(TrainConfig)}
    states = []
    for one in (config, dataclasses.replace(config, **{name: FIELDS[name]})):
        states.append(init_state(one, CPU))
        list(train(states[-1], one, images, FLOAT))
    weights = [state.target_encoder.patch_embed.proj.weight for state in states]
    assert not torch.equal(*weights)


def test_the_target_starts_as_a_copy_with_weights_by_the_seed(config):
    first, again = init_state(config, CPU), init_state(config, CPU)
    other = init_state(dataclasses.replace(config, seed=1), CPU)
    assert_equal_bit_for_bit(first.state_dict(), again.state_dict())
    assert_equal_bit_for_bit(first.context_encoder.state_dict(), first.target_encoder.state_dict())
    weights = [state.context_encoder.patch_embed.proj.weight for state in (first, other)]
    assert not torch.equal(*weights)
    assert weights[0].data_ptr() != first.target_encoder.patch_embed.proj.weight.data_ptr()


def test_a_batch_larger_than_the_data_is_a_value_error(config, images):
    with pytest.raises(ValueError, match="batch_size 3 exceeds the 2 images"):
        next(train(init_state(config, CPU), config, images[:2], FLOAT))


def test_one_image_and_one_step_are_a_run(config, images):
    config = dataclasses.replace(config, epochs=1, batch_size=1)
    state = init_state(config, CPU)
    logs = list(train(state, config, images[:1], FLOAT))
    assert [(log.step, log.epoch, log.end_of_epoch) for log in logs] == [(1, 1, True)]
    assert all(parameter.isfinite().all() for parameter in state.context_encoder.parameters())


def test_a_finished_run_does_nothing(config, images):
    state = init_state(config, CPU)
    list(train(state, config, images, FLOAT))
    before = through_a_file(state.state_dict())
    assert list(train(state, config, images, FLOAT)) == []
    assert_equal_bit_for_bit(through_a_file(state.state_dict()), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(config, images, value):
    state = init_state(config, CPU)
    run = train(state, config, images, FLOAT)
    next(run)
    with torch.no_grad():
        state.predictor.predictor_proj.bias.fill_(value)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 1"):
        next(run)


# --- watching a run


def test_embeddings_are_the_mean_tokens_of_plain_images_one_by_one(config):
    encoder = init_state(config, CPU).target_encoder
    images = make_images(258)  # one batch of 256 and a rest
    embeddings = embed(encoder, images, FLOAT)
    assert embeddings.dtype == np.float32
    for row in (0, 255, 256, 257):
        tokens = encoder(images[row : row + 1].float() / 127.5 - 1)[0]
        np.testing.assert_allclose(embeddings[row], tokens.mean(dim=0), atol=1e-5)


def test_a_run_is_watched_by_the_embeddings_of_held_out_images(config):
    encoder = init_state(config, CPU).target_encoder
    images = make_images(30)
    images[::2] //= 8  # a dark and a bright class
    result = evaluate(encoder, images, np.arange(30) % 2, FLOAT)
    embeddings = embed(encoder, images, FLOAT)
    assert result["heldout_precision_at_5"] == 1.0
    assert result["target_std"] == pytest.approx(embeddings.std(axis=0).mean())
    assert 1 < result["effective_rank"] <= 16
    shuffled = evaluate(encoder, images, np.arange(30) // 2 % 2, FLOAT)
    assert shuffled["heldout_precision_at_5"] < 0.8
