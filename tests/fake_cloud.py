"""A fake cloud for tests of the launcher: `fake_gcloud.py` on PATH, and what it was asked."""

from __future__ import annotations

import json
import pathlib
import sys

from launch import source, tpu_vm
from launch.gcloud import Runner

PLACE = ("--project=p", "--zone=us-central2-b")
TRAINER = ("--", "--config=configs/4m_l.py", "--workdir=gs://bucket/r1")
CAPACITY = 'ERROR: (gcloud) There is no more capacity in the zone "us-central2-b"; you can try in another zone'
REMOVE = "gcloud compute tpus tpu-vm delete r1 --project=p --zone=us-central2-b --quiet"


class Cloud:
    """Runs `launch.tpu_vm` in this process against the fake.

    Attributes:
      waits: seconds that it would have slept.
    """

    def __init__(self, tmp_path, monkeypatch, capsys):
        self.folder, self.capsys, self.waits = tmp_path / "cloud", capsys, []
        programs = tmp_path / "bin"
        programs.mkdir(), self.folder.mkdir()
        fake = pathlib.Path(__file__).with_name("fake_gcloud.py")
        (programs / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake} "$@"\n')
        (programs / "gcloud").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE_GCLOUD", str(self.folder))
        monkeypatch.setenv("FM4M_JOBS", str(tmp_path / "jobs"))
        # The checkout is another test's matter.
        monkeypatch.setattr(source, "resolve", lambda runner, allow_dirty: "c0ffee")
        monkeypatch.setattr(source, "pack", lambda runner, name, commit: runner.dry_run or _pack(name))

    def play(self, **scenario) -> None:
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def run(self, *argv: str) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        code = tpu_vm.main(list(argv), None if "--dry-run" in argv else Runner(sleep=self.waits.append))
        said = self.capsys.readouterr()
        return code, said.out + said.err

    def create(self, *flags: str, trainer=TRAINER) -> tuple[int, str]:
        return self.run("create", "r1", "--topology=v4-16", *PLACE, "--skip-check", *flags, *trainer)

    def calls(self) -> list[str]:
        """Commands after ``gcloud compute tpus``."""
        path = self.folder / "calls.jsonl"
        return [" ".join(json.loads(line)[2:]) for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, words: str) -> int:
        return sum(words in call for call in self.calls())

    def nodes(self) -> set[str]:
        return set(json.loads((self.folder / "state.json").read_text())["nodes"])


def _pack(name: str) -> None:
    source.archive_path(name).parent.mkdir(parents=True, exist_ok=True)
    source.archive_path(name).write_bytes(b"tar")
