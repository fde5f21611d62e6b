"""benchmarks/emoji.py: which emoji the data set takes, and, where the packages are there, that they are drawn."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("emoji", Path(__file__).parents[1] / "benchmarks" / "emoji.py")
emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emoji)

TABLE = """
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # E1.0 grinning face
263A                                       ; unqualified         # E0.6 smiling face
# group: People & Body
# subgroup: hand-fingers-open
1F44B 1F3FC                                ; fully-qualified     # E1.0 waving hand: medium-light skin tone
# subgroup: person-role
1F468 1F3FB 200D 2695 FE0F                 ; fully-qualified     # E4.0 man health worker: light skin tone
1F468 1F3FC 200D 2695 FE0F                 ; fully-qualified     # E4.0 man health worker: medium-light skin tone
# subgroup: family
1F46B                                      ; fully-qualified     # E0.6 woman and man holding hands
1F469 1F3FB 200D 1F91D 200D 1F468 1F3FD    ; fully-qualified     # E12.0 two tones
# group: Component
# subgroup: skin-tone
1F3FB                                      ; component           # E1.0 light skin tone
"""


def test_each_emoji_has_its_class_and_people_three_skin_tones():
    taken = list(emoji.sequences(TABLE))
    assert [name for name, _ in taken] == ["smileys", "hands", "roles", "actions"]
    assert taken[2][1] == "\U0001f468\U0001f3fb\u200d\u2695\ufe0f"


@pytest.mark.skipif(not emoji.FONT.is_file(), reason="fonts-noto-color-emoji is not installed")
def test_an_emoji_is_drawn_in_colour_on_white_and_an_unknown_one_is_not():
    font = emoji.ImageFont.truetype(str(emoji.FONT), emoji.BITMAP_SIZE, layout_engine=emoji.ImageFont.Layout.RAQM)
    face = np.asarray(emoji.draw(font, "\U0001f600"))
    assert face.shape == (128, 128, 3) and (face[0, 0] == 255).all()
    red, green, blue = face[64, 20].astype(int)
    assert red > 200 and green > 150 and blue < 120, "the face is yellow"
    assert emoji.draw(font, "\U0001f600\U0001f600") is None, "two glyphs are no emoji"
