"""Find videos in folders by their extensions; skip hidden files and files that other programs leave behind."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.storage.paths import is_remote, strip_file_scheme

from .inputs import input_state, record_input

# Containers and raw streams that FFmpeg reads.
_SUFFIXES = """
    264 265 3g2 3gp 3gp2 3gpp amv asf avc avi dav divx dv dvr-ms evo f4v flv gif h264 h265 hevc ivf k3g m1v m2p m2t m2ts
    m2v m4v mj2 mjpeg mjpg mk3d mkv mod mov mp2v mp4 mp4v mpe mpeg mpeg1 mpeg2 mpeg4 mpg mpg2 mpg4 mpv mqv mts mxf nsv
    nut obu ogm ogv ogx qt rm rmvb tod tp trp ts vob webm wmv wtv xvid y4m
"""
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".jpe", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MIN_IMAGES = 2  # images that make a folder a video: one alone may be a preview
COMMON_SUFFIXES = ".mp4, .avi, .mov, .mkv, .webm, …"  # for messages; the full list is in docs/datasets/folder.md
ANNOTATIONS = {".csv", ".json", ".jsonl", ".md", ".tsv", ".txt"}  # not reported as skipped at the root of a dataset

# Lower-case names of files and folders that operating systems and tools create.
_LEFTOVERS = re.compile(
    "|".join(
        fnmatch.translate(pattern)
        for pattern in (
            ".*",  # hidden: ._x.mp4, .AppleDouble, .DS_Store, .ipynb_checkpoints, .Trash-1000, .snapshot, …
            *("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
            *("thumbs.db", "ehthumbs*.db", "desktop.ini", "$recycle.bin", "$winreagent", "$extend"),  # Windows
            *("system volume information", "found.[0-9][0-9][0-9]", "~$*"),
            *("@eadir", "*@syno*", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "@__thumb"),  # Synology, QNAP
            *("#recycle", "#snapshot", "lost+found", "__pycache__"),
        )
    )
)
_OLD_TRASH = {"RECYCLED", "RECYCLER"}  # of Windows, upper case only: in lower case it may be a class
LISTINGS = ".mgvideo"  # the folder in which listings of datasets are kept (see listing.py)
_PYRAMID_FILES = {"layout.json", "rows.jsonl"}  # a folder with both is a pyramid (see pyramid.py)


@dataclass
class Scan:
    """The videos that `scan_folder` found and what it skipped.

    Folders of images are videos unless there are video files, of which the images may be previews or copies.
    """

    videos: list[str] = field(default_factory=list)  # paths relative to the root, sorted
    skipped: Counter[str] = field(default_factory=Counter)  # number of other files, by extension
    leftovers: Counter[str] = field(default_factory=Counter)  # number of folders and videos of other programs, by name

    def add(self, other: Scan) -> None:
        """Add the results of another scan."""
        self.videos += other.videos
        self.skipped += other.skipped
        self.leftovers += other.leftovers

    def notes(self, place: str) -> list[str]:
        """Return notes on what was skipped in the folder `place`."""
        notes = []
        if self.skipped:
            notes.append(f"{place}: skipped files without a video extension: {self.extensions()}")
        if self.leftovers:
            names = [f"{name} ({count} times)" if count > 1 else name for name, count in sorted(self.leftovers.items())]
            notes.append(f"{place}: skipped files of other programs: {shorten(names, 10)}")
        return notes

    def extensions(self) -> str:
        """Return the counts of skipped files by extension, the most frequent first, as text."""
        return shorten([f"{count} {suffix}" for suffix, count in self.skipped.most_common()])


def is_leftover(name: str) -> bool:
    """Return whether a name is hidden or belongs to files of an operating system, a NAS or a tool."""
    return name in _OLD_TRASH or _LEFTOVERS.match(name.lower()) is not None


def scan_folder(root: str, top: str = "", deep: bool = True) -> Scan:
    """Find videos by their extensions in the folder `top` of `root`, and in its subfolders if `deep`.

    Raises:
        UserError: A folder cannot be listed, or `root` is a URL (many servers cannot list files).
    """
    if is_remote(root):
        raise UserError(f"{root}: the files of a URL cannot be listed; name them in a list file (docs/datasets)")
    root = strip_file_scheme(root)
    start = os.path.join(root, top) if top else root
    scan, images, seen, folders = Scan(), Scan(), set(), [start]
    while folders:
        folder = folders.pop()
        state = input_state(folder)
        subfolders, names = _list_folder(folder)
        real_path = os.path.realpath(folder)
        if real_path in seen:  # a cycle of symbolic links
            continue
        seen.add(real_path)
        if set(names) >= _PYRAMID_FILES and (top or folder != start):
            scan.leftovers[f"{os.path.relpath(folder, root)}, a pyramid"] += 1
            continue
        is_video = folder != start and not subfolders and _are_frames(names)
        if is_video:
            images.videos.append(os.path.relpath(folder, root))
        else:  # the frames of a video do not change the list of videos
            record_input(folder, state)
        scan.leftovers.update(name for name in subfolders if is_leftover(name) and name != LISTINGS)
        folders += [os.path.join(folder, name) for name in subfolders if deep and not is_leftover(name)]
        _sort_files(folder, names, root, images if is_video else scan)
    if not scan.videos:
        scan.videos = images.videos
    else:
        scan.skipped += images.skipped
    scan.videos.sort()
    return scan


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the subfolders of a folder, and of its files. Raises UserError."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{error.filename}: this folder cannot be listed: {error.strerror}") from error
    return folders, files


def _are_frames(names: Iterable[str]) -> bool:
    """Return whether files are the frames of a video: images, and no video."""
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in names if not is_leftover(name))
    return sum(suffixes[suffix] for suffix in IMAGE_SUFFIXES) >= MIN_IMAGES and not VIDEO_SUFFIXES & suffixes.keys()


def _sort_files(folder: str, names: Iterable[str], root: str, scan: Scan) -> None:
    """Add the files of one folder to a scan."""
    at_root = os.path.normpath(folder) == os.path.normpath(root)
    prefix = "" if at_root else os.path.relpath(folder, root)
    for name in names:
        suffix = os.path.splitext(name)[1].strip().lower()
        if is_leftover(name):
            if suffix in VIDEO_SUFFIXES:
                scan.leftovers["._*" if name.startswith("._") else "hidden files"] += 1
        elif suffix in VIDEO_SUFFIXES:
            scan.videos.append(os.path.join(prefix, name))
        elif not (suffix in ANNOTATIONS and at_root):
            scan.skipped[suffix or "without extension"] += 1
