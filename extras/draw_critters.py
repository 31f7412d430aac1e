"""Draws one picture of each class of critters, the embedded dataset, into a file.

    python -m extras.draw_critters --output sheet.png
"""

from PIL import Image, ImageDraw, ImageFont

from harness import machine, places
from harness.parser import Parser
from sources.critters import SIZE, class_names, picture
from sources.figures import INK


def sheet():
    """The first training picture of each class, with its name; near-twins of a kind stand side by side."""
    side = 2 * SIZE
    width = side + 4                                    # of a cell, with the gap to the next
    height = 20 + side + 4                              # a name above the picture, and the gap
    page = Image.new("RGB", (8 * width - 4, 2 * height - 4), "white")

    for label, name in enumerate(class_names()):
        x = label % 8 * width
        y = label // 8 * height
        ImageDraw.Draw(page).text((x, y), name, INK, ImageFont.load_default(13))
        page.paste(picture("train", label, 0).resize((side, side), Image.NEAREST), (x, y + 20))
    return page


def parse_args(argv=None):
    """The options."""
    parser = Parser("python -m extras.draw_critters --output FILE", __doc__)
    parser.add_argument("--output", metavar="FILE", required=True, help="a name that ends in .png")
    return parser.parse_args(argv)


@machine.plain_errors()
def main(args):
    """Draws and writes the file."""
    machine.refuse_torchrun()
    places.check_file(args.output, "--output")
    page = sheet().quantize(256)                        # why 256 colours: a quarter of the size
    machine.write_whole(args.output, lambda path: page.save(path, "PNG"))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(parse_args())
