"""`mbib publish`: a finished run to the Hub, in one commit and a tag.

Either everything of a release is on the Hub or nothing is: files are uploaded first and appear with the commit, which
names its parent and so never overwrites what someone else has pushed in the meantime. The Hub client's own
`upload_folder` would send a slow upload in several commits, so `create_commit` is used.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mbib_timm.errors import MbibError, few, first_line
from mbib_timm.licences import check_licence
from mbib_timm.models.hub import patience, prepare_hub, split_repository, what_went_wrong
from mbib_timm.publishing.card import Stated
from mbib_timm.publishing.release import Release, git_oid, make_release
from mbib_timm.results.runs import read_run

Result = TypeVar("Result")

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0


class PublishError(MbibError):
    """The Hub refuses, cannot be reached, or holds something else than expected. A commit holds all of a release."""

    exit_status = 1


def publish(
    run: Path,
    *,
    repository: str | None = None,
    others: Sequence[Path] = (),
    private: bool = False,
    revision: str | None = None,
    inference_only: bool = False,
    dataset_name: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Publish a finished run, or show what would be published.

    Args:
        run: the run's folder.
        repository: ``organisation/name``; a model of the zoo has its own.
        others: folders of runs that differ in the seed alone, for the card.
        private: make the repository private, if it is new.
        revision: the tag; by default the next of v1, v2, v3.
        inference_only: leave out the classifiers that serve training only.
        dataset_name: what people call the training data; the recipe's name for them when None.
        license: of the weights, as the Hub spells it; a model of the zoo has its own.
        dry_run: print every file with its size, and the card; the Hub is not asked.

    Returns:
        The commit's address; None after a dry run.

    Raises:
        MbibError: the run is not finished, or is none of the zoo's and no repository is given; a repository that cannot
            be, or a licence that the Hub does not know.
        PublishError: the Hub refuses, or cannot be reached.
    """
    if repository is None:
        finished = read_run(run)
        model = finished.zoo_model
        if model is None:
            differing = f" (it differs from it in {few(finished.differing)})" if finished.differing else ""
            instead = f"name a repository with --repo-id YOU/{finished.name}"
            raise MbibError(f"{finished.name} of {run} is not in the zoo{differing}: {instead}")
        repository = model.repository
    try:
        split_repository(repository if revision is None else f"{repository}@{revision}")
    except MbibError as error:
        raise MbibError(f"--repo-id or --revision: {error}") from None
    if "/" not in repository:  # the Hub would put it under the owner of the token, where nothing else looks for it
        raise MbibError(f"--repo-id {repository}: expected OWNER/NAME, such as YOU/{repository}")
    stated = Stated(dataset_name, None if license is None else check_licence(license))
    release = make_release(run, repository, others, inference_only, stated)
    if dry_run:
        print(f"{release.repository} would get:\n\n{release.listing()}\n\nREADME.md:\n")
        print(release.files["README.md"].decode())
        return None
    return Publisher(HfApi(library_name="mbib_timm"), release).publish(private, revision)


