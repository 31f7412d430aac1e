"""Pictures as people see them: odd EXIF, grey values with holes, shapes that nobody expects."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
from clip import loader
from harness import machine, predict
from sources import reading
from sources.seen import as_seen

NAN, INF = float("nan"), float("inf")


def grey(path):
    """The grey values of a picture's first row, read as one's own."""
    return np.asarray(data.read_image(str(path), as_people_see=True))[0, :, 0].tolist()


# ---- EXIF ----------------------------------------------------------------------------------------------------

def odd_exif(kind):
    exif = Image.Exif()
    exif[0x0112] = 6                                     # to be turned by 90 degrees
    exif[0x010F] = "maker"
    content = exif.tobytes()
    if kind == "garbage":
        return b"Exif\0\0no TIFF at all"
    if kind == "cut":
        return content[:20]
    if kind == "odd value":                              # orientation 9, which does not exist
        return content.replace(struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHIHH", 0x0112, 3, 1, 9, 0))
    if kind == "broken neighbour":                       # the maker's name lies far behind the end of the block
        at = content.index(struct.pack(">HHI", 0x010F, 2, 6))
        return content[:at + 8] + struct.pack(">I", 10**6) + content[at + 12:]
    return content


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, turned", [("garbage", False), ("cut", False), ("odd value", False),
                                          ("broken neighbour", True), ("whole", True)])
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_what_cannot_be_read_of_exif_counts_as_upright(form, kind, turned, tmp_path):
    image = Image.new("RGB", (20, 10))
    image.save(tmp_path / f"a.{form}", exif=odd_exif(kind))
    assert data.read_image(str(tmp_path / f"a.{form}"), as_people_see=True).size == ((10, 20) if turned else (20, 10))


def test_the_checksum_of_a_damaged_exif_block_does_not_matter(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", exif=odd_exif("whole"))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"eXIf") + 8] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    assert data.read_image(str(tmp_path / "a.png"), as_people_see=True).size == (20, 10)
    (tmp_path / "a.png").write_bytes(content[:30] + b"x" + content[31:])            # the head itself is damaged
    with pytest.raises(ValueError, match="cannot read picture .*a.png: UnidentifiedImageError"):
        data.read_image(str(tmp_path / "a.png"), as_people_see=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, tmp_path):
    # what EXIF calls row 0 and column 0 of the picture as it is stored; "F" is symmetric in no way
    upright = np.uint8([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]) * 255
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif)
        seen = data.read_image(str(tmp_path / name), as_people_see=True)
        assert np.array_equal(np.asarray(seen)[..., 0], upright)


# ---- grey values ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, declared, seen", [
    # four steps to 1 are 0, 63.75, 127.5, 255; a hole is white, as what is transparent
    (np.float32([[0, 0.25, 0.5, 1, NAN, INF, -INF]]), None, [0, 64, 128, 255, 255, 255, 255]),
    (np.float32([[0, 0.25, 0.5, 1, -9999, -99999, -32768]]), None, [0, 64, 128, 255, 255, 255, 255]),
    (np.float32([[0, 0.25, 0.5, 1, -3.4028235e38, 3.4028235e38, 9.96921e36]]), None,
     [0, 64, 128, 255, 255, 255, 255]),
    (np.float32([[0, 0.25, 0.5, 1, 7]]), "7", [0, 64, 128, 255, 255]),
    (np.float32([[0, 0.25, 0.5, 1, 0.1]]), "0.1", [0, 64, 128, 255, 255]),      # 0.1 of 32 bits is not that of 64
    (np.float32([[0, 0.25, 0.5, 1]]), "none", [0, 64, 128, 255]),
    (np.int32([[-100, 0, 100, 300, -9999, -2**31]]), None, [0, 64, 128, 255, 255, 255]),
    (np.int32([[0, 1, 2, 4, 5]]), "5", [0, 64, 128, 255, 255]),
    (np.uint16([[1000, 32896, 65535, 0]]), "0", [4, 128, 255, 255])])           # 16 bits: 65535 is white
def test_grey_is_scaled_over_its_valid_values(values, declared, seen, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={42113: declared} if declared else {})
    assert grey(tmp_path / "a.tif") == seen


def patched(path, tag, before, after):
    """Writes another number into an entry of a TIFF."""
    entry = [struct.pack("<HHIH", tag, 3, 1, value) for value in (before, after)]
    content = path.read_bytes()
    assert entry[0] in content
    path.write_bytes(content.replace(*entry))


def test_white_may_be_zero(tmp_path):
    for values, seen in ((np.uint16([[0, 32639, 65535]]), [255, 128, 0]), (np.float32([[0, 1, 4]]), [255, 191, 0])):
        Image.fromarray(values).save(tmp_path / "a.tif")
        patched(tmp_path / "a.tif", 262, 1, 0)
        assert grey(tmp_path / "a.tif") == seen


def test_32_bits_may_have_no_sign(tmp_path):
    Image.fromarray(np.int32([[0, -2**31, -1]])).save(tmp_path / "a.tif")        # the bits of 0, 2^31 and 2^32 - 1
    patched(tmp_path / "a.tif", 339, 2, 1)
    assert grey(tmp_path / "a.tif") == [0, 128, 255]


def test_the_white_of_12_bits_is_4095(tmp_path):
    # bytes 00 0f ff 80 00 00: three digits each are 000, fff, 800, 000; 2048 / 4095 * 255 = 127.5
    Image.fromarray(np.uint16([[0x0F00, 0x80FF, 0, 0]])).save(tmp_path / "a.tif")
    patched(tmp_path / "a.tif", 258, 16, 12)
    assert grey(tmp_path / "a.tif") == [0, 255, 128, 0]


@pytest.mark.parametrize("largest", [1000, 65535])
def test_a_pgm_says_what_is_white(largest, tmp_path):
    half = largest // 2
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 %d\n" % largest + np.array([0, half, half], ">u2").tobytes())
    assert grey(tmp_path / "a.pgm") == [0, 127 if largest == 65535 else 128, 127 if largest == 65535 else 128]


@pytest.mark.parametrize("values", [[[NAN, INF]], [[-9999, -9999]]])
def test_a_picture_without_a_valid_value_is_refused_by_name(values, tmp_path):
    Image.fromarray(np.float32(values)).save(tmp_path / "empty.tif")
    with pytest.raises(ValueError, match="cannot read picture .*empty.tif: .*none of its pixels has a valid value"):
        reading.check_pictures([(str(tmp_path / "empty.tif"), 0, "a")])


def test_transparent_grey_of_16_bits_is_white(tmp_path):
    Image.fromarray(np.uint16([[0, 1000, 65535]])).save(tmp_path / "a.png", transparency=0)
    assert grey(tmp_path / "a.png") == [255, 4, 255]


# ---- shapes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(400, 3), (3, 401), (120, 1), (2, 400)])
def test_the_middle_of_an_extreme_shape_is_that_of_the_whole(size, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, preprocess = Image.fromarray(noise), clip.preprocess(16)
    part = preprocess(image)
    monkeypatch.setattr(loader, "EXTREME", 10**6)
    whole = preprocess(image)
    grey_level = 1 / 255 / min(loader.STD)
    torch.testing.assert_close(part, whole, atol=2.1 * grey_level, rtol=0)          # rounded at other places
    assert 3 in size or torch.equal(part, whole)


def test_an_extreme_shape_takes_no_memory(monkeypatch):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest, **more: made.append(size) or resize(
        self, size, *rest, **more))
    assert clip.preprocess(224)(Image.new("RGB", (5000, 1))).shape == (3, 224, 224)
    assert made == [(224 * 50, 224)]                     # 7.5 MB, not 1120000 x 224


def test_a_picture_for_which_memory_does_not_suffice_is_named(tmp_path):
    def fail(image):
        raise MemoryError

    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="out of memory at picture .*a.png of 3 x 2 pixels"):
        data.Pictures([(str(tmp_path / "a.png"), 0, "a")], fail)[0]
    fault = predict.read_as_tensor((1, tmp_path / "a.png"), fail)
    assert isinstance(fault, ValueError) and "a.png of 3 x 2" in str(fault)


@pytest.mark.parametrize("error", [MemoryError(), ValueError(), OSError()])
def test_no_error_is_without_a_word(error):
    with pytest.raises(SystemExit, match="^error: (out of memory|ValueError|OSError)$"):
        with machine.plain_errors():
            raise error


def test_grey_from_python_needs_no_file():
    assert np.asarray(as_seen(Image.fromarray(np.float32([[0, NAN, 4]]))))[0, :, 0].tolist() == [0, 255, 255]
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "PNG")
    assert as_seen(Image.open(file)).size == (4, 2)
