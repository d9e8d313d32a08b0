"""Worlds on the Hugging Face Hub: ``hf://owner/name`` or ``hf://owner/name@revision``.

A world is data: only the kinds of files that a world consists of are fetched or sent, and nothing
of them is ever run. What has been fetched is used without asking the network again, until
``nfd pull``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfd_env.models.weights import CheckpointError
from nfd_env.worlds.checksums import CHECKSUMS, read_checksums, verify

PREFIX = "hf://"
CARD = "README.md"

_NEWEST = "main"
_FIRST = ["world.yaml", CHECKSUMS]  # what tells a world from a repository of something else
# No pickles, no scripts, no hidden files, no other folders.
_FILE = re.compile(
    r"\w[\w-]*\.(safetensors|yaml)|clip\.mp4|(ASSET_)?LICENSES?(\.(md|txt))?"
    r"|agents/\w[\w. -]*\.safetensors",
    re.ASCII,
)
_PICTURE = re.compile(r"card/\w+\.(png|gif)", re.ASCII)
# What the hub and git allow, see https://huggingface.co/docs/hub/api.
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:@(\w[\w./-]{{0,199}}))?", re.ASCII)


class HubError(CheckpointError):
    """A world cannot be fetched from the hub, or sent there; the message says why."""


@dataclass(frozen=True)
class Address:
    """Where a world lies on the hub.

    Attributes:
        repo: "owner/name".
        revision: a branch, tag or commit.
    """

    repo: str
    revision: str = _NEWEST

    def __str__(self) -> str:
        """As it is given to ``world=``."""
        return f"{PREFIX}{self.repo}" + ("" if self.revision == _NEWEST else f"@{self.revision}")


def is_address(world: str | os.PathLike[str]) -> bool:
    """Whether a world is named by its place on the hub."""
    return isinstance(world, str) and world.startswith(PREFIX)


def parse_address(text: str) -> Address:
    """Read "owner/name" or "owner/name@revision", with or without ``hf://``.

    Raises:
        HubError: when it is neither.
    """
    body = text.removeprefix(PREFIX)
    found = _ADDRESS.fullmatch(body)
    # The revision becomes a path in the cache.
    if found is None or any(pair in body for pair in ("..", "--", "//", "/.")):
        raise HubError(
            f"a world on the hub is {PREFIX}owner/name or {PREFIX}owner/name@revision, got {text!r}"
        )
    return Address(found[1], found[2] or _NEWEST)


def fetched_world(text: str) -> Path:
    """The folder of a world on the hub: from the cache, where it is, else fetched.

    Raises:
        HubError: when it is not to be had.
    """
    address = parse_address(text)
    hub = require_library()
    try:
        folder = Path(
            hub.snapshot_download(
                address.repo,
                revision=address.revision,
                allow_patterns=_FIRST,
                local_files_only=True,
            )
        )
        first = all((folder / name).is_file() for name in _FIRST)  # else it was interrupted there
        if first and all((folder / name).is_file() for name in _listed(folder, address)):
            return folder
    except hub.errors.LocalEntryNotFoundError:
        pass
    return fetch_world(text)


def fetch_world(text: str) -> Path:
    """Fetch a world from the hub as it is there now, every file checked.

    Returns:
        Its folder in the hub's cache, which is not to be written to.

    Raises:
        HubError: without network; when there is no such repository or revision, or it holds no
            world; when a file is not what its checksum says.
    """
    address = parse_address(text)
    hub = require_library()

    def download(revision: str, names: list[str], force: bool = False) -> Path:
        with _said(hub, address):
            folder = hub.snapshot_download(
                address.repo, revision=revision, allow_patterns=names, force_download=force
            )
        return Path(folder)

    folder = download(address.revision, _FIRST)
    missing = [name for name in _FIRST if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{address} is no world: it has no {' and no '.join(missing)}")
    # The commit, so that every file is of the same one, whatever is pushed meanwhile.
    commit, names = folder.name, [*_FIRST, *_listed(folder, address)]
    download(commit, names)
    if _damaged(folder, names):  # on this disk, perhaps
        download(commit, names, force=True)
    damaged = _damaged(folder, names)
    if damaged:
        raise HubError(
            f"{address} is damaged on the hub (commit {commit[:8]}): {damaged}; tell its owner"
        )
    return folder


def push_world(
    folder: Path,
    address: Address,
    card: str,
    pictures: Mapping[str, bytes],
    private: bool = False,
) -> str:
    """Send a world folder to the hub as one commit, all or nothing.

    Args:
        folder: the world; what is no part of a world is left out.
        address: where to; the repository is made if there is none.
        card: text of ``README.md``.
        pictures: name -> file that the card shows.
        private: whether a new repository is.

    Returns:
        The commit's address on the hub.

    Raises:
        HubError: when the folder is damaged, the repository holds something else, or it cannot be
            written.
    """
    hub = require_library()
    if re.fullmatch("[0-9a-f]{40}", address.revision):
        raise HubError(f"{address}: a commit cannot be changed; push to a branch")
    files: dict[str, Path | bytes] = {name: folder / name for name in world_files(folder)}
    files |= {CARD: card.encode(), **pictures}
    api = hub.HfApi()
    with _said(hub, address, writing=True):
        api.create_repo(address.repo, private=private, exist_ok=True)
        if address.revision != _NEWEST:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)
        there = set(api.list_repo_files(address.repo, revision=address.revision))
        others = sorted(n for n in there if not _is_part(n) and n not in (CARD, ".gitattributes"))
        if others and "world.yaml" not in there:
            raise HubError(
                f"{address} is in the way: it holds no world but {', '.join(others[:3])}; choose "
                "another name"
            )
        gone = {name for name in there if _is_part(name)} - files.keys()
        commit = api.create_commit(
            address.repo,
            [
                *(
                    hub.CommitOperationAdd(n, f if isinstance(f, bytes) else str(f))
                    for n, f in files.items()
                ),
                *(hub.CommitOperationDelete(n) for n in sorted(gone)),
            ],
            commit_message="A world of nfd_env",
            revision=address.revision,
        )
    return str(commit.commit_url)


def world_files(folder: Path) -> list[str]:
    """The names of what is sent of a world folder: all that is listed, checked.

    Raises:
        CheckpointError: when there are no checksums, or a file is not what they say.
    """
    listed = _listed(folder, folder)
    verify(folder, *listed)
    return [*listed, CHECKSUMS]


def _listed(folder: Path, place: Any) -> list[str]:
    """The files that the checksums of a world name and that a world may have."""
    sums = read_checksums(folder)
    if not sums:
        raise HubError(
            f"{place} has no {CHECKSUMS}; nfd_env.worlds.checksums.write_checksums(folder) makes it"
        )
    return [name for name in sums if _FILE.fullmatch(name)]


def _is_part(name: str) -> bool:
    return bool(name == CHECKSUMS or _FILE.fullmatch(name) or _PICTURE.fullmatch(name))


def _damaged(folder: Path, names: Iterable[str]) -> str:
    """What is the matter with the first file that is not as its checksum says; "" for nothing."""
    try:
        verify(folder, *(name for name in names if name != CHECKSUMS))
    except CheckpointError as error:
        return str(error).partition(". ")[0]
    return ""


def require_library() -> Any:
    """The package huggingface_hub, which is imported when it is needed only.

    Raises:
        HubError: when it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise HubError(
            "worlds on the hub need huggingface_hub: pip install 'nfd-env[hub]'"
        ) from None
    return huggingface_hub


@contextmanager
def _said(hub: Any, address: Address, writing: bool = False) -> Iterator[None]:
    """Turn the library's errors into one line each."""
    errors = hub.errors
    token = "`hf auth login`, or a token in the variable HF_TOKEN"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{address}: its owner wants to be asked first, on its page; then {token}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{address}: there is no such repository, or it is private: then {token}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{address}: there is no revision {address.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{address} is not in the cache, and the hub cannot be reached "
            f"({_reason(error.__cause__ or error)})"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            what = "may not be written" if writing else "may not be read"
            raise HubError(f"{address} {what} by you: {token}") from None
        raise HubError(f"{address}: the hub answered {status} ({_reason(error)})") from None
    except Exception as error:  # the library's network parts differ by its version
        if not isinstance(error, OSError | ValueError) and "http" not in type(error).__module__:
            raise
        what = "sent" if writing else "fetched"
        raise HubError(f"{address} could not be {what}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
