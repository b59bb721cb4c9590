"""The memory sizes that a device is sold with: one is chosen, and the limits of memory follow it."""

import re

from exporter.device.fit import LARGEST_RESERVED_SHARE
from exporter.device.profile import DeviceProfile, load_device
from exporter.device.provenance import GIB, Fact
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError

SIZE = re.compile(r"(\d{1,5}(?:\.\d{1,3})?) ?G(?:i?B)?", re.IGNORECASE)


def ram_bytes(text: str) -> int:
    """Return the bytes of a memory size as shops write it: `8GB`. Memory is sold by the GiB.

    Raises:
        RequestError: it is no such size.
    """
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise RequestError("this is no size of memory", where="--ram", got=shown(text), expected="a size such as 8GB")
    return round(float(found[1]) * GIB)


def device_with(name_or_path: str, ram: int | None) -> DeviceProfile:
    """Return a device's profile, with as much memory as is asked for; None for its own.

    Raises:
        RequestError: there is no such device, or it is not sold with so much.
        InputError: the file is not a profile; see `load_device`.
    """
    profile = load_device(name_or_path)
    return profile if ram is None else with_ram(profile, ram)


def with_ram(profile: DeviceProfile, ram: int) -> DeviceProfile:
    """Return the profile of the same device with another of the memory sizes that it is sold with.

    Boards keep what their system takes, and leave the rest to the app. On other devices the limit of one app stays the
    same share of the memory. Both are estimated; neither changes where the profile has that size already.

    Args:
        profile: The device.
        ram: Installed memory, in bytes.

    Raises:
        RequestError: the device is not sold with so much.
    """
    usual = profile.ram_bytes
    if ram == usual.value:
        return profile
    sold = profile.ram_options_bytes
    sizes = (usual.value,) if sold is None else sold.values
    if sold is None or ram not in sizes:
        known = ", ".join(f"{size / GIB:g}" for size in sizes)
        raise RequestError(
            "the device is not sold with so much memory", where=profile.name, got=f"{ram / GIB:g} GB",
            expected=f"one of {known} GB", next_step="name one of these with --ram, or give a profile of your own",
        )  # fmt: skip

    def carried(limit: Fact) -> Fact:
        if profile.device_class == "board":
            kept = min(usual.value - limit.value, LARGEST_RESERVED_SHARE * ram)
            value, how = ram - kept, f"less {kept / 1e9:.2g} GB for the system"
        else:
            share = limit.value / usual.value
            value, how = share * ram, f"times {share:.2g}"
        source = f"{ram / GIB:g} GB {how}, as with {usual.value / GIB:g} GB: {limit.source}"
        return Fact(value=float(round(value)), basis="estimated", source=source[:1000])

    wider = profile.app_memory_limit_with_entitlement_bytes
    return profile.model_copy(
        update={
            "ram_bytes": Fact(value=float(ram), basis=sold.basis, source=sold.source),
            "app_memory_limit_bytes": carried(profile.app_memory_limit_bytes),
            "app_memory_limit_with_entitlement_bytes": None if wider is None else carried(wider),
        }
    )
