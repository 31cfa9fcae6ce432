"""The checkout as an archive at a git commit."""

from __future__ import annotations

import pathlib

from launch import jobs
from launch.gcloud import LaunchError, Runner

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What install and start need; a commit from before the launcher cannot be shipped by it.
NEEDED = ("setup.py", "constraints.txt", "launch/worker.sh", "fm4m/train.py")


def archive_path(name: str) -> pathlib.Path:
    """Where a job's archive is kept, so that `watch` ships the same code again whatever the checkout has become."""
    return jobs.folder() / f"{name}.tar.gz"


def resolve(runner: Runner, allow_dirty: bool, root: pathlib.Path = ROOT) -> str:
    """The commit to ship. Raises LaunchError for changes that are not committed, unless ``allow_dirty``.

    With ``allow_dirty`` it is a commit of the changes to tracked files, which no branch points to.
    """
    git = ["git", "-C", str(root)]
    if runner.dry_run:
        runner.say("refuses if this prints anything" + (", but for --allow-dirty" if allow_dirty else ""))
        runner.run([*git, "status", "--porcelain"])
        runner.run([*git, "stash", "create"] if allow_dirty else [*git, "rev-parse", "HEAD"])
        return "HEAD"
    changed = runner.check([*git, "status", "--porcelain"], "the state of the checkout").out.splitlines()
    head = runner.check([*git, "rev-parse", "HEAD"], "the commit of the checkout").out.strip()
    if not changed:
        return head
    some = ", ".join(line[3:] for line in changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    if not allow_dirty:
        raise LaunchError(
            f"not committed: {some}. A run must be repeatable from its commit: commit them, or add --allow-dirty to "
            "ship the tracked files as they are"
        )
    untracked = [line[3:] for line in changed if line.startswith("??")]
    if untracked:
        runner.say(f"not shipped, because git does not know them: {', '.join(untracked[:5])}")
    stash = runner.check([*git, "stash", "create", "fm4m launch"], "a commit of the changes").out.strip()
    return stash or head


def pack(runner: Runner, name: str, commit: str, root: pathlib.Path = ROOT) -> pathlib.Path:
    """Writes the archive of a commit. Raises LaunchError if it lacks what machines need."""
    path, git = archive_path(name), ["git", "-C", str(root)]
    if not runner.dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = runner.check([*git, "ls-tree", "-r", "--name-only", commit, *NEEDED], f"files of commit {commit}")
        if missing := sorted(set(NEEDED) - set(listed.out.splitlines())):
            lacks = ", ".join(missing)
            raise LaunchError(f"commit {commit[:12]} has no {lacks}, which the machines need; commit them first")
    runner.check([*git, "archive", "--format=tar.gz", f"--output={path}", commit], f"the archive of commit {commit}")
    return path