class Publisher:
    """Brings a release onto the Hub, whose client finds the token; `wait` sleeps for a number of seconds."""

    def __init__(self, api: HfApi, release: Release, wait: Callable[[float], None] = time.sleep) -> None:
        self.api, self.release, self.wait = api, release, wait
        self.repository = release.repository

    @patience()
    def publish(self, private: bool, revision: str | None) -> str:
        """Commit what has changed, and tag it. Returns the address of the tag."""
        prepare_hub()
        self._retry(
            "create the repository", lambda: self.api.create_repo(self.repository, private=private, exist_ok=True)
        )
        head, files = self._remote()
        tags = self._tags()
        changes = self._changes(files)
        tag = revision or self._next_tag(tags, head if not changes else None)
        if tag in tags and (changes or tags[tag] != head):
            raise PublishError(
                f"{self.repository} already has a revision {tag} with other content; choose another name"
            )
        if changes:
            head = self._commit(head)
        if tag not in tags:
            self._tag(tag, head)
        state = "published" if changes else "unchanged"
        new = sum(isinstance(change, CommitOperationAdd) for change in changes)
        print(f"{state}: hf-hub:{self.repository}@{tag} ({new} of {len(self.release.files)} files new)")
        return f"{self.api.endpoint}/{self.repository}/tree/{tag}"

    def _tag(self, tag: str, head: str) -> None:
        """Tag a commit. Raises PublishError: it says what is on the Hub already; the next call finishes it."""

        def call() -> None:
            self.api.create_tag(self.repository, tag=tag, revision=head, exist_ok=True)
            if self._tags().get(tag) != head:  # whatever answered, or somebody else's tag
                raise RuntimeError(f"afterwards there is no tag {tag} of this commit")

        try:
            self._retry("tag the commit", call)
        except PublishError as error:
            raise PublishError(
                f"all files are in {self.repository}, commit {head[:8]}, and only its tag {tag} is missing; the same "
                f"command sets it ({error})"
            ) from None

    def _remote(self) -> tuple[str, dict[str, str]]:
        """Return the head of the main branch, and the digest of each of its files."""
        head = self._retry("read the repository", lambda: _commit_id(self.api.model_info(self.repository).sha))
        entries = self._retry(
            "list the repository",
            lambda: list(self.api.list_repo_tree(self.repository, revision=head, recursive=True)),
        )
        digests = {}
        for entry in entries:
            if isinstance(entry, RepoFile):  # and no folder
                digests[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
        return head, digests

    def _tags(self) -> dict[str, str]:
        refs = self._retry("list the revisions", lambda: self.api.list_repo_refs(self.repository))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _next_tag(self, tags: dict[str, str], head: str | None) -> str:
        """Return the tag that the head has, or the next number."""
        versions = {int(match[1]): tag for tag in tags if (match := re.fullmatch(r"v(\d+)", tag))}
        for number in sorted(versions, reverse=True):
            if tags[versions[number]] == head:
                return versions[number]
        return f"v{max(versions, default=0) + 1}"

    def _changes(self, remote: dict[str, str]) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return what brings the repository's files to the release's; figures that are no more go."""
        changes: list[CommitOperationAdd | CommitOperationDelete] = []
        for path, content in self.release.files.items():
            if remote.get(path) not in (git_oid(content), hashlib.sha256(content).hexdigest()):
                changes.append(CommitOperationAdd(path, content))
        gone = [path for path in remote if path.startswith("figures/") and path not in self.release.files]
        return changes + [CommitOperationDelete(path) for path in gone]

    def _commit(self, parent: str) -> str:
        """Make the commit; one whose answer was lost is found again by what it leaves."""

        def commit() -> str:
            head, remote = self._remote()
            if head != parent:
                if not self._changes(remote):  # it had arrived
                    return head
                raise self._changed_meanwhile()
            message = f"Publish {self.release.name}"
            operations = self._changes(remote)
            done = self.api.create_commit(self.repository, operations, commit_message=message, parent_commit=parent)
            return _commit_id(done.oid)

        return self._retry("commit", commit)

    def _retry(self, what: str, call: Callable[[], Result]) -> Result:
        """Call the Hub; try again, with growing waits, where it is busy or cannot be reached.

        Raises:
            PublishError: it refuses, or stays away.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except LocalTokenNotFoundError:
                raise PublishError("there is no token: log in with hf auth login, or set HF_TOKEN") from None
            except PublishError:
                raise
            except MbibError as error:  # the Hub has been silent for long
                raise PublishError(f"cannot {what}: {error}; publish again later") from None
            except OfflineModeIsEnabled as error:
                raise PublishError(
                    f"cannot {what}: {first_line(error)}; publish again where there is a network"
                ) from None
            except Exception as error:  # of the connection, and whatever the Hub's client makes of an answer
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status == 412:
                    raise self._changed_meanwhile() from None
                if status in (401, 403):
                    raise PublishError(
                        f"cannot {what}: the Hub does not accept the token, or the token may not write to "
                        f"{self.repository} (hf auth whoami shows whose it is)"
                    ) from None
                if status is not None and status < 500 and status != 429:
                    raise PublishError(f"cannot {what}: {what_went_wrong(error)}") from None
                if attempt == ATTEMPTS:
                    raise PublishError(
                        f"cannot {what}, after {ATTEMPTS} attempts: {what_went_wrong(error)}; publish again later"
                    ) from None
                self.wait(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise AssertionError

    def _changed_meanwhile(self) -> PublishError:
        return PublishError(
            f"{self.repository} was changed by someone else in the meantime; nothing was published. Check it, then "
            "publish again"
        )


def _commit_id(value: object) -> str:
    """Return the name of a commit. Raises ValueError for an answer that holds none."""
    if not re.fullmatch(r"[0-9a-f]{40}", str(value)):
        raise ValueError(f"no commit: {value!r}")
    return str(value)
