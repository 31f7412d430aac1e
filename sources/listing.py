"""What a folder holds: which files are pictures, which belong to systems, and names in one form."""

import collections
import fnmatch
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

# What Pillow reads by itself. why not EPS, WMF, HDF5 and the like: it needs other programs for them. why not
# FITS: it ignores their scale.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif",
            ".tif", ".tiff", ".bmp", ".dib", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
            ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".sgi", ".rgb",
            ".rgba", ".bw",
            ".psd", ".qoi", ".dds", ".pcx", ".dcx", ".pcd", ".ico", ".icns", ".cur", ".im", ".msp",
            ".ras", ".pxr", ".xbm", ".xpm", ".blp", ".ftc", ".ftu", ".fli", ".flc", ".gbr")

# Folders and files that nobody put there as pictures: why they are there, and their names in lower case.
SYSTEM = {
    "hidden on Unix; NAS and programs have thumbnails there": (".*",),
    "on every ext4 disk, on every card of Android": ("lost+found", "lost.dir"),
    "Windows, on every disk that it has seen": (
        "system volume information", "$recycle.bin", "recycler", "$extend", "$winreagent", "config.msi",
        "found.[0-9][0-9][0-9]", "thumbs.db", "ehthumbs*.db", "desktop.ini",
        "albumartsmall.jpg", "albumart_{*}_*.jpg"),
    "macOS": ("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),
    "NAS of Synology, QNAP and Buffalo": (
        "@eadir", "@tmp", "#recycle", "#snapshot", "syno*_thumb*", "@recycle", "@recently-snapshot",
        "trashbox"),
    "thumbnails and catalogues of photo programs": (
        "*.photoslibrary", "*.photolibrary", "*.aplibrary", "*.lrdata", "captureone", "ipod photo cache",
        "nksc_param", "zbthumbnail.info", "pspbrwse.jbf", "thumbnails", "_thumbs", "_thumbnails"),
    "what programs can make again": ("cache", "caches", "_cache", "__pycache__"),
}
_SYSTEM = re.compile("|".join(fnmatch.translate(name) for names in SYSTEM.values() for name in names))
# ---- names -------------------------------------------------------------------------------------------------


def normal(name):
    """A name or a path below a root in the one form in which names are stored, compared and sorted.

    why: macOS hands out "é" as two characters, others as one; Windows writes "\\" between folders.
    """
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def is_system(name):
    """Whether a folder or file of this name belongs to a system or a program."""
    return bool(_SYSTEM.match(name.lower()))


def check_regular(path):
    """Raises OSError for a pipe or a device in place of a file. why: it may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is no regular file: put one there, or remove it")


def is_picture(name):
    """Whether a file of this name is read as a picture."""
    return name.lower().endswith(SUFFIXES)


def check_spellings(folder, names):
    """Raises ValueError where two of some names in a folder are one name in two spellings."""
    seen = {}
    for name in names:
        other = seen.setdefault(normal(name), name)
        if other != name:
            # why ascii: on a screen both look alike
            raise ValueError(f"{folder} has one name in two spellings, {ascii(other)} and {ascii(name)}: "
                             "remove or rename one of them")

# ---- folders -----------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The paths of what lies below a folder."""
    pictures: list
    others: list       # files of other kinds
    system: list       # files and whole folders of systems and programs


def walk(top):
    """All that lies below a folder, in a fixed order -> Listing.

    Links are followed, but not to a folder in which one is already. Raises OSError for one that cannot be
    read.
    """
    def fail(error):
        raise error

    top = os.fspath(top)
    found = Listing([], [], [])
    above = {top: with_parents(top)}                     # {folder: itself and all in which it lies}
    for here, folders, files in os.walk(top, onerror=fail, followlinks=True):
        system = {name for name in (*folders, *files) if is_system(name)}
        found.system.extend(os.path.join(here, name) for name in sorted(system, key=normal))
        inside = {}
        for name in sorted(folders, key=normal):
            folder = os.path.join(here, name)
            if name not in system and identity(folder) not in above[here]:
                inside[name] = folder
                itself = with_parents(folder) if os.path.islink(folder) else {identity(folder)}
                above[folder] = above[here] | itself
        folders[:] = inside

        for name in sorted(files, key=normal):
            if name not in system:
                kind = found.pictures if is_picture(name) else found.others
                kind.append(os.path.join(here, name))
    return found


def with_parents(folder):
    """The identities of a folder and of all above it."""
    real = Path(os.path.realpath(folder))
    return {identity(one) for one in (real, *real.parents)}


def identity(folder):
    """What a folder and all links to it share."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def folders_in(folder):
    """The names of the folders in a folder, sorted, without those of systems."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_system(entry.name)]
    return sorted(names, key=normal)


def class_folders(folder):
    """{class folder, in its normal form: paths of its pictures, at any depth}, all sorted.

    No file is looked at: ImageNet has 1.3 million. Raises FileNotFoundError for a class without a picture,
    ValueError where there are pictures but no class folder, and for one name in two spellings.
    """
    classes = folders_in(folder)
    if not classes:
        pictures = walk(folder).pictures
        if pictures:
            raise ValueError(f"{folder} is flat: {len(pictures)} pictures and no class folder; move each "
                             f"into {folder}/<class>/ (for ImageNet's validation pictures its development "
                             "kit has the classes; for your own, is the folder one level too low?)")
        raise FileNotFoundError(f"there is no class folder in {folder}")

    check_spellings(folder, classes)
    found = {normal(name): walk(f"{folder}/{name}") for name in classes}
    for name, (pictures, others, _) in found.items():
        if not pictures:
            there = f" ({kinds(others)})" if others else ""
            raise FileNotFoundError(f"there is no picture in {folder}/{name}{there}")
        check_spellings(f"{folder}/{name}", pictures)
    return {name: listing.pictures for name, listing in found.items()}

# ---- what is said of them ----------------------------------------------------------------------------------


def kinds(paths):
    """What kinds of files these are, as text: "8 .heic, 1 .txt"."""
    counts = collections.Counter(os.path.splitext(path)[1].lower() or "without a suffix" for path in paths)
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def left_out(others, system):
    """What is not read as pictures, as texts: files of other kinds, and what belongs to systems."""
    lines = [f"{kinds(others)}, not read as pictures, first {others[0]}"] if others else []
    if system:
        counts = collections.Counter(os.path.basename(path) for path in system)
        names = ", ".join(f"{n} {name!r}" for name, n in counts.most_common(8))
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        lines.append(f"of systems and programs: {names}{more}, first {system[0]}")
    return lines
