import math

import pytest
import torch
from transformers import IJepaConfig, IJepaModel

from ijepa import model
from ijepa.checkpoint import to_huggingface
from ijepa.model import Predictor, PredictorConfig, VisionTransformer, ViTConfig

VIT_B = ViTConfig(image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)


def shake(network):
    """Move every weight away from its start, biases and norms too, so that none can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(16, 8, 8, 1, 2),
        ViTConfig(24, 4, 32, 3, 4, mlp_ratio=2.0),
        ViTConfig(32, 8, 28, 1, 1, mlp_ratio=61 / 28),  # times 28 it is less than 61
        ViTConfig(),
        pytest.param(VIT_B, marks=pytest.mark.slow),
    ],
    ids=["tiny", "narrow mlp", "odd mlp", "default", "ViT-B/16"],
)
def test_outputs_equal_huggingface_with_the_same_weights(config):
    torch.manual_seed(0)
    ours = VisionTransformer(config).eval()
    with torch.no_grad():  # biases start at 0 and norms at 1: a swap of two would not show
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    sizes = {"hidden_size": config.embed_dim, "num_hidden_layers": config.depth}
    sizes |= {"num_attention_heads": config.num_heads, "layer_norm_eps": model.LAYER_NORM_EPS}
    sizes |= {"intermediate_size": round(config.mlp_ratio * config.embed_dim)}
    sizes |= {"image_size": config.image_size, "patch_size": config.patch_size}
    theirs = IJepaModel.from_pretrained(
        None,
        config=IJepaConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        state_dict=to_huggingface(ours.state_dict()),
        add_pooling_layer=False,
    ).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)
    with torch.inference_mode():  # by the fused attention
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.5  # not a comparison of zeros


def test_visible_patches_are_a_sequence_of_their_own_in_any_order(tiny_vit):
    encoder = shake(VisionTransformer(tiny_vit))
    images, visible = torch.randn(2, 3, 32, 32), torch.tensor([[63, 0, 9], [17, 40, 5]])
    for image, patches, found in zip(images, visible, encoder(images, visible), strict=True):
        tokens = (encoder.patch_embed(image[None]).flatten(2).mT + encoder.pos_embed)[:, patches]
        for block in encoder.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(found, encoder.norm(tokens)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size must divide image_size"),
        ({"patch_size": 0}, "every size must be at least 1"),
        ({"depth": 0}, "every size must be at least 1"),
        ({"embed_dim": 190}, "embed_dim must be a multiple of 4"),
        ({"embed_dim": 192, "num_heads": 5}, "num_heads 5, got 192"),
    ],
)
def test_sizes_that_do_not_fit_are_a_value_error(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**changes)


@pytest.mark.parametrize(("embed_dim", "grid_size"), [(8, 3), (192, 8)])
def test_position_codes_equal_a_loop_over_the_formula(embed_dim, grid_size):
    code = model.sincos_position_embedding(embed_dim, grid_size)
    quarter = embed_dim // 4
    assert code.shape == (1, grid_size**2, embed_dim)
    for row in range(grid_size):
        for column in range(grid_size):
            expected = []
            for position in (row, column):
                angles = [position / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(code[0, row * grid_size + column], torch.tensor(expected))


def test_predictions_equal_a_loop_over_images_and_blocks(tiny_vit):
    predictor = shake(Predictor(tiny_vit, PredictorConfig(embed_dim=12, depth=2, num_heads=3)))
    context, patches = torch.randn(2, 5, 16), [[0, 5, 17, 40, 63], [3, 8, 20, 21, 50]]
    targets = [[[1, 2, 9], [30, 31, 38], [60, 61, 62]], [[4, 5, 12], [33, 34, 41], [4, 5, 12]]]
    predicted = predictor(context, torch.tensor(patches), torch.tensor(targets))
    assert predicted.shape == (2, 3, 3, 16)
    positions = predictor.predictor_pos_embed[0]
    for image in range(2):
        visible = predictor.predictor_embed(context[image]) + positions[patches[image]]
        for found, block in zip(predicted[image], targets[image], strict=True):
            hidden = torch.stack([predictor.mask_token[0, 0] + positions[i] for i in block])
            x = torch.cat([visible, hidden])[None]
            for layer in predictor.predictor_blocks:
                x = layer(x)
            expected = predictor.predictor_proj(predictor.predictor_norm(x))[0, len(visible) :]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_first_weights_have_the_deviations_that_the_docstring_gives(tiny_vit):
    torch.manual_seed(0)
    network = VisionTransformer(ViTConfig(embed_dim=128, depth=3, num_heads=2))
    # A normal cut at two deviations keeps 0.88 of its deviation.
    kept = 0.8796
    assert network.patch_embed.proj.weight.std().item() == pytest.approx(kept / 48**0.5, rel=0.05)
    for layer, block in enumerate(network.blocks, start=1):
        for inner in (block.attn.qkv, block.mlp.fc1):
            assert inner.weight.std().item() == pytest.approx(0.02 * kept, rel=0.05)
        for last in (block.attn.proj, block.mlp.fc2):
            expected = 0.02 * kept / math.sqrt(2 * layer)
            assert last.weight.std().item() == pytest.approx(expected, rel=0.05)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
    predictor = Predictor(tiny_vit, PredictorConfig(embed_dim=64, depth=1, num_heads=1))
    assert 0.005 < predictor.mask_token.std() < 0.04
    not_trained = predictor.state_dict().keys() - dict(predictor.named_parameters()).keys()
    assert not_trained == {"predictor_pos_embed"}
