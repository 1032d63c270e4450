import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa import training
from ijepa.masking import MaskConfig
from ijepa.model import PredictorConfig
from ijepa.training import RECIPES, TrainConfig, draw_views, learning_rate, train, train_step

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (10, 3, 32, 32), generator=RANDOM, dtype=torch.uint8)
# Other values than those of `config`.
FIELDS = {"epochs": 4, "batch_size": 4, "lr": 1e-3, "warmup_epochs": 2.0, "decay_share": 0.9}
FIELDS |= {"weight_decay": 0.5, "ema_start": 0.8, "ema_window": 200.0, "clip_norm": 0.01}
FIELDS |= {"min_crop": 0.9, "jitter": 0.1, "grey_share": 0.9, "num_views": 2, "seed": 1}
FIELDS |= {"matching_weight": 0.1, "temperature": 0.5, "last_temperature": 0.5}
FIELDS |= {"spread_weight": 0.5, "mask": MaskConfig(context_patches=19)}
FIELDS |= {"predictor": PredictorConfig(embed_dim=8, depth=2, num_heads=2)}


@pytest.fixture
def config(tiny_vit):
    """Three updates per epoch on the ten images, one of which is left out."""
    short = {"epochs": 3, "batch_size": 3, "warmup_epochs": 0.7, "decay_share": 0.4}
    fast = {"lr": 2e-3, "ema_start": 0.9, "ema_window": 5.0}
    predictor = PredictorConfig(embed_dim=8, depth=1, num_heads=2)
    return TrainConfig(**short, **fast, vit=tiny_vit, predictor=predictor)


def begin(config, dtype=torch.float32):
    return training.init_state(config, torch.device("cpu"), dtype)


@functools.cache
def undisturbed(config):
    """The end of a whole run on the ten images."""
    state = begin(config)
    list(train(state, config, IMAGES))
    return state.state_dict()


# Of nested plain data; NaN does not equal itself, which is right here.
assert_equal_bit_for_bit = functools.partial(torch.testing.assert_close, atol=0, rtol=0)


def test_the_learning_rate_rises_stays_and_falls():
    config = TrainConfig(lr=2.0, epochs=10, warmup_epochs=0.5, decay_share=0.2)
    rate = np.array([learning_rate(config, step, 100) for step in range(1000)])
    np.testing.assert_allclose(rate[:50], 2.0 * np.arange(1, 51) / 50)
    assert (rate[50:801] == 2.0).all()
    np.testing.assert_allclose(rate[801:], 2.0 * np.arange(199, 0, -1) / 200)
    assert training.decay_start(config, 100) == 800


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 1), (1, 2), (3, 1), (1, 7), (11, 3)])
def test_the_learning_rate_stays_within_its_range_in_runs_of_any_length(epochs, steps_per_epoch):
    config = TrainConfig(lr=1.0, epochs=epochs, warmup_epochs=1.0)
    rate = [learning_rate(config, at, steps_per_epoch) for at in range(epochs * steps_per_epoch)]
    assert 0 < min(rate) <= max(rate) <= 1.0
    assert max(rate) > 0.5


def test_a_run_that_begins_later_warms_up_again_and_falls_at_the_same_time():
    whole = TrainConfig(lr=1.0, epochs=10, warmup_epochs=2.0)
    rates = [[learning_rate(whole, step, 10, at) for step in range(30, 100)] for at in (0, 30)]
    np.testing.assert_allclose(rates[1][:20], np.arange(1, 21) / 20)
    assert rates[1][20:] == rates[0][20:]


def test_momentum_has_a_memory_that_is_a_share_of_the_updates_so_far():
    config = TrainConfig(ema_start=0.99, ema_window=0.05)
    values = [training.ema_momentum(config, step) for step in (0, 1_999, 3_999, 99_999, 10_000_000)]
    np.testing.assert_allclose(values, [0.99, 0.99, 0.995, 0.9998, 0.9999], rtol=1e-12)


