"""A picture as people see it: upright, of 8 bits, with white where it is transparent or has no value.

why not for the published datasets: their numbers belong to CLIP's own preprocessing, which does none of this.
"""

import contextlib
import io
import struct

import numpy
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

PNG = b"\x89PNG\r\n\x1a\n"         # how such a file begins
# Tags of EXIF and TIFF, by number.
ORIENTATION = 0x0112
BITS = 258
PHOTOMETRIC = 262
SAMPLE_FORMAT = 339
GDAL_NODATA = 42113
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
# Values that measuring programs write where there is none; those of this size and more are such values, too.
NO_DATA = (-9999, -99999, -32768, -(2**31))
NO_MEASUREMENT = 1e20


def as_seen(image):
    """A PIL image as people see it, in RGB. Raises ValueError for grey values of which none is valid."""
    image.load()
    turn = TURNS.get(orientation(image))
    if image.mode[0] in "IF":              # grey of 16 or 32 bits, which Pillow would cut off at 255
        image = grey_of_8_bits(image)
    if turn is not None:
        image = image.transpose(turn)

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image):
    """How the camera was held, 1 to 8, as EXIF says; None where that cannot be read."""
    block = image.info.get("exif")
    if block:
        with contextlib.suppress(KeyError, struct.error):
            return exif_orientation(block.removeprefix(b"Exif\0\0"))
    try:
        return image.getexif().get(ORIENTATION)          # from other places, such as XMP
    # why so broad: each sort of damage has an error of its own, and none concerns the pixels
    except Exception:
        return None


def exif_orientation(block):
    """The orientation in an EXIF block, or None. why not by Pillow: it stops at another damaged entry."""
    order = {b"II": "<", b"MM": ">"}[block[:2]]
    start = struct.unpack_from(f"{order}I", block, 4)[0]
    count = struct.unpack_from(f"{order}H", block, start)[0]
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", block, place)
        if tag == ORIENTATION:
            letter = "I" if kind == 4 else "H"           # a long number, or a short one, as it should be
            return struct.unpack_from(order + letter, block, place + 8)[0]
    return None


def open_image(file):
    """An open file as a PIL image, also a PNG with a damaged EXIF block, which Pillow alone refuses."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        content = file.read()
        if not content.startswith(PNG):
            raise
    return Image.open(io.BytesIO(without_exif(content)))


def without_exif(content):
    """The bytes of a PNG without its EXIF blocks."""
    kept = [PNG]
    place = len(PNG)
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big") + 12      # with name and checksum
        if content[place + 4 : place + 8] != b"eXIf":
            kept.append(content[place : place + length])
        place += length
    return b"".join(kept)


def grey_of_8_bits(image):
    """Grey values of 16 or 32 bits -> a PIL image of 8 bits, white where there is no valid value.

    With 16 bits, or as many as the file says, the largest number is white. With 32 bits the least valid value
    is black and the largest white.
    """
    tags = getattr(image, "tag_v2", {})
    values = numpy.asarray(image).astype(numpy.float64)                            # (h, w)
    if image.format == "TIFF" and image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values[values < 0] += 2**32        # why: Pillow reads 32 bits without a sign as if they had one

    valid = is_valid(values, (tags.get(GDAL_NODATA), image.info.get("transparency")))
    if not valid.any():
        raise ValueError("none of its pixels has a valid value")
    low = 0
    if image.mode.startswith("I;16"):
        high = 2 ** tags.get(BITS, (16,))[0] - 1
    elif image.mode == "I" and image.format == "PPM":    # which Pillow has scaled to 16 bits
        high = 65535
    else:
        low = values[valid].min()
        high = values[valid].max()

    grey = (values - low) / ((high - low) or 1)
    if tags.get(PHOTOMETRIC) == 0:                       # white is zero; Pillow knows that of 8 bits alone
        grey = 1 - grey
    return Image.fromarray((numpy.where(valid, grey, 1) * 255).round().astype(numpy.uint8))


def is_valid(values, declared):
    """Which values are finite and do not stand for a missing value, by custom or as the file declares.

    declared: what the file says, numbers, texts or None.
    """
    valid = numpy.isfinite(values) & (numpy.abs(values) < NO_MEASUREMENT) & ~numpy.isin(values, NO_DATA)
    for hole in declared:
        with contextlib.suppress(TypeError, ValueError):   # None, or a text that is no number
            valid &= (values != float(hole)) & (values != float(numpy.float32(hole)))
    return valid
