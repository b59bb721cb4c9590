"""Bundles that are shipped with coded model files, and their unpacking on the device.

The manifest lists both forms of such a file and is the same before and after unpacking: the restored file must match
the entry of the plain file.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.bundle.digests import require_listed, require_sizes
from exporter.bundle.manifest import MANIFEST, files_below
from exporter.bundle.opening import require_original, shipped
from exporter.bundle.reading import read_manifest, unreadable
from exporter.bundle.verify import verify_bundle
from exporter.bundle.write import move_into_place, staging_folder
from exporter.coding.container import SUFFIX, CodedSize, code_file, restore_file
from exporter.coding.profiles import Profile
from exporter.foundation.errors import InputError, RequestError
from exporter.foundation.progress import Progress
from exporter.targets.coded_layout import layout_of


def code_beside(files: Sequence[Path], profile: Profile, progress: Progress) -> CodedSize:
    """Write the coded form of files next to them, and return their total sizes.

    Args:
        files: The model files; they are kept.
        profile: `small` or `fast`.
        progress: Called with a name, MiB done and their total.
    """
    sizes = [
        code_file(path, path.with_name(path.name + SUFFIX), profile, layout_of(path), _of_file(path.name, progress))
        for path in files
    ]
    return CodedSize(*(sum(getattr(size, name) for size in sizes) for name in CodedSize.__dataclass_fields__))


def _of_file(name: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"{name}: MiB", done >> 20, total >> 20)


def unpack_bundle(bundle: Path, output: Path, progress: Progress) -> None:
    """Write the bundle that runtimes load: coded files restored, all others copied, every byte checked.

    Args:
        bundle: A bundle with coded files; not changed.
        output: Path of the new bundle; must not exist.
        progress: Called with a name, MiB done and their total.

    Raises:
        RequestError: no file of the bundle is coded, or `output` cannot be written.
        InputError: the bundle is damaged, or its coded files do not restore to those that its manifest lists.
    """
    manifest = read_manifest(bundle)
    try:
        files = shipped(bundle, manifest)
        _, strange = files_below(bundle)
    except OSError as error:
        raise unreadable(bundle, error) from error
    coded = [file for file in files if file.coded]
    if not coded:
        raise RequestError("nothing of the bundle is coded", where=bundle, next_step="use it as it is")
    if strange:
        raise InputError("neither a file nor a folder", where=bundle / strange[0], next_step="get the bundle again")
    # Sizes are checked before anything is written: a coded file may restore to any number of bytes.
    require_sizes(bundle, (file.standing for file in files))
    require_listed(bundle, (file.standing for file in coded))
    for file in coded:
        require_original(bundle, file)
    with staging_folder(output, sum(entry.size for entry in manifest.files)) as staging:
        for file in files:
            place = staging / file.entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.coded:
                restore_file(bundle / file.standing.path, place, _of_file(place.name, progress))
            else:
                shutil.copyfile(bundle / file.entry.path, place)
        shutil.copyfile(bundle / MANIFEST, staging / MANIFEST)
        for check in verify_bundle(staging):
            if check.status == "failed":
                raise InputError(
                    f"the unpacked bundle is not what its manifest lists: {check.name}",
                    where=bundle, got=check.detail, next_step="get the bundle again",
                )  # fmt: skip
        move_into_place(staging, output)
