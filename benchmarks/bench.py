"""What all scenarios are given: what was asked for on the command line, and places for servers to run in."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import BenchmarkError
from benchmarks.report import Table
from benchmarks.servers import OTHER_CHECKOUT, REALTIMED
from benchmarks.targets import Server, Target

__all__ = ["Bench"]


@dataclass
class Bench:
    """What was asked for on the command line, and where results go."""

    load: Path
    directory: Path
    servers: Sequence[Server]
    rounds: int
    seconds: float
    sizes: Sequence[int]
    clients: Sequence[int]
    """Subscribers, where a scenario is about messages."""
    crowds: Sequence[int]
    """Connections, where it is about connections."""
    windows: Sequence[int]
    full: bool
    against: Path | None
    """Another checkout of the project, whose daemon is compared with ours."""
    progress: Callable[[str], None]
    report: Callable[[Table], None]
    _cases: int = field(default=0)

    def place(self, name: str) -> Path:
        """Make a directory for one server of one case. Sockets get paths that are short and without spaces."""
        self._cases += 1
        place = self.directory / f"{self._cases}-{name.replace(' ', '-')}"
        place.mkdir()
        return place

    def chosen(self, *names: str) -> list[Server]:
        """Return those of the servers asked for that a scenario is about. Where ours is, so is that of `against`."""
        wanted = {*names, OTHER_CHECKOUT} if REALTIMED.name in names else names
        return [server for server in self.servers if server.name in wanted]

    @asynccontextmanager
    async def started(self, servers: Sequence[Server]) -> AsyncIterator[dict[str, tuple[Target, Path]]]:
        """Run servers; one that cannot is reported and left out."""
        async with AsyncExitStack() as stack:
            targets: dict[str, tuple[Target, Path]] = {}
            for server in servers:
                self.progress(f"starting {server.name}")
                place = self.place(server.name)
                try:
                    targets[server.name] = await stack.enter_async_context(server.running(place)), place
                except BenchmarkError as error:
                    print(f"{server.name}: {error}", file=sys.stderr)
            yield targets
