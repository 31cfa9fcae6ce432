"""An object store for tests: ``gs://`` paths of epath in a local folder, with what object stores refuse."""

from __future__ import annotations

import io
import os
import pathlib

from etils.epath import backend, gpath


class ObjectStore(backend._OsPathBackend):
    """Files appear when they are closed, and can be neither appended to nor renamed.

    Attributes:
      writes: names of the files written, in order.
    """

    def __init__(self, root: pathlib.Path):
        self._root, self.writes = root, []

    def _local(self, path) -> str:
        return os.path.join(self._root, os.fspath(path).removeprefix("gs://"))

    def open(self, path, mode):
        if "a" in mode:
            raise OSError("objects cannot be appended to")
        if "w" not in mode:
            return super().open(self._local(path), mode)
        store, kind = self, io.BytesIO if "b" in mode else io.StringIO

        class Upload(kind):
            def close(self):
                if not self.closed:
                    data = self.getvalue()
                    pathlib.Path(store._local(path)).parent.mkdir(parents=True, exist_ok=True)
                    pathlib.Path(store._local(path)).write_bytes(data if isinstance(data, bytes) else data.encode())
                    store.writes.append(os.path.basename(path))
                super().close()

        return Upload()

    def rename(self, path, dst):
        raise OSError("objects cannot be renamed")

    def replace(self, path, dst):
        raise OSError("objects cannot be renamed")


def _translated(name):
    method = getattr(backend._OsPathBackend, name)
    return lambda self, path, *args, **options: method(self, self._local(path), *args, **options)


for _name in ("exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "rmtree", "remove", "stat"):
    setattr(ObjectStore, _name, _translated(_name))


def install(monkeypatch, root: pathlib.Path) -> ObjectStore:
    """Makes ``gs://...`` a folder below ``root`` until the end of the test."""
    store = ObjectStore(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return store
