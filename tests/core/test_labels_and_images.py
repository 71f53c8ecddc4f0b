import io
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascadevlm.errors import ImageError, LabelError
from cascadevlm.images import ImageSource, load_image, pixel_digest
from cascadevlm.labels import Label, LabelSet, fold
from cascadevlm.testing import noise, picture


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "ant\n\n  bee \nC++\nC\n"),
        ("names.csv", "name,text\nant,\nbee,\nC++,\nC,the language\n"),
        ("names.json", '["ant", {"name": "bee"}, {"name": "C++", "aliases": ["cpp"]}, "C"]'),
    ],
)
def test_label_files(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    assert LabelSet.read(tmp_path / file).names == ("ant", "bee", "C++", "C")


def test_labels_of_a_folder_of_folders(tmp_path: Path) -> None:
    for name in ("bee", "ant"):
        (tmp_path / name).mkdir()
    assert LabelSet.read(tmp_path).names == ("ant", "bee")


def test_csv_carries_everything(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text('name,text,aliases,description\nA4,"an Audi A4",Audi A4|A4 sedan,"a car, mid-size"\n')
    (label,) = LabelSet.read(tmp_path / "names.csv")
    assert label == Label(name="A4", text="an Audi A4", aliases=("Audi A4", "A4 sedan"), description="a car, mid-size")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("empty.txt", "\n \n", "empty"),
        ("twice.txt", "ant\nbee\n ant \n", "'ant' is there twice"),
        ("bad.csv", "title\nant\n", "unknown column 'title'"),
        ("bad.json", '[{"name": "ant", "alias": []}]', "alias"),
        ("bad.json", '{"ant": 1}', "array"),
        ("blank.json", '["ant", " "]', "empty name"),
        ("none.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_label_files_name_the_file_and_the_fault(
    tmp_path: Path, file: str, content: str | bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LabelError) as caught:
        LabelSet.read(tmp_path / file)
    assert sentence in str(caught.value)
    assert file in str(caught.value)


def test_one_name_is_no_list() -> None:
    with pytest.raises(LabelError, match="one name, not a list"):
        LabelSet.of("ant")


def test_an_alias_may_not_be_another_label() -> None:
    with pytest.raises(LabelError, match="'bee' is there twice"):
        LabelSet.of([Label(name="ant", aliases=("bee",)), "bee"])


@given(st.text())
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(
    ("one", "other"), [("Café-Noir", "cafe noir"), ("  A  B ", "a b"), ("STRASSE", "straße"), ("x_y", "x y")]
)
def test_fold_ignores_case_accents_and_punctuation(one: str, other: str) -> None:
    assert fold(one) == fold(other)


def test_all_sources_give_the_same_image(tmp_path: Path) -> None:
    image = noise(1)
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    sources: list[ImageSource] = [tmp_path / "image.png", str(tmp_path / "image.png"), data, image, np.asarray(image)]
    assert len({pixel_digest(load_image(source)) for source in sources}) == 1


def test_orientation_is_applied_and_transparency_flattened() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(size=(40, 20)).save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue()).size == (20, 40)
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (5, 3))).mode == "RGB"


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert load_image(grey).getpixel((0, 0)) == (128, 128, 128)


def test_what_is_no_image(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise(1, (200, 200)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("hello")
    sources: list[ImageSource] = [
        tmp_path / "cut.jpg",
        tmp_path / "text.jpg",
        tmp_path / "none.jpg",
        b"",
        cast(ImageSource, np.zeros((2, 2), np.float32)),
        Image.new("F", (2, 2), 0.5),
        np.zeros((2, 2, 7), np.uint8),
        tmp_path,
    ]
    for source in sources:
        with pytest.raises(ImageError):
            load_image(source)


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="too large"):
        load_image(buffer.getvalue())


def test_a_single_pixel_changes_the_digest() -> None:
    one, other = noise(1), noise(1)
    assert pixel_digest(one) == pixel_digest(other)
    other.putpixel((3, 3), (1, 2, 3))
    assert pixel_digest(one) != pixel_digest(other)
    assert pixel_digest(picture(size=(2, 8))) != pixel_digest(picture(size=(8, 2)))
