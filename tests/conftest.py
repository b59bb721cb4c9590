"""What every test runs under: fixed seeds, as many threads as it may have to itself, no hub, no network."""

import os

from exporter.foundation.cpu import available_cores

# Read by the libraries when they are imported, and inherited by child processes.
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, available_cores())),
    "TOKENIZERS_PARALLELISM": "false",
}

import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

LOOPBACK = {"localhost", "127.0.0.1", "::1", "", None}
CONNECTING = {"socket.connect", "socket.sendto", "socket.sendmsg"}
RESOLVING = {"socket.getaddrinfo", "socket.gethostbyname"}

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

_reached: list[str] = []


def _host(event: str, arguments: tuple[Any, ...]) -> object:
    if event in RESOLVING:
        return arguments[0]
    address = arguments[1]
    return address[0] if isinstance(address, tuple) else None  # a Unix socket is named by a path


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in CONNECTING and event not in RESOLVING:
        return
    host = _host(event, arguments)
    if host not in LOOPBACK:
        _reached.append(f"{event} {host}")
        raise PermissionError(f"tests have no network: {event} {host}")


sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fail a test that reached for the network, even where the product swallowed the refusal."""
    _reached.clear()
    yield _reached
    assert not _reached, f"the test reached for the network: {_reached}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state; torch's is fixed until it is first seeded."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests from reading or filling the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products be float32's also where the processor has quicker ones."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