def test_the_target_starts_as_a_copy_and_a_step_moves_it_towards_the_new_context(config):
    config = dataclasses.replace(config, ema_start=0.85)
    state = begin(config)
    assert_equal_bit_for_bit(state.context_encoder.state_dict(), state.target_encoder.state_dict())
    before = {name: value.clone() for name, value in state.target_encoder.named_parameters()}
    train_step(state, config, IMAGES[:4], 3)
    for name, averaged in state.target_encoder.named_parameters():
        current = state.context_encoder.get_parameter(name)
        torch.testing.assert_close(averaged, 0.85 * before[name] + 0.15 * current)
        assert name.endswith("bias") or not torch.equal(averaged, before[name])


@pytest.mark.parametrize(("num_views", "step"), [(3, 0), (3, 5), (1, 0)])
def test_the_losses_are_those_of_a_loop_over_patches(config, num_views, step):
    """The step 5 is in the decay."""
    weight = float(num_views > 1)
    config = dataclasses.replace(config, num_views=num_views, matching_weight=weight)
    state, generator = begin(config), torch.Generator().manual_seed(0)
    networks = (state.context_encoder, state.target_encoder, state.predictor)
    with torch.no_grad():
        for parameter in [parameter for one in networks for parameter in one.parameters()]:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    views = draw_views(config, IMAGES[:3], step, 3)
    losses = training.compute_losses(state, views, 0.3)

    errors, targets, means = [], [], []
    for pixels, context, further, blocks in zip(*views, strict=True):
        with torch.no_grad():
            tokens = state.target_encoder(pixels[:1])[0]
            seen = [
                state.context_encoder(view[None], visible[None])
                for view, visible in zip(pixels, [context, *further], strict=True)
            ]
        means.append(torch.cat([one.mean(dim=1) for one in seen]))
        targets.append(tokens.mean(dim=0))
        deviation = torch.sqrt(tokens.var(1, correction=0, keepdim=True) + 1e-5)
        normalized = (tokens - tokens.mean(1, keepdim=True)) / deviation
        for block in blocks:
            predicted = state.predictor(seen[0], context[None], block[None, None])[0, 0]
            for prediction, patch in zip(predicted, block.tolist(), strict=True):
                errors.append(F.smooth_l1_loss(prediction, normalized[patch]).item())
    assert losses.prediction.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert losses.prediction.item() > 0.1
    means, target = torch.stack(means, dim=1), torch.stack(targets)
    matching = sum(training.matching_loss(one, target, 0.3).item() / 2 for one in means[1:])
    pairs = itertools.permutations(means, 2)
    matching += sum(training.matching_loss(*pair, 0.3).item() / 6 for pair in pairs)
    assert losses.matching.item() == pytest.approx(matching, rel=1e-4)
    assert losses.spread.item() == pytest.approx(training.spread_loss(means[0]).item(), rel=1e-4)


def test_every_view_is_a_crop_and_colours_of_its_own_of_its_image(config):
    plain = dataclasses.replace(config, jitter=0.0, grey_share=0.0)
    jittered = dataclasses.replace(config, grey_share=0.5)
    views, colored = (draw_views(one, IMAGES, 5, 3) for one in (plain, jittered))
    for view, after in ((0, 1), (1, 2), (2, 0)):
        another_crop = (views.pixels[:, view] - views.pixels[:, after]).abs().mean()
        assert another_crop > 0.1
        # Of the same crop: what colours change is small beside what another crop changes.
        change = (colored.pixels[:, view] - views.pixels[:, view]).abs().mean()
        assert 0.05 < change < 0.8 * another_crop
        grey = (colored.pixels[:, view].std(dim=1) < 1e-6).flatten(1).all(dim=1)
        assert 0 < grey.sum() < len(IMAGES)
    colors = torch.arange(0, 240, 10, dtype=torch.uint8).reshape(8, 3, 1, 1)
    pixels = draw_views(plain, colors.expand(8, 3, 32, 32), 0, 3).pixels
    expected = (colors / 127.5 - 1)[:, None].expand(pixels.shape)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("step", "count"), [(4, 20), (5, 64)], ids=["at first", "in the decay"])
