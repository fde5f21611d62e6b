"""diffusers' DiT with the timestep frequencies of the published models, exp(-ln(10000) k/128): diffusers has k/127.

No weights can make up for the difference. `dit export --with-code` puts this file into the transformer's folder, and
diffusers runs it from there where it is told to (`DiTPipeline.from_pretrained(folder, trust_remote_code=True)`).
"""

from functools import wraps

from diffusers import DiTTransformer2DModel


class PublishedDiT(DiTTransformer2DModel):
    """A `DiTTransformer2DModel` for weights that were trained with the published frequencies."""

    @wraps(DiTTransformer2DModel.__init__)  # diffusers reads the settings' names from the signature
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
