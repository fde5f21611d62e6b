"""What a network costs: its parameters and its multiply-accumulates, in closed form, for every size and option.

The papers' "Gflops" are multiply-accumulates of one image's forward pass (no guidance, no autoencoder): matrix
products, convolutions and attention are counted, norms, activations, modulation and biases are not. torch's
FlopCounterMode counts two for each. A training step costs three forward passes.

D hidden size, T tokens of an image, S = 1 + L tokens of the condition (the time's, and the label's or embeddings').
"""

from dit.blocks import MODULATED, mlp_size
from dit.embedders import FREQUENCY_EMBEDDING_SIZE
from dit.model import ModelConfig

MODULATIONS = {"adaln_zero": 6, "adaln": 4, "cross_attention": 0, "in_context": 0}  # vectors of D in each block
NORMS = {"adaln_zero": 0, "adaln": 0, "cross_attention": 3, "in_context": 2}  # norms with weights, in each block


def parameters(
    config: ModelConfig,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    condition_shape: tuple[int, int] | None = None,
) -> int:
    """How many numbers the network's state dict holds: all that is trained, and the fixed position table (T D)."""
    config = config.resolved()
    D, p, M = config.hidden_size, config.patch_size, mlp_size(config)
    norm_weights = 2 if config.norm == "layer" else 1
    attention = 4 * (D * D + D) + 2 * config.qk_norm * norm_weights * D // config.num_heads
    feed_forward = 2 * D * M + M + D if config.mlp == "gelu" else 3 * D * M + 2 * M + D
    block = attention * (1 + (config.block == "cross_attention")) + feed_forward
    block += MODULATIONS[config.block] * (D * D + D) + NORMS[config.block] * norm_weights * D
    final = (D + 1) * p * p * out_channels(config, in_channels)
    final += 2 * (D * D + D) if config.block in MODULATED else norm_weights * D
    patch = D * (in_channels * p * p + 1)
    time = FREQUENCY_EMBEDDING_SIZE * D + D + D * D + D
    if config.condition == "embeddings":
        condition = condition_shape[1] * D + D + D * D + D
    else:
        condition = (num_classes * (config.condition == "classes") + 1) * D
    return config.depth * block + final + patch + time + condition + tokens(config, input_size) * D


def macs(
    config: ModelConfig,
    *,
    input_size: int,
    in_channels: int,
    condition_shape: tuple[int, int] | None = None,
) -> int:
    """Multiply-accumulates of the forward pass of one image."""
    config = config.resolved()
    D, p, M, T = config.hidden_size, config.patch_size, mlp_size(config), tokens(config, input_size)
    S = condition_tokens(config, condition_shape)
    X = T + S if config.block == "in_context" else T  # tokens in the blocks
    block = 4 * X * D * D + 2 * X * X * D  # projections; scores and their sums of values
    block += (2 if config.mlp == "gelu" else 3) * X * D * M
    block += MODULATIONS[config.block] * D * D
    if config.block == "cross_attention":
        block += 2 * T * D * D + 2 * S * D * D + 2 * T * S * D
    final = T * D * p * p * out_channels(config, in_channels) + (2 * D * D if config.block in MODULATED else 0)
    patch = T * in_channels * p * p * D
    time = FREQUENCY_EMBEDDING_SIZE * D + D * D
    L, E = condition_shape if config.condition == "embeddings" else (0, 0)
    return config.depth * block + final + patch + time + L * (E * D + D * D)


def tokens(config: ModelConfig, input_size: int) -> int:
    """T. Raises ValueError where the patch size does not divide the latent side."""
    patch_size = config.resolved().patch_size
    if input_size < 1 or input_size % patch_size:
        raise ValueError(f"model.patch_size {patch_size} does not divide the latent side {input_size}")
    return (input_size // patch_size) ** 2


def condition_tokens(config: ModelConfig, condition_shape: tuple[int, int] | None = None) -> int:
    """S: the time's token, and those of the label (one, also where there is but one label) or of the embeddings."""
    return 1 + (condition_shape[0] if config.condition == "embeddings" else 1)


def out_channels(config: ModelConfig, in_channels: int) -> int:
    """Channels of the prediction, and of the variance where it is learned."""
    return in_channels * (2 if config.learn_sigma else 1)
