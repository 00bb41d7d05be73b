"""The state of a batch job, in its output folder: what it is, and which shards are finished.

    OUTPUT/part-00000.parquet      vectors, a file for each shard
    OUTPUT/_gem/plan.json          what the job is bound to, its input files and shards
    OUTPUT/_gem/done/00000.json    written when part-00000 is whole; this decides
    OUTPUT/_gem/errors/00000.parquet   rows of the shard that were reported, with their reasons
    OUTPUT/_gem/summary.json       at the end
    OUTPUT/_gem/lock               of a local folder, held by the job that is at work in it

Names that begin with "_" are left out by whatever reads the folder as a data set. Nothing has the
name it is known by before it is whole: a local file is written beside it, synced and renamed; an
object store takes a file whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec

from gem_vllm.errors import GemError, first_line
from gem_vllm.folders import fsync
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import InputFile
from gem_vllm.serving.lock import held
from gem_vllm.serving.plan import Plan, Shard, differences, going_on

STATE = "_gem"
PLAN, SUMMARY = f"{STATE}/plan.json", f"{STATE}/summary.json"
DONE, ERRORS = f"{STATE}/done", f"{STATE}/errors"
LOCK = f"{STATE}/lock"
# A file that is not whole yet: its name, and a UUID.
SCRATCH = ".{name}-{uuid}"


class OutputFolder:
    """A job's output folder, local or on any fsspec file system.

    Args:
        url: of the folder; made when the first file is written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with self._refusing():
            self.fs, self.path = fsspec.core.url_to_fs(url)
        self.path = self.path.rstrip("/")
        self.local = "file" in (
            (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        )

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[str]:
        """A path to write; what is there at the end becomes the file ``name``, whole, or nothing.

        Args:
            name: in the folder, with "/".

        Raises:
            JobError: the file system refuses, for lack of space perhaps.
        """
        target = f"{self.path}/{name}"
        parent, _, leaf = target.rpartition("/")
        folder = parent if self.local else tempfile.gettempdir()
        scratch = f"{folder}/{SCRATCH.format(name=leaf, uuid=uuid.uuid4().hex)}"
        try:
            os.makedirs(folder, exist_ok=True)
            yield scratch
            if self.local:
                fsync(scratch)
                os.replace(scratch, target)
                fsync(parent)
            else:
                self.fs.put_file(scratch, target)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as the file ``name``."""
        with self.writing(name) as path:
            Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """What is in the file ``name``; None where there is no such file."""
        try:
            return json.loads(self.fs.cat_file(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise GemError(
                f"{self.url}/{name} is not JSON ({error}); choose another --output"
            ) from error

    def remove(self, name: str) -> None:
        """Remove the file ``name``, if there is one; JobError where that is not allowed."""
        path = f"{self.path}/{name}"
        try:
            # Asked first: who may write in an object store may not always remove there.
            if self.fs.exists(path):
                self.fs.rm_file(path)
        except OSError as error:
            raise self._unwritable(error) from error

    @contextlib.contextmanager
    def open_plan(self, bound: dict[str, Any], make: Callable[[], Plan]) -> Iterator[Plan]:
        """The plan of the job that this folder has, or a new one; for the time that it works.

        Args:
            bound: what the job at hand is bound to.
            make: the plan, for a folder that has none.

        Raises:
            GemError: the folder has another job's output, or something else, or another job is at
                work in it (of an object store this is not known).
        """
        with self._refusing():
            if self.fs.isfile(self.path):
                raise GemError(f"--output {self.url} is a file; name a folder")
            is_new = self.read_json(PLAN) is None
            if is_new:
                self._refuse_foreign()
        plan = make() if is_new else None
        with self._alone() as is_certain:
            if plan is not None:
                self._create_plan(plan)
            # Read in any case: another job may have been first.
            found = self.read_json(PLAN)
            other = "; ".join(differences(going_on(found["bound"], bound), bound))
            if other and is_certain and self._has_plan_alone():
                # As of a job whose engine refused an option: nothing is lost with it.
                found = asdict(make() if plan is None else plan)
                self.write_json(PLAN, found)
            elif other:
                raise GemError(
                    f"{self.url} has the output of another job: {other}. Choose another "
                    "--output, or give what the job began with to go on with it"
                )
            if found["bound"] != bound:
                self.write_json(PLAN, {**found, "bound": bound})
            yield Plan(
                bound,
                [InputFile(**file) for file in found["files"]],
                [Shard(**shard) for shard in found["shards"]],
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold a local folder; GemError where another job does.

        Yields:
            Whether it is certain that no other job is at work: an object store has no locks, nor
            have all file systems.
        """
        with contextlib.ExitStack() as stack:
            try:
                mine = stack.enter_context(held(Path(self.path, LOCK))) if self.local else None
            except OSError as error:
                raise self._unwritable(error) from error
            if mine is False:
                raise GemError(
                    f"another job is at work in {self.url}; wait for its end, or choose another "
                    "--output"
                )
            yield bool(mine)

    def _create_plan(self, plan: Plan) -> None:
        """Write the plan, unless another job has been first."""
        if self.local:
            if self.read_json(PLAN) is None:
                self.write_json(PLAN, asdict(plan))
            return
        try:
            self.fs.pipe_file(
                f"{self.path}/{PLAN}", json.dumps(asdict(plan)).encode(), mode="create"
            )
        except OSError as error:
            if self.read_json(PLAN) is None:
                raise self._unwritable(error) from error

    def finished(self) -> dict[int, dict[str, Any]]:
        """Index to counts of every finished shard whose file is there."""
        self.fs.invalidate_cache()
        parts = set(self._names(""))
        markers = [
            f"{self.path}/{DONE}/{name}"
            for name in self._names(DONE)
            if not name.startswith(".") and f"part-{name.removesuffix('.json')}.parquet" in parts
        ]
        # Many small files: a remote file system reads them side by side. Unlike `cat`, this takes
        # no name for a glob.
        contents = self.fs.cat_ranges(markers, None, None, on_error="raise") if markers else []
        return {
            int(path.rsplit("/", 1)[-1].removesuffix(".json")): json.loads(text)
            for path, text in sorted(zip(markers, contents, strict=True))
        }

    def _names(self, folder: str) -> list[str]:
        path = f"{self.path}/{folder}".rstrip("/")
        try:
            paths = [found.rstrip("/") for found in self.fs.ls(path, detail=False)]
        except FileNotFoundError:
            return []
        # An object store's empty object for the folder is listed in it.
        return [found.rsplit("/", 1)[-1] for found in paths if found != path]

    def remove_scraps(self) -> None:
        """Remove what writers that were killed have left behind."""
        if not self.local:
            return
        root, pattern = Path(self.path), SCRATCH.format(name="*", uuid="[0-9a-f]" * 32)
        for folder in (root, root / DONE, root / ERRORS, root / STATE):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _has_plan_alone(self) -> bool:
        """Whether nothing was made of the plan yet."""
        return self._names("") == [STATE] and not self._names(DONE)

    def _refuse_foreign(self) -> None:
        if foreign := [name for name in self._names("") if name != STATE]:
            raise GemError(
                f"--output {self.url} holds something else ({foreign[0]}); choose another"
            )

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """As GemError, whatever a file system raises that cannot be used."""
        try:
            yield
        except GemError:
            raise
        except Exception as error:  # Some have errors of their own, for no credentials say.
            raise GemError(f"--output {self.url} cannot be used: {first_line(error)}") from error

    def _unwritable(self, error: OSError) -> JobError:
        return JobError(
            f"{self.url} cannot be written: {first_line(error)}. Mend that, and run the same "
            "command again to go on"
        )
