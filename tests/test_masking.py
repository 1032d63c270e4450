import numpy as np
import pytest
import torch

from ijepa.masking import MaskConfig, sample_masks

CPU = torch.device("cpu")
DEFAULT = MaskConfig()
SMALL = MaskConfig(num_targets=2, context_patches=6)


def draw(config, grid_size, batch_size, seed=0):
    return sample_masks(config, grid_size, batch_size, seed, CPU)


def all_blocks(height, width, grid_size):
    """Every placement of a block, as the row-major tuple of its patch indices."""
    return {
        tuple((top + i) * grid_size + left + j for i in range(height) for j in range(width))
        for top in range(grid_size - height + 1)
        for left in range(grid_size - width + 1)
    }


def assert_disjoint(masks, num_patches):
    """Contexts are sorted patches of the grid, without repeats, and none of a target."""
    for context, blocks in zip(masks.context.tolist(), masks.targets.tolist(), strict=True):
        assert sorted({*context} & {*range(num_patches)}) == context
        assert not set(context) & {patch for block in blocks for patch in block}


@pytest.mark.parametrize(("config", "grid_size"), [(SMALL, 4), (DEFAULT, 8)])
def test_every_block_occurs_as_a_target_and_no_context_touches_its_own(config, grid_size):
    ranges = (config.target_scale, config.target_aspect)
    area, aspect = np.meshgrid(*(np.linspace(*ends, 200) for ends in ranges))  # a fine sweep
    sides = grid_size * np.sqrt([area * aspect, area / aspect]).reshape(2, -1)
    shapes = {*zip(*sides.round().astype(int).clip(1, grid_size), strict=True)}
    allowed = {block for shape in shapes for block in all_blocks(*shape, grid_size)}
    seen = set()
    for seed in range(500):  # 4 x 4 blocks come once in a hundred batches
        masks = draw(config, grid_size, 32, seed)
        assert masks.context.shape == (32, config.context_patches)
        assert masks.targets.shape[:2] == (32, config.num_targets)
        assert_disjoint(masks, grid_size**2)
        relative = masks.targets - masks.targets[..., :1]
        assert (relative == relative[0, 0]).all()  # one shape for all
        for image in masks.targets.tolist():
            seen.update(map(tuple, image))
    assert seen == allowed


def test_context_stays_in_its_large_block_while_enough_patches_are_left_there():
    # Half of the 64 patches and tiny targets: the block always holds ten free patches.
    config = MaskConfig(2, (0.02, 0.03), (1.0, 1.0), (0.5, 0.5), 10)
    for context in draw(config, 8, 300).context:
        rows, columns = context // 8, context % 8
        assert rows.max() - rows.min() < 6  # the side of the block is round(sqrt(32)) = 6
        assert columns.max() - columns.min() < 6


def test_context_fills_up_outside_a_block_that_is_too_small():
    config = MaskConfig(1, (0.02, 0.03), (1.0, 1.0), (0.1, 0.1), 30)
    for context in draw(config, 8, 50).context.tolist():
        assert len(set(context)) == 30
        # One of the 3 x 3 blocks is seen whole, but for the one target patch that it may hold.
        assert max(len(set(context) & set(block)) for block in all_blocks(3, 3, 8)) >= 8


def test_context_is_not_cut_in_raster_order():
    rows = draw(DEFAULT, 8, 2000).context // 8
    share = torch.bincount(rows.flatten(), minlength=8) / rows.numel()
    assert (share > 0.05).all()  # even would be 0.125; raster order leaves the last rows empty
    torch.testing.assert_close(share, share.flip(0), atol=0.01, rtol=0)


def test_crowded_images_alone_stack_their_blocks_until_the_context_fits():
    sizes = ((0.25, 0.25), (1.0, 1.0), (1.0, 1.0))
    # Four blocks of 4 x 4 cover up to 64 patches; some images have room for their context.
    masks = draw(MaskConfig(4, *sizes, 36), 8, 500)
    # The same draws with a context that always fits show where the blocks were before any move.
    original = draw(MaskConfig(4, *sizes, 1), 8, 500).targets
    for after, before in zip(masks.targets.tolist(), original.tolist(), strict=True):
        covered = {patch for block in before for patch in block}
        assert (after == before) == (64 - len(covered) >= 36)
    distinct = {len({tuple(block) for block in image}) for image in masks.targets.tolist()}
    assert distinct == {1, 2, 3, 4}
    assert_disjoint(masks, 64)


@pytest.mark.parametrize("seed", range(2))
def test_one_context_patch_too_many_is_a_value_error_and_one_less_is_not(seed):
    sizes = ((0.25, 0.25), (1.0, 1.0), (1.0, 1.0))
    assert draw(MaskConfig(4, *sizes, 12), 4, 9, seed).context.shape == (9, 12)
    with pytest.raises(ValueError, match=r"4 x 4 grid with a 2 x 2 .* fewer than 13 context"):
        draw(MaskConfig(4, *sizes, 13), 4, 9, seed)