def test_views_show_patches_of_their_own_and_no_target(config, step, count):
    assert training.decay_start(config, 3) == 5
    views = draw_views(config, IMAGES, step, 3)
    assert views.context.shape == (len(IMAGES), 20)
    assert views.further.shape == (len(IMAGES), 2, count)
    for patches in (views.context, *views.further.unbind(dim=1)):
        assert all(row.unique().numel() == row.numel() and row.max() < 64 for row in patches)
    for context, blocks in zip(views.context, views.target_blocks, strict=True):
        assert not torch.isin(context, blocks).any()


def test_the_matching_loss_is_the_logarithm_of_a_share_of_similarities():
    queries, keys = np.random.default_rng(0).normal(size=(2, 5, 7))
    cosines = [[a @ b / np.sqrt(a @ a * (b @ b)) for b in keys] for a in queries]
    shares = np.exp(np.array(cosines) / 0.3)
    expected = -np.log(shares.diagonal() / shares.sum(axis=1)).mean()
    ours = training.matching_loss(torch.tensor(queries), torch.tensor(keys), 0.3)
    assert ours.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d", "scale"), [(40, 6, 0.3), (5, 12, 2.0)])
def test_the_spread_loss_equals_numpy_covariances(n, d, scale):
    rng = np.random.default_rng(0)
    embeddings = (scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d + 7).astype("f4")
    covariance = np.cov(embeddings.T.astype(float))
    hinge = sum(max(0.0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(d)) / d
    together = sum(covariance[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    ours = training.spread_loss(torch.from_numpy(embeddings)).item()
    assert ours == pytest.approx(hinge + 0.04 * together, rel=1e-4)


def test_matrices_go_to_muon_and_vectors_do_not_decay(config):
    state = begin(config)
    (muon,), (decaying, fixed) = state.muon.param_groups, state.adamw.param_groups
    networks = (state.context_encoder, state.predictor)
    named = {p: name for network in networks for name, p in network.named_parameters()}
    vectors = {p for p, name in named.items() if name.endswith("bias") or "norm" in name}
    first = {p for p, name in named.items() if name in ("patch_embed.proj.weight", "mask_token")}
    expected = ((muon, named.keys() - vectors - first), (decaying, first), (fixed, vectors))
    for group, members in expected:
        assert set(group["params"]) == members
        assert len(group["params"]) == len(members)


def test_an_update_clips_both_networks_together_and_uses_the_rate_of_its_step(config):
    config = dataclasses.replace(config, clip_norm=1e-3)
    state = begin(config)
    state.step = 7
    train_step(state, config, IMAGES[:4], 3)
    networks = (state.context_encoder, state.predictor)
    norms = [p.grad.norm() for network in networks for p in network.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)
    groups = [*state.muon.param_groups, *state.adamw.param_groups]
    assert [group["weight_decay"] for group in groups] == [config.weight_decay] * 2 + [0.0]
    for group in groups:
        assert group["lr"] == learning_rate(config, 7, 3) < config.lr
    assert state.step == 8


def test_the_first_update_of_adam_moves_each_weight_by_the_rate_and_the_decay(config):
    # AdamW's first update is lr * (sign of the gradient + decay * weight), where the gradient is
    # far above epsilon (Kingma and Ba 2015, section 2.1; Loshchilov and Hutter 2019, algorithm 2).
    state = begin(config)
    weight = state.context_encoder.patch_embed.proj.weight
    before = weight.detach().clone()
    train_step(state, config, IMAGES[:4], 3)
    rate, decay = learning_rate(config, 0, 3), config.weight_decay
    large = weight.grad.abs() > 1e-5
    expected = before * (1 - rate * decay) - rate * weight.grad.sign()
    assert large.sum() > 100
    torch.testing.assert_close(weight[large], expected[large], atol=rate * 2e-3, rtol=0)


def test_bfloat16_gives_nearly_the_loss_of_float32(config):
    exact, rounded = (
        train_step(begin(config, dtype), config, IMAGES[:4], 3)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, value in exact._asdict().items():
        assert getattr(rounded, name).item() == pytest.approx(value.item(), rel=0.02)
        assert getattr(rounded, name) != value


def test_the_paper_recipe_is_the_prediction_loss_of_one_view():
    config = dataclasses.replace(RECIPES["paper"], epochs=1, batch_size=4)
    views = draw_views(config, IMAGES[:4], 0, 2)
    assert views.pixels.shape == (4, 1, 3, 32, 32)
    assert views.target_blocks.shape[1] == 4
    state, other = begin(config), begin(config)
    train_step(state, config, IMAGES[:4], 2)
    # The predictor gets a gradient, and nothing but the prediction feeds the encoder's.
    training.compute_losses(other, views, 0.1).prediction.backward()
    networks = (other.context_encoder, other.predictor)
    parameters = [parameter for one in networks for parameter in one.parameters()]
    torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    gradients = (one.context_encoder.patch_embed.proj.weight.grad for one in (state, other))
    torch.testing.assert_close(*gradients)
    assert training.log_row(state, config, 10)["matching_loss"] is None


def test_a_run_is_a_loop_of_updates_over_shuffled_batches(config):
    state, by_hand = begin(config), begin(config)
    ends, rows, losses = [], [], []
    for ends_epoch in train(state, config, IMAGES):
        ends.append(ends_epoch)
        rows.append(training.log_row(state, config, 10))
    for epoch in range(3):
        order = training.epoch_order(config.seed, epoch, 10)
        for first in (0, 3, 6):
            batch = IMAGES[order[first : first + 3]]
            found = train_step(by_hand, config, batch, 3)
            losses.append((found.prediction.item(), found.matching.item()))
    by_hand.loss_sums = state.loss_sums
    assert_equal_bit_for_bit(state.state_dict(), by_hand.state_dict())
    assert ends == [False, False, True] * 3
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    for number, row in enumerate(rows):
        expected = np.mean(losses[3 * (number // 3) : number + 1], axis=0)
        np.testing.assert_allclose([row["loss"], row["matching_loss"]], expected, rtol=1e-6)
        assert row["lr"] == learning_rate(config, number, 3)
        assert row["momentum"] == training.ema_momentum(config, number)
        assert row["weight_decay"] == config.weight_decay


def test_epochs_see_every_image_once_in_orders_of_their_own():
    orders = [
        training.epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[0] == training.epoch_order(0, 0, 50).tolist()


def test_seeds_differ_between_steps_runs_and_uses():
    paths = [path for run in range(20) for i in range(50) for path in ((run, i), (run, i, 1))]
    seeds = {training.derive_seed(*path) for path in paths}
    assert len(seeds) == len(paths)
    assert 0 <= min(seeds) < 2**60 < max(seeds) < 2**62


@pytest.mark.parametrize("stops", [(1,), (4, 5), (9,)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(config, recipe, stops):
    names = ("num_views", "matching_weight", "spread_weight", "mask")
    changes = {name: getattr(RECIPES[recipe], name) for name in names}
    config = dataclasses.replace(config, **changes)
    saved, updates = None, 0
    before = torch.get_rng_state()
    for stop in (*stops, None):
        state = begin(config)
        if saved is not None:
            state.load_state_dict(saved)
        for _ in train(state, config, IMAGES):
            updates += 1
            if state.step == stop:
                break
        saved = state.state_dict()
    assert updates == 9
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_bit_for_bit(saved, undisturbed(config))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_changes_the_run(config, name):
    assert FIELDS.keys() | {"vit"} == {one.name for one in dataclasses.fields(TrainConfig)}
    runs = map(undisturbed, (config, dataclasses.replace(config, **{name: FIELDS[name]})))
    assert not torch.equal(*(run["target_encoder"]["patch_embed.proj.weight"] for run in runs))


def test_one_image_and_one_step_are_a_run(config):
    config = dataclasses.replace(config, epochs=1, batch_size=1)
    state = begin(config)
    assert list(train(state, config, IMAGES[:1])) == [True]
    assert all(parameter.isfinite().all() for parameter in state.context_encoder.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_the_epoch_is_logged(config, value):
    state = begin(config)
    run = train(state, config, IMAGES)
    next(run)
    training.check_finite(state)
    with torch.no_grad():
        state.predictor.predictor_proj.bias.fill_(value)
    next(run)
    with pytest.raises(FloatingPointError, match="no longer a number after 2 updates"):
        training.check_finite(state)
    with pytest.raises(FloatingPointError, match="no longer a number after 3 updates"):
        next(run)
