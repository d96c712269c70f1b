"""A model of the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from edgesd.errors import InputError, MissingDependencyError
from edgesd.export.families import Family, family_of
from edgesd.export.families.checkpoint import DIFFUSERS_STEM
from edgesd.export.source.folder import (
    HINTS,
    INDEX,
    LICENCES,
    MODEL_CARD,
    NOTICE,
    TEXT_FILE,
    choose_weights,
    class_name_of,
    read_json_object,
)
from edgesd.files import user_home
from edgesd.text import first_sentence


def download(repo_id: str, component: str | None = None, weights: bool = True) -> Path:
    """Fetch just the files that the family needs; from the cache when the hub can't be reached.

    component: fetch this network alone, of a pipeline or of a repository that holds no other.
    weights: of a pipeline's networks; without, their configs alone are fetched.
    Raises InputError, and MissingDependencyError without huggingface_hub.
    """

    def fetch(hub: Any, offline: bool) -> Path:
        if offline:  # its five tries would take half a minute
            return Path(hub.snapshot_download(repo_id, local_files_only=True))
        family = None
        if component is None:
            index_path = Path(hub.hf_hub_download(repo_id, INDEX))
            family = family_of(class_name_of(index_path, read_json_object(index_path)), repo_id)
        try:
            files = hub.list_repo_files(repo_id)
            patterns = (
                _wanted(files, family, weights) if family else _network(files, str(component))
            )
        except hub.errors.HfHubHTTPError:
            raise  # the hub answered, and said no
        except Exception:  # noqa: BLE001  each hub version raises those of its own HTTP library
            return Path(hub.snapshot_download(repo_id, local_files_only=True))
        return Path(hub.snapshot_download(repo_id, allow_patterns=patterns))

    return _fetched(
        repo_id,
        fetch,
        f"{repo_id} has no {INDEX}: give a file of it, as in {repo_id}/"
        "NAME.safetensors, if it has one",
    )


def download_file(repo_id: str, name: str) -> Path:
    """Fetch one file of a model; as `download`."""

    def fetch(hub: Any, offline: bool) -> Path:
        return Path(hub.hf_hub_download(repo_id, name, local_files_only=offline))

    return _fetched(repo_id, fetch, f"{repo_id} has no {name}: check the spelling")


def _fetched(repo_id: str, fetch: Callable[[Any, bool], Path], lacking: str) -> Path:
    """What `fetch` downloads with huggingface_hub, or finds in its cache where the hub can't be
    reached. lacking: the error for a file that the model hasn't."""
    if user_home() is None:
        raise InputError(f"downloading {repo_id} needs a home folder: set HOME to one")
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import logging as hub_logging
    except ImportError as exc:
        raise MissingDependencyError(
            f"downloading {repo_id} needs huggingface_hub: pip install 'edgesd[build]'"
        ) from exc
    # The library retries, and reports each try; the one error line at the end says it all.
    hub_logging.get_logger().setLevel(logging.ERROR)
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if offline is None and not reachable(constants.ENDPOINT):
        offline = "the hub can't be reached"
    try:
        return fetch(hub, offline is not None)
    except errors.GatedRepoError as exc:
        raise InputError(
            f"{repo_id} is gated: accept its terms on the hub's web page, then run `hf auth login`"
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise InputError(
            f"{repo_id} is neither a folder here nor a public model on the hub: check the spelling"
            ", or run `hf auth login` if it is private"
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        raise InputError(
            f"{repo_id} is not a folder here, is not in the download cache, and "
            f"{offline or 'the connection to the hub was lost'}: check the network, or give a "
            "local folder"
        ) from exc
    except errors.EntryNotFoundError as exc:
        raise InputError(lacking) from exc
    except InputError:
        raise
    except Exception as exc:  # each hub version raises the exceptions of its own HTTP library
        raise InputError(f"cannot download {repo_id}: {first_sentence(exc)}") from exc


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether the server of `url`, or the proxy that leads to it, takes connections."""
    try:
        parts = urllib.parse.urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # an address that nobody can use
        return False
    if not host:
        return False
    found, done = threading.Event(), threading.Event()

    def connect() -> None:
        # UnicodeError: for what can't be a host's name.
        with (
            contextlib.suppress(OSError, UnicodeError),
            socket.create_connection((host, port)),
        ):
            found.set()
        done.set()

    # In a thread, as looking up a name has no time limit.
    threading.Thread(target=connect, daemon=True).start()
    done.wait(seconds)
    return found.is_set()


def _wanted(files: Collection[str], family: Family, weights: bool) -> list[str]:
    wanted = [INDEX, HINTS, *_papers(files)]
    wanted += [f"{folder}/*{suffix}" for folder in family.configs for suffix in TEXT_FILE]
    for component, stem in family.weights.items():
        found = _of_network(files, f"{component}/", stem)
        wanted += found if weights else found[:1]
    return wanted


def _network(files: Collection[str], component: str) -> list[str]:
    pipeline = INDEX in files
    found = _of_network(files, f"{component}/" if pipeline else "", DIFFUSERS_STEM)
    return [*([INDEX] if pipeline else []), *found, *_papers(files)]


def _of_network(files: Collection[str], prefix: str, stem: str) -> list[str]:
    names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    weights = choose_weights(names, stem)
    return [prefix + name for name in ("config.json", *(weights.files if weights else ()))]


def _papers(files: Collection[str]) -> list[str]:
    return [MODEL_CARD, *(name for name in files if NOTICE.fullmatch(name)), f"{LICENCES}/*"]
