"""Tools that are killed at any moment and started again until they reach their end: the files that an undisturbed run
makes must be there, to the byte, and nothing that was finished may have been done twice.
"""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from library.data.scanning.files import is_image
from tests.fork_server import Ended, ForkServer

Kill = Mapping[str, object]
"""What `ForkServer.run` is told of it."""
UNFINISHED = "unfinished"
"""What the names of journals have in them."""


@dataclass(frozen=True)
class Work:
    """A tool's work in a folder."""

    script: str
    """The tool, as a module."""
    words: str
    """Of its command line; {here} is the folder, {shared} that of `share`."""
    make: Callable[[Path], None]
    """Fills the folder."""
    results: Sequence[str]
    """The files below the folder that the work makes or changes."""
    share: Callable[[Path], None] | None = None
    """Fills a folder that no run writes to, as with a model."""
    read: Callable[[Path], object] = Path.read_bytes
    """What of a file has to be the same."""
    again: str | None = None
    """More words, which have finished work done again; None if the work is small and always done as a whole."""
    at_once: int = 1
    """Files that may be finished while nothing is noted of them: so many a kill may have done twice with `again`."""
    each_time: Sequence[str] = ()
    """Results that every run writes anew, from what is done."""


class Place:
    """A folder in which work is done, always the same, since metadata names pictures by their paths."""

    def __init__(self, work: Work, folder: Path, server: ForkServer):
        self.work, self.server = work, server
        self.here, self.shared = folder / "här e", folder / "shared"
        self._temporary = TemporaryDirectory()
        self.temporary = Path(self._temporary.name)
        self.shared.mkdir()
        if work.share is not None:
            work.share(self.shared)

    def renew(self) -> None:
        """As it was before any work."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(exist_ok=True)
        self.work.make(self.here)

    def run(self, more: str | None = None, **kill: object) -> Ended:
        words = [
            word.replace("{here}", str(self.here)).replace("{shared}", str(self.shared))
            for word in f"{self.work.words} {more or ''}".split()
        ]
        return self.server.run(words, self.work.script, temporary=self.temporary, **kill)

    def files(self) -> dict[str, Path]:
        """All of them, by their names below the folder."""
        paths = (path for path in self.here.rglob("*") if path.is_file())
        return {path.relative_to(self.here).as_posix(): path for path in paths}

    def contents(self) -> dict[str, object]:
        return {name: self.work.read(path) for name, path in self.files().items()}

    def stamps(self) -> dict[str, tuple[int, int]]:
        """What changes when a file is written again."""
        return {name: (stat.st_ino, stat.st_ctime_ns) for name, path in self.files().items() if (stat := path.stat())}

    def changed_since(self, stamps: Mapping[str, tuple[int, int]]) -> set[str]:
        """The files that were written since these were their stamps."""
        return {name for name, stamp in self.stamps().items() if stamps.get(name) != stamp}

    def left(self) -> list[str]:
        """What a run keeps only until its end."""
        return [name for name in self.files() if name.endswith(".tmp") or UNFINISHED in name]

    def noted(self) -> set[str]:
        """The results of what an unfinished run has in its journal."""
        journals = [path for name, path in self.files().items() if UNFINISHED in name and not name.endswith(".tmp")]
        lines = [line for path in journals for line in path.read_bytes().splitlines(keepends=True)[1:]]
        sources = [Path(json.loads(line)[0]) for line in lines if line.endswith(b"\n")]
        kinds = {Path(name).suffix for name in self.work.results}

        def is_of(name: str, source: Path) -> bool:
            if not is_image(source.name):  # of which there are copies alone
                return Path(name).name == source.name
            # of which there are several kinds where each has results of its kind
            own = source.suffix not in kinds or name.endswith(source.suffix)
            return own and Path(name).name.startswith(source.stem)

        results = set(self.work.results) - set(self.work.each_time)
        return {name for name in results if any(is_of(name, source) for source in sources)}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what was there before it and at its end, and what it took."""

    before: Mapping[str, object]
    after: Mapping[str, object]
    ended: Ended


def undisturbed(place: Place, more: str | None = None) -> Whole:
    """A run to its end, which writes all results anew; with `more` words it comes after one without them."""
    start(place, more)
    before, stamps = place.contents(), place.stamps()
    ended = place.run(more, at=-1)
    assert ended.status == 0, ended.said
    assert "Traceback" not in ended.said
    after = place.contents()
    made = place.changed_since(stamps)
    assert made == set(place.work.results), made ^ set(place.work.results)
    now = place.stamps()
    in_place = {name for name in made & stamps.keys() if now[name][0] == stamps[name][0]}
    assert not in_place, f"not written under other names first: {in_place}"
    assert before.keys() <= after.keys()
    assert_tidy(place)
    return Whole(before, after, ended)


def start(place: Place, more: str | None) -> None:
    """What a run with `more` words begins with."""
    place.renew()
    if more is not None:
        ended = place.run()
        assert ended.status == 0, ended.said


def break_and_mend(place: Place, kills: Iterable[Kill], whole: Whole, more: str | None = None) -> list[Ended]:
    """Run it, broken off as often as that works, to its end; nothing may be lost, done twice or left over."""
    start(place, more)
    ends: list[Ended] = []
    finished: Counter[str] = Counter()
    for kill in (*kills, {}):
        stamps, noted = place.stamps(), place.noted()
        ended = place.run(more, **kill)
        ends.append(ended)
        assert_whole(place, whole)
        now = place.contents()
        changed = place.changed_since(stamps)
        assert not changed & noted, changed & noted
        finished.update(name for name in changed if name in place.work.results and now[name] == whole.after[name])
        if ended.status == 0:
            break
        if finished.keys() >= set(place.work.results) and not place.left():  # it was at its end: the next begins anew
            finished.clear()
        assert kill, ended.said
        expected = 130 if kill.get("by") == signal.SIGINT else -signal.SIGKILL
        assert ended.status == expected, ended.said
        assert "Traceback" not in ended.said
    assert place.contents() == whole.after
    assert_tidy(place, interrupted=bool(kill))
    twice = sum(times - 1 for name, times in finished.items() if name not in place.work.each_time)
    allowed = (len(ends) - 1) * place.work.at_once if more else 0
    assert twice <= allowed or place.work.again is None, f"{twice} files were finished again: {finished}"
    return ends


def assert_whole(place: Place, whole: Whole) -> None:
    """What has a final name is as it was before or as it will be, whenever one looks."""
    for name, content in place.contents().items():
        if name in whole.before or name in whole.after:
            assert content in (whole.before.get(name), whole.after.get(name)), name
        else:
            assert name.endswith(".tmp") or UNFINISHED in name, name


def assert_tidy(place: Place, interrupted: bool = False) -> None:
    """Nothing is left of unfinished work. A run that is interrupted when it has ended in all but name may leave its
    temporary folder, which the next one removes.
    """
    assert not place.left(), place.left()
    assert interrupted or not list(place.temporary.iterdir())
